"""Train a small network on one data set in a plain loop, test it once at the end; the arms differ in the optimizer alone.

Schedule, decay, network, order of batches: the same for all arms under one seed, so differences are paired. While an option
is chosen, a part cut from the training samples judges; the test samples are looked at once, after the last step.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.ledger.cells import Cell
from benchmarks.ledger.samples import Samples, opened, rows, top
from everbatch import compose, seeds
from everbatch.data import Source, stratified_split
from everbatch.nn import SmallConv
from everbatch.optim import LAMB, LARS, SAM, LookSAM, StaleSAM

__all__ = ["METHODS", "Scale", "train"]

METHODS: dict[str, tuple[tuple[type, ...], type[torch.optim.Optimizer]]] = {
    "SGD": ((), torch.optim.SGD), "SAM": ((SAM,), torch.optim.SGD), "LookSAM": ((LookSAM,), torch.optim.SGD),
    "StaleSAM": ((StaleSAM,), torch.optim.SGD), "LARS": ((LARS,), torch.optim.SGD),
    "AdamW": ((), torch.optim.AdamW), "LAMB": ((LAMB,), torch.optim.AdamW)}
"""Mixins and base of each optimizer that an arm may name."""


@dataclass(frozen=True, kw_only=True)
class Scale(Samples):
    """What all cells share."""

    samples: int = 0
    """Training samples, a stratified share; 0 for all."""
    noise: float = 0.0
    """Standard deviation of noise put on each image once and for all, as a share of the pixel range."""
    epochs: int = 20
    batch: int = 64
    lr: float = 0.05
    """The same for all arms that name none; cosine decay to 0."""
    warmup: float = 0.0
    """Epochs of linear warm-up before the decay."""
    weight_decay: float = 5e-4
    width: int = 16
    """Channels of the network's first convolution."""
    curvature: int = 0
    """Power iterations for the largest eigenvalue of the training loss's Hessian, at the end; 0 for none."""


@dataclass(frozen=True)
class Part:
    """Ready inputs and labels, in memory."""

    inputs: Tensor
    targets: Tensor

    def rows(self, ids: Tensor) -> Part:
        """Some of them."""
        return Part(self.inputs[ids], self.targets[ids])


def train(cell: Cell, home: Path) -> dict[str, float | None]:
    """One cell. Options of an arm: `method` of METHODS; `lr` and `batch` instead of the scale's; all others go to the optimizer.

    Returns:
        accuracy, None where the last step had no finite gradient: the arm diverged; passes (mean per step); step_ms (median);
        eigenvalue, where the scale asks for the curvature.
    """
    scale = Scale(**cell.scale)
    learn, judge, classes = parts(cell, scale, home)
    options = dict(cell.options)
    batch, lr = int(options.pop("batch", scale.batch)), float(options.pop("lr", scale.lr))
    torch.manual_seed(seeds.derive(cell.seed, "model"))
    model = SmallConv(learn.inputs.shape[1], classes, learn.inputs.shape[-1], scale.width)
    optimizer = built(model, options.pop("method"), lr, scale.weight_decay, options)
    passes, spent = _steps(model, optimizer, learn, batch, cell.seed, scale)
    diverged = not optimizer.last_applied
    values: dict[str, float | None] = {
        "accuracy": None if diverged else accuracy(model, judge), "passes": statistics.fmean(passes),
        "step_ms": 1e3 * statistics.median(spent)}
    if scale.curvature:
        some = learn.rows(torch.arange(min(512, len(learn.targets))))
        values["eigenvalue"] = None if diverged else eigenvalue(model, some, scale.curvature)
    return values


def built(model: nn.Module, method: str, lr: float, weight_decay: float, options: dict[str, Any]) -> Any:
    """The optimizer of an arm, over the model."""
    mixins, base = METHODS[method]
    momentum = {"momentum": 0.9} if base is torch.optim.SGD else {}
    cls: Any = compose(*mixins, base=base)
    return cls(model, lr=lr, weight_decay=weight_decay, **momentum, **options)


def _steps(model: nn.Module, optimizer: Any, learn: Part, batch: int, seed: int, scale: Scale) -> tuple[list[int], list[float]]:
    """Train; passes and seconds of each step."""
    count, passes, spent = len(learn.targets), [], []
    per_epoch = count // batch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(scale.epochs * per_epoch, round(scale.warmup * per_epoch)))
    for epoch in range(scale.epochs):
        order = torch.randperm(count, generator=seeds.generator(seed, "order", epoch))
        for ids in torch.split(order[: per_epoch * batch], batch):
            x, y = learn.inputs[ids], learn.targets[ids]
            begun = time.perf_counter()

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                loss = functional.cross_entropy(model(x), y)
                optimizer.backward(loss)
                return loss

            optimizer.step(closure)
            spent.append(time.perf_counter() - begun)
            passes.append(optimizer.last_passes)
            schedule.step()
    return passes, spent


def _rate(steps: int, warmup: int) -> Any:
    """The factor of each step's rate: linear up, then half a cosine down to 0."""
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return factor


def parts(cell: Cell, scale: Scale, home: Path) -> tuple[Part, Part, int]:
    """What is trained on, what judges, and the number of classes."""
    train, test = opened(cell, home)
    ids = torch.arange(len(train))
    if 0 < scale.samples < len(train):
        ids = stratified_split(train.targets, scale.samples / len(train), seed=0)[1]
    learn = _ready(cell, train, ids, scale.noise)
    if cell.held_out:
        rest, held = stratified_split(learn.targets, 0.2, seed=0)
        return learn.rows(rest), learn.rows(held), len(train.classes)
    return learn, _ready(cell, test, torch.arange(len(test)), scale.noise), len(train.classes)


def _ready(cell: Cell, source: Source, ids: Tensor, noise: float) -> Part:
    """Inputs scaled to [-1, 1], with noise that belongs to the image, as in recipes/growing_data.py."""
    raw = rows(source, ids)
    values = raw.float() / top(cell, raw)
    if noise:
        values += noise * seeds.normal(("classify", source.name), 0, values.numel()).view(values.shape)
    return Part(values.clamp(0.0, 1.0) * 2 - 1, source.targets[ids])


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Share that is right."""
    model.eval()
    guess = torch.cat([model(x).argmax(1) for x in torch.split(part.inputs, 500)])
    return int((guess == part.targets).sum()) / len(part.targets)


def eigenvalue(model: nn.Module, part: Part, iterations: int) -> float:
    """The largest eigenvalue in size of the Hessian of the mean loss: power iteration, the Rayleigh quotient of the last."""
    weights = list(model.parameters())
    loss = functional.cross_entropy(model(part.inputs), part.targets)
    gradient = torch.autograd.grad(loss, weights, create_graph=True)
    direction = [torch.randn(w.shape, generator=seeds.generator("eigenvalue", k)) for k, w in enumerate(weights)]
    value = 0.0
    for _ in range(iterations):
        norm = torch.sqrt(sum(((d * d).sum() for d in direction), torch.zeros(())))
        direction = [d / norm for d in direction]
        product = torch.autograd.grad(gradient, weights, grad_outputs=direction, retain_graph=True)
        value = float(sum((p * d).sum() for p, d in zip(product, direction, strict=True)))
        direction = [p.detach() for p in product]
    return value
