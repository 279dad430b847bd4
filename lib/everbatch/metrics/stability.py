"""What happens between task ends: minimum accuracy, windowed forgetting and plasticity, learning curves.

Tasks i from 0, |T_i| the step after which task i ends, A(i, n) the accuracy on the evaluation samples of
task i after step n. Only steps that were evaluated count, and only tasks that were begun. k tasks are seen.

    min-ACC  = 1/(k-1) sum_{i<k}  min_{|T_i| < n} A(i, n)                     None for one task
    WC-ACC   = 1/k A(k, now) + (1 - 1/k) min-ACC                              k = the present task
    WF^w     = mean over seen tasks of  max(0, max A(i, m) - A(i, n))         m < n, both inside w points
    WP^w     = mean over seen tasks of  max(0, max A(i, n) - A(i, m))         m < n, both inside w points
    ACC      = 1/k sum_i A(i, |T_k|)
    LCA^b    = mean over tasks of the mean accuracy at the task's own first b points
    learning accuracy = mean over tasks of A(i, |T_i|)

Forgetting and transfer are those of `everbatch.metrics.matrix`, on the accuracies at task ends. Two
conventions of forgetting are told: `forgetting` (from the best before the last task, Chaudhry et al.
2018) and `forgetting_with_last` (the last task among those the best is taken of, as Mammoth and PyCIL
do; never negative). De Lange et al.'s FORG, from a task's own end, is minus `backward_transfer`.

Source: De Lange, van de Ven and Tuytelaars 2023, arXiv 2205.13452, for min-ACC, WC-ACC, WF and WP;
Chaudhry et al. 2019, arXiv 1812.00420, for the learning curve area; Riemer et al. 2019, arXiv
1810.11910, for learning accuracy.
Differs: WP is the definition. The released code (Mattdl/ContinualEvaluation) skips start points that
are lower than an earlier one, which is right for drops only: of 0.5, 0.1, 0.9 it gives 0.4 for the
rise, which is 0.8.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from everbatch.errors import check, check_whole, nearest
from everbatch.metrics.matrix import Unit, backward_transfer, forgetting, forward_transfer, in_range

__all__ = ["Stability", "Window", "WindowUnit", "largest_drop", "largest_rise"]

WindowUnit = Literal["points", "iterations"]
UNITS = ("points", "iterations")


class Window:
    """The largest drop and the largest rise of a curve between two points less than `width` apart, point by point.

    Kept are the points that a later one may be compared with: those higher than all after them, and
    those lower. Each enters and leaves once, so that a point costs O(1), whatever the width.
    """

    def __init__(self, width: int) -> None:
        check_whole("Window", "width", width, 1)
        self.width = width
        self.drop = 0.0
        self.rise = 0.0
        self._high: deque[tuple[int, float]] = deque()
        """(place, value), values descending."""
        self._low: deque[tuple[int, float]] = deque()
        """The same, ascending."""

    def add(self, place: int, value: float) -> None:
        """One more point; places ascend."""
        for kept in (self._high, self._low):
            while kept and kept[0][0] <= place - self.width:
                kept.popleft()
        if self._high:  # with the point before it inside the window, both are there
            self.drop = max(self.drop, self._high[0][1] - value)
            self.rise = max(self.rise, value - self._low[0][1])
        while self._high and self._high[-1][1] <= value:
            self._high.pop()
        while self._low and self._low[-1][1] >= value:
            self._low.pop()
        self._high.append((place, value))
        self._low.append((place, value))


def largest_drop(values: Sequence[float], width: int) -> float:
    """Of one curve: max(0, max_{m < n < m + width} values[m] - values[n]).

    >>> largest_drop([0.5, 0.1, 0.9], 3)
    0.4
    """
    return _window(values, width).drop


def largest_rise(values: Sequence[float], width: int) -> float:
    """Of one curve: max(0, max_{m < n < m + width} values[n] - values[m]).

    >>> largest_rise([0.5, 0.1, 0.9], 3)
    0.8
    """
    return _window(values, width).rise


def _window(values: Sequence[float], width: int) -> Window:
    window = Window(width)
    for place, value in enumerate(values):
        window.add(place, float(value))
    return window


class _Curve:
    """What is known of one task."""

    def __init__(self, widths: Sequence[int]) -> None:
        self.points = 0
        self.least = math.inf
        """Since the task's end."""
        self.windows = [Window(width) for width in widths]


