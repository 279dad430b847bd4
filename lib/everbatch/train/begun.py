"""How a trainer was when it was built: what a resumed run must begin with, whatever has changed since."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from everbatch.optim.mixin import OptimizerMixin
from everbatch.train.modes import evaluation_roots

__all__ = ["Begun"]

FREE = {"lr", "foreach", "fused", "capturable", "differentiable"}
"""Options of a base optimizer that are compared on their own, or only pick an implementation."""


@dataclass(frozen=True)
class Begun:
    """Taken once, right after the engine is there."""

    rates: list[float]
    """Learning rate of each parameter group."""
    options: dict[str, Any]
    """Other options of the base optimizer by name, one value per parameter group."""
    evaluation: list[str]
    """Modules that were in evaluation mode."""
    frozen: dict[str, bool]
    """Parameters that were not trained."""

    @classmethod
    def of(cls, optimizer: OptimizerMixin, module: nn.Module) -> Begun:
        """As they are now."""
        groups = optimizer.param_groups
        names = [name for name in sorted(optimizer.defaults) if name not in FREE]
        return cls(
            rates=[float(group["lr"]) for group in groups],
            options={name: [group.get(name) for group in groups] for name in names},
            evaluation=evaluation_roots(module),
            frozen={n: True for n, p in module.named_parameters() if not p.requires_grad})
