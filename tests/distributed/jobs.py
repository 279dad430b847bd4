"""What the ranks of a launch do, by name; every check compares with another run, bit for bit unless it says otherwise."""

from __future__ import annotations

import functools
import math
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trainers
from record import Job, Outcome, Record, Tensors
from torch import Tensor

import learning
from everbatch import distributed
from everbatch.data import Batch, Task
from everbatch.distributed import World
from everbatch.errors import UnsupportedHost
from everbatch.evaluate.evaluator import accuracies
from everbatch.report.recorder import read_scalars
from everbatch.train import ContinualEvaluation, Replay, StepRecord, Trainer, TrainerMixin
from learning import Abandoned, Learner, buffers, everything, memory, stream, union, whole


def cut(host: str, folder: Path, after: int, **options: Any) -> Any:
    """A run that is left after so many steps."""
    t = learning.trainer(host, folder=folder / "checkpoints", recorder=learning.recorder(folder, after), **options)
    try:
        t.fit(stream(), resume=after == 0)
    except Abandoned:
        return t
    raise AssertionError("the run was not left")


def full(host: str, folder: Path, *, resume: bool = False, **options: Any) -> Any:
    """A run to the end."""
    t = learning.trainer(host, folder=folder / "checkpoints", recorder=learning.recorder(folder), **options)
    t.fit(stream(), resume=resume)
    t.recorder.close()
    return t


def same_scalars(found: Outcome, one: Path, other: Path) -> None:
    if World.current().rank == 0:
        found.require((one / "scalars.jsonl").read_bytes() == (other / "scalars.jsonl").read_bytes(), "scalars.jsonl differs")


def resume(record: Record, store: Path, argument: str) -> None:
    """HOST/STEP,STEP: left after some step and resumed by other objects, from other weights; everything as in the run that was
    not. After 5: inside the first task, 9: one step after a task boundary, 23: inside the last task. A checkpoint is written
    every second step and after each task, so the run goes on from step 4, 8 and 22."""
    host, _, ends = argument.partition("/")
    folder = store / f"resume-{World.current().size}-{host}"
    expected = everything(full(host, folder / "whole"))
    for after in map(int, ends.split(",")):
        with record.check(f"resume/{host}/{after}") as found:
            cut(host, folder / str(after), after)
            again = full(host, folder / str(after), resume=True, model=learning.net(99))
            found.require(len(again.matrix) == 3 and again.step == learning.STEPS, f"{again.step} steps, matrix {again.matrix}")
            found.same_bits(everything(again), expected, "resumed")
            same_scalars(found, folder / str(after), folder / "whole")


def killed(record: Record, store: Path, argument: str) -> None:
    """HOST/N/RANK: in attempt N of the launcher this rank kills itself; in the next the run goes on and ends as one that was
    never interrupted. Each has its own attempt, so one launch does for several hosts."""
    host, number, rank = argument.split("/")
    folder, attempt = store / f"killed-{host}", int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    recorder = learning.recorder(folder, 13 if attempt == int(number) else -1, signal.SIGKILL, rank=int(rank))
    t = learning.trainer(host, folder=folder / "checkpoints", recorder=recorder,
                         model=learning.net(max(0, attempt - int(number))))
    t.fit(stream(), resume=True)
    recorder.close()
    with record.check(f"killed/{host}") as found:
        found.require(attempt > int(number), "nobody was killed")
        reference = full(host, folder / f"whole-{attempt}")
        found.same_bits(everything(t), everything(reference), "killed and restarted")
        same_scalars(found, folder, folder / f"whole-{attempt}")


MOVED: dict[str, Any] = {"batch_size": 6, "replay": {"replay_batch": 6}}
"""Which three ranks can share, two samples each (BatchNorm needs them): five steps an epoch, ten a task."""


def leave(record: Record, store: Path, host: str) -> None:
    """Write a checkpoint after step 12, inside the second task, and what is in it, for `enter`."""
    folder, world = store / f"left-{World.current().size}-{host}", World.current()
    cut(host, folder, 13, **MOVED)
    t = cut(host, folder, 0, **MOVED)
    kept = {"whole": whole(t), "union": union(t), "buffers": world.gather(buffers(t)),
            "accuracies": accuracies(t, stream(), 1, list(stream().tasks))}
    if world.rank == 0:
        torch.save(kept, folder / "kept.pt")
    world.barrier()


