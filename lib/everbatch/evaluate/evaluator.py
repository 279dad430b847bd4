"""Accuracy on tasks, without a trace in the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from everbatch.data import Stream, Task, evaluation_batches
from everbatch.distributed import World
from everbatch.nn import frozen_statistics

if TYPE_CHECKING:
    from everbatch.train.trainer import Trainer

__all__ = ["accuracies", "evaluating", "mean_buffers", "predict_inputs"]


@overload
def accuracies(trainer: Trainer, stream: Stream, seen: int, tasks: list[Task]) -> list[float]: ...


@overload
def accuracies(trainer: Trainer, stream: Stream, seen: int, tasks: list[Task], *, stop: Callable[[bool], bool],
               ) -> list[float] | None: ...


@torch.no_grad()
def accuracies(trainer: Trainer, stream: Stream, seen: int, tasks: list[Task], *, stop: Callable[[bool], bool] | None = None,
               ) -> list[float] | None:
    """Accuracy on the test samples of each task, in [0, 1], counted exactly once each at any world size.

    Class-incremental: the prediction is among the classes of tasks 0 to `seen` (a task not yet seen: among its own as well).
    Task-incremental: among the task's classes. Otherwise: among all.

    `stop(True)` is asked on all ranks before every tenth batch; where it says so, there is no result.

    Cost: one forward of every test sample; one all-reduce for all tasks. Training flags, statistics and random streams are as
    before.
    """
    counts = torch.zeros(len(tasks), 2, dtype=torch.float64, device=trainer.device)
    begun = 0
    with evaluating(trainer.module, trainer.world):
        for i, task in enumerate(tasks):
            allowed = allowed_classes(stream, seen, task).to(trainer.device)
            for batch in evaluation_batches(stream, task, trainer.config.eval_batch, trainer.world):
                if stop is not None and begun % 10 == 0 and stop(True):
                    return None
                begun += 1
                ready = batch.to(trainer.device)
                logits = trainer.predict(replace(ready, inputs=trainer.inputs_of(ready.inputs)))
                guess = allowed[logits[:, allowed].argmax(1)]
                assert ready.weight is not None
                counts[i, 0] += ((guess == ready.targets) * ready.weight).sum()
                counts[i, 1] += ready.weight.sum()
    right, total = trainer.world.sum(counts).cpu().unbind(1)
    return (right / total).tolist()


def allowed_classes(stream: Stream, seen: int, task: Task) -> Tensor:
    """Labels a prediction on `task` may take after training on tasks 0 to `seen`, ascending."""
    if stream.kind == "task":
        return torch.tensor(task.classes)
    if stream.kind == "class":
        return torch.tensor(stream.seen_classes(max(seen, task.id)))
    return torch.arange(stream.num_classes)


@torch.no_grad()
def predict_inputs(trainer: Trainer, inputs: Tensor) -> Tensor:
    """Logits of model inputs, in evaluation mode; modes, buffers and random numbers are as before. Collective."""
    with frozen_statistics(trainer.module), evaluating(trainer.module, trainer.world):
        return trainer._logits(trainer.engine.call, inputs.to(trainer.device))


@contextmanager
def evaluating(module: nn.Module, world: World) -> Iterator[None]:
    """Evaluation mode with the mean over ranks of every floating buffer; everything is put back, flag by flag, afterwards."""
    flags = [(m, m.training) for m in module.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with mean_buffers(module, world), torch.random.fork_rng(devices=devices):
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
