"""What a run may know of the places where its tasks begin and end, and how often it may pass over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from everbatch.contract import parts_of
from everbatch.data import Loader, Stream
from everbatch.data.tasks import bounded
from everbatch.errors import check
from everbatch.train.step import Stepper
from everbatch.train.task_ends import is_active

__all__ = ["begins", "check_manner", "ends", "refuse_bound", "steps_before", "visible_steps"]


def begins(stream: Stream, index: int) -> bool:
    """Whether methods are told that this task begins: of a task-free stream the first alone, where training begins."""
    return bounded(stream) or index == 0


def ends(stream: Stream, index: int) -> bool:
    """Whether methods are told that this task ends: of a task-free stream the last alone."""
    return bounded(stream) or index == len(stream) - 1


def visible_steps(trainer: Stepper, loader: Loader) -> int:
    """Steps of a pass over what the learning rate's schedule spans: the task, or all tasks where none is to be seen."""
    if bounded(loader.stream):
        return loader.steps_per_epoch
    return sum(len(task.train_ids) // trainer.config.batch_size for task in loader.stream.tasks)


def steps_before(trainer: Stepper, stream: Stream, index: int) -> int:
    """Steps of that schedule that were taken before this task."""
    if bounded(stream):
        return 0
    earlier = stream.tasks[:index]
    return trainer.config.epochs * sum(len(task.train_ids) // trainer.config.batch_size for task in earlier)


def check_manner(trainer: Any, stream: Stream) -> None:
    """Refuse what does not go with how a stream's samples arrive: several passes, methods that would have to see a boundary.

    Raises:
        ValueError: on every rank, before anything of a run.
    """
    epochs = trainer.config.epochs
    check(not getattr(stream, "one_pass", False) or epochs == 1, "Trainer", f"epochs={epochs} on an online stream", "be 1",
          "its samples come once")
    if getattr(stream, "one_pass", False):
        ids = torch.cat([task.train_ids for task in stream.tasks])
        again = len(ids) - len(torch.unique(ids))
        check(not again, "Trainer", f"{again} samples that come again in a later task of an online stream", "come once",
              "leave out what trains on earlier samples as such, Joint or GDumb; Replay keeps its own")
    if bounded(stream):
        return
    mixins = {part: getattr(trainer, "configs", {}).get(part) for part in parts_of(type(trainer))}
    optimizer = trainer.optimizer
    parts = {part: optimizer.configs.get(part) for part in parts_of(type(optimizer)) if is_active(optimizer, part)}
    refuse_bound("Trainer", mixins | parts)


def refuse_bound(who: str, parts: Mapping[Any, Any]) -> None:
    """Refuse parts, each with its options or None, that have to know where tasks begin and end.

    Raises:
        ValueError: naming the first.
    """
    for part, config in parts.items():
        why = part.needs_boundaries(config)
        check(not why, who, f"{part.__name__} on a task-free stream", "not have to know where tasks begin and end", why)
