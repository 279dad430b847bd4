"""Adversaries on ranks of their own: the last ranks that torchrun starts craft, the others train in a group without them.

    W = T + A ranks of torchrun:   ranks 0 .. T-1 form the default process group;   rank T + a crafts for trainers j = a mod A

A rank that crafts is two processes: the one torchrun knows only waits, and starts the one that computes. If that one dies,
torchrun sees nothing, and the trainers do what `on_failure` says.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from everbatch.distributed import attempt_store, enlist, init
from everbatch.errors import check
from everbatch.processes import at_end
from everbatch.train.adversarial.attack import Attack
from everbatch.train.adversarial.placement import AdversaryLost, Crafted, Job, Placement, modes_of
from everbatch.train.adversarial.wire import (
    BACK,
    TO_ADVERSARY,
    answer_layout,
    dead_key,
    end_key,
    layout,
    link,
    order_layout,
    ready_key,
    room,
    told_attack,
    views,
)

__all__ = ["RemoteRank", "Role", "current_role", "split_ranks"]


LAST_WORD = datetime.timedelta(seconds=1)
"""How long a trainer that ends waits until its adversary has heard of it."""


@dataclass(frozen=True)
class Role:
    """What this process does in a launch with adversaries."""

    rank: int
    """In torchrun's world."""
    trainers: int
    adversaries: int

    @property
    def adversary(self) -> bool:
        return self.rank >= self.trainers

    @property
    def serves(self) -> list[int]:
        """Trainers this adversary crafts for."""
        return list(range(self.rank - self.trainers, self.trainers, self.adversaries))


_role: Role | None = None


def current_role() -> Role | None:
    """What `split_ranks` decided in this process."""
    return _role


def split_ranks(adversaries: int, device: str | None = None, timeout_s: float = 600.0) -> Role:
    """Divide torchrun's ranks, before anything else joins a process group. Collective over all of them.

    Args:
        adversaries: ranks that craft, the last ones; 1 <= A <= T.
        device, timeout_s: as in `everbatch.distributed.init`.

    Raises:
        ValueError: fewer than A + 1 ranks, or more adversaries than trainers.
        RuntimeError: a process group is there already.
    """
    global _role
    if dist.is_initialized():
        raise RuntimeError("split_ranks: a process group is there already; call it before anything that joins one")
    store, rank, size = attempt_store(timeout_s)
    check(1 <= adversaries and 2 * adversaries <= size, "split_ranks", f"adversaries={adversaries} of {size} ranks",
          "be at least one, and at most half of the ranks", "start more ranks, about one adversary to three trainers")
    _role = Role(rank, size - adversaries, adversaries)
    if _role.adversary:
        enlist(_role.trainers, timeout_s, wait=False)
    else:
        init(device, timeout_s, spare=adversaries)
        at_end(functools.partial(store.set, end_key(rank), "1"))  # or the adversaries would wait for a trainer that never spoke
    return _role


