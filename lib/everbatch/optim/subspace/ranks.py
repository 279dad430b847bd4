"""How much of each layer OSFT keeps: the importance of layers, and the rank that follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from everbatch.distributed import World
from everbatch.engines.host import Host
from everbatch.errors import check
from everbatch.optim.memory.replica import Factory
from everbatch.optim.subspace.options import OsftOptions
from everbatch.optim.subspace.second_moment import SecondMoment
from everbatch.optim.subspace.splits import NoFreeSubspace
from everbatch.optim.subspace.transforms import Projection, high_block
from everbatch.optim.subspace.visits import Rows, chosen, linear_weights, visit

__all__ = ["kept_blocks", "kept_ranks", "layer_importance", "linear_cka", "target_sizes"]


def linear_cka(covariance: Tensor, weight: Tensor) -> float:
    """Linear CKA of the inputs X (n, d) of a layer and its outputs X W^T (n, o), from the covariance C of X:

        ||W C||_F^2 / (||C||_F ||W C W^T||_F)

    In [0, 1]; 1 where the layer keeps all distances, 0 where inputs do not vary.
    """
    c, w = covariance.double(), weight.double()
    across = w @ c
    below = c.norm() * (across @ w.T).norm()
    return float(across.norm().square() / below) if float(below) > 0.0 else 0.0


@torch.no_grad()
def layer_importance(
    host: Host, weights: Mapping[str, Tensor], batches: Iterable[Rows], factory: Factory | None,
) -> dict[str, float]:
    """Of every matrix (o, d), how alike its inputs and outputs are over the rows of all ranks. Collective.

        square:  mean over tokens of cos(x, W x)          else:  linear CKA of x and W x

    Of what is no `nn.Linear` (convolutions, embeddings) the mean of the others; where there is none, 1.

    Cost: one forward pass per row; d^2 numbers for each matrix that is not square.
    """
    names = linear_weights(host, list(weights))
    square = [name for name in names if weights[name].shape[0] == weights[name].shape[1]]
    sums = torch.zeros(len(square), 2, dtype=torch.float64, device=host.device)
    moments = {n: SecondMoment(weights[n].shape[1], centred=True, dtype=torch.float64, device=host.device)
               for n in names if n not in square}
    place = {name: index for index, name in enumerate(square)}

    def see(name: str, x: Tensor, weight: Tensor) -> None:
        if name in moments:
            moments[name].update(x)
            return
        alike = functional.cosine_similarity(x, functional.linear(x, weight), dim=1)
        sums[place[name], 0] += alike.sum()
        sums[place[name], 1] += len(x)

    visit(host, names, batches, factory, "OSFT", see)
    world = World.current() if host.title != "plain" else World()
    world.sum(sums)
    found = dict(zip(square, (sums[:, 0] / sums[:, 1].clamp_min(1.0)).tolist(), strict=True))
    for name, moment in moments.items():
        moment.reduce(world)
        found[name] = linear_cka(moment.matrix, weights[name])
    mean = sum(found.values()) / len(found) if found else 1.0
    return {name: found.get(name, mean) for name in weights}


def kept_ranks(importance: Mapping[str, float], sizes: Mapping[str, int], least: float, most: float) -> dict[str, int]:
    """Directions to keep of each matrix, of min(o, d) = `sizes`:

        r = least + I (most - least),    k = floor(r * min(o, d)), in [0, min(o, d) - 1]

    I is the importance over its mean; negative ones count as 0, and where none is positive all are 1.

    Raises:
        ValueError: names that differ, or an importance that is not finite.
    """
    odd = sorted(set(importance) ^ set(sizes))
    check(not odd, "OSFT", f"importance of {odd[:3]} is missing or too much", "name the targets")
    bad = [name for name, value in importance.items() if not math.isfinite(value)]
    check(not bad, "OSFT", f"importance of {bad[:3]} is not finite", "be finite", "look at the layers' inputs")
    positive = {name: max(0.0, importance[name]) for name in sizes}
    mean = sum(positive.values()) / max(1, len(positive))
    ranks = {}
    for name, size in sizes.items():
        relative = positive[name] / mean if mean > 0.0 else 1.0
        share = least + relative * (most - least)
        ranks[name] = min(max(0, math.floor(share * size)), size - 1)
    return ranks


def target_sizes(host: Host, targets: Sequence[str]) -> dict[str, int]:
    """min(o, d) of each trained matrix that a pattern matches, by name."""
    matrices = {n: shape for n, (_, shape) in host.master_layout().items() if len(shape) >= 2}
    names = chosen("OSFT", matrices, "targets", targets)
    return {n: min(matrices[n][0], matrices[n][1:].numel()) for n in names}


@torch.no_grad()
def kept_blocks(
    host: Host, options: OsftOptions, batches: Iterable[Rows] | None, importance: Mapping[str, float] | None,
) -> dict[str, Projection]:
    """The projection of each target that keeps the leading directions of its present weights. Collective.

    Args:
        batches, importance: as in `OSFT.consolidate_osft`.

    Raises:
        NoFreeSubspace: every target is wholly kept.
    """
    sizes = target_sizes(host, options.targets)
    whole = {n: w.flatten(1) for n, w in host.gather(list(host.weights()), list(sizes)).items()}
    if options.unfreeze_rank_ratio is not None:
        kept = 1.0 - options.unfreeze_rank_ratio
        ranks = {n: math.floor(kept * size) for n, size in sizes.items()}
    else:
        if importance is None and batches is not None:
            importance = layer_importance(host, whole, batches, options.factory)
        ranks = kept_ranks(importance or dict.fromkeys(sizes, 1.0), sizes, options.mrr, options.trr)
    frozen = [n for n, k in ranks.items() if k == sizes[n] and (
        options.form == "factor" or whole[n].shape[0] == whole[n].shape[1])]
    if len(frozen) == len(ranks):
        raise NoFreeSubspace(f"OSFT: all of {frozen[:3]} is kept, which leaves nothing to learn in; must leave a direction "
                             "free; raise unfreeze_rank_ratio")
    maps = {n: high_block(whole[n], k) for n, k in ranks.items() if k}
    if options.form == "factor":
        return {n: Projection(left=p.left, right=p.right) for n, p in maps.items()}
    return maps
