"""The benchmark of ConAdv's placements runs, counts what it says it counts, and its counts are those of the cost model."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from processes import ENVIRONMENT, ROOT
from rotation import When

SCRIPT = ROOT / "benchmarks" / "speed" / "conadv.py"


@pytest.fixture(scope="module")
def speed() -> SimpleNamespace:
    """The benchmark's modules, its folder on the path while they are imported, as when it is run."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        parts = ("arms", "costs", "stream", "timing")
        return SimpleNamespace(**{part: importlib.import_module(f"conadv_{part}") for part in parts})
    finally:
        sys.path.remove(str(SCRIPT.parent))


def run(*arguments: str, path: Path) -> tuple[dict[str, Any], str]:
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), "--tiny", "--blocks", "2", "--steps", "2", "--json", str(path), *arguments],
        text=True, timeout=300, capture_output=True, env={**os.environ, **ENVIRONMENT})
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(path.read_text()), ended.stdout


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("arm", ["sequential", "inline"])
def test_flops_are_those_of_the_cost_model(speed: SimpleNamespace, arm: str, steps: int) -> None:
    net = speed.arms.Net(lambda: speed.arms.conv_net(width=8), 2)
    counted = {}
    for name, options in (("vanilla", {}), ("mixed", {}), (arm, {"steps": steps})):
        t = speed.arms.learner(name, net, **options)
        t.training_step()  # fills the pipeline
        counted[name] = speed.costs.flops(t.training_step)
        assert (counted[name], 0) == speed.costs.expected_flops(t.model, t.ring[0].inputs, name, steps)
    assert counted["mixed"] == 2 * counted["vanilla"]
    assert counted[arm] / counted["vanilla"] == pytest.approx((6 + 2 * steps) / 3, rel=0.02)
    exact = torch.nn.Linear(4, 3)
    assert speed.costs.flops(lambda: exact(torch.zeros(2, 4))) == 2 * 2 * 4 * 3


def test_the_nets_that_are_measured_keep_to_the_model_within_a_percent(speed: SimpleNamespace) -> None:
    pytest.importorskip("timm")
    for net in speed.arms.nets().values():
        model, x = net.build(), torch.zeros(1, 3, net.side, net.side)
        plain, crafted = (sum(speed.costs.expected_flops(model, x, arm)) for arm in ("vanilla", "process"))
        assert crafted / plain == pytest.approx(8 / 3, rel=0.01)


def test_bytes_of_a_fleet(speed: SimpleNamespace) -> None:
    assert speed.costs.bytes_per_step("process", 100, 2, 12, 4, 65) == (100 + 2 * 12 * 4 + 16, 24)
    assert speed.costs.bytes_per_step("ranks", 128, 2, 12, 4, 64) == (64 + 64 + 128 + 128 + 64, 64 + 64)
    assert speed.costs.bytes_per_step("ranks", 128, 2, 12, 4, 65) == (64 + 128 + 128 + 128 + 64, 64 + 64)
    sizes = speed.costs.fleet(trainers=5, adversaries=2, weights=1000, batch=1, elements=10, modules=7)
    assert sizes["total"] == 5 * (4 * 64 + 2 * 64) + 2 * 1000
    assert sizes["into an adversary of 3 trainers"] == 3 * 256 + 1000 and sizes["out of an adversary of 3 trainers"] == 3 * 128


def test_verdicts_are_of_pairs_and_say_what_they_cannot_tell(speed: SimpleNamespace) -> None:
    rounds = [1.0, 1.0, 2.0, 2.0] * 10  # a machine that is slow half of the time
    times = {"vanilla": rounds, "mixed": [2.0 * t for t in rounds], "process": [2.08 * t for t in rounds],
             "process split": [1.2 * t for t in rounds], "sequential": [t * (2.7, 2.9)[k % 2] for k, t in enumerate(rounds)]}
    rows = [{"arm": arm, "seconds": t, "seconds_min": min(t)} for arm, t in times.items()]
    found = speed.timing.verdicts(rows)
    assert {arm: v["verdict"] for arm, v in found.items()} == {"mixed": "met", "process": "met", "process split": "MISSED",
                                                               "sequential": "undecided"}
    assert found["process"] == {"verdict": "met", "base": "mixed", "limit": 1.05, "minima": pytest.approx(1.04),
                                "paired": pytest.approx(1.04), "interval": pytest.approx([1.04, 1.04])}
    assert found["sequential"]["interval"] == pytest.approx([2.7, 2.9])


def test_overlap(speed: SimpleNamespace) -> None:
    assert speed.stream.overlap([(7, 0.0, 10.0), (7, 12.0, 20.0), (9, 8.0, 14.0)]) == pytest.approx(4.0 / 6.0)
    assert speed.stream.overlap([(7, 0.0, 10.0), (9, 10.0, 12.0)]) == 0.0
    assert speed.stream.overlap([(7, 0.0, 10.0)]) is None and speed.stream.overlap([]) is None


@pytest.mark.rotated(0, 6)
def test_stream_on_a_cpu_is_inline(tmp_path: Path) -> None:
    result, out = run("--device", "cpu", path=tmp_path / "result.json")
    assert set(result["stream"]) == {"2", "4"}
    for part in result["stream"].values():
        assert part["odd"] == [] and part["overlap"] is None and [row["arm"] for row in part["rows"]][-1] == "stream"
    assert out.count("no kernels to see without CUDA; 0 tensors differ from inline") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.rotated(1, 6)
def test_without_cuda_it_says_so() -> None:
    ended = subprocess.run([sys.executable, str(SCRIPT), "--device", "cuda"], text=True, timeout=100, capture_output=True,
                           env={**os.environ, **ENVIRONMENT})
    assert ended.returncode == 0 and ended.stdout.startswith("no CUDA here")


@pytest.mark.distributed
@pytest.mark.parametrize("launch", [When(3, 6).param("beside"), When(slow=True).param("ranks")])
def test_a_launch(launch: str, tmp_path: Path) -> None:
    result, out = run("--launch", launch, path=tmp_path / "result.json")
    rows = {row["arm"]: row for row in result[f"tiny, {launch}"]["rows"]}
    assert all(row["flops"] == row["expected"][0] and row["blocks"] == 2 and row["thread_cpu"] > 0 for row in rows.values())
    sent = {arm: row for arm, row in rows.items() if "bytes" in row}
    assert set(sent) == ({"process", "process split"} if launch == "beside" else {"ranks"})
    assert all(row["bytes"] == row["bytes_expected"] for row in sent.values())
    assert out.count("per step") == len(sent) + 1 and result["versions"]["torch"] and "NOT" not in out.replace("NOT pinned", "")
