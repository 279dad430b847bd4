"""Sharpness-aware minimisation for less than two passes per step: periodic, and with a stale direction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from everbatch.contract import Cost
from everbatch.engines.passes import Objective
from everbatch.engines.shards import ByName, Vector, inner
from everbatch.errors import check, check_real, check_whole
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.sharpness.ascent import ascent, masters_copy, paired

__all__ = ["LookSAM", "StaleSAM"]


class LookSAM(OptimizerMixin):
    """SAM at every k-th step; in between, the part of its gradient that flattened is re-used.

        step t with t mod k = 0:  f = h,  g_v = h - (<h,g>/||g||^2) g
        other steps:              f = g + alpha * ||g|| / (||g_v|| + delta) * g_v          one pass

    Norms and products are over the whole model, or per tensor (as the public implementations do). A run that resumes without
    a g_v takes a full step first. With g_v = 0 (an isotropic quadratic) f = g, as for a parameter that the last full step did
    not reach.

    Cost: 1 + 1/k passes; one kept copy of the owned masters; three all-reduces of scalars at a full step, one otherwise, where
    sharded. Order: any. Limits: one owner of the perturbation; global scope.
    Source: Liu et al. 2022, arXiv 2203.02714; the paper does not say which norms.
    """

    owns = ("perturbation",)
    example = {"rho": 0.3, "every": 3}
    off = {"rho": 0.0}
    search = {"rho": (0.05, 0.02, 0.1, 0.2), "every": (5, 2, 10)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        rho: float = 0.1
        """Radius of the perturbation, in parameter units; >= 0."""
        every: int = 5
        """k, steps between two full ones; >= 1."""
        alpha: float = 0.7
        """Weight of the re-used direction; in [0, 1]."""
        norms: Literal["model", "tensor"] = "model"
        """Over what norms and products are taken."""

        def __post_init__(self) -> None:
            check_real("LookSAM", "rho", self.rho, 0.0, cure="pass rho=0 to switch it off")
            check_real("LookSAM", "alpha", self.alpha, 0.0, 1.0)
            check_whole("LookSAM", "every", self.every, 1)
            check(self.norms in ("model", "tensor"), "LookSAM", f"norms={self.norms!r}", "be 'model' or 'tensor'")

    @dataclass
    class State:
        direction: ByName = field(default_factory=ByName)
        taken: bool = False

    def estimate_gradient(self, objective: Objective) -> Any:
        """A full SAM step, or one pass with the re-used direction; returns the loss of the first pass."""
        config, state = self.configs[LookSAM], self.states[LookSAM]
        loss = super().estimate_gradient(objective)
        if not config.rho:
            return loss
        if self.step_count % config.every == 0 or not state.taken:
            g = masters_copy(self.host.gradient())
            with self.displaced(ascent(g, config.rho)):
                objective()
            kept = self._look_split(masters_copy(self.host.gradient()), g)
            self.on_apply(lambda: self._look_keep(kept))
        elif config.alpha:
            self._look_reuse(config.alpha)
        return loss

    def _look_split(self, h: Vector, g: Vector) -> Vector:
        """h minus its part along g, over the parameters of both."""
        h, g = paired(h, g)
        tiny = torch.finfo(torch.float64).tiny
        # What rounding leaves of h where it is parallel to g is no direction; normalised, it would act as one.
        noise = 4 * torch.finfo(h.tensors[0].dtype if h.tensors else torch.float32).eps
        if self.configs[LookSAM].norms == "model":
            hg, gg, hh = inner(self.host, (h, g), (g, g), (h, h)).unbind()
            h.add_(g, -(hg / gg.clamp_min(tiny)))
            return h.mul_((h.norm() > noise * hh.sqrt()).double())
        products, squares, whole = _by_tensor(self, (h, g), (g, g), (h, h))
        of = {s.name: t for s, t in g}
        h.map_(lambda s, t: t.sub_(of[s.name] * (products[s.name] / squares[s.name].clamp_min(tiny)).to(t)))
        (rest,) = _by_tensor(self, (h, h))  # above all in a tensor of one element, where h is always parallel to g
        return h.map_(lambda s, t: t.mul_(rest[s.name].sqrt() > noise * whole[s.name].sqrt()))

    def _look_reuse(self, alpha: float) -> None:
        kept, gradient = self.states[LookSAM].direction, self.host.gradient()
        # A parameter that the full step did not reach, or that did not exist then, keeps its plain gradient.
        steered = [(s, g) for s, g in gradient if s.name in kept]
        v = Vector(self.host, [s for s, _ in steered], [kept[s.name] for s, _ in steered])
        into = Vector(self.host, v.shards, [g for _, g in steered])
        if self.configs[LookSAM].norms == "model":
            reached = self.host.reached()
            if reached is None:
                gg, vv = inner(self.host, (gradient, gradient), (v, v)).unbind()
            else:  # zeros stand for what no pass reached: its kept direction has no part in the norm
                of_g, of_v = _by_tensor(self, (gradient, gradient), (v, v))
                gg = torch.stack(list(of_g.values())).sum()
                vv = (torch.stack(list(of_v.values())) * (reached > 0)).sum()
            into.add_(Vector(v.host, v.shards, [t.to(g.dtype) for t, g in zip(v.tensors, into.tensors, strict=True)]),
                      alpha * gg.sqrt() / (vv.sqrt() + 1e-12))
            return
        own, kept_norms = _by_tensor(self, (into, into), (v, v))
        for (shard, g), t in zip(into, v.tensors, strict=True):
            # 1e-8 as in the public implementation whose per-tensor rule this is
            g.add_(t.to(g.dtype) * (alpha * own[shard.name].sqrt() / (kept_norms[shard.name].sqrt() + 1e-8)).to(g))

    def _look_keep(self, kept: Vector) -> None:
        state = self.states[LookSAM]
        state.direction, state.taken = ByName({s.name: t for s, t in kept}), True

    def cost(self) -> Cost:
        """1/k more passes while rho > 0."""
        config = self.configs[LookSAM]
        share = 1 / config.every
        return Cost(passes=share, state_bytes=4, transient_bytes=12, scalar_reductions=1 + 2 * share) if config.rho else Cost()


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
            with self.displaced(ascent(Vector(self.host, shards, [old[s.name] for s in shards]), config.rho)):
                loss = super().estimate_gradient(objective)
        fresh = ByName({s.name: t for s, t in masters_copy(self.host.gradient())})
        self.on_apply(lambda: self._stale_keep(fresh))
        return loss

    def _stale_keep(self, fresh: ByName) -> None:
        state, tau = self.states[StaleSAM], self.configs[StaleSAM].tau
        state.history = [*state.history, fresh][-tau:]

    def cost(self) -> Cost:
        """No more passes."""
        config = self.configs[StaleSAM]
        note = "the one pass runs at displaced weights: one more publication where working weights are copies"
        return Cost(state_bytes=4 * config.tau, transient_bytes=12, scalar_reductions=1, note=note) if config.rho else Cost()


def _by_tensor(opt: OptimizerMixin, *pairs: tuple[Vector, Vector]) -> list[dict[str, torch.Tensor]]:
    """Inner products by parameter, one collective for all."""
    names = opt.host.names
    place = {n: i for i, n in enumerate(names)}
    table = torch.zeros(len(pairs), len(names), dtype=torch.float64, device=opt.host.device)
    for row, (a, b) in enumerate(pairs):
        for (shard, x), (_, y) in zip(a, b, strict=True):
            table[row, place[shard.name]] += (x.to(y.dtype) * y).sum(dtype=torch.float64).to(table.device)
    return [dict(zip(names, row.unbind(), strict=True)) for row in opt.host.total(table)]
