"""Options chosen on one half of the classes, and on the half that is judged on, both held against new class orders of that half.

The definitions of `everbatch.tune`, whose pieces this runs in one process: what is drawn, how a stream is trained, how it is
scored. The whole protocol, sealed and on a cluster, is `recipes/two_phase.py`.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ledger.cells import Cell
from benchmarks.ledger.samples import Samples, opened, rows
from everbatch.data import Source
from everbatch.tune.spaces import Method, draw_all
from everbatch.tune.stream import SCENARIO, unit

__all__ = ["Scale", "optimism"]


@dataclass(frozen=True, kw_only=True)
class Scale(Samples):
    """What all cells share."""

    configurations: int = 8
    """Drawn from the method's own space."""
    orders: int = 2
    """Class orders that a search averages over."""
    new_orders: int = 8
    """Class orders that judge what was chosen."""
    increments: tuple[int, ...] = (2, 1, 1, 1)
    """Classes of each task, of one half."""


def optimism(cell: Cell, home: Path) -> dict[str, float | None]:
    """One cell. Options of an arm: `method`, by name.

    Returns:
        reported: average incremental accuracy of the conventional choice where it was chosen, on the half that is judged on;
        accuracy: of the same values on new orders; two_phase: of the values that the other half chose, on the same new orders;
        optimism = reported - accuracy; gap = accuracy - two_phase; failed: streams without a number.
    """
    scale = Scale(**cell.scale)
    method = Method(cell.options["method"])
    drawn = draw_all(method.space, cell.seed, scale.configurations)
    first = 1000 * cell.seed
    tuned_on = range(first, first + scale.orders)
    judged_on = range(first + scale.orders, first + scale.orders + scale.new_orders)
    halves = [_half(cell, home, part) for part in (0, 1)]
    failed = 0

    def scores(half: Path, values: dict[str, Any], orders: Sequence[int]) -> list[float | None]:
        nonlocal failed
        layers, found = [SCENARIO, method.options, values], list[float | None]()
        for order in orders:
            with tempfile.TemporaryDirectory(prefix="everbatch-cell-") as folder:
                row = unit("", layers, list(scale.increments), order, str(half), Path(folder))
            found.append(row.get("avg_acc"))
        failed += found.count(None)
        return found

    def chosen(half: Path) -> tuple[float, dict[str, Any]] | None:
        """The best mean of those that have a number for every order."""
        means = []
        for values in drawn:
            found = [score for score in scores(half, values, tuned_on) if score is not None]
            means.append(statistics.fmean(found) if len(found) == scale.orders else -1.0)
        best = max(range(len(drawn)), key=lambda i: (means[i], -i))
        return (means[best], drawn[best]) if means[best] >= 0 else None

    ours, theirs = chosen(halves[0]), chosen(halves[1])
    if ours is None or theirs is None:
        return {"reported": None, "accuracy": None, "two_phase": None, "optimism": None, "gap": None, "failed": float(failed)}
    new = scores(halves[1], theirs[1], judged_on)
    transferred = new if ours[1] == theirs[1] else scores(halves[1], ours[1], judged_on)
    pairs = [(a, b) for a, b in zip(new, transferred, strict=True) if a is not None and b is not None]
    accuracy, two_phase = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    return {"reported": theirs[0], "accuracy": accuracy, "two_phase": two_phase, "optimism": theirs[0] - accuracy,
            "gap": accuracy - two_phase, "failed": float(failed)}


def _half(cell: Cell, home: Path, part: int) -> Path:
    """The first or second half of the classes, as a file of its own."""
    path = home / "data" / f"{cell.data}-half-{part}.npz"
    if path.exists():
        return path
    arrays: dict[str, Any] = {}
    for name, source in zip(("train", "test"), opened(cell, home), strict=True):
        x, y = _of_classes(source, part)
        arrays |= {f"x_{name}": x.numpy(), f"y_{name}": y.numpy()}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez(draft, **arrays)
    draft.replace(path)
    return path


def _of_classes(source: Source, part: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of half of the classes, labels from 0."""
    half = len(source.classes) // 2
    inside = (source.targets // half == part).nonzero().flatten()
    return rows(source, inside), source.targets[inside] - part * half
