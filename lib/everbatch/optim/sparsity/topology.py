"""One change of topology over shards: prune, grow, weights and moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from everbatch.engines.host import Host
from everbatch.engines.shards import Shard
from everbatch.optim.sparsity.grow import grow, grow_bernoulli, shares
from everbatch.optim.sparsity.prune import Layer, num_dropped, prune

__all__ = ["Change", "Rules", "apply", "change"]

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
        active: active entries of every whole layer, the same on every rank; its keys say which
            layers are masked.
        shapes: whole shapes by name.
        fraction: share of each layer's active entries to drop.
        key: (seed, purpose, task, step), for random growth.
        gradients, averages: dense gradient to grow by, and its running mean, by name; what is
            missing counts as zero. A masked layer that is frozen is left out, and keeps its mask.
        fired: entries that were ever active (for "random_unfired"). used: entries of earlier tasks.

    Cost: at most 4 (float64: 8) all-reduces of 256 counts per layer for pruning and as many for
    growth (random: 8), up to 4 more for each where scores tie, and one of the counts of dropped
    entries. No tensor is gathered.
    """
    trained = host.master_layout()
    frozen = {n: Change(m, torch.zeros_like(m)) for n, m in masks.items() if n not in trained}
    names = [n for n in active if n in trained]
    if not names:
        return frozen
    sizes = [int(np.prod(shapes[n])) for n in names]
    dtype = torch.float64 if any(trained[n][0] == torch.float64 for n in names) else torch.float32
    layers = _layers(shards, masks, names, sizes, gradients, averages, used if rules.released else None)

    # Prune.
    drop = [num_dropped(active[n], fraction, up=rules.released) for n in names]
    dropped = prune(
        layers, drop, sizes, host.total, criterion=rules.prune, across=rules.across,
        all_ties=rules.released and rules.prune == "magnitude", dtype=dtype, device=host.device)
    left = [layer.active & ~gone for layer, gone in zip(layers, dropped, strict=True)]

    # How many grow in each layer: as many as were pruned, there or elsewhere.
    barred = [used[layer.name].reshape(-1) for layer in layers] if used is not None else None
    forbidden = barred if rules.used == "forbid" else None
    removed, moment, closed = _tally(
        host, layers, len(names), dropped, left, forbidden, moments=rules.redistribute == "momentum")
    survivors = [active[n] - gone for n, gone in zip(names, removed, strict=True)]
    inactive = [size - n - shut for size, n, shut in zip(sizes, survivors, closed, strict=True)]
    means = [total / max(n, 1) for total, n in zip(moment, survivors, strict=True)]
    across = rules.redistribute == "global"
    counts = removed if across else shares(removed, inactive, survivors, means, rules.redistribute)

    # Grow.
    if rules.bernoulli and rules.grow == "random":
        grown = grow_bernoulli(layers, left, counts, inactive, key=key, forbidden=forbidden)
    else:
        grown = grow(
            layers, left, counts, sizes, host.total, criterion=rules.grow, key=key, across=across, dtype=dtype,
            priority=_priority(layers, rules, fired, barred), forbidden=forbidden, released=rules.released,
            device=host.device)
    changed = {}
    for layer, stay, new in zip(layers, left, grown, strict=True):
        mask, shape = stay | new, masks[layer.name].shape
        changed[layer.name] = Change(mask.view(shape), (mask & ~layer.active).view(shape))
    return {**changed, **frozen}


def _layers(
    shards: Sequence[Shard], masks: Mapping[str, Tensor], names: Sequence[str], sizes: Sequence[int],
    gradients: Mapping[str, Tensor], averages: Mapping[str, Tensor], hidden: Mapping[str, Tensor] | None,
) -> list[Layer]:
    """This rank's slices with what they are scored by; gradients of `hidden` entries count as
    zero."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    result = []
    for shard in shards:
        name, data = shard.name, shard.data
        gradient = gradients.get(name, torch.zeros_like(data))
        average = averages.get(name, torch.zeros_like(data))
        if hidden is not None:
            gradient = gradient * ~hidden[name]
        place = names.index(name)
        result.append(Layer(name, place, shard.start, int(starts[place]), data, masks[name], gradient, average))
    return result


def _tally(
    host: Host, layers: Sequence[Layer], count: int, dropped: Sequence[Tensor], left: Sequence[Tensor],
    forbidden: Sequence[Tensor] | None, *, moments: bool,
) -> tuple[list[int], list[float], list[int]]:
    """Of each whole layer: entries dropped, the sum of the survivors' mean gradients in size, and
    entries where nothing may grow. One all-reduce."""
    sums = torch.zeros(3, count, dtype=torch.float64, device=host.device)
    for i, layer in enumerate(layers):
        sums[0, layer.index] += dropped[i].sum()
        if layer.average is not None and moments:
            sums[1, layer.index] += (layer.average.double().abs() * left[i]).sum()
        if forbidden is not None:
            sums[2, layer.index] += (forbidden[i] & ~left[i]).sum()
    removed, moment, closed = host.total(sums).cpu().tolist()
    return [round(n) for n in removed], moment, [round(n) for n in closed]


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

    Dropped entries become exactly zero, in weights and moments. New ones start at zero (or at
    `stored`), with zero moments; Adam's second one starts at the mean over the layer's other active
    entries (`newborn="layer_mean_v"`), for with zero the first step would be lr (1 - b1) / sqrt(1 -
    b2), 3.16 lr for the usual betas: bias correction is per tensor.

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