class RemoteRank(Placement):
    """The trainer's end: sends weights (the adversary's first trainer only) and batches, takes crafted batches.

    One message each way per batch. With every tensor in it rounded up to 64 bytes, so that it lies as torch's own do:

        out    64 + b |x| e + 8 b, and a byte for each module's mode;
               P of weights and buffers to each adversary from its first trainer
        back   64 + b |x| as int8 signs, or b |x| e in full

    Messages leave in the background, from two staging copies in turn; CUDA tensors are staged on the CPU.
    """

    def __init__(self, attack: Attack, live: nn.Module, role: Role, *, split: bool, patience_s: float) -> None:
        self.attack, self.live, self.role, self.split, self.patience_s = attack, live, role, split, patience_s
        self.store, _, _ = attempt_store(self.patience_s)
        self._modules = list(live.modules())
        self._group: Any = None
        self._hello: dict[str, Any] = {}
        self._staged: list[Tensor] = []
        self._parts: list[dict[str, Tensor]] = []
        self._slots: list[list[Tensor]] = []
        self._leaving: list[Any] = [None, None]
        self._orders = 0
        self._coming: dict[int, tuple[Any, Tensor, int]] = {}

    def submit(self, version: int, jobs: list[Job], weights: dict[str, Tensor]) -> None:
        if self._group is None:
            self._greet(weights, jobs[0])
        for job in jobs:
            turn = self._orders % 2
            self._orders += 1
            if self._leaving[turn] is not None:
                self._wait(self._leaving[turn])
            parts = self._parts[turn]
            parts["head"].copy_(torch.tensor([job.step, version, 1]))
            parts["modes"].copy_(torch.tensor(list(modes_of(self._modules)), dtype=torch.uint8))
            if self._hello["carries"]:
                torch._foreach_copy_(self._slots[turn], list(weights.values()))
            check(job.tensor.shape == parts["inputs"].shape, "ConAdv", f"a batch of {tuple(job.tensor.shape)} after one of "
                  f"{tuple(parts['inputs'].shape)}", "be as large", "leave incomplete batches out")
            parts["inputs"].copy_(job.tensor.detach())
            parts["targets"].copy_(job.targets)
            back = torch.empty(room(answer_layout(self._hello)), dtype=torch.uint8)
            try:
                self._coming[job.step] = (self._group.recv([back], 1, BACK), back, version)
                self._leaving[turn] = self._group.send([self._staged[turn]], 1, TO_ADVERSARY)
            except RuntimeError as error:
                raise self._lost(error) from error
            self.sent += len(self._staged[turn])

    def collect(self, step: int) -> Crafted:
        work, back, wanted = self._coming.pop(step)
        self._wait(work)
        parts = views(back, answer_layout(self._hello))
        if parts["head"].tolist() != [step, wanted]:
            raise AdversaryLost(f"it sent step and version {parts['head'].tolist()}, must be {[step, wanted]}")
        self.sent += len(back)
        return Crafted(parts["payload"].to(next(self.live.parameters()).device), wanted)

    def _greet(self, weights: dict[str, Tensor], job: Job) -> None:
        shape, kind = list(job.tensor.shape), job.tensor.dtype
        if self.attack.embedding is not None:
            shape.append(int(self.live.get_submodule(self.attack.embedding).embedding_dim))  # type: ignore[arg-type]
            kind = torch.float32
        text = {"inputs": str(job.tensor.dtype), "result": "int8" if self.attack.signs else str(kind)}
        self._hello = {"attack": told_attack(self.attack), "split": self.split, "weights": layout(weights),
                       "modes": len(self._modules),
                       "carries": self.role.rank < self.role.adversaries, "inputs": list(job.tensor.shape),
                       "dtype": text["inputs"].removeprefix("torch."), "result": shape,
                       "result_dtype": text["result"].removeprefix("torch."), "targets": list(job.targets.shape),
                       "targets_dtype": str(job.targets.dtype).removeprefix("torch.")}
        self._staged = [torch.zeros(room(order_layout(self._hello)), dtype=torch.uint8) for _ in range(2)]
        self._parts = [views(flat, order_layout(self._hello)) for flat in self._staged]
        self._slots = [[parts[f"weights/{n}"] for n in weights] if self._hello["carries"] else [] for parts in self._parts]
        self.store.set(f"conadv/hello/{self.role.rank}", json.dumps(self._hello))
        limit, adversary = time.monotonic() + 10 * self.patience_s, self.role.trainers + self.role.rank % self.role.adversaries
        while not self.store.check([ready_key(adversary)]):
            if self.store.check([dead_key(adversary)]) or time.monotonic() > limit:
                raise AdversaryLost(f"rank {adversary} never came")
            time.sleep(0.05)
        self._group = link(self.store, self.role.rank, 0, datetime.timedelta(seconds=10 * self.patience_s))

    def _lost(self, error: RuntimeError) -> AdversaryLost:
        """gloo's text names its source file and guesses; what it means is one of two things."""
        late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        return AdversaryLost(f"no answer for {self.patience_s:g} s" if late else "the connection to it broke")

    def _wait(self, work: Any) -> None:
        try:
            done = work.wait(datetime.timedelta(seconds=self.patience_s))
        except RuntimeError as error:  # what gloo raises for a closed connection and for a timeout
            raise self._lost(error) from error
        if not done:
            raise AdversaryLost(f"no answer for {self.patience_s:g} s")

    def close(self) -> None:
        """Tell the adversary to end. One that crafts for another trainer, or listens to it, hears it when the connection ends."""
        if self._group is not None:
            with contextlib.suppress(RuntimeError):  # not heard: an error of this trainer waits for nobody
                self._group.send([torch.zeros_like(self._staged[0])], 1, TO_ADVERSARY).wait(LAST_WORD)
            self._group = None
        self.store.set(end_key(self.role.rank), "1")
