"""Sharpness-aware minimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from everbatch.compose import Cost
from everbatch.errors import check_real
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.objective import Objective
from everbatch.optim.shards import Vector

__all__ = ["SAM", "ascent"]


@torch.no_grad()
def ascent(gradient: Vector, rho: float, delta: float = 1e-12) -> Vector:
    """Direction of steepest ascent, of length rho: e = rho * g / (||g|| + delta), the norm over the whole model.

    Args:
        gradient: reduced and unscaled; not modified.
        rho: radius in parameter units, >= 0.
        delta: guard against a zero gradient, whose result is zero.

    Returns:
        A new vector in the masters' dtype. Cost: one all-reduce of a scalar where weights are sharded, one copy.

    Source: Foret et al. 2021, arXiv 2010.01412, eq. 2.
    """
    scale = rho / (gradient.norm() + delta)
    tensors = [g.to(s.data.dtype) * scale.to(device=g.device, dtype=s.data.dtype) for s, g in gradient]
    return Vector(gradient.host, gradient.shards, tensors)


class SAM(OptimizerMixin):
    """Sharpness-aware minimisation: the gradient is taken where the loss is worst within a radius.

        g = grad L(theta);  e = rho * g / (||g|| + delta);  f = grad L(theta + e);  the base updates theta with f

    The perturbation is the one of the global batch, the same at any world size and sharding. Pass 2 sees the same batch and
    the same dropout masks; running statistics move in pass 1 only; weights are restored bit for bit.

    Args (Config):
        rho: radius in parameter units, >= 0; 0 switches SAM off.
        delta: added to the norm, >= 0.

    Cost: one more pass; one copy of the owned masters, and of the direction; one all-reduce of a scalar where sharded.
    Order: any. Clipping and projections act on f alone. Limits: one owner of the perturbation.

    Source: Foret et al. 2021, arXiv 2010.01412. Differs: weight decay stays in the base optimizer, at theta (the authors put
    it into the loss); weights are copied back, not subtracted back, which is not exact.
    """

    owns = ("perturbation",)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        rho: float = 0.05
        """Radius of the perturbation, in parameter units; >= 0."""
        delta: float = 1e-12
        """Guard added to the gradient norm; >= 0."""

        def __post_init__(self) -> None:
            check_real("SAM", "rho", self.rho, 0.0, cure="pass rho=0 to switch it off")
            check_real("SAM", "delta", self.delta, 0.0)

    def estimate_gradient(self, objective: Objective) -> Any:
        """Take the gradient at the perturbed weights; returns the loss of the first pass."""
        loss = super().estimate_gradient(objective)
        config: SAM.Config = self.configs[SAM]
        if config.rho:
            with self.displaced(ascent(self.host.gradient(), config.rho, config.delta)):
                objective()
        return loss

    def cost(self) -> Cost:
        """One more pass while rho > 0."""
        return Cost(passes=1, transient_bytes=8, scalar_reductions=1) if self.configs[SAM].rho else Cost()
