"""What a resumed run may have otherwise, what it is refused for, in words, and what it goes on from."""

from __future__ import annotations

import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import learning
from everbatch import checkpoint, compose
from everbatch.checkpoint.manifest import MANIFEST, dump
from everbatch.data import Stream, Task, class_incremental, task_incremental
from everbatch.data.sources import SubsetSource
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch
from everbatch.train import Schedule, Trainer, TrainerMixin
from everbatch.train.buffers import buffer_problem, carry_buffers, persistent, vacant
from learning import Abandoned, stream


def alone(folder: Path, **options: Any) -> Any:
    """A run of one task: 5 steps per epoch."""
    schedule = options.pop("schedule", Schedule(kind="cosine"))
    t = learning.trainer("plain", **({"cls": Trainer, "optimizer": learning.PLAIN} | options), folder=folder, batch_size=16,
                         checkpoint_every=3, schedule=schedule)
    t._tasks_told = None
    return t


@functools.cache
def one_task() -> Stream:
    return class_incremental(stream().train, stream().test, tasks=1, classes=range(6))


def test_an_unfinished_task_is_prolonged_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"cls": Trainer, "optimizer": learning.PLAIN, "folder": tmp_path}
    with pytest.raises(Abandoned):
        learning.trainer("plain", recorder=learning.recorder(tmp_path, 5), **options).fit(stream())
    lower = functools.partial(learning.PLAIN.func, lr=0.05, momentum=0.9)
    again = learning.trainer("plain", **(options | {"optimizer": lower}), epochs=3, schedule=Schedule(kind="cosine"))
    again.fit(stream(), resume=True)
    assert again.step == 36 and len(again.matrix) == 3
    said = ["learning rate 0.1 -> 0.05 from step 4 on", "schedule warmup_epochs 0.5 -> 0.0 from step 4 on",
            "epochs 2 -> 3 from step 4 on"]
    assert sorted(again.changes) == sorted(said) and all(text in capsys.readouterr().out for text in said[:1])
    once_more = learning.trainer("plain", **(options | {"optimizer": lower}), epochs=3, schedule=Schedule(kind="cosine"))
    once_more.fit(stream(), resume=True)
    assert sorted(once_more.changes) == sorted(said) and once_more.had_ended
    longer = learning.trainer("plain", **(options | {"optimizer": lower}), epochs=4, schedule=Schedule(kind="cosine"))
    with pytest.raises(CheckpointMismatch, match=r"made with trainer.epochs=3, this run has 4: all 3 tasks are finished"):
        longer.fit(stream(), resume=True)


def test_tasks_of_the_past_are_evaluated_at_the_end_alone(tmp_path: Path) -> None:
    options = {"cls": Trainer, "optimizer": learning.PLAIN}
    full = learning.trainer("plain", **options).fit(stream())
    few = {**options, "eval_past": False}
    with learning.recorder(tmp_path / "once") as told:
        once = learning.trainer("plain", recorder=told, **few).fit(stream())
    kept = [[a for a in row if not math.isnan(a)] for row in once]
    assert kept == [full[0][:1], full[1][1:2], full[2]]
    with learning.recorder(tmp_path / "left", 13) as ends, pytest.raises(Abandoned):
        learning.trainer("plain", recorder=ends, folder=tmp_path / "run", **few).fit(stream())
    again = learning.trainer("plain", folder=tmp_path / "run", **few).fit(stream(), resume=True)
    assert str(again) == str(once)


def test_a_finished_run_of_one_task_is_prolonged_as_if_it_had_been_longer(tmp_path: Path) -> None:
    constant = {"schedule": Schedule()}
    whole = alone(tmp_path / "whole", epochs=3, **constant)
    whole.fit(one_task())
    alone(tmp_path / "short", epochs=2, **constant).fit(one_task())
    again = alone(tmp_path / "short", epochs=3, model=learning.net(9), **constant)
    matrix = again.fit(one_task(), resume=True)
    assert matrix == whole.matrix and again.changes == [f"epochs 2 -> 3 from step {2 * whole.step // 3} on"]
    assert all(torch.equal(v, again.module.state_dict()[n]) for n, v in whole.module.state_dict().items())
    shorter = alone(tmp_path / "short", epochs=1, **constant)
    with pytest.raises(CheckpointMismatch, match=r"trainer.epochs=3, this run has 1: the task has had \d+ steps, more than"):
        shorter.fit(one_task(), resume=True)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matrix = alone(tmp_path).fit(one_task())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*") if path.is_file()}
    again = alone(tmp_path, model=learning.net(9), optimizer=functools.partial(learning.PLAIN.func, lr=0.7, momentum=0.9))
    assert again.fit(one_task(), resume=True) == matrix and again.had_ended and again.changes == []
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*") if path.is_file()}
    assert f"the run in {tmp_path} is finished, after {again.step} steps; nothing to train" in capsys.readouterr().out


