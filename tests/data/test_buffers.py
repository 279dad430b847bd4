"""Memories against the reference implementations, and their promises: order, batch size and restarts change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from everbatch.data import (
    Buffer,
    ClassBalanced,
    Reservoir,
    Ring,
    balancoir_index,
    group_quotas,
    largest,
    reservoir_index,
    ring_index,
    share,
)
from everbatch.errors import CheckpointMismatch

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "buffers.npz")


class Recorded:
    """The integers that the reference drew, handed out one by one."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.used = values, 0

    def __call__(self, bound: int) -> int:
        value = int(self.values[self.used])
        assert value < bound
        self.used += 1
        return value


@pytest.mark.parametrize("case", ["0", "1", "2", "3"])
def test_reservoir_index_is_mammoths(case: str) -> None:
    capacity, n = int(GOLDEN[f"reservoir/{case}/buffer_size"]), int(GOLDEN[f"reservoir/{case}/n_stream"])
    legacy = np.random.RandomState(int(GOLDEN[f"reservoir/{case}/numpy_seed"]))
    draws = Recorded(GOLDEN[f"reservoir/{case}/randint_draws"])
    content = np.full(capacity, -1)
    index = [reservoir_index(seen, capacity, draws) for seen in range(n)]
    for item, slot in enumerate(index):
        if slot >= 0:
            content[slot] = item
    np.testing.assert_array_equal(index, GOLDEN[f"reservoir/{case}/index"])
    np.testing.assert_array_equal(content, GOLDEN[f"reservoir/{case}/content_stream_ids"])
    assert draws.used == len(draws.values)
    assert index == [reservoir_index(seen, capacity, lambda n: legacy.randint(0, n)) for seen in range(n)]


def test_ring_index_is_mammoths() -> None:
    portion = int(GOLDEN["ring/portion"])
    want = GOLDEN["ring/index"]
    got = [ring_index(np.arange(want.shape[1]), portion, task) for task in range(len(want))]
    np.testing.assert_array_equal(got, want)


def test_balancoir_index_is_mammoths() -> None:
    capacity, draws = int(GOLDEN["balancoir/buffer_size"]), Recorded(GOLDEN["balancoir/randint_draws"])
    content, index = np.full(capacity, -1), []
    for seen, label in enumerate(GOLDEN["balancoir/labels"].tolist()):
        index.append(balancoir_index(seen, label, content, capacity, draws))
        if index[-1] >= 0:
            content[index[-1]] = label
    np.testing.assert_array_equal(index, GOLDEN["balancoir/index"])
    np.testing.assert_array_equal(content, GOLDEN["balancoir/final_labels"])
    assert draws.used == len(draws.values)


def test_quotas_are_avalanches() -> None:
    for size, groups, want in zip(GOLDEN["quota/max_size"], GOLDEN["quota/groups"], GOLDEN["quota/lengths_padded"],
                                  strict=True):
        np.testing.assert_array_equal(group_quotas(int(size), int(groups)), want[want >= 0])
    for size in range(13):
        for groups in range(1, 15):
            assert (group_quotas(size, groups + 1)[:groups] <= group_quotas(size, groups)).all()


def test_largest_keys_are_avalanches_reservoir() -> None:
    ids, keys = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    for chunk in range(3):
        ids = np.r_[ids, GOLDEN[f"priority_reservoir/chunk{chunk}/ids"]]
        keys = np.r_[keys, GOLDEN[f"priority_reservoir/chunk{chunk}/weights_drawn"]]
        keep = largest(keys, 6)
        ids, keys = ids[keep], keys[keep]
        np.testing.assert_array_equal(ids, GOLDEN[f"priority_reservoir/chunk{chunk}/content"])
        np.testing.assert_array_equal(keys, GOLDEN[f"priority_reservoir/chunk{chunk}/content_weights"])
    np.testing.assert_array_equal(ids[largest(keys, 3)], GOLDEN["priority_reservoir/after_resize3"])


def test_share_covers_everything_evenly() -> None:
    for count in range(9):
        for parts in range(1, 5):
            sizes = np.diff(share(count, parts))
            assert sizes.sum() == count and sizes.max() - sizes.min() <= 1


MAKE: dict[str, Callable[[int], Buffer]] = {
    "stream": lambda n: Reservoir(n, seed=3),
    "sample": lambda n: Reservoir(n, seed=3, key="sample"),
    "class": lambda n: ClassBalanced(n, seed=3),
    "class_sample": lambda n: ClassBalanced(n, seed=3, key="sample"),
    "task": lambda n: ClassBalanced(n, seed=3, by="task"),
    "fixed": lambda n: ClassBalanced(n, seed=3, total=6),
    "ring": lambda n: Ring(n, tasks=3, seed=3),
}


