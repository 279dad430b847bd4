"""One change of topology over shards: prune, grow, weights, moments, and the proof that every rank agrees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from everbatch import seeds
from everbatch.distributed import World
from everbatch.engines.host import Host
from everbatch.engines.shards import Shard
from everbatch.optim.sparsity.grow import grow, grow_bernoulli, shares
from everbatch.optim.sparsity.prune import Layer, num_dropped, prune

__all__ = ["Change", "Rules", "apply", "change", "digest", "verify"]

CHUNK = 1 << 22
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


@dataclass(frozen=True)
class Rules:
    """How a topology changes."""

    prune: str = "magnitude"
    grow: str = "gradient"
    across: bool = False
    """One pruning threshold over all layers."""
    redistribute: str = "layer"
    released: bool = False
    """Count, break ties and see frozen weights as the ITOP and CL-DST code does."""
    bernoulli: bool = False
    """Random growth entry by entry: the count varies."""
    used: str = "allow"
    """Entries of earlier tasks: allow, forbid or prefer."""


@dataclass
class Change:
    """What one change did to one slice."""

    mask: Tensor
    """The new mask, shaped like the slice."""
    born: Tensor
    """Active now and not before."""


def change(
    host: Host, shards: Sequence[Shard], masks: Mapping[str, Tensor], active: Mapping[str, int],
    shapes: Mapping[str, Sequence[int]], fraction: float, rules: Rules, key: tuple[int | str, ...], *,
    gradients: Mapping[str, Tensor], averages: Mapping[str, Tensor], fired: Mapping[str, Tensor] | None = None,
    used: Mapping[str, Tensor] | None = None,
) -> dict[str, Change]:
    """Choose a new mask for every masked slice; touches nothing.

    Args:
        shards: this rank's slices of masked layers. masks: their masks.
        active: active entries of every whole layer, the same on every rank; its keys say which layers are masked.
        shapes: whole shapes by name.
        fraction: share of each layer's active entries to drop.
        key: (seed, purpose, task, step), for random growth.
        gradients, averages: dense gradient to grow by, and its running mean, by name; what is missing counts as zero.
            A masked layer that is frozen is left out, and keeps its mask.
        fired: entries that were ever active (for "random_unfired"). used: entries of earlier tasks.

    Cost: at most 4 (float64: 8) all-reduces of 256 counts per layer for pruning and as many for growth (random: 8), up to 4 more
    for each where scores tie, and one of the counts of dropped entries. No tensor is gathered.
    """
    trained = host.master_layout()
    frozen = {n: Change(m, torch.zeros_like(m)) for n, m in masks.items() if n not in trained}
    names = [n for n in active if n in trained]
    if not names:
        return frozen
    sizes = [int(np.prod(shapes[n])) for n in names]
    place = {n: i for i, n in enumerate(names)}
    offset = np.concatenate([[0], np.cumsum(sizes)])
    dtype = torch.float64 if any(trained[n][0] == torch.float64 for n in names) else torch.float32
    layers = []
    for s in shards:
        gradient, average = (kept.get(s.name, torch.zeros_like(s.data)) for kept in (gradients, averages))
        if rules.released and used is not None:
            gradient = gradient * ~used[s.name]
        layers.append(Layer(s.name, place[s.name], s.start, int(offset[place[s.name]]), s.data, masks[s.name], gradient, average))
    drop = [num_dropped(active[n], fraction, up=rules.released) for n in names]
    dropped = prune(layers, drop, sizes, host.total, criterion=rules.prune, across=rules.across,
                    all_ties=rules.released and rules.prune == "magnitude", dtype=dtype, device=host.device)
    left = [x.active & ~d for x, d in zip(layers, dropped, strict=True)]
    barred = [used[x.name].reshape(-1) for x in layers] if used is not None else None
    forbidden = barred if rules.used == "forbid" else None
    sums = torch.zeros(3, len(names), dtype=torch.float64, device=host.device)
    for i, x in enumerate(layers):
        sums[0, x.index] += dropped[i].sum()
        if x.average is not None and rules.redistribute == "momentum":
            sums[1, x.index] += (x.average.double().abs() * left[i]).sum()
        if forbidden is not None:
            sums[2, x.index] += (forbidden[i] & ~left[i]).sum()
    removed_, moment_, closed_ = host.total(sums).cpu().tolist()
    removed = [round(v) for v in removed_]
    survivors = [active[n] - r for n, r in zip(names, removed, strict=True)]
    inactive = [size - n - round(c) for size, n, c in zip(sizes, survivors, closed_, strict=True)]
    means = [m / max(n, 1) for m, n in zip(moment_, survivors, strict=True)]
    across = rules.redistribute == "global"
    counts = removed if across else shares(removed, inactive, survivors, means, rules.redistribute)
    if rules.bernoulli and rules.grow == "random":
        grown = grow_bernoulli(layers, left, counts, inactive, key=key, forbidden=forbidden)
    else:
        grown = grow(layers, left, counts, sizes, host.total, criterion=rules.grow, key=key, across=across, dtype=dtype,
                     priority=_priority(layers, rules, fired, barred), forbidden=forbidden, released=rules.released,
                     device=host.device)
    changed = {x.name: Change((n := left[i] | grown[i]).view(masks[x.name].shape), (n & ~x.active).view(masks[x.name].shape))
               for i, x in enumerate(layers)}
    return {**changed, **frozen}


def _priority(
    layers: Sequence[Layer], rules: Rules, fired: Mapping[str, Tensor] | None, used: Sequence[Tensor] | None,
) -> list[Tensor] | None:
    """What comes first whatever its score; None when nothing does, on every rank alike."""
    sort_used = used is not None and rules.used == "prefer"
    unfired = rules.grow == "random_unfired" and fired is not None
    if not sort_used and not unfired:
        return None
    result = []
    for i, x in enumerate(layers):
        rank = torch.zeros_like(x.active, dtype=torch.uint8)
        if sort_used:
            assert used is not None
            rank += 2 * used[i]
        if unfired:
            assert fired is not None
            rank += ~fired[x.name].reshape(-1)
        result.append(rank)
    return result


@torch.no_grad()
def apply(
    host: Host, shards: Sequence[Shard], changes: Mapping[str, Change], names: Sequence[str], *, keep_moments: bool = False,
    newborn: str = "layer_mean_v", stored: Callable[[Shard, Tensor], Tensor | None] = lambda shard, born: None,
) -> None:
    """Make weights and moments follow the new masks.

    Dropped entries become exactly zero, in weights and moments. New ones start at zero (or at `stored`), with zero moments;
    Adam's second one starts at the mean over the layer's other active entries (`newborn="layer_mean_v"`), for with zero the first
    step would be lr (1 - b1) / sqrt(1 - b2), 3.16 lr for the usual betas: bias correction is per tensor.

    Args:
        names: all masked layers, the same on every rank.
        keep_moments: leave moments alone (the ITOP and CL-DST code, with Adam).
        stored: values with which activated entries of earlier tasks come back.

    Cost: one all-reduce of two numbers per layer if the base keeps second moments.
    """
    means = {}
    if newborn == "layer_mean_v" and not keep_moments and "betas" in (host.groups() or [{}])[0]:
        means = _second_moment_means(host, shards, changes, names)
    for shard in shards:
        mask, born = changes[shard.name].mask, changes[shard.name].born
        data = shard.data
        data.masked_fill_(~mask | born, 0.0)
        value = stored(shard, born)
        if value is not None:
            data.copy_(torch.where(born, value, data))
        for kind, moment in () if keep_moments else shard.moments.items():
            moment.masked_fill_(~mask | born, 0.0)
            if kind in SECOND_MOMENTS and (kind, shard.name) in means:
                moment.copy_(torch.where(born, means[kind, shard.name].to(moment), moment))
    host.touch()


def _second_moment_means(
    host: Host, shards: Sequence[Shard], changes: Mapping[str, Change], names: Sequence[str],
) -> dict[tuple[str, str], Tensor]:
    place = {n: i for i, n in enumerate(names)}
    sums = torch.zeros(1 + len(SECOND_MOMENTS), len(names), dtype=torch.float64, device=host.device)
    for shard in shards:
        old = changes[shard.name].mask & ~changes[shard.name].born
        sums[0, place[shard.name]] += old.sum()
        for k, kind in enumerate(SECOND_MOMENTS, start=1):
            if kind in shard.moments:
                sums[k, place[shard.name]] += (shard.moments[kind].double() * old).sum()
    host.total(sums)
    return {(kind, n): sums[k, place[n]] / sums[0, place[n]].clamp(min=1) for k, kind in enumerate(SECOND_MOMENTS, start=1)
            for n in names}


def digest(shards: Sequence[Shard], masks: Mapping[str, Tensor], names: Sequence[str], device: torch.device) -> Tensor:
    """Per layer: active entries and a 63-bit sum of hashes of their positions. (2, layers) int64, of this rank's slices.

    Sums over ranks do not depend on the sharding, but for layers that are frozen: masks are kept for them and shards are not, so
    their positions count from the start of the slice. Copies of a model are sharded alike, so they still have equal sums.
    """
    starts = {s.name: s.start for s in shards}
    result = torch.zeros(2, len(names), dtype=torch.int64, device=device)
    for i, name in enumerate(names):
        if name not in masks:
            continue
        at = masks[name].reshape(-1).nonzero().view(-1) + starts.get(name, 0)
        result[0, i] += at.numel()
        for part in torch.split(at, CHUNK):
            result[1, i] += _mixed(part, seeds.derive("mask", name)).sum()
    return result


def _mixed(values: Tensor, salt: int) -> Tensor:
    """A hash of each integer: multiply and shift in int64, which wraps."""
    x = values * -7046029254386353131 + salt
    x = (x ^ ((x >> 29) & (2**35 - 1))) * -4658895280553007687
    return x ^ ((x >> 32) & (2**32 - 1))


def verify(host: Host, who: str, found: Tensor, names: Sequence[str]) -> dict[str, int]:
    """Active entries of each whole layer, after a proof that every copy of the model has the same masks.

    Args: found: what `digest` gave on this rank.

    Raises:
        RuntimeError: copies differ, on every rank alike. Nothing is repaired: where masks differ, gradients or weights did.

    Cost: one all-reduce of two integers per layer where weights are sharded, one of two per rank where there are copies.
    """
    found = host.total(found)
    world = World.current()
    if host.replicas > 1 and world.size > 1:
        table = torch.zeros(world.size, 2, dtype=torch.int64, device=host.device)
        table[world.rank] = torch.stack([found[0].sum(), _mixed(found[1], 1).sum()])
        rows = world.sum(table).tolist()
        odd = [rank for rank, row in enumerate(rows) if row != rows[0]]
        if odd:
            raise RuntimeError(f"{who}: masks of ranks {odd} differ from rank 0's, must be the same on every rank; the ranks' "
                               "weights or gradients differ: check that the model starts equal and that gradients are reduced")
    return dict(zip(names, found[0].tolist(), strict=True))
