"""Elastic weight consolidation: every weight is pulled to where earlier tasks left it, by its
Fisher information."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from everbatch.contract import Cost
from everbatch.engines.named import ByName
from everbatch.errors import check, check_real
from everbatch.objective.table import ewc, online_ewc
from everbatch.objective.terms import WeightTerm
from everbatch.optim.memory.fisher import Estimator, Factory, Rows
from everbatch.optim.memory.importance import (
    accumulate,
    check_estimator,
    chosen_importance,
    slices,
)
from everbatch.optim.memory.pull import penalty, pull, weights_now
from everbatch.optim.memory.replica import require_replica
from everbatch.optim.mixin import OptimizerMixin

__all__ = ["EWC", "merge_quadratics"]


def merge_quadratics(
    importance: Tensor, anchor: Tensor, new: Tensor, weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two quadratics as one:  S (t - m)^2 + F (t - w)^2 = (S + F) (t - m')^2 + c.

        m' = m + F / (S + F) (w - m)

    Elementwise; shapes are all the same. Returns (S + F, m', c = S F / (S + F) (w - m)^2).
    Where S + F = 0: m' = w.
    """
    total = importance + new
    share = torch.where(total > 0, new / total, torch.ones_like(total))
    rest = importance * share * (weights - anchor).square()
    return total, torch.lerp(anchor, weights, share), rest


