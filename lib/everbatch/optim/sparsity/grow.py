"""Which inactive weights come: scores, the share of each layer, and the exact choice. Pure functions of flat tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from everbatch import seeds
from everbatch.optim.sparsity.prune import Layer
from everbatch.optim.sparsity.select import Piece, choose

__all__ = ["CRITERIA", "grow", "grow_bernoulli", "random_keys", "shares"]

CRITERIA = ("gradient", "random", "momentum", "random_unfired")


def random_keys(candidates: Tensor, start: int, key: tuple[int | str, ...]) -> Tensor:
    """One uniform number in (0, 1) per candidate, a function of (key, position) alone: float64 (n,), 0 elsewhere."""
    at = candidates.nonzero().view(-1)
    keys = torch.zeros(candidates.shape, dtype=torch.float64, device=candidates.device)
    keys[at] = torch.from_numpy(seeds.uniform_keys((at + start).cpu().numpy(), *key)).to(keys.device)
    return keys


def shares(
    removed: Sequence[int], inactive: Sequence[int], survivors: Sequence[int], means: Sequence[float], how: str,
) -> list[int]:
    """Entries to grow in each layer, as many as were removed altogether.

        layer:      R_l = removed_l
        survivors:  R_l proportional to the active entries that are left (DSR)
        momentum:   R_l proportional to the mean |momentum| of those (SNFS)

    Args: removed, survivors: by layer. inactive: candidates by layer, after pruning. means: mean |momentum| by layer.

    Proportional shares are made whole by largest remainder, capped at floor(.99 * inactive_l) (SNFS), or at inactive_l where
    that leaves too few places; what a cap cuts off goes to the other layers in the same proportions.

    Source: Dettmers and Zettlemoyer 2019, arXiv 1907.04840; Mostafa and Wang 2019, arXiv 1902.05967. SNFS takes ceilings and
    spreads the surplus evenly, so its total drifts; here it is exact.
    """
    if how == "layer":
        return [min(r, i) for r, i in zip(removed, inactive, strict=True)]
    weights = [float(v) for v in (survivors if how == "survivors" else means)]
    caps = [math.floor(0.99 * i) for i in inactive]
    total = min(sum(removed), sum(inactive))
    if sum(caps) < total:
        caps = list(inactive)
    if not sum(w for w, c in zip(weights, caps, strict=True) if c) > 0:
        weights = [1.0] * len(caps)
    result = [0] * len(caps)
    while (left := total - sum(result)) > 0:
        free = [i for i in range(len(caps)) if result[i] < caps[i] and weights[i] > 0]
        if not free:  # only layers of weight zero have room
            weights = [1.0] * len(caps)
            continue
        norm = sum(weights[i] for i in free)
        wanted = {i: left * weights[i] / norm for i in free}
        for i in free:
            result[i] += min(math.floor(wanted[i]), caps[i] - result[i])
        rest = total - sum(result)
        if rest == left:  # every share is below one: largest first
            for i in sorted(free, key=lambda i: -wanted[i])[:rest]:
                result[i] += 1
    return result


def grow(
    layers: Sequence[Layer], active: Sequence[Tensor], counts: Sequence[int], sizes: Sequence[int],
    total: Callable[[Tensor], Tensor], *, criterion: str, key: tuple[int | str, ...], across: bool = False,
    priority: Sequence[Tensor] | None = None, forbidden: Sequence[Tensor] | None = None, released: bool = False,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Entries to activate, among those that are not active now: bool (n,) per slice.

        gradient:        largest |dense gradient|
        momentum:        largest |running mean of the dense gradient|
        random:          uniform, without replacement
        random_unfired:  as random, entries that were never active before all others (pass them as the higher `priority`)

    Args:
        active: after pruning; a dropped entry is a candidate again.
        counts: entries to grow by layer; their sum with `across`, one threshold over all layers.
        key: of the random numbers; the layer's name is added.
        priority: uint8 per slice; a higher one comes first. The same kind on every rank.
        forbidden: entries that may not be activated.
        released: as the ITOP and CL-DST code: active entries compete with a score of zero, so where fewer than the wanted
            entries have a gradient, places go to them and are lost.

    Ties go to the first positions. Source: Evci et al. 2020, arXiv 1911.11134 (gradient); Mocanu et al. 2018 (random); Dettmers
    and Zettlemoyer 2019 (momentum); Liu et al. 2021, arXiv 2102.02887 (unfired). SNFS's momentum is the optimizer's, which says
    nothing of entries that are masked: here it is a mean of dense gradients.
    """
    random = criterion in ("random", "random_unfired")
    pieces = []
    for i, layer in enumerate(layers):
        candidates = ~active[i] if forbidden is None else ~(active[i] | forbidden[i])
        value = layer.average if criterion == "momentum" else layer.gradient
        if random:
            scores = random_keys(candidates, layer.start, (*key, layer.name)) if layer.keys is None else layer.keys.double()
        else:
            scores = torch.zeros_like(layer.weight, dtype=dtype) if value is None else value.to(dtype).abs()
            if released:
                scores, candidates = scores * ~active[i], torch.ones_like(candidates)
        pieces.append(Piece(0 if across else layer.index, layer.start + (layer.offset if across else 0), scores, candidates,
                            None if priority is None else priority[i]))
    wanted = torch.tensor([sum(counts)] if across else list(counts), dtype=torch.int64)
    chosen = choose(pieces, wanted, total, span=sum(sizes), dtype=torch.float64 if random else dtype, device=device,
                    ranked=priority is not None)
    return [c & ~a for c, a in zip(chosen, active, strict=True)]


def grow_bernoulli(
    layers: Sequence[Layer], active: Sequence[Tensor], counts: Sequence[int], inactive: Sequence[int], *,
    key: tuple[int | str, ...], forbidden: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Entries to activate, each candidate on its own with probability counts_l / inactive_l: bool (n,) per slice.

    The count varies: what the ITOP and CL-DST code does for random growth. No communication.
    """
    result = []
    for i, layer in enumerate(layers):
        candidates = ~active[i] if forbidden is None else ~(active[i] | forbidden[i])
        keys = random_keys(candidates, layer.start, (*key, layer.name)) if layer.keys is None else layer.keys
        result.append(candidates & (keys < counts[layer.index] / max(inactive[layer.index], 1)))
    return result
