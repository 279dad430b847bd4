"""Layers that are frozen after the engine was built rest, and every other weight takes the steps of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from needs import needs
from processes import Zygote
from rotation import ROUND, hosts_in_turn, in_turn

needs("deepspeed")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
HOSTS = ("zero0", "zero1", "zero3", "fsdp2", "zero2", "zero1-offload", "zero3-persistent")
WHEN = in_turn(HOSTS, 3)
MIXES = ("ewc", "mas", "ncl", "si", "vcl", "masks", "teacher", "stale", "shrink")


@pytest.fixture(scope="module")
def found(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one launch on two ranks measured."""
    due = [host for host, when in WHEN.items() if when.due(ROUND)]
    out = tmp_path_factory.mktemp("frozen") / "out.json"
    return zygote.found(Path(__file__).parent / "frozen_worker.py", out, *due, limit=250.0)


@hosts_in_turn(WHEN, HOSTS)
@pytest.mark.parametrize("mix", MIXES)
def test_a_layer_frozen_on_the_way_rests(found: dict[str, Any], mix: str, host: str) -> None:
    apart, moved = found[f"{mix}/{host}"]
    assert apart <= 1e-6 and moved == 0.0


@hosts_in_turn(WHEN, [host for host in HOSTS if host.startswith("zero")])
def test_a_state_taken_while_a_layer_rests_has_it(found: dict[str, Any], host: str) -> None:
    assert found[f"resumed/{host}"] == 0.0


@pytest.mark.parametrize("whole", [False, True])
def test_torchs_older_fsdp_is_refused(found: dict[str, Any], whole: bool) -> None:
    assert "FullyShardedDataParallel (FSDP1): parameter" in found[f"fsdp1/{whole}"]
