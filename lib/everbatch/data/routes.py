"""Rows of a sample memory on their way between ranks: as bytes, and of one draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everbatch.data.buffer import Slots
from everbatch.data.slots import Ints
from everbatch.errors import CheckpointMismatch

__all__ = ["Begun", "Drawn", "Key", "length", "pack", "places_of", "put_back", "unpack"]

Key = tuple[int, int, str]
"""Of a draw: count, step and purpose."""


@dataclass
class Drawn:
    """What one draw gives to every rank; rows of a batch that is not stored yet among it."""

    key: Key
    slots: Ints
    """Of all ranks, in their order."""
    ranks: Ints
    """Who gets each."""
    columns: dict[str, Tensor]
    """What the index and the draw say of this rank's rows."""
    rows: Ints
    """Where each is in the batch that is not stored yet; -1 for those that are."""

    @property
    def stored(self) -> Ints:
        """Places of what the memory has already."""
        return np.flatnonzero(self.rows < 0)

    @property
    def coming(self) -> Ints:
        """Places of the others."""
        return np.flatnonzero(self.rows >= 0)

    def mark(self, kept: Slots) -> None:
        """Note which of the slots get rows of a batch of which this is kept."""
        order = np.argsort(kept.slots)
        known = kept.slots[order]
        place = np.searchsorted(known, self.slots)
        place[place == len(known)] = 0
        if len(known):
            new = known[place] == self.slots
            self.rows = np.where(new, kept.rows[order][place], -1)

    def joined(self, rank: int, stored: Tensor, fetch: Callable[[Ints], Tensor]) -> Tensor:
        """This rank's rows in the order of the draw: those that were stored, and `fetch` of rows of
        the batch."""
        mine = self.rows[self.ranks == rank]
        new = np.flatnonzero(mine >= 0)
        if len(new) == 0:
            return stored
        coming = fetch(mine[new])
        if len(new) == len(mine):
            return coming
        result = coming.new_empty((len(mine), coming.shape[1]))
        result[torch.from_numpy(new)] = coming
        result[torch.from_numpy(np.flatnonzero(mine < 0))] = stored
        return result


@dataclass
class Begun:
    """A batch that the index holds already and whose rows are still to come."""

    batch: tuple[Ints, Ints, Ints, int]
    """Ids, targets, positions and task."""
    kept: Slots
    draws: list[Drawn]
    """What the next step draws."""
    arrived: Callable[[], Tensor]
    """This rank's rows of all draws that were stored already, one draw after the other."""

    def is_of(self, ids: Ints, targets: Ints, positions: Ints, task: int) -> bool:
        """Whether it is this batch."""
        same = zip(self.batch[:3], (ids, targets, positions), strict=True)
        return self.batch[3] == task and all(np.array_equal(a, b) for a, b in same)


def _bytes(value: Tensor) -> Tensor:
    """A contiguous (n, ...) tensor as (n, bytes per row), the same memory."""
    return (value[:, None] if value.ndim == 1 else value.flatten(1)).view(torch.uint8)


def pack(rows: Mapping[str, Tensor]) -> Tensor:
    """Rows of several tensors side by side as bytes, (n, bytes per row), so that one exchange moves
    them all."""
    return torch.cat([_bytes(value.contiguous()) for value in rows.values()], dim=1)


def unpack(packed: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `pack`; `like` tells shapes and types."""
    result, start = {}, 0
    for name, value in like.items():
        result[name] = value.new_empty((len(packed), *value.shape[1:]))
        flat = _bytes(result[name])
        if len(packed):
            flat.copy_(packed[:, start : start + flat.shape[1]])
        start += flat.shape[1]
    return result


def put_back(arrived: Tensor, order: Ints) -> Tensor:
    """Rows that came ordered by owner, in the order in which they were asked for."""
    ordered = torch.empty_like(arrived)
    ordered[torch.from_numpy(order)] = arrived
    return ordered


def places_of(rows: Ints, wanted: Ints) -> Tensor:
    """Where these are among ascending rows that hold them all."""
    return torch.from_numpy(np.searchsorted(rows, wanted))


def length(part: Mapping[str, Any]) -> int:
    """Rows in a saved part; raises unless all its tensors have as many."""
    lengths = {len(rows) for rows in part["rows"].values()} or {0}
    if len(lengths) > 1:
        raise CheckpointMismatch(f"ReplayStore: a saved part has tensors of {sorted(lengths)} rows, must be equal")
    return lengths.pop()
