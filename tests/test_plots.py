"""The ready figures: what is drawn where, without pyplot."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra `plot`")

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