def enter(record: Record, store: Path, argument: str) -> None:
    """SIZE-SOURCE/HOST: go on from what `leave` wrote on SIZE ranks.

    Weights, moments, averages and the memory are the same bits at any number of ranks and stage. What changes: buffers that
    differed by rank are their mean, and dropout masks follow the new ranks."""
    source, _, host = argument.partition("/")
    world, size = World.current(), int(source.partition("-")[0])
    folder = store / f"entered-{source}-{world.size}-{host}"
    if world.rank == 0:
        shutil.copytree(store / f"left-{source}", folder)
    world.barrier()
    kept = torch.load(folder / "kept.pt", weights_only=True)
    with record.check(f"enter/{source}/{host}-{world.size}") as found:
        t = cut(host, folder, 0, model=learning.net(98), **MOVED)
        found.require(t.step == 12 and len(t.matrix) == 1, f"step {t.step}")
        found.same_bits(whole(t), kept["whole"], "weights, moments, averages")
        found.same_bits(union(t), kept["union"], "memory")
        ids = union(t)["index/ids"]
        found.require(len(ids) == len(ids.unique()) == learning.REPLAY["capacity"], "a sample is there twice")
        held = memory(t)["rows/raw"]
        found.require(world.size == 1 or len(held) < len(ids), "the payload is not spread")
        mine = kept["buffers"][world.rank] if size == world.size else mean(kept["buffers"])
        found.same_bits(buffers(t), mine, "buffers")
        if size != world.size:  # evaluation means over the ranks as well, so both see the same numbers
            found.require(accuracies(t, stream(), 1, list(stream().tasks)) == kept["accuracies"], "accuracies differ")
        again = full(host, folder, resume=True, **MOVED)
        found.require(again.step == 30 and len(again.matrix) == 3, "the run did not go on to the end")
        found.require(all(bool(v.isfinite().all()) for v in whole(again).values()), "not finite")


def mean(rows: list[Tensors]) -> Tensors:
    return {n: torch.stack([r[n] for r in rows]).mean(0) if v.is_floating_point() else v for n, v in rows[0].items()}


def invariance(record: Record, store: Path, host: str) -> None:
    """One rank and two see the same run: no running statistics and no dropout here. Sums of two halves round differently, so
    weights differ by some units in the last place of 0.1 after 24 steps."""
    world, options = World.current(), {"model": learning.net(smooth=True)}
    folder = store / f"invariance-{world.size}-{host}"
    t = full(host, folder, **options)
    kept = {"whole": whole(t), "union": union(t), "matrix": torch.tensor(t.matrix, dtype=torch.float64)}
    if world.size > 1:
        with record.check(f"same_seed/{host}") as found:
            again = full(host, store / f"again-{host}", model=learning.net(smooth=True))
            found.same_bits(everything(again), everything(t), "a second run with this seed")
            same_scalars(found, folder, store / f"again-{host}")
        with record.check(f"invariance/{host}", 1e-5) as found:
            one = torch.load(store / f"invariance-1-{host}.pt", weights_only=True)
            exact = [k for k in one["union"] if not one["union"][k].is_floating_point()]
            found.require({"index/ids", "index/targets", "index/positions", "index/tasks", "rows/raw"} <= set(exact), f"{exact}")
            found.same_bits({k: kept["union"][k] for k in exact}, {k: one["union"][k] for k in exact}, "memory")
            found.same_bits({"matrix": kept["matrix"]}, {"matrix": one["matrix"]}, "accuracies")
            found.measure(apart(kept["whole"], one["whole"]))
            found.measure(apart(kept["union"], one["union"]))
            if world.rank == 0:
                rows = [read_scalars(path / "scalars.jsonl") for path in (folder, store / f"invariance-1-{host}")]
                found.require(len(rows[0]) == learning.STEPS and [*map(sorted, rows[0])] == [*map(sorted, rows[1])], "tags")
                found.measure(max(abs(a[k] - b[k]) for a, b in zip(*rows, strict=True) for k in a))
    elif world.rank == 0:
        torch.save(kept, store / f"invariance-1-{host}.pt")


def apart(a: Tensors, b: Tensors) -> float:
    """Largest absolute difference."""
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


class Watching(TrainerMixin):
    """Evaluates after every step."""

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        accuracies(self, self.stream, self.task_index, list(self.stream.tasks))  # type: ignore[attr-defined, arg-type]


class Watched(Watching, Replay, Trainer):
    """Evaluates after every step."""


class Curved(ContinualEvaluation, Replay, Trainer):
    """Evaluates after every step, as the library does."""


