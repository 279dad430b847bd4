"""ShrinkPerturb, SubspaceProjection, OSFT and GRIP on every host: the weights of one process, at the documented cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from needs import needs
from processes import Zygote
from rotation import ROUND, hosts_in_turn, in_turn

needs("deepspeed")

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]
ZERO = ("zero1", "zero2", "zero3", "zero3-persistent", "zero1-offload", "zero2-offload", "zero3-offload")
FP32 = ("ddp", "fsdp2", "hsdp", "zero0", *ZERO)
WHEN = in_turn([*FP32, "zero2-bf16"], 4)
MIXES = ("factory", "modules", "weights, kept", "gaussian, scaled", "right", "all", "accumulated", "update right", "update all",
         "kept", "kept, factor", "held")
TOLERANCE = {"fp32": 1e-6, "bf16": 1e-2}
"""Largest difference after any step; see the contract suite. bf16: gradients err by some 1 %, and Adam takes whole steps."""


LOOSER = {("held", False): 30, ("held", True): 4, ("kept", True): 2}
"""By mix, and whether it is in bf16: found there were 0.0136 and 0.0203."""


@pytest.fixture(scope="module")
def found(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one launch on two ranks measured."""
    due = [host for host, when in WHEN.items() if when.due(ROUND)]
    out = tmp_path_factory.mktemp("warm") / "out.json"
    return zygote.found(Path(__file__).parent / "warm_worker.py", out, *due, limit=800.0)


@hosts_in_turn(WHEN, [*FP32, "zero2-bf16"])
@pytest.mark.parametrize("mix", MIXES)
def test_parity(found: dict[str, Any], mix: str, host: str) -> None:
    value = found[f"{mix}/{host}"]
    tolerance = TOLERANCE["bf16" if "bf16" in host else "fp32"]
    # Bases turn with weights and tokens, by their error over the gap between singular values. In one process, weights that begin
    # 3e-8 apart end up to 1e-5 apart (held), and layers that multiply in bf16 end 1e-2 (kept) and 0.66 (held) from those in fp32.
    tolerance *= LOOSER.get((mix, "bf16" in host), 1)
    assert isinstance(value, float) and value <= tolerance, value


@hosts_in_turn(WHEN, FP32)
def test_named_matrices_cost_one_collective_where_they_are_cut(found: dict[str, Any], host: str) -> None:
    """FSDP2 cuts between rows, so maps on the right alone cost nothing there; ZeRO cuts anywhere."""
    one = {"allreduce": 1}
    assert found[f"collectives/all/{host}"] == (one if host in (*ZERO, "fsdp2", "hsdp") else {})
    assert found[f"collectives/right/{host}"] == (one if host in ZERO else {})


def test_ranks_agree(found: dict[str, Any]) -> None:
    assert found["second moment/False"] < 1e-12 and found["second moment/True"] < 1e-12
    assert found["rank 0's projections"] is True
    assert "hash of the fresh initialisation" in found["differing fresh"] and "same on every rank" in found["differing fresh"]
    assert "hash of the weights after the call" in found["differing weights"]
    assert found["recalibrated"] < 1e-7
    assert found["where one rank's forwards came"] < 1e-6 and found["where none came"]
