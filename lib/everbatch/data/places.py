"""What a sample memory keeps beside its columns, so that a batch costs what it brings and not what the memory holds.

All of it follows from the columns: nothing here is saved.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from everbatch.data.slots import Ints

__all__ = ["Known", "Places", "Quota"]


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

    def filled(self, index: Ints) -> Ints:
        """The slots at these places in the ascending list of all that are filled."""
        if len(self.holes) == 0:
            return index
        before = self.holes - np.arange(len(self.holes))  # filled slots below each hole
        return index + np.searchsorted(before, index, side="right")


class Quota:
    """Samples by group, of each group its least key at hand.

    Cost: O(log n) of a sample that enters or leaves, O(1) of one that is turned away; about 120
    bytes for each.
    """

    def __init__(self) -> None:
        self.heaps: dict[int, list[tuple[float, int]]] = {}

    def fill(self, groups: Ints, keys: NDArray[np.float64], slots: Ints) -> None:
        """Begin with these."""
        self.heaps = {}
        for group, key, slot in zip(groups.tolist(), keys.tolist(), slots.tolist(), strict=True):
            self.heaps.setdefault(group, []).append((key, slot))
        for heap in self.heaps.values():
            heapq.heapify(heap)

    def shrink(self, group: int, quota: int) -> list[int]:
        """Slots of the least keys of a group that are too many."""
        heap, gone = self.heaps.get(group, []), []
        while len(heap) > quota:
            gone.append(heapq.heappop(heap)[1])
        return gone

    def offer(self, group: int, quota: int, keys: list[float]) -> tuple[int, list[int]]:
        """How many of these keys, largest first, are among the `quota` largest of the group, and
        which slots they cost."""
        heap = self.heaps.setdefault(group, [])
        gone: list[int] = []
        for taken, key in enumerate(keys):
            if len(heap) + taken < quota:
                continue
            # Those that were let in before are larger than this one: only what was there can be less.
            if not heap or key <= heap[0][0]:
                return taken, gone
            gone.append(heapq.heappop(heap)[1])
        return len(keys), gone

    def enter(self, groups: Iterable[int], keys: Iterable[float], slots: Iterable[int]) -> None:
        """Samples that were let in, with the slots that they got."""
        for group, key, slot in zip(groups, keys, slots, strict=True):
            heapq.heappush(self.heaps[group], (key, slot))


class Known:
    """The slot of a sample by its task and id."""

    def __init__(self) -> None:
        self.slots: dict[int, dict[int, int]] = {}

    def find(self, ids: Ints, task: int) -> Ints:
        """The slot of each, -1 for those that are not there."""
        table = self.slots.get(task, {})
        return np.asarray([table.get(key, -1) for key in ids.tolist()], dtype=np.int64)

    def enter(self, ids: Ints, tasks: Ints, slots: Ints) -> None:
        """Samples and the slots that they got."""
        for key, task, slot in zip(ids.tolist(), tasks.tolist(), slots.tolist(), strict=True):
            self.slots.setdefault(task, {})[key] = slot

    def leave(self, ids: Ints, tasks: Ints) -> None:
        """Samples that are gone."""
        for key, task in zip(ids.tolist(), tasks.tolist(), strict=True):
            del self.slots[task][key]
