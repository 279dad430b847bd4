"""Scores on tasks, without a trace in the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

__all__ = ["Evaluator", "accuracies", "evaluating", "firsts", "mean_buffers", "scores"]


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

    @torch.no_grad()
    def scores(
        self, stream: Stream, seen: int, tasks: list[Task], *, stop: Callable[[bool], bool] | None = None,
    ) -> list[dict[str, float]] | None:
        """See the function `scores`."""
        found: list[Tensor] = []
        begun = 0
        with evaluating(self.module, self.world):
            for task in tasks:
                allowed = allowed_classes(stream, seen, task).to(self.device) if self.problem.labels else None
                parts = []
                for batch in evaluation_batches(stream, task, self.rows, self.world):
                    if stop is not None and begun % 10 == 0 and stop(True):
                        return None
                    begun += 1
                    parts.append(self._sums(batch, allowed))
                found.append(torch.stack(parts).sum(0))
        return [self.problem.scores(row) for row in self.world.sum(torch.stack(found)).cpu()]

    def _sums(self, batch: Batch, allowed: Tensor | None) -> Tensor:
        """What scores are made of."""
        ready = batch.to(self.device)
        outputs = self.predict(replace(ready, inputs=self.inputs_of(ready.inputs)))
        assert ready.weight is not None
        return self.problem.sums(outputs, ready.targets, ready.weight, allowed)


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
    problem = getattr(trainer, "problem", None) or Classification()
    evaluator = Evaluator(trainer.module, trainer.predict, trainer.inputs_of, trainer.world, trainer.device,
                          trainer.config.eval_batch, problem)
    return evaluator.scores(stream, seen, tasks, stop=stop)


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
    with what a rank has seen, stay, and so do those of `own_buffers`. One small gather, one all-reduce each; none on one rank."""
    own = []
    if world.size > 1:
        kept_apart = own_buffers(module)
        floating = {name: b for name, b in module.named_buffers() if b.is_floating_point() and name not in kept_apart}
        everywhere: list[Any] = world.gather({name: tuple(b.shape) for name, b in floating.items()})
        own = [(b, b.clone()) for name, b in floating.items() if all(theirs.get(name) == tuple(b.shape) for theirs in everywhere)]
    for buffer, _ in own:
        mean = world.sum(buffer.float().clone()).div_(world.size)
        buffer.copy_(mean)
    try:
        yield
    finally:
        for buffer, kept in own:
            buffer.copy_(kept)