class Stability:
    """The metrics of this page, online: give it every evaluation in turn.

    Args:
        windows: widths w, >= 1 each.
        window_unit: what a width counts: "points", evaluations of the task, as in the paper, or
            "iterations", steps. The same where every step is evaluated; where some are not, only
            iterations make runs comparable.
        unit: of the accuracies; as in `everbatch.metrics.summary`.
        first: b of the learning curve area, >= 1.

    Raises:
        ValueError: a width or `first` below 1, an unknown unit.

    Cost: O(1) for each task and width in a point; memory for at most w points of each.
    """

    def __init__(
        self, windows: Sequence[int] = (10, 100), *, window_unit: WindowUnit = "points",
        unit: Unit = "fraction", first: int = 10,
    ) -> None:
        check(window_unit in UNITS, "Stability", f"window_unit={window_unit!r}",
              "be points or iterations", nearest(str(window_unit), UNITS))
        for width in windows:
            check_whole("Stability", "windows", width, 1)
        check_whole("Stability", "first", first, 1)
        in_range("Stability", np.zeros(0), unit)
        self.widths, self.window_unit, self.unit, self.first = tuple(windows), window_unit, unit, first
        self.points = 0
        """Evaluations so far."""
        self.ends: list[list[float]] = []
        """By task: accuracies on it and all before it, at its last evaluation so far."""
        self._curves: list[_Curve] = []
        self._early: list[list[float]] = []
        """By task: at its own first evaluations."""
        self._step = -1

    def add(self, step: int, task: int, values: Sequence[float]) -> None:
        """Accuracies on tasks 0 to `task` after `step` steps, while or just after `task` is trained; NaN
        where there is none.

        Raises:
            ValueError: steps that do not ascend, a task that is neither the last one nor the next,
                another number of values, or values outside the unit's range.
        """
        known, row = len(self.ends), [float(value) for value in values]
        check(step > self._step, "Stability", f"step {step} after step {self._step}", "ascend")
        check(task in (known - 1, known) and task >= 0, "Stability", f"task {task} after {known} tasks",
              "be the present one or the next")
        check(len(row) == task + 1, "Stability", f"{len(row)} values at task {task}",
              f"be one for each of {task + 1} tasks")
        in_range("Stability", np.asarray(row), self.unit)
        if task == len(self.ends):
            self.ends.append(row)
            self._early.append([])
            self._curves.append(_Curve(self.widths))
        self._step, self.ends[task] = step, row
        self.points += 1
        if len(self._early[task]) < self.first:
            self._early[task].append(row[task])
        for i, (curve, value) in enumerate(zip(self._curves, row, strict=True)):
            if math.isnan(value):
                continue
            place = curve.points if self.window_unit == "points" else step
            curve.points += 1
            if i < task:
                curve.least = min(curve.least, value)
            for window in curve.windows:
                window.add(place, value)

    # ---------------------------------------------------------------------------------- by task
    def lowest(self) -> list[float]:
        """The lowest accuracy of each task but the present one since its end."""
        return [curve.least if curve.least < math.inf else math.nan for curve in self._curves[:-1]]

    def drops(self, width: int) -> list[float]:
        """Of each task, the largest drop in a window of this width."""
        return [curve.windows[self.widths.index(width)].drop for curve in self._curves]

    def rises(self, width: int) -> list[float]:
        """Of each task, the largest rise in a window of this width."""
        return [curve.windows[self.widths.index(width)].rise for curve in self._curves]

    # ------------------------------------------------------------------------------- over tasks
    @property
    def min_accuracy(self) -> float | None:
        """min-ACC. A minimum over many evaluations on few samples is biased low, by some of their
        standard errors."""
        return float(np.mean(self.lowest())) if len(self.ends) > 1 else None

    @property
    def worst_case_accuracy(self) -> float | None:
        """WC-ACC."""
        if not self.ends:
            return None
        own, share, least = self.ends[-1][-1], 1.0 / len(self.ends), self.min_accuracy
        return own if least is None else share * own + (1.0 - share) * least

    @property
    def stability_gap(self) -> float | None:
        """How far earlier tasks have come back from their minimum: their mean accuracy now, minus
        min-ACC; >= 0. Ours: it tells what is lost for a while from what stays lost. None for one task."""
        least = self.min_accuracy
        return None if least is None else float(np.mean(self.ends[-1][:-1])) - least

    def matrix(self) -> NDArray[np.float64]:
        """(k, k) accuracies at task ends, NaN above the diagonal."""
        found = np.full((len(self.ends), len(self.ends)), np.nan)
        for k, row in enumerate(self.ends):
            found[k, : k + 1] = row
        return found

    def summary(
        self, *, random_init: Sequence[float] | None = None,
        ahead: Sequence[float] | None = None,
    ) -> dict[str, float | None]:
        """All metrics by name; None for what one task, or nothing evaluated, leaves undefined.

        Args:
            random_init: accuracies on every seen task of the untrained network.
            ahead: accuracy on each seen task just before it was trained. Both together give
                `forward_transfer`.
        """
        if not self.ends:
            return {}
        a, seen = self.matrix(), len(self.ends)
        complete = not np.isnan(a[np.tril_indices(seen)]).any()
        transfer = None
        if complete and random_init is not None and ahead is not None and seen > 1:
            full = a.copy()
            for j in range(1, seen):
                full[j - 1, j] = ahead[j]
            transfer = forward_transfer(full, random_init[:seen], unit=self.unit)
        found: dict[str, float | None] = {
            "accuracy": float(np.mean(self.ends[-1])), "min_accuracy": self.min_accuracy,
            "worst_case_accuracy": self.worst_case_accuracy, "stability_gap": self.stability_gap}
        for width in self.widths:
            found[f"windowed_forgetting_{width}"] = float(np.mean(self.drops(width)))
            found[f"windowed_plasticity_{width}"] = float(np.mean(self.rises(width)))
        return found | {
            "forgetting": forgetting(a, unit=self.unit) if complete else None,
            "forgetting_with_last": forgetting(a, include_last=True, unit=self.unit) if complete else None,
            "backward_transfer": backward_transfer(a, unit=self.unit) if complete else None,
            "forward_transfer": transfer, "learning_accuracy": float(np.mean(np.diagonal(a))),
            f"learning_curve_area_{self.first}": float(np.mean([np.mean(e) for e in self._early]))}
