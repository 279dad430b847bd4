"""The GPU check: its path without a GPU runs whole, and without one it says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from needs import needs
from processes import ENVIRONMENT, ROOT

needs("deepspeed", "timm")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def run(folder: Path, device: str, *options: str) -> subprocess.CompletedProcess[str]:
    """The script, in this interpreter's environment."""
    python = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    more = {"EVERBATCH_DEVICE": device, "EVERBATCH_CONTRACT_SECONDS": "4"}
    return subprocess.run(["bash", ROOT / "benchmarks" / "gpu.sh", folder, *options], text=True, timeout=280, capture_output=True,
                          env={**os.environ, **ENVIRONMENT, **python, **more})


@pytest.mark.rotated(2, 6)
def test_small_nets_on_a_cpu(tmp_path: Path) -> None:
    ended = run(tmp_path, "cpu", "--blocks", "2")
    assert ended.returncode == 0, ended.stderr[-3000:]
    result = json.loads((tmp_path / "gpu.json").read_text())
    checks = result["contract"]["checks"]
    assert {key.split("/")[0] for key in checks} == {"parity", "resume", "skipped", "absent"}
    assert all(outcome["passed"] for outcome in checks.values()) and result["contract"]["left out"]
    rows = {row["arm"]: row for row in result["rows"]}
    assert len(rows) == 9 and all(row["ratio"] > 0 for row in rows.values())
    assert rows["torch.optim.SGD"]["host_syncs"] == 0 and rows["SAM"]["host_syncs"] == 1  # is the gradient finite?
    assert (tmp_path / "table.txt").read_text() == ended.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.rotated(0, 6)
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    ended = run(tmp_path, "cuda")
    assert ended.returncode == 1 and "no GPU that torch can use; EVERBATCH_DEVICE=cpu tries" in ended.stderr
