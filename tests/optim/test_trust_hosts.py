"""LARS and LAMB on every host: the weights of timm's optimizers in one process, at the documented cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from needs import needs
from processes import Zygote
from rotation import ROUND, When, hosts_in_turn, in_turn

needs("deepspeed", "timm")

# Slow: the contract suite carries these mixins over the hosts by default; this adds every option on every host.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]
SHARDED = ("fsdp2", "zero1", "zero2", "zero3", "zero3-persistent")
FP32 = ("ddp", "zero0", *SHARDED, "zero1-offload", "zero2-offload", "zero3-offload")
BF16 = ("zero0-bf16", "zero1-bf16", "zero2-bf16", "zero3-bf16", *(f"zero{s}-bf16-fp32acc" for s in (1, 2, 3)))
WHEN = {"plain": When(), **in_turn((*FP32, *BF16), 4)}
MIXES = ("LARS", "LARS nesterov", "LARS clipped, all", "LARS lr inside", "LAMB", "LAMB decoupled", "LAMB clipped, all",
         "LARS+SAM+Clip", "LAMB+SAM+Clip")
TOLERANCE = {"fp32": 1e-6, "bf16": 1e-2}
"""Largest difference of any weight after five steps.

fp32: sums over ranks in another order; the largest weight is about 0.5, so this is some 20 units in the last place.
bf16: activations and weights carry 8 bits, so gradients err by some 1 %, and the largest weights move by up to 1.
"""


@pytest.fixture(scope="module")
def found(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one launch on two ranks measured."""
    due = [host for host, when in WHEN.items() if when.due(ROUND) and host != "plain"]
    out = tmp_path_factory.mktemp("trust") / "out.json"
    return zygote.found(Path(__file__).parent / "trust_worker.py", out, *due, limit=500.0)


def within(found: dict[str, Any], key: str, tolerance: float) -> None:
    assert isinstance(found[key], float) and found[key] <= tolerance, found[key]


@pytest.mark.parametrize("mix", MIXES)
def test_the_test_moves_something(found: dict[str, Any], mix: str) -> None:
    assert found[f"moved/{mix}"] > 0.02  # the least: at lr 0.05, where the clip acts


@hosts_in_turn(WHEN, ["plain", *FP32])
@pytest.mark.parametrize("mix", MIXES)
def test_parity(found: dict[str, Any], mix: str, host: str) -> None:
    within(found, f"{mix}/{host}", TOLERANCE["fp32"])


@hosts_in_turn(WHEN, BF16)
@pytest.mark.parametrize("mix", MIXES)
def test_bf16(found: dict[str, Any], mix: str, host: str) -> None:
    within(found, f"{mix}/{host}", TOLERANCE["bf16"])


@hosts_in_turn(WHEN, ["zero2"])
@pytest.mark.parametrize("method", ["LARS", "LAMB"])
def test_timm_alone_is_right_on_whole_tensors_and_wrong_on_slices(found: dict[str, Any], method: str, host: str) -> None:
    """The control: the same job sees an optimizer that takes norms of slices."""
    within(found, f"timm alone/{method}/zero0", TOLERANCE["fp32"])
    assert found[f"timm alone/{method}/{host}"] > 1e-3


@hosts_in_turn(WHEN, ["ddp", "zero0", *SHARDED])
def test_all_norms_in_one_collective(found: dict[str, Any], host: str) -> None:
    """And no second all-gather of LAMB's weights; pre-clipping asks one more question."""
    once = {"allreduce": 1} if host in SHARDED else {}
    twice = {"allreduce": 2} if host in SHARDED else {}
    assert found[f"collectives/LARS/{host}"] == found[f"collectives/LAMB/{host}"] == once
    assert found[f"collectives/LAMB clipped, all/{host}"] == twice


@hosts_in_turn(WHEN, ["zero0", "zero2", "zero3"])
def test_the_engine_steps_its_scheduler_on_the_true_rate(found: dict[str, Any], host: str) -> None:
    within(found, f"engine schedule/{host}", TOLERANCE["fp32"])
