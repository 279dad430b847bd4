"""The payload of a sample memory, spread over the ranks: inputs, logits, whatever a method keeps with a sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from everbatch.data.buffers import Buffer, Slots
from everbatch.data.memory import check_memory
from everbatch.data.slots import Ints, share
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch, check
from everbatch.seeds import uniform_keys

__all__ = ["ReplayStore"]


class ReplayStore:
    """Named rows for every slot of a replicated `Buffer`; each row lives on one rank, found by a hash of its sample id.

    Because every rank holds the whole index, every rank knows who sends how many rows to whom: one all-to-all of
    payload per call and no other communication. The union over ranks is exactly what one process would hold and draw.

    Args:
        buffer: the memory, in the same state on every rank. The store calls its `add`; nobody else may.
        world: this rank's place.
        seed: of the owners.

    Memory: rows are kept on the CPU in one tensor per name, about capacity / ranks rows each, grown when the hash is
    uneven. `add`, `draw` and `state_dict` are collectives; `load_state_dict` is not.
    """

    def __init__(self, buffer: Buffer, world: World, seed: int = 0) -> None:
        self.buffer, self.world, self.seed = buffer, world, seed
        self._rows: dict[str, Tensor] = {}
        self._local = np.full(buffer.capacity, -1, dtype=np.int64)  # slot to row of this rank's tensors
        self._free: list[int] = []  # rows whose sample is gone
        self._fresh = 0  # the first row that never held one

    def __len__(self) -> int:
        """Samples over all ranks."""
        return len(self.buffer)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the payload, () before the first `add`."""
        return tuple(self._rows)

    @property
    def num_bytes(self) -> int:
        """Bytes of payload allocated on this rank."""
        return sum(rows.numel() * rows.element_size() for rows in self._rows.values())

    def owner(self, ids: Ints) -> Ints:
        """The rank that holds each sample: hash(id) scaled to the number of ranks."""
        return (uniform_keys(ids, self.seed, "owner") * self.world.size).astype(np.int64)

    def add(
        self, ids: ArrayLike, targets: ArrayLike, positions: ArrayLike, task: int, rows: Mapping[str, Tensor],
    ) -> Slots:
        """Offer one global batch to the memory and move the rows that it keeps to their owners. A collective.

        Args:
            ids: (G,) of the whole global batch, on every rank (`Loader.global_rows`). targets, positions: likewise.
            task: the task of the batch.
            rows: this rank's payload by name, (n, ...) each on any device, for rows bounds[rank]:bounds[rank + 1] of
                the batch with bounds = share(G, ranks); the loader's batches are just that. Detached and copied.

        Returns:
            What the memory kept, in rows of the global batch; the same on every rank.

        Raises:
            ValueError: names, shapes or types that differ from the first batch's.
        """
        keys = np.asarray(ids, dtype=np.int64)
        if self.world.size == 1:
            return self._add_alone(keys, targets, positions, task, rows)
        bounds = share(len(keys), self.world.size)
        low, high = int(bounds[self.world.rank]), int(bounds[self.world.rank + 1])
        self._check(rows, high - low)
        kept = self.buffer.add(keys, targets, positions, task)
        self._drop(kept.evicted)
        if len(kept.rows) == 0:
            return kept
        if not self._rows:
            self._allocate({name: value[:0].detach().cpu() for name, value in rows.items()})
        owner = self.owner(keys[kept.rows])
        holder = np.searchsorted(bounds, kept.rows, side="right") - 1
        mine, here = holder == self.world.rank, owner == self.world.rank
        # Rows leave ordered by owner and then by row; they arrive ordered by holder, which is by row as well.
        leaving = torch.from_numpy(kept.rows[mine][np.argsort(owner[mine], kind="stable")] - low)
        packed = _pack({name: rows[name].detach()[leaving.to(rows[name].device)].cpu() for name in self._rows})
        arrived = self.world.exchange(packed, self._counts(owner[mine]), self._counts(holder[here]))
        self._write(kept.slots[here], self._unpack(arrived))
        return kept

    def _add_alone(
        self, ids: Ints, targets: ArrayLike, positions: ArrayLike, task: int, rows: Mapping[str, Tensor],
    ) -> Slots:
        """`add` on one rank, to which every row belongs and which has it already."""
        self._check(rows, len(ids))
        kept = self.buffer.add(ids, targets, positions, task)
        self._drop(kept.evicted)
        if len(kept.rows) == 0:
            return kept
        if not self._rows:
            self._allocate({name: value[:0].detach().cpu() for name, value in rows.items()})
        chosen = torch.from_numpy(kept.rows)
        self._write(kept.slots, {name: rows[name].detach()[chosen.to(rows[name].device)].cpu() for name in self._rows})
        return kept

    def draw(
        self, count: int, step: int, purpose: str = "replay", *, balanced: bool = False,
    ) -> dict[str, Tensor] | None:
        """This rank's part of min(count, filled) samples drawn without replacement. A collective.

        Args:
            count: samples over all ranks, >= 1. step, purpose: what the draw is for; other values draw independently.
            balanced: see `Buffer.draw`.

        Returns:
            None on every rank while the memory is empty. Otherwise CPU rows by name: the payload, and "ids", "targets",
            "position", "task" (int64) and "weight" (float32). With m samples drawn on W ranks, rank r has rows
            bounds[r]:bounds[r+1] of the draw, bounds = share(m, W), of weight W / m each, so that the mean over ranks
            of sum(weight * loss) is the mean loss over the m samples. A rank without rows gets one sample of weight 0,
            so that every rank builds the same graph.
        """
        slots, size = self.buffer.draw(count, purpose, step, balanced=balanced), self.world.size
        if len(slots) == 0:
            return None
        parts = self._parts(slots)
        wanted = [part if len(part) else slots[:1] for part in parts]
        mine = wanted[self.world.rank]
        result = self._fetch(wanted)
        memory = self.buffer
        for name, column in (("ids", memory.ids), ("targets", memory.targets), ("position", memory.positions),
                             ("task", memory.tasks)):
            result[name] = torch.from_numpy(column[mine])
        real = len(parts[self.world.rank]) > 0
        result["weight"] = torch.full((len(mine),), size / len(slots) if real else 0.0)
        return result

    def state_dict(self) -> dict[str, Any]:
        """What to save. A collective.

        Returns:
            "index": the memory's state, replicated. "rows": this rank's contiguous part, by name, of the payload in
            ascending order of slots, which any number of ranks can split again. "start": its first row.
        """
        parts = self._parts(self.buffer.filled)
        rows = self._fetch(parts) if self._rows else {}
        start = sum(len(part) for part in parts[: self.world.rank])
        return {"index": self.buffer.state(), "start": start, "rows": rows}

    def load_state_dict(self, parts: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Take over the saved parts of all ranks, of any number of ranks, or one part that holds all rows. Local.

        Raises:
            CheckpointMismatch: parts that miss or repeat rows, payload names that differ, or a memory of another kind.
        """
        parts = [parts] if isinstance(parts, Mapping) else parts
        parts = sorted(parts, key=lambda part: (int(part["start"]), _length(part)))
        index = parts[0]["index"]
        total, have = len(index["slots"]), 0
        for part in parts:
            if int(part["start"]) != have or part["rows"].keys() != parts[0]["rows"].keys():
                raise CheckpointMismatch(f"ReplayStore: the part from row {part['start']} does not continue the {have} "
                                         "rows before it, must hold the same names and follow on them")
            have += _length(part)
        if have != total:
            raise CheckpointMismatch(f"ReplayStore: {have} rows for {total} saved samples, must be as many; "
                                     "pass the parts of all ranks")
        moved = self.buffer.load(index)
        self._rows, self._free = {}, []
        self._local[:] = -1
        if parts[0]["rows"]:
            self._allocate({name: rows[:0] for name, rows in parts[0]["rows"].items()})
        here = (moved >= 0) & (self.owner(np.asarray(index["ids"], dtype=np.int64)) == self.world.rank)
        for part in parts:
            start = int(part["start"])
            take = np.flatnonzero(here[start : start + _length(part)])
            chosen = torch.from_numpy(take)
            self._write(moved[start + take], {name: rows[chosen] for name, rows in part["rows"].items()})

    def widen(self, name: str, width: int) -> None:
        """Have rows of this name, floating (n, C), be `width` wide from now on; what is stored has NaN
        in the new columns. Local; nothing where they are so wide already, or nothing is stored.

        Raises:
            ValueError: they are wider, or no rows of floating numbers.
        """
        held = self._rows.get(name)
        if held is None or held.shape[1:] == (width,):
            return
        row = tuple(held.shape[1:])
        good = held.is_floating_point() and held.ndim == 2 and held.shape[1] < width
        check(good, "ReplayStore", f"{name!r} of {row} {held.dtype} to widen to {width}",
              "be narrower rows of floating numbers")
        wider = held.new_full((len(held), width), math.nan)
        wider[:, : held.shape[1]] = held
        self._rows[name] = wider

    def _check(self, rows: Mapping[str, Tensor], count: int) -> None:
        if not rows:
            check(False, "ReplayStore", "no payload", "be at least one named tensor")
        if self._rows and rows.keys() != self._rows.keys():
            check(False, "ReplayStore", f"payload {sorted(rows)}", f"be {sorted(self._rows)} as in the first batch")
        clash = sorted({"ids", "targets", "position", "task", "weight"} & rows.keys())
        if clash:
            check(False, "ReplayStore", f"payload named {clash}", "have other names: the memory keeps those itself")
        for name, value in rows.items():
            if len(value) != count:
                check(False, "ReplayStore", f"{len(value)} rows of {name!r}",
                      f"be this rank's {count} rows of the global batch")
            first = self._rows.get(name, value)
            if value.shape[1:] != first.shape[1:] or value.dtype != first.dtype:
                check(False, "ReplayStore", f"{name!r} of {tuple(value.shape[1:])} {value.dtype}",
                      f"be {tuple(first.shape[1:])} {first.dtype} as in the first batch")

    def _parts(self, slots: Ints) -> list[Ints]:
        """What each rank gets of these slots."""
        if self.world.size == 1:
            return [slots]
        bounds = share(len(slots), self.world.size)
        return [slots[bounds[r] : bounds[r + 1]] for r in range(self.world.size)]

    def _counts(self, ranks: Ints) -> list[int]:
        return [int(count) for count in np.bincount(ranks, minlength=self.world.size)]

    def _allocate(self, like: Mapping[str, Tensor]) -> None:
        room = -(-self.buffer.capacity // self.world.size)
        row = sum(value.element_size() * math.prod(value.shape[1:]) for value in like.values())
        check_memory("ReplayStore", f"capacity={self.buffer.capacity} with {row} bytes per sample on {self.world.size} rank(s)",
                     room * row, "lower the capacity")
        self._rows = {name: value.new_empty((room, *value.shape[1:])) for name, value in like.items()}
        self._free, self._fresh = [], 0

    def _drop(self, slots: Ints) -> None:
        rows = self._local[slots]
        self._free.extend(rows[rows >= 0].tolist())
        self._local[slots] = -1

    def _write(self, slots: Ints, rows: Mapping[str, Tensor]) -> None:
        """Store rows of this rank, in the place their slot has already or in a free one."""
        new = slots[self._local[slots] < 0]
        have = len(next(iter(self._rows.values()), ()))
        missing = len(new) - len(self._free) - (have - self._fresh)
        if missing > 0:
            room = min(self.buffer.capacity, max(have + missing, have + have // 4 + 1))
            for name, value in self._rows.items():
                wider = value.new_empty((room, *value.shape[1:]))
                wider[:have] = value
                self._rows[name] = wider
        for slot in new.tolist():
            if self._free:
                self._local[slot] = self._free.pop()
            else:
                self._local[slot], self._fresh = self._fresh, self._fresh + 1
        place = torch.from_numpy(self._local[slots])
        for name, value in rows.items():
            self._rows[name][place] = value

    def _fetch(self, wanted: Sequence[Ints]) -> dict[str, Tensor]:
        """The payload of the slots that this rank wants, in that order, given what every rank wants. A collective."""
        if self.world.size == 1:
            own = torch.from_numpy(self._local[wanted[0]])
            return {name: rows[own] for name, rows in self._rows.items()}
        owners = [self.owner(self.buffer.ids[slots]) for slots in wanted]
        leaving = np.concatenate([s[o == self.world.rank] for s, o in zip(wanted, owners, strict=True)])
        place = torch.from_numpy(self._local[leaving])
        mine = owners[self.world.rank]
        arrived = self.world.exchange(
            _pack({name: rows[place] for name, rows in self._rows.items()}),
            [int((owner == self.world.rank).sum()) for owner in owners], self._counts(mine),
        )
        ordered = torch.empty_like(arrived)
        ordered[torch.from_numpy(np.argsort(mine, kind="stable"))] = arrived
        return self._unpack(ordered)

    def _unpack(self, packed: Tensor) -> dict[str, Tensor]:
        result, start = {}, 0
        for name, like in self._rows.items():
            result[name] = like.new_empty((len(packed), *like.shape[1:]))
            flat = _bytes(result[name])
            flat.copy_(packed[:, start : start + flat.shape[1]])
            start += flat.shape[1]
        return result


def _length(part: Mapping[str, Any]) -> int:
    """Rows in a saved part; raises unless all its tensors have as many."""
    lengths = {len(rows) for rows in part["rows"].values()} or {0}
    if len(lengths) > 1:
        raise CheckpointMismatch(f"ReplayStore: a saved part has tensors of {sorted(lengths)} rows, must be equal")
    return lengths.pop()


def _bytes(value: Tensor) -> Tensor:
    """A contiguous (n, ...) tensor as (n, bytes per row), the same memory."""
    return (value[:, None] if value.ndim == 1 else value.flatten(1)).view(torch.uint8)


def _pack(rows: Mapping[str, Tensor]) -> Tensor:
    """Rows of several tensors side by side as bytes, (n, bytes per row), so that one exchange moves them all."""
    return torch.cat([_bytes(value.contiguous()) for value in rows.values()], dim=1)
