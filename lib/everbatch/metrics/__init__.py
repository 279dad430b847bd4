"""Metrics of a stream of tasks: pure functions on the accuracy matrix, what happens between its rows, and what values of several
seeds say."""

from everbatch.metrics.estimate import Estimate, estimate
from everbatch.metrics.matrix import (
    average_incremental_accuracy,
    backward_transfer,
    final_average_accuracy,
    forgetting,
    forward_transfer,
    last_accuracy,
    seen_accuracy,
    summary,
)
from everbatch.metrics.stability import Stability, largest_drop, largest_rise

__all__ = [
    "Estimate", "Stability", "average_incremental_accuracy", "backward_transfer", "estimate", "final_average_accuracy",
    "forgetting", "forward_transfer", "largest_drop", "largest_rise", "last_accuracy", "seen_accuracy",
    "summary",
]
