"""Samples of a task that has ended, offered to a memory; and batches of what is drawn from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from everbatch.data import Batch, ReplayStore, Task
from everbatch.data.slots import share
from everbatch.data.streams import rows_of_stream
from everbatch.rows import each, named, unnamed

__all__ = ["drawn_part", "offer"]


def offer(
    store: ReplayStore, trainer: Any, task: Task, ids: Tensor, rows: int = 64, *, positions: Tensor | None = None,
) -> None:
    """Offer these training samples of a task, in this order, without augmentation. Collective.

    Args:
        trainer: offers `world` and `stream`, and `problem` where it has one.
        ids: (n,) the same on every rank.
        rows: samples per rank fetched at once.
        positions: (n,) what the memory notes as each sample's place; by default its id.
    """
    positions = ids if positions is None else positions
    world, stream = trainer.world, trainer.stream
    problem = getattr(trainer, "problem", None)
    pieces = rows * world.size
    for chunk, places in zip(torch.split(ids, pieces), torch.split(positions, pieces), strict=True):
        bounds = share(len(chunk), world.size)
        low, high = int(bounds[world.rank]), int(bounds[world.rank + 1])
        mine = chunk[low:high] if high > low else chunk[:1]  # sources need not take an empty list
        raw, targets = rows_of_stream(stream, mine)
        payload = named("raw", each(lambda value: value[: high - low], raw))  # noqa: B023  # used at once
        if problem is not None and not problem.labels:
            payload["aim"] = targets[: high - low]
        labels = stream.targets(chunk)
        store.add(chunk.numpy(), labels.numpy(), places.numpy(), task.id, payload)


def drawn_part(rows: Mapping[str, Tensor], task: int, part: str) -> Batch:
    """A part of a batch of what `ReplayStore.draw` gave of samples that were offered by `offer`."""
    targets = rows.get("aim", rows["targets"])
    return Batch(unnamed("raw", rows), targets, rows["ids"], rows["position"], task=task, part=part, weight=rows["weight"])
