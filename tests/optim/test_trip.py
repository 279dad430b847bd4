"""How far a reader of one optimizer step walks: hops between the library's files, counted and printed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from processes import Zygote

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs deepspeed", allow_module_level=True)
pytestmark = pytest.mark.distributed

MOST = 60
"""Hops of one step of SAM with DynamicSparsity on ZeRO stage 2, of a net of 7 tensors."""


def test_a_step_of_sam_and_dynamic_sparsity_on_zero2(tmp_path: Path, zygote: Zygote) -> None:
    """Two passes through a real engine, a displacement, a masked gradient and an update; no change of topology."""
    out = tmp_path / "trip.json"
    found = zygote.found(Path(__file__).parent / "trip_worker.py", out, ranks=1, limit=90.0)["step"]
    print(found["text"])
    assert found["shards"] == 7
    assert found["hops"] <= MOST, found["text"]
