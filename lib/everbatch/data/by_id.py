"""A row for each of a set of samples, spread over the ranks and fetched by sample id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from everbatch.data.slots import Ints, share
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch, check

__all__ = ["RowsById"]

EMPTY = np.empty(0, dtype=np.int64)


class RowsById:
    """One row (k,) for each sample of a set; rank r holds those of the r-th part of the sorted ids.

    Every rank knows all ids, so each knows who holds what, and who asks for it: a fetch is one
    all-to-all of the rows, and on one rank an index.

    Memory: n / ranks rows on each rank's CPU, and 8 bytes for each id.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.clear()

    def __len__(self) -> int:
        """Samples over all ranks."""
        return len(self.ids)

    def clear(self) -> None:
        """Hold nothing."""
        self.ids: Ints = EMPTY
        self.values = torch.empty(0, 0)

    @property
    def bounds(self) -> Ints:
        """(ranks + 1,): rank r holds the rows of ids[bounds[r]:bounds[r + 1]]."""
        return share(len(self.ids), self.world.size)

    def begin(self, ids: ArrayLike) -> Ints:
        """Forget everything; hold rows of these samples from now on. Returns those that this rank is
        to `fill`, ascending; the same call on every rank."""
        self.clear()
        self.ids = np.unique(np.asarray(ids, dtype=np.int64))
        low, high = self.bounds[self.world.rank : self.world.rank + 2]
        return self.ids[low:high]

    def fill(self, values: Tensor) -> None:
        """Take this rank's rows, (n, k), in the order of what `begin` returned."""
        low, high = self.bounds[self.world.rank : self.world.rank + 2]
        check(values.shape[0] == high - low and values.ndim == 2, "RowsById", f"rows of {tuple(values.shape)}",
              f"be (n, k) for this rank's {high - low} samples")
        self.values = values.detach().cpu()

    def fetch(self, ids: ArrayLike, bounds: Ints) -> Tensor:
        """This rank's rows of a global batch: (n, k) on the CPU, in its order. A collective.

        Args:
            ids: (G,) of the whole global batch, on every rank.
            bounds: (ranks + 1,): rank r asks for ids[bounds[r]:bounds[r + 1]].

        Raises:
            ValueError: on every rank, for a sample that is not held.
        """
        wanted = np.asarray(ids, dtype=np.int64)
        place = np.searchsorted(self.ids, wanted)
        known = place < len(self.ids)
        known[known] = self.ids[place[known]] == wanted[known]
        check(bool(known.all()), "RowsById", f"sample {wanted[~known][:1]}", "be one of those that are held")
        rank, size = self.world.rank, self.world.size
        mine = slice(int(bounds[rank]), int(bounds[rank + 1]))
        first = int(self.bounds[rank])
        if size == 1:
            return self.values[torch.from_numpy(place[mine])]

        owner = np.searchsorted(self.bounds, place, side="right") - 1
        asker = np.searchsorted(bounds, np.arange(len(wanted)), side="right") - 1
        # Both sides go through the batch in its order: rows leave by asker, and arrive by owner.
        leaving = self.values[torch.from_numpy(place[owner == rank] - first)]
        send = np.bincount(asker[owner == rank], minlength=size).tolist()
        receive = np.bincount(owner[mine], minlength=size).tolist()
        arrived = self.world.exchange(leaving, send, receive)
        rows = torch.empty_like(arrived)
        rows[torch.from_numpy(np.argsort(owner[mine], kind="stable"))] = arrived
        return rows

    def state_dict(self) -> dict[str, Any]:
        """What to save: "index", the ids, replicated; "rows", this rank's, from row "start" on."""
        rows = {"values": self.values} if len(self.ids) else {}
        return {"index": {"slots": self.ids}, "start": int(self.bounds[self.world.rank]), "rows": rows}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what was saved, whole; at any number of ranks. Local.

        Raises:
            CheckpointMismatch: another number of rows than of ids.
        """
        ids = np.asarray(saved["index"]["slots"], dtype=np.int64)
        whole = saved["rows"].get("values", torch.empty(0, 0))
        if len(whole) != len(ids):
            raise CheckpointMismatch(f"RowsById: {len(whole)} rows for {len(ids)} samples, must be as many")
        self.begin(ids)
        low, high = self.bounds[self.world.rank : self.world.rank + 2]
        self.values = whole[low:high].clone()
