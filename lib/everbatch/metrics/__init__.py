"""Metrics of a stream of tasks: pure functions on the accuracy matrix."""

from everbatch.metrics.matrix import (
    average_incremental_accuracy,
    backward_transfer,
    final_average_accuracy,
    forgetting,
    forward_transfer,
    seen_accuracy,
    summary,
)

__all__ = [
    "average_incremental_accuracy", "backward_transfer", "final_average_accuracy", "forgetting", "forward_transfer",
    "seen_accuracy", "summary",
]
