"""Ready figures: the accuracy matrix as a heat map, and curves side by side. Needs the extra `plot` (matplotlib).

Figures are made without pyplot: no global state, no window toolkit, nothing to close.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from everbatch.errors import check

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["accuracy_heatmap", "compare_curves", "saved"]

MOST_NUMBERS = 20
"""Tasks up to which a cell of the matrix has room for its number."""


def accuracy_heatmap(
    matrix: Sequence[Sequence[float]] | Any, path: str | os.PathLike[str] | None = None, *,
    names: Sequence[str] | None = None, title: str = "accuracy", unit: Literal["fraction", "score"] = "fraction",
) -> Figure:
    """Draw the accuracy matrix: a row per training task, a column per evaluated task; with at most 20 tasks, the number in
    every cell.

    Args:
        matrix: accuracy in [0, 1], or another score, on task j after training task i, shape (T, T'); nested lists, an array
            or a tensor. NaN: not evaluated, left blank.
        path: PNG to write; None only returns the figure.
        names: of the evaluated tasks; numbered from 1 by default.
        title: above the map.
        unit: "fraction" is shown in percent, on colours from 0 to 1; "score" as it is, such as R squared, which has no lower
            bound, on colours over the values there are.

    Raises:
        ValueError: the matrix is empty, ragged or holds values outside [0, 1] for unit="fraction", or `names` has another length.
    """
    from matplotlib.figure import Figure

    rows = [[float(value) for value in row] for row in (matrix.tolist() if hasattr(matrix, "tolist") else matrix)]
    who = "accuracy_heatmap"
    check(bool(rows) and bool(rows[0]), who, "an empty matrix", "have a row and a column")
    columns = len(rows[0])
    check(all(len(row) == columns for row in rows), who, "rows of different length", "be rectangular")
    check(unit in ("fraction", "score"), who, f"unit={unit!r}", "be 'fraction' or 'score'")
    shown = [value for row in rows for value in row if not math.isnan(value)]
    good = unit == "score" or all(0.0 <= value <= 1.0 for value in shown)
    check(good, who, "values outside the interval", "be in [0, 1] or NaN", "pass unit='score' for what has no bounds")
    low, high = (0.0, 1.0) if unit == "fraction" else (min(shown, default=0.0), max(shown, default=1.0))
    names = [str(task + 1) for task in range(columns)] if names is None else names
    check(len(names) == columns, who, f"{len(names)} names for {columns} tasks", "be as many")

    longest = max(len(rows), columns)
    cell = 0.62 if longest <= 12 else 0.42 if longest <= MOST_NUMBERS else 10.0 / longest
    every = 1 + (longest - 1) // 25
    figure = Figure(figsize=(2.2 + cell * columns, 1.6 + cell * len(rows)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(rows, vmin=low, vmax=high, cmap="viridis")
    axes.set_xticks(range(0, columns, every), names[::every], rotation=0 if max(map(len, names)) <= 3 else 45)
    axes.set_yticks(range(0, len(rows), every), [str(task + 1) for task in range(0, len(rows), every)])
    axes.set_xlabel("task evaluated")
    axes.set_ylabel("after training task")
    axes.set_title(title)
    size = 8 if cell > 0.5 else 5.5
    for i, row in enumerate(rows if longest <= MOST_NUMBERS else ()):
        for j, value in enumerate(row):
            if not math.isnan(value):
                light = value > low + 0.6 * (high - low)  # viridis is light at its upper end
                colour = "black" if light else "white"
                text = f"{100 * value:.1f}" if unit == "fraction" else f"{value:.2f}"
                axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=size)
    label = (lambda value, _: f"{100 * value:.0f}%") if unit == "fraction" else None
    figure.colorbar(image, ax=axes, shrink=0.85, format=label)
    return saved(figure, path)


def compare_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: str | os.PathLike[str] | None = None, *,
    x: str = "step", y: str = "accuracy", title: str = "",
) -> Figure:
    """Draw named curves, each (x values, y values), on the same axes with a legend.

    Args:
        curves: label to points; NaN leaves a gap.
        path: PNG to write; None only returns the figure.
        x: label of the horizontal axis, with its unit.
        y: label of the vertical axis, with its unit.
        title: above the axes.

    Raises:
        ValueError: no curve, or a curve whose x and y differ in length.
    """
    from matplotlib.figure import Figure

    check(bool(curves), "compare_curves", "no curves", "be at least one")
    figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for label, (xs, ys) in curves.items():
        check(len(xs) == len(ys), "compare_curves", f"{label!r} has {len(xs)} x and {len(ys)} y", "be as many")
        axes.plot(xs, ys, label=label, marker="o" if len(xs) <= 30 else None, markersize=3.5, linewidth=1.5)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    return saved(figure, path)


def saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, written to a PNG where there is a path."""
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")  # a bare Figure draws with Agg
    return figure
