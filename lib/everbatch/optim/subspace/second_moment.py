"""Second moments of a layer's inputs: running sums and low-rank sketches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from everbatch.distributed import World
from everbatch.errors import check, check_real
from everbatch.optim.subspace.splits import NonFiniteStatistics, clipped, signed

__all__ = ["LowRankSecondMoment", "SecondMoment"]


class SecondMoment:
    """Running second moment of rows x of width d, exact whatever the batching.

        uncentred:  C = (1/n) sum x x^T
        centred:    C = (1/n) sum (x - m)(x - m)^T,  m = (1/n) sum x

    Two accumulators merge by  n = n_a + n_b,  m = m_a + (n_b/n) e,  M = M_a + M_b + (n_a n_b / n) e e^T,  e = m_b - m_a
    (uncentred: e = 0), M = n C. What came in since the last `reduce` is kept apart, so nothing is summed over ranks twice.

    Args:
        width: d.
        centred: subtract the mean.
        dtype: of the sums; float32 or float64.
        device: of the sums.

    Cost: d^2 numbers, twice between reductions; n d^2 multiply-adds per update. Counts are float64. An update on another
    device than the CPU does not wait for it: rows that are not finite are counted there, and refused when a number is next
    asked for (`count`, `matrix`, `mean`, `dropped`, `reduce`, `state_dict`).
    Source: Chan, Golub and LeVeque 1983 for the merge.
    """

    def __init__(self, width: int, *, centred: bool = False, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> None:
        check(isinstance(width, int) and width >= 1, "SecondMoment", f"width={width!r}", "be an integer >= 1")
        check(dtype in (torch.float32, torch.float64), "SecondMoment", f"dtype={dtype}", "be float32 or float64")
        self.width, self.centred = width, centred
        self._reduced: Sums = (torch.zeros((), dtype=torch.float64, device=device),
                               torch.zeros(width, width, dtype=dtype, device=device),
                               torch.zeros(width, dtype=dtype, device=device))
        self._fresh: Sums = _nothing(self._reduced)
        self.__dropped = torch.zeros((), dtype=torch.float64, device=device)
        self.__worst = torch.zeros(3, dtype=torch.float64, device=device)
        """Of the update with most rows that were not finite: their share, their number, and all its rows."""

    @property
    def dropped(self) -> int:
        """Rows left out because they were not finite."""
        _refuse(self.__worst)
        return int(self.__dropped)

    @property
    def count(self) -> float:
        """Rows that this accumulator has seen: those all ranks had at the last `reduce`, and this rank's since."""
        _refuse(self.__worst)
        return float(self._reduced[0] + self._fresh[0])

    @property
    def valid(self) -> bool:
        """Whether there is anything to compute from."""
        return self.count > 0

    @property
    def matrix(self) -> Tensor:
        """C, (d, d); zero before the first row."""
        _refuse(self.__worst)
        n, total, _ = _merge(self._reduced, self._fresh)
        return total / torch.where(n > 0, n, 1.0).to(total)

    @property
    def mean(self) -> Tensor:
        """m, (d,); zero where not centred."""
        _refuse(self.__worst)
        return _merge(self._reduced, self._fresh)[2]

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the rows of x (..., d); those whose mask (...) is false, padding, are left out.

        Raises:
            NonFiniteStatistics: more than 1 % of the rows are not finite; fewer are dropped and counted. At once on the CPU,
                later elsewhere (see the class).
        """
        rows, counted, given = _rows(x, self.width, mask)
        finite = torch.isfinite(rows).all(1)
        good = finite if counted is None else finite & counted
        kept = good.sum().double()
        worst = torch.stack([(given - kept) / given.clamp_min(1.0), given - kept, given])
        if rows.device.type == "cpu":
            _refuse(worst)
        self.__dropped = self.__dropped + (given - kept)
        self.__worst = torch.where(worst[0] > self.__worst[0], worst, self.__worst)
        rows = torch.where(good[:, None], rows, 0.0).to(self._fresh[1])
        mean = torch.zeros_like(self._fresh[2])
        if self.centred:
            mean = rows.sum(0) / kept.clamp_min(1.0).to(rows)
            rows = torch.where(good[:, None], rows - mean, 0.0)
        self._fresh = _merge(self._fresh, (kept, rows.T @ rows, mean))

    def merge(self, other: SecondMoment) -> None:
        """Add what another accumulator has seen."""
        check(other.width == self.width and other.centred == self.centred, "SecondMoment", "an accumulator of another kind",
              "have the same width and centring")
        _refuse(other.__worst)
        self._fresh = _merge(self._fresh, _merge(other._reduced, other._fresh))

    def decay(self, factor: float) -> None:
        """Multiply the counts by `factor`, in (0, 1], at a task start: older rows then weigh less."""
        check_real("SecondMoment", "decay", factor, 0.0, 1.0, open_low=True)
        self._reduced, self._fresh = _scaled(self._reduced, factor), _scaled(self._fresh, factor)

    def reduce(self, world: World | None = None) -> None:
        """Sum what came in since the last call over the ranks. Two all-reduces, of d^2 numbers and the count; centred, one of
        d + 1 numbers before them."""
        world = world or World.current()
        n, total, mean = self._fresh
        worst = self.__worst
        if world.size > 1:
            count = n.reshape(1)
            if self.centred:
                sums = world.sum(torch.cat([count, n * mean.double()]))  # a rank without rows sends zeros
                together = (sums[1:] / sums[:1].clamp_min(1e-300)).to(mean)
                away = mean - together  # about the common mean, so that no difference of large sums is taken
                total, mean = total + n * torch.outer(away, away), together
            told = torch.zeros(world.size, 3, dtype=torch.float64, device=n.device)
            told[world.rank] = worst
            numbers = world.sum(torch.cat([count, told.view(-1)]))  # a float32 count would stop at 2^24 rows
            total, n, told = world.sum(total.clone()), numbers[0], numbers[1:].view(-1, 3)
            worst = told[told[:, 0].argmax()]  # so that no rank goes on without another
        _refuse(worst)
        self._reduced = _merge(self._reduced, (n, total, mean))
        self._fresh = _nothing(self._reduced)

    def state_dict(self) -> dict[str, Tensor]:
        """Reduced sums, for saving; what is not yet reduced is this rank's own, so `reduce` first.

        Raises:
            RuntimeError: rows since the last `reduce`.
        """
        _refuse(self.__worst)
        if bool(self._fresh[0]):
            raise RuntimeError("SecondMoment: rows since the last reduce() would be lost; call reduce() on every rank first")
        return {"count": self._reduced[0].cpu(), "total": self._reduced[1], "mean": self._reduced[2]}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        check(state["total"].shape == self._fresh[1].shape, "SecondMoment", f"a state of width {len(state['total'])}",
              f"be of width {self.width}")
        like = self._fresh[1]
        count = torch.as_tensor(state["count"], dtype=torch.float64, device=like.device).clone()
        self._reduced = (count, state["total"].to(like).clone(), state["mean"].to(like).clone())
        self._fresh = _nothing(self._reduced)


@dataclass
class LowRankSecondMoment:
    """Uncentred second moment as V diag(values) V^T plus a residual trace: exact while the rank stays within `rank`.

    An update stacks  [sqrt(n/(n+N)) diag(sqrt values) V^T ; X / sqrt(n+N)],  takes its thin SVD, keeps `rank` pairs, and adds
    the discarded eigenvalues to  rest <- n/(n+N) rest.  The trace is always right, so shares of energy are.

    Cost: (d + 1) * rank numbers; an SVD of (rank + min(N, d), d) per update.
    """

    basis: Tensor
    """V, (d, k), orthonormal columns, k <= rank."""
    values: Tensor
    """(k,), descending."""
    rank: int
    count: float = 0.0
    rest: float = 0.0
    """Trace that was discarded."""

    @classmethod
    def empty(cls, width: int, rank: int, dtype: torch.dtype = torch.float32) -> LowRankSecondMoment:
        """Before the first row. A rank above the width is clipped, with a warning."""
        check(rank >= 1, "LowRankSecondMoment", f"rank={rank!r}", "be >= 1")
        rank = clipped("LowRankSecondMoment", "rank", rank, width)
        return cls(torch.zeros(width, 0, dtype=dtype), torch.zeros(0, dtype=dtype), rank)

    @property
    def trace(self) -> float:
        """tr C."""
        return float(self.values.sum()) + self.rest

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the rows of x (..., d). Raises `NonFiniteStatistics` as `SecondMoment` does."""
        width = self.basis.shape[0]
        rows, _ = clean_rows(x, width, mask)
        rows = rows.to(self.basis)
        if not len(rows):
            return
        n, new = self.count, float(len(rows))
        if len(rows) > 2 * width:
            rows = torch.linalg.qr(rows, mode="r").R
        kept = (self.basis * self.values.clamp_min(0).sqrt()).T * math.sqrt(n / (n + new))
        _, sigma, vh = torch.linalg.svd(torch.cat([kept, rows / math.sqrt(n + new)]), full_matrices=False)
        values = sigma.square()
        self.rest = n / (n + new) * self.rest + float(values[self.rank :].sum())
        self.basis, self.values, self.count = signed(vh[: self.rank].T), values[: self.rank], n + new


