"""Scores without bounds, as R squared: metrics and the heat map take them where one says so."""

from __future__ import annotations

import math

import pytest

from everbatch import metrics
from everbatch.report.plots import accuracy_heatmap

R2 = [[0.5, math.nan], [-1.5, 0.75]]


def test_scores_below_zero_have_metrics() -> None:
    found = metrics.summary(R2, unit="score")
    assert found["backward_transfer"] == -2.0 and found["forgetting"] == 2.0 and found["final_average_accuracy"] == -0.375
    with pytest.raises(ValueError, match=r"accuracy -1.5 at \[1, 0\], must be in \[0, 1\]; .*'score' for what has no bounds"):
        metrics.summary(R2)
    with pytest.raises(ValueError, match="be 'fraction', 'percent' or 'score'"):
        metrics.summary(R2, unit="r2")  # type: ignore[arg-type]


def test_scores_below_zero_have_a_heat_map() -> None:
    pytest.importorskip("matplotlib")
    figure = accuracy_heatmap(R2, title="R squared", unit="score")
    axes = figure.axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["-1.50", "0.50", "0.75"]
    assert axes.images[0].get_clim() == (-1.5, 0.75)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\] or NaN; pass unit='score'"):
        accuracy_heatmap(R2)
    with pytest.raises(ValueError, match="unit='r2'"):
        accuracy_heatmap(R2, unit="r2")  # type: ignore[arg-type]
