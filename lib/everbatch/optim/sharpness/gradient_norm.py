"""Two methods that mix the gradients at the weights and at the perturbed weights: gradient-norm penalty and WSAM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from everbatch.contract import Cost
from everbatch.engines.passes import Objective
from everbatch.errors import check_real
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.sharpness.ascent import ascent, combine_, masters_copy

__all__ = ["WSAM", "GradientNorm"]


class GradientNorm(OptimizerMixin):
    """Penalise the norm of the gradient: minimise L + penalty * ||grad L||, by a finite difference.

        f = (1 - a) g + a h,   h = grad L(theta + r * g / (||g|| + delta)),   a = penalty / r

    Exact on quadratics. a = 1 is SAM with radius r, a = 0 plain training.

    Cost: one more pass; two copies of the owned masters and the direction; one all-reduce of a scalar where sharded.
    Order: any. Limits: one owner of the perturbation; global scope.
    Source: Zhao et al. 2022, arXiv 2202.03599. The option is a itself, as in the authors' code; the penalty is a * r.
    """

    owns = ("perturbation",)
    example = {"radius": 0.3}
    off = {"mix": 0.0}
    search = {"radius": (0.05, 0.02, 0.1), "mix": (0.8, 0.2, 0.5)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        radius: float = 0.05
        """r, the length of the finite difference, in parameter units; > 0."""
        mix: float = 0.8
        """a, the weight of the gradient at the displaced weights; in [0, 1]."""

        def __post_init__(self) -> None:
            check_real("GradientNorm", "radius", self.radius, 0.0, open_low=True)
            check_real("GradientNorm", "mix", self.mix, 0.0, 1.0, cure="pass mix=0 to switch it off")

    def estimate_gradient(self, objective: Objective) -> Any:
        """Mix the two gradients; returns the loss of the first pass."""
        config: GradientNorm.Config = self.configs[GradientNorm]
        loss = super().estimate_gradient(objective)
        if config.mix:
            g = masters_copy(self.host.gradient())
            with self.displaced(ascent(g, config.radius)):
                objective()
            if config.mix < 1:
                combine_(self.host, self.host.gradient(), g, config.mix, 1 - config.mix)
        return loss

    def cost(self) -> Cost:
        """One more pass while a > 0."""
        return Cost(passes=1, transient_bytes=12, scalar_reductions=1) if self.configs[GradientNorm].mix else Cost()


class WSAM(OptimizerMixin):
    """Weighted SAM: sharpness as a regulariser with a weight of its own.

        f = a h + (1 - a) g,   a = gamma / (1 - gamma), which may exceed 1

    Cost: as GradientNorm; order and limits too.
    Source: Yue et al. 2023, arXiv 2305.15817, with the sharpness term inside the update (its coupled form).
    """

    owns = ("perturbation",)
    example = {"rho": 0.3, "gamma": 0.6}
    off = {"gamma": 0.0}
    search = {"rho": (0.02, 0.05, 0.1), "gamma": (0.9, 0.8, 0.95)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        rho: float = 0.05
        """Radius of the perturbation, in parameter units; >= 0."""
        gamma: float = 0.9
        """Weight of sharpness; in [0, 1), 1/2 is SAM."""

        def __post_init__(self) -> None:
            check_real("WSAM", "rho", self.rho, 0.0, cure="pass rho=0 to switch it off")
            check_real("WSAM", "gamma", self.gamma, 0.0, 1.0, open_high=True)

    def estimate_gradient(self, objective: Objective) -> Any:
        """Mix the two gradients; returns the loss of the first pass."""
        config: WSAM.Config = self.configs[WSAM]
        loss = super().estimate_gradient(objective)
        if config.rho and config.gamma:
            g, weight = masters_copy(self.host.gradient()), config.gamma / (1 - config.gamma)
            with self.displaced(ascent(g, config.rho)):
                objective()
            combine_(self.host, self.host.gradient(), g, weight, 1 - weight)
        return loss

    def cost(self) -> Cost:
        """One more pass while rho and gamma are positive."""
        on = self.configs[WSAM].rho and self.configs[WSAM].gamma
        return Cost(passes=1, transient_bytes=12, scalar_reductions=1) if on else Cost()