class Counting(Trainer):
    """Keeps the ids of all samples that were predicted and count."""

    def predict(self, batch: Batch) -> Tensor:
        self.met = [*getattr(self, "met", []), *batch.ids[batch.weight > 0].tolist()]  # type: ignore[operator]
        return super().predict(batch)


def evaluation(record: Record, store: Path, host: str) -> None:
    """Evaluating leaves no trace, and counts every sample once."""
    world, folder = World.current(), store / f"evaluation-{World.current().size}-{host}"
    with record.check(f"evaluation/{host}/traces") as found:
        expected = full(host, folder / "rarely", eval_future=False)
        for name, options in (("often", {"cls": Watched}), ("curves", {"cls": Curved}),
                              ("future", {"eval_future": True})):
            got = full(host, folder / name, **options)
            for what in (whole, memory, buffers):
                found.same_bits(what(got), what(expected), f"{name}: {what.__name__}")
            rows = [[a for a in row if not math.isnan(a)] for row in got.matrix]
            found.require([row[: k + 1] for k, row in enumerate(rows)]
                          == [row[: k + 1] for k, row in enumerate(expected.matrix)], f"{name}: matrix")
            found.require([len(row) for row in rows] == ([3, 3, 3] if name == "future" else [1, 2, 3]), f"{rows}")
    with record.check(f"evaluation/{host}/once") as found:
        t = learning.trainer(host, cls=Counting, eval_batch=4)
        t.stream = stream()
        inner = next(m for m in t.module.modules() if isinstance(m, torch.nn.Dropout))
        t.module.train()
        inner.eval()
        flags, noise = [m.training for m in t.module.modules()], torch.get_rng_state()
        before = buffers(t)
        result = accuracies(t, stream(), 2, list(stream().tasks))
        found.require([m.training for m in t.module.modules()] == flags and not inner.training, "training flags changed")
        found.require(torch.equal(torch.get_rng_state(), noise), "the random state moved")
        found.same_bits(buffers(t), before, "buffers")
        ids = sorted(i for one in world.gather(t.met) for i in one)  # type: ignore[attr-defined]
        found.require(ids == sorted(i for task in stream().tasks for i in task.test_ids.tolist()), "not every sample once")
        counts = [a * len(task.test_ids) for a, task in zip(result, stream().tasks, strict=True)]
        found.require(all(abs(c - round(c)) < 1e-9 for c in counts), f"{counts}")


class Early(TrainerMixin):
    """Counts draws that were there before they were asked for."""

    def draw_batch(self, parts: list[Batch]) -> list[Batch]:
        self.early = getattr(self, "early", 0) + len(self.states[Replay].store._ready)
        return super().draw_batch(parts)  # type: ignore[misc, no-any-return]


class Ahead(Early, Learner):
    """Draws for the next step during this one."""


class InTime(Early, Learner):
    """Draws when it needs to."""

    draws_ahead = False


def ahead(record: Record, store: Path, host: str) -> None:
    """Drawn during the step before or when needed: the same run, with skipped steps in it. `resume` leaves such runs."""
    world, spoilt = World.current(), (5, 16)

    def run(cls: type) -> Any:
        def prepare(inputs: Tensor) -> Tensor:
            spoil = t.step in spoilt and t.module.training and world.rank == 0
            return learning.scale(inputs) * (math.nan if spoil else 1.0)

        t = learning.trainer(host, cls=cls, prepare=prepare)
        t.fit(stream())
        return t

    with record.check(f"ahead/{host}") as found:
        one, other = run(InTime), run(Ahead)
        # Two in each step but the first of a task and those after a skipped one.
        found.require((one.early, other.early) == (0, 2 * (learning.STEPS - 3 - len(spoilt))), f"{one.early}, {other.early}")
        found.same_bits(everything(other), everything(one), "drawn ahead")


class Photographing(TrainerMixin):
    """Keeps what the run is after every step."""

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        if not hasattr(self, "photographs"):
            self.photographs: list[Any] = []
        self.photographs.append((record.applied, whole(self), memory(self), buffers(self)))


class Photographed(Photographing, Learner):
    """Keeps what the run is after every step."""


