"""What all sample memories are: slots, and draws from them. Indices only; `store.py` holds what they index.

A memory is the same on every rank: it sees the ids of whole global batches and draws all its randomness from stateless
keys, so neither the number of ranks nor the use of global generators can change it, and nothing random is saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from everbatch.data.memory import check_memory
from everbatch.data.slots import Ints
from everbatch.errors import CheckpointMismatch, check
from everbatch.seeds import derive, generator

__all__ = ["NO_SLOTS", "Buffer", "Places", "Slots", "State", "first_of_permutation", "rank_within", "whole"]

State = dict[str, "np.ndarray | int"]
_COLUMNS = ("ids", "targets", "positions", "tasks")
INDEX_BYTES = 41
"""Of a slot, beside its sample: four columns, where it lies, and whether it is used. A filled one of
a reservoir takes about 120 more for its key, and as many to be found by its id."""


class Slots(NamedTuple):
    """What happened to the rows of one `add`."""

    rows: Ints
    """Incoming rows that are kept (entered, or refreshed what was there), ascending."""
    slots: Ints
    """The slot of each."""
    evicted: Ints
    """Slots whose earlier sample is gone, ascending; some of them are in `slots` again, with their new sample."""


def whole(values: ArrayLike) -> Ints:
    """As an array of int64."""
    return np.asarray(values, dtype=np.int64)


NO_SLOTS = np.empty(0, dtype=np.int64)


class Places:
    """Which slots hold a sample: every one below `top` but for `holes`.

    Args:
        used: (capacity,) whether a slot is filled; kept up to date here, and written by nobody else.

    Cost: of a call as many operations as slots are named, and one copy of the holes. A reservoir has none.
    """

    def __init__(self, used: NDArray[np.bool_]) -> None:
        self.used = used
        self.renew()

    def renew(self) -> None:
        """Look at `used` anew."""
        filled = np.flatnonzero(self.used)
        self.count, self.top = len(filled), int(filled[-1]) + 1 if len(filled) else 0
        self.holes: Ints = np.flatnonzero(~self.used[: self.top])

    def take(self, slots: Ints) -> None:
        """These hold a sample from now on; those that did, still."""
        new = slots[~self.used[slots]]
        if len(new) == 0:
            return
        self.used[new] = True
        self.count += len(new)
        inside = new[new < self.top]
        if len(inside):
            self.holes = np.delete(self.holes, np.searchsorted(self.holes, inside))
        top = int(new.max()) + 1
        if top > self.top:
            left_out = self.top + np.flatnonzero(~self.used[self.top : top])
            self.holes = np.concatenate([self.holes, left_out])
            self.top = top

    def free(self, slots: Ints) -> None:
        """These, all filled, hold none any more."""
        if len(slots):
            self.used[slots] = False
            self.count -= len(slots)
            slots = np.sort(slots)
            self.holes = np.insert(self.holes, np.searchsorted(self.holes, slots), slots)

    def first_free(self, count: int) -> Ints:
        """The `count` lowest slots without a sample, ascending, as far as there are so many."""
        low = self.holes[:count]
        end = min(self.top + count - len(low), len(self.used))
        return np.concatenate([low, np.arange(self.top, end)])

    def some(self, count: int, source: torch.Generator) -> Ints:
        """`count` filled slots at random, all of them where there are fewer."""
        return self.filled(first_of_permutation(self.count, count, source))

    def filled(self, index: Ints) -> Ints:
        """The slots at these places in the ascending list of all that are filled."""
        if len(self.holes) == 0:
            return index
        before = self.holes - np.arange(len(self.holes))  # filled slots below each hole
        return index + np.searchsorted(before, index, side="right")


class Buffer(ABC):
    """`capacity` slots of (id, target, position, task). Subclasses decide who gets one.

    Args:
        capacity: number of slots; 0 keeps nothing.
        seed: of keys and draws.

    Raises:
        ValueError: capacity below 0, or beyond this machine's memory.
    """

    def __init__(self, capacity: int, *, seed: int = 0) -> None:
        integer = isinstance(capacity, int) and not isinstance(capacity, bool)
        check(integer and capacity >= 0, type(self).__name__, f"capacity={capacity!r}", "be an integer >= 0",
              "0 keeps nothing and switches replay off")
        check_memory(type(self).__name__, f"capacity={capacity}", capacity * INDEX_BYTES, "lower the capacity")
        self.capacity, self.seed = capacity, seed
        self._places = Places(np.zeros(capacity, dtype=bool))
        self._before: list[tuple[Ints, NDArray[np.bool_], list[Ints]]] | None = None
        self.ids, self.targets, self.positions, self.tasks = (np.full(capacity, -1, dtype=np.int64) for _ in _COLUMNS)

    def __len__(self) -> int:
        return self._places.count

    @property
    def used(self) -> NDArray[np.bool_]:
        """(capacity,) whether a slot holds a sample; to be read."""
        return self._places.used

    @property
    def filled(self) -> Ints:
        """Slots that hold a sample, ascending."""
        return np.flatnonzero(self.used)

    def add(self, ids: ArrayLike, targets: ArrayLike, positions: ArrayLike, task: int) -> Slots:
        """Offer one global batch: (G,) ids, targets and stream positions, all of one task. The same on every rank."""
        keys, labels, places = (np.asarray(values, dtype=np.int64) for values in (ids, targets, positions))
        if not (keys.ndim == 1 and keys.shape == labels.shape == places.shape):
            check(False, type(self).__name__,
                  f"ids, targets and positions of shapes {keys.shape}, {labels.shape}, {places.shape}", "be (G,) each")
        if self.capacity == 0 or len(keys) == 0:
            return Slots(NO_SLOTS, NO_SLOTS, NO_SLOTS)
        return self._add(keys, labels, places, task)

    @property
    def can_take_back(self) -> bool:
        """Whether all that `add` changes is known here; a class of yours may keep more."""
        return False

    def try_add(self, ids: ArrayLike, targets: ArrayLike, positions: ArrayLike, task: int) -> Slots:
        """`add` that `take_back` can undo, until `stand_by` is called. Costs what `add` does."""
        self._before, self._extra = [], self._noted()
        return self.add(ids, targets, positions, task)

    def stand_by(self) -> None:
        """The batch of `try_add` stays."""
        self._before = None

    def take_back(self) -> None:
        """The memory is as it was before `try_add`. O(n log n) of n samples."""
        for slots, used, columns in reversed(self._before or []):
            self.used[slots] = used
            for name, values in zip(_COLUMNS, columns, strict=True):
                getattr(self, name)[slots] = values
        if self._before is not None:
            self._recall(self._extra)
            self._renew()
        self._before = None

    def _noted(self) -> Any:
        """What is kept beside the columns and does not follow from them."""
        return None

    def _recall(self, noted: Any) -> None:
        """Have it be so again."""
        return

    def _note(self, slots: Ints) -> None:
        """Keep what is about to change."""
        if self._before is not None:
            columns = [getattr(self, name)[slots] for name in _COLUMNS]
            self._before.append((slots, self.used[slots], columns))

    @abstractmethod
    def _add(self, ids: Ints, targets: Ints, positions: Ints, task: int) -> Slots: ...

    def draw(self, count: int, *key: int | str, balanced: bool = False) -> Ints:
        """min(count, filled) slots without replacement: a function of the content, the seed and `key` alone.

        Args:
            count: samples wanted, >= 1.
            key: what the draw is for, say ("replay", step): the same key draws the same slots.
            balanced: take classes in turn instead of samples uniformly: every class present is drawn equally often, as
                far as it has samples.

        Cost: O(count), whatever the memory holds; balanced: O(n log n) of n samples.
        """
        if count < 1:
            check(False, type(self).__name__, f"draw of {count}", "be at least 1")
        source = generator(self.seed, "draw", *key)
        if not balanced or not self._places.count:
            return self._places.some(count, source)
        slots = self.filled
        order = torch.randperm(len(slots), generator=source).numpy()
        present, label = np.unique(self.targets[slots[order]], return_inverse=True)
        turn = torch.randperm(len(present), generator=source).numpy()[label]
        order = order[np.lexsort((turn, rank_within(label)))]
        return np.asarray(slots[order[:count]], dtype=np.int64)

    def _write(self, slots: Ints, ids: Ints, targets: Ints, positions: Ints, tasks: Ints | int) -> None:
        self._note(slots)
        self._places.take(slots)
        self._set(slots, ids, targets, positions, tasks)

    def _set(self, slots: Ints, ids: Ints, targets: Ints, positions: Ints, tasks: Ints | int) -> None:
        for name, values in zip(_COLUMNS, (ids, targets, positions, tasks), strict=True):
            getattr(self, name)[slots] = values

    @property
    def _tag(self) -> int:
        """Tells kinds of memories apart in saved states."""
        return derive(type(self).__name__)

    def state(self) -> State:
        """Everything but the constructor's arguments: integers, and arrays over the filled slots, ascending."""
        slots = self.filled
        columns: State = {name: getattr(self, name)[slots] for name in _COLUMNS}
        return {"kind": self._tag, "seed": self.seed, "capacity": self.capacity, "slots": slots, **columns}

    def load(self, state: Mapping[str, np.ndarray | int]) -> Ints:
        """Take over a saved state; returns the new slot of each saved sample, -1 for those that no longer fit.

        A memory of another capacity keeps the samples its rule prefers, or has room left.

        Raises:
            CheckpointMismatch: the state is of another kind of memory, or of another seed.
        """
        who = type(self).__name__
        if int(state["kind"]) != self._tag:
            raise CheckpointMismatch(f"{who}: the saved memory is of another kind or has other options, must be alike")
        if int(state["seed"]) != self.seed:
            raise CheckpointMismatch(f"{who}: seed={self.seed}, must be that of the saved memory, {int(state['seed'])}")
        slots = whole(state["slots"])
        columns = [whole(state[name]) for name in _COLUMNS]
        moved = self._place(state, int(state["capacity"]), slots, *columns)
        self.used[:] = False
        for name in _COLUMNS:
            getattr(self, name)[:] = -1
        kept = moved >= 0
        self.used[moved[kept]] = True
        self._set(moved[kept], *(column[kept] for column in columns))
        self._renew()
        return moved

    def _renew(self) -> None:
        """Find anew what follows from the columns."""
        self._places.renew()

    @abstractmethod
    def _place(
        self, state: Mapping[str, np.ndarray | int], capacity: int, slots: Ints, ids: Ints, targets: Ints,
        positions: Ints, tasks: Ints,
    ) -> Ints:
        """The slot here of each saved sample, or -1; may take over further parts of the state."""


