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


ROWS = 64
"""Samples over all ranks that are offered at once. Never of the number of ranks: a memory hands the slots that a piece frees
to that piece, so that other pieces would put the same samples into other slots, and draws take slots."""


def offer(store: ReplayStore, trainer: Any, task: Task, ids: Tensor, *, positions: Tensor | None = None) -> None:
    """Offer these training samples of a task, in this order, without augmentation. Collective.

    Slots, and so what is drawn later, are the same on any number of ranks. Cost: each sample is fetched once, by one rank;
    ceil(n / `ROWS`) all-to-alls, with at most `ROWS` samples in memory on all ranks together, and one more on each rank that has
    no share of a piece.

    Args:
        trainer: offers `world` and `stream`, and `problem` where it has one.
        ids: (n,) the same on every rank.
        positions: (n,) what the memory notes as each sample's place; by default its id.
    """
    positions = ids if positions is None else positions
    world, stream = trainer.world, trainer.stream
    problem = getattr(trainer, "problem", None)
    for chunk, places in zip(torch.split(ids, ROWS), torch.split(positions, ROWS), strict=True):
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
