"""Continual evaluation in one process: when, on what, what is kept, and what it refuses. Bits on engines: the contract suite."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import growing
import learning
from everbatch import compose
from everbatch.data import RowSource, iid, task_free, task_incremental
from everbatch.distributed import World
from everbatch.evaluate.evaluator import accuracies
from everbatch.evaluate.subsets import quotas, stratified_subset
from everbatch.metrics import Stability
from everbatch.optim import EMA
from everbatch.problems import Regression
from everbatch.report.recorder import Recorder, read_scalars
from everbatch.train import ContinualEvaluation, GrowingHead, Plasticity, Replay, StepRecord, Trainer, TrainerMixin
from learning import Abandoned, stream


class Curved(ContinualEvaluation, Replay, Trainer):
    """Watched, and rehearsing."""


def build(cls: type = Curved, **options: Any) -> Any:
    """The run of `learning` with options of the evaluation: those of the trainer go through its config."""
    own = {k: options.pop(k) for k in ("every", "dense", "subset", "windows", "window_unit", "averaged", "cache") if k in options}
    parted = functools.partial(cls, **own)
    config = {"epochs": 2, "batch_size": 8, "seed": 3}
    config |= {k: options.pop(k) for k in ("epochs", "checkpoint_every") if k in options}
    chosen = options.pop("optimizer", learning.PLAIN)
    mixins = learning.REPLAY if issubclass(cls, Replay) else {}
    return parted(options.pop("model", None) or learning.net(), chosen, "plain", config=Trainer.Config(**config),
                  prepare=options.pop("prepare", learning.scale), device="cpu", **mixins, **options)


class Alone(ContinualEvaluation, Trainer):
    """Watched alone."""


# ------------------------------------------------------------------------------------------------------ when, and on what
@pytest.mark.parametrize(("options", "of_a_task"), [
    ({"every": 3, "dense": 2}, [1, 2, 3, 6, 8]), ({"every": 1}, [*range(1, 9)]), ({"every": 50, "dense": 0}, [8]),
    ({"every": 4, "dense": 0}, [4, 8])])
def test_dense_after_a_boundary_then_sparser_and_always_at_the_end(options: dict[str, Any], of_a_task: list[int]) -> None:
    t = build(**options)
    t.fit(stream())
    found = t.curves
    assert found["step"].tolist() == [8 * k + n for k in range(3) for n in of_a_task]
    assert found["task"].tolist() == [k for k in range(3) for _ in of_a_task]
    begun = ~np.isnan(found["accuracy"])
    assert (begun == (np.arange(3) <= found["task"][:, None])).all()
    assert not np.isnan(found["untrained"]).any() and not np.isnan(found["ahead"]).any()


def test_the_numbers_are_those_of_a_run_that_is_evaluated_by_hand() -> None:
    class Photographs(TrainerMixin):
        def after_step(self, record: StepRecord) -> None:
            super().after_step(record)  # type: ignore[misc]
            me: Any = self
            now = me.task_index
            self.seen = [*getattr(self, "seen", []), accuracies(me, me.stream, now, list(me.stream.tasks[: now + 1]))]

    t = build(type("Both", (ContinualEvaluation, Photographs, Replay, Trainer), {}))
    matrix = t.fit(stream())
    curves = t.curves["accuracy"]
    by_hand = Stability(window_unit="iterations")
    for n, row in enumerate(t.seen):
        assert curves[n, : len(row)].tolist() == row
        by_hand.add(n + 1, n // 8, row)
    assert [row[: k + 1] for k, row in enumerate(curves[7::8].tolist())] == [row[: k + 1] for k, row in enumerate(matrix)]
    assert by_hand.summary() == t.stability.summary()
    report = t.report()
    assert report.values["forward_transfer"] is not None and report.values["min_accuracy"] == by_hand.min_accuracy
    sizes = [len(task.test_ids) for task in stream().tasks]
    ahead = sum(sizes) + sum(sizes[1:])
    cost = sum(sum(sizes[: 1 + n // 8]) for n in range(24))
    assert report.values["evaluated_samples"] == cost + ahead and report.values["evaluation_seconds"] > 0


def test_subsets_hold_of_each_class_its_share_and_stay() -> None:
    assert quotas(torch.tensor([50, 30, 20]), 10).tolist() == [5, 3, 2]
    assert quotas(torch.tensor([1, 1, 1]), 2).tolist() == [1, 1, 0]
    assert quotas(torch.tensor([7, 5]), 99).tolist() == [7, 5]
    s = stream()
    task = s.tasks[2]
    mine = stratified_subset(s, task.test_ids, 10, 3, "x")
    labels = s.targets(mine)
    whole = torch.bincount(s.targets(task.test_ids))[list(task.classes)].double()
    assert len(mine) == len(set(mine.tolist())) == 10 and set(mine.tolist()) <= set(task.test_ids.tolist())
    assert ((torch.bincount(labels)[list(task.classes)] - 10 * whole / whole.sum()).abs() < 1).all()
    assert torch.equal(mine, stratified_subset(s, task.test_ids, 10, 3, "x"))
    assert not torch.equal(mine, stratified_subset(s, task.test_ids, 10, 4, "x"))
    assert torch.equal(stratified_subset(s, task.test_ids, 10**6, 3), task.test_ids.sort().values)

    class Counting(TrainerMixin):
        def predict(self, batch: Any) -> Tensor:
            met = vars(self).setdefault("met", {})
            met.setdefault(batch.task, []).append(tuple(batch.ids[batch.weight > 0].tolist()))
            return super().predict(batch)  # type: ignore[misc, no-any-return]

    cls = type("Seen", (ContinualEvaluation, Counting, Trainer), {})
    runs = [build(cls, subset=5, every=4, dense=2, cache=cache) for cache in (True, False)]
    for t in runs:
        t.fit(s)
        # The full test set, at task ends, is the trainer's own.
        assert all(len({ids for ids in seen if len(ids) == 5}) == 1 for seen in t.met.values())
    one, other = (t.curves["accuracy"] for t in runs)
    assert runs[0].met == runs[1].met and np.array_equal(one, other, equal_nan=True)


# ------------------------------------------------------------------------------------------------------------ no trace
def noisy(inputs: Tensor) -> Tensor:
    """A `prepare` that draws from everybody's generators."""
    return learning.scale(inputs) + 0.01 * (torch.rand(()) + random.random() + np.random.rand())  # noqa: NPY002


