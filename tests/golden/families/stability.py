"""`continual_evaluation*`: curves between task ends, and what the definitions and the released code make of them."""

from __future__ import annotations

import math

import numpy as np

from everbatch.metrics import Stability, largest_drop, largest_rise
from golden.comparison import Array, Comparison, FormatError, Tolerance, Vectors

__all__ = ["check"]

SINGLE = Tolerance(1e-6, 1e-7)
"""The released code takes means of float32."""


def check(file: Vectors, compare: Comparison) -> None:
    """Every run and every window that the file holds. `*_BUGGY` is not compared: the definition is, under `exact_*`."""
    cases = [case for case in file.groups() if case != "window"]
    for case in cases:
        _run(file, compare, case)
    for case in file.groups("window/"):
        front = f"window/{case}"
        values = file[f"{front}/acc"].tolist()
        for key, value in (("exact_drop", largest_drop(values, len(values))), ("ref_drop", largest_drop(values, len(values))),
                           ("exact_rise", largest_rise(values, len(values)))):
            compare.close(f"{front}/{key}", value, file[f"{front}/{key}"])
    if not cases:
        raise FormatError("no run: keys are like 0/acc")


def _run(file: Vectors, compare: Comparison, case: str) -> None:
    curves, per_task = file[f"{case}/acc"], file.integer(f"{case}/iterations_per_task")
    steps, tasks = curves.shape
    met = Stability((10, 100))
    worst, least = np.full(steps, math.nan), np.full((steps, tasks), math.nan)
    drops = {width: np.full((steps, tasks), math.nan) for width in met.widths}
    for step, row in enumerate(curves):
        task = step // per_task
        met.add(step, task, row[: task + 1].tolist())
        worst[step] = met.worst_case_accuracy
        least[step, :task] = met.lowest()
        for width, found in drops.items():
            found[step, : task + 1] = met.drops(width)
    _close(file, compare, f"{case}/ref_min_acc_per_task", least)
    _close(file, compare, f"{case}/ref_wc_acc", worst)
    _close(file, compare, f"{case}/ref_lca10", np.asarray(met.summary()["learning_curve_area_10"]))
    for width, found in drops.items():
        _close(file, compare, f"{case}/ref_WF{width}_per_task", found)
        compare.close(f"{case}/exact_WF{width}_final_per_task", met.drops(width), file[f"{case}/exact_WF{width}_final_per_task"])
        compare.close(f"{case}/exact_WP{width}_final_per_task", met.rises(width), file[f"{case}/exact_WP{width}_final_per_task"])


def _close(file: Vectors, compare: Comparison, key: str, got: Array) -> None:
    """Against the released code."""
    kept, compare.floats = compare.floats, SINGLE
    compare.close(key, got, file[key])
    compare.floats = kept