def test_what_acted_at_the_end_of_a_task_bars_prolonging_it(tmp_path: Path) -> None:
    class Ended(TrainerMixin):
        def on_task_end(self, task: Task) -> None:
            super().on_task_end(task)  # type: ignore[misc]

    def run(epochs: int) -> Any:
        return alone(tmp_path, cls=type("Learner", (Ended, Trainer), {}), epochs=epochs)

    run(1).fit(one_task())
    with pytest.raises(CheckpointMismatch, match="trainer.epochs=1, this run has 2: Ended acted at the end of the task"):
        run(2).fit(one_task(), resume=True)


def streams() -> dict[str, tuple[Stream, str]]:
    train, test = stream().train, stream().test
    fewer, turned = SubsetSource(train, torch.arange(3, len(train))), SubsetSource(train, torch.arange(len(train)).flip(0))
    split = functools.partial(class_incremental, seed=1, classes=range(6))
    return {
        "order": (class_incremental(train, test, tasks=3, seed=2, classes=range(6)), r"the class order \[\d, .*\] there, \[\d,"),
        "tasks": (split(train, test, tasks=2), "3 tasks there, 2 here"),
        "sizes": (split(train, test, increments=[1, 2, 3]), r"task 0 has classes \[0, 1\] there, \[0\] here"),
        "samples": (split(fewer, test, tasks=3), r"has 32 training samples there, 29 here"),
        "kind": (task_incremental(train, test, tasks=3, seed=1, classes=range(6)), "its kind is 'class' there, 'task' here"),
        "other samples": (split(turned, test, tasks=3),
                          "the same tasks and class order, but other samples, or samples in another order: "
                          "the training samples have other labels or come in another order")}


@pytest.mark.parametrize("kind", ["order", "tasks", "sizes", "samples", "kind", "other samples"])
def test_another_stream_is_refused_in_words(tmp_path: Path, kind: str) -> None:
    with pytest.raises(Abandoned):
        learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN, folder=tmp_path,
                         recorder=learning.recorder(tmp_path, 3)).fit(stream())
    other, text = streams()[kind]
    again = learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN, folder=tmp_path)
    again._tasks_told = None
    with pytest.raises(CheckpointMismatch, match=f"made with another stream: .*{text}"):
        again.fit(other, resume=True)


class Spoiled(Trainer):
    """Inputs are infinite from some step on."""

    spoiled_from = 10**9

    def inputs_of(self, raw: Tensor) -> Tensor:
        inputs = super().inputs_of(raw)
        return inputs * float("inf") if self.step >= self.spoiled_from else inputs


def spoiled(folder: Path, begin: int, **options: Any) -> Any:
    t = learning.trainer("plain", cls=Spoiled, optimizer=learning.PLAIN, folder=folder, augment=None,
                         **({"checkpoint_every": 1, "max_bad_steps": 4} | options))
    t.spoiled_from = begin
    return t


def test_a_run_that_ended_in_skipped_steps_goes_on_from_before_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = spoiled(tmp_path / "whole", 10**9)
    whole.fit(stream())
    ended = spoiled(tmp_path / "cut", 5)
    with pytest.raises(RuntimeError, match=r"4 consecutive steps up to step 8 .* the first tensor that is not finite is the "
                                           r"input \(part 'stream'\) on rank 0, samples \[\d+, .*'1.weight'"):
        ended.fit(stream())
    assert sorted(p.name for p in (tmp_path / "cut").glob("step-*")) == ["step-00000005"]
    again = spoiled(tmp_path / "cut", 10**9, max_bad_steps=5)
    again.fit(stream(), resume=True)
    assert str(again.matrix) == str(whole.matrix)
    assert "goes on from step 5, the last checkpoint whose steps were healthy" in capsys.readouterr().out
    assert all(torch.equal(v, again.module.state_dict()[n]) for n, v in whole.module.state_dict().items())


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    class Broken(Trainer):
        def after_step(self, record: Any) -> None:
            super().after_step(record)
            if self.step == 3:
                self.module[4].weight.data[0, 0] = float("inf")

    t = learning.trainer("plain", cls=Broken, optimizer=learning.PLAIN, folder=tmp_path, checkpoint_every=2, model=nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Identity(), nn.Linear(8, 6)))
    with pytest.raises(RuntimeError, match=r"weights \['4.weight'\] are not finite, so no checkpoint was written"):
        t.fit(stream())
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == ["step-00000002"]


