"""Sample memories: which samples of the past are kept, in which slots. Indices only; `store.py` holds what they index.

A memory is the same on every rank: it sees the ids of whole global batches and draws all its randomness from stateless
keys, so neither the number of ranks nor the use of global generators can change it, and nothing random is saved.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from everbatch.data.buffer import NO_SLOTS, Buffer, Slots, State, rank_within, whole
from everbatch.data.slots import Ints, group_quotas, ring_index
from everbatch.errors import CheckpointMismatch, check
from everbatch.seeds import derive, uniform_keys

__all__ = ["Buffer", "ClassBalanced", "Known", "Quota", "Reservoir", "Ring", "Slots"]

Key = Literal["stream", "sample"]


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


class Reservoir(Buffer):
    """A uniform sample of everything seen: each sample gets a random key, and the `capacity` largest stay.

    P(kept) = capacity / samples seen, as in Vitter's reservoir; but the content is a function of the set of samples
    seen, whatever the batch size and the number of ranks.

    Args:
        capacity: number of slots.
        seed: of keys and draws.
        key: "stream" keys every visit, by its position: a sample met in three epochs enters up to three times (as in
            Mammoth). "sample" keys (task, id): it enters once, and meeting it again refreshes what is stored with it.

    Cost: O(1) for a sample that is turned away, O(log capacity) for one that enters.
    Source: the random-key reservoir of Avalanche's storage_policy.py, with stateless keys.
    """

    def __init__(self, capacity: int, *, seed: int = 0, key: Key = "stream") -> None:
        super().__init__(capacity, seed=seed)
        check(key in ("stream", "sample"), type(self).__name__, f"key={key!r}", "be 'stream' or 'sample'")
        self.key = key
        self._quota, self._known = Quota(), Known()

    @property
    def _tag(self) -> int:
        return derive(type(self).__name__, self.key)

    def _keys(self, ids: Ints, positions: Ints, tasks: Ints) -> NDArray[np.float64]:
        """The random key of each sample, recomputed rather than saved."""
        if self.key == "stream":
            return uniform_keys(positions, self.seed, "buffer")
        keys = np.empty(len(ids))
        for task in np.unique(tasks).tolist():
            rows = tasks == task
            keys[rows] = uniform_keys(ids[rows], self.seed, "buffer", task)
        return keys

    def _keep(self, keys: NDArray[np.float64], targets: Ints, tasks: Ints) -> NDArray[np.bool_]:
        """Which of the candidates stay."""
        keep = np.ones(len(keys), dtype=bool)
        if len(keys) > self.capacity:
            keep[:] = False
            keep[np.argpartition(-keys, self.capacity - 1)[: self.capacity] if self.capacity else NO_SLOTS] = True
        return keep

    @property
    def can_take_back(self) -> bool:
        """See `Buffer.can_take_back`."""
        return type(self)._add is Reservoir._add

    def _groups(self, targets: Ints, tasks: Ints) -> Ints:
        """Which samples compete for the same slots: all."""
        return np.zeros(len(targets), dtype=np.int64)

    def quotas(self) -> dict[int, int]:
        """Slots of each group."""
        return {0: self.capacity}

    def _see(self, targets: Ints, task: int) -> bool:
        """Note what a batch brings before the choice is made; whether quotas are others now."""
        return False

    def _met_again(self, ids: Ints, task: int) -> tuple[Ints, Ints, Ints]:
        """New rows, refreshed rows and their slots, of a batch with key="sample"; the last of equal ids counts."""
        _, last = np.unique(ids[::-1], return_index=True)
        rows = np.sort(len(ids) - 1 - last)
        slots = self._known.find(ids[rows], task)
        met = slots >= 0
        return rows[~met], rows[met], slots[met]

    def _add(self, ids: Ints, targets: Ints, positions: Ints, task: int) -> Slots:
        rows, again, again_slots = np.arange(len(ids)), NO_SLOTS, NO_SLOTS
        if self.key == "sample":
            rows, again, again_slots = self._met_again(ids, task)
        relabelled = bool((self.targets[again_slots] != targets[again]).any())
        if len(again):
            self._write(again_slots, ids[again], targets[again], positions[again], task)
        if relabelled:  # by whoever gives the targets: they may compete with others now
            self._renew()
        changed = self._see(targets, task) or relabelled
        tasks = np.full(len(rows), task)
        keys = self._keys(ids[rows], positions[rows], tasks)
        groups = self._groups(targets[rows], tasks)
        chosen, evicted = self._choose(keys, groups, changed=changed)

        entering = rows[chosen]
        slots = self._replace(evicted, len(entering))
        columns: tuple[Ints | int, ...] = (ids[entering], targets[entering], positions[entering], task)
        for column, values in zip((self.ids, self.targets, self.positions, self.tasks), columns, strict=True):
            column[slots] = values
        self._quota.enter(groups[chosen].tolist(), keys[chosen].tolist(), slots.tolist())
        if self.key == "sample":
            self._known.enter(ids[entering], tasks[chosen], slots)
        # A refreshed sample can lose its place in the same step, when a new class shrinks the quota of its own.
        stay = ~np.isin(again_slots, evicted)
        kept, where = np.r_[entering, again[stay]], np.r_[slots, again_slots[stay]]
        order = np.argsort(kept)
        return Slots(kept[order].astype(np.int64), where[order].astype(np.int64), evicted)

    def _choose(self, keys: NDArray[np.float64], groups: Ints, *, changed: bool) -> tuple[Ints, Ints]:
        """Which of the candidates enter, and the slots whose samples go, both ascending."""
        quotas = self.quotas()
        gone: list[int] = []
        for group in self._quota.heaps if changed else ():
            gone += self._quota.shrink(group, quotas[group])
        order = np.argsort(-keys, kind="stable")
        entering = []
        for group in np.unique(groups).tolist():
            ranked = order[groups[order] == group]
            count, lost = self._quota.offer(group, quotas[group], keys[ranked].tolist())
            entering.append(ranked[:count])
            gone += lost
        chosen = np.sort(np.concatenate(entering)) if entering else NO_SLOTS
        return chosen, np.sort(np.asarray(gone, dtype=np.int64))

    def _replace(self, evicted: Ints, count: int) -> Ints:
        """Slots for `count` new samples, the lowest that are free once those of the evicted are."""
        if self._before is not None:
            self._note(evicted)
        if self.key == "sample" and len(evicted):
            self._known.leave(self.ids[evicted], self.tasks[evicted])
        if count == len(evicted) and self._places.count == self.capacity:
            return evicted  # full, and stays so: which slots are free does not change
        self._places.free(evicted)
        slots = self._places.first_free(count)
        if self._before is not None:
            self._note(slots)
        self._places.take(slots)
        return slots

    def _renew(self) -> None:
        super()._renew()
        slots = self.filled
        ids, positions, targets, tasks = (getattr(self, n)[slots] for n in ("ids", "positions", "targets", "tasks"))
        self._quota.fill(self._groups(targets, tasks), self._keys(ids, positions, tasks), slots)
        self._known = Known()
        if self.key == "sample":
            self._known.enter(ids, tasks, slots)

    def _place(
        self, state: Mapping[str, np.ndarray | int], capacity: int, slots: Ints, ids: Ints, targets: Ints,
        positions: Ints, tasks: Ints,
    ) -> Ints:
        keep = self._keep(self._keys(ids, positions, tasks), targets, tasks)
        if capacity == self.capacity and keep.all():
            return slots
        return np.where(keep, np.cumsum(keep) - 1, -1)


class ClassBalanced(Reservoir):
    """A reservoir per class (or per task), sharing the capacity equally among those seen so far.

    With c groups seen each has floor(capacity / c) slots, the first (capacity mod c) to appear one more; when c grows,
    every group keeps its largest keys. Slots of a group with fewer samples than its quota stay free.

    Args:
        capacity: number of slots.
        seed: of keys and draws.
        key: see `Reservoir`.
        by: "class", or "task" for a memory balanced over tasks.
        total: the number of groups there will be, if the quota shall be capacity // total from the start.

    Cost: that of `Reservoir`; O(capacity) in all for each group that comes.
    """

    def __init__(
        self, capacity: int, *, seed: int = 0, key: Key = "stream", by: Literal["class", "task"] = "class",
        total: int | None = None,
    ) -> None:
        super().__init__(capacity, seed=seed, key=key)
        check(by in ("class", "task"), "ClassBalanced", f"by={by!r}", "be 'class' or 'task'")
        check(total is None or total >= 1, "ClassBalanced", f"total={total!r}", "be at least 1")
        self.by, self.total = by, total
        self.seen: list[int] = []

    @property
    def _tag(self) -> int:
        return derive(type(self).__name__, self.key, self.by)

    def quotas(self) -> dict[int, int]:
        """Slots of each class (or task) seen, in order of appearance."""
        if not self.seen:
            return {}
        if self.total is None:
            return dict(zip(self.seen, group_quotas(self.capacity, len(self.seen)).tolist(), strict=True))
        return dict.fromkeys(self.seen, self.capacity // self.total)

    def _groups(self, targets: Ints, tasks: Ints) -> Ints:
        return targets if self.by == "class" else tasks

    def _see(self, targets: Ints, task: int) -> bool:
        values, first = np.unique(targets, return_index=True)
        arriving = values[np.argsort(first)].tolist() if self.by == "class" else [task]
        new = [group for group in arriving if group not in self.seen]
        self.seen += new
        check(self.total is None or len(self.seen) <= self.total, "ClassBalanced",
              f"{len(self.seen)} groups seen and total={self.total}", "be no more than total")
        return bool(new)

    def _keep(self, keys: NDArray[np.float64], targets: Ints, tasks: Ints) -> NDArray[np.bool_]:
        groups = self._groups(targets, tasks)
        quotas = self.quotas()
        order = np.argsort(-keys, kind="stable")
        present, label = np.unique(groups[order], return_inverse=True)
        quota = whole([quotas[group] for group in present.tolist()])
        keep = np.empty(len(keys), dtype=bool)
        keep[order] = rank_within(label) < quota[label] if len(keys) else False
        return keep

    def _noted(self) -> int:
        return len(self.seen)

    def _recall(self, noted: int) -> None:
        del self.seen[noted:]

    def state(self) -> State:
        """See `Buffer.state`."""
        return {**super().state(), "seen": whole(self.seen)}

    def _place(
        self, state: Mapping[str, np.ndarray | int], capacity: int, slots: Ints, ids: Ints, targets: Ints,
        positions: Ints, tasks: Ints,
    ) -> Ints:
        self.seen = whole(state["seen"]).tolist()
        return super()._place(state, capacity, slots, ids, targets, positions, tasks)


class Ring(Buffer):
    """The last capacity // tasks samples of each task.

    Args:
        capacity: number of slots; 0, or at least one per task.
        tasks: number of tasks of the stream.
        seed: of draws.

    Raises:
        ValueError: fewer slots than tasks; a task beyond `tasks` when it is added.

    Cost: O(G) per batch.
    """

    def __init__(self, capacity: int, *, tasks: int, seed: int = 0) -> None:
        super().__init__(capacity, seed=seed)
        check(tasks >= 1, "Ring", f"tasks={tasks!r}", "be at least 1")
        self.portion = capacity // tasks
        check(capacity == 0 or self.portion >= 1, "Ring", f"capacity={capacity} for {tasks} tasks",
              "be 0 or at least one slot per task")
        self.counts: Ints = np.zeros(tasks, dtype=np.int64)

    @property
    def _tag(self) -> int:
        return derive(type(self).__name__, len(self.counts))

    @property
    def can_take_back(self) -> bool:
        """See `Buffer.can_take_back`."""
        return type(self)._add is Ring._add

    def _add(self, ids: Ints, targets: Ints, positions: Ints, task: int) -> Slots:
        check(0 <= task < len(self.counts), "Ring", f"task={task}", f"be in [0, {len(self.counts)})")
        rows = np.arange(max(len(ids) - self.portion, 0), len(ids))
        slots = ring_index(self.counts[task] + rows, self.portion, task)
        self.counts[task] += len(ids)
        evicted = np.sort(slots[self.used[slots]])
        self._write(slots, ids[rows], targets[rows], positions[rows], task)
        return Slots(rows, slots, evicted)

    def _noted(self) -> Ints:
        before: Ints = self.counts.copy()
        return before

    def _recall(self, noted: Ints) -> None:
        self.counts = noted

    def state(self) -> State:
        """See `Buffer.state`."""
        return {**super().state(), "counts": self.counts.copy()}

    def _place(
        self, state: Mapping[str, np.ndarray | int], capacity: int, slots: Ints, ids: Ints, targets: Ints,
        positions: Ints, tasks: Ints,
    ) -> Ints:
        if capacity != self.capacity:
            raise CheckpointMismatch(f"Ring: capacity={self.capacity}, must be that of the saved memory, {capacity}; "
                                     "a ring's slots depend on it")
        self.counts = whole(state["counts"]).copy()
        return slots