def visits(epochs: int = 2) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """Three tasks of 24 samples, 2 classes each, met `epochs` times: (ids, targets, positions, task)."""
    found, position = [], 0
    for task in range(3):
        ids = np.arange(24) + 24 * task
        for epoch in range(epochs):
            order = np.random.default_rng([task, epoch]).permutation(ids)
            found.append((order, 2 * task + order % 2, position + np.arange(24), task))
            position += 24
    return found


def feed(buffer: Buffer, batch: int, part: slice = slice(None), epochs: int = 2) -> Buffer:
    for ids, targets, positions, task in visits(epochs)[part]:
        for start in range(0, 24, batch):
            rows = slice(start, start + batch)
            buffer.add(ids[rows], targets[rows], positions[rows], task)
    return buffer


def content(buffer: Buffer) -> set[tuple[int, ...]]:
    filled = buffer.filled
    return set(zip(*(getattr(buffer, name)[filled].tolist() for name in ("ids", "targets", "positions", "tasks")),
                   strict=True))


@pytest.mark.parametrize("kind", MAKE)
def test_batch_size_does_not_matter(kind: str) -> None:
    results = [content(feed(MAKE[kind](10), batch)) for batch in (1, 4, 24)]
    assert results[0] == results[1] == results[2] and len(results[0]) in (6, 9, 10)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("capacity", [3, 10, 500])
def test_slots_tell_everything_that_happened(kind: str, capacity: int) -> None:
    """A reader of the `Slots` alone, as the store is, ends with the payload the memory has."""
    buffer = MAKE[kind](capacity)
    mirror: dict[int, tuple[int, int]] = {}
    for ids, targets, positions, task in visits():
        for start in range(0, 24, 8):
            rows = slice(start, start + 8)
            kept = buffer.add(ids[rows], targets[rows], positions[rows], task)
            assert (np.diff(kept.rows) > 0).all() and len(np.unique(kept.slots)) == len(kept.slots)
            for slot in kept.evicted.tolist():
                del mirror[slot]
            for row, slot in zip(kept.rows.tolist(), kept.slots.tolist(), strict=True):
                mirror[slot] = (int(ids[rows][row]), int(positions[rows][row]))
            want = {s: (int(buffer.ids[s]), int(buffer.positions[s])) for s in buffer.filled.tolist()}
            assert mirror == want and len(buffer) <= capacity


def test_reservoir_keeps_the_largest_keys_of_all_visits() -> None:
    from everbatch.seeds import uniform_keys

    buffer = feed(Reservoir(10, seed=3), 8)
    best = largest(uniform_keys(np.arange(144), 3, "buffer"), 10)
    assert sorted(buffer.positions.tolist()) == sorted(best.tolist())


def test_sample_keys_keep_a_sample_once_and_fresh() -> None:
    once, twice = (feed(Reservoir(30, seed=3, key="sample"), 8, epochs=n) for n in (1, 2))
    assert sorted(once.ids.tolist()) == sorted(twice.ids.tolist())
    last = {int(i): int(p) for ids, _, positions, _ in visits() for i, p in zip(ids, positions, strict=True)}
    assert all(last[i] == p for i, p in zip(twice.ids.tolist(), twice.positions.tolist(), strict=True))
    assert len(np.unique(feed(Reservoir(100, seed=3), 8).ids)) < 100  # "stream" holds some twice


def test_class_balance_and_task_balance() -> None:
    buffer = feed(ClassBalanced(10, seed=3), 8)
    order = buffer.seen
    assert [int((buffer.targets == c).sum()) for c in order] == group_quotas(10, 6).tolist()
    assert buffer.quotas() == dict(zip(order, [2, 2, 2, 2, 1, 1], strict=True))
    by_task = feed(ClassBalanced(10, seed=3, by="task"), 8)
    assert np.bincount(by_task.tasks).tolist() == [4, 3, 3]
    fixed = feed(ClassBalanced(13, seed=3, total=6), 8)
    assert np.bincount(fixed.targets[fixed.filled]).tolist() == [2] * 6
    with pytest.raises(ValueError, match="6 groups seen and total=5|5 groups seen|6 groups"):
        feed(ClassBalanced(13, seed=3, total=5), 8)