def rank_within(group: Ints) -> Ints:
    """For each row, how many earlier rows have its group."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(first, np.diff(np.r_[first, len(group)]))
    return rank


_WHOLE = 4096
"""Up to so many, torch's own permutation is the faster one."""


def first_of_permutation(n: int, count: int, source: torch.Generator) -> Ints:
    """The first min(count, n) entries of `torch.randperm(n, generator=source)`, in time and memory
    of count alone.

    torch shuffles from the front, entry i with one of those from i on, by one 32-bit number each;
    here a table keeps what has moved. Of 2^32 / 20 or more it takes 64-bit numbers, and is asked.
    """
    count = min(count, n)
    if n <= _WHOLE or n >= 2**32 // 20 or 4 * count > n:
        return np.asarray(torch.randperm(n, generator=source)[:count].numpy(), dtype=np.int64)
    # A 64-bit number of torch is two 32-bit ones, the first of them in front.
    numbers = torch.empty((count + 1) // 2, dtype=torch.int64)
    pairs = numbers.random_(-(2**63), None, generator=source).numpy()
    halves = np.stack([pairs >> 32 & 0xFFFFFFFF, pairs & 0xFFFFFFFF], axis=1).reshape(-1)[:count]
    ahead = halves % np.arange(n, n - count, -1)
    moved: dict[int, int] = {}
    found = []
    for place, step in enumerate(ahead.tolist()):
        other = place + step
        found.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return np.asarray(found, dtype=np.int64)
