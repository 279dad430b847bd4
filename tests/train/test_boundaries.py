"""Runs on blurry, online and task-free streams: what methods are told, what is refused, and runs that are cut and go on."""

from __future__ import annotations

import functools
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everbatch import Trainer, checkpoint, compose
from everbatch.data import Stream, Task, TensorSource, blurry, class_incremental, online, task_free
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch
from everbatch.evaluate.candidates import allowed_classes
from everbatch.optim import EWC, MAS, SI, DynamicSparsity, Refresh, ShrinkPerturb
from everbatch.train import ConAdv, Consolidate, GDumb, GrowingHead, Joint, Replay, Schedule, StepRecord, TrainerMixin, WarmStart


class Rehearsing(Replay, Trainer): ...


class Watched(TrainerMixin):
    """Writes down what it is told."""

    def on_task_start(self, task: Task) -> None:
        super().on_task_start(task)  # type: ignore[misc]
        self.heard = [*getattr(self, "heard", []), f"start {task.id}"]

    def on_task_end(self, task: Task) -> None:
        super().on_task_end(task)  # type: ignore[misc]
        self.heard.append(f"end {task.id}")

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        self.heard.append(str(record.parts[0].task))
        self.rates = [*getattr(self, "rates", []), self.optimizer.param_groups[0]["lr"]]  # type: ignore[attr-defined]

    @classmethod
    def needs_boundaries(cls, config: Any) -> str:
        return ""


def stream(tasks: int = 3, each: int = 16) -> Stream:
    def samples(count: int, seed: int) -> TensorSource:
        g = torch.Generator().manual_seed(seed)
        y = torch.arange(2 * tasks * count) % (2 * tasks)
        return TensorSource(torch.randn(len(y), 4, generator=g) + y[:, None], y, name=str(seed))

    return class_incremental(samples(each, 0), samples(4, 1), tasks=tasks)


def trainer(cls: Any = Rehearsing, optimizer: Any = None, classes: int = 6, folder: Path | None = None, epochs: int = 1,
            **options: Any) -> Any:
    torch.manual_seed(0)
    if issubclass(cls, Replay):
        options = {"capacity": 12, "replay_batch": 8, **options}
    config = options.pop("config", None) or Trainer.Config(batch_size=8, epochs=epochs)
    made = optimizer or functools.partial(compose(base=torch.optim.SGD), lr=0.05, momentum=0.9)
    return cls(nn.Linear(4, classes), made, config=config, folder=folder, **options)


def test_a_task_free_stream_is_one_task_to_methods() -> None:
    made = trainer(type("Both", (Watched, Rehearsing), {}), config=Trainer.Config(
        batch_size=8, epochs=2, schedule=Schedule(kind="cosine", warmup_epochs=0.25)))
    matrix = made.fit(task_free(stream()))
    assert made.heard == ["start 0", *["0"] * 24, "end 2"]  # 3 tasks of 4 steps, twice
    assert [sum(value == value for value in row) for row in matrix] == [1, 2, 3]  # evaluated after each task
    ramp = made.rates[:3] + made.rates[3:]
    peak = max(ramp)
    assert ramp.index(peak) == 3 and all(b < a for a, b in zip(ramp[3:], ramp[4:], strict=False))  # one warm-up, one decay
    seen = trainer(type("Both", (Watched, Rehearsing), {}), epochs=2)
    seen.fit(stream())
    assert [word for word in seen.heard if " " in word] == [f"{w} {k}" for k in range(3) for w in ("start", "end")]


def test_moments_are_never_reset_where_no_task_is_seen() -> None:
    """With a constant rate, a task-free run is the run whose optimizer is not reset, memory included."""
    hidden = trainer(key="stream")  # the other key hashes the task as well
    matrix = hidden.fit(task_free(stream()))
    open_ = trainer(key="stream", config=Trainer.Config(batch_size=8, reset_optimizer=False))
    assert str(open_.fit(stream())) == str(matrix) and torch.equal(open_.module.weight, hidden.module.weight)
    one, other = (t.states[Replay].store.buffer for t in (hidden, open_))
    assert set(one.tasks.tolist()) == {0} and set(other.tasks.tolist()) > {0}
    reset = trainer(key="stream")
    reset.fit(stream())
    assert not torch.equal(reset.module.weight, hidden.module.weight)


def no_seen(part: Any, base: Any = torch.optim.SGD, **options: Any) -> Any:
    return trainer(Trainer, functools.partial(compose(part, base=base), lr=0.05, **options))


@pytest.mark.parametrize(("make", "name", "why"), [
    (lambda: no_seen(EWC), "EWC", r"at_task_end\(\)"), (lambda: no_seen(SI), "SI", "at_task_end"),
    (lambda: no_seen(MAS), "MAS", "at_task_end"), (lambda: no_seen(Refresh), "Refresh", "at_task_end"),
    (lambda: trainer(type("T", (Consolidate, Trainer), {}), functools.partial(
        compose(DynamicSparsity, base=torch.optim.SGD), lr=0.05), isolate=True), "Consolidate", "consolidate"),
    (lambda: trainer(type("T", (WarmStart, Trainer), {}), functools.partial(
        compose(ShrinkPerturb, base=torch.optim.SGD), lr=0.05, factory=lambda: nn.Linear(4, 6))), "WarmStart", "on_task_start"),
    (lambda: trainer(memory="ring", num_tasks=3), "Replay", "memory='ring' keeps the last samples of each task"),
    (lambda: trainer(type("T", (ConAdv, Trainer), {}), tau=1), "ConAdv", "tau=1 crafts ahead")])
