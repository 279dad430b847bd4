"""Continual evaluation costs its forward passes and at most 5 % more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from processes import ENVIRONMENT, ROOT

SCRIPT = ROOT / "benchmarks" / "speed" / "evaluation.py"


@pytest.mark.slow
def test_an_evaluation_costs_its_forwards(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--rounds", "12", "--json", str(tmp_path / "out.json")]
    ended = subprocess.run(command, cwd=ROOT, timeout=280, text=True, capture_output=True, env={**os.environ, **ENVIRONMENT})
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())
    quiet = min(found["ratio"], found["least"])  # beside other tests a round also pays for the caches that they took
    assert quiet <= 1.05 and found["samples"] == 1000, found
