"""What is kept of a class's samples in place of them: a Gaussian of their features."""

from __future__ import annotations

import warnings
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from everbatch.distributed import World
from everbatch.errors import check
from everbatch.optim.subspace.splits import NonFiniteStatistics

__all__ = ["RIDGE", "Covariance", "EmptyClass", "Moments", "Sampler"]

RIDGE = 1e-4
"""Added to every variance."""
Covariance: TypeAlias = Literal["full", "diagonal", "low_rank"]


class EmptyClass(ValueError):
    """A class without a sample, where statistics of it are taken."""


class Moments:
    """Sums of the features of some classes, in float64: what their Gaussians are made of, on any number of ranks.

        mean = sum x / n        covariance = (sum x x^T - n mean mean^T) / (n - 1) + 1e-4 I

    Args:
        classes: how many.
        squares: of whole outer products, or of the diagonal's entries alone; None: means only.

    Memory: classes * d^2 * 8 bytes with outer products.
    """

    def __init__(self, classes: int, squares: Literal["outer", "diagonal"] | None) -> None:
        self.classes, self.squares = classes, squares
        self.sums: Tensor | None = None
        """(classes, 1 + d): numbers of samples, and sums."""
        self.second: Tensor | None = None
        """(classes, d, d) or (classes, d)."""

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor, real: Tensor) -> None:
        """Take a batch, of which the rows count that are `real`: (n, d), (n,) in [0, classes), (n,) bool."""
        x = features.double()
        if self.sums is None:
            d = x.shape[1]
            shape = {"outer": (self.classes, d, d), "diagonal": (self.classes, d), None: (0,)}[self.squares]
            self.sums, self.second = x.new_zeros(self.classes, 1 + d), x.new_zeros(shape)
        assert self.second is not None
        x = torch.where(real[:, None], x, 0.0)  # not times 0, which leaves what is not finite
        self.sums.index_add_(0, labels, torch.cat([real[:, None].to(x), x], 1))
        if self.squares == "diagonal":
            self.second.index_add_(0, labels, x.square())
        elif self.squares == "outer":
            for label in range(self.classes):
                mine = torch.where((labels == label)[:, None], x, 0.0)
                self.second[label].addmm_(mine.T, mine)

    def reduce(self, world: World) -> None:
        """Sum over ranks, each of which has added as many batches. At most two all-reduces.

        Raises:
            NonFiniteStatistics: on every rank, of features that are not finite.
        """
        assert self.sums is not None and self.second is not None
        world.sum(self.sums)
        if self.squares is not None:
            world.sum(self.second)
        odd = ~(self.sums.isfinite().all(1) & (self.second.isfinite().flatten(1).all(1) if self.squares is not None else True))
        if bool(odd.any()):
            raise NonFiniteStatistics(f"MOS: features of classes {torch.nonzero(odd).flatten().tolist()[:5]} of the task are not "
                                      "finite; lower the learning rate or look at the data")

    def means(self, first: int = 0) -> Tensor:
        """(classes, d) float64.

        Raises:
            EmptyClass: a class without samples. `first`: number of the first class, for the text.
        """
        assert self.sums is not None
        counts = self.sums[:, 0]
        empty = [first + k for k in torch.nonzero(counts < 1).flatten().tolist()]
        if empty:
            raise EmptyClass(f"MOS: classes {empty[:5]} have no training sample in their task, must have one each")
        return self.sums[:, 1:] / counts[:, None]

    def spread(self, covariance: Covariance, rank: int, first: int = 0) -> Tensor:
        """Of each class, as `Sampler` takes it: float64 (classes, d, d), (classes, d) or (classes, rank + 1, d). Of one sample
        the covariance is 1e-4 I, with a warning."""
        assert self.sums is not None and self.second is not None
        counts, means = self.sums[:, 0], self.means(first)
        alone = [first + k for k in torch.nonzero(counts == 1).flatten().tolist()]
        if alone:
            warnings.warn(f"MOS: classes {alone[:5]} have one training sample each, so their covariance is taken as {RIDGE} I",
                          stacklevel=3)
        below = (counts - 1).clamp(min=1)
        if self.squares == "diagonal":
            centred = (self.second - counts[:, None] * means.square()).clamp(min=0.0)
            return centred / below[:, None] + RIDGE
        centred = self.second - counts[:, None, None] * means[:, :, None] * means[:, None, :]
        whole = (centred + centred.mT) / (2.0 * below[:, None, None])
        if covariance == "low_rank":
            return torch.stack([_leading(matrix, rank) for matrix in whole])
        return whole + RIDGE * torch.eye(whole.shape[1], dtype=whole.dtype, device=whole.device)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """(d, d) to (rank + 1, d): F and v with F^T F + diag(v) = matrix on the diagonal, and on the leading eigenvectors."""
    rank = min(rank, len(matrix))
    values, vectors = torch.linalg.eigh(matrix.cpu())
    factor = vectors[:, -rank:].T * values[-rank:].clamp(min=0.0).sqrt()[:, None]
    rest = (matrix.diagonal().cpu() - factor.square().sum(0)).clamp(min=0.0) + RIDGE
    return torch.cat([factor, rest[None]]).to(matrix.device)


class Sampler:
    """Draws from the Gaussians of classes, on the CPU.

    Args:
        means: (classes, d).
        spread: as `Moments.spread` gives it.
        covariance: which of its forms that is.

    Raises:
        NonFiniteStatistics: a covariance that stays indefinite with 1e-2 I added.
    """

    def __init__(self, means: Tensor, spread: Tensor, covariance: Covariance) -> None:
        check(len(means) == len(spread), "MOS", f"{len(means)} means and {len(spread)} covariances", "be of the same classes")
        self.means, self.covariance = means.float().cpu(), covariance
        spread = spread.cpu()
        if covariance == "full":
            self.factors = torch.stack([_root(matrix.double(), label).float() for label, matrix in enumerate(spread)])
        elif covariance == "diagonal":
            self.factors = spread.sqrt().float()
        else:
            self.factors = torch.cat([spread[:, :-1], spread[:, -1:].sqrt()], 1).float()

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` features of every class, one class after the other: (classes * count, d) and labels."""
        classes, d = self.means.shape
        made = [self._of(label, count, d, generator) for label in range(classes)]
        return torch.cat(made), torch.arange(classes).repeat_interleave(count)

    def _of(self, label: int, count: int, d: int, generator: torch.Generator) -> Tensor:
        factor, mean = self.factors[label], self.means[label]
        normal = torch.randn(count, d, generator=generator)
        if self.covariance == "full":
            return mean + normal @ factor.T
        if self.covariance == "diagonal":
            return mean + normal * factor
        few = torch.randn(count, len(factor) - 1, generator=generator)
        return mean + few @ factor[:-1] + normal * factor[-1]


def _root(matrix: Tensor, label: int) -> Tensor:
    """Lower L with L L^T = matrix, float64; with more on the diagonal where rounding has made it indefinite."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    for ridge in (0.0, 1e-4, 1e-3, 1e-2):
        factor, failed = torch.linalg.cholesky_ex(matrix + ridge * eye)
        if not int(failed):
            return factor  # type: ignore[no-any-return]
    raise NonFiniteStatistics(f"MOS: the covariance of class {label} is not positive definite, also with 1e-2 I added; look at "
                              "the features of its samples")