def test_no_trace_in_weights_buffers_memory_averages_or_generators() -> None:
    """BatchNorm, dropout, EMA, SAM and rehearsal; on engines with ranks: tests/distributed and tests/contract."""
    build(learning.Learner).fit(stream())  # what is imported late may draw as well
    runs: list[Any] = []
    options = {"optimizer": learning.OPTIMIZER, "prepare": noisy, "augment": learning.jitter}
    for cls, own in ((Curved, {"averaged": True, "cache": False}), (learning.Learner, {})):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        t = build(cls, **options, **own)
        t.fit(stream())
        runs.append((t, random.random(), np.random.rand(), torch.rand(())))  # noqa: NPY002
    (watched, *drawn), (plain, *expected) = runs
    for what in (learning.whole, learning.memory, learning.buffers):
        one, other = what(watched), what(plain)
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one), what.__name__
    assert np.array_equal(watched.matrix, plain.matrix, equal_nan=True) and drawn == expected


@pytest.mark.rotated(2, 3)
def test_averaged_weights_are_those_of_ema() -> None:
    t = build(optimizer=functools.partial(compose(EMA, base=torch.optim.SGD), lr=0.1, ema_decay=0.9), averaged=True)
    t.fit(stream())
    raw = accuracies(t, stream(), 2, list(stream().tasks))
    with t.optimizer.averaged():
        average = accuracies(t, stream(), 2, list(stream().tasks))
    assert t.curves["accuracy"][-1].tolist() == average != raw
    assert t.report().values["weights"] == "averaged" and "averaged weights" in t.describe()
    with pytest.raises(ValueError, match="averaged=True and optimizer .*, must be composed with EMA; or leave averaged out"):
        build(averaged=True).fit(stream())


