"""The payload of a sample memory, spread over the ranks: inputs, logits, whatever a method keeps with a sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from everbatch.data.buffer import NO_SLOTS, Buffer, Slots, whole
from everbatch.data.memory import check_memory
from everbatch.data.routes import Begun, Drawn, Key, length, pack, places_of, put_back, unpack
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
        self._begun: Begun | None = None  # a batch that the index holds and whose rows are to come
        self._ready: dict[Key, dict[str, Tensor]] = {}  # draws that were made ahead

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
        if self.world.size == 1 and self._begun is None:
            return self._add_alone(keys, targets, positions, task, rows)
        batch = (keys, whole(targets), whole(positions), task)
        bounds = share(len(keys), self.world.size)
        low, high = int(bounds[self.world.rank]), int(bounds[self.world.rank + 1])
        self._check(rows, high - low)
        begun = self._go_on(batch)
        kept = self.buffer.add(*batch) if begun is None else begun.kept
        draws = [] if begun is None else begun.draws
        self._drop(kept.evicted)
        if not self._rows and len(kept.rows):
            self._allocate({name: value[:0].detach().cpu() for name, value in rows.items()})

        # Each kept row goes to its owner, and to whoever draws it for the next step.
        owner = self.owner(keys[kept.rows])
        who = np.concatenate([owner, *(draw.ranks[draw.coming] for draw in draws)])
        what = np.concatenate([kept.rows, *(draw.rows[draw.coming] for draw in draws)])
        here, arrived = self._sent(who, what, bounds, {n: rows[n].detach() for n in self._rows})
        own = owner == self.world.rank
        self._write(kept.slots[own], unpack(arrived[places_of(here, kept.rows[own])], self._rows))
        if begun is not None:
            self._make_ready(begun, lambda wanted: arrived[places_of(here, wanted)])
        return kept

    def _sent(
        self, who: Ints, what: Ints, bounds: Ints, rows: Mapping[str, Tensor],
    ) -> tuple[Ints, Tensor]:
        """Rows of a batch, by where they are in it, to ranks; returns which came here, ascending, and
        them. One all-to-all, none where nothing is to be sent."""
        # Ordered by rank and then by row: they arrive by holder, which is by row as well.
        total = int(bounds[-1])
        ranks, places = np.divmod(np.unique(who * total + what), total)
        if len(places) == 0:
            return places, torch.empty((0, 0), dtype=torch.uint8)
        holder = np.searchsorted(bounds, places, side="right") - 1
        mine, here = holder == self.world.rank, ranks == self.world.rank
        leaving = torch.from_numpy(places[mine] - int(bounds[self.world.rank]))
        packed = pack({name: value[leaving.to(value.device)].cpu() for name, value in rows.items()})
        arrived = self.world.exchange(packed, self._counts(ranks[mine]), self._counts(holder[here]))
        return places[here], arrived

    def _add_alone(
        self, ids: Ints, targets: ArrayLike, positions: ArrayLike, task: int, rows: Mapping[str, Tensor],
    ) -> Slots:
        """`add` on one rank, to which every row belongs and which has it already."""
        self._check(rows, len(ids))
        self._ready = {}
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
        ready = None if balanced else self._ready.pop((count, step, purpose), None)
        if ready is not None:
            return ready
        self.take_back()
        drawn = self._drawn(count, step, purpose, balanced=balanced)
        if drawn is None:
            return None
        return self._fetch(drawn.slots, drawn.ranks) | drawn.columns

    def ahead(
        self, ids: ArrayLike, targets: ArrayLike, positions: ArrayLike, task: int, *, step: int,
        wanted: Sequence[tuple[int, str]],
    ) -> None:
        """Before the rows of a batch are known: have the index hold it, draw for the next step, and let
        what is stored already come while the caller works. A collective.

        `add` of the same batch then brings the rest, and `draw` finds what was drawn: the same as
        without, bit for bit. Whatever else comes first takes the batch back: `take_back`, where a step
        was skipped, another `add`, a `draw` of something else, `state_dict`. Until then `buffer` holds
        the batch. Nothing happens where the memory cannot take a batch back (`Buffer.can_take_back`).

        Args:
            ids, targets, positions, task: as in `add`.
            step: of the draws to come.
            wanted: their counts and purposes.
        """
        if not self.buffer.can_take_back:
            return
        self.take_back()
        self._ready = {}
        batch = (whole(ids), whole(targets), whole(positions), task)
        kept = self.buffer.try_add(*batch)
        found = [self._drawn(count, step, purpose) for count, purpose in wanted]
        draws = [drawn for drawn in found if drawn is not None]
        for drawn in draws:
            drawn.mark(kept)
        ranks = np.concatenate([NO_SLOTS, *(drawn.ranks[drawn.stored] for drawn in draws)])
        slots = np.concatenate([NO_SLOTS, *(drawn.slots[drawn.stored] for drawn in draws)])
        order = np.argsort(ranks, kind="stable")
        arrived = self._fetch_meanwhile(slots[order], ranks[order])
        self._begun = Begun(batch, kept, draws, arrived)

    def take_back(self) -> None:
        """Undo `ahead`; nothing after `add`. Every rank does, or none."""
        begun, self._begun = self._begun, None
        if begun is not None:
            self.buffer.take_back()
            begun.arrived()

    def _go_on(self, batch: tuple[Ints, Ints, Ints, int]) -> Begun | None:
        """What `ahead` began of this batch."""
        self._ready = {}
        if self._begun is None or not self._begun.is_of(*batch):
            self.take_back()
            return None
        begun, self._begun = self._begun, None
        self.buffer.stand_by()
        return begun

    def _make_ready(self, begun: Begun, coming: Callable[[Ints], Tensor]) -> None:
        """Keep this rank's draws until they are asked for."""
        stored, start = begun.arrived(), 0
        for drawn in begun.draws:
            count = int((drawn.ranks[drawn.stored] == self.world.rank).sum())
            joined = drawn.joined(self.world.rank, stored[start : start + count], coming)
            self._ready[drawn.key] = unpack(joined, self._rows) | drawn.columns
            start += count

    def _drawn(self, count: int, step: int, purpose: str, *, balanced: bool = False) -> Drawn | None:
        """A draw as the index alone says it; None while nothing is stored."""
        slots, size = self.buffer.draw(count, purpose, step, balanced=balanced), self.world.size
        if len(slots) == 0:
            return None
        parts = self._parts(slots)
        given = [part if len(part) else slots[:1] for part in parts]
        mine, memory = given[self.world.rank], self.buffer
        columns = {"ids": memory.ids, "targets": memory.targets, "position": memory.positions,
                   "task": memory.tasks}
        told = {name: torch.from_numpy(column[mine]) for name, column in columns.items()}
        real = len(parts[self.world.rank]) > 0
        told["weight"] = torch.full((len(mine),), size / len(slots) if real else 0.0)
        everything = np.concatenate(given)
        ranks = np.repeat(np.arange(size), [len(part) for part in given])
        return Drawn((count, step, purpose), everything, ranks, told, np.full(len(ranks), -1))

    def state_dict(self) -> dict[str, Any]:
        """What to save. A collective.

        Returns:
            "index": the memory's state, replicated. "rows": this rank's contiguous part, by name, of the payload in
            ascending order of slots, which any number of ranks can split again. "start": its first row.
        """
        self.take_back()
        parts = self._parts(self.buffer.filled)
        ranks = np.repeat(np.arange(self.world.size), [len(part) for part in parts])
        rows = self._fetch(np.concatenate(parts), ranks) if self._rows else {}
        start = sum(len(part) for part in parts[: self.world.rank])
        return {"index": self.buffer.state(), "start": start, "rows": rows}

    def load_state_dict(self, parts: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Take over the saved parts of all ranks, of any number of ranks, or one part that holds all rows. Local.

        Raises:
            CheckpointMismatch: parts that miss or repeat rows, payload names that differ, or a memory of another kind.
        """
        parts = [parts] if isinstance(parts, Mapping) else parts
        parts = sorted(parts, key=lambda part: (int(part["start"]), length(part)))
        index = parts[0]["index"]
        total, have = len(index["slots"]), 0
        for part in parts:
            if int(part["start"]) != have or part["rows"].keys() != parts[0]["rows"].keys():
                raise CheckpointMismatch(f"ReplayStore: the part from row {part['start']} does not continue the {have} "
                                         "rows before it, must hold the same names and follow on them")
            have += length(part)
        if have != total:
            raise CheckpointMismatch(f"ReplayStore: {have} rows for {total} saved samples, must be as many; "
                                     "pass the parts of all ranks")
        self.take_back()
        self._ready = {}
        moved = self.buffer.load(index)
        self._rows, self._free = {}, []
        self._local[:] = -1
        if parts[0]["rows"]:
            self._allocate({name: rows[:0] for name, rows in parts[0]["rows"].items()})
        here = (moved >= 0) & (self.owner(np.asarray(index["ids"], dtype=np.int64)) == self.world.rank)
        for part in parts:
            start = int(part["start"])
            take = np.flatnonzero(here[start : start + length(part)])
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
        self._ready = {}
        if self._begun is not None:  # what is on its way is of the old width
            self._begun.draws.clear()

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

    def _fetch(self, slots: Ints, ranks: Ints) -> dict[str, Tensor]:
        """The payload of those slots that are this rank's, in their order, given what every rank gets,
        ordered by rank. A collective."""
        if self.world.size == 1:
            own = torch.from_numpy(self._local[slots])
            return {name: rows[own] for name, rows in self._rows.items()}
        packed, send, receive, order = self._route(slots, ranks)
        arrived = self.world.exchange(packed, send, receive)
        return unpack(put_back(arrived, order), self._rows)

    def _fetch_meanwhile(self, slots: Ints, ranks: Ints) -> Callable[[], Tensor]:
        """`_fetch`, packed, which goes on while the caller works; nothing where no rank gets any."""
        if len(slots) == 0:
            return lambda: torch.empty((0, 0), dtype=torch.uint8)
        packed, send, receive, order = self._route(slots, ranks)
        arrived = self.world.exchange_meanwhile(packed, send, receive)
        return lambda: put_back(arrived(), order)

    def _route(self, slots: Ints, ranks: Ints) -> tuple[Tensor, list[int], list[int], Ints]:
        """What leaves this rank, how much goes to and comes from each, and the order in which it comes."""
        owners = self.owner(self.buffer.ids[slots])
        leaves = owners == self.world.rank
        place = torch.from_numpy(self._local[slots[leaves]])
        packed = pack({name: rows[place] for name, rows in self._rows.items()})
        mine = owners[ranks == self.world.rank]
        return packed, self._counts(ranks[leaves]), self._counts(mine), np.argsort(mine, kind="stable")
