"""The moves of refresh learning as pure functions: ascent where earlier tasks do not mind."""

from __future__ import annotations

import torch
from torch import Tensor

from everbatch.engines.host import Host
from everbatch.engines.shards import Shard

__all__ = ["inverse_fisher", "normalized_move", "norms_of", "sde_move"]

GUARD = 1e-18
"""Added to a gradient's norm: the released code adds 1e-20 to the norm of 0.01 times the
gradient."""


def sde_move(gradient: Tensor, inverse: Tensor, gamma: float, noise: Tensor | None) -> Tensor:
    """One unlearning step of the paper:  gamma * P g + sqrt(2 gamma P) n,  the noise's covariance being 2 gamma P.

    Args:
        gradient: of the loss to ascend; `inverse`: P, the damped inverse Fisher information;
            `noise`: n ~ N(0, 1), or None for none. All of one shape.
        gamma: step size, >= 0.

    Source: Wang et al. 2024, arXiv 2403.13249: discretised Langevin ascent with diffusion matrix
    F^-1.
    """
    move = gamma * inverse * gradient
    return move if noise is None else move + (2.0 * gamma * inverse).sqrt() * noise


def normalized_move(
    gradient: Tensor, weight_norm: Tensor, gradient_norm: Tensor, fisher: Tensor | None, noise: Tensor | None, *, delta: float,
    fisher_coef: float, noise_coef: float,
) -> Tensor:
    """One unlearning step of the released code:  delta * (||theta|| g / ||g|| + noise_coef n) / (1 + fisher_coef F).

    Args:
        gradient: of one parameter, or this rank's slice of it.
        weight_norm, gradient_norm: 0-dim, norms of the whole parameter and of its whole gradient; a
            zero norm leaves the noise.
        fisher: F, as `gradient`; None for zero.
        noise: n ~ N(0, 1), as `gradient`; None for none.

    Invariant to the scale of the loss. Without noise and F the parameter moves by delta of its own
    norm.
    Source: joey-wang123/CL-refresh-learning, models/derpp.py.
    """
    move = gradient * (weight_norm / (gradient_norm + GUARD)).to(gradient)
    if noise is not None:
        move = move + noise_coef * noise
    return delta * (move if fisher is None else move / (1.0 + fisher_coef * fisher))


def inverse_fisher(gradient: Tensor, fisher: Tensor | None, damping: float) -> Tensor:
    """P = 1 / (F + damping), shaped like the gradient; F = 0 where it is not known."""
    known = torch.zeros_like(gradient) if fisher is None else fisher
    return 1.0 / (known + damping)


def norms_of(host: Host, shards: list[Shard], *vectors: list[Tensor]) -> list[dict[str, Tensor]]:
    """Norms of whole parameters for several vectors over these shards: name to 0-dim float64. One
    collective for all."""
    names = host.names
    place = {name: i for i, name in enumerate(names)}
    squares = torch.zeros(len(vectors), len(names), dtype=torch.float64, device=host.device)
    if shards:
        index = torch.tensor([place[s.name] for s in shards], device=host.device)
        for row, tensors in zip(squares, vectors, strict=True):
            wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
            norms = torch.stack(list(torch._foreach_norm(tensors, 2, dtype=wide))).to(host.device, torch.float64)
            row.index_add_(0, index, norms.square())
    return [dict(zip(names, row.sqrt().unbind(), strict=True)) for row in host.total(squares)]
