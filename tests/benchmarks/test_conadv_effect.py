"""The effect benchmark of ConAdv runs on a few digits, goes on where it was cut, and computes its errors by the textbook."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from processes import ENVIRONMENT, ROOT

FOLDER = ROOT / "benchmarks" / "claims"
SHORT = ("--data", "digits", "--image-size", "8", "--samples", "200", "--epochs", "2", "--warmup-epochs", "1", "--batches", "32",
         "64", "--width", "8")


@pytest.fixture(scope="module")
def scripts() -> tuple[ModuleType, ModuleType]:
    found = []
    sys.path.insert(0, str(FOLDER))
    try:
        for name in ("conadv_report", "conadv"):
            spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
            assert spec is not None and spec.loader is not None
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found.append(module)
    finally:
        sys.path.remove(str(FOLDER))
    return found[1], found[0]


def run(folder: Path, *more: str) -> str:
    ended = subprocess.run([sys.executable, str(FOLDER / "conadv.py"), *SHORT, "--out", str(folder), *more], text=True,
                           timeout=300, capture_output=True, env={**os.environ, **ENVIRONMENT})
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on(tmp_path: Path) -> None:
    for package in ("sklearn", "timm", "matplotlib"):
        pytest.importorskip(package)
    first = run(tmp_path, "--arms", "lars", "conadv", "--seeds", "1", "--workers", "1")
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert "4 of 4 cells, 4 of them now" in first and len(lines) == 4
    order = [(r["seed"], r["batch"], r["arm"]) for r in map(json.loads, lines)]
    assert order == [(0, 32, "lars"), (0, 32, "conadv"), (0, 64, "lars"), (0, 64, "conadv")]
    assert "LARS + ConAdv, 32 -> 64: gap " in first and "one seed: no statement about spread" in first
    # Cut off inside the last line: that cell runs again, to the same bit; finished ones do not run.
    (tmp_path / "cells.jsonl").write_text("\n".join([*lines[:3], lines[3][:40]]))
    assert "4 of 4 cells, 1 of them now" in run(tmp_path, "--arms", "lars", "conadv", "--seeds", "1")
    again = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines() if line != lines[3][:40]]
    assert [r["accuracy"] for r in again] == [json.loads(line)["accuracy"] for line in lines]
    assert "4 of 8 cells, 0 of them now" in run(tmp_path, "--arms", "lars", "conadv", "--seeds", "2", "--budget-minutes", "0")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["batches"] == [32, 64] and result["versions"]["torch"] and (tmp_path / "conadv.png").stat().st_size > 0
    assert run(tmp_path, "--lr", "3", "--budget-minutes", "0") == "no cell is finished\n"  # other settings, other cells


@pytest.mark.slow
def test_every_arm_and_tuning(tmp_path: Path) -> None:
    for package in ("sklearn", "timm", "matplotlib"):
        pytest.importorskip(package)
    out = run(tmp_path, "--seeds", "2")
    assert "16 of 16 cells, 16 of them now" in out and out.count(" over 2 seeds: ") == 3
    assert "validation accuracy" in run(tmp_path, "--tune", "1", "2")


def rows(values: dict[tuple[str, int], list[float | None]]) -> list[dict[str, Any]]:
    return [{"arm": arm, "batch": batch, "seed": seed, "accuracy": accuracy}
            for (arm, batch), found in values.items() for seed, accuracy in enumerate(found)]


def test_gaps_by_the_textbook(scripts: tuple[ModuleType, ModuleType]) -> None:
    _, report = scripts
    found = report.analyse(rows({("lars", 1): [0.7, 0.72, 0.71], ("lars", 2): [0.6, 0.61, 0.62],
                                 ("conadv", 1): [0.7, 0.71, 0.7], ("conadv", 2): [0.66, 0.68, 0.65],
                                 ("sam", 1): [0.7, 0.7, 0.7], ("sam", 2): [0.6, None, None]}))
    plain = [0.10, 0.11, 0.09]
    assert found["gap"]["lars/2"]["mean"] == pytest.approx(0.1)
    assert found["gap"]["lars/2"]["error"] == pytest.approx((sum((x - 0.1) ** 2 for x in plain) / 2 / 3) ** 0.5)
    each = [0.06, 0.08, 0.04]  # 0.10 - 0.04, 0.11 - 0.03, 0.09 - 0.05
    shrink = found["shrinks"]["conadv/2"]
    assert shrink["mean"] == pytest.approx(0.06)
    assert shrink["error"] == pytest.approx((sum((x - 0.06) ** 2 for x in each) / 2 / 3) ** 0.5)
    assert report.sentence("conadv", 2, 1, shrink).endswith("over 3 seeds: the gap shrinks beyond 2 standard errors")
    none = report.sentence("sam", 2, 1, {"mean": -0.01, "error": 0.02, "seeds": 3})
    assert none.endswith("no difference beyond 2 standard errors")
    assert found["accuracy"]["sam/2"] == {"mean": 0.6, "error": None, "seeds": 1, "diverged": 2}
    assert any("(2 div.)" in line for line in report.report(found))


def test_chance_of_two_standard_errors(scripts: tuple[ModuleType, ModuleType]) -> None:
    _, report = scripts
    assert report.chance(3) == pytest.approx(1 - 2 / 6**0.5, abs=1e-5)  # two degrees of freedom: 1 - t / sqrt(2 + t^2)
    assert report.chance(2) == pytest.approx(1 - 2 / torch.pi * torch.atan(torch.tensor(2.0)).item(), abs=1e-5)


def test_crops_are_pieces_of_the_image(scripts: tuple[ModuleType, ModuleType]) -> None:
    script, _ = scripts
    x = torch.arange(1, 2 * 3 * 64 + 1, dtype=torch.float32).view(2, 3, 8, 8)
    many = script.crop_flip(x.repeat_interleave(64, 0), torch.Generator().manual_seed(0))
    wide = torch.nn.functional.pad(x, [1] * 4)
    allowed = {(i, f): {wide[i, :, a : a + 8, b : b + 8].flip([2] if f else []).flatten().numpy().tobytes()
                        for a in range(3) for b in range(3)} for i in range(2) for f in (False, True)}
    flips = set()
    for i, image in enumerate(many):
        key = image.flatten().numpy().tobytes()
        assert key in allowed[i // 64, False] | allowed[i // 64, True]
        flips.add(key in allowed[i // 64, True])
    assert flips == {False, True}