def test_what_has_to_see_boundaries_is_refused_by_name(make: Any, name: str, why: str) -> None:
    made = make()
    with pytest.raises(ValueError, match=rf"Trainer: {name} on a task-free stream, must not have to know where .*{why}"):
        made.fit(task_free(stream()))
    assert made.step == 0 and "on_task_start" in GrowingHead.needs_boundaries(None)


def test_what_sees_no_boundary_trains_without_one() -> None:
    made = no_seen(EWC, strength=0.0)
    made.fit(task_free(stream()))
    assert made.step == 12
    balanced = trainer(memory="class_balanced", key="stream")
    balanced.fit(task_free(stream()))
    held = balanced.states[Replay].store.buffer
    assert sorted(held.targets.tolist()) == sorted([*range(6)] * 2)


def test_an_online_stream_is_passed_once() -> None:
    made = trainer(epochs=2)
    with pytest.raises(ValueError, match="epochs=2 on an online stream, must be 1; its samples come once"):
        made.fit(online(stream()))
    once = trainer()
    assert str(once.fit(online(stream()))) == str(trainer().fit(stream())) and once.step == 12


def test_what_trains_on_earlier_samples_anew_is_refused_where_they_come_once() -> None:
    made = trainer(type("T", (Joint, Trainer), {}))
    with pytest.raises(ValueError, match="96 samples that come again in a later task of an online stream, must come once"):
        made.fit(online(stream()))
    with pytest.raises(ValueError, match=r"Joint on a task-free stream.*configure_stream\(\)"):
        made.fit(task_free(stream()))
    assert all("configure_stream" in part.needs_boundaries(None) for part in (Joint, GDumb))


class Cut(TrainerMixin):
    """Sends this process a signal after a step."""

    at = -1

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        if record.step == Cut.at:
            signal.raise_signal(signal.SIGTERM)


class Halting(Cut, Replay, Trainer): ...


MANNERS = {"blurry": lambda: blurry(stream(), 0.3, seed=5), "online": lambda: online(stream()),
           "task_free": lambda: task_free(blurry(online(stream()), 0.3))}


@pytest.mark.parametrize("name", MANNERS)
def test_cut_in_the_middle_of_a_task_it_goes_on_bit_for_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, decay = MANNERS[name], Trainer.Config(batch_size=8, schedule=Schedule(kind="cosine"))
    whole = trainer(Halting, folder=tmp_path / "whole", config=decay)
    matrix = whole.fit(make())
    monkeypatch.setattr(Cut, "at", 5)  # the second step of the second task
    cut = trainer(Halting, folder=tmp_path / "cut", config=decay)
    cut.fit(make())
    assert cut.step == 6 and cut.task_step == 2
    monkeypatch.setattr(Cut, "at", -1)
    again = trainer(Halting, folder=tmp_path / "cut", config=decay)
    assert str(again.fit(make(), resume=True)) == str(matrix)
    kept = [checkpoint.latest(tmp_path / part, world=World()) for part in ("whole", "cut")]
    assert kept[0] is not None and kept[1] is not None and kept[0].names() == kept[1].names()
    assert all(torch.equal(kept[0].whole(n), kept[1].whole(n)) for n in kept[0].names())


def test_a_run_is_not_resumed_in_another_manner(tmp_path: Path) -> None:
    plain = stream()
    trainer(folder=tmp_path).fit(blurry(plain, 0.3))
    with pytest.raises(CheckpointMismatch, match="its kind is 'class, blurry 0.3' there, 'class' here"):
        trainer(folder=tmp_path).fit(plain, resume=True)
    with pytest.raises(CheckpointMismatch, match="'class, blurry 0.3' there, 'class, blurry 0.3, online' here"):
        trainer(folder=tmp_path).fit(online(blurry(plain, 0.3)), resume=True)
    with pytest.raises(CheckpointMismatch, match="samples"):
        trainer(folder=tmp_path).fit(blurry(plain, 0.3, seed=1), resume=True)


def test_blurry_classes_count_as_seen_in_evaluation() -> None:
    """The prediction is among all that training has shown, so a class that came early is a candidate early."""
    mixed = blurry(stream(), 0.3)
    assert len(mixed.seen_classes(0)) > 2 and mixed.seen_classes(2) == tuple(range(6))
    assert allowed_classes(mixed, 0, mixed.tasks[0]).tolist() == list(mixed.seen_classes(0))
    assert set(mixed.targets(mixed.tasks[0].test_ids).tolist()) == set(mixed.tasks[0].classes)


@pytest.mark.rotated(0, 3)
def test_a_hundred_tasks_train(tmp_path: Path) -> None:
    """Of every task one step, an evaluation of all before it, and a checkpoint."""
    many = stream(100, each=4)
    made = trainer(classes=200, folder=tmp_path)
    matrix = made.fit(many)
    assert made.step == 100 and len(matrix) == 100 and [sum(v == v for v in row) for row in matrix] == list(range(1, 101))
    kept = checkpoint.latest(tmp_path, world=World())
    assert kept is not None and "scores" not in kept.meta["trainer"] and len(kept.meta["trainer"]["matrix"]) == 100
    again = trainer(classes=200, folder=tmp_path)
    assert str(again.fit(many, resume=True)) == str(matrix) and again.scores == made.scores
