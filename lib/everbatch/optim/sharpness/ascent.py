"""What the sharpness methods share: ascent directions, the first gradient at a scope, splitting one gradient along another."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from everbatch.engines.host import Host
from everbatch.engines.shards import Vector, inner, step_length
from everbatch.errors import UnsupportedHost, check, check_whole

__all__ = ["Scope", "adaptive_ascent", "ascent", "by_tensor", "check_interval", "check_scope", "combine_", "gap_direction",
           "group_gradient", "masters_copy", "paired"]

Scope = Literal["global", "local", "group"]


def masters_copy(vector: Vector) -> Vector:
    """A copy of a vector in the masters' dtype."""
    return vector.to_masters()


def paired(a: Vector, b: Vector) -> tuple[Vector, Vector]:
    """Both vectors over the shards that either names, with zeros where it has none: passes of a step need not reach the same
    parameters. The vectors themselves where they name the same shards."""
    if a.shards == b.shards:  # by identity, so this costs nothing where it is so
        return a, b
    of_a, of_b = ({s.name: t for s, t in v} for v in (a, b))
    shards = [*a.shards, *(s for s in b.shards if s.name not in of_a)]

    def over(mine: dict[str, Tensor], other: dict[str, Tensor]) -> list[Tensor]:
        return [mine[s.name] if s.name in mine else torch.zeros_like(other[s.name]) for s in shards]

    return Vector(a.host, shards, over(of_a, of_b)), Vector(b.host, shards, over(of_b, of_a))


@torch.no_grad()
def ascent(gradient: Vector, rho: float | Tensor, delta: float = 1e-12) -> Vector:
    """Direction of steepest ascent, of length rho: e = rho * g / (||g|| + delta), the norm over the whole model.

    Args:
        gradient: reduced and unscaled; not modified.
        rho: radius in parameter units, >= 0.
        delta: added to the norm. A zero gradient gives zero, whatever delta is.

    Returns:
        A new vector in the masters' dtype. Cost: one all-reduce of a scalar where weights are sharded, one copy.

    Source: Foret et al. 2021, arXiv 2010.01412, eq. 2.
    """
    return gradient.of_length(rho, delta)


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
    factor = step_length(rho, scaled.norm(), delta)
    return scaled.map_(lambda s, t: t * scale(s.name, s.data)).mul_(factor)


def by_tensor(host: Host, *pairs: tuple[Vector, Vector]) -> list[dict[str, Tensor]]:
    """Inner products by parameter, one collective for all."""
    names = host.names
    place = {n: i for i, n in enumerate(names)}
    table = torch.zeros(len(pairs), len(names), dtype=torch.float64, device=host.device)
    for row, (a, b) in enumerate(pairs):
        for (shard, x), (_, y) in zip(a, b, strict=True):
            table[row, place[shard.name]] += (x.to(y.dtype) * y).sum(dtype=torch.float64).to(table.device)
    return [dict(zip(names, row.unbind(), strict=True)) for row in host.total(table)]


@torch.no_grad()
def gap_direction(g: Vector, h: Vector, delta: float = 1e-12) -> Vector:
    """The part of g that is orthogonal to h: g - <g,h>/||h||^2 h, over the parameters of both; one all-reduce of three scalars
    where sharded."""
    g, h = paired(g, h)
    gh, gg, hh = inner(g.host, (g, h), (g, g), (h, h)).unbind()
    cosine = gh / (gg.sqrt() * hh.sqrt() + delta)
    return masters_copy(g).add_(masters_copy(h), -(cosine * gg.sqrt() / (hh.sqrt() + delta)))


@torch.no_grad()
def combine_(host: Host, target: Vector, other: Vector, keep: float | Tensor, add: float) -> None:
    """target <- keep * target + add * other, by parameter, where target is the host's gradient: edited in place, and parameters
    that only `other` has get their share of it as gradient (none if add is 0: they take no part then)."""
    if add:
        host.mix_passes()
    kinds = {t.dtype for t in (*target.tensors, *other.tensors)}
    if target.shards == other.shards and len(kinds) == 1:
        mixed, share = host.scratch.copy(target), host.scratch.copy(other)
        mixed.mul_(keep).add_(share.mul_(add)).copy_into(target.tensors)
        host.scratch.give(mixed, share)
        return
    more = {s.name: (s, t) for s, t in other}
    for shard, t in target:
        t.mul_(keep.to(t) if isinstance(keep, Tensor) else keep)
        if shard.name in more:
            t.add_(more.pop(shard.name)[1].to(t.dtype) * add)
    if more and add:
        host.set_gradient(Vector(host, [s for s, _ in more.values()], [t * add for _, t in more.values()]))


def check_interval(who: str, interval: int) -> None:
    """Refuse an interval that is not an integer >= 1."""
    check_whole(who, "interval", interval, 1, cure="1 perturbs at every step")


def check_scope(host: Host, who: str, scope: Scope, group_size: int) -> Any:
    """At construction: refuse a scope this host cannot do; returns the process group of scope "group"."""
    if scope == "global" or host.world == 1:
        return None
    if not host.apart:
        raise UnsupportedHost(f"{who}: scope={scope!r} on {host.title}: ranks share one sharded copy of the weights and "
                              "cannot move it apart; use scope='global', or ZeRO stage 0 to 2, DDP or plain torch")
    if scope == "local":
        return None
    check(host.world % group_size == 0, who, f"group_size={group_size} on {host.world} ranks",
          "divide the number of ranks")
    mine, _ = dist.new_subgroups(group_size)
    return mine


def group_gradient(host: Host, scope: Scope, group: Any) -> Vector:
    """After a local pass, the gradient a perturbation is made of: "local": this rank's own; "group": the mean over the ranks of
    `group`, over all trained parameters, one all-reduce among them."""
    mine = host.local_gradient()
    if scope == "local":
        return mine
    # Ranks may reach different parameters, so all take part, and each rank enters whatever it has.
    has, shards = {s.name: t for s, t in mine}, host.working_shards()
    tensors = [has[s.name] if s.name in has else torch.zeros_like(s.data) for s in shards]
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    parts = flat.split_with_sizes([t.numel() for t in tensors])
    return Vector(mine.host, shards, [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])
