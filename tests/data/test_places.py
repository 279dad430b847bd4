"""Memories that cost what a batch brings: the same, to the slot, as memories that sort all they hold anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from everbatch.data import ClassBalanced, Reservoir, Ring, largest
from everbatch.data.buffer import Places, Slots, first_of_permutation
from everbatch.seeds import generator, uniform_keys


class SortedAnew:
    """A reservoir, of all or of each class, by its definition: the largest keys of what is there and what comes."""

    def __init__(self, like: Any) -> None:
        self.like, self.seen = like, []
        self.rows: dict[int, tuple[int, int, int, int]] = {}  # by slot: id, target, position, task

    def key(self, row: tuple[int, int, int, int]) -> float:
        name, _, position, task = row
        if self.like.key == "stream":
            return float(uniform_keys(np.asarray([position]), self.like.seed, "buffer")[0])
        return float(uniform_keys(np.asarray([name]), self.like.seed, "buffer", task)[0])

    def group(self, row: tuple[int, int, int, int]) -> int:
        if not isinstance(self.like, ClassBalanced):
            return 0
        return row[1] if self.like.by == "class" else row[3]

    def add(self, ids: Any, targets: Any, positions: Any, task: int) -> Slots:
        batch = list(zip(ids.tolist(), targets.tolist(), positions.tolist(), [task] * len(ids), strict=True))
        again: dict[int, int] = {}  # row to slot
        new = list(range(len(batch)))
        if self.like.key == "sample":
            new = sorted({row[0]: i for i, row in enumerate(batch)}.values())
            where = {(r[0], r[3]): slot for slot, r in self.rows.items()}
            again = {i: where[batch[i][0], task] for i in new if (batch[i][0], task) in where}
            self.rows |= {slot: batch[i] for i, slot in again.items()}
            new = [i for i in new if i not in again]
        self.seen += [g for g in dict.fromkeys(map(self.group, batch)) if g not in self.seen]
        candidates = [(self.key(r), self.group(r), slot, -1) for slot, r in self.rows.items()]
        candidates += [(self.key(batch[i]), self.group(batch[i]), -1, i) for i in new]
        entering, staying = [], set()
        for place, g in enumerate(self.seen):
            quota = self.like.capacity
            if isinstance(self.like, ClassBalanced):
                quota, rest = divmod(self.like.capacity, len(self.seen))
                quota += place < rest
            for _, _, slot, row in sorted((c for c in candidates if c[1] == g), reverse=True)[:quota]:
                (entering.append(row) if slot < 0 else staying.add(slot))
        evicted = sorted(set(self.rows) - staying)
        for slot in evicted:
            del self.rows[slot]
        free = [slot for slot in range(self.like.capacity) if slot not in self.rows]
        given = dict(zip(sorted(entering), free, strict=False))
        self.rows |= {slot: batch[i] for i, slot in given.items()}
        given |= {i: slot for i, slot in again.items() if slot not in evicted}
        rows = sorted(given)
        return Slots(np.asarray(rows), np.asarray([given[i] for i in rows]), np.asarray(evicted))


KINDS = {
    "stream": lambda n: Reservoir(n, seed=3), "sample": lambda n: Reservoir(n, seed=3, key="sample"),
    "class": lambda n: ClassBalanced(n, seed=3), "class_sample": lambda n: ClassBalanced(n, seed=3, key="sample"),
    "task_sample": lambda n: ClassBalanced(n, seed=3, by="task", key="sample"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [1, 13, 60])
def test_every_batch_does_what_sorting_all_anew_does(kind: str, capacity: int) -> None:
    """Samples met again, in one batch too, with other labels, tasks that come back, a restart in between."""
    buffer: Any = KINDS[kind](capacity)
    naive, chance = SortedAnew(buffer), np.random.default_rng([capacity, len(kind)])
    for step in range(40):
        size, task = int(chance.integers(0, 9)), int(chance.integers(0, step // 8 + 1))
        ids = chance.integers(0, 25, size)
        targets = np.where(chance.random(size) < 0.1, chance.integers(0, 9, size), ids % 3 + 2 * task)
        positions = 9 * step + np.arange(size)
        got, want = buffer.add(ids, targets, positions, task), naive.add(ids, targets, positions, task)
        for one, other in zip(got, want, strict=True):
            assert one.dtype == np.int64 and one.tolist() == other.tolist()
        slots = sorted(naive.rows)
        assert buffer.filled.tolist() == slots and len(buffer) == len(slots)
        order = torch.randperm(len(slots), generator=generator(3, "draw", "replay", step)).tolist()
        assert buffer.draw(5, "replay", step).tolist() == [slots[i] for i in order[:5]]
        if step == 20:
            state, buffer = buffer.state(), KINDS[kind](capacity)
            buffer.load(state)


def test_places_know_what_is_filled() -> None:
    chance = np.random.default_rng(0)
    places = Places(np.zeros(40, dtype=bool))
    for _ in range(200):
        filled = np.flatnonzero(places.used)
        assert places.count == len(filled) and places.filled(np.arange(len(filled))).tolist() == filled.tolist()
        assert places.first_free(7).tolist() == np.flatnonzero(~places.used)[:7].tolist()
        some = chance.permutation(40)[: chance.integers(0, 12)]
        if chance.random() < 0.5:
            places.take(some)
        else:
            places.free(some[places.used[some]])
    ring = Ring(7, tasks=3)  # a slot that is never filled, and holes between the tasks
    ring.add([5], [0], [0], 2)
    ring.add([6], [0], [1], 0)
    assert ring.filled.tolist() == [0, 4] == sorted(ring.draw(9, "x", 0).tolist())


@pytest.mark.parametrize(("n", "count"), [(5000, 1), (5000, 7), (50_000, 256), (4097, 1024), (20, 5), (0, 3)])
def test_the_first_of_a_permutation_are_torchs(n: int, count: int) -> None:
    for seed in range(5):
        want = torch.randperm(n, generator=generator(seed, "draw"))[:count]
        assert first_of_permutation(n, count, generator(seed, "draw")).tolist() == want.tolist()


def test_what_a_batch_costs_does_not_grow_with_the_memory() -> None:
    """Keys that are asked for, counted; no clock."""
    touched = {}
    for capacity in (500, 50_000):
        buffer = Reservoir(capacity, seed=1, key="sample")
        first = np.arange(2 * capacity)
        buffer.add(first, first % 2, first, 0)
        asked: list[int] = []
        keys = buffer._keys

        def counted(ids: Any, positions: Any, tasks: Any, keys: Any = keys, asked: list[int] = asked) -> Any:
            asked.append(len(ids))
            return keys(ids, positions, tasks)

        buffer._keys = counted  # type: ignore[method-assign]
        for step in range(20):
            ids = 2 * capacity + 32 * step + np.arange(32)
            buffer.add(ids, ids % 2, ids, 0)
        touched[capacity] = asked
        seen = np.arange(2 * capacity + 640)
        best = largest(uniform_keys(seen, 1, "buffer", 0), capacity)
        assert sorted(buffer.ids.tolist()) == sorted(best.tolist())
    assert touched[500] == touched[50_000] == [32] * 20
