"""IGNITE: keep the gradient norm of a model's mean output under a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everbatch.contract import Cost
from everbatch.engines.passes import Objective
from everbatch.engines.shards import Vector
from everbatch.errors import check_real
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.sharpness.ascent import ascent, masters_copy, paired

__all__ = ["Ignite"]


class Ignite(OptimizerMixin):
    """Minimise L subject to rho * ||grad G|| <= budget, G the model's mean output; a Lagrangian with a moving multiplier.

        g = grad L;  u = grad G;  n = ||u||;  u' = grad G(theta + r * u / n)
        f = g + lambda * (rho / r) * (u' - u);   lambda <- lambda + rate * (rho * n - budget)

    Needs `opt.step(closure, output=fn)`, fn running forward on clean inputs, calling opt.backward(G) and returning G, a scalar
    of your choice (for a surrogate its mean prediction; there is no default to guess). The update of f uses the old lambda;
    lambda is then projected to >= 0 unless project=False, as released: there it drifts negative while the constraint holds,
    and rewards sharpness. rate = 0 keeps lambda fixed (IGNITE-2).

    Cost: two more passes; two copies of the owned masters, the direction; one all-reduce of a scalar where sharded.
    Order: any. Limits: one owner of the perturbation; global scope. Parameters that no pass of G reaches are left alone.
    Source: Dao et al. 2024, arXiv 2503.04242, and the authors' code.
    """

    owns = ("perturbation",)
    needs = ("output",)
    example = {"rho": 0.5, "rate": 0.1, "budget": 0.01, "multiplier": 0.1}
    off = {"multiplier": 0.0, "rate": 0.0}
    search = {"rho": (0.01, 0.05, 0.1)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        rho: float = 0.05
        """Radius of the constraint, in parameter units; >= 0."""
        radius: float = 0.05
        """r, the length of the finite difference; > 0."""
        budget: float = 0.1
        """Upper bound on rho * ||grad G||; >= 0."""
        multiplier: float = 1e-3
        """lambda before the first step; >= 0, and 0 with rate=0 switches the method off."""
        rate: float = 1e-3
        """Step of the multiplier; >= 0, 0 keeps it fixed."""
        project: bool = True
        """Keep the multiplier >= 0; False as released."""

        def __post_init__(self) -> None:
            for name in ("rho", "budget", "multiplier", "rate"):
                check_real("Ignite", name, getattr(self, name), 0.0)
            check_real("Ignite", "radius", self.radius, 0.0, open_low=True)

    @dataclass
    class State:
        multiplier: Tensor | None = None

    def estimate_gradient(self, objective: Objective) -> Any:
        """Add the constraint's gradient; returns the loss of the first pass."""
        config, state = self.configs[Ignite], self.states[Ignite]
        loss = super().estimate_gradient(objective)
        if not config.multiplier and not config.rate:
            return loss
        if state.multiplier is None:
            state.multiplier = torch.tensor(config.multiplier, dtype=torch.float64, device=self.host.device)
        g = masters_copy(self.host.gradient())
        objective("output")
        u = masters_copy(self.host.gradient())
        norm = u.norm()
        with self.displaced(ascent(u, config.radius)):
            objective("output")
        there, here = paired(masters_copy(self.host.gradient()), u)
        difference = there.add_(here, -1.0)
        self.host.set_gradient(_plus(g, difference, state.multiplier * (config.rho / config.radius)))
        after = state.multiplier + config.rate * (config.rho * norm - config.budget)
        self.metrics |= {"ignite_multiplier": state.multiplier, "ignite_output_gradient_norm": norm}
        self.on_apply(lambda: self._ignite_keep(after.clamp(min=0.0) if config.project else after))
        return loss

    def _ignite_keep(self, multiplier: Tensor) -> None:
        self.states[Ignite].multiplier = multiplier

    def cost(self) -> Cost:
        """Two more passes."""
        config = self.configs[Ignite]
        on = config.multiplier or config.rate
        return Cost(passes=2, transient_bytes=16, scalar_reductions=1) if on else Cost()


def _plus(g: Vector, difference: Vector, scale: Tensor) -> Vector:
    """g + scale * difference over the union of their parameters."""
    more = {s.name: (s, t) for s, t in difference}
    names = {s.name for s in g.shards}
    tensors = [t.add_(more[s.name][1] * scale.to(t)) if s.name in more else t for s, t in g]
    rest = [(s, t * scale.to(t)) for n, (s, t) in more.items() if n not in names]
    return Vector(g.host, [*g.shards, *(s for s, _ in rest)], [*tensors, *(t for _, t in rest)])
