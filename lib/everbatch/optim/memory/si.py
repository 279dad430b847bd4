"""Synaptic intelligence: every weight is pulled to where earlier tasks left it, by what it did for
their losses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from everbatch.contract import Cost
from everbatch.engines.named import ByName
from everbatch.engines.passes import Objective
from everbatch.engines.shards import wide
from everbatch.errors import check, check_real
from everbatch.objective import table
from everbatch.objective.terms import WeightTerm
from everbatch.optim.memory.fisher import Rows
from everbatch.optim.memory.pull import penalty, pull, weights_now
from everbatch.optim.mixin import OptimizerMixin

__all__ = ["SI", "path_importance"]


def path_importance(importance: Tensor, contribution: Tensor, weights: Tensor, anchor: Tensor, xi: float) -> Tensor:
    """SI's importance after a task:  Omega + omega / ((theta - theta*)^2 + xi). Elementwise."""
    return importance + contribution / ((weights - anchor).square() + xi)


class SI(OptimizerMixin):
    """Synaptic intelligence: importance is what each weight did for the loss along the path it
    took.

        penalty        strength * sum_i Omega_i (theta_i - theta*_i)^2         gradient  2 * strength * Omega (theta - theta*)
        path_integral  omega += g * (theta_before - theta_after)     g: gradient of the data loss alone, before any clipping
        grad_square    omega += lr * f^2                             f: the gradient that the base optimizer is given
        after a task   Omega += omega / ((theta - theta*)^2 + xi);   theta* <- theta;   omega <- 0

    g is the reduced gradient of the recorded pass (at theta, not where a sharpness mixin moves it);
    the displacement is that of the base's update. Call `opt.consolidate_si()` after a task; it
    needs no data. theta* of the first task is where training began, for a parameter that was added
    or unfrozen where its own began; a frozen one keeps all three, Omega, omega and theta*, in fp32
    at least. The references clip gradients by value 1 before the update: compose with such a clip
    for their numbers.

    Cost: three copies of the owned masters, kept; two more inside a step (path_integral); no pass,
    no collective.
    Order: left of LARS and LAMB, whose update it measures; it reads the data gradient before any
    mixin adds a penalty.
    Limits: a parameter to which a pass gave no gradient is not pulled either. Importance may be
    negative, as in the references.

    Source: Zenke et al. 2017, arXiv 1703.04200; rules of aimagelab/mammoth (path_integral) and of
    joey-wang123/CL-refresh-learning (grad_square).
    """

    left_of = ("trust ratio",)
    called_by = "consolidate"
    between_tasks = True
    example = {"strength": 0.5, "xi": 0.1}
    off = {"strength": 0.0}
    search = {"strength": (0.1, 0.01, 1.0), "xi": (0.1, 1.0)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        strength: float = 1.0
        """Factor c on the penalty; >= 0, 0 switches SI off."""
        xi: float = 1.0
        """Damping of the division by the squared displacement, in squared parameter units; > 0."""
        rule: Literal["path_integral", "grad_square"] = "path_integral"
        """How a step's contribution is counted."""

        def __post_init__(self) -> None:
            check_real("SI", "strength", self.strength, 0.0, cure="pass 0 to switch it off")
            check_real("SI", "xi", self.xi, 0.0, open_low=True)
            check(self.rule in ("path_integral", "grad_square"), "SI", f"rule={self.rule!r}", "be path_integral or grad_square")

    @dataclass
    class State:
        importance: ByName = field(default_factory=ByName)
        contribution: ByName = field(default_factory=ByName)
        """omega, of the task under way."""
        anchor: ByName = field(default_factory=ByName)

    _si_gradient: dict[str, Tensor] | None = None
    """The data gradient of the recorded pass of the step under way."""

    def terms(self) -> tuple[WeightTerm, ...]:
        """The penalty."""
        state: SI.State = self.states[SI]
        return table.si(self.configs[SI].strength, state.importance, state.anchor)

    def estimate_gradient(self, objective: Objective) -> Any:
        """Let the first pass from here on be the one that is read."""
        self._si_gradient = None
        return super().estimate_gradient(objective)

    def add_penalty(self) -> None:
        """Read the data gradient, then pull towards the anchor."""
        config: SI.Config = self.configs[SI]
        reads = config.strength and config.rule == "path_integral" and self._si_gradient is None
        if reads and self._objective is not None and self._objective.recorded:
            self._si_gradient = {}
            for shard in self.host.shards:
                gradient, data = shard.grad, shard.data
                if gradient is not None:
                    kept = gradient.to(data.device, wide(data), copy=True)
                    self._si_gradient[shard.name] = kept
        super().add_penalty()
        pull(self.host, SI.terms(self))

    def update(self) -> None:
        """Count what the update contributes."""
        config: SI.Config = self.configs[SI]
        state: SI.State = self.states[SI]
        if not config.strength:
            super().update()
            return
        # The first step, or parameters that came later: their path begins here.
        if any(shard.name not in state.anchor for shard in self.host.shards):
            state.anchor = ByName({**weights_now(self.host), **state.anchor})
        if config.rule == "path_integral":
            before = weights_now(self.host)
            super().update()
            added = self._si_path(before)
            self._si_gradient = None
        else:
            added = self._si_squares()
            super().update()
        for name, value in added.items():
            old = state.contribution.get(name)
            state.contribution[name] = value if old is None else old + value

    def _si_path(self, before: ByName) -> dict[str, Tensor]:
        """Gradient times displacement, of what the pass reached."""
        gradient, added = self._si_gradient or {}, {}
        for shard in self.host.shards:
            name = shard.name
            if name in gradient and name not in self.host.unreached:
                added[name] = gradient[name] * (before[name] - shard.data)
        return added

    def _si_squares(self) -> dict[str, Tensor]:
        """lr times the square of the gradient that the base optimizer is given."""
        added = {}
        for shard in self.host.shards:
            gradient, data = shard.grad, shard.data
            if gradient is not None:
                square = gradient.to(data.device, wide(data)).square()
                added[shard.name] = square * shard.group["lr"]
        return added

    @torch.no_grad()
    def consolidate_si(self) -> None:
        """Turn the path since the last call into importance. Between two steps, after a task. No
        collective, no data."""
        config: SI.Config = self.configs[SI]
        state: SI.State = self.states[SI]
        weights = weights_now(self.host)
        for name, here in weights.items():
            path = state.contribution.get(name)
            if path is not None:
                old = state.importance.get(name, torch.zeros_like(here))
                state.importance[name] = path_importance(
                    old, path, here, state.anchor[name], config.xi)
        if config.strength:
            state.anchor = ByName({**state.anchor, **weights})
            # What is frozen now goes on with its path when it is trained again.
            frozen = {n: path for n, path in state.contribution.items() if n not in weights}
            state.contribution = ByName(frozen)

    def at_task_end(self, rows: Iterable[Rows]) -> None:
        """`consolidate_si`."""
        self.consolidate_si()

    @torch.no_grad()
    def si_penalty(self) -> Tensor:
        """The term whose gradient is added: 0-dim float64. One all-reduce where weights are
        sharded."""
        return penalty(self.host, SI.terms(self))

    def cost(self) -> Cost:
        """Importance, contribution and anchor; inside the step the data gradient and the weights
        before."""
        config: SI.Config = self.configs[SI]
        if not config.strength:
            return Cost()
        return Cost(state_bytes=12, transient_bytes=8 if config.rule == "path_integral" else 4)
