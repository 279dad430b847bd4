"""What the sharpness methods share: ascent directions, the first gradient at a scope, splitting one gradient along another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from everbatch.errors import UnsupportedHost, check
from everbatch.optim.shards import Vector, inner

if TYPE_CHECKING:
    from everbatch.optim.mixin import OptimizerMixin
    from everbatch.optim.objective import Objective

__all__ = ["Scope", "adaptive_ascent", "ascent", "check_interval", "check_scope", "combine_", "first_gradient", "gap_direction",
           "masters_copy"]

Scope = Literal["global", "local", "group"]


def masters_copy(vector: Vector) -> Vector:
    """A copy of a vector in the masters' dtype."""
    return Vector(vector.host, vector.shards, [t.to(s.data.dtype, copy=True) for s, t in vector])


@torch.no_grad()
def ascent(gradient: Vector, rho: float | Tensor, delta: float = 1e-12) -> Vector:
    """Direction of steepest ascent, of length rho: e = rho * g / (||g|| + delta), the norm over the whole model.

    Args:
        gradient: reduced and unscaled; not modified.
        rho: radius in parameter units, >= 0.
        delta: guard against a zero gradient, whose result is zero.

    Returns:
        A new vector in the masters' dtype. Cost: one all-reduce of a scalar where weights are sharded, one copy.

    Source: Foret et al. 2021, arXiv 2010.01412, eq. 2.
    """
    return masters_copy(gradient).mul_(rho / (gradient.norm() + delta).clamp_min(torch.finfo(torch.float64).tiny))


@torch.no_grad()
def adaptive_ascent(
    gradient: Vector, rho: float, scaling: Literal["official", "elementwise"], eta: float = 0.01, delta: float | None = None,
) -> Vector:
    """Ascent in coordinates scaled by the weights: e = rho * T^2 g / (||T g|| + delta).

    official: T = |w| + eta for parameters with "weight" in their name, 1 for others (delta 1e-16);
    elementwise: T = |w| for all, so an element that is exactly 0 stays (delta 1e-12).

    Source: Kwon et al. 2021, arXiv 2102.11600, and the authors' code (official); the widespread variant (elementwise).
    """
    delta = delta if delta is not None else 1e-16 if scaling == "official" else 1e-12

    def scale(name: str, weight: Tensor) -> Tensor | float:
        if scaling == "elementwise":
            return weight.abs()
        return weight.abs() + eta if "weight" in name else 1.0

    scaled = Vector(gradient.host, gradient.shards, [g.to(s.data.dtype) * scale(s.name, s.data) for s, g in gradient])
    factor = rho / (scaled.norm() + delta).clamp_min(torch.finfo(torch.float64).tiny)
    return scaled.map_(lambda s, t: t * scale(s.name, s.data)).mul_(factor)


@torch.no_grad()
def gap_direction(g: Vector, h: Vector, delta: float = 1e-12) -> Vector:
    """The part of g that is orthogonal to h: g - <g,h>/||h||^2 h; one all-reduce of three scalars where sharded."""
    gh, gg, hh = inner(g.host, (g, h), (g, g), (h, h)).unbind()
    cosine = gh / (gg.sqrt() * hh.sqrt() + delta)
    return masters_copy(g).add_(masters_copy(h), -(cosine * gg.sqrt() / (hh.sqrt() + delta)))


@torch.no_grad()
def combine_(target: Vector, other: Vector, keep: float, add: float | Tensor) -> Vector:
    """target <- keep * target + add * other, in place, by parameter; parameters that only `target` has are scaled alone."""
    more = {s.name: t for s, t in other}
    for shard, t in target:
        t.mul_(keep)
        if shard.name in more:
            factor = add.to(t.device, t.dtype) if isinstance(add, Tensor) else add
            t.add_(more[shard.name].to(t.dtype) * factor)
    return target


def check_interval(who: str, interval: int) -> None:
    """Refuse an interval that is not an integer >= 1."""
    check(isinstance(interval, int) and not isinstance(interval, bool) and interval >= 1, who, f"interval={interval!r}",
          "be an integer >= 1", "1 perturbs at every step")


def check_scope(opt: OptimizerMixin, who: str, scope: Scope, group_size: int) -> Any:
    """At construction: refuse a scope this host cannot do; returns the process group of scope "group"."""
    if scope == "global" or opt.host.world == 1:
        return None
    if not opt.host.apart:
        raise UnsupportedHost(f"{who}: scope={scope!r} on {opt.host.title}: ranks share one sharded copy of the weights and "
                              "cannot move it apart; use scope='global', or ZeRO stage 0 to 2, DDP or plain torch")
    if scope == "local":
        return None
    check(opt.host.world % group_size == 0, who, f"group_size={group_size} on {opt.host.world} ranks",
          "divide the number of ranks")
    mine, _ = dist.new_subgroups(group_size)
    return mine


def first_gradient(opt: OptimizerMixin, objective: Objective, run: Any, scope: Scope, group: Any) -> tuple[Any, Vector]:
    """Run the recorded pass; returns its loss and the gradient the perturbation is made of.

    global: the reduced gradient of the whole batch. local: this rank's own, without any reduction. group: the mean over the
    ranks of `group`, one all-reduce among them.
    """
    if scope == "global" or opt.host.world == 1:
        return run(objective), opt.host.gradient()
    objective.local = True
    try:
        loss = run(objective)
    finally:
        objective.local = False
    mine = opt.host.local_gradient()
    if scope == "group" and mine.tensors:
        flat = torch.cat([t.reshape(-1) for t in mine.tensors])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        parts = flat.split_with_sizes([t.numel() for t in mine.tensors])
        mine = Vector(mine.host, mine.shards, [p.view(t.shape) for p, t in zip(parts, mine.tensors, strict=True)])
    return loss, mine
