"""A memory of the user's own: what it is asked, and what it may answer."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from everbatch.data.own_memory import OwnMemory
from everbatch.errors import CheckpointMismatch
from everbatch.train import Replay
from learning import Newest


class Told:
    """Answers what it is told to."""

    def __init__(self, slots: Any = None, drawn: Any = None) -> None:
        type(self).slots, type(self).drawn = slots, drawn

    def add(self, held: Any, offered: Any, rng: Any) -> Any:
        return type(self).slots  # type: ignore[attr-defined]

    def draw(self, held: Any, count: int, rng: Any) -> Any:
        return type(self).drawn  # type: ignore[attr-defined]


def offer(memory: OwnMemory, first: int, count: int = 4) -> Any:
    ids = np.arange(first, first + count)
    return memory.add(100 + ids, ids % 6, ids, 0)


def test_slots_and_what_goes_for_them() -> None:
    memory = OwnMemory(functools.partial(Told, [2, -1, 0, 2], [0]), 3)
    assert len(memory.draw(2, "replay", 0)) == 0
    first, again = offer(memory, 0), offer(memory, 4)
    assert first.rows.tolist() == [2, 3] and first.slots.tolist() == [0, 2] and first.evicted.tolist() == []
    assert again.evicted.tolist() == [0, 2] and memory.ids.tolist() == [106, -1, 107]
    assert memory.draw(2, "replay", 0).tolist() == [0]


def test_a_draw_is_a_function_of_content_seed_and_step() -> None:
    one, other = OwnMemory(Newest, 8, seed=3), OwnMemory(Newest, 8, seed=3)
    for memory in (one, other):
        for first in range(0, 12, 4):
            offer(memory, first)
    draws = [memory.draw(5, "replay", step).tolist() for step in range(6) for memory in (one, other)]
    assert draws[::2] == draws[1::2] and len({tuple(d) for d in draws}) > 3
    assert sorted(one.positions.tolist()) == list(range(4, 12))

    third = OwnMemory(Newest, 8, seed=3)
    assert third.load(one.state()).tolist() == list(range(8))
    assert third.own.offers == 3 and third.own.met.tolist() == one.own.met.tolist()  # type: ignore[attr-defined]
    assert third.draw(5, "replay", 1).tolist() == draws[2]
    with pytest.raises(CheckpointMismatch, match="Newest: capacity=9, must be that of the saved memory, 8"):
        OwnMemory(Newest, 9, seed=3).load(one.state())
    with pytest.raises(CheckpointMismatch, match="of another kind"):
        OwnMemory(Told, 8, seed=3).load(one.state())


@pytest.mark.parametrize(("slots", "drawn", "said"), [
    ([0, 1, 2], [0], r"Told: add\(\) of 4 samples gave \(3,\) slots, must give one for each"),
    ([0, 1, 2, 3], [0], r"Told: add\(\) gave slot \[3\], must be in \[-1, 3\)"),
    ([0.0, 1.0, 2.0, 0.0], [0], r"Told: add\(\) gave list of shape \(4,\), float64, must give slots"),
    (None, [0], r"Told: add\(\) gave NoneType"),
    ([0, 0, 0, 0], [1], r"Told: draw\(\) gave slot \[1\], which is empty, must give used slots"),
    ([0, 0, 0, 0], [-1], r"Told: draw\(\) gave slot \[-1\], must be in \[0, 3\)"),
    ([0, 0, 0, 0], [0, 0], r"Told: draw\(1\) gave 2 slots, must give at most so many"),
])
def test_answers_that_are_none(slots: Any, drawn: Any, said: str) -> None:
    memory = OwnMemory(functools.partial(Told, slots, drawn), 3)
    with pytest.raises(ValueError, match=said):
        offer(memory, 0)
        memory.draw(1, "replay", 0)


class Writing(Newest):
    """Changes in place what it is shown."""

    where = ""

    def add(self, held: Any, offered: Any, rng: Any) -> Any:
        whose, _, name = self.where.partition(".")
        if name:
            rng.shuffle(getattr({"held": held, "offered": offered}[whose], name))
        return super().add(held, offered, rng)

    def draw(self, held: Any, count: int, rng: Any) -> Any:
        assert not any(getattr(held, name).flags.writeable for name in ("used", "ids", "targets", "positions", "tasks"))
        return held.filled[:count]


@pytest.mark.parametrize("where", [*(f"offered.{n}" for n in ("ids", "targets", "positions")),
                                   *(f"held.{n}" for n in ("used", "ids", "targets", "positions", "tasks"))])
def test_what_a_memory_is_shown_cannot_be_written(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = OwnMemory(Writing, 8, seed=3)
    for first in (0, 4):
        offer(memory, first)
    assert memory.draw(3, "replay", 0).tolist() == [0, 1, 2]
    before = memory.state()
    monkeypatch.setattr(Writing, "where", where)
    given = [np.arange(3) for _ in range(3)]
    with pytest.raises(ValueError, match="read-only"):
        memory.add(*given, 0)
    assert all(values.tolist() == [0, 1, 2] and values.flags.writeable for values in given)
    assert all(np.array_equal(memory.state()[name], value) for name, value in before.items() if not name.startswith("own_"))


class Keeping(Newest):
    """Holds on to what it was shown, and answers with it."""

    def __init__(self) -> None:
        super().__init__()
        self.last = np.zeros(0, dtype=np.int64)

    def add(self, held: Any, offered: Any, rng: Any) -> Any:
        self.last = offered.targets
        return offered.targets

    def draw(self, held: Any, count: int, rng: Any) -> Any:
        return held.targets[held.used]


def test_what_goes_on_from_there_can_be_written() -> None:
    memory = OwnMemory(Keeping, 8)
    kept = memory.add(*([np.arange(3)] * 3), 0)
    drawn, saved = memory.draw(3, "replay", 0), memory.state()
    for values in (kept.rows, kept.slots, drawn, saved["own_last"]):
        assert isinstance(values, np.ndarray) and values.flags.writeable and values.tolist() == [0, 1, 2]


class Listing(Newest):
    """Keeps what a checkpoint cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []


class Lacking:
    """Has no draw."""

    def add(self, held: Any, offered: Any, rng: Any) -> Any: ...


def test_what_cannot_be_saved_or_asked_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Listing: attribute \['names'\], which a checkpoint cannot hold"):
        offer(OwnMemory(Listing, 3), 0)
    with pytest.raises(ValueError, match=r"Replay: memory=.*Lacking.* without draw\(\), must have add"):
        Replay.Config(memory=Lacking)  # type: ignore[arg-type]
    for wrong in (Newest(), lambda: Newest(), 3):
        with pytest.raises(ValueError, match="Replay: memory=.*must be one of the names, or a class"):
            Replay.Config(memory=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Replay: memory='rang', must be reservoir, class_balanced or ring"):
        Replay.Config(memory="rang")  # type: ignore[arg-type]
