"""The contract suite: every method on every host, in real processes, one launch per world size.

Each test is one check of one case on one host, and reads what the launch found. What runs in which round, and what only with
the marker `slow`, is in `plans.py`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("deepspeed") is None:  # looked up, not imported: only the processes started here need it
    pytest.skip("needs deepspeed", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

from plans import plan

from processes import WORKER, Zygote
from rotation import ROUND

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(7500)]  # above all launches, which have limits of their own
JOBS = Path(__file__).parent / "matrix.py"
TIMEOUT_S = {1: 240, 2: 600, 3: 400}
"""Of a launch by world size; six times as much with `--wide`."""
Launch = Callable[[int, bool], dict[str, Any]]


@pytest.fixture(scope="session")
def launched(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Results of a launch, which runs once. Two ranks come first, and of them the default plan: the others load what they
    saved."""
    folder, known = tmp_path_factory.mktemp("contract"), dict[tuple[int, bool], dict[str, Any]]()

    def launch(world: int, wide: bool) -> dict[str, Any]:
        out = folder / f"{world}{'-wide' * wide}.json"
        round = "all" if ROUND is None else str(ROUND)
        words = [str(JOBS), str(out), str(folder / "store"), "--round", round, *["--wide"] * wide]
        try:
            job = zygote.run(WORKER, *words, ranks=world, limit=TIMEOUT_S[world] * (6 if wide else 1))
            last = "" if not any(job.codes) else f"exit codes {job.codes}\n{job.err[-3000:]}"
        except AssertionError as hung:
            last = str(hung)[-3000:]
        results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        return results | {"": last}

    def get(world: int, wide: bool) -> dict[str, Any]:
        if (world, wide) not in known:
            for before in ((2, False), (2, wide)):
                if world != 2 or before < (world, wide):
                    get(*before)
            known[world, wide] = launch(world, wide)
        return known[world, wide]

    return get


RANKS = {"test_two_ranks": 2, "test_three_ranks": 3, "test_one_rank": 1}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each key. Those that only the wide plan has are slow, ten times as many as the others, and where nothing slow
    is wanted their names alone are told to the rotation."""
    name = metafunc.definition.name
    if name not in RANKS:
        return
    keys = list(plan(RANKS[name]).keys())
    if metafunc.config.option.markexpr.startswith("not slow"):
        rotation = metafunc.config.pluginmanager.get_plugin("everbatch rotation")
        rotation.coverage.known.update(f"{metafunc.definition.nodeid}[{key}]" for key, when in keys if when.slow)
        keys = [(key, when) for key, when in keys if not when.slow]
    metafunc.parametrize(("key", "wide"), [when.param(key, when.slow, id=key) for key, when in keys])


def judge(results: dict[str, Any], key: str) -> None:
    found = results.get(key)
    if found is None:
        pytest.fail(f"{key}: the launch did not come so far; {results['']}", pytrace=False)
    if not found["passed"]:
        pytest.fail(f"{key}: error {found['error']:.3g}, tolerance {found['tolerance']:.3g}: {found['problem']}", pytrace=False)


def test_two_ranks(launched: Launch, key: str, wide: bool) -> None:
    judge(launched(2, wide), key)


def test_three_ranks(launched: Launch, key: str, wide: bool) -> None:
    judge(launched(3, wide), key)


def test_one_rank(launched: Launch, key: str, wide: bool) -> None:
    judge(launched(1, wide), key)


@pytest.mark.parametrize("world", [2, 3, 1])
def test_a_launch_ends_well_and_does_what_it_promised(launched: Launch, world: int) -> None:
    results = launched(world, False)
    assert results[""] == ""
    assert set(results) - {""} == {key for key, _ in plan(world).now(ROUND, wide=False).keys()}