@pytest.mark.parametrize("after", [11])
def test_a_resumed_run_has_the_same_curves(tmp_path: Path, after: int) -> None:
    """Left inside a task; the metrics as well, which no checkpoint holds."""
    def run(folder: Path, leave: int = -1, resume: bool = False) -> Any:
        t = build(folder=folder / "checkpoints", recorder=learning.recorder(folder, leave), dense=3, every=2, checkpoint_every=2)
        try:
            t.fit(stream(), resume=resume)
        except Abandoned:
            return t
        t.recorder.close()
        return t

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", leave=after)
    again = run(tmp_path / "cut", resume=True)
    assert np.array_equal(whole.curves["accuracy"], again.curves["accuracy"], equal_nan=True)
    one, other = learning.everything(whole), learning.everything(again)
    assert one.keys() == other.keys() and "state/ContinualEvaluation.table" in one
    assert all(torch.equal(one[n].nan_to_num(-1), other[n].nan_to_num(-1)) for n in one)
    assert whole.stability.summary() == again.stability.summary() and whole.report().values["evaluated_samples"] > 0
    assert whole.report().values["evaluated_samples"] == again.report().values["evaluated_samples"]
    assert (tmp_path / "whole" / "scalars.jsonl").read_bytes() == (tmp_path / "cut" / "scalars.jsonl").read_bytes()
    row = read_scalars(tmp_path / "whole" / "scalars.jsonl")[-1]
    assert row["evaluation/task_0"] == whole.curves["accuracy"][-1, 0]
    assert row["evaluation/min_accuracy"] == whole.stability.min_accuracy


# ------------------------------------------------------------------------------------------------------ other streams
def test_a_task_is_predicted_among_its_own_classes_where_its_id_is_known() -> None:
    base = stream()
    s = task_incremental(base.train, base.test, tasks=3, seed=1, classes=range(6))
    t = build()
    t.fit(s)
    assert t.curves["accuracy"][-1].tolist() == t.matrix[-1]
    assert np.nanmean(t.curves["accuracy"]) > 0.5  # chance


