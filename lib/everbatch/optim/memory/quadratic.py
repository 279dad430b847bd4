"""Quadratic memory: EWC, SI and MAS pull every weight to where earlier tasks left it, by its importance to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from everbatch.contract import Cost
from everbatch.engines.host import Host
from everbatch.engines.passes import Objective
from everbatch.engines.shards import ByName, wide
from everbatch.errors import check, check_real, check_whole
from everbatch.optim.memory.fisher import (
    ESTIMATORS,
    Estimator,
    Factory,
    Rows,
    diagonal_fisher,
    output_sensitivity,
    require_replica,
    slices,
)
from everbatch.optim.mixin import OptimizerMixin

__all__ = ["EWC", "MAS", "SI", "merge_quadratics", "path_importance"]


# ---------------------------------------------------------------------------------------------------------- kernels
def merge_quadratics(importance: Tensor, anchor: Tensor, new: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two quadratics as one:  S (t - m)^2 + F (t - w)^2 = (S + F) (t - m')^2 + c,  m' = m + F/(S+F) (w - m).

    Elementwise; shapes are all the same. Returns (S + F, m', c = S F / (S + F) (w - m)^2). Where S + F = 0: m' = w.
    """
    total = importance + new
    share = torch.where(total > 0, new / total, torch.ones_like(total))
    return total, torch.lerp(anchor, weights, share), importance * share * (weights - anchor).square()


def path_importance(importance: Tensor, contribution: Tensor, weights: Tensor, anchor: Tensor, xi: float) -> Tensor:
    """SI's importance after a task:  Omega + omega / ((theta - theta*)^2 + xi). Elementwise."""
    return importance + contribution / ((weights - anchor).square() + xi)


def _pull(host: Host, strength: float, importance: ByName, anchor: ByName) -> None:
    """grad += 2 * strength * importance * (theta - anchor), on this rank's slices; no collective."""
    if not strength:
        return
    # Also of parameters that the pass did not reach: the term depends on them all.
    held = [(s.data, g, importance[s.name], anchor[s.name]) for s in host.shards
            if s.name in importance and (g := host.claim(s)) is not None]
    if not held:
        return
    data, grads, factors, anchors = (list(part) for part in zip(*held, strict=True))
    away = torch._foreach_sub(data, anchors)
    if all(g.dtype == f.dtype == a.dtype and g.device == a.device for g, f, a in zip(grads, factors, away, strict=True)):
        torch._foreach_addcmul_(grads, factors, away, value=2.0 * strength)
    else:
        for g, f, a in zip(grads, factors, away, strict=True):
            g.add_((f * a).to(g), alpha=2.0 * strength)


def _value(host: Host, importance: ByName, anchor: ByName) -> Tensor:
    """sum importance * (theta - anchor)^2 over the whole model: 0-dim float64. One all-reduce where weights are sharded."""
    value = torch.zeros((), dtype=torch.float64, device=host.device)
    for s in host.shards:
        if s.name in importance:
            value += (importance[s.name] * (s.data - anchor[s.name]).square()).sum(dtype=torch.float64).to(value)
    return host.total(value)


def _weights(host: Host) -> ByName:
    """A copy of the masters, in fp32 at least, so that differences from it are."""
    return ByName({s.name: s.data.to(wide(s.data), copy=True) for s in host.shards})


