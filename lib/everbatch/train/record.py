"""What a training step leaves for `after_step`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from everbatch.data import Batch

__all__ = ["StepRecord"]


@dataclass(frozen=True)
class StepRecord:
    """One finished step, as the recorded pass saw it."""

    step: int
    """Steps before this one, over the whole run."""
    applied: bool
    """False when a gradient was not finite on some rank: the step left no trace."""
    loss: Tensor
    """0-dim: this rank's share of the total loss; the mean over ranks is the loss."""
    terms: dict[str, Tensor]
    """Loss terms by name, this rank's share of each."""
    parts: list[Batch]
    """What was trained on, after augmentation; `extras["raw"]` of the stream part are its inputs before it."""
    outputs: dict[str, Tensor]
    """Detached outputs by part, rows in the part's order."""
