"""Accuracy on tasks, without a trace in the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, overload

import torch
from torch import Tensor, nn

from everbatch.data import Batch, Stream, Task, evaluation_batches
from everbatch.distributed import World
from everbatch.evaluate.candidates import allowed_classes, best
from everbatch.nn.compiled import is_compiled

__all__ = ["Evaluator", "accuracies", "evaluating", "mean_buffers"]


@dataclass(frozen=True)
class Evaluator:
    """Predicts test samples on every rank, each once, and counts."""

    module: nn.Module
    """Put into evaluation mode meanwhile."""
    predict: Callable[[Batch], Tensor]
    """Logits (n, classes) of a batch whose inputs are ready."""
    inputs_of: Callable[[Tensor], Tensor]
    """Model inputs of samples as the source gives them."""
    world: World
    device: torch.device
    rows: int
    """Samples per rank and forward."""

    @torch.no_grad()
    def accuracies(
        self, stream: Stream, seen: int, tasks: list[Task], *, stop: Callable[[bool], bool] | None = None,
    ) -> list[float] | None:
        """See the function `accuracies`."""
        counts = torch.zeros(len(tasks), 2, dtype=torch.float64, device=self.device)
        begun = 0
        with evaluating(self.module, self.world):
            for i, task in enumerate(tasks):
                allowed = allowed_classes(stream, seen, task).to(self.device)
                for batch in evaluation_batches(stream, task, self.rows, self.world):
                    if stop is not None and begun % 10 == 0 and stop(True):
                        return None
                    begun += 1
                    counts[i] += self._count(batch, allowed)
        right, total = self.world.sum(counts).cpu().unbind(1)
        return (right / total).tolist()

    def _count(self, batch: Batch, allowed: Tensor) -> Tensor:
        """Weight of the rows that are right, and of all."""
        ready = batch.to(self.device)
        logits = self.predict(replace(ready, inputs=self.inputs_of(ready.inputs)))
        assert ready.weight is not None
        right = (best(logits, allowed) == ready.targets) * ready.weight
        return torch.stack([right.sum(), ready.weight.sum()])


class Predicts(Protocol):
    """What `accuracies` needs of a trainer."""

    module: nn.Module
    world: World
    device: torch.device
    config: Any
    """`eval_batch`: samples per rank and forward."""

    def predict(self, batch: Batch) -> Tensor: ...

    def inputs_of(self, raw: Tensor) -> Tensor: ...


@overload
def accuracies(trainer: Predicts, stream: Stream, seen: int, tasks: list[Task]) -> list[float]: ...


@overload
def accuracies(
    trainer: Predicts, stream: Stream, seen: int, tasks: list[Task], *, stop: Callable[[bool], bool],
) -> list[float] | None: ...


def accuracies(
    trainer: Predicts, stream: Stream, seen: int, tasks: list[Task], *, stop: Callable[[bool], bool] | None = None,
) -> list[float] | None:
    """Accuracy on the test samples of each task, in [0, 1], counted exactly once each at any world size.

    Class-incremental: the prediction is among the classes of tasks 0 to `seen` (a task not yet seen: among its own as well).
    Task-incremental: among the task's classes. Otherwise: among all.

    `stop(True)` is asked on all ranks before every tenth batch; where it says so, there is no result.

    Cost: one forward of every test sample; one all-reduce for all tasks. Training flags, statistics and random streams are as
    before.
    """
    evaluator = Evaluator(trainer.module, trainer.predict, trainer.inputs_of, trainer.world, trainer.device,
                          trainer.config.eval_batch)
    return evaluator.accuracies(stream, seen, tasks, stop=stop)


@contextmanager
def evaluating(module: nn.Module, world: World) -> Iterator[None]:
    """Evaluation mode with the mean over ranks of every floating buffer; everything is put back, flag by flag, afterwards.
    What was compiled for training runs as it is: another mode, and batches of other sizes, would each be one more graph."""
    flags = [(m, m.training) for m in module.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    compiled = any(map(is_compiled, module.modules()))
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with mean_buffers(module, world), torch.random.fork_rng(devices=devices), eager:
        module.eval()
        try:
            yield
        finally:
            for m, training in flags:
                m.training = training


@contextmanager
def mean_buffers(module: nn.Module, world: World) -> Iterator[None]:
    """Floating buffers replaced by their mean over ranks inside the block; those whose shapes differ by rank, tables that grew
    with what a rank has seen, stay. One small gather, one all-reduce each; none on one rank."""
    own = []
    if world.size > 1:
        floating = {name: b for name, b in module.named_buffers() if b.is_floating_point()}
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