# ------------------------------------------------------------------------------------------------------------ mixins
class EWC(OptimizerMixin):
    """Elastic weight consolidation: a quadratic around the weights that each task left, weighted by Fisher information.

        penalty   strength * sum_k sum_i F_k,i (theta_i - theta*_k,i)^2        gradient  2 * strength * F (theta - theta*)
        separate: one (F, theta*) for each task, summed
        online:   F <- gamma * F + F_new;              theta* <- theta
        mean:     F <- ((k - 1) F + F_new) / k;        theta* <- theta      k: tasks in which the parameter was trained

    There is no 1/2: `strength` is lambda of the papers' equations divided by 2, and lambda of most code (Mammoth's `e_lambda`).
    The gradient is added in closed form on shards after every pass, so a sharpness mixin and Refresh see it; the loss that the
    step returns is without the penalty, which `ewc_penalty()` gives. The sum of `separate` is kept as one quadratic, which it
    is: its memory does not grow with the tasks.

    Call `opt.consolidate_ewc(batches)` after a task, with its un-augmented data. The first task is trained without penalty, and
    so is a parameter that was added or unfrozen until its own first task ends; a frozen one keeps what it has. Sums are in fp32
    at least. Compare strengths only between equal estimators: "reference" and "batch" give far smaller importances than
    "empirical".

    Args (Config): see the fields. Raises `UnsupportedHost` at construction where `estimator` needs a replica and has none.

    Cost: two copies of the owned masters, kept; one inside a pass; no pass and no collective in the step. A consolidation:
    see `diagonal_fisher`. Order: any. Limits: a parameter to which a pass gave no gradient is not pulled either.

    Source: Kirkpatrick et al. 2017, arXiv 1612.00796; online: Schwarz et al. 2018, arXiv 1805.06370; convention of
    joey-wang123/CL-refresh-learning. Differs: importance in evaluation mode, on un-augmented data, divided by the true number
    of samples (`denominator="loader"` is the code's); each is an option or a matter of what is passed.
    """

    called_by = "consolidate"
    between_tasks = True
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
        """Which Fisher information `consolidate_ewc` estimates (see `fisher_sums`); "given": it must be handed in."""
        denominator: Literal["samples", "loader"] = "samples"
        """What sums are divided by: the samples, or batches * batch size as the reference code."""
        chunk: int = 16
        """Samples differentiated at once, in memory chunk * weights; >= 1."""
        factory: Factory | None = None
        """Builds the bare model on the CPU; needed on ZeRO stage 3 and FSDP2 for the plain replica."""

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
        """form="separate": what the sum of the tasks' penalties is above the one quadratic that is kept."""

    def on_attach(self) -> None:
        """Refuse at once what a consolidation would refuse after hours."""
        config: EWC.Config = self.configs[EWC]
        if config.strength and config.estimator != "given":
            require_replica(self.host, config.factory, "EWC")

    def add_penalty(self) -> None:
        """Pull towards the anchor."""
        super().add_penalty()
        state: EWC.State = self.states[EWC]
        _pull(self.host, self.configs[EWC].strength, state.importance, state.anchor)

    @torch.no_grad()
    def consolidate_ewc(
        self, batches: Iterable[Rows] | None = None, *, importance: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Remember the present weights and how much each matters. Between two steps, after a task. Collective.

        Args:
            batches: this rank's rows of the task's data: (inputs, targets), or with ids third; see `diagonal_fisher`.
            importance: instead of it, whole importances by name, the same on every rank; >= 0.

        Raises:
            ValueError: both or neither; importances that do not fit the model, negative or not finite. Nothing is touched.
        """
        config: EWC.Config = self.configs[EWC]
        state: EWC.State = self.states[EWC]
        new = slices(self.host, chosen_importance(self, "EWC", config, batches, importance, state.tasks), "EWC")
        constant = torch.zeros((), dtype=torch.float64, device=self.host.device)
        old, anchor, weights = state.importance, state.anchor, _weights(self.host)
        for s in self.host.shards:
            f = new[s.name]
            if s.name in old and config.form == "separate":
                old[s.name], anchor[s.name], rest = merge_quadratics(old[s.name].to(f), anchor[s.name].to(f), f, weights[s.name])
                constant += rest.sum(dtype=torch.float64).to(constant)
            else:
                old[s.name] = accumulate(old.get(s.name), f, config.form, config.gamma, state.averaged.get(s.name, 0))
                anchor[s.name] = weights[s.name]
        state.constant += self.host.total(constant).item()
        state.tasks += 1
        state.averaged = {**state.averaged, **{n: state.averaged.get(n, 0) + 1 for n in self.host.names}}

    def at_task_end(self, rows: Iterable[Rows]) -> None:
        """`consolidate_ewc`."""
        self.consolidate_ewc(rows)

    @torch.no_grad()
    def ewc_penalty(self) -> Tensor:
        """The term whose gradient is added: 0-dim float64. One all-reduce where weights are sharded."""
        state: EWC.State = self.states[EWC]
        return (_value(self.host, state.importance, state.anchor) + state.constant) * self.configs[EWC].strength  # type: ignore[no-any-return]

    def cost(self) -> Cost:
        """Importance and anchor."""
        return Cost(state_bytes=8, transient_bytes=4) if self.configs[EWC].strength else Cost()


class SI(OptimizerMixin):
    """Synaptic intelligence: importance is what each weight did for the loss along the path it took.

        penalty        strength * sum_i Omega_i (theta_i - theta*_i)^2         gradient  2 * strength * Omega (theta - theta*)
        path_integral  omega += g * (theta_before - theta_after)     g: gradient of the data loss alone, before any clipping
        grad_square    omega += lr * f^2                             f: the gradient that the base optimizer is given
        after a task   Omega += omega / ((theta - theta*)^2 + xi);   theta* <- theta;   omega <- 0

    g is the reduced gradient of the recorded pass (at theta, not where a sharpness mixin moves it); the displacement is that of
    the base's update. Call `opt.consolidate_si()` after a task; it needs no data. theta* of the first task is where training
    began, for a parameter that was added or unfrozen where its own began; a frozen one keeps all three, Omega, omega and theta*,
    in fp32 at least. The references clip gradients by value 1 before the update: compose with such a clip for their numbers.

    Cost: three copies of the owned masters, kept; two more inside a step (path_integral); no pass, no collective.
    Order: left of LARS and LAMB, whose update it measures; it reads the data gradient before any mixin adds a penalty.
    Limits: a parameter to which a pass gave no gradient is not pulled either. Importance may be negative, as in the references.

    Source: Zenke et al. 2017, arXiv 1703.04200; rules of aimagelab/mammoth (path_integral) and of
    joey-wang123/CL-refresh-learning (grad_square).
    """

    left_of = ("LARS", "LAMB")
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

    def estimate_gradient(self, objective: Objective) -> Any:
        """Let the first pass from here on be the one that is read."""
        self._si_gradient = None
        return super().estimate_gradient(objective)

    def add_penalty(self) -> None:
        """Read the data gradient, then pull towards the anchor."""
        config, state = self.configs[SI], self.states[SI]
        if config.strength and config.rule == "path_integral" and self._si_gradient is None \
                and self._objective is not None and self._objective.recorded:
            self._si_gradient = {s.name: g.to(s.data.device, wide(s.data), copy=True) for s in self.host.shards
                                 if (g := s.grad) is not None}
        super().add_penalty()
        _pull(self.host, config.strength, state.importance, state.anchor)

    def update(self) -> None:
        """Count what the update contributes."""
        config, state = self.configs[SI], self.states[SI]
        if not config.strength:
            super().update()
            return
        if any(s.name not in state.anchor for s in self.host.shards):  # the first step, or parameters that came later
            state.anchor = ByName({**_weights(self.host), **state.anchor})
        if config.rule == "path_integral":
            gradient, before = self._si_gradient or {}, _weights(self.host)
            super().update()
            added = {s.name: gradient[s.name] * (before[s.name] - s.data) for s in self.host.shards
                     if s.name in gradient and s.name not in self.host.unreached}
            self._si_gradient = None
        else:
            added = {s.name: g.to(s.data.device, wide(s.data)).square() * s.group["lr"] for s in self.host.shards
                     if (g := s.grad) is not None}
            super().update()
        for name, value in added.items():
            state.contribution[name] = state.contribution[name] + value if name in state.contribution else value

    @torch.no_grad()
    def consolidate_si(self) -> None:
        """Turn the path since the last call into importance. Between two steps, after a task. No collective, no data."""
        config, state = self.configs[SI], self.states[SI]
        weights = _weights(self.host)
        for name, here in weights.items():
            if name in state.contribution:
                old = state.importance.get(name, torch.zeros_like(here))
                state.importance[name] = path_importance(old, state.contribution[name], here, state.anchor[name], config.xi)
        if config.strength:
            state.anchor = ByName({**state.anchor, **weights})
            state.contribution = ByName({n: kept for n, kept in state.contribution.items() if n not in weights})

    def at_task_end(self, rows: Iterable[Rows]) -> None:
        """`consolidate_si`."""
        self.consolidate_si()

    @torch.no_grad()
    def si_penalty(self) -> Tensor:
        """The term whose gradient is added: 0-dim float64. One all-reduce where weights are sharded."""
        state: SI.State = self.states[SI]
        return _value(self.host, state.importance, state.anchor) * self.configs[SI].strength  # type: ignore[no-any-return]

    def cost(self) -> Cost:
        """Importance, contribution and anchor; inside the step the data gradient and the weights before."""
        config: SI.Config = self.configs[SI]
        if not config.strength:
            return Cost()
        return Cost(state_bytes=12, transient_bytes=8 if config.rule == "path_integral" else 4)


class MAS(OptimizerMixin):
    """Memory-aware synapses: importance is how much the outputs depend on each weight; no labels.

        penalty  strength * sum_i Omega_i (theta_i - theta*_i)^2         gradient  2 * strength * Omega (theta - theta*)
        Omega_new = mean_i |d ||u(x_i)||^2|;     Omega <- retain * Omega + (1 - retain) * Omega_new;     first task: Omega_new

    Call `opt.consolidate_mas(batches)` after a task. For what else holds see EWC.

    Cost: as EWC; one backward per sample in a consolidation. Order: any.

    Source: Aljundi et al. 2018, arXiv 1711.09601; moving average of Avalanche. Differs from Avalanche: per-sample gradients, the
    paper's definition, by default, because the mean over a batch depends on how the data is cut into batches and ranks.
    """

    called_by = "consolidate"
    between_tasks = True
    example = {"strength": 0.05}
    off = {"strength": 0.0}
    search = {"strength": (1.0, 0.1, 10.0)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        strength: float = 1.0
        """Factor on the penalty; >= 0, 0 switches it off."""
        retain: float = 0.5
        """Weight of the importance so far; in [0, 1]."""
        per_sample: bool = True
        """Absolute gradient of each sample (the paper), or of each batch's mean (Avalanche)."""
        chunk: int = 16
        """Samples differentiated at once, in memory chunk * weights; >= 1."""
        factory: Factory | None = None
        """Builds the bare model on the CPU; needed on ZeRO stage 3 and FSDP2 for the plain replica."""

        def __post_init__(self) -> None:
            check_real("MAS", "strength", self.strength, 0.0, cure="pass 0 to switch it off")
            check_real("MAS", "retain", self.retain, 0.0, 1.0)
            check_whole("MAS", "chunk", self.chunk, 1)

    @dataclass
    class State:
        importance: ByName = field(default_factory=ByName)
        anchor: ByName = field(default_factory=ByName)
        tasks: int = 0

    def on_attach(self) -> None:
        """Refuse at once what a consolidation would refuse after hours."""
        config: MAS.Config = self.configs[MAS]
        if config.strength:
            require_replica(self.host, config.factory, "MAS")

    def add_penalty(self) -> None:
        """Pull towards the anchor."""
        super().add_penalty()
        state: MAS.State = self.states[MAS]
        _pull(self.host, self.configs[MAS].strength, state.importance, state.anchor)

    @torch.no_grad()
    def consolidate_mas(self, batches: Iterable[Rows]) -> None:
        """Remember the present weights and how much the outputs depend on each. Between two steps, after a task. Collective.

        Args:
            batches: this rank's rows of the task's data; of each item only the first tensor, the inputs, is used.
        """
        config, state = self.configs[MAS], self.states[MAS]
        new = slices(self.host, output_sensitivity(self, batches, per_sample=config.per_sample, chunk=config.chunk,
                                                   factory=config.factory), "MAS")
        for name, old in state.importance.items():
            # What was added or unfrozen since is in its first task; what is frozen keeps its importance and its anchor.
            new[name] = torch.lerp(new[name], old.to(new[name]), config.retain) if name in new else old
        state.importance, state.anchor = new, ByName({**state.anchor, **_weights(self.host)})
        state.tasks += 1

    def at_task_end(self, rows: Iterable[Rows]) -> None:
        """`consolidate_mas`."""
        self.consolidate_mas(rows)

    @torch.no_grad()
    def mas_penalty(self) -> Tensor:
        """The term whose gradient is added: 0-dim float64. One all-reduce where weights are sharded."""
        state: MAS.State = self.states[MAS]
        return _value(self.host, state.importance, state.anchor) * self.configs[MAS].strength  # type: ignore[no-any-return]

    def cost(self) -> Cost:
        """Importance and anchor."""
        return Cost(state_bytes=8, transient_bytes=4) if self.configs[MAS].strength else Cost()


# ------------------------------------------------------------------------------------------------- shared with Refresh
def check_estimator(who: str, config: Any) -> None:
    """Check the fields estimator, denominator and chunk."""
    allowed = (*ESTIMATORS, "given")
    check(config.estimator in allowed, who, f"estimator={config.estimator!r}", f"be one of {', '.join(allowed)}")
    check(config.denominator in ("samples", "loader"), who, f"denominator={config.denominator!r}", "be samples or loader")
    check_whole(who, "chunk", config.chunk, 1)


def chosen_importance(
    opt: OptimizerMixin, who: str, config: Any, batches: Iterable[Rows] | None,
    importance: Mapping[str, Tensor] | None, draw: int,
) -> Mapping[str, Tensor]:
    """Whole importances: those given, or the Fisher information of the batches."""
    check((batches is None) != (importance is None), who, "both or neither of batches and importance", "be exactly one")
    if importance is not None:
        return importance
    check(config.estimator != "given", who, "batches for estimator='given'", "be importance=...",
          f"build with {who.lower()}_estimator='empirical', or pass importance=diagonal_fisher(opt, batches)")
    assert batches is not None
    return diagonal_fisher(opt, batches, config.estimator, chunk=config.chunk, denominator=config.denominator,
                           factory=config.factory, draw=draw)


def accumulate(old: Tensor | None, new: Tensor, form: str, gamma: float, tasks: int) -> Tensor:
    """Importance after a further task: gamma * old + new, or for form="mean" the running mean of all tasks."""
    if old is None or not tasks:
        return new
    return (old * tasks + new) / (tasks + 1) if form == "mean" else old * gamma + new
