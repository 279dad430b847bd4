"""Offline optimisation: a surrogate is fitted to the worse half of a noisy sample of a function, and searched by gradient ascent.

What counts is the true value at what the search proposes, which the surrogate has never seen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ledger.cells import Cell
from everbatch import compose, seeds
from everbatch.data import RowSource, iid
from everbatch.optim import SAM, Ignite
from everbatch.problems import Regression
from everbatch.train import Trainer

__all__ = ["FUNCTIONS", "Function", "Scale", "optimise", "search"]


@dataclass(frozen=True)
class Function:
    """To be maximised over the box [-1, 1]^d."""

    dimension: int
    best: float
    """Its maximum."""
    value: Callable[[Tensor], Tensor]
    """(n, d) to (n,)."""


def _ackley(x: Tensor) -> Tensor:
    """Minus Ackley's function on [-5, 5]^d, its optimum moved off the middle of the box."""
    z = 5.0 * x - 1.0
    root = z.square().mean(1).sqrt()
    return 20 * torch.exp(-0.2 * root) + torch.exp(torch.cos(2 * math.pi * z).mean(1)) - 20 - math.e


def _branin(x: Tensor) -> Tensor:
    """Minus Branin's function on [-5, 10] x [0, 15]."""
    a, b = 7.5 * x[:, 0] + 2.5, 7.5 * x[:, 1] + 7.5
    bowl = (b - 5.1 / (4 * math.pi**2) * a.square() + 5 / math.pi * a - 6).square()
    return -(bowl + 10 * (1 - 1 / (8 * math.pi)) * torch.cos(a) + 10)


FUNCTIONS = {"ackley-8": Function(8, 0.0, _ackley), "branin-2": Function(2, -0.39788735772973816, _branin)}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What all cells share."""

    sample: int = 1000
    """Points drawn; the worse half is what the surrogate sees."""
    noise: float = 0.1
    """Standard deviation of noise on the values, as a share of theirs."""
    width: int = 128
    """Of the surrogate's two hidden layers."""
    epochs: int = 100
    batch: int = 128
    lr: float = 1e-3
    """Of Adam, for the surrogate."""
    ascent: int = 200
    """Adam steps of the search."""
    ascent_lr: float = 0.02
    """In units of half the box."""
    candidates: int = 64
    """Searches, begun at the best points that were seen."""


MIXINS: dict[str, tuple[type, ...]] = {"adam": (), "ignite": (Ignite,), "sam": (SAM,)}


def optimise(cell: Cell, home: Path) -> dict[str, float | None]:
    """One cell. Options of an arm: `function` of FUNCTIONS, `method` of MIXINS; all others go to the optimizer.

    Returns:
        score: median over the candidates of the true value, 0 at the worst point of the whole sample and 1 at the maximum;
        start: the same of the points that the search began at; overshoot: how far the surrogate's promise exceeds the truth, in
        units of the values' spread; output_gradient: ||grad G||, G the surrogate's mean prediction; r2: of the fit.
    """
    cell.never_held_out()
    scale, options = Scale(**cell.scale), dict(cell.options)
    function = FUNCTIONS[options.pop("function")]
    x, y, worst = offline_data(function, scale, cell.seed)
    mean, std = y.mean(), y.std()
    torch.manual_seed(seeds.derive(cell.seed, "model"))
    surrogate: nn.Module = nn.Sequential(
        nn.Linear(function.dimension, scale.width), nn.LeakyReLU(), nn.Linear(scale.width, scale.width), nn.LeakyReLU(),
        nn.Linear(scale.width, 1), nn.Flatten(0))
    fitted = fit(surrogate, x, (y - mean) / std, options.pop("method"), options, scale, cell.seed)
    begin = x[y.topk(scale.candidates).indices]
    found = search(surrogate, begin, scale)

    def normalised(points: Tensor) -> float:
        return float((function.value(points).median() - worst) / (function.best - worst))

    with torch.no_grad():
        promised = surrogate(found) * std + mean
    surrogate.zero_grad()
    surrogate(x).mean().backward()
    norm = torch.sqrt(sum((p.grad.square().sum() for p in surrogate.parameters() if p.grad is not None), torch.zeros(())))
    return {"score": normalised(found), "start": normalised(begin), "r2": fitted, "output_gradient": float(norm),
            "overshoot": float(((promised - function.value(found)) / std).median())}


def offline_data(function: Function, scale: Scale, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points and noisy values of the worse half of a uniform sample, and the least true value of the whole sample."""
    x = 2 * torch.rand(scale.sample, function.dimension, generator=seeds.generator(seed, "points")) - 1
    true = function.value(x)
    noisy = true + scale.noise * true.std() * torch.randn(scale.sample, generator=seeds.generator(seed, "noise"))
    worse = noisy.argsort()[: scale.sample // 2]
    return x[worse], noisy[worse], true.min()


def fit(surrogate: nn.Module, x: Tensor, y: Tensor, method: str, options: dict[str, Any], scale: Scale, seed: int) -> float:
    """Train the surrogate by the squared error; returns R squared on what it was fitted to."""
    rows = RowSource(x, targets=y, name="offline")
    optimizer = functools.partial(compose(*MIXINS[method], base=torch.optim.Adam), lr=scale.lr, **options)
    config = Trainer.Config(batch_size=scale.batch, epochs=scale.epochs, seed=seed)
    trainer = Trainer(surrogate, optimizer, device="cpu", config=config, problem=Regression())
    return float(trainer.fit(iid(rows, rows))[0][0])


def search(surrogate: nn.Module, begin: Tensor, scale: Scale) -> Tensor:
    """Where Adam ends that ascends the surrogate from each point, inside the box."""
    points = begin.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([points], lr=scale.ascent_lr, maximize=True)
    for _ in range(scale.ascent):
        points.grad = torch.autograd.grad(surrogate(points).sum(), points)[0]
        optimizer.step()
        with torch.no_grad():
            points.clamp_(-1.0, 1.0)
    return points.detach()
