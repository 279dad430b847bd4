"""Classification: one class index for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from everbatch.errors import check
from everbatch.problems.base import Problem

__all__ = ["Classification", "best"]


def best(logits: Tensor, allowed: Tensor) -> Tensor:
    """The allowed class of the largest logit, for each row: (n, classes), (m,) -> (n,)."""
    return allowed[logits[:, allowed].argmax(1)]


@dataclass(frozen=True, kw_only=True)
class Classification(Problem):
    """Logits (n, classes) against class indices (n,): cross-entropy; scored by accuracy.

    What `Trainer` does without a `problem`, with its own `label_smoothing`. No collective of its own.
    """

    label_smoothing: float = 0.0
    """Share of each target spread evenly over all classes, in the stream's loss; in [0, 1)."""

    term: ClassVar[str] = "cross_entropy"
    text: ClassVar[str] = "CE(logits, labels)"
    labels: ClassVar[bool] = True
    cross_entropy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(0 <= self.label_smoothing < 1, "Classification", f"label_smoothing={self.label_smoothing!r}", "be in [0, 1)")

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Problem.losses`."""
        return functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=self.label_smoothing)

    def check(self, outputs: Tensor, targets: Tensor, known: int) -> None:
        """See `Problem.check`: as many columns as the stream has classes."""
        shape = tuple(outputs.shape)
        wide = outputs.ndim == 2 and outputs.shape[1] >= known
        check(wide, "Trainer", f"logits of {shape}, {known} classes", "be (n, classes)",
              "give the model a head as wide as the stream")
        check(len(outputs) == len(targets), "Trainer", f"logits of {shape} for {len(targets)} samples", "be one row for each")

    def sums(self, outputs: Tensor, targets: Tensor, weight: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Weight of the rows that are right, and of all."""
        guess = outputs.argmax(1) if allowed is None else best(outputs, allowed)
        right = (guess == targets) * weight
        return torch.stack([right.sum(), weight.sum()]).double()

    def scores(self, sums: Tensor) -> dict[str, float]:
        """`accuracy`, in [0, 1]."""
        right, total = sums.unbind()
        return {"accuracy": (right / total).item()}