def bad_numbers(record: Record, store: Path, host: str) -> None:
    """NaN in the last rank's inputs: the step leaves no trace on any rank; too many in a row end the run on all."""
    world, folder = World.current(), store / f"bad-{World.current().size}-{host}"
    bad: set[int] = set()

    def prepare(inputs: Tensor) -> Tensor:
        spoil = t.step in bad and t.module.training and world.rank == world.size - 1
        return learning.scale(inputs) * (math.nan if spoil else 1.0)

    with record.check(f"bad_numbers/{host}/skipped") as found:
        bad |= {0, 5, 9, 10}  # the first step of all among them
        t = learning.trainer(host, cls=Photographed, prepare=prepare, folder=folder, recorder=learning.recorder(folder),
                             max_bad_steps=3)
        t.fit(stream())
        found.require([p[0] for p in t.photographs] == [s not in bad for s in range(learning.STEPS)], "other steps were skipped")
        found.require(t.optimizer.skipped_count == 4 and t.bad_steps == 0, f"{t.optimizer.skipped_count} counted")
        for step in (5, 9, 10):
            for before, after in zip(t.photographs[step - 1][1:], t.photographs[step][1:], strict=True):
                found.same_bits(after, before, f"step {step}")
        t.recorder.close()
        if world.rank == 0:
            rows = read_scalars(folder / "scalars.jsonl")
            skipped = [float(sum(b <= s for b in bad)) for s in range(learning.STEPS)]
            found.require([r["steps/skipped"] for r in rows] == skipped, "log")
            found.require([math.isnan(r["loss/total"]) for r in rows] == [s in bad for s in range(learning.STEPS)], "loss log")
    with record.check(f"bad_numbers/{host}/stop") as found:
        bad |= {11, 12, 13}
        t = learning.trainer(host, prepare=prepare, max_bad_steps=5)
        try:
            t.fit(stream())
            found.require(False, "the run went on")
        except RuntimeError as error:
            text = "Trainer: 5 consecutive steps up to step 13 gave a gradient that is not finite"
            found.require(str(error).startswith(text) and t.step == 14, str(error))


def accumulation(record: Record, store: Path, host: str) -> None:
    """Two micro-batches are one batch, to rounding; replay parts are cut as well."""
    runs = [learning.trainer(host, model=learning.net(smooth=True), accumulation=k) for k in (1, 2)]
    for run in runs:
        run.fit(stream())
    with record.check(f"accumulation/{host}", 1e-5) as found:
        found.measure(apart(*(whole(run) for run in runs)))
        found.measure(apart(*(union(run) for run in runs)))


def own_memory(record: Record, store: Path, host: str) -> None:
    """A memory of the user's own: the last samples of the stream on every engine, the run of one process to rounding, and
    resumed bit for bit with what its object keeps."""
    folder = store / f"own-{World.current().size}-{host}"
    options: dict[str, Any] = {"replay": {"memory": functools.partial(learning.Newest, power=0.5)}}
    with record.check(f"own memory/{host}", 1e-5) as found:
        t = full(host, folder / "whole", model=learning.net(smooth=True), **options)
        kept = t.states[Replay].store.buffer
        last = 8 * learning.STEPS
        places = sorted(kept.positions[kept.filled].tolist())
        found.require(places == list(range(last - 20, last)), f"positions {places}")
        found.require(kept.own.offers == learning.STEPS and kept.own.met.sum() == last, "the object's own counts")
        if host == "plain":
            torch.save((whole(t), union(t)), store / "own.pt")
            one = whole(t), union(t)
        else:
            one = torch.load(store / "own.pt", weights_only=True)
        found.measure(apart(whole(t), one[0]))
        found.measure(apart(union(t), one[1]))
    with record.check(f"own memory resumed/{host}") as found:
        cut(host, folder / "cut", 13, model=learning.net(smooth=True), **options)
        again = full(host, folder / "cut", resume=True, model=learning.net(97, smooth=True), **options)
        found.same_bits(everything(again), everything(t), "resumed")
        own = again.states[Replay].store.buffer.own
        found.require(own.offers == kept.own.offers and bool((own.met == kept.own.met).all()), "the object's own counts")


def half(record: Record, store: Path, host: str) -> None:
    """bf16: it trains, masters stay float32, and it resumes bit for bit."""
    options: dict[str, Any] = {} if host.startswith("zero") else {"precision": "bf16"}
    folder = store / f"half-{World.current().size}-{host}"
    smooth = host.startswith("zero")  # DeepSpeed's bf16 and BatchNorm: refused, see tests/train
    with record.check(f"half/{host}") as found:
        expected = full(host, folder / "whole", model=learning.net(smooth=smooth), **options)
        masters = [v for k, v in whole(expected).items() if k.startswith("master/")]
        found.require(all(v.dtype == torch.float32 and bool(v.isfinite().all()) for v in masters), "masters")
        exact = learning.trainer(host.removesuffix("-bf16"), model=learning.net(smooth=smooth))
        exact.fit(stream())
        found.require(apart(whole(expected), whole(exact)) > 0, "nothing was computed in bf16")
        cut(host, folder / "cut", 13, model=learning.net(smooth=smooth), **options)
        again = full(host, folder / "cut", resume=True, model=learning.net(97, smooth=smooth), **options)
        found.same_bits(everything(again), everything(expected), "resumed")


