"""The evaluation in a few lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["summary"]


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean over orders of both accuracies, by protocol and method."""
    lines = [f"{'protocol':<14} {'method':<24} {'orders':>6} {'avg acc %':>10} {'acc %':>8}"]
    for protocol, method in dict.fromkeys((row["protocol"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["protocol"], row["method"]) == (protocol, method) and "failed" not in row]
        means = [100 * math.fsum(row[name] for row in mine) / len(mine) if mine else math.nan for name in ("avg_acc", "acc")]
        lines.append(f"{protocol:<14} {method:<24} {len(mine):>6} {means[0]:>10.2f} {means[1]:>8.2f}")
    return "\n".join(lines)
