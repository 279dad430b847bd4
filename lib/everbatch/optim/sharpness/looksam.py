"""Sharpness-aware minimisation at every k-th step only, with a re-used direction in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from everbatch.contract import Cost
from everbatch.engines.named import ByName
from everbatch.engines.passes import Objective
from everbatch.engines.shards import Vector, inner
from everbatch.errors import check, check_real, check_whole
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.sharpness.ascent import ascent, by_tensor, masters_copy, paired

__all__ = ["LookSAM"]


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
        products, squares, whole = by_tensor(self.host, (h, g), (g, g), (h, h))
        of = {s.name: t for s, t in g}
        h.map_(lambda s, t: t.sub_(of[s.name] * (products[s.name] / squares[s.name].clamp_min(tiny)).to(t)))
        (rest,) = by_tensor(self.host, (h, h))  # above all in a tensor of one element, where h is always parallel to g
        return h.map_(lambda s, t: t.mul_((rest[s.name].sqrt() > noise * whole[s.name].sqrt()).to(t)))

    def _look_reuse(self, alpha: float) -> None:
        kept, into = self.states[LookSAM].direction, self.host.gradient()
        gradient = into
        if not kept.covers(gradient.shards):
            # A parameter that the full step did not reach, or that did not exist then, keeps its plain gradient.
            steered = [(s, g) for s, g in gradient if s.name in kept]
            into = Vector(self.host, [s for s, _ in steered], [g for _, g in steered])
        v = kept.over(self.host, into.shards)
        if self.configs[LookSAM].norms == "tensor":
            norms, kept_norms = by_tensor(self.host, (into, into), (v, v))
            for (shard, g), t in zip(into, v.tensors, strict=True):
                # 1e-8 as in the public implementation whose per-tensor rule this is
                g.add_(t.to(g.dtype) * (alpha * norms[shard.name].sqrt() / (kept_norms[shard.name].sqrt() + 1e-8)).to(g))
            return
        reached = self.host.reached()
        copy = None
        if reached is None:
            copy = self.host.scratch.copy(gradient)
            if self.host.sharded:  # one all-reduce for both
                gg, vv = inner(self.host, (copy, copy), (v, v)).unbind()
                own, other = gg.sqrt(), vv.sqrt()
            else:
                own, other = copy.norm(), kept.norm(v)
        else:  # zeros stand for what no pass reached: its kept direction has no part in the norm
            of_g, of_v = by_tensor(self.host, (gradient, gradient), (v, v))
            gg = torch.stack(list(of_g.values())).sum()
            vv = (torch.stack(list(of_v.values())) * (reached > 0)).sum()
            own, other = gg.sqrt(), vv.sqrt()
        scale = alpha * own / (other + 1e-12)
        if copy is not None and into is gradient and _of_one_type(copy, v):
            copy.add_(v, scale).copy_into(gradient.tensors)
        else:
            into.add_(Vector(v.host, v.shards, [t.to(g.dtype) for t, g in zip(v.tensors, into.tensors, strict=True)]), scale)
        if copy is not None:
            self.host.scratch.give(copy)

    def _look_keep(self, kept: Vector) -> None:
        state = self.states[LookSAM]
        state.direction, state.taken = ByName.of(kept), True

    def cost(self) -> Cost:
        """1/k more passes while rho > 0."""
        config = self.configs[LookSAM]
        share = 1 / config.every
        return Cost(passes=share, state_bytes=4, transient_bytes=12, scalar_reductions=1 + 2 * share) if config.rho else Cost()


def _of_one_type(a: Vector, b: Vector) -> bool:
    """Whether both lie in one piece each, of the same type."""
    return a.flat is not None and b.flat is not None and a.flat.dtype == b.flat.dtype
