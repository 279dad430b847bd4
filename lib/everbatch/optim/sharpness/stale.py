"""Sharpness-aware minimisation with one pass per step, along an old gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from everbatch.contract import Cost
from everbatch.engines.named import ByName
from everbatch.engines.passes import Objective
from everbatch.engines.shards import Vector
from everbatch.errors import check_real, check_whole
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.sharpness.ascent import ascent

__all__ = ["StaleSAM"]


class StaleSAM(OptimizerMixin):
    """SAM with one pass per step: weights are displaced along the gradient of tau steps ago.

        e_t = rho * h_{t-tau} / (||h_{t-tau}|| + delta);   h_t = grad L(theta_t + e_t);   f = h_t

    The ascent direction needs nothing of step t, as ConAdv's adversarial batch needs nothing of it: staleness in place of a
    second pass. The first tau steps are plain. Running statistics are those of the displaced pass, the only one.

    Cost: no more passes; tau kept copies of the owned masters and two inside the step; one all-reduce of a scalar where
    sharded, and at ZeRO stages 1 and 2 one all-gather to publish the displaced weights.
    Order: any. Limits: one owner of the perturbation; global scope.
    Source: this library; the idea is ConAdv's (Liu et al. 2022, arXiv 2106.00221) moved from inputs to weights.
    """

    owns = ("perturbation",)
    moves_first = True
    example = {"rho": 0.3, "tau": 2}
    off = {"rho": 0.0}
    search = {"rho": (0.02, 0.05, 0.1), "tau": (1, 2)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        rho: float = 0.05
        """Radius of the perturbation, in parameter units; >= 0."""
        tau: int = 1
        """Age of the direction in steps; >= 1."""

        def __post_init__(self) -> None:
            check_real("StaleSAM", "rho", self.rho, 0.0, cure="pass rho=0 to switch it off")
            check_whole("StaleSAM", "tau", self.tau, 1)

    @dataclass
    class State:
        history: list[ByName] = field(default_factory=list)

    def estimate_gradient(self, objective: Objective) -> Any:
        """Take the gradient at weights displaced along an old one; returns the loss there."""
        config, history = self.configs[StaleSAM], self.states[StaleSAM].history
        if not config.rho:
            return super().estimate_gradient(objective)
        if len(history) < config.tau:
            loss = super().estimate_gradient(objective)
        else:
            old = history[0]
            shards = [s for s in self.host.shards if s.name in old]
            with self.displaced(ascent(old.over(self.host, shards), config.rho)):
                loss = super().estimate_gradient(objective)
        fresh = self.host.scratch.to_masters(self.host.gradient())
        self.on_apply(lambda: self._stale_keep(fresh))
        return loss

    def _stale_keep(self, fresh: Vector) -> None:
        state, tau = self.states[StaleSAM], self.configs[StaleSAM].tau
        kept = [*state.history, ByName.of(fresh)]
        state.history = kept[-tau:]
        for old in kept[:-tau]:
            old.give_to(self.host.scratch)

    def cost(self) -> Cost:
        """No more passes."""
        config = self.configs[StaleSAM]
        note = "the one pass runs at displaced weights: one more publication where working weights are copies"
        return Cost(state_bytes=4 * config.tau, transient_bytes=12, scalar_reductions=1, note=note) if config.rho else Cost()