def test_ring_keeps_the_last_of_each_task() -> None:
    buffer = feed(Ring(11, tasks=3), 8)
    assert buffer.filled.tolist() == list(range(9))
    for task in range(3):
        assert sorted(buffer.positions[buffer.tasks == task].tolist()) == [48 * task + i for i in (45, 46, 47)]
    with pytest.raises(ValueError, match="task=3"):
        buffer.add([0], [0], [0], 3)


@pytest.mark.parametrize("kind", MAKE)
def test_a_restart_changes_nothing(kind: str) -> None:
    whole = feed(MAKE[kind](10), 8)
    half = feed(MAKE[kind](10), 8, slice(0, 3))
    state = half.state()
    assert all(isinstance(value, (int, np.ndarray)) for value in state.values())
    resumed = MAKE[kind](10)
    moved = resumed.load(state)
    np.testing.assert_array_equal(moved, half.filled)
    feed(resumed, 8, slice(3, None))
    for name in ("used", "ids", "targets", "positions", "tasks"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
    np.testing.assert_array_equal(resumed.draw(5, "x", 1), whole.draw(5, "x", 1))


@pytest.mark.parametrize("kind", [kind for kind in MAKE if kind != "ring"])
@pytest.mark.parametrize("capacity", [0, 4, 30])
def test_another_capacity_truncates_by_key_or_leaves_room(kind: str, capacity: int) -> None:
    saved = feed(MAKE[kind](10), 8).state()
    other = MAKE[kind](capacity)
    moved = other.load(saved)
    kept = moved >= 0
    np.testing.assert_array_equal(other.ids[moved[kept]], saved["ids"][kept])
    assert len(other) == kept.sum()
    if capacity >= 10:
        assert kept.all()
    else:
        assert content(other) == content(feed(MAKE[kind](capacity), 8))


def test_foreign_states_are_refused() -> None:
    state = feed(Reservoir(10, seed=3), 8).state()
    for other in (ClassBalanced(10, seed=3), Reservoir(10, seed=3, key="sample"), Ring(10, tasks=3)):
        with pytest.raises(CheckpointMismatch, match="another kind"):
            other.load(state)
    with pytest.raises(CheckpointMismatch, match="seed=4"):
        Reservoir(10, seed=4).load(state)
    with pytest.raises(CheckpointMismatch, match="capacity=12"):
        Ring(12, tasks=3, seed=3).load(feed(MAKE["ring"](9), 8).state())


def test_draws() -> None:
    buffer = feed(Reservoir(20, seed=3), 8)
    before = torch.get_rng_state()
    drawn = buffer.draw(7, "replay", 5)
    assert len(np.unique(drawn)) == 7 and buffer.used[drawn].all()
    np.testing.assert_array_equal(drawn, buffer.draw(7, "replay", 5))
    assert not np.array_equal(drawn, buffer.draw(7, "replay", 6))
    assert not np.array_equal(drawn, buffer.draw(7, "other", 5))
    assert sorted(buffer.draw(99, 0).tolist()) == list(range(20))
    assert len(Reservoir(20).draw(3, 0)) == 0
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="draw of 0"):
        buffer.draw(0, 1)


def test_balanced_draws_take_classes_in_turn() -> None:
    buffer = Reservoir(30, seed=0)
    targets = np.asarray([0] * 20 + [1] * 6 + [2] * 2)
    buffer.add(np.arange(28), targets, np.arange(28), 0)
    counts = np.bincount(targets[buffer.ids[buffer.draw(9, 1, balanced=True)]], minlength=3)
    assert counts[2] == 2 and sorted(counts[:2].tolist()) == [3, 4]
    assert len(np.unique(buffer.draw(28, 1, balanced=True))) == 28
    first = {int(targets[buffer.ids[buffer.draw(1, step, balanced=True)]][0]) for step in range(40)}
    assert first == {0, 1, 2}


def test_no_capacity_is_no_replay_and_bad_options_are_named() -> None:
    nothing = feed(Reservoir(0), 8)
    assert len(nothing) == 0 and len(nothing.draw(3, 0)) == 0
    assert len(feed(Ring(0, tasks=3), 8)) == len(feed(ClassBalanced(0), 8)) == 0
    for make, text in (
        (lambda: Reservoir(-1), "capacity=-1"), (lambda: Reservoir(1.5), "capacity=1.5"),
        (lambda: Reservoir(1, key="id"), "key='id'"), (lambda: ClassBalanced(1, by="domain"), "by='domain'"),
        (lambda: ClassBalanced(1, total=0), "total=0"), (lambda: Ring(2, tasks=3), "capacity=2 for 3 tasks"),
        (lambda: Reservoir(2).add([1, 2], [0], [0, 1], 0), r"shapes \(2,\), \(1,\)"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
