"""Adversaries on ranks of their own: the bits of crafting in the step, and what becomes of a run when one is killed."""

from __future__ import annotations

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from everbatch.train.adversarial.ranks import RemoteRank, Role
from everbatch.train.adversarial.wire import end_key, link
from processes import Job, torchrun
from rotation import When

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
WORKER = Path(__file__).parent / "conadv_ranks_worker.py"


def launch(folder: Path, mode: str, host: str = "ddp", *, ranks: int = 3, adversaries: int = 1) -> tuple[Job, list[Any]]:
    job = torchrun(ranks, WORKER, mode, str(folder / "out.json"), host, str(adversaries), limit=150.0)
    return job, [json.loads(path.read_text()) for path in sorted(folder.glob("out.[0-9]"))]


def leftovers() -> str:
    """Processes of a worker that outlived its launch."""
    return subprocess.run(["pgrep", "-af", f"{WORKER}|everbatch adversary"], capture_output=True, text=True).stdout


@pytest.mark.parametrize(("host", "ranks", "adversaries"), [
    When(0, 4).param("ddp", 3, 1), When(0, 4, slow=True).param("fsdp2", 3, 1), When(1, 4, slow=True).param("ddp", 4, 2)])
def test_other_ranks_craft_the_same_bits(tmp_path: Path, host: str, ranks: int, adversaries: int) -> None:
    job, found = launch(tmp_path, "same", host, ranks=ranks, adversaries=adversaries)
    assert job.codes == [0] and "Traceback" not in job.err, job.err[-3000:]
    trainers = ranks - adversaries
    assert [f["world"] for f in found] == [trainers] * trainers and all(f["odd"] == [] and f["steps"] == 24 for f in found)
    # 24 steps: all but the last tau = 2 of each of 3 tasks order a batch, the first of each orders 2 more. One message each way;
    # every tensor in it takes whole cache lines of 64 bytes.
    share, batches = 8 // trainers, 3 * (8 - 2) + 3 * 2

    def lines(*elements: int, size: int = 4) -> int:
        return sum(-(-n * size // 64) * 64 for n in elements)

    modes = 64  # a byte for each of fewer than 65 modules
    batch = 64 + modes + lines(share * 64) + lines(share, size=8) + 64 + lines(share * 64, size=1)
    weights = lines(64 * 15, 15, 15, 15, 15, 15, 15 * 6, 6) + 2 * (lines(15, 15) + lines(1, size=8))
    for rank, f in enumerate(found):
        assert f["bytes_sent"] == batches * (batch + (weights if rank < adversaries else 0)), (rank, f["bytes_sent"])
    assert leftovers() == ""


@pytest.mark.parametrize("mode", [When(2, 4).param("clean"), When(2, 4, slow=True).param("inline")])
def test_trainers_go_on_when_their_adversary_is_killed(tmp_path: Path, mode: str) -> None:
    job, found = launch(tmp_path, mode)
    assert job.codes == [0], job.err[-3000:]
    assert [f["steps"] for f in found] == [24, 24]
    for rank, f in enumerate(found):
        assert len(f["warned"]) == 1 and f"adversary of rank {rank} is lost" in f["warned"][0]
        # Killed after step 4: everything after it, or what was under way.
        assert f["lost"] >= 17 if mode == "clean" else 0 < f["lost"] <= 3, f
    assert "ended with exit code -9" in job.err and leftovers() == ""


@pytest.mark.slow
@pytest.mark.rotated(3, 4)
def test_a_run_may_end_with_its_adversary(tmp_path: Path) -> None:
    job, _ = launch(tmp_path, "stop")
    assert job.codes != [0] and job.seconds < 90
    assert job.err.count("is lost") >= 1 and "on_failure='clean' or 'inline'" in job.err and leftovers() == ""


def test_a_trainer_ends_at_once_while_its_adversary_listens_to_another() -> None:
    """Both ends of a real connection, the other of which never receives."""
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as both:
        ends = list(both.map(lambda end: link(store, 0, end, timedelta(seconds=30)), (0, 1)))
    remote = RemoteRank.__new__(RemoteRank)
    remote.store, remote.role, remote._group = store, Role(0, 1, 1), ends[0]
    remote._staged = [torch.zeros(64, dtype=torch.uint8)]
    begin = time.monotonic()
    remote.close()
    assert time.monotonic() - begin < 10  # of the 30 that a connection waits
    assert store.check([end_key(0)])
