"""The benchmark of stale directions runs, reports what it says it reports, and computes its errors by the textbook."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from types import ModuleType

import pytest

from processes import ENVIRONMENT, ROOT

SCRIPT = ROOT / "benchmarks" / "claims" / "stale_sam.py"
SHORT = ("--seeds", "2", "--tuning-seeds", "1", "--rho", "0.02", "0.05", "--epochs", "1", "--batch", "128", "--width", "4")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stale_sam", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["stale_sam"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_short_run(tmp_path: os.PathLike[str]) -> None:
    pytest.importorskip("sklearn")
    path = os.path.join(tmp_path, "result.json")
    ended = subprocess.run([sys.executable, "-W", "error", str(SCRIPT), *SHORT, "--json", path], text=True, timeout=200,
                           capture_output=True, env={**os.environ, **ENVIRONMENT})
    assert ended.returncode == 0, ended.stderr[-3000:]
    with open(path) as file:
        result = json.load(file)
    methods = ["SGD", "SAM", "LookSAM k=5", "StaleSAM tau=1"]
    assert list(result["test_accuracy"]) == list(result["step_ms"]) == methods
    assert all(len(row) == 2 and all(0 <= a <= 1 for a in row) for row in result["test_accuracy"].values())
    passes = result["passes_per_step"]
    assert [passes[m] for m in methods] == [1.0, 2.0, 1.2, 1.0]  # 10 steps, two of them full
    assert all(ms > 0 for ms in result["step_ms"].values())
    assert set(result["chosen_rho"]) == set(result["validation"]) == set(methods[1:])
    for method, row in result["validation"].items():
        assert set(row) == {"0.02", "0.05"} and row[str(result["chosen_rho"][method])] == max(row.values())
    assert set(result["differences"]) == {f"{a} minus SGD" for a in methods[1:]} | {f"{a} minus SAM" for a in methods[2:]}
    assert result["seeds"] == [0, 1] and result["versions"]["torch"] and result["training_samples"] == 1347
    assert "never on the test samples" in ended.stdout and ended.stdout.count("standard error ") == 5


def test_differences_by_the_textbook(script: ModuleType) -> None:
    found = script.difference([0.70, 0.72, 0.69, 0.75], [0.69, 0.70, 0.70, 0.71])
    each = [0.01, 0.02, -0.01, 0.04]
    std = (sum((d - 0.015) ** 2 for d in each) / 3) ** 0.5
    assert found.mean == pytest.approx(0.015) and found.std == pytest.approx(std) and found.error == pytest.approx(std / 2)
    assert found.verdict() == "+1.50 points, standard error 1.04 over 4 seeds: no difference beyond 2 standard errors"
    assert script.difference([0.8, 0.81], [0.7, 0.7]).verdict().endswith("2 seeds: beyond 2 standard errors")
    assert "no statement" in script.difference([0.7], [0.6]).verdict()
    with pytest.raises(ValueError):
        script.difference([0.7, 0.8], [0.6])
