"""What a training step leaves for `after_step`, and what a mixin adds to a run's results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from everbatch.data import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "StepRecord"]


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


@dataclass(frozen=True)
class Report:
    """What a mixin has to say of a run that has ended."""

    name: str
    """Under which result.json holds the values."""
    values: Mapping[str, Any]
    lines: tuple[str, ...] = ()
    """To print."""
    figures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)
    """By name; drawn only where they are wanted."""