class EWC(OptimizerMixin):
    """Elastic weight consolidation: a quadratic around the weights that each task left, weighted by
    Fisher information.

        penalty   strength * sum_k sum_i F_k,i (theta_i - theta*_k,i)^2        gradient  2 * strength * F (theta - theta*)
        separate: one (F, theta*) for each task, summed
        online:   F <- gamma * F + F_new;              theta* <- theta
        mean:     F <- ((k - 1) F + F_new) / k;        theta* <- theta      k: tasks in which the parameter was trained

    There is no 1/2: `strength` is lambda of the papers' equations divided by 2, and lambda of most
    code (Mammoth's `e_lambda`). The gradient is added in closed form on shards after every pass, so
    a sharpness mixin and Refresh see it; the loss that the step returns is without the penalty,
    which `ewc_penalty()` gives. The sum of `separate` is kept as one quadratic, which it is: its
    memory does not grow with the tasks.

    Call `opt.consolidate_ewc(batches)` after a task, with its un-augmented data. The first task is
    trained without penalty, and so is a parameter that was added or unfrozen until its own first
    task ends; a frozen one keeps what it has. Sums are in fp32 at least. Compare strengths only
    between equal estimators: "reference" and "batch" give far smaller importances than "empirical".

    Args (Config): see the fields. Raises `UnsupportedHost` at construction where `estimator` needs
    a replica and has none.

    Cost: two copies of the owned masters, kept; one inside a pass; no pass and no collective in the
    step. A consolidation: see `diagonal_fisher`. Order: any. Limits: a parameter to which a pass
    gave no gradient is not pulled either.

    Source: Kirkpatrick et al. 2017, arXiv 1612.00796; online: Schwarz et al. 2018, arXiv
    1805.06370; convention of joey-wang123/CL-refresh-learning. Differs: importance in evaluation
    mode, on un-augmented data, divided by the true number of samples (`denominator="loader"` is the
    code's); each is an option or a matter of what is passed.
    """

    called_by = "consolidate"
    between_tasks = True
    makes = {"ewc": {"form": "separate"}, "online_ewc": {"form": "online"}}
    example = {"strength": 0.5}
    off = {"strength": 0.0}
    search = {"strength": (1.0, 10.0, 100.0, 1000.0)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        strength: float = 1.0
        """Factor on the penalty, without the 1/2 of the papers; >= 0, 0 switches it off."""
        form: Literal["separate", "online", "mean"] = "online"
        """How tasks are added up."""
        gamma: float = 1.0
        """form="online": factor on the importance so far; in [0, 1]."""
        estimator: Estimator | Literal["given"] = "empirical"
        """Which Fisher information `consolidate_ewc` estimates (see `fisher_sums`); "given": it
        must be handed in."""
        denominator: Literal["samples", "loader"] = "samples"
        """What sums are divided by: the samples, or batches * batch size as the reference code."""
        chunk: int = 16
        """Samples differentiated at once, in memory chunk * weights; >= 1."""
        factory: Factory | None = None
        """Builds the bare model on the CPU; needed on ZeRO stage 3 and FSDP2 for the plain
        replica."""

        def __post_init__(self) -> None:
            check_real("EWC", "strength", self.strength, 0.0, cure="pass 0 to switch it off")
            check_real("EWC", "gamma", self.gamma, 0.0, 1.0)
            check(self.form in ("separate", "online", "mean"), "EWC", f"form={self.form!r}", "be separate, online or mean")
            check_estimator("EWC", self)

    @dataclass
    class State:
        importance: ByName = field(default_factory=ByName)
        anchor: ByName = field(default_factory=ByName)
        tasks: int = 0
        averaged: dict[str, int] = field(default_factory=dict)
        """Tasks in each parameter's importance: those in which it was trained."""
        constant: float = 0.0
        """form="separate": what the sum of the tasks' penalties is above the one quadratic that is
        kept."""

    def on_attach(self) -> None:
        """Refuse at once what a consolidation would refuse after hours."""
        config: EWC.Config = self.configs[EWC]
        if config.strength and config.estimator != "given":
            require_replica(self.host, config.factory, "EWC")

    def terms(self) -> tuple[WeightTerm, ...]:
        """The penalty."""
        config: EWC.Config = self.configs[EWC]
        state: EWC.State = self.states[EWC]
        if config.form == "separate":
            return ewc(config.strength, state.importance, state.anchor, state.constant)
        return online_ewc(config.strength, state.importance, state.anchor)

    def add_penalty(self) -> None:
        """Pull towards the anchor."""
        super().add_penalty()
        pull(self.host, EWC.terms(self))

    @torch.no_grad()
    def consolidate_ewc(
        self, batches: Iterable[Rows] | None = None, *, importance: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Remember the present weights and how much each matters. Between two steps, after a task.
        Collective.

        Args:
            batches: this rank's rows of the task's data: (inputs, targets), or with ids third; see
                `diagonal_fisher`.
            importance: instead of it, whole importances by name, the same on every rank; >= 0.

        Raises:
            ValueError: both or neither; importances that do not fit the model, negative or not
                finite. Nothing is touched.
        """
        config: EWC.Config = self.configs[EWC]
        state: EWC.State = self.states[EWC]
        whole = chosen_importance(self, "EWC", config, batches, importance, state.tasks)
        new = slices(self.host, whole, "EWC")
        weights = weights_now(self.host)
        old, anchor = state.importance, state.anchor
        constant = torch.zeros((), dtype=torch.float64, device=self.host.device)
        for name, f in new.items():
            if name in old and config.form == "separate":
                merged = merge_quadratics(old[name].to(f), anchor[name].to(f), f, weights[name])
                old[name], anchor[name], rest = merged
                constant += rest.sum(dtype=torch.float64).to(constant)
            else:
                seen = state.averaged.get(name, 0)
                old[name] = accumulate(old.get(name), f, config.form, config.gamma, seen)
                anchor[name] = weights[name]
        state.constant += self.host.total(constant).item()
        state.tasks += 1
        counted = {name: state.averaged.get(name, 0) + 1 for name in self.host.names}
        state.averaged = {**state.averaged, **counted}

    def at_task_end(self, rows: Iterable[Rows]) -> None:
        """`consolidate_ewc`."""
        self.consolidate_ewc(rows)

    @torch.no_grad()
    def ewc_penalty(self) -> Tensor:
        """The term whose gradient is added: 0-dim float64. One all-reduce where weights are
        sharded."""
        return penalty(self.host, EWC.terms(self))

    def cost(self) -> Cost:
        """Importance and anchor."""
        return Cost(state_bytes=8, transient_bytes=4) if self.configs[EWC].strength else Cost()
