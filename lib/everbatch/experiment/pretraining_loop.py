"""A plain training of a small network on images in memory, on one process, with the cores that make it faster."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everbatch import seeds
from everbatch.data import Source
from everbatch.errors import check
from everbatch.experiment.data import Data
from everbatch.experiment.model import Model
from everbatch.rows import one_tensor

__all__ = ["Training", "jittered", "turned"]

QUARTERS = 4


class Training:
    """See `everbatch.experiment.pretraining.pretrained`. `epochs` does the work; `state`, `accuracy` and `seconds` are there
    after it.

    Args:
        options: a `Pretraining`.
        labels: the classes of `source` to learn.
    """

    def __init__(self, options: Any, model: Model, source: Source, data: Data, labels: tuple[int, ...]) -> None:
        self.options, self.data = options, data
        place = torch.full((len(source.classes),), -1)
        place[list(labels)] = torch.arange(len(labels))
        targets = place[source.targets]
        ids = torch.cat([torch.nonzero(targets == k).flatten()[: options.samples] for k in range(len(labels))])
        self.images = torch.cat([one_tensor("data", source.fetch(part)) for part in torch.split(ids, 1024)])
        self.targets, self.classes = targets[ids], len(labels)
        heads = self.classes * (QUARTERS if options.rotations else 1)
        self.net = model.build(self.images[0], heads, seeds.derive(options.seed, "pretraining", "net") % 2**32)
        if torch.cuda.is_available():
            self.net.cuda()
        self.state: dict[str, Tensor] = {}
        self.accuracy, self.seconds = 0.0, 0.0

    def epochs(self) -> Iterator[None]:
        """Train; yields after each epoch."""
        start, options = time.monotonic(), self.options
        fastest = self._fastest()
        steps = -(-len(self.images) // options.batch_size)
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=options.lr, weight_decay=options.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.epochs * steps)
        for epoch in range(options.epochs):
            with threads(fastest), torch.random.fork_rng(devices=self._devices()), torch.enable_grad():
                torch.manual_seed(seeds.derive(options.seed, "pretraining", epoch))
                right = self._epoch(optimizer, schedule)
            yield
        self.accuracy = right / len(self.images)
        self.state = {name: value.detach().cpu().clone() for name, value in self.net.state_dict().items()}
        self.seconds = time.monotonic() - start

    def _devices(self) -> list[torch.device]:
        """The GPU of the network, whose random numbers training draws."""
        device = next(self.net.parameters()).device
        return [device] if device.type == "cuda" else []

    def _fastest(self) -> int:
        """All cores, or one where that is faster: threads of a small network, or beside other processes, wait for each other."""
        if cores() == 1 or torch.cuda.is_available():
            return 1
        x = self.data.prepare(self.images[: self.options.batch_size])
        self.net.eval()  # no statistic moves
        seconds = {}
        for count in (cores(), 1):
            with threads(count), torch.enable_grad():
                for _ in range(3):  # the last is timed
                    start = time.monotonic()
                    torch.autograd.backward(self.net(x).sum())
                seconds[count] = time.monotonic() - start
        self.net.zero_grad()
        return min(seconds, key=lambda count: seconds[count])

    def _epoch(self, optimizer: torch.optim.Optimizer, schedule: Any) -> float:
        """One pass; how many samples were told right in it."""
        options = self.options
        self.net.train()
        device = next(self.net.parameters()).device
        right = torch.zeros((), device=device)
        for ids in torch.split(torch.randperm(len(self.images)), options.batch_size):
            x = self.data.prepare(self.images[ids].to(device))
            y = self.targets[ids].to(device)
            if options.rotations:
                x, y = turned(x, y, self.classes)
            if options.jitter:
                x = jittered(x, options.jitter)
            logits = self.net(x)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            right += (logits.argmax(1) == y).sum()
        check(bool(loss.isfinite()), "pretraining", f"a loss of {float(loss.detach())}", "be finite", "lower pretraining.lr")
        return float(right)


def turned(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Each image turned by so many quarters, drawn from torch's global generator, each of which is a class of its own."""
    quarters = torch.randint(QUARTERS, (len(x),)).to(x.device)
    out = x.clone()
    for k in range(1, QUARTERS):
        rows = quarters == k
        out[rows] = torch.rot90(x[rows], k, (2, 3))
    return out, y + quarters * classes


def jittered(x: Tensor, size: float) -> Tensor:
    """Each image turned by up to `size` radians, scaled by 1 +- size and shifted by up to that share of its side."""
    angle, scale, right, down = (size * (2.0 * torch.rand(4, len(x), device="cpu") - 1.0)).to(x.device)
    scale = 1.0 + scale
    cos, sin = angle.cos() * scale, angle.sin() * scale
    moves = torch.stack([torch.stack([cos, -sin, 2.0 * right], 1), torch.stack([sin, cos, 2.0 * down], 1)], 1)
    grid = F.affine_grid(moves, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside the block torch computes with so many; launchers give each rank one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