class Growing(nn.Module):
    """Buffers that a run makes longer, makes at all, or of another type, or does not save."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 6)
        self.register_buffer("passing", torch.zeros(0, 2), persistent=False)
        self.register_buffer("later", None)
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("fine", torch.zeros(()))
        self.register_buffer("number", torch.tensor(0))
        self.register_buffer("given_up", torch.ones(3))
        self.register_buffer("table", torch.zeros(1))
        self.table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passing = torch.ones(len(self.passing) + 1, 2)
            self.table = torch.cat([self.table, self.table[-1:] + 1])[-7:]
            self.later = torch.full((3,), float(len(self.table)))
            self.empty = torch.cat([self.empty.view(-1, 2), torch.ones(1, 2)])
            self.number = torch.full((2, 2), 0.5) * self.fine
            self.given_up = None
            self.fine = 0.9 * self.fine.double() + 0.1 * x.detach().double().mean()
            if not hasattr(self, "made"):
                self.register_buffer("made", torch.zeros(2, dtype=torch.int64))
            self.made += 1
        shift = self.table.mean() + self.fine.float() + self.number.float().mean() + (0 if self.given_up is None else 1)
        return self.head(x.flatten(1)) + shift + 0 * self.passing.sum()  # type: ignore[no-any-return]


def test_buffers_that_grew_shrank_or_came_later_are_resumed(tmp_path: Path) -> None:
    def growing(folder: Path, after: int = 0) -> Any:
        return learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN, folder=folder, model=Growing(),
                                recorder=learning.recorder(folder, after) if after else None)

    torch.manual_seed(0)
    whole = growing(tmp_path / "whole")
    whole.fit(stream())
    torch.manual_seed(0)
    with pytest.raises(Abandoned):
        growing(tmp_path / "cut", 5).fit(stream())
    kept = checkpoint.latest(tmp_path / "cut", world=World())
    assert kept is not None and {n for n in kept.names() if n.startswith("buffer/")} == {
        f"buffer/0/{name}" for name in ("table", "later", "empty", "fine", "number", "made")}
    again = growing(tmp_path / "cut")
    again.fit(stream(), resume=True)
    assert str(again.matrix) == str(whole.matrix)
    one, other = whole.module.state_dict(), again.module.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one) and one["made"].tolist() == [24, 24]


def test_buffers_go_over_to_a_model_that_has_grown() -> None:
    old, new = Growing(), Growing()
    old(torch.ones(2, 1, 8, 8))
    assert buffer_problem(persistent(old), new) == ""
    carry_buffers(persistent(old), vacant(old), new)
    one, other = old.state_dict(), new.state_dict()
    assert one.keys() == other.keys() and "given_up" not in one
    assert all(torch.equal(one[name], other[name]) for name in one if not name.startswith("head"))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grown")
    learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN, folder=folder, model=Growing()).fit(stream())
    return folder


@pytest.mark.parametrize(("change", "text"), [
    (lambda m: m.register_buffer("more", torch.zeros(2)), r"holds no buffers \['more'\], which the model has"),
    (lambda m: (m._buffers.pop("table"), setattr(m, "table", 3)), r"holds buffers \['table'\], which the model lacks"),
    (lambda m: m.register_buffer("table", torch.zeros(1, 2)), r"buffer table is torch.float32 \(7,\), the model's is .*\(1, 2\)"),
    (lambda m: m.register_buffer("table", torch.zeros(2, dtype=torch.int64)), r"buffer table is torch.float32 \(7,\), .*int64"),
], ids=["more", "fewer", "dimensions", "kind"])
def test_buffers_of_another_model_are_refused_untouched(grown: Path, change: Any, text: str) -> None:
    model = Growing()
    change(model)
    again = learning.trainer("plain", cls=Trainer, optimizer=learning.PLAIN, folder=grown, model=model)
    before = {n: v.clone() for n, v in again.module.state_dict().items()}
    with pytest.raises(CheckpointMismatch, match=text):
        again.fit(stream(), resume=True)
    assert all(torch.equal(v, before[n]) for n, v in again.module.state_dict().items()) and again.step == 0


@pytest.fixture(scope="module")
def replaying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replaying")
    learning.trainer("plain", folder=folder).fit(stream())
    return folder


META: dict[str, tuple[Any, str]] = {
    "step": (lambda t: t.update(step=10**14), r"trainer.step is 100000000000000, must be an integer in \[0, 24\]"),
    "task": (lambda t: t.update(task_index="1"), "trainer.task_index is '1', must be an integer"),
    "matrix": (lambda t: t.update(matrix=[["a"]] * 3), "trainer.matrix is .* must be a row of numbers for each of 3 tasks"),
    "no matrix": (lambda t: t.pop("matrix"), "its meta is not what a trainer writes: KeyError: 'matrix'"),
    "mixins": (lambda t: t.update(mixins=[]), "holds no Replay.store"),
    "store": (lambda t: t["mixins"]["Replay.store"].update(numbers=3), "Replay.store.numbers is 3 .*, must be a table"),
    "arrays": (lambda t: t["mixins"]["Replay.store"]["arrays"].append("x"), r"holds no tensors \['Replay.store/index/x'\]"),
    "array": (lambda t: t["mixins"].update({"Replay.store": 3}), "its meta is not what a trainer writes: TypeError"),
}


@pytest.mark.parametrize("kind", META)
def test_a_meta_of_wrong_types_is_a_mismatch_and_touches_nothing(replaying: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(replaying, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "step-00000024" / MANIFEST
    body = json.loads(path.read_bytes())
    body.pop("sha256")
    META[kind][0](body["meta"]["trainer"])
    path.write_bytes(dump(body))
    again = learning.trainer("plain", folder=tmp_path, model=learning.net(9))
    before = {n: v.clone() for n, v in again.module.state_dict().items()}
    with pytest.raises(CheckpointMismatch, match=META[kind][1]):
        again.fit(stream(), resume=True)
    assert all(torch.equal(v, before[n]) for n, v in again.module.state_dict().items()) and again.step == 0


def test_a_checkpoint_of_the_first_layout_resumes(tmp_path: Path) -> None:
    """It has no description of the stream, no health, no shapes, and an option that is free by now."""
    def run(model: int, after: int = 0) -> Any:
        return learning.trainer("plain", folder=tmp_path, model=learning.net(model),
                                recorder=learning.recorder(tmp_path, after) if after else None)

    with pytest.raises(Abandoned):
        run(0, 5).fit(stream())
    path = tmp_path / "step-00000004" / MANIFEST
    body = json.loads(path.read_bytes())
    for table, key in ((body, "sha256"), (body, "healthy"), (body["meta"], "layout"), (body["meta"], "stream"),
                       (body["meta"]["trainer"], "changes"), (body["meta"]["optimizer"], "shapes")):
        table.pop(key)
    body["meta"]["identity"]["trainer.max_bad_steps"] = 10
    path.write_bytes(dump(body))
    again = run(9)
    again.fit(stream(), resume=True)
    assert again.step == learning.STEPS and again.changes == []


@pytest.mark.parametrize(("change", "text"), [
    ({"config": {"batch_size": 3}}, "config={'batch_size': 3}, must be a Trainer.Config"),
    ({"device": "gpu"}, "device='gpu', must be 'cuda', 'cuda:N' or 'cpu'"),
    ({"engine": {"zero_optimization": {"stage": 2}}}, "a DeepSpeed configuration without train_batch_size"),
    ({"model": torch.nn.Linear}, "model is the class Linear, must be a module")])
def test_arguments_that_are_none(change: dict[str, Any], text: str) -> None:
    optimizer = functools.partial(compose(base=torch.optim.SGD), lr=0.1)
    with pytest.raises(ValueError, match=text):
        Trainer(**{"model": torch.nn.Linear(2, 2), "optimizer": optimizer, "engine": "plain", **change})
