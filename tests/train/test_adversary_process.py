"""Crafted batches that wait, and an adversary process: what it costs, and what its end or the trainer's leaves behind."""

from __future__ import annotations

import copy
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import learning
from adversarial import ADV, BOX, batches, by_hand, learner
from everbatch.distributed import World
from everbatch.train.adversarial import Attack, Fifo
from everbatch.train.adversarial.fifo import Waiting
from everbatch.train.adversarial.server import _take
from processes import ENVIRONMENT, ROOT
from rotation import When


def test_signs_from_a_checkpoint_follow_the_inputs_to_their_device() -> None:
    t = learner()
    t.training_step()
    attack: Attack = t._conadv.attack
    x = batches()[0][0]
    assert attack.finish(torch.ones(x.shape, dtype=torch.int8), x.to("meta"))[0].device.type == "meta"


def test_an_adversary_on_another_device_takes_weights_into_its_parameters() -> None:
    """What a rank with a GPU does with every message, on the CPU: parameters ask for gradients all the same."""
    model, other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sent = {f"weights/{n}": v.detach() + 1 for n, v in [*other.named_parameters(), *other.named_buffers()]}
    _take(named, sent)
    assert all(torch.equal(v, sent[f"weights/{n}"]) for n, v in named.items()) and model[0].weight.requires_grad


class Two(World):
    """The first of two ranks, the other of which lost its adversary after step 4."""

    rank, size = 0, 2

    def __init__(self) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value, {4}]


def test_a_queue_is_saved_where_every_rank_has_its_batch() -> None:
    fifo, rows = Fifo(), torch.arange(3)
    fifo.waiting = {step: Waiting(torch.full((3, 2), step), step - 1, rows) for step in (4, 5)}
    assert set(fifo.state_dict()["rows"]) == {"payload0", "ids0", "payload1", "ids1"}
    fifo.world = Two()
    saved = fifo.state_dict()
    assert saved["index"]["steps"].tolist() == [4] and saved["rows"].keys() == {"payload0", "ids0"}
    assert len(saved["index"]["slots"]) == 6 and saved["rows"]["payload0"].tolist() == [[4, 4]] * 3


def beside(**options: Any) -> Any:
    return learner(placement="process", patience_s=20.0, **options)


def test_too_little_shared_memory_is_told_before_it_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer of the file system is made up: a test cannot make /dev/shm smaller."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100, total=64_000_000))
    with pytest.raises(ValueError, match="with 100 bytes free in /dev/shm, must find [0-9,]+ more there.*--shm-size"):
        beside().training_step()


def only_child() -> Any:
    (child,) = [p for p in multiprocessing.active_children() if p.name == "everbatch adversary"]
    return child


@pytest.mark.rotated(0, 6)
def test_a_process_costs_few_files_and_ends_with_the_trainer() -> None:
    """Also a model of many tensors, more than a process may hold files open; closed in the middle it starts anew."""
    before, deep = len(os.listdir("/proc/self/fd")), nn.Sequential(*[nn.Linear(6, 6) for _ in range(60)], nn.Linear(6, 3))
    t, inline = beside(model=deep, tau=2), learner(copy.deepcopy(deep), tau=2)
    for step in range(2):
        assert torch.equal(t.training_step()[0][ADV], inline.training_step()[0][ADV]), step
    assert len(os.listdir("/proc/self/fd")) < before + 40
    child = only_child()
    pid = child.pid
    t.close()
    assert not multiprocessing.active_children() and not alive(pid) and len(os.listdir("/proc/self/fd")) <= before + 2
    t.close()
    t.step = inline.step = 0
    t.on_task_start(learning.stream().tasks[0])
    inline.on_task_start(learning.stream().tasks[0])
    assert torch.equal(t.training_step()[0][ADV], inline.training_step()[0][ADV])
    t.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("way", [When(i, 3).param(way) for i, way in enumerate(("clean", "inline", "stop"))])
def test_a_killed_adversary(way: Any) -> None:
    """Two batches are lost at most, those under way; what then happens is the option's choice."""
    t, weights = beside(tau=2, on_failure=way, normalize=True, weight_clean=3.0), list[nn.Module]()
    for _ in range(3):
        weights.append(copy.deepcopy(t.model))
        t.training_step()
    child = only_child()
    os.kill(child.pid, signal.SIGKILL)
    child.join(10)
    begin, seen = time.monotonic(), list[tuple[Tensor, dict[str, Tensor]]]()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(4):
            weights.append(copy.deepcopy(t.model))
            if way == "stop":
                with pytest.raises(RuntimeError, match="adversary of rank 0 is lost: .*exit code -9.*on_failure='clean'"):
                    for _ in range(4):
                        t.training_step()
                break
            inputs, terms = t.training_step()
            seen.append((inputs[ADV], terms))
    assert time.monotonic() - begin < 10 and not multiprocessing.active_children()
    found = [str(w.message) for w in said if "adversary" in str(w.message)]
    assert len(found) == (way != "stop") and all("ended with exit code -9" in text for text in found)
    crafted = [step for step, (_, terms) in enumerate(seen, 3) if terms["adversarial_cross_entropy"] > 0]
    for step, (_, terms) in enumerate(seen, 3):  # without its copy, the clean part counts in full
        x, y = batches()[step]
        plain = nn.functional.cross_entropy(weights[step].train()(x), y)
        torch.testing.assert_close(terms["cross_entropy"].detach(), plain.detach() * (0.75 if step in crafted else 1.0))
    for step in crafted:
        x, y = batches()[step]
        assert torch.equal(seen[step - 3][0], by_hand(weights[step - 2], x, y, BOX))
    assert t.adversary_costs()["lost"] == 4 * (way != "stop") - len(crafted)
    assert set(crafted) - {3, 4} == ({5, 6} if way == "inline" else set())
    t.close()


SCRIPT = """
import sys, time, multiprocessing
sys.path[:0] = [{tests!r}, {tests!r} + "/train"]
if __name__ == "__main__":
    from test_adversary_process import beside, only_child
    t = beside(tau=1)
    t.training_step()
    t.training_step()
    print(only_child().pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.rotated(1, 2)
def test_a_killed_trainer_leaves_neither_process_nor_memory(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text(SCRIPT.format(tests=str(ROOT / "tests")))
    job = subprocess.Popen([sys.executable, str(tmp_path / "trainer.py")], stdout=subprocess.PIPE, text=True,
                           env={**os.environ, **ENVIRONMENT})
    assert job.stdout is not None
    with job, job.stdout:
        child = int(job.stdout.readline())
        assert alive(child)
        job.kill()
        limit = time.monotonic() + 30
        while alive(child) and time.monotonic() < limit:
            time.sleep(0.05)
    assert not alive(child)
    assert not [f for f in os.listdir("/dev/shm") if str(child) in f or str(job.pid) in f]
