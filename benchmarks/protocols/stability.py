"""The stream of `benchmarks/protocols/stream.py`, with every seen task evaluated after every step."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.ledger.cells import Cell
from benchmarks.protocols import stream
from everbatch.report.recorder import read_scalars

__all__ = ["Scale", "dip", "watch"]

POINTS = 20
"""Steps at a task's start, and at its end, of which the minima are compared."""


@dataclass(frozen=True, kw_only=True)
class Scale(stream.Scale):
    """What all cells share."""


def watch(cell: Cell, home: Path) -> dict[str, float | None]:
    """One cell. Options of an arm: those of the recipe, nested.

    Returns:
        accuracy, min_accuracy, worst_case_accuracy, stability_gap, windowed_forgetting_10; and dip, which compares minima over
        equally many points, so that what evaluation noise makes of a minimum cancels.
    """
    with tempfile.TemporaryDirectory(prefix="everbatch-cell-") as folder:
        values = stream.conducted(cell, home, folder, evaluation={"every": 1}).values
        rows = read_scalars(Path(folder) / "scalars.jsonl")
    found = values["evaluation"]
    names = ("accuracy", "min_accuracy", "worst_case_accuracy", "stability_gap", "windowed_forgetting_10")
    return {**{name: found[name] for name in names}, "dip": dip(rows, found["task_ends"])}


def dip(rows: Sequence[Mapping[str, float]], ends: Sequence[int]) -> float:
    """Mean over tasks k > 1 and earlier tasks i of  min over the last steps of k - min over its first steps  of the accuracy
    on i, `POINTS` steps each.

    Args:
        rows: scalars by step; "step" s is what was found after s + 1 steps.
        ends: steps done at the end of each task.
    """
    curves = {int(row["step"]) + 1: row for row in rows}
    found = []
    for task in range(1, len(ends)):
        first = range(ends[task - 1] + 1, ends[task - 1] + POINTS + 1)
        last = range(ends[task] - POINTS + 1, ends[task] + 1)
        for earlier in range(task):
            least = [min(curves[step][f"evaluation/task_{earlier}"] for step in steps) for steps in (first, last)]
            found.append(least[1] - least[0])
    return float(np.mean(found))
