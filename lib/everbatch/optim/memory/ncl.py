"""Natural continual learning: steps in the metric of what earlier tasks know of each weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from everbatch.contract import Cost, base_of
from everbatch.engines.named import ByName
from everbatch.errors import check, check_real
from everbatch.objective.table import ncl
from everbatch.objective.terms import WeightTerm
from everbatch.optim.memory.fisher import Estimator, Factory, Rows
from everbatch.optim.memory.importance import (
    accumulate,
    check_estimator,
    chosen_importance,
    slices,
)
from everbatch.optim.memory.pull import penalty, weights_now
from everbatch.optim.memory.replica import require_replica
from everbatch.optim.mixin import OptimizerMixin

__all__ = ["NCL", "natural_gradient"]


def natural_gradient(
    gradient: Tensor, away: Tensor, information: Tensor, prior: float, strength: float,
) -> Tensor:
    """prior * (Lambda^-1 g + 2 * strength * (theta - mu)), with  Lambda = prior + F.

    Elementwise; shapes are all the same. `away` is theta - mu, `information` F >= 0.
    """
    share = prior / (information + prior)
    return share * gradient.to(share) + (2.0 * strength * prior) * away.to(share)


class NCL(OptimizerMixin):
    """Natural continual learning: gradient steps in the metric of the accumulated precision, around the last task's weights.

        theta <- theta - lr * prior * (Lambda^-1 g + theta - mu)        Lambda = prior + sum_k F_k,    mu: the last task's weights

    That is natural-gradient descent on  L + 1/2 (theta - mu)' Lambda (theta - mu)  in the metric Lambda, and comes to rest where
    EWC with F = Lambda does; but on the way there, too, weights that earlier tasks know are moved little. F is the diagonal
    Fisher information of each task. `lr` keeps its meaning: a weight of which no task knows anything takes the base's step, and
    the paper's step size is lr * prior. Other strengths than 1/2 weigh the pull,  2 * strength * (theta - mu).

    Call `opt.consolidate_ncl(batches)` after a task, with its un-augmented data. The first task is trained by the base alone,
    and so is a parameter that was added or unfrozen until its own first task ends.

    Args (Config): see the fields. Raises `UnsupportedHost` at construction where `estimator` needs a replica and has none.

    Cost: two copies of the owned masters, kept; one inside a step; no pass and no collective in the step.
    Order: right of what limits the gradient (ClipGradNorm). Limits: SGD, as Adam would undo the metric; a parameter to which a
    pass gave no gradient is not pulled either.
    Source: Kao et al. 2021, arXiv 2106.08085, eq. 5 and 8. Differs: a diagonal precision, where the paper has Kronecker
    factors; `prior` scales the step.
    """

    called_by = "consolidate"
    between_tasks = True
    bases = ("SGD",)
    example = {"prior": 0.05}
    off = {"strength": 0.0}
    search = {"prior": (1e-4, 1e-5, 1e-3, 1e-2), "strength": (0.5, 0.05, 5.0)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        strength: float = 0.5
        """Factor on the quadratic, without a 1/2: 0.5 is the paper's; >= 0, 0 switches NCL off, and the metric with it."""
        prior: float = 1e-4
        """Precision of a weight of which no task knows anything, in the unit of F, a mean over samples; > 0."""
        estimator: Estimator | Literal["given"] = "empirical"
        """Which Fisher information `consolidate_ncl` estimates (see `fisher_sums`); "given": it must be handed in."""
        denominator: Literal["samples", "loader"] = "samples"
        """What sums are divided by: the samples, or batches * batch size."""
        chunk: int = 16
        """Samples differentiated at once, in memory chunk * weights; >= 1."""
        factory: Factory | None = None
        """Builds the bare model on the CPU; needed on ZeRO stage 3 and FSDP2 for the plain replica."""

        def __post_init__(self) -> None:
            check_real("NCL", "strength", self.strength, 0.0, cure="pass 0 to switch it off")
            check_real("NCL", "prior", self.prior, 0.0, open_low=True)
            check_estimator("NCL", self)

    @dataclass
    class State:
        importance: ByName = field(default_factory=ByName)
        """Sum of the tasks' F, without the prior."""
        mode: ByName = field(default_factory=ByName)
        tasks: int = 0

    def on_attach(self) -> None:
        """Refuse another base than SGD, and at once what a consolidation would refuse after hours."""
        config: NCL.Config = self.configs[NCL]
        base = base_of(type(self))
        assert base is not None
        check(issubclass(base, torch.optim.SGD), "NCL", f"base {base.__name__}", "be SGD", "another would undo the metric")
        if config.strength and config.estimator != "given":
            require_replica(self.host, config.factory, "NCL")

    def terms(self) -> tuple[WeightTerm, ...]:
        """The quadratic. Makes Lambda: a copy of the owned masters."""
        config: NCL.Config = self.configs[NCL]
        state: NCL.State = self.states[NCL]
        precision = {name: value + config.prior for name, value in state.importance.items()}
        return ncl(config.strength, precision, state.mode)

    def edit_gradient(self) -> None:
        """Turn the gradient into the natural one, the pull included."""
        super().edit_gradient()
        config: NCL.Config = self.configs[NCL]
        state: NCL.State = self.states[NCL]
        if not config.strength:
            return
        for shard, g in self.host.gradient():
            known = state.importance.get(shard.name)
            if known is None:
                continue
            away = shard.data - state.mode[shard.name]
            g.copy_(natural_gradient(g.to(known.device), away, known, config.prior, config.strength))

    @torch.no_grad()
    def consolidate_ncl(
        self, batches: Iterable[Rows] | None = None, *, importance: Mapping[str, Tensor] | None = None,
    ) -> None:
        """mu <- theta, Lambda <- Lambda + F. Between two steps, after a task. Collective.

        Arguments and errors are those of `EWC.consolidate_ewc`.
        """
        config: NCL.Config = self.configs[NCL]
        state: NCL.State = self.states[NCL]
        whole = chosen_importance(self, "NCL", config, batches, importance, state.tasks)
        known = ByName(state.importance)
        for name, f in slices(self.host, whole, "NCL").items():
            known[name] = accumulate(known.get(name), f, "online", 1.0, state.tasks)
        state.importance = known
        state.mode = ByName({**state.mode, **weights_now(self.host)})
        state.tasks += 1

    def at_task_end(self, rows: Iterable[Rows]) -> None:
        """`consolidate_ncl`."""
        self.consolidate_ncl(rows)

    @torch.no_grad()
    def ncl_penalty(self) -> Tensor:
        """The quadratic: 0-dim float64. One all-reduce where weights are sharded."""
        return penalty(self.host, NCL.terms(self))

    def cost(self) -> Cost:
        """Precision and mode."""
        if not self.configs[NCL].strength:
            return Cost()
        return Cost(state_bytes=8, transient_bytes=4, note="NCL: the gradient of L is divided by Lambda / prior")