@pytest.mark.rotated(1, 3)
def test_a_stream_without_visible_boundaries_is_evaluated_by_task() -> None:
    runs = [build(every=3, dense=2) for _ in range(2)]
    for t, s in zip(runs, (stream(), task_free(stream())), strict=True):
        t.fit(s)
    seen, hidden = (t.curves for t in runs)
    assert seen["step"].tolist() == hidden["step"].tolist() and seen["task"].tolist() == hidden["task"].tolist()
    assert not np.isnan(hidden["ahead"]).any()
    plain = build(learning.Learner)
    plain.fit(task_free(stream()))
    one, other = learning.whole(runs[1]), learning.whole(plain)
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_one_task_leaves_what_needs_two_undefined() -> None:
    base = stream()
    t = build(Alone, epochs=1, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    t.fit(iid(base.train, base.test))
    values = t.report().values
    assert values["min_accuracy"] is None and values["forgetting"] is None and values["accuracy"] == t.matrix[0][0]
    assert "min accuracy                   -" in t.report().lines[0] and list(t.figures()) == ["accuracy_over_steps"]


class Own:
    """A trainer of one's own, with no run behind it: least squares of digits, one step a call."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1)
        self.world, self.device, self.seed, self.step = World(), torch.device("cpu"), 0, 0
        self.stream, self.config = stream(), Trainer.Config(eval_batch=4)

    def inputs_of(self, raw: Tensor) -> Tensor:
        return learning.scale(raw)

    def predict(self, batch: Any) -> Tensor:
        return self.module(batch.inputs)  # type: ignore[no-any-return]

    def on_task_start(self, task: Any) -> None:
        pass

    on_task_end = on_task_start

    def after_step(self, record: Any) -> None:
        pass

    def fit(self) -> None:
        for task in self.stream.tasks:
            self.on_task_start(task)
            for _ in range(4):
                x, y = self.inputs_of(self.stream.fetch(task.train_ids)), self.stream.targets(task.train_ids)  # type: ignore[arg-type]
                self.optimizer.zero_grad()
                nn.functional.cross_entropy(self.module(x), y).backward()
                self.optimizer.step()
                self.after_step(None)
                self.step += 1
            self.on_task_end(task)


def test_a_trainer_of_ones_own_is_watched_too() -> None:
    t: Any = type("Watched", (ContinualEvaluation, Own), {})(every=2, dense=0)
    t.fit()
    assert t.curves["step"].tolist() == [2, 4, 6, 8, 10, 12] and not np.isnan(t.curves["untrained"]).any()
    assert t.stability.ends[2] == accuracies(t, t.stream, 2, list(t.stream.tasks)) and t.report().values["points"] == 6


def test_a_head_that_grows_is_evaluated_on_what_it_has() -> None:
    cls = type("Growing", (GrowingHead, ContinualEvaluation, Trainer), {})
    t = build(cls, model=growing.model(), grown=growing.model)
    t.fit(stream())
    assert np.isnan(t.curves["untrained"]).all() and not np.isnan(t.curves["ahead"]).any()
    assert t.report().values["forward_transfer"] is None and t.report().values["backward_transfer"] is not None


def test_another_problem_is_scored_by_its_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 4)
    rows = [RowSource(x[part], targets=x[part].sum(1, keepdim=True)) for part in (slice(0, 40), slice(40, 60))]
    model = nn.Linear(4, 1)
    t = Alone(model, functools.partial(compose(base=torch.optim.SGD), lr=0.05), "plain", problem=Regression(),
                           config=Trainer.Config(batch_size=8, epochs=3), device="cpu", subset=7)
    t.fit(iid(*rows))
    found = t.curves["accuracy"][:, 0]
    assert found[-1] > 0.5 > found[0] and t.stability.unit == "score" and t.report().values["subset_samples"] == [7]


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(("options", "text"), [
    ({"every": 0}, "every=0, must be an integer >= 1"), ({"dense": -1}, "dense=-1, must be an integer >= 0"),
    ({"subset": 0}, "subset=0, must be an integer >= 1"), ({"windows": (0,)}, "windows=0, must be an integer >= 1"),
    ({"windows": (10, 10)}, r"windows=\(10, 10\), must ascend"), ({"window_unit": "steps"}, "must be points or iterations")])
def test_bad_options_are_refused_at_construction(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"ContinualEvaluation: .*{text}|{text}"):
        build(**options)


@pytest.mark.rotated(2, 3)
def test_a_second_fit_begins_anew(tmp_path: Path) -> None:
    t = build()
    t.fit(stream())
    t.fit(stream())
    assert t.curves["step"].tolist() == list(range(25, 49)) and t.stability.points == 24


@pytest.mark.rotated(1, 3)
def test_the_recorder_gets_figures_that_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    t = build(every=4, dense=0)
    t.fit(stream())
    with Recorder(tmp_path, tensorboard=False) as recorder:
        for name, draw in t.report().figures.items():
            path = recorder.figure(name, draw(), t.step)
            assert path is not None and path.stat().st_size > 5000
    assert {p.stem for p in (tmp_path / "figures").glob("*.png")} == {"accuracy_over_steps", "forgetting"}




@pytest.mark.rotated(0, 3)
def test_a_recipe_reports_and_draws_what_mixins_saw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    from everbatch.experiment import ClassIncremental, Data, Engine, run

    options: Any = {"data": Data(), "engine": Engine(kind="plain"), "trainer": Trainer.Config(batch_size=64, epochs=1)}
    watch: Any = {"evaluation": ContinualEvaluation.Config(every=8, dense=2, subset=20)}
    watch["plasticity"] = Plasticity.Config(subset=20)
    values = run(ClassIncremental(tasks=2, output=str(tmp_path), **options, **watch)).values
    assert values["evaluation"]["task_ends"] == [10, 20] and values["evaluation"]["subset_samples"] == [20, 20]
    assert len(values["plasticity"]["dormant_units"]) == 2
    assert "evaluates raw weights after each of a task's first 2 steps, then every 8" in values["describe"]
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert drawn == {"accuracy_matrix", "accuracy_over_steps", "forgetting", "plasticity"}
