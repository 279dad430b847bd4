"""Sample memories: which samples of the past are kept, in which slots. Indices only; `store.py` holds what they index.

A memory is the same on every rank: it sees the ids of whole global batches and draws all its randomness from stateless
keys, so neither the number of ranks nor the use of global generators can change it, and nothing random is saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from everbatch.data.memory import check_memory
from everbatch.data.slots import Ints, group_quotas, largest, ring_index
from everbatch.errors import CheckpointMismatch, check
from everbatch.seeds import derive, generator, uniform_keys

__all__ = ["Buffer", "ClassBalanced", "Reservoir", "Ring", "Slots"]

Key = Literal["stream", "sample"]
State = dict[str, "np.ndarray | int"]
_COLUMNS = ("ids", "targets", "positions", "tasks")
INDEX_BYTES = 41
"""Of a slot, beside its sample: four columns, where it lies, and whether it is used."""


class Slots(NamedTuple):
    """What happened to the rows of one `add`."""

    rows: Ints
    """Incoming rows that are kept (entered, or refreshed what was there), ascending."""
    slots: Ints
    """The slot of each."""
    evicted: Ints
    """Slots whose earlier sample is gone, ascending; some of them are in `slots` again, with their new sample."""


def _ints(values: ArrayLike) -> Ints:
    return np.asarray(values, dtype=np.int64)


_NONE = np.empty(0, dtype=np.int64)


class Buffer(ABC):
    """`capacity` slots of (id, target, position, task). Subclasses decide who gets one.

    Args:
        capacity: number of slots; 0 keeps nothing.
        seed: of keys and draws.

    Raises:
        ValueError: capacity below 0, or beyond this machine's memory.
    """

    def __init__(self, capacity: int, *, seed: int = 0) -> None:
        whole = isinstance(capacity, int) and not isinstance(capacity, bool)
        check(whole and capacity >= 0, type(self).__name__, f"capacity={capacity!r}", "be an integer >= 0",
              "0 keeps nothing and switches replay off")
        check_memory(type(self).__name__, f"capacity={capacity}", capacity * INDEX_BYTES, "lower the capacity")
        self.capacity, self.seed = capacity, seed
        self.used: NDArray[np.bool_] = np.zeros(capacity, dtype=bool)
        self.ids, self.targets, self.positions, self.tasks = (np.full(capacity, -1, dtype=np.int64) for _ in _COLUMNS)

    def __len__(self) -> int:
        return int(self.used.sum())

    @property
    def filled(self) -> Ints:
        """Slots that hold a sample, ascending."""
        return np.flatnonzero(self.used)

    def add(self, ids: ArrayLike, targets: ArrayLike, positions: ArrayLike, task: int) -> Slots:
        """Offer one global batch: (G,) ids, targets and stream positions, all of one task. The same on every rank."""
        keys, labels, places = _ints(ids), _ints(targets), _ints(positions)
        if not (keys.ndim == 1 and keys.shape == labels.shape == places.shape):
            check(False, type(self).__name__,
                  f"ids, targets and positions of shapes {keys.shape}, {labels.shape}, {places.shape}", "be (G,) each")
        if self.capacity == 0 or len(keys) == 0:
            return Slots(_NONE, _NONE, _NONE)
        return self._add(keys, labels, places, task)

    @abstractmethod
    def _add(self, ids: Ints, targets: Ints, positions: Ints, task: int) -> Slots: ...

    def draw(self, count: int, *key: int | str, balanced: bool = False) -> Ints:
        """min(count, filled) slots without replacement: a function of the content, the seed and `key` alone.

        Args:
            count: samples wanted, >= 1.
            key: what the draw is for, say ("replay", step): the same key draws the same slots.
            balanced: take classes in turn instead of samples uniformly: every class present is drawn equally often, as
                far as it has samples.
        """
        if count < 1:
            check(False, type(self).__name__, f"draw of {count}", "be at least 1")
        slots, source = self.filled, generator(self.seed, "draw", *key)
        order = torch.randperm(len(slots), generator=source).numpy()
        if balanced and len(slots):
            present, label = np.unique(self.targets[slots[order]], return_inverse=True)
            turn = torch.randperm(len(present), generator=source).numpy()[label]
            order = order[np.lexsort((turn, _rank_within(label)))]
        return np.asarray(slots[order[:count]], dtype=np.int64)

    def _write(self, slots: Ints, ids: Ints, targets: Ints, positions: Ints, tasks: Ints | int) -> None:
        self.used[slots] = True
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
        slots = _ints(state["slots"])
        columns = [_ints(state[name]) for name in _COLUMNS]
        moved = self._place(state, int(state["capacity"]), slots, *columns)
        self.used[:] = False
        for name in _COLUMNS:
            getattr(self, name)[:] = -1
        kept = moved >= 0
        self._write(moved[kept], *(column[kept] for column in columns))
        return moved

    @abstractmethod
    def _place(
        self, state: Mapping[str, np.ndarray | int], capacity: int, slots: Ints, ids: Ints, targets: Ints,
        positions: Ints, tasks: Ints,
    ) -> Ints:
        """The slot here of each saved sample, or -1; may take over further parts of the state."""


def _rank_within(group: Ints) -> Ints:
    """For each row, how many earlier rows have its group."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(first, np.diff(np.r_[first, len(group)]))
    return rank


