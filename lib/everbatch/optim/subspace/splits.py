"""The directions that carry a second moment, and those that it leaves free."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from everbatch.errors import check, check_real

__all__ = ["NoFreeSubspace", "NonFiniteStatistics", "Split", "clipped", "free_split", "signed", "spectral_split"]


class NonFiniteStatistics(RuntimeError):
    """Inputs or a covariance with infinities or NaN, too many to be left out."""


class NoFreeSubspace(RuntimeError):
    """The directions to protect leave none to learn in."""


@dataclass(frozen=True, eq=False)
class Split:
    """The leading eigenpairs of a second moment."""

    basis: Tensor
    """V, (d, k), orthonormal columns, the largest entry of each positive."""
    values: Tensor
    """(k,) eigenvalues, descending, >= 0."""
    share: float
    """Of the energy (sum of eigenvalues^power), kept by V."""

    @property
    def rank(self) -> int:
        """k."""
        return self.basis.shape[1]


@torch.no_grad()
def spectral_split(matrix: Tensor, delta: float = 0.95, power: float = 1.0, max_rank: int | None = None,
                   total: float | None = None) -> Split:
    """The fewest leading eigenvectors of C with a share of at least `delta` of sum lambda^power.

    Eigenvalues that equal the last kept one (to 1e-6 relative) are kept too: the cut of a cluster is not unique. Symmetrised,
    in float64 on CPU and float32 on other devices; the result is in float32 at least. A zero matrix gives k = 0.

    Args:
        matrix: C, (d, d), positive semidefinite.
        delta: in (0, 1].
        power: > 0.
        max_rank: largest k; above d it is clipped, with a warning.
        total: the whole trace where C is a sketch of it; power must be 1.

    Raises:
        ValueError: a value out of range; an eigenvalue below -1e-4 of the trace.
        NonFiniteStatistics: C is not finite.
    """
    check(matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1], "spectral_split", f"shape {tuple(matrix.shape)}", "be square")
    check_real("spectral_split", "delta", delta, 0.0, 1.0, open_low=True)
    check_real("spectral_split", "power", power, 0.0, open_low=True)
    check(total is None or power == 1.0, "spectral_split", f"total with power={power}", "have power=1")
    check(max_rank is None or max_rank >= 1, "spectral_split", f"max_rank={max_rank!r}", "be >= 1")
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteStatistics("spectral_split: the matrix has entries that are not finite; look at the layer's inputs")
    width = matrix.shape[0]
    limit = width if max_rank is None else clipped("spectral_split", "max_rank", max_rank, width)
    wide = matrix.double() if matrix.device.type == "cpu" else matrix.float()
    values, vectors = torch.linalg.eigh((wide + wide.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    trace = float(wide.trace())
    check(float(values[-1]) >= -1e-4 * abs(trace), "spectral_split",
          f"an eigenvalue {float(values[-1]):.3g} at trace {trace:.3g}", "be positive semidefinite")
    values = values.clamp_min(0.0)
    energy = values.pow(power)
    whole = float(energy.sum()) if total is None else max(total, float(energy.sum()))
    if whole == 0.0:
        return Split(vectors[:, :0].to(_wide(matrix)), values[:0].to(_wide(matrix)), 0.0)
    shares = energy.cumsum(0) / whole
    reached = shares >= delta - 1e-12
    rank = int(reached.to(torch.int8).argmax()) + 1 if bool(reached[-1]) else width
    while rank < width and 0.0 < float(values[rank]) and float(values[rank]) > (1 - 1e-6) * float(values[rank - 1]):
        rank += 1
    rank = min(rank, limit)
    return Split(signed(vectors[:, :rank]).to(_wide(matrix)), values[:rank].to(_wide(matrix)), float(shares[rank - 1]))


def free_split(
    matrix: Tensor, delta: float = 0.95, power: float = 1.0, *, min_free: int | None = None, pinned: bool = False,
) -> Split:
    """`spectral_split` that leaves at least `min_free` directions free, by lowering delta; `share` tells what was used.

    Args:
        min_free: by default max(1, d // 16).
        pinned: keep delta as it is.

    Raises:
        NoFreeSubspace: `pinned`, and fewer directions would be free.
    """
    width = matrix.shape[0]
    free = max(1, width // 16) if min_free is None else min_free
    check(0 <= free < width, "free_split", f"min_free={free!r}", f"be in [0, {width})")
    split = spectral_split(matrix, delta, power)
    if split.rank <= width - free:
        return split
    if pinned:
        raise NoFreeSubspace(f"free_split: delta={delta} needs {split.rank} of {width} directions, must leave {free} free; lower "
                             "delta, or let it be lowered (pinned=False)")
    return spectral_split(matrix, delta, power, max_rank=width - free)


def signed(vectors: Tensor) -> Tensor:
    """Columns with their largest entry positive: eigenvectors are unique up to sign, checkpoints should be too."""
    if not vectors.numel():
        return vectors
    peak = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(peak < 0, -1.0, 1.0).to(vectors)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def clipped(who: str, name: str, value: int, width: int) -> int:
    if value > width:
        warnings.warn(f"{who}: {name}={value} is clipped to the width {width}", stacklevel=3)
    return min(value, width)
