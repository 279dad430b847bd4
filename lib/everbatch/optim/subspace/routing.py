"""Where tokens are routed, and how far a router may move without routing a token elsewhere. Pure functions.

Shapes: tokens X (n, d), a router theta (E, d) with scores X theta^T (n, E), its change delta (E, d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from everbatch.optim.subspace.splits import spectral_split
from everbatch.optim.subspace.transforms import null_space, rows

__all__ = ["bounds", "constrained", "corrected", "equality_bases", "free_squares", "margins", "routed", "stability"]

TOLERANCE = 1e-6
"""Of a bound, relative to 1 + its size: float32 rounds scores by less."""


def routed(scores: Tensor, top_k: int) -> Tensor:
    """Which experts each token is sent to, those of its `top_k` largest scores: (n, E), true or false."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(top_k, dim=1).indices, True)


def stability(before: Tensor, now: Tensor) -> Tensor:
    """Mean over tokens of |I_before and I_now| / k, of two results of `routed`: 0-dim."""
    return (before & now).sum(1).double().div(before.sum(1)).mean()


def margins(scores: Tensor, selected: Tensor) -> Tensor:
    """tau (E, n): a token's lowest selected score less that of each expert it is not sent to; infinite for those it is.

    Negative where such an expert scores higher than a selected one by now."""
    lowest = scores.masked_fill(~selected, float("inf")).amin(1, keepdim=True)
    return (lowest - scores).masked_fill(selected, float("inf")).T.contiguous()


def bounds(tau: Tensor, least: float) -> Tensor:
    """How far scores may rise: to `least` below the margin; where that is past already, no further, and where the margin is
    gone, back below it."""
    return torch.where((tau >= 0.0) & (tau < least), 0.0, tau - least)


def free_squares(x: Tensor, basis: Tensor) -> Tensor:
    """||x_n - U_j U_j^T x_n||^2 (E, n); 0 where what is left of a token outside of a basis is rounding."""
    size = (x * x).sum(1)
    along = torch.stack([(x @ u).square().sum(1) for u in basis])
    free = (size - along).clamp_min(0.0)
    return torch.where(free > TOLERANCE * size, free, 0.0)


def equality_bases(x: Tensor, selected: Tensor, delta: float) -> Tensor:
    """Of each expert the leading directions of the tokens sent to it, with a share `delta` of their energy: (E, d, k), padded
    with zero columns; of an expert without tokens none."""
    wide, found = x.double() if x.device.type == "cpu" else x.float(), list[Tensor]()
    for sent in selected.T:
        mine = wide[sent]
        turn = torch.eye(x.shape[1], dtype=wide.dtype, device=x.device)
        if len(mine) < x.shape[1]:  # the same eigenpairs, from the smaller of the two products
            turn, corner = torch.linalg.qr(mine.T)
            mine = corner.T
        moment = mine.T @ mine / max(1, len(mine))
        basis = turn @ spectral_split(moment, delta).basis if len(mine) else turn[:, :0]
        found.append(basis.to(x.dtype))
    return rows(found)


def constrained(
    delta: Tensor, basis: Tensor, x: Tensor, bound: Tensor, free: Tensor, iterations: int, draws: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A change near `delta` that moves no score of a selected expert along its basis, and no other beyond its bound:

        delta_j U_j = 0;    delta_j . x_n <= bound_jn

    The second by randomised Kaczmarz within the null space of U_j, so that the first goes on holding: of the tokens that
    violate, one is drawn with probability proportional to ||r||^2,  r = x_n - U_j U_j^T x_n,  and delta_j loses
    (delta_j . x_n - bound_jn) / ||r||^2 of r; all experts at once, until none violates.

    Args:
        basis: (E, d, k), orthonormal or zero columns.
        bound: (E, n), infinite where there is none.
        free: `free_squares`.
        iterations: at most so many.

    Returns:
        The change, and what it is still beyond a bound, 0-dim: tokens that lie in a basis cannot be helped.

    Cost: E n d multiply-adds, and one host sync, per iteration; one where nothing binds.
    """
    equality = null_space(basis)
    delta = equality.right(delta)
    slack = TOLERANCE * (1.0 + torch.where(bound.isfinite(), bound.abs(), 0.0))
    for turn in range(iterations + 1):
        over = delta @ x.T - bound
        weight = torch.where(over > slack, free, 0.0)
        reach = weight.cumsum(1)
        if turn == iterations or not bool((reach[:, -1] > 0).any()):
            break
        at = torch.rand(len(delta), 1, generator=draws).to(reach) * reach[:, -1:]
        pick = torch.searchsorted(reach, at, right=True).clamp_max(len(x) - 1)
        r = equality.right(x[pick[:, 0]])
        share = over.gather(1, pick) / free.gather(1, pick)
        delta = delta - torch.where(weight.gather(1, pick) > 0, share, 0.0) * r
    return delta, over.amax().clamp_min(0.0)


def corrected(theta: Tensor, x: Tensor, now: Tensor, ridge: float) -> tuple[Tensor, float]:
    """The router that gives the tokens, as they are now, the scores they had:  theta X^T X' (X'^T X' + ridge I)^-1.

    Returns:
        The router, and the cosine of its scores with those of before.
    """
    wide = torch.float64 if theta.device.type == "cpu" else torch.float32
    old, new, router = x.to(wide), now.to(wide), theta.to(wide)
    # As least squares of stacked rows: the product above loses as many digits again as X' has.
    corner = ridge**0.5 * torch.eye(new.shape[1], dtype=wide, device=new.device)
    scores = torch.cat([old @ router.T, old.new_zeros(new.shape[1], len(router))])
    found = torch.linalg.lstsq(torch.cat([new, corner]), scores).solution.T
    cosine = torch.nn.functional.cosine_similarity((old @ router.T).flatten(), (new @ found.T).flatten(), dim=0)
    return found.to(theta.dtype), float(cosine)
