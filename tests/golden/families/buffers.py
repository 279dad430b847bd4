"""`buffers*`: which samples memories keep. The integers and keys that the references drew are in the file."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everbatch.data import (
    ClassBalanced,
    Reservoir,
    Ring,
    balancoir_index,
    group_quotas,
    largest,
    reservoir_index,
    ring_index,
)
from everbatch.data.own_memory import Offered, OwnMemory
from golden.comparison import Array, Comparison, FormatError, Vectors

__all__ = ["RecordedDraws", "check"]


class RecordedDraws:
    """The integers that a reference drew, handed out one by one."""

    def __init__(self, key: str, values: Array) -> None:
        self.key, self.values, self.used = key, values, 0

    def __call__(self, bound: int) -> int:
        if self.used == len(self.values):
            raise FormatError(f"{self.key} holds {self.used} integers, the library draws more")
        value = int(self.values[self.used])
        if not 0 <= value < bound:
            raise FormatError(f"{self.key}[{self.used}] is {value}, the library draws from 0 to {bound - 1}")
        self.used += 1
        return value

    def finish(self) -> None:
        """Raise unless all were drawn."""
        if self.used != len(self.values):
            raise FormatError(f"{self.key} holds {len(self.values)} integers, the library draws {self.used}")


def check(file: Vectors, compare: Comparison) -> None:
    """Every part that the file holds; a file may hold some of them only."""
    parts = {"reservoir": _reservoir, "ring": _ring, "balancoir": _balancoir, "quota": _quota,
             "priority_reservoir": _priority}
    here = [part for part in file.groups() if part in parts]
    if not here:
        raise FormatError(f"none of the parts {', '.join(parts)}")
    for part in here:
        parts[part](file, compare)


def _reservoir(file: Vectors, compare: Comparison) -> None:
    for case in file.groups("reservoir/"):
        at = f"reservoir/{case}"
        capacity = file.integer(f"{at}/buffer_size")
        draws = RecordedDraws(f"{at}/randint_draws", file[f"{at}/randint_draws"])
        index = [reservoir_index(seen, capacity, draws) for seen in range(file.integer(f"{at}/n_stream"))]
        draws.finish()
        content = np.full(capacity, -1)
        for item, slot in enumerate(index):
            if slot >= 0:
                content[slot] = item
        compare.close(f"{at}/index", index, file[f"{at}/index"])
        compare.close(f"{at}/content_stream_ids", content, file[f"{at}/content_stream_ids"])


def _ring(file: Vectors, compare: Comparison) -> None:
    """The kernel, and the memory that uses it: both give the slot of each item of each task."""
    portion, want = file.integer("ring/portion"), file["ring/index"]
    tasks, items = want.shape
    compare.close("ring/index", [ring_index(np.arange(items), portion, task) for task in range(tasks)], want)
    memory, one = Ring(portion * tasks, tasks=tasks), np.zeros(1, dtype=np.int64)
    slots = [memory.add(one + item, one, one + item, task).slots[0] for task in range(tasks) for item in range(items)]
    compare.close("ring/index (Ring)", np.reshape(slots, want.shape), want)
    own = OwnMemory(functools.partial(_OwnRing, tasks, portion), portion * tasks)
    slots = [own.add(one + item, one, one + item, task).slots[0] for task in range(tasks) for item in range(items)]
    compare.close("ring/index (OwnMemory)", np.reshape(slots, want.shape), want)


class _OwnRing:
    """The ring as a memory of a user's own."""

    def __init__(self, tasks: int, portion: int) -> None:
        self.portion, self.met = portion, np.zeros(tasks, dtype=np.int64)

    def add(self, held: Any, offered: Offered, rng: np.random.Generator) -> Array:
        counts = self.met[offered.task] + np.arange(len(offered.ids))
        self.met[offered.task] += len(offered.ids)
        slots: Array = counts % self.portion + offered.task * self.portion
        return slots

    def draw(self, held: Any, count: int, rng: np.random.Generator) -> Array:
        return rng.choice(held.filled, count, replace=False)


def _balancoir(file: Vectors, compare: Comparison) -> None:
    capacity, labels = file.integer("balancoir/buffer_size"), file["balancoir/labels"]
    draws = RecordedDraws("balancoir/randint_draws", file["balancoir/randint_draws"])
    kept, index = np.zeros(capacity, dtype=np.int64), []
    for seen, label in enumerate(labels.tolist()):
        index.append(balancoir_index(seen, label, kept, capacity, draws))
        if index[-1] >= 0:
            kept[index[-1]] = label
    draws.finish()
    compare.close("balancoir/index", index, file["balancoir/index"])
    compare.close("balancoir/final_labels", kept, file["balancoir/final_labels"])


def _quota(file: Vectors, compare: Comparison) -> None:
    """The kernel, and the memory that uses it, after one sample of each class. Rows are padded at the end."""
    sizes, counts = file["quota/max_size"].tolist(), file["quota/groups"].tolist()
    for i, (capacity, groups, padded) in enumerate(zip(sizes, counts, file["quota/lengths_padded"], strict=True)):
        compare.close(f"quota/lengths_padded[{i}]", group_quotas(capacity, groups), padded[:groups])
        memory, arriving = ClassBalanced(capacity), np.arange(groups)
        memory.add(arriving, arriving, arriving, 0)
        compare.close(f"quota/lengths_padded[{i}] (ClassBalanced)", list(memory.quotas().values()), padded[:groups])


def _priority(file: Vectors, compare: Comparison) -> None:
    """The kernel on all keys so far, and `Reservoir`, batch by batch, with the recorded keys instead of hashed ones."""
    at = "priority_reservoir"
    chunks = sorted((n for n in file.groups(f"{at}/") if re.fullmatch(r"chunk\d+", n)), key=lambda n: int(n[5:]))
    # The file does not say the capacity: it is the size of the content once full, and plays no part before.
    capacity = max((len(file[f"{at}/{chunk}/content"]) for chunk in chunks), default=0)
    drawn: dict[int, Any] = {}
    memory = _Keyed(capacity, drawn)
    for chunk in (f"{at}/{name}" for name in chunks):
        ids, keys = file[f"{chunk}/ids"], file[f"{chunk}/weights_drawn"]
        drawn.update(zip(ids.tolist(), keys, strict=True))
        memory.add(ids, np.zeros_like(ids), ids, 0)
        seen, keys = np.asarray(list(drawn)), np.asarray(list(drawn.values()))
        kept, want = largest(keys, capacity), file[f"{chunk}/content"]
        compare.close(f"{chunk}/content", seen[kept], want)
        compare.close(f"{chunk}/content_weights", keys[kept], file[f"{chunk}/content_weights"])
        compare.close(f"{chunk}/content (Reservoir)", memory.by_key(), want)
    for name in [key for key in file.arrays if re.fullmatch(rf"{at}/after_resize\d+", key)]:
        smaller = _Keyed(int(name.rpartition("resize")[2]), drawn)
        smaller.load(memory.state())
        compare.close(f"{name} (Reservoir)", smaller.by_key(), file[name])


class _Keyed(Reservoir):
    """A reservoir whose keys are given by sample id."""

    def __init__(self, capacity: int, keys: dict[int, Any]) -> None:
        super().__init__(capacity)
        self.given = keys

    def _keys(self, ids: NDArray[np.int64], positions: Array, tasks: Array) -> NDArray[np.float64]:
        return np.asarray([self.given[i] for i in ids.tolist()], dtype=np.float64)

    def by_key(self) -> list[int]:
        """Ids of what is kept, largest key first."""
        return sorted(self.ids[self.filled].tolist(), key=lambda i: -self.given[i])
