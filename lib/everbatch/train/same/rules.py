"""From what earlier tasks fed a layer to the maps that keep its router and its experts right for them."""

from __future__ import annotations

import torch
from torch import Tensor

from everbatch.errors import check
from everbatch.optim.subspace.splits import NoFreeSubspace, NonFiniteStatistics, Split, free_split, signed, spectral_split
from everbatch.optim.subspace.transforms import Projection, Subspace, damped, null_space, window_damped
from everbatch.train.same.moments import LayerSums
from everbatch.train.same.options import SAMEOptions

__all__ = ["maps_of", "mean_square", "router_map", "sketched", "split_of"]


def mean_square(sums: LayerSums) -> float:
    """tr(C) / d: of a layer's inputs."""
    tokens, squares = sums["numbers"][:2].tolist()
    return float(squares / (max(tokens, 1.0) * sums["second"].shape[0]))


@torch.no_grad()
def split_of(sums: LayerSums, draw: Tensor | None, config: SAMEOptions, *, router: str, who: str) -> Split:
    """The leading eigenpairs of C = (1 / n) sum x x^T: exact from the whole matrix, approximate from a sketch of it.

    Raises:
        NonFiniteStatistics: naming the layer and the task.
        NoFreeSubspace: router="null" with delta pinned leaves no direction to learn in.
    """
    tokens, squares = sums["numbers"][:2].tolist()
    matrix = sums["second"] / max(tokens, 1.0)
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteStatistics(f"{who}: the second moment of its inputs is not finite; look at the layer before it")
    if draw is not None:
        return sketched(matrix, draw, config, squares / max(tokens, 1.0))
    if router == "null":
        try:
            return free_split(matrix, config.delta, config.power, min_free=config.min_free, pinned=config.pinned)
        except NoFreeSubspace as error:
            raise NoFreeSubspace(f"{who}: {error}") from None
    return spectral_split(matrix, config.delta, config.power)


@torch.no_grad()
def sketched(product: Tensor, draw: Tensor, config: SAMEOptions, trace: float) -> Split:
    """The leading eigenpairs of C from Y = C Q alone, by Nystroem's approximation  C ~ Y (Q^T Y)^-1 Y^T,  shifted for stability.

    Args:
        product: Y, (d, k). draw: Q. trace: of C.

    Source: Tropp et al. 2017, arXiv 1706.05736, Algorithm 3.
    """
    y, q = product.double(), draw.to(product.device, torch.float64)
    size = float(y.norm())
    if size == 0.0:
        return Split(product[:, :0], product[0, :0], 0.0)
    shift, failed = torch.finfo(product.dtype).eps * size, True
    while failed:  # until it covers what rounding has made negative
        shift *= 10.0
        moved = y + shift * q
        core = q.T @ moved
        factor, info = torch.linalg.cholesky_ex((core + core.T) / 2)
        failed = bool(info != 0)
    thin = torch.linalg.solve_triangular(factor.T, moved, upper=True, left=False)
    u, sigma, _ = torch.linalg.svd(thin, full_matrices=False)
    values = (sigma.square() - shift).clamp_min(0.0)[: config.wide_rank]
    energy = values.pow(config.power)
    whole = max(trace, float(energy.sum())) if config.power == 1.0 else float(energy.sum())
    shares = energy.cumsum(0) / whole
    rank = min(int((shares < config.delta - 1e-12).sum()) + 1, len(values))
    basis = signed(u[:, :rank]).to(product.dtype).contiguous()
    return Split(basis, values[:rank].to(product.dtype), float(shares[rank - 1]))


def router_map(split: Split, config: SAMEOptions, mu: float, router: str) -> Subspace:
    """null: nothing along V. soft: mu / (lambda + mu) along it. paper: lambda over its trailing mean."""
    if router == "null":
        return null_space(split.basis)
    if router == "soft":
        return damped(split.basis, split.values, mu)
    check(router == "paper", "SAME", f"router={router!r}", "be null, soft or paper")
    return window_damped(split.basis, split.values, config.window)


def maps_of(layer: str, experts: int, split: Split, config: SAMEOptions, mu: float) -> dict[str, Projection]:
    """What acts on a layer by the history of earlier tasks, by parameter name; the basis is shared."""
    if not split.rank:
        return {}
    found: dict[str, Projection] = {}
    if config.router in ("null", "soft"):
        found[f"{layer}.router"] = Projection(right=router_map(split, config, mu, config.router))
    if config.curvature:
        shared = Projection(right=damped(split.basis, split.values, mu))
        found |= {f"{layer}.down_{i}": shared for i in range(experts)}
    return found
