"""A memory of one's own: a class with two methods decides which samples stay, and which are drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from everbatch.data.buffer import NO_SLOTS, Buffer, Slots, State, whole
from everbatch.data.slots import Ints
from everbatch.errors import CheckpointMismatch, check
from everbatch.seeds import derive, numpy_generator

__all__ = ["Held", "Memory", "Offered", "OwnMemory", "check_own"]

OWN = "own_"
"""Before the names of its attributes, in a saved state."""


class Offered(NamedTuple):
    """One global batch, the same on every rank: (G,) each, to be read; a write raises numpy's ValueError."""

    ids: Ints
    targets: Ints
    positions: Ints
    """In the stream, counted over tasks."""
    task: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What a memory keeps so far, by slot: (capacity,) each, -1 where a slot is not used. To be read, as it is during the call
    that was given it; a write raises numpy's ValueError."""

    capacity: int
    seed: int
    used: NDArray[np.bool_]
    ids: Ints
    targets: Ints
    positions: Ints
    tasks: Ints

    @property
    def filled(self) -> Ints:
        """The used slots, ascending."""
        return np.flatnonzero(self.used)

    def __len__(self) -> int:
        """How many slots are used."""
        return int(np.count_nonzero(self.used))


def _shown(values: NDArray[Any]) -> NDArray[Any]:
    """The same numbers for a user to read. A write would change the run's own labels or index, and nothing would notice."""
    view: NDArray[Any] = values.view()
    view.setflags(write=False)
    return view


class Memory(Protocol):
    """What `replay.memory` takes: a class without arguments, or `functools.partial` of one, with these two methods.

    `held` is what is kept so far: `capacity`, `seed`, and by slot `used`, `ids`, `targets`, `positions`, `tasks`, (capacity,)
    each; `filled` are the used slots, `len(held)` is their number. These arrays, and those of `offered`, are read-only: what
    shuffles or changes in place needs a copy.

    Both are asked on every rank, of the same content and with generators in the same state, and must answer alike: no other
    randomness, nothing of the rank's own. Attributes that are numbers or numpy arrays are saved with the run; others are refused.
    """

    def add(self, held: Held, offered: Offered, rng: np.random.Generator, /) -> ArrayLike:
        """The slot of each sample of the batch, (G,) integers below the capacity, or -1 where it is not kept. Of several for one
        slot the last stays; what was in the slot is gone."""

    def draw(self, held: Held, count: int, rng: np.random.Generator, /) -> ArrayLike:
        """Used slots to rehearse, at most `count`; none: this step rehearses nothing."""


def check_own(who: str, name: str, given: Any) -> None:
    """Raise `ValueError` unless this makes a `Memory`."""
    cls = given.func if isinstance(given, functools.partial) else given
    got = f"{name}={given!r}"
    check(isinstance(cls, type), who, got, "be one of the names, or a class with add(held, offered, rng) and "
          "draw(held, count, rng)", "give the class, or functools.partial of it for options: ranks must be able to compare it")
    lacking = [method for method in ("add", "draw") if not callable(getattr(cls, method, None))]
    check(not lacking, who, f"{got} without {' and '.join(lacking)}()", "have add(held, offered, rng) and draw(held, count, rng)")


class OwnMemory(Buffer):
    """The slots that a user's `Memory` decides about; it checks every answer.

    Raises:
        ValueError: on every rank alike, an answer that names no slots, or attributes that cannot be saved.
    """

    def __init__(self, make: Callable[[], Memory], capacity: int, *, seed: int = 0) -> None:
        super().__init__(capacity, seed=seed)
        self.own = make()
        self._proven = False

    @property
    def _name(self) -> str:
        return type(self.own).__name__

    @property
    def _tag(self) -> int:
        return derive("OwnMemory", self._name)

    def _held(self) -> Held:
        """What the user's object is shown of this. Cost: five views, whatever the capacity."""
        return Held(capacity=self.capacity, seed=self.seed, used=_shown(self.used), ids=_shown(self.ids),
                    targets=_shown(self.targets), positions=_shown(self.positions), tasks=_shown(self.tasks))

    def _add(self, ids: Ints, targets: Ints, positions: Ints, task: int) -> Slots:
        rng = numpy_generator(self.seed, "own memory", "add", int(positions[0]))
        answer = self.own.add(self._held(), Offered(_shown(ids), _shown(targets), _shown(positions), task), rng)
        chosen = self._slots("add", answer, -1)
        got = f"add() of {len(ids)} samples gave {chosen.shape} slots"
        check(chosen.shape == ids.shape, self._name, got, "give one for each")
        if not self._proven:  # once, in the first step, and not after hours
            self._attributes()
            self._proven = True
        last = {slot: row for row, slot in enumerate(chosen.tolist()) if slot >= 0}
        rows = whole(sorted(last.values()))
        slots = chosen[rows]
        evicted = np.sort(slots[self.used[slots]])
        self._write(slots, ids[rows], targets[rows], positions[rows], task)
        return Slots(rows, slots, evicted)

    def draw(self, count: int, *key: int | str, balanced: bool = False) -> Ints:
        """See `Buffer.draw`; `balanced` is the user's business."""
        if not len(self):
            return NO_SLOTS
        rng = numpy_generator(self.seed, "own memory", "draw", *key)
        slots = self._slots("draw", self.own.draw(self._held(), min(count, len(self)), rng), 0)
        check(len(slots) <= count, self._name, f"draw({count}) gave {len(slots)} slots", "give at most so many")
        empty = slots[~self.used[slots]]
        check(not len(empty), self._name, f"draw() gave slot {empty[:1]}, which is empty", "give used slots", "see held.filled")
        return slots

    def _slots(self, method: str, answer: Any, low: int) -> Ints:
        """An answer as slots."""
        found = np.asarray(answer)
        integers = found.ndim == 1 and (found.size == 0 or np.issubdtype(found.dtype, np.integer))
        check(integers, self._name, f"{method}() gave {type(answer).__name__} of shape {found.shape}, {found.dtype}",
              "give slots, one-dimensional integers")
        odd = found[(found < low) | (found >= self.capacity)]
        check(not len(odd), self._name, f"{method}() gave slot {odd[:1]}", f"be in [{low}, {self.capacity})")
        return np.array(found, dtype=np.int64)  # a copy: it may be an array of the user's, or what only reads this memory

    def _attributes(self) -> dict[str, Any]:
        """What the user's object keeps."""
        kept = dict(vars(self.own)) if hasattr(self.own, "__dict__") else {}
        odd = [name for name, value in kept.items() if not isinstance(value, bool | int | float | np.ndarray)]
        check(not odd, self._name, f"attribute {odd[:1]}, which a checkpoint cannot hold", "be a number or a numpy array",
              "keep it in one, or follow it from what is held")
        return kept

    def state(self) -> State:
        """See `Buffer.state`; with the attributes of the user's object."""
        own = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in self._attributes().items()}
        return {**super().state(), **{f"{OWN}{name}": value for name, value in own.items()}}

    def _place(
        self, state: Mapping[str, np.ndarray | int], capacity: int, slots: Ints, ids: Ints, targets: Ints, positions: Ints,
        tasks: Ints,
    ) -> Ints:
        if capacity != self.capacity:
            raise CheckpointMismatch(f"{self._name}: capacity={self.capacity}, must be that of the saved memory, {capacity}")
        for name, value in state.items():
            if name.startswith(OWN):
                setattr(self.own, name.removeprefix(OWN), value)
        return slots
