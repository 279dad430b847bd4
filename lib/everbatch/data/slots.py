"""Kernels of sample memories: which slot an arriving sample takes. Pure functions, no generator inside.

`reservoir_index` and `balancoir_index` are the sequential forms of Mammoth, for parity with published runs; the
memories of `buffers.py` use random keys instead (`largest`), which follow the same law and do not depend on how a
stream is cut.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from everbatch.errors import check

__all__ = ["balancoir_index", "group_quotas", "largest", "reservoir_index", "ring_index", "share"]

Ints = NDArray[np.int64]


def reservoir_index(seen: int, capacity: int, draw: Callable[[int], int]) -> int:
    """Slot of stream item number `seen` (from 0), or -1 to discard it: Vitter's algorithm R.

    While filling, slot = seen. Then r is uniform in 0..seen, and the slot is r if r < capacity. After N items each is
    in the memory with probability capacity / N.

    Args:
        seen: items before this one.
        capacity: slots, >= 1.
        draw: called as draw(n) for an integer uniform in 0..n-1; not called while filling. Mammoth's is
            `numpy.random.randint(0, n)`.

    Source: Vitter 1985, algorithm R; Mammoth utils/buffer.py `ReservoirSampling`.
    """
    if seen < capacity:
        return seen
    slot = draw(seen + 1)
    return slot if slot < capacity else -1


def balancoir_index(seen: int, label: int, labels: Ints, capacity: int, draw: Callable[[int], int]) -> int:
    """Slot of stream item number `seen` (from 0), or -1: a reservoir that favours rare classes.

    While filling, slot = seen. Then r is uniform in 0..seen; the item enters if r < capacity, or if its class has fewer
    items than the median over the classes present, and replaces item number r mod n of the largest class, of n items
    (the smallest label among equally large classes).

    Args:
        seen: items before this one.
        label: class of the item, >= 0.
        labels: (capacity,) class of each slot.
        capacity: slots, >= 1.
        draw: as in `reservoir_index`.

    Source: Mammoth utils/buffer.py `BalancoirSampling` (Buzzega et al. 2020, arXiv 2010.05595).
    """
    if seen < capacity:
        return seen
    r = draw(seen + 1)
    counts = np.bincount(labels, minlength=label + 1)
    if r >= capacity and counts[label] >= np.median(counts[counts > 0]):
        return -1
    return int(np.flatnonzero(labels == counts.argmax())[r % counts.max()])


def ring_index(seen: Ints | int, portion: int, task: int) -> Ints:
    """Slot (seen mod portion) + task * portion of item number `seen` of a task; it keeps the last items of each task.

    Args:
        seen: items of the task before this one; any shape.
        portion: slots per task, capacity // tasks.
        task: number of the task.
    """
    return np.asarray(seen, dtype=np.int64) % portion + task * portion


def group_quotas(capacity: int, groups: int) -> Ints:
    """Slots per group, shape (groups,): floor(capacity / groups), one more for the first capacity mod groups.

    Never grows with `groups`, so a group that keeps its best items needs none back. Source: Avalanche
    training/storage_policy.py `get_group_lengths`.
    """
    check(groups >= 1, "group_quotas", f"groups={groups}", "be at least 1")
    return capacity // groups + (np.arange(groups) < capacity % groups).astype(np.int64)


def largest(keys: NDArray[np.floating], capacity: int) -> Ints:
    """Indices of the `capacity` largest keys (all when there are fewer), largest first; earlier first among equals.

    With uniform random keys this is a reservoir: the set is the same in whatever order and pieces the items come.
    """
    return np.argsort(-keys, kind="stable")[:capacity].astype(np.int64)


def share(count: int, parts: int) -> Ints:
    """Bounds (parts + 1,) that cut `count` rows into nearly equal contiguous parts, r being bounds[r]:bounds[r + 1]."""
    return np.arange(parts + 1, dtype=np.int64) * count // parts
