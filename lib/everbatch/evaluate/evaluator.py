"""Scores on tasks, without a trace in the training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, overload

import torch
from torch import Tensor, nn

from everbatch.data import Batch, Stream, Task, evaluation_batches
from everbatch.distributed import World
from everbatch.evaluate.candidates import allowed_classes
from everbatch.nn.compiled import is_compiled
from everbatch.nn.own_buffers import own_buffers
from everbatch.problems import Classification, Problem
from everbatch.rows import Rows

__all__ = ["Evaluator", "accuracies", "evaluating", "evaluator_of", "firsts", "mean_buffers", "scores"]


@dataclass(frozen=True)
class Evaluator:
    """Predicts test samples on every rank, each once, and counts."""

    module: nn.Module
    """Put into evaluation mode meanwhile."""
    predict: Callable[[Batch], Tensor]
    """Outputs of a batch whose inputs are ready: logits (n, classes), or what the problem takes."""
    inputs_of: Callable[[Rows], Rows]
    """Model inputs of samples as the source gives them."""
    world: World
    device: torch.device
    rows: int
    """Samples per rank and forward."""
    problem: Problem = field(default_factory=Classification)
    """What outputs and scores are."""

    def accuracies(
        self, stream: Stream, seen: int, tasks: list[Task], *, stop: Callable[[bool], bool] | None = None,
    ) -> list[float] | None:
        """See the function `accuracies`."""
        return firsts(self.scores(stream, seen, tasks, stop=stop))

    def scores(
        self, stream: Stream, seen: int, tasks: list[Task], *, stop: Callable[[bool], bool] | None = None,
    ) -> list[dict[str, float]] | None:
        """See the function `scores`."""
        found = self.sums(stream, seen, tasks, functools.partial(self.ready, stream), stop=stop)
        return None if found is None else [self.problem.scores(row) for row in found]

    def ready(self, stream: Stream, task: Task, ids: Tensor | None = None) -> Iterator[Batch]:
        """This rank's share of the task's test samples, or of these, in batches that `predict` takes."""
        for batch in evaluation_batches(stream, task, self.rows, self.world, ids=ids):
            moved = batch.to(self.device)
            yield replace(moved, inputs=self.inputs_of(moved.inputs))

    @torch.no_grad()
    def sums(
        self, stream: Stream, seen: int, tasks: list[Task], batches: Callable[[Task], Iterable[Batch]], *,
        stop: Callable[[bool], bool] | None = None,
    ) -> Tensor | None:
        """What scores are made of, over all ranks: (tasks, k) float64 on the CPU, for `problem.scores`.

        `batches(task)`: this rank's, ready, in equally many batches on every rank. Else as `scores`. One
        all-reduce for all tasks; for the classes' accuracy of integers, so that any number of ranks gives
        the same.
        """
        found: list[Tensor] = []
        begun = 0
        with evaluating(self.module, self.world):
            for task in tasks:
                allowed = allowed_classes(stream, seen, task).to(self.device) if self.problem.labels else None
                parts = []
                for batch in batches(task):
                    if stop is not None and begun % 10 == 0 and stop(True):
                        return None
                    begun += 1
                    assert batch.weight is not None
                    outputs = self.predict(batch)
                    parts.append(self.problem.sums(outputs, batch.targets, batch.weight, allowed))
                found.append(torch.stack(parts).sum(0))
        return self.world.sum(torch.stack(found)).cpu()


class Predicts(Protocol):
    """What `accuracies` needs of a trainer; its `problem` where it has one, else classification."""

    module: nn.Module
    world: World
    device: torch.device
    config: Any
    """`eval_batch`: samples per rank and forward."""

    def predict(self, batch: Batch) -> Tensor: ...

    def inputs_of(self, raw: Rows) -> Rows: ...


@overload
def accuracies(trainer: Predicts, stream: Stream, seen: int, tasks: list[Task]) -> list[float]: ...


@overload
def accuracies(
    trainer: Predicts, stream: Stream, seen: int, tasks: list[Task], *, stop: Callable[[bool], bool],
) -> list[float] | None: ...


def accuracies(
    trainer: Predicts, stream: Stream, seen: int, tasks: list[Task], *, stop: Callable[[bool], bool] | None = None,
) -> list[float] | None:
    """Accuracy on the test samples of each task, in [0, 1], counted exactly once each at any world size. Of a problem that is no
    classification, the first of its `scores`.

    Class-incremental: the prediction is among the classes of tasks 0 to `seen` (a task not yet seen: among its own as well).
    Task-incremental: among the task's classes. Otherwise: among all.

    `stop(True)` is asked on all ranks before every tenth batch; where it says so, there is no result.

    Cost: one forward of every test sample; one all-reduce for all tasks. Training flags, statistics and random streams are as
    before.
    """
    return firsts(scores(trainer, stream, seen, tasks, stop=stop))


def scores(
    trainer: Predicts, stream: Stream, seen: int, tasks: list[Task], *, stop: Callable[[bool], bool] | None = None,
) -> list[dict[str, float]] | None:
    """The scores of the trainer's problem on the test samples of each task, by name: ratios of sums over all of them, so that
    any number of ranks gives the same. Else as `accuracies`."""
    return evaluator_of(trainer).scores(stream, seen, tasks, stop=stop)


def evaluator_of(trainer: Predicts) -> Evaluator:
    """What predicts and counts for this trainer, with its weights and its problem as they are now."""
    problem = getattr(trainer, "problem", None) or Classification()
    return Evaluator(trainer.module, trainer.predict, trainer.inputs_of, trainer.world, trainer.device,
                     trainer.config.eval_batch, problem)


def firsts(found: list[dict[str, float]] | None) -> list[float] | None:
    """The first score of each task, which a trainer's matrix holds."""
    return None if found is None else [next(iter(values.values())) for values in found]


