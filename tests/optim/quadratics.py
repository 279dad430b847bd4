"""Quadratic losses, on which every method has a closed form: L = 1/2 w' A w."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Quadratic(nn.Module):
    """1/2 sum a_i w_i^2 for a diagonal A."""

    def __init__(self, diagonal: list[float], weight: list[float], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.register_buffer("diagonal", torch.tensor(diagonal, dtype=dtype))
        self.weight = nn.Parameter(torch.tensor(weight, dtype=dtype))

    def forward(self) -> Tensor:
        return 0.5 * (self.diagonal * self.weight.square()).sum()


def closure_of(opt: Any, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A closure for `opt.step`."""

    def closure() -> Tensor:
        value = loss()
        opt.backward(value)
        return value

    return closure


def small_net(seed: int = 0) -> nn.Module:
    """A net of two layers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(seed: int = 0, rows: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=g), torch.randint(0, 3, (rows,), generator=g)


def train(model: Any, opt: Any, begin: int, end: int, scale: float = 1.0) -> None:
    """Steps `begin` to `end`, step i with batch i."""
    for i in range(begin, end):
        x, y = batch(i)
        opt.step(closure_of(opt, lambda x=x, y=y: scale * nn.functional.cross_entropy(model(x), y)))


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
