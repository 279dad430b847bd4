"""The ready figures: what is drawn where, without pyplot."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra `plot`")

from everbatch.report.curves import accuracy_over_steps, forgetting_by_task
from everbatch.report.plots import accuracy_heatmap, compare_curves
from everbatch.report.recorder import Recorder

MATRIX = [[0.991, math.nan, math.nan], [0.5, 0.25, math.nan], [0.1, 0.0, 1.0]]


def test_heatmap_numbers_and_labels(tmp_path: Path) -> None:
    figure = accuracy_heatmap(torch.tensor(MATRIX, dtype=torch.float64), tmp_path / "a" / "matrix.png", title="replay")
    axes = figure.axes[0]
    assert axes.get_xlabel() == "task evaluated" and axes.get_ylabel() == "after training task"
    cells = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "99.1", (1, 0): "50.0", (1, 1): "25.0", (2, 0): "10.0", (2, 1): "0.0", (2, 2): "100.0"}
    assert (tmp_path / "a" / "matrix.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("matrix", "names", "message"),
    [
        ([], None, "empty"), ([[1.0], [0.5, 0.5]], None, "rectangular"), ([[1.5]], None, r"\[0, 1\]"),
        ([[1.0]], "ab", "2 names"),
    ],
)
def test_heatmap_refuses(matrix: list[list[float]], names: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy_heatmap(matrix, names=names)


def test_curves(tmp_path: Path) -> None:
    figure = compare_curves({"DER++": ([1, 2], [0.5, 0.75]), "none": ([1], [0.1])}, tmp_path / "c.png", x="task")
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.lines] == ["DER++", "none"] and axes.get_xlabel() == "task"
    assert np.asarray(axes.lines[0].get_xydata()).tolist() == [[1.0, 0.5], [2.0, 0.75]]
    with pytest.raises(ValueError, match="'a' has 1 x and 2 y"):
        compare_curves({"a": ([1], [1, 2])})
    with pytest.raises(ValueError, match="no curves"):
        compare_curves({})


def test_recorder_keeps_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Recorder(tmp_path) as recorder:
        path = recorder.figure("matrix/final", accuracy_heatmap(MATRIX), 7)
    assert path == tmp_path / "figures" / "matrix-final.png" and path.read_bytes().startswith(b"\x89PNG")
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    (image,) = accumulator.Images("matrix/final")
    assert image.step == 7 and image.encoded_image_string.startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


# ------------------------------------------------------------------------------------------------ between task ends
def run_of(tasks: int, steps: int = 6) -> tuple[list[int], list[int], list[list[float]]]:
    """Evaluations of a run: earlier tasks dip when a new one begins."""
    rows = [[0.9 if n else 0.3] * k + [n / steps] + [math.nan] * (tasks - k - 1) for k in range(tasks) for n in range(steps)]
    return list(range(1, tasks * steps + 1)), [k for k in range(tasks) for _ in range(steps)], rows


def test_accuracy_over_steps_shows_every_task_and_boundary(tmp_path: Path) -> None:
    figure = accuracy_over_steps(*run_of(5), tmp_path / "few.png", names=list("abcde"))
    axes, = figure.axes
    curves = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert [len(line.get_xdata()) for line in curves] == [30, 24, 18, 12, 6]
    assert min(curves[0].get_ydata()) == pytest.approx(0.0) and curves[0].get_ydata()[6] == pytest.approx(30.0)
    boundaries = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
    assert boundaries == [6, 12, 18, 24]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list("abcde")
    upper, lower, _ = accuracy_over_steps(*run_of(50), tmp_path / "many.png").axes
    mesh, = lower.collections
    drawn = np.ma.filled(mesh.get_array(), np.nan).reshape(50, 300)
    assert drawn[0, 6] == pytest.approx(30.0) and drawn[0, 7] == pytest.approx(90.0) and np.isnan(drawn[49, 0])
    mean = upper.lines[0]
    assert mean.get_ydata()[0] == pytest.approx(30.0) and mean.get_ydata()[1] == pytest.approx(90.0)
    assert (tmp_path / "many.png").stat().st_size > 10_000


def test_forgetting_shows_what_came_back() -> None:
    ends = [[0.9, math.nan, math.nan], [0.8, 0.7, math.nan], [0.6, 0.65, 1.0]]
    axes, = forgetting_by_task(ends, [0.1, 0.2]).axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([80.0, 50.0, 30.0, 5.0])  # from the best: at its worst, and at the end


@pytest.mark.parametrize(("call", "text"), [
    (lambda: accuracy_over_steps([], [], np.zeros((0, 2))), "n >= 1"),
    (lambda: accuracy_over_steps([1], [0, 0], [[0.5]]), "be as many"),
    (lambda: accuracy_over_steps([2, 1], [0, 0], [[0.5], [0.5]]), "must ascend"),
    (lambda: accuracy_over_steps([1], [0], [[0.5, 0.5]], names=["a"]), "1 names for 2 tasks"),
    (lambda: forgetting_by_task([[0.5]], []), "at least two tasks"),
    (lambda: forgetting_by_task([[0.5, 0.5], [0.5, 0.5]], []), "0 minima for 2 tasks")])
def test_curves_refuse(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_a_large_matrix_stays_a_picture() -> None:
    figure = accuracy_heatmap(np.full((50, 50), 0.5))
    assert not figure.axes[0].texts and max(figure.get_size_inches()) < 13
