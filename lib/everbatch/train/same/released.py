"""What SAME's released code computes, as functions: for comparison, and for the reference vectors it produced."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from everbatch.optim.subspace.splits import signed
from everbatch.optim.subspace.transforms import Subspace, inverse
from everbatch.train.same.freezing import between

__all__ = ["Activation", "curvature_released", "kept_rank", "router_released", "sketch"]

SKETCH_EVERY, START_STEP, WIDTH = 20, 10, 64
"""Forwards between sketches; of a task before the router's rule acts; columns of a sketch at most."""
EPS = 1e-8
BAND = 0.2
"""The router's factors are within 1 +- this."""


def sketch(x: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """A range of one batch's *centred* covariance, and the standard deviation along each direction.

        Y = X^T X Q,   U = orth(Y),   S_j = sqrt(sum_n (x_n . u_j)^2 / (N - 1 + 1e-8))

    Without a Rayleigh-Ritz step S is in the order of the QR decomposition, not sorted, though what reads it takes it to be.

    Args:
        x: rows (N, d). draw: Q, (d, k), Gaussian.
    """
    away = x - x.mean(0)
    basis = signed(torch.linalg.qr(away.T @ (away @ draw)).Q)
    return basis, ((away @ basis).square().sum(0) / (len(x) - 1 + 1e-8)).sqrt()


def kept_rank(deviations: Tensor, energy: float) -> int:
    """One more than the directions whose cumulative share of S^2 is at most `energy`; at most all."""
    shares = deviations.square().cumsum(0) / deviations.square().sum()
    return min(int((shares <= energy).sum()) + 1, len(deviations))


def router_released(basis: Tensor, deviations: Tensor, energy: float = 0.9, window: int = 3) -> Subspace:
    """The router's map: a_j = clip(b_j / max b, 0.8, 1.2), b_j = 1 / (trailing mean of S + 1e-6). At most a fifth is damped."""
    k = kept_rank(deviations, energy)
    sums = torch.cat([deviations.new_zeros(1), deviations[:k].cumsum(0)])
    at = torch.arange(1, k + 1, device=deviations.device)
    start = (at - window).clamp_min(0)
    inverse_means = 1.0 / ((sums[at] - sums[start]) / (at - start) + 1e-6)
    factors = (inverse_means / inverse_means.max()).clamp(1 - BAND, 1 + BAND)
    return Subspace(basis[:, :k].contiguous(), factors)


def curvature_released(basis: Tensor, deviations: Tensor, energy: float = 0.9, mu: float = 0.9) -> Subspace:
    """The experts' map: (diag(S) + mu)^-1 along U, 1 / mu elsewhere; S are standard deviations, where the paper has variances."""
    k = kept_rank(deviations, energy)
    return inverse(basis[:, :k].contiguous(), deviations[:k], mu)


@dataclass
class Activation:
    """Which experts the released code leaves active: moving averages of what the same weights drive, so scores are near 0."""

    utilisation: Tensor
    """(E,): mean weight, moving."""
    importance: Tensor
    """(E,): mean of weight * ||x||^2, moving; of the present task as well."""
    active: Tensor
    """(E,): 1 where an expert is."""
    latched: bool = False
    """Whether all but one are off, after which nothing is decided any more."""
    tau: float = 0.1
    decay: float = 0.95

    @classmethod
    def fresh(cls, experts: int, like: Tensor, tau: float = 0.1, decay: float = 0.95) -> Activation:
        """Before the first forward."""
        even = torch.full((experts,), 1.0 / experts, dtype=like.dtype, device=like.device)
        return cls(even, even.clone(), torch.ones_like(even), tau=tau, decay=decay)

    @property
    def scores(self) -> Tensor:
        """(E,): utilisation minus importance, each between 0 and 1."""
        return between(self.utilisation, EPS) - between(self.importance, EPS)

    def update(self, weight: Tensor, weighted: Tensor, task: int) -> None:
        """Take one training forward.

        Args:
            weight: (E,) mean over its tokens of w. weighted: of w * ||x||^2.
            task: the expert of this number is never off.
        """
        keep = self.decay
        self.utilisation = keep * self.utilisation + (1 - keep) * weight
        self.importance = keep * self.importance + (1 - keep) * weighted
        if self.latched:
            return
        self.active = (self.scores >= self.tau).to(self.active)
        own = min(task, len(self.active) - 1)
        self.active[own] = 1.0
        self.latched = bool(self.active.sum() == 1)
