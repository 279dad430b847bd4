"""Sharpness-aware minimisation, plain and adaptive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from everbatch.contract import Cost
from everbatch.engines.passes import Objective
from everbatch.errors import check, check_real, check_whole
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.sharpness.ascent import (
    Scope,
    adaptive_ascent,
    ascent,
    check_interval,
    check_scope,
    group_gradient,
)

__all__ = ["ASAM", "SAM", "ascent"]


class SAM(OptimizerMixin):
    """Sharpness-aware minimisation: the gradient is taken where the loss is worst within a radius.

        g = grad L(theta);  e = rho * g / (||g|| + delta);  f = grad L(theta + e);  the base updates theta with f

    Pass 2 sees the same batch and the same dropout masks; running statistics move in pass 1 only; weights are restored bit for
    bit. With scope "global" the perturbation is the one of the global batch, the same at any world size and sharding.

    Args (Config): see the fields.

    Cost: one more pass (at every `interval`-th step); one copy of the owned masters, and of the direction; one all-reduce of
    a scalar where sharded. Scope "local" saves the gradient reduction of pass 1.
    Order: any. Clipping and projections act on f alone. Limits: one owner of the perturbation; "local" and "group" need
    working weights that are whole on every rank (plain, DDP, ZeRO 0 to 2), and leave penalties out of the direction.

    Source: Foret et al. 2021, arXiv 2010.01412. Differs: weight decay stays in the base optimizer, at theta (the authors put
    it into the loss); weights are copied back, not subtracted back, which is not exact.
    """

    owns = ("perturbation",)
    example = {"rho": 0.5}
    off = {"rho": 0.0}
    search = {"rho": (0.05, 0.02, 0.1, 0.2)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        rho: float = 0.05
        """Radius of the perturbation, in parameter units; >= 0."""
        delta: float = 1e-12
        """Guard added to the gradient norm; >= 0."""
        interval: int = 1
        """Steps between two perturbed ones; >= 1."""
        scope: Scope = "global"
        """Whose gradient perturbs: the global batch's, each rank's own (m-sharpness), or a group of ranks'."""
        group_size: int = 1
        """Ranks per group for scope="group"; divides the number of ranks."""

        def __post_init__(self) -> None:
            check_real("SAM", "rho", self.rho, 0.0, cure="pass rho=0 to switch it off")
            check_real("SAM", "delta", self.delta, 0.0)
            check_interval("SAM", self.interval)
            check(self.scope in ("global", "local", "group"), "SAM", f"scope={self.scope!r}", "be global, local or group")
            check_whole("SAM", "group_size", self.group_size, 1)

    def on_attach(self) -> None:
        """Refuse a scope the host cannot do."""
        config = self.configs[SAM]
        self._sam_group = check_scope(self.host, "SAM", config.scope, config.group_size)

    def estimate_gradient(self, objective: Objective) -> Any:
        """Take the gradient at the perturbed weights; returns the loss of the first pass."""
        config: SAM.Config = self.configs[SAM]
        if not config.rho or self.step_count % config.interval:
            return super().estimate_gradient(objective)
        if config.scope == "global" or self.host.world == 1:
            loss = super().estimate_gradient(objective)
            gradient = self.host.gradient()
        else:  # m-sharpness: this rank's own gradient
            loss = super().estimate_gradient(objective.apart())
            gradient = group_gradient(self.host, config.scope, self._sam_group)
        with self.displaced(gradient.of_length(config.rho, config.delta)):  # `ascent`
            objective()
        return loss

    def cost(self) -> Cost:
        """One more pass at perturbed steps, while rho > 0."""
        config = self.configs[SAM]
        share = 1 / config.interval
        return Cost(passes=share, transient_bytes=8, scalar_reductions=share) if config.rho else Cost()


class ASAM(OptimizerMixin):
    """Adaptive SAM: the radius is measured in units of the weights, so rescaled networks are perturbed alike.

        e = rho * T^2 g / (||T g|| + delta);  f = grad L(theta + e)

    Both published scalings: "official" T = |w| + eta where the name contains "weight", else 1; "elementwise" T = |w|.

    Cost: as SAM. Order: any. Limits: one owner of the perturbation; global scope.
    Source: Kwon et al. 2021, arXiv 2102.11600; delta as in the authors' code (1e-16) and the widespread variant (1e-12).
    """

    owns = ("perturbation",)
    example = {"rho": 0.5}
    off = {"rho": 0.0}
    search = {"rho": (0.2, 0.5, 1.0, 2.0)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        rho: float = 0.5
        """Radius in units of the weights; >= 0. About ten times SAM's."""
        adaptive: Literal["official", "elementwise"] = "official"
        """Scaling T."""
        eta: float = 0.01
        """Added to |w| by the official scaling, so that zeros move too; >= 0."""
        interval: int = 1
        """Steps between two perturbed ones; >= 1."""

        def __post_init__(self) -> None:
            check_real("ASAM", "rho", self.rho, 0.0, cure="pass rho=0 to switch it off")
            check_real("ASAM", "eta", self.eta, 0.0)
            check_interval("ASAM", self.interval)
            check(self.adaptive in ("official", "elementwise"), "ASAM", f"adaptive={self.adaptive!r}",
                  "be 'official' or 'elementwise'")

    def estimate_gradient(self, objective: Objective) -> Any:
        """Take the gradient at the perturbed weights; returns the loss of the first pass."""
        config: ASAM.Config = self.configs[ASAM]
        loss = super().estimate_gradient(objective)
        if config.rho and self.step_count % config.interval == 0:
            with self.displaced(adaptive_ascent(self.host.gradient(), config.rho, config.adaptive, config.eta)):
                objective()
        return loss

    def cost(self) -> Cost:
        """One more pass at perturbed steps, while rho > 0."""
        config = self.configs[ASAM]
        share = 1 / config.interval
        return Cost(passes=share, transient_bytes=12, scalar_reductions=share) if config.rho else Cost()
