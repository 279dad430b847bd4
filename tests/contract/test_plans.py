"""The plans of the contract suite: what is loaded was saved, nothing waits longer than it may, and a round is a round."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cases import BY_CASE, CASES, FP32
from plans import CORE, FEW, HALVES, WIDE_TURNS, Plan, plan

WORLDS = (1, 2, 3)


def keys(made: Plan) -> set[str]:
    return {key for key, _ in made.keys()}


@pytest.mark.parametrize("world", WORLDS)
def test_a_cycle_of_rounds_is_everything(world: int) -> None:
    everything = plan(world)
    for wide in (False, True):
        rounds = [keys(everything.now(round, wide=wide)) for round in range(5 * WIDE_TURNS, 6 * WIDE_TURNS)]
        assert set().union(*rounds) == keys(everything.now(None, wide=wide))
        assert rounds[3] == keys(everything.now(5 * WIDE_TURNS + 3, wide=wide))
    assert keys(everything.now(None, wide=False)) | keys(everything.now(None, wide=True)) == keys(everything)


@pytest.mark.parametrize("world", WORLDS)
def test_every_case_that_is_planned_is_there(world: int) -> None:
    planned = {case for _, case, _ in plan(world).lives} | {case for *_, case, _ in plan(world).moves}
    assert planned <= set(BY_CASE), planned - set(BY_CASE)


@pytest.mark.parametrize("round", [None, *range(3 * WIDE_TURNS)])
def test_what_a_move_loads_was_saved_before(round: int | None) -> None:
    saved = dict(plan(2).now(round, wide=False).lives)
    for wide in (False, True):
        saved |= plan(2).now(round, wide=wide).lives
        for world in WORLDS:
            lacking = [m for m in plan(world).now(round, wide=wide).moves if (m[0], *m[2:]) not in saved]
            assert lacking == [], (world, wide)


@pytest.mark.parametrize("round", range(WIDE_TURNS))
def test_every_round_has_the_core_half_of_the_others_and_every_host(round: int) -> None:
    due = plan(2).now(round, wide=False)
    others = {c.name for c in CASES} - set(CORE)
    assert {case for _, case, _ in due.lives} >= set(CORE)
    assert len({case for _, case, _ in due.lives} & others) >= len(others) // 2
    assert {host for host, _, _ in due.lives} >= set(FP32) and len(set(due.hosts) & set(FEW)) == len(FEW) / HALVES
    core = [(host, case) for host, case, _ in due.lives if host in FEW and case in CORE]
    assert all(len({host for host, case in core if case == name}) >= len(FEW) / HALVES for name in CORE)
    assert all(len({case for host, case in core if host == name}) >= len(CORE) / HALVES for name in FEW)


@pytest.mark.parametrize("cycle", range(WIDE_TURNS))
def test_two_rounds_have_every_case_of_the_core_on_few(cycle: int) -> None:
    rounds = [plan(2).now(HALVES * cycle + turn, wide=False) for turn in range(HALVES)]
    lives = {(host, case) for due in rounds for host, case, _ in due.lives}
    assert lives >= set(itertools.product(FEW, CORE))
    assert {host for due in rounds for host in due.hosts} >= set(FEW)


def test_rounds_are_of_one_size() -> None:
    """So that none takes twice as long as another."""
    for world, wide in itertools.product(WORLDS, (False, True)):
        sizes = [len(keys(plan(world).now(round, wide=wide))) for round in range(WIDE_TURNS)]
        assert max(sizes) <= 1.3 * min(sizes) + 12, (world, wide, sizes)
