"""Dynamic sparsity on every host: the masks of one process, exactly, and its weights to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from needs import needs
from processes import Zygote
from rotation import ROUND, hosts_in_turn, in_turn

needs("deepspeed")

# Slow: the contract suite carries these mixins over the hosts by default; this adds every option on every host.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]
HOSTS = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3", "zero3-persistent", "zero1-offload", "zero2-offload",
         "zero3-offload")
WHEN = in_turn(HOSTS, 4)
METHODS = ("rigl", "rigl, mean of 2 gradients, adamw", "set", "snfs", "unfired, taylor", "global, soft", "as released, adamw",
           "warm", "tasks, allow", "tasks, prefer", "tasks, forbid")
TOLERANCE = 1e-6
"""Largest difference of any weight or output: sums over ranks in another order; weights are about 0.5."""


@pytest.fixture(scope="module")
def found(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one launch on two ranks measured."""
    due = [host for host, when in WHEN.items() if when.due(ROUND)]
    out = tmp_path_factory.mktemp("sparsity") / "out.json"
    return zygote.found(Path(__file__).parent / "sparsity_worker.py", out, *due, limit=500.0)


@hosts_in_turn(WHEN, HOSTS)
@pytest.mark.parametrize("method", METHODS)
def test_masks_are_equal_and_weights_agree(found: dict[str, Any], method: str, host: str) -> None:
    key = f"{method}/{host}"
    assert f"error/{key}" not in found, found[f"error/{key}"]
    assert found[f"masks/{key}"] == 0 and found[f"zeros/{key}"] == 0
    assert found[f"weights/{key}"] <= TOLERANCE
    if method.startswith("tasks"):
        assert found[f"tasks/{key}"] <= TOLERANCE


@pytest.mark.parametrize("host", ["ddp", "zero0"])
def test_copies_that_differ_are_noticed(found: dict[str, Any], host: str) -> None:
    assert "masks of ranks [1] differ from rank 0's, must be the same on every rank" in found[f"copies/{host}"]