class Reservoir(Buffer):
    """A uniform sample of everything seen: each sample gets a random key, and the `capacity` largest stay.

    P(kept) = capacity / samples seen, as in Vitter's reservoir; but the content is a function of the set of samples
    seen, whatever the batch size and the number of ranks.

    Args:
        capacity: number of slots.
        seed: of keys and draws.
        key: "stream" keys every visit, by its position: a sample met in three epochs enters up to three times (as in
            Mammoth). "sample" keys (task, id): it enters once, and meeting it again refreshes what is stored with it.

    Cost: O(G + capacity) per batch.
    Source: the random-key reservoir of Avalanche's storage_policy.py, with stateless keys.
    """

    def __init__(self, capacity: int, *, seed: int = 0, key: Key = "stream") -> None:
        super().__init__(capacity, seed=seed)
        check(key in ("stream", "sample"), type(self).__name__, f"key={key!r}", "be 'stream' or 'sample'")
        self.key = key

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
            keep[np.argpartition(-keys, self.capacity - 1)[: self.capacity] if self.capacity else _NONE] = True
        return keep

    def _see(self, targets: Ints, task: int) -> None:
        """Note what a batch brings before the choice is made."""

    def _met_again(self, ids: Ints, task: int) -> tuple[Ints, Ints, Ints]:
        """New rows, refreshed rows and their slots, of a batch with key="sample"; the last of equal ids counts."""
        _, last = np.unique(ids[::-1], return_index=True)
        rows = np.sort(len(ids) - 1 - last)
        here = np.flatnonzero(self.used & (self.tasks == task))
        here = here[np.argsort(self.ids[here])]
        place = np.searchsorted(self.ids[here], ids[rows])
        hit = place < len(here)
        hit[hit] = self.ids[here[place[hit]]] == ids[rows[hit]]
        return rows[~hit], rows[hit], here[place[hit]]

    def _add(self, ids: Ints, targets: Ints, positions: Ints, task: int) -> Slots:
        rows, again, again_slots = np.arange(len(ids)), _NONE, _NONE
        if self.key == "sample":
            rows, again, again_slots = self._met_again(ids, task)
            self._write(again_slots, ids[again], targets[again], positions[again], task)
        self._see(targets, task)
        old = self.filled
        tasks = np.r_[self.tasks[old], np.full(len(rows), task)]
        keys = self._keys(np.r_[self.ids[old], ids[rows]], np.r_[self.positions[old], positions[rows]], tasks)
        keep = self._keep(keys, np.r_[self.targets[old], targets[rows]], tasks)
        evicted, entering = old[~keep[: len(old)]], rows[keep[len(old) :]]
        self.used[evicted] = False
        slots = np.flatnonzero(~self.used)[: len(entering)]
        self._write(slots, ids[entering], targets[entering], positions[entering], task)
        # A refreshed sample can lose its place in the same step, when a new class shrinks the quota of its own.
        stay = ~np.isin(again_slots, evicted)
        kept, where = np.r_[entering, again[stay]], np.r_[slots, again_slots[stay]]
        order = np.argsort(kept)
        return Slots(_ints(kept[order]), _ints(where[order]), _ints(evicted))

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

    Cost: O((G + capacity) log(G + capacity)) per batch.
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

    def _see(self, targets: Ints, task: int) -> None:
        values, first = np.unique(targets, return_index=True)
        arriving = values[np.argsort(first)].tolist() if self.by == "class" else [task]
        self.seen += [group for group in arriving if group not in self.seen]
        check(self.total is None or len(self.seen) <= self.total, "ClassBalanced",
              f"{len(self.seen)} groups seen and total={self.total}", "be no more than total")

    def _keep(self, keys: NDArray[np.float64], targets: Ints, tasks: Ints) -> NDArray[np.bool_]:
        groups = targets if self.by == "class" else tasks
        quotas = self.quotas()
        order = largest(keys, len(keys))
        present, label = np.unique(groups[order], return_inverse=True)
        quota = _ints([quotas[group] for group in present.tolist()])
        keep = np.empty(len(keys), dtype=bool)
        keep[order] = _rank_within(label) < quota[label] if len(keys) else False
        return keep

    def state(self) -> State:
        """See `Buffer.state`."""
        return {**super().state(), "seen": _ints(self.seen)}

    def _place(
        self, state: Mapping[str, np.ndarray | int], capacity: int, slots: Ints, ids: Ints, targets: Ints,
        positions: Ints, tasks: Ints,
    ) -> Ints:
        self.seen = _ints(state["seen"]).tolist()
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
        self.counts = np.zeros(tasks, dtype=np.int64)

    @property
    def _tag(self) -> int:
        return derive(type(self).__name__, len(self.counts))

    def _add(self, ids: Ints, targets: Ints, positions: Ints, task: int) -> Slots:
        check(0 <= task < len(self.counts), "Ring", f"task={task}", f"be in [0, {len(self.counts)})")
        rows = np.arange(max(len(ids) - self.portion, 0), len(ids))
        slots = ring_index(self.counts[task] + rows, self.portion, task)
        self.counts[task] += len(ids)
        evicted = np.sort(slots[self.used[slots]])
        self._write(slots, ids[rows], targets[rows], positions[rows], task)
        return Slots(rows, slots, evicted)

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
        self.counts = _ints(state["counts"]).copy()
        return slots
