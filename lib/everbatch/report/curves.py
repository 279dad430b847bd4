"""Figures of what happens between task ends. Needs the extra `plot` (matplotlib); made without pyplot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from everbatch.errors import check
from everbatch.report.plots import saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MOST_CURVES", "accuracy_over_steps", "forgetting_by_task", "plasticity_by_task"]

MOST_CURVES = 10
"""Tasks that are drawn as a curve each; more are a map, with a row each."""
LONG = 8
"""Characters beyond which names of that many tasks give way to their numbers."""
Shown = Literal["fraction", "percent", "score"]


def accuracy_over_steps(
    steps: ArrayLike, tasks: ArrayLike, accuracies: ArrayLike, path: str | os.PathLike[str] | None = None, *,
    names: Sequence[str] | None = None, title: str = "", unit: Shown = "fraction",
) -> Figure:
    """Draw the accuracy on every task over the steps of training, with a line where a new task begins.

    Up to `MOST_CURVES` tasks are a curve each. More are a map: a row for each task, steps to the right; above it
    the mean over the tasks that were trained before, and the range of their middle 80 %.

    Args:
        steps: (n,) steps done at each evaluation, ascending.
        tasks: (n,) the task in training, from 0.
        accuracies: (n, T); NaN where a task was not begun.
        path: PNG to write; None only returns the figure.
        names: of the tasks; numbered from 1 by default.
        title: above the axes.
        unit: of the accuracies: "fraction" is shown in percent from 0 to 100.

    Raises:
        ValueError: nothing evaluated, or arrays and names that do not fit.
    """
    from matplotlib.figure import Figure

    x, now, a = _checked(steps, tasks, accuracies)
    a = 100 * a if unit == "fraction" else a
    labels = _names(names, a.shape[1])
    starts = _starts(x, now)
    label = "score" if unit == "score" else "accuracy, %"
    limits = None if unit == "score" else (-2.0, 102.0)
    wide = (min(16.0, 7.0 + 0.12 * len(starts)), 4.2)
    if a.shape[1] <= MOST_CURVES:
        figure = Figure(figsize=wide, dpi=120, layout="constrained")
        axes = figure.add_subplot()
        _curves(axes, x, a, labels)
        axes.legend(title="task", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        _boundaries(axes, starts)
        panels = [axes]
    else:
        figure = Figure(figsize=(wide[0], 2.6 + min(8.0, 2.0 + 0.09 * a.shape[1])), dpi=120, layout="constrained")
        upper, axes = figure.subplots(2, 1, sharex=True, height_ratios=(2.0, 3.0 + 0.06 * a.shape[1]))
        _earlier(upper, x, now, a)
        _boundaries(upper, starts)
        mesh = _map(axes, x, a, labels, unit)
        figure.colorbar(mesh, ax=[upper, axes], label=label, shrink=0.8)
        panels = [upper]
    for panel in panels:
        panel.set_ylabel(label)
        panel.grid(axis="y", alpha=0.3)
        if limits is not None:
            panel.set_ylim(*limits)
    axes.set_xlabel("step")
    (panels[0]).set_title(title)
    return saved(figure, path)


def forgetting_by_task(
    ends: ArrayLike, lowest: Sequence[float], path: str | os.PathLike[str] | None = None, *,
    names: Sequence[str] | None = None, title: str = "", unit: Shown = "fraction",
) -> Figure:
    """Draw, for every task but the last, what is lost at the end of the run, and what was lost at its worst: both
    from the best at a task's end before the last one. What lies between them came back: the stability gap.

    Args:
        ends: (T, T) accuracies at task ends, row by training task.
        lowest: the lowest accuracy of each task but the last after its end, at any evaluated step.
        path: PNG to write; None only returns the figure.
        names, title, unit: as in `accuracy_over_steps`.

    Raises:
        ValueError: fewer than two tasks, or lengths that do not fit.
    """
    from matplotlib.figure import Figure

    a = np.asarray(ends, dtype=np.float64)
    tasks = len(a)
    check(a.ndim == 2 and a.shape == (tasks, tasks) and tasks > 1, "forgetting_by_task",
          f"a matrix of shape {a.shape}", "be (T, T) with at least two tasks")
    check(len(lowest) == tasks - 1, "forgetting_by_task", f"{len(lowest)} minima for {tasks} tasks",
          "be one for each but the last")
    labels = _names(names, tasks)
    scale = 100.0 if unit == "fraction" else 1.0
    best = np.asarray([np.nanmax(a[j:-1, j]) for j in range(tasks - 1)])
    at_end = scale * (best - a[-1, :-1])
    at_worst = scale * (best - np.asarray(lowest, dtype=np.float64))

    figure = Figure(figsize=(min(16.0, 5.5 + 0.22 * tasks), 3.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(tasks - 1)
    axes.bar(places, at_worst, width=0.8, color="tab:orange", alpha=0.35, label="at its worst after the task's end")
    axes.bar(places, at_end, width=0.5, color="tab:blue", label="at the end of the run")
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xlim(-0.7, tasks - 1.3)
    every = 1 + (tasks - 2) // 25
    turned = max(len(text) for text in labels) > 3 and tasks > 8
    axes.set_xticks(places[::every], labels[: tasks - 1 : every], rotation=60 if turned else 0,
                    ha="right" if turned else "center", fontsize=8)
    axes.set_xlabel("task")
    axes.set_ylabel("lost" if unit == "score" else "accuracy lost, points")
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return saved(figure, path)


Array = NDArray[Any]


def _checked(steps: ArrayLike, tasks: ArrayLike, accuracies: ArrayLike) -> tuple[Array, Array, Array]:
    x, now, a = np.asarray(steps), np.asarray(tasks), np.asarray(accuracies, dtype=np.float64)
    who = "accuracy_over_steps"
    check(a.ndim == 2 and len(a) > 0, who, f"accuracies of shape {a.shape}", "be (n, T) with n >= 1")
    check(x.shape == now.shape == (len(a),), who, f"{x.shape} steps, {now.shape} tasks, {len(a)} rows", "be as many")
    check(bool((np.diff(x) > 0).all()), who, "steps that do not ascend", "ascend")
    return x, now, a


def _names(names: Sequence[str] | None, tasks: int) -> list[str]:
    labels = [str(task + 1) for task in range(tasks)] if names is None else list(names)
    check(len(labels) >= tasks, "curves", f"{len(labels)} names for {tasks} tasks", "be as many")
    if tasks > MOST_CURVES and max(map(len, labels)) > LONG:
        return [str(task + 1) for task in range(tasks)]
    return labels[:tasks]


def _starts(x: Array, now: Array) -> list[tuple[float, int]]:
    """Where each new task begins: the last step of the one before, and the task."""
    places = np.flatnonzero(np.diff(now)) + 1
    return [(float(x[place - 1]), int(now[place])) for place in places]


def _boundaries(axes: Any, starts: list[tuple[float, int]]) -> None:
    for place, _ in starts:
        axes.axvline(place, color="black", linewidth=0.6 if len(starts) > MOST_CURVES else 0.9,
                     linestyle=(0, (3, 2)), alpha=0.45)


def _curves(axes: Any, x: Array, a: Array, labels: list[str]) -> None:
    for task, label in enumerate(labels):
        there = ~np.isnan(a[:, task])
        if there.any():
            axes.plot(x[there], a[there, task], linewidth=1.3, label=label, color=f"C{task}")


def _earlier(axes: Any, x: Array, now: Array, a: Array) -> None:
    """The tasks trained before the present one: their mean, and the middle 80 % of them."""
    later = now > 0
    old = np.where(np.arange(a.shape[1])[None] < now[later][:, None], a[later], np.nan)
    low, high = np.nanpercentile(old, [10, 90], axis=1)
    axes.fill_between(x[later], low, high, color="tab:blue", alpha=0.2, linewidth=0, label="middle 80 %")
    axes.plot(x[later], np.nanmean(old, axis=1), color="tab:blue", linewidth=1.0, label="mean of earlier tasks")
    axes.legend(loc="upper right", fontsize=8, ncols=2)


def _map(axes: Any, x: Array, a: Array, labels: list[str], unit: Shown) -> Any:
    """A row for each task; each evaluation lasts until the next."""
    edges = np.append(x - 0.5, x[-1] + max(1.0, float(x[-1] - x[-2]) if len(x) > 1 else 1.0) - 0.5)
    limits = {} if unit == "score" else {"vmin": 0.0, "vmax": 100.0}
    mesh = axes.pcolormesh(edges, np.arange(a.shape[1] + 1) - 0.5, np.ma.masked_invalid(a.T), cmap="viridis",
                           shading="flat", rasterized=True, **limits)
    axes.invert_yaxis()
    every = 1 + (a.shape[1] - 1) // 25
    axes.set_yticks(range(0, a.shape[1], every), labels[::every], fontsize=7)
    axes.set_ylabel("task")
    return mesh


def plasticity_by_task(values: Mapping[str, Any], path: str | os.PathLike[str] | None = None, *, title: str = "") -> Figure:
    """Draw what `everbatch.train.Plasticity` measured after each task: dormant units, ranks of the features, and the norm of
    the gradient, on the task just trained and, as a band from the lowest to the highest, on those before.

    Args:
        values: "dormant_units", "effective_rank", "threshold_rank": a number or None for each task; "gradient_norm": a row for
            each task, a number for each task so far.
        path: PNG to write; None only returns the figure.
        title: above the panels.
    """
    from matplotlib.figure import Figure

    rows = [np.asarray(row, dtype=np.float64) for row in values["gradient_norm"]]
    check(bool(rows), "plasticity_by_task", "no task", "be at least one")
    tasks = np.arange(1, len(rows) + 1)
    dot = "o" if len(rows) <= 30 else None
    figure = Figure(figsize=(10.5, 3.2), dpi=120, layout="constrained")
    asleep, ranks, norms = figure.subplots(1, 3)
    asleep.plot(tasks, 100 * _numbers(values["dormant_units"]), marker=dot, markersize=3.5)
    asleep.set_ylabel("dormant units, %")
    asleep.set_ylim(bottom=0.0)
    for name in ("effective_rank", "threshold_rank"):
        ranks.plot(tasks, _numbers(values[name]), marker=dot, markersize=3.5, label=name.replace("_", " "))
    ranks.set_ylabel("rank of the features")
    ranks.set_ylim(bottom=0.0)
    ranks.legend(frameon=False)
    norms.plot(tasks, [row[-1] for row in rows], marker=dot, markersize=3.5, label="task just trained")
    if len(rows) > 1:
        low, high = ([edge(row[:-1]) for row in rows[1:]] for edge in (np.min, np.max))
        norms.fill_between(tasks[1:], low, high, alpha=0.25, color="tab:orange", label="earlier tasks")
    norms.set_ylabel("gradient norm")
    norms.set_yscale("log")
    norms.legend(frameon=False)
    for axes in (asleep, ranks, norms):
        axes.set_xlabel("after task")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    return saved(figure, path)


def _numbers(values: Sequence[float | None]) -> Array:
    return np.asarray([np.nan if value is None else value for value in values], dtype=np.float64)