def refused(record: Record, store: Path) -> None:
    """BatchNorm in DeepSpeed's bf16 on CPU is an error that names the way out, before the first step."""
    with record.check("refused/batch norm") as found:
        try:
            learning.trainer("zero1-bf16")
            found.require(False, "it was accepted")
        except UnsupportedHost as error:
            text = str(error)
            found.require("keeps its running statistics in fp32" in text and "trainer.precision=bf16" in text, text)


def method(record: Record, store: Path, argument: str) -> None:
    """KEY/HOST: the contract of one trainer mixin."""
    trainers.live(record, store, *argument.split("/"))


def told(record: Record, store: Path, key: str) -> None:
    """What a method has by its line in the table alone."""
    import added  # it builds every case of the contract suite

    added.told(record, store, key)


def case(record: Record, store: Path, argument: str) -> None:
    """NAME/HOST: the contract of one optimizer mixin."""
    import added

    added.case(record, store, argument)


def disagreement(record: Record, store: Path) -> None:
    """Ranks that were given different things: one error on every rank, before the first step, that names what differs."""
    world = World.current()
    last = world.rank == world.size - 1
    other = reordered() if last else stream()
    cases: dict[str, Any] = {
        "trainer.seed is 3 on rank 0 and 4 on rank": lambda: learning.trainer("ddp", seed=3 + last),
        "trainer.batch_size is 8 on rank 0 and 16": lambda: learning.trainer("ddp", batch_size=8 * (1 + last)),
        "recorder is True on rank 0 and False": lambda: learning.trainer(
            "ddp", recorder=None if last else learning.recorder(store / "disagreement")),
        "checkpoints is True on rank 0": lambda: learning.trainer("ddp", folder=None if last else store),
        "model is ": lambda: learning.trainer("ddp", model=learning.net(smooth=last)),
        "engine is ": lambda: learning.trainer("zero1" if last else "zero2"),
        "stream is ": lambda: learning.trainer("ddp").fit(other),
        "optimizer.momentum is 0.9 on rank 0 and 0.8": lambda: learning.trainer(
            "ddp", optimizer=momentum(0.8 if last else 0.9)).fit(stream()),
        "mixins.Replay is ": lambda: learning.trainer("ddp", replay={"alpha": 0.5 if last else 0.3}).fit(stream()),
    }
    for text, attempt in cases.items():
        with record.check(f"disagreement/{text.partition(' ')[0]}") as found:
            try:
                attempt()
                found.require(False, "nothing was noticed")
            except ValueError as error:
                found.require(text in str(error) and "must be the same on every rank" in str(error), str(error))


def foreign(record: Record, store: Path) -> None:
    """Where the default group takes no CPU tensors, as NCCL's alone, they go by a group beside it. There is no NCCL here: the
    question whether it takes them is answered for it."""
    expected, groups = everything(full("ddp", store / "own group")), list[Any]()

    def told(rows: Tensor) -> Any:
        groups.append(asked(rows))
        return groups[-1]

    asked = distributed._group_of
    with record.check("foreign group") as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_serves_no_cpu", lambda: True)
        patch.setattr(distributed, "_group_of", told)
        found.same_bits(everything(full("ddp", store / "foreign group")), expected, "by a group beside")
        found.require(bool(groups) and all(group is not None for group in groups), f"{len(groups)} collectives")


def momentum(value: float) -> Any:
    return type(learning.PLAIN)(learning.PLAIN.func, **{**learning.PLAIN.keywords, "momentum": value})


def reordered() -> Any:
    """The same stream with two training samples of the first task exchanged."""
    s = stream()
    first = s.tasks[0]
    ids = first.train_ids.clone()
    ids[[0, 1]] = ids[[1, 0]]
    return type(s)((Task(first.id, first.name, first.classes, ids, first.test_ids), *s.tasks[1:]), s.train, s.test, s.num_classes,
                   s.kind, s.label_map)


def jobs(record: Record, store: str, *names: str) -> Iterator[Job]:
    """STORE NAME[:ARGUMENT] ...: functions of this module. STORE is a folder in which one launch leaves what a later one, of
    another size, goes on from."""
    for name in names:
        job, _, argument = name.partition(":")
        yield name, functools.partial(globals()[job], record, Path(store), *([argument] if argument else []))
