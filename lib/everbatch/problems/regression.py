"""Regression: one number, or several, for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from everbatch.errors import check
from everbatch.problems.base import Problem

__all__ = ["Regression"]


@dataclass(frozen=True, kw_only=True)
class Regression(Problem):
    """Outputs against targets of as many numbers, (n,), (n, 1) or (n, k): squared or Huber's error, averaged over the k.

    Scored by R squared (averaged over the k, as scikit-learn does) and mse. `Ignite` bounds the mean prediction, unless
    `Trainer(output_fn=...)` names another output. No collective of its own. Targets come with the rows:
    `everbatch.data.RowSource(x, targets=y)`.
    """

    loss: Literal["squared", "huber"] = "squared"
    """squared: (u - y)^2. huber: 1/2 (u - y)^2 up to `delta`, beyond it delta (|u - y| - delta / 2)."""
    delta: float = 1.0
    """Of huber; > 0."""

    term: ClassVar[str] = "error"
    text: ClassVar[str] = "error(outputs, targets)"
    fraction: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self.loss in ("squared", "huber"), "Regression", f"loss={self.loss!r}", "be squared or huber")
        check(self.delta > 0, "Regression", f"delta={self.delta!r}", "be > 0")

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Problem.losses`."""
        u, y = _columns(outputs, targets)
        if self.loss == "huber":
            return functional.huber_loss(u, y, reduction="none", delta=self.delta).mean(1)
        return functional.mse_loss(u, y, reduction="none").mean(1)

    def check(self, outputs: Tensor, targets: Tensor, known: int) -> None:
        """See `Problem.check`."""
        same = len(outputs) == len(targets) and outputs.numel() == targets.numel()
        check(same, "Regression", f"outputs of shape {tuple(outputs.shape)} for targets of {tuple(targets.shape)}",
              "be as many numbers for each row")

    def sums(self, outputs: Tensor, targets: Tensor, weight: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Rows; and of each of the k numbers: squared error, target, squared target."""
        u, y = (v.double() for v in _columns(outputs, targets))
        w = weight.double()
        columns = ((u - y).square(), y, y.square())
        return torch.cat([w.sum()[None], *(w @ column for column in columns)])

    def scores(self, sums: Tensor) -> dict[str, float]:
        """`r2`, at most 1 and without a lower bound; `mse`. Of targets that are all equal: 1 where they are met, else 0."""
        rows, (wrong, first, second) = sums[0], sums[1:].view(3, -1)
        spread = (second - first.square() / rows).clamp(min=0.0)
        flat = spread <= 1e-14 * second
        r2 = torch.where(flat, (wrong <= 1e-14 * second).to(wrong), 1.0 - wrong / spread.where(~flat, torch.ones_like(spread)))
        return {"r2": r2.mean().item(), "mse": (wrong / rows).mean().item()}

    def output_fn(self, outputs: Tensor, batch: Any) -> Tensor:
        """The mean prediction."""
        return outputs.mean()


def _columns(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (n, k), in the outputs' type."""
    return outputs.reshape(len(outputs), -1), targets.reshape(len(targets), -1).to(outputs.dtype)
