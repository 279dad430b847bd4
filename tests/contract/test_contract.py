"""The contract suite: every method on every host, in real processes, one launch per world size.

Each test is one check of one case on one host, and reads what the launch found. `--wide` of the worker (marker `slow`) adds
the rest of the matrix.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("deepspeed") is None:  # looked up, not imported: only the processes started here need it
    pytest.skip("needs deepspeed", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

from cases import plan

from processes import end_launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(7500)]  # above all launches, which have limits of their own
HERE = Path(__file__).parent
LIB = HERE.parents[1] / "lib"
TIMEOUT_S = {1: 240, 2: 600, 3: 400}
"""Of a launch by world size; six times as much with `--wide`."""
Launch = Callable[[int, bool], dict[str, Any]]


def worker(world: int, wide: bool, out: Path, store: Path) -> dict[str, Any]:
    """Launch the worker on `world` processes; what it found, and its last words if it died."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--max-restarts", "0",
               "--master-addr", "127.0.0.1", "--master-port", str(port), str(HERE / "worker.py"), str(out), str(store)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(LIB),
                                "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command + ["--wide"] * wide, env=environment, stdout=subprocess.PIPE, start_new_session=True,
                               stderr=subprocess.STDOUT, text=True, errors="replace")
    try:
        printed, _ = process.communicate(timeout=TIMEOUT_S[world] * (6 if wide else 1))
        words = f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        printed, _ = end_launch(process)
        words = "timed out"
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    results[""] = "" if process.returncode == 0 else f"{words}\n{printed[-3000:]}"
    return results


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Results of a launch, which runs once. Two ranks come first: the others load what they saved."""
    folder, known = tmp_path_factory.mktemp("contract"), dict[tuple[int, bool], dict[str, Any]]()

    def get(world: int, wide: bool) -> dict[str, Any]:
        if (world, wide) not in known:
            if world != 2:
                get(2, wide)
            out = folder / f"{world}{'-wide' * wide}.json"
            known[world, wide] = worker(world, wide, out, folder / f"store{'-wide' * wide}")
        return known[world, wide]

    return get


def promised(world: int) -> list[Any]:
    """A test for each key; those that only the wide plan has are slow."""
    default = set(plan(world, wide=False).keys())
    wide = set(plan(world, wide=True).keys())
    ordered = [*plan(world, wide=False).keys(), *(k for k in plan(world, wide=True).keys() if k not in default)]
    assert default <= wide
    return [pytest.param(k, k not in default, id=k, marks=[pytest.mark.slow] if k not in default else []) for k in ordered]


def judge(results: dict[str, Any], key: str) -> None:
    found = results.get(key)
    if found is None:
        pytest.fail(f"{key}: the launch did not come so far; {results['']}", pytrace=False)
    if not found["passed"]:
        pytest.fail(f"{key}: error {found['error']:.3g}, tolerance {found['tolerance']:.3g}: {found['problem']}", pytrace=False)


@pytest.mark.parametrize(("key", "wide"), promised(2))
def test_two_ranks(launched: Launch, key: str, wide: bool) -> None:
    judge(launched(2, wide), key)


@pytest.mark.parametrize(("key", "wide"), promised(3))
def test_three_ranks(launched: Launch, key: str, wide: bool) -> None:
    judge(launched(3, wide), key)


@pytest.mark.parametrize(("key", "wide"), promised(1))
def test_one_rank(launched: Launch, key: str, wide: bool) -> None:
    judge(launched(1, wide), key)


@pytest.mark.parametrize("world", [2, 3, 1])
def test_a_launch_ends_well_and_does_what_it_promised(launched: Launch, world: int) -> None:
    results = launched(world, False)
    assert results[""] == ""
    assert set(results) - {""} == set(plan(world, wide=False).keys())
