"""Which active weights go: importances, and the exact choice of the least important. Pure functions of flat tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from everbatch.optim.sparsity.select import Piece, choose

__all__ = ["CRITERIA", "Layer", "dsr_threshold", "importance", "num_dropped", "prune"]

CRITERIA = ("magnitude", "set", "taylor", "soft", "momentum")


def importance(criterion: str, weight: Tensor, gradient: Tensor | None = None, average: Tensor | None = None) -> Tensor:
    """What pruning keeps the largest of.

        magnitude, set:  |w|
        taylor:          (w g)^2          first-order change of the loss, squared
        soft:            |w| + |g|        gradient-aware: a small weight with a large gradient stays
        momentum:        |m|              running mean of the dense gradient

    Args: gradient: dense, at the weights. average: running mean of the dense gradient. Returns: as `weight`, float32 at least.

    Source: SET: Mocanu et al. 2018; taylor: Molchanov et al. 2019; soft: MEST, Yuan et al. 2021, arXiv 2110.14032, with its
    factor 1; momentum: the quantity of SNFS, Dettmers and Zettlemoyer 2019, arXiv 1907.04840, which itself prunes by magnitude.
    """
    w = weight.float() if weight.dtype.itemsize < 4 else weight
    if criterion in ("magnitude", "set"):
        return w.abs()
    if criterion == "momentum":
        assert average is not None
        return average.to(w.dtype).abs()
    assert gradient is not None
    g = gradient.to(w.dtype)
    return (w * g).square() if criterion == "taylor" else w.abs() + g.abs()


def num_dropped(active: int, fraction: float, *, up: bool = False) -> int:
    """Weights to drop of `active` ones: floor(fraction * active) (RigL), or with `up` the ceiling (ITOP, CL-DST)."""
    return min(active, math.ceil(fraction * active) if up else math.floor(fraction * active))


class Layer:
    """One rank's slice of one masked layer, flattened, as pruning and growth see it."""

    __slots__ = ("active", "average", "gradient", "index", "keys", "name", "offset", "start", "weight")

    def __init__(
        self, name: str, index: int, start: int, offset: int, weight: Tensor, active: Tensor, gradient: Tensor | None = None,
        average: Tensor | None = None, keys: Tensor | None = None,
    ) -> None:
        self.name, self.index = name, index
        self.start = start
        """Position of the slice in its layer."""
        self.offset = offset
        """Position of the layer among all entries of all layers."""
        self.weight, self.active = weight.reshape(-1), active.reshape(-1)
        self.gradient = None if gradient is None else gradient.reshape(-1)
        self.average = None if average is None else average.reshape(-1)
        self.keys = None if keys is None else keys.reshape(-1)
        """Uniform numbers for random growth, instead of the stateless ones."""


def prune(
    layers: Sequence[Layer], drop: Sequence[int], sizes: Sequence[int], total: Callable[[Tensor], Tensor], *,
    criterion: str = "magnitude", across: bool = False, all_ties: bool = False, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Entries to drop: bool (n,) per slice.

    The `drop[l]` least important active entries of each layer go; among equal ones the last positions first. "set" drops the
    smallest positive and the largest negative weights, ceil(drop[l] / 2) of each, or all there are (a weight of exactly zero
    counts as positive).

    Args:
        drop: number to drop by layer. sizes: entries of each layer. Both of all layers, the same on every rank.
        across: one threshold over all layers for sum(drop); the most important weight of each layer stays.
        all_ties: drop everything that is not more important than the threshold, as the ITOP code does: with exact zeros
            among the active weights that is more than was asked.
        dtype: of the masters, float32 or float64.
        device: where `total` sums.
    """
    scores = [importance(criterion, x.weight, x.gradient, x.average) for x in layers]
    ties, span = "all" if all_ties else "last", sum(sizes)
    if criterion == "set":
        halves = torch.tensor([-(-d // 2) for d in drop for _ in range(2)])
        result = [torch.zeros_like(x.active) for x in layers]
        for sign in (0, 1):
            sides = [x.active & ((x.weight < 0) if sign else (x.weight >= 0)) for x in layers]
            counts = halves * torch.tensor([1 - sign, sign]).repeat(len(drop))
            picked = choose([Piece(2 * x.index + sign, x.start, -s, c) for x, s, c in zip(layers, scores, sides, strict=True)],
                            counts, total, span=span, dtype=dtype, device=device, ties=ties)
            result = [a | b for a, b in zip(result, picked, strict=True)]
        return result
    candidates = [x.active for x in layers]
    if across:
        best = choose([Piece(x.index, x.start, s, c) for x, s, c in zip(layers, scores, candidates, strict=True)],
                      torch.ones(len(sizes), dtype=torch.int64), total, span=span, dtype=dtype, device=device)
        candidates = [c & ~b for c, b in zip(candidates, best, strict=True)]
    pieces = [Piece(0 if across else x.index, x.start + (x.offset if across else 0), -s, c)
              for x, s, c in zip(layers, scores, candidates, strict=True)]
    counts = torch.tensor([sum(drop)] if across else list(drop), dtype=torch.int64)
    return choose(pieces, counts, total, span=span, dtype=dtype, device=device, ties=ties)


def dsr_threshold(threshold: float, removed: int, target: int, tolerance: float = 0.1) -> float:
    """The next global threshold of DSR: twice as large after removing too few, half as large after too many.

    H <- 2 H if removed < (1 - tolerance) target;  H / 2 if removed > (1 + tolerance) target.

    `across=True` of `prune` finds the threshold that removes exactly the target instead, and needs no search over updates.
    Source: Mostafa and Wang 2019, arXiv 1902.05967.
    """
    if removed < (1.0 - tolerance) * target:
        return 2.0 * threshold
    return threshold / 2.0 if removed > (1.0 + tolerance) * target else threshold
