"""The rotation: nothing waits longer than its turns, a round repeats itself, and the file says what ran when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rotation
from processes import ROOT
from rotation import When


@pytest.mark.parametrize("turns", [2, 3, 4, 8])
def test_every_turn_comes_once_in_a_cycle(turns: int) -> None:
    for cycle in range(20):
        assert sorted(rotation.turn(turns * cycle + i, turns) for i in range(turns)) == list(range(turns))
    assert len({tuple(rotation.turn(turns * cycle + i, turns) for i in range(turns)) for cycle in range(20)}) > 1


@pytest.mark.parametrize("stride", [2, 4, 5, 7, 8])
def test_whoever_runs_every_few_rounds_meets_every_turn_too(stride: int) -> None:
    for turns in (4, 8):
        assert {rotation.turn(stride * i, turns) for i in range(10 * turns)} == set(range(turns))


def test_a_round_is_the_same_wherever_it_runs() -> None:
    code = "import rotation; print([rotation.due(p, t) for t in (2, 4, 8) for p in range(16)])"
    told = [subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT / "tests", timeout=60, env={
        **os.environ, rotation.VARIABLE: "57", "PYTHONHASHSEED": seed}) for seed in ("1", "2")]
    assert told[0] == told[1] == f"{[rotation.due(p, t, 57) for t in (2, 4, 8) for p in range(16)]}\n"


def test_all_means_all_and_anything_else_is_refused() -> None:
    assert rotation.parse_round("all") is None and rotation.parse_round("12") == 12
    assert all(rotation.due(place, 8, None) for place in range(8))
    assert rotation.parse_round("") == rotation.parse_round(None) == rotation.default_round() >= 0
    with pytest.raises(pytest.UsageError, match="EVERBATCH_ROUND='-1', must be a whole number or all"):
        rotation.parse_round("-1")


def test_files_that_have_none_of_what_is_wanted_are_not_read_and_not_forgotten(tmp_path: Path) -> None:
    several, wanted = ROOT / "tests" / "distributed" / "test_runs.py", "not slow and distributed"
    assert not rotation.unread(several, wanted) and not rotation.unread(ROOT / "tests" / "conftest.py", wanted)
    one = ROOT / "tests" / "test_seeds.py"
    assert rotation.unread(one, wanted) and not rotation.unread(one, "not slow and not distributed")
    file = tmp_path / "rotation.json"
    names = [f"tests/{path}::test[0]" for path in ("test_seeds.py", "distributed/test_runs.py", "test_gone.py")]
    file.write_text(json.dumps(dict.fromkeys(names)))
    coverage = rotation.Coverage(file, prune=True, wanted=wanted)
    coverage.known.add("tests/distributed/test_runs.py::test[1]")
    coverage.write()
    assert list(json.loads(file.read_text())) == ["tests/distributed/test_runs.py::test[1]", names[0]]


TESTS = """
import pytest
from rotation import When

@pytest.mark.parametrize("place", [When(i, 4).param(i) for i in range(8)])
def test_one_of_four(place):
    assert place < 4

def test_always():
    pass
"""
CONFTEST = """
from rotation import Rotation

def pytest_configure(config):
    config.addinivalue_line("markers", "rotated(place, turns): as in this suite")
    config.pluginmanager.register(Rotation(config))
"""


def run(folder: Path, told: str, *words: str) -> tuple[str, dict[str, Any]]:
    """What a run of TESTS prints, and the file it leaves."""
    (folder / "test_them.py").write_text(TESTS)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\ntestpaths = .\n")
    ended = subprocess.run([sys.executable, "-m", "pytest", *words], text=True, timeout=100, capture_output=True, cwd=folder,
                           env={**os.environ, rotation.VARIABLE: told, "PYTHONPATH": str(ROOT / "tests")})
    file = folder / ".pytest_cache" / "d" / "everbatch" / "rotation.json"
    return ended.stdout, json.loads(file.read_text()) if file.exists() else {}


@pytest.mark.parametrize(
    "words", [When(0, 3).param([], id="alone"), When(1, 3).param(["-n", "2"], id="beside")])
def test_a_run_says_its_round_and_what_ran_when(tmp_path: Path, words: list[str]) -> None:
    (place,) = (p for p in range(4) if rotation.due(p, 4, 6))
    out, kept = run(tmp_path, "6", *words)
    assert "rotation: round 6 (" in out and "2 of 8 rotated tests ran, 6 never did so far" in out
    assert "1 failed, 2 passed" in out and str(tmp_path / ".pytest_cache") in out
    names = [f"test_them.py::test_one_of_four[{i}]" for i in range(8)]
    assert list(kept) == names and {n for n in names if kept[n]} == {names[place], names[place + 4]}
    assert kept[names[place]]["round"] == 6 and kept[names[place]]["when"][:2] == "20"
    assert [kept[names[i]]["outcome"] for i in (place, place + 4)] == ["passed", "failed"]
    assert run(tmp_path, "6", "--collect-only")[1] == kept


@pytest.mark.rotated(2, 3)
def test_every_turn_fills_the_file_and_a_test_that_went_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / ".pytest_cache" / "d" / "everbatch" / "rotation.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"test_them.py::test_that_went": None}))
    for part in (["test_them.py"], ["-n", "2", "--ignore", "elsewhere"]):  # a part of the suite knows no better
        assert "test_them.py::test_that_went" in run(tmp_path, "all", *part)[1]
    out, kept = run(tmp_path, "all")
    assert "rotation: round all (" in out and "8 of 8 rotated tests ran, 0 never did" in out
    assert len(kept) == 8 and all(last["round"] == "all" for last in kept.values())
