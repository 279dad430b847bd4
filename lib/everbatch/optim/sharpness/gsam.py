"""Surrogate-gap guided SAM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from everbatch.contract import Cost
from everbatch.engines.passes import Objective
from everbatch.errors import check, check_real
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.sharpness.ascent import adaptive_ascent, ascent, combine_, gap_direction, masters_copy

__all__ = ["GSAM"]


class GSAM(OptimizerMixin):
    """SAM that also shrinks the surrogate gap L(theta + e) - L(theta).

        h = grad L(theta + e);  f = h - alpha * (g - <g,h>/||h||^2 h)

    To first order f descends L(theta + e) exactly as h does (<f,h> = ||h||^2) and ascends L(theta) orthogonally to it.
    The radius may follow the learning rate: rho_t = rho_min + (rho - rho_min) * (lr_t - lr_min) / (lr_max - lr_min), the
    quotient held in [0, 1] where a warm-up is below lr_min or a schedule above lr_max.

    Cost: one more pass; two copies of the owned masters and the direction; two all-reduces of scalars where sharded.
    Order: any. Limits: one owner of the perturbation; global scope.
    Source: Zhuang et al. 2022, arXiv 2203.08065, and the authors' code, whose guards (1e-12) are used.
    """

    owns = ("perturbation",)
    example = {"rho": 0.3}
    off = {"rho": 0.0}
    search = {"rho": (0.05, 0.02, 0.1, 0.2), "alpha": (0.4, 0.1, 0.2)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        rho: float = 0.05
        """Radius, or its largest value under a schedule; >= 0."""
        alpha: float = 0.4
        """Weight of the gap term; in [0, 1]."""
        adaptive: bool = False
        """Scale the perturbation elementwise by |w|."""
        rho_min: float | None = None
        """Radius at the lowest learning rate; None: constant radius."""
        lr_max: float | None = None
        """Learning rate from which on the radius is rho; needed with rho_min."""
        lr_min: float = 0.0
        """Learning rate up to which the radius is rho_min."""

        def __post_init__(self) -> None:
            check_real("GSAM", "rho", self.rho, 0.0, cure="pass rho=0 to switch it off")
            check_real("GSAM", "alpha", self.alpha, 0.0, 1.0)
            check_real("GSAM", "lr_min", self.lr_min, 0.0)
            if self.lr_max is not None:
                check_real("GSAM", "lr_max", self.lr_max, 0.0, open_low=True)
            if self.rho_min is not None:
                check_real("GSAM", "rho_min", self.rho_min, 0.0, self.rho)
                check(self.lr_max is not None and self.lr_max > self.lr_min >= 0, "GSAM",
                      f"lr_max={self.lr_max!r} with rho_min", f"be above lr_min={self.lr_min}",
                      "a constant radius needs no rho_min")

    def estimate_gradient(self, objective: Objective) -> Any:
        """Combine the gradients at theta and at the perturbed weights; returns the loss of the first pass."""
        config: GSAM.Config = self.configs[GSAM]
        loss = super().estimate_gradient(objective)
        if config.rho:
            g, rho = masters_copy(self.host.gradient()), self._gsam_radius()
            move = adaptive_ascent(g, rho, "elementwise") if config.adaptive else ascent(g, rho)
            with self.displaced(move):
                objective()
            h = self.host.gradient()
            if config.alpha:
                combine_(self.host, h, gap_direction(g, h), 1.0, -config.alpha)
        return loss

    def _gsam_radius(self) -> float:
        config: GSAM.Config = self.configs[GSAM]
        if config.rho_min is None or config.lr_max is None:
            return config.rho
        lr = self.param_groups[0]["lr"]
        span = config.lr_max - config.lr_min
        above = min(max((float(lr) if not isinstance(lr, Tensor) else lr.item()) - config.lr_min, 0.0), span)
        return config.rho_min + (config.rho - config.rho_min) * above / span

    def cost(self) -> Cost:
        """One more pass while rho > 0."""
        return Cost(passes=1, transient_bytes=12, scalar_reductions=2) if self.configs[GSAM].rho else Cost()


