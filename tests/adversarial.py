"""Small runs with ConAdv, in a trainer of a few lines."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from everbatch import compose
from everbatch.nn import frozen_statistics, split_branch
from everbatch.train.adversarial.craft import craft, pixel_box
from golden.families.conadv import Learner

ADV = "adversarial"
SGD = functools.partial(compose(base=torch.optim.SGD), lr=0.1, momentum=0.9, weight_decay=1e-3)
FROZEN = functools.partial(compose(base=torch.optim.SGD), lr=0.0)
PIXELS: dict[str, Any] = {"radius": 6.0, "mean": (0.5,), "std": (0.25,)}
"""A box on which many crafted values end at the edge of the valid range."""


def batches(count: int = 7, rows: int = 5, width: int = 6, classes: int = 3, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [((torch.rand(rows, width, generator=g) - 0.5) / 0.25, torch.randint(0, classes, (rows,), generator=g))
            for _ in range(count)]


def net(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), *extra, nn.Linear(8, 3))


def learner(model: nn.Module | None = None, data: Any = None, optimizer: Any = SGD, cls: Any = Learner, **conadv: Any) -> Any:
    made = cls(model or net(), data or batches(), **{**PIXELS, **conadv})
    made.optimizer = optimizer(made.model)
    return made


def by_hand(model: nn.Module, x: Tensor, y: Tensor, box: Any, **options: Any) -> Tensor:
    """The crafted batch of the weights that `model` has."""
    with frozen_statistics(model), split_branch(model.train(), ADV):
        return craft(model, x, y, box, **options)


BOX = pixel_box(6.0, mean=(0.5,), std=(0.25,))
