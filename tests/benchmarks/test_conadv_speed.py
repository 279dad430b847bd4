"""The benchmark of ConAdv's placements runs, counts what it says it counts, and its counts are those of the cost model."""

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

SCRIPT = ROOT / "benchmarks" / "speed" / "conadv.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    # Under a name of its own, with the folder of `timing` on the path, as when the script is run.
    spec = importlib.util.spec_from_file_location("conadv_speed", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["conadv_speed"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str, path: Path) -> tuple[dict[str, Any], str]:
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), "--tiny", "--blocks", "2", "--steps", "2", "--json", str(path), *arguments],
        text=True, timeout=300, capture_output=True, env={**os.environ, **ENVIRONMENT})
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(path.read_text()), ended.stdout


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("arm", ["sequential", "inline"])
def test_flops_are_those_of_the_cost_model(script: ModuleType, arm: str, steps: int) -> None:
    net = script.Net(lambda: script.conv_net(width=8), 2)
    counted = {}
    for name, options in (("vanilla", {}), ("mixed", {}), (arm, {"steps": steps})):
        t = script.learner(name, net, **options)
        t.training_step()  # fills the pipeline
        counted[name] = script.flops(t.training_step)
        assert (counted[name], 0) == script.expected_flops(t.model, t.ring[0].inputs, name, steps)
    assert counted["mixed"] == 2 * counted["vanilla"]
    assert counted[arm] / counted["vanilla"] == pytest.approx((6 + 2 * steps) / 3, rel=0.02)
    exact = torch.nn.Linear(4, 3)
    assert script.flops(lambda: exact(torch.zeros(2, 4))) == 2 * 2 * 4 * 3


def test_the_nets_that_are_measured_keep_to_the_model_within_a_percent(script: ModuleType) -> None:
    pytest.importorskip("timm")
    for net in script.nets().values():
        model, x = net.build(), torch.zeros(1, 3, net.side, net.side)
        plain, crafted = (sum(script.expected_flops(model, x, arm)) for arm in ("vanilla", "process"))
        assert crafted / plain == pytest.approx(8 / 3, rel=0.01)


def test_bytes_of_a_fleet(script: ModuleType) -> None:
    assert script.bytes_per_step("process", 100, 2, 12, 4) == (100 + 2 * 12 * 4 + 16, 24)
    assert script.bytes_per_step("ranks", 128, 2, 12, 4) == (64 + 128 + 128 + 64, 64 + 64)
    sizes = script.fleet(trainers=5, adversaries=2, weights=1000, batch=1, elements=10)
    assert sizes["total"] == 5 * (3 * 64 + 2 * 64) + 2 * 1000
    assert sizes["into an adversary of 3 trainers"] == 3 * 192 + 1000 and sizes["out of an adversary of 3 trainers"] == 3 * 128


def test_verdicts_name_a_disagreement(script: ModuleType) -> None:
    rows = [{"arm": arm, "seconds_min": least, "seconds_median": middle} for arm, least, middle in (
        ("vanilla", 1.0, 1.0), ("mixed", 2.0, 2.0), ("process", 2.0, 2.2), ("sequential", 3.0, 3.0))]
    assert {arm: v["verdict"] for arm, v in script.verdicts(rows).items()} == {
        "mixed": "met", "process": "undecided", "sequential": "MISSED"}


def test_overlap(script: ModuleType) -> None:
    assert script.overlap([(7, 0.0, 10.0), (7, 12.0, 20.0), (9, 8.0, 14.0)]) == pytest.approx(4.0 / 6.0)
    assert script.overlap([(7, 0.0, 10.0), (9, 10.0, 12.0)]) == 0.0
    assert script.overlap([(7, 0.0, 10.0)]) is None and script.overlap([]) is None


def test_stream_on_a_cpu_is_inline(tmp_path: Path) -> None:
    result, out = run("--device", "cpu", path=tmp_path / "result.json")
    assert set(result["stream"]) == {"2", "4"}
    for part in result["stream"].values():
        assert part["odd"] == [] and part["overlap"] is None and [row["arm"] for row in part["rows"]][-1] == "stream"
    assert out.count("no kernels to see without CUDA; 0 tensors differ from inline") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_without_cuda_it_says_so() -> None:
    ended = subprocess.run([sys.executable, str(SCRIPT), "--device", "cuda"], text=True, timeout=100, capture_output=True,
                           env={**os.environ, **ENVIRONMENT})
    assert ended.returncode == 0 and ended.stdout.startswith("no CUDA here")


@pytest.mark.distributed
@pytest.mark.parametrize("launch", ["beside", pytest.param("ranks", marks=pytest.mark.slow)])
def test_a_launch(launch: str, tmp_path: Path) -> None:
    result, out = run("--launch", launch, path=tmp_path / "result.json")
    rows = {row["arm"]: row for row in result[f"tiny, {launch}"]["rows"]}
    assert all(row["flops"] == row["expected"][0] and row["blocks"] == 2 and row["thread_cpu"] > 0 for row in rows.values())
    sent = {arm: row for arm, row in rows.items() if "bytes" in row}
    assert set(sent) == ({"process", "process split"} if launch == "beside" else {"ranks"})
    assert all(row["bytes"] == row["bytes_expected"] for row in sent.values())
    assert out.count("per step") == len(sent) + 1 and result["versions"]["torch"] and "NOT" not in out.replace("NOT pinned", "")
