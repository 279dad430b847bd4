"""One figure of both protocols: what is reported, what it is worth, and what makes the difference. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everbatch.errors import check

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["both_protocols"]

COLOURS = {"two-phase": "C0", "conventional": "C1"}
PARTS = {"selection": "selection optimism", "transfer": "transfer gap", "sum": "sum"}


def both_protocols(found: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw what `statistics.compare` gives.

    Left, a group of lines for each method: hollow, what the conventional search reports; filled, both protocols' choices on new
    orders with 95 % t intervals. Middle: the optimism's parts with intervals, grey where not resolved. Right: the expected best
    score of each search by its number of configurations.

    Args:
        found: of `compare`.
        path: PNG to write; None only returns the figure.

    Raises:
        ValueError: nothing was evaluated yet.
    """
    from matplotlib.figure import Figure

    rows = [row for row in found["choices"] if row["new"] is not None]
    check(bool(rows), "both_protocols", "no row of an evaluation", "be at least one", "run evaluate first")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    height = 1.8 + 0.5 * max(len(methods), 4)
    figure = Figure(figsize=(13.5, height), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw_choices(left, rows, methods)
    _draw_optimism(middle, found["optimism"])
    _draw_curves(right, found["expected_maximum"])
    name = {"avg_acc": "average incremental accuracy", "acc": "last accuracy"}[found["metric"]]
    figure.suptitle(f"{name}: tuned on other classes (two-phase) and on those judged on (conventional)", fontsize=10)
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    return figure


def _draw_choices(axes: Any, rows: list[Mapping[str, Any]], methods: list[str]) -> None:
    """What each choice is worth, and what the conventional search says of its own."""
    labelled: set[str] = set()

    def once(label: str) -> str | None:
        new = label not in labelled
        labelled.add(label)
        return label if new else None

    for row in rows:
        place = len(methods) - 1 - methods.index(row["method"])
        shift = 0.12 if row["protocol"] == "two-phase" else -0.12
        new, colour = row["new"], COLOURS[row["protocol"]]
        half = None if new["high"] is None else 100 * (new["high"] - new["mean"])
        axes.errorbar([100 * new["mean"]], [place + shift], xerr=half, marker="o", capsize=3, linestyle="none", color=colour,
                      label=once(f"{row['protocol']}, new orders"))
        if row["protocol"] == "conventional" and row["reported"] is not None:
            axes.plot([100 * row["reported"]], [place + shift], marker="o", fillstyle="none", linestyle="none", color=colour,
                      label=once("conventional, as reported"))
    axes.set_yticks(range(len(methods)), methods[::-1], fontsize=8)
    axes.set_ylim(-0.6, len(methods) - 0.4)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -2.0), min(high, 102.0))  # intervals of few orders reach beyond what an accuracy can be
    axes.set_xlabel("%, on the evaluation data")
    axes.set_title("what the choices are worth; 95 % t intervals", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, loc="best")


def _draw_optimism(axes: Any, optimism: Mapping[str, Mapping[str, Any]]) -> None:
    """The parts of the optimism beside zero."""
    lines = [(method, part) for method in optimism for part in PARTS if optimism[method][part] is not None]
    for place, (method, part) in enumerate(reversed(lines)):
        value = optimism[method][part]
        half = None if value["high"] is None else 100 * (value["high"] - value["mean"])
        colour = "C3" if value["says"] == "resolved" else "0.55"
        axes.errorbar([100 * value["mean"]], [place], xerr=half, marker="o", capsize=3, color=colour)
    axes.axvline(0.0, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(lines)), [f"{method}: {PARTS[part]}" for method, part in reversed(lines)], fontsize=8)
    axes.set_ylim(-0.6, max(len(lines), 1) - 0.4)
    axes.set_xlabel("points")
    axes.set_title("optimism, paired over new orders (grey: not resolved)", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    if not lines:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no conventional search to compare with", ha="center", va="center", transform=axes.transAxes,
                  fontsize=8)


def _draw_curves(axes: Any, curves: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Expected best score by number of configurations."""
    from matplotlib.ticker import MaxNLocator

    styles = {"two-phase": "-", "conventional": "--"}
    names = list(dict.fromkeys(method for methods in curves.values() for method in methods))
    for protocol, methods in curves.items():
        for method, values in methods.items():
            if values:
                axes.plot(range(1, len(values) + 1), [100 * value for value in values], styles[protocol], marker=".",
                          color=f"C{2 + names.index(method)}", label=f"{method}, {protocol}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("configurations tried")
    axes.set_ylabel("%, on the search's own data and orders")
    axes.set_title("expected best score of a search", fontsize=9)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=7, loc="lower right")
