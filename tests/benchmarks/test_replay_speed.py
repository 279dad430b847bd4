"""The benchmark of rehearsal compares like with like, and runs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from processes import ENVIRONMENT, ROOT

SCRIPT = ROOT / "benchmarks" / "speed" / "replay.py"


@pytest.fixture(scope="module")
def arms() -> Any:
    """The benchmark's arms, its folder on the path while they are imported, as when it is run."""
    pytest.importorskip("torchvision")
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return importlib.import_module("replay_arms")
    finally:
        sys.path.remove(str(SCRIPT.parent))


def test_the_loop_by_hand_does_the_trainers_arithmetic(arms: Any) -> None:
    """Counted by operator, once both memories are full; constant rows in their place make it the same."""
    data = arms.stream(1, 40, 10)
    trainers = [arms.Driven(arms.trainer(cls, 8, 12, width=1), data) for cls in (arms.Learner, arms.InTime, arms.Enlarged)]
    counted = []
    for arm in (arms.ByHand(data, 8, 12, width=1), *trainers):
        for _ in range(3):
            arm()
        counted.append(arms.flops(arm))
    assert len(set(counted)) == 1 and counted[0] > 0


@pytest.mark.slow
def test_the_memory_keeps_its_limits(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "memory", "--rounds", "10", "--json", str(out)]
    ended = subprocess.run(command, cwd=ROOT, timeout=280, text=True, capture_output=True, env={**os.environ, **ENVIRONMENT})
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(out.read_text())["memory"]
    assert found["images"]["held"] == 50_000 and found["images"]["type"] == "torch.uint8"
    assert found["images"]["bytes_per_sample"] == 3 * 32 * 32 + 4 * 10
    times = {(row["memory"], row["slots"]): row for row in found["rows"]}
    for (kind, slots), row in times.items():
        base = times[kind, 5000]
        if slots == 50_000:  # ten times the memory; 0.1 ms of room for a machine that others use
            assert row["add_ms"] < 2 * base["add_ms"] + 0.1 and row["draw_ms"] < 2 * base["draw_ms"] + 0.1