@contextmanager
def evaluating(module: nn.Module, world: World) -> Iterator[None]:
    """Evaluation mode with the mean over ranks of every floating buffer; everything is put back, flag by flag, afterwards, and
    so are `own_buffers`, which forwards may move in evaluation mode too.
    What was compiled for training runs as it is: another mode, and batches of other sizes, would each be one more graph."""
    flags = [(m, m.training) for m in module.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    compiled = any(map(is_compiled, module.modules()))
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    apart = own_buffers(module)
    moving = [(buffer, buffer.clone()) for name, buffer in module.named_buffers() if name in apart]
    with mean_buffers(module, world), torch.random.fork_rng(devices=devices), eager:
        module.eval()
        try:
            yield
        finally:
            for m, training in flags:
                m.training = training
            for buffer, kept in moving:
                buffer.copy_(kept)


@contextmanager
def mean_buffers(module: nn.Module, world: World) -> Iterator[None]:
    """Floating buffers replaced by their mean over ranks inside the block; those whose shapes differ by rank, tables that grew
    with what a rank has seen, stay, and so do those of `own_buffers`. One small gather and one all-reduce; none on one rank."""
    own = []
    if world.size > 1:
        kept_apart = own_buffers(module)
        floating = {name: b for name, b in module.named_buffers() if b.is_floating_point() and name not in kept_apart}
        everywhere: list[Any] = world.gather({name: tuple(b.shape) for name, b in floating.items()})
        own = [(b, b.clone()) for name, b in floating.items() if all(theirs.get(name) == tuple(b.shape) for theirs in everywhere)]
    if own:
        flat = world.sum(torch.cat([kept.float().flatten() for _, kept in own])).div_(world.size)
        parts = torch.split(flat, [kept.numel() for _, kept in own])
        for (buffer, kept), mean in zip(own, parts, strict=True):
            buffer.copy_(mean.view(kept.shape))
    try:
        yield
    finally:
        for buffer, kept in own:
            buffer.copy_(kept)