def clean_rows(x: Tensor, width: int, mask: Tensor | None = None) -> tuple[Tensor, int]:
    """Rows (n, width) of x (..., width) that are unmasked and finite, detached, and how many were not finite. Host sync."""
    rows, counted, _ = _rows(x, width, mask)
    rows = rows if counted is None else rows[counted]
    good = torch.isfinite(rows).all(1)
    bad = int((~good).sum())
    _refuse(torch.tensor([bad / max(1, len(rows)), bad, len(rows)]))
    return (rows[good] if bad else rows), bad


def _rows(x: Tensor, width: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows (n, width) of x (..., width), detached; which of them count, where a mask says so; and how many do."""
    check(x.shape[-1:] == (width,), "second moment", f"inputs of shape {tuple(x.shape)}", f"end in {width}")
    rows = x.detach().reshape(-1, width)
    if mask is None:
        return rows, None, torch.full((), len(rows), dtype=torch.float64, device=rows.device)
    check(mask.shape == x.shape[:-1], "second moment", f"a mask of shape {tuple(mask.shape)}", f"be {tuple(x.shape[:-1])}")
    counted = mask.reshape(-1).bool()
    return rows, counted, counted.sum().double()


def _refuse(worst: Tensor) -> None:
    """Raise `NonFiniteStatistics` where more than 1 % of the rows of an update were not finite. Host sync."""
    share, bad, given = worst.tolist()
    if share > 0.01:
        raise NonFiniteStatistics(f"second moment: {bad:.0f} of {given:.0f} rows are not finite, must be at most 1 %; look at "
                                  "the layer's inputs")


Sums = tuple[Tensor, Tensor, Tensor]
"""Count, 0-dim float64; sum of squares about the mean; mean."""


def _merge(a: Sums, b: Sums) -> Sums:
    """The sums of both, without asking how many rows there are; uncentred sums have mean zero."""
    n = a[0] + b[0]
    some = n.clamp_min(1e-300)
    away = b[2] - a[2]
    between = (a[0] * b[0] / some).to(away) * torch.outer(away, away)
    return n, a[1] + b[1] + between, a[2] + (b[0] / some).to(away) * away


def _nothing(like: Sums) -> Sums:
    return torch.zeros_like(like[0]), torch.zeros_like(like[1]), torch.zeros_like(like[2])


def _scaled(a: Sums, factor: float) -> Sums:
    return a[0] * factor, a[1] * factor, a[2]
