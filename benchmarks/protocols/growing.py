"""Data that keep arriving, as `recipes/growing_data.py` trains on them: one arm of it under one seed, in this process."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ledger.cells import Cell
from benchmarks.ledger.samples import Samples, recipe_data
from everbatch import config
from everbatch.experiment import GrowingData, run

__all__ = ["Scale", "train"]


@dataclass(frozen=True, kw_only=True)
class Scale(Samples):
    """What all cells share: the defaults of the recipe's file."""

    pixel_noise: float = 0.5
    """Standard deviation of noise put on each image once and for all, as a share of the pixel range."""
    rounds: int = 2
    first: float = 0.5
    """Share of the training samples that is there in the first round."""
    epochs: int = 60
    """Of each round."""
    batch: int = 64
    lr: float = 0.001
    """Of AdamW."""
    width: int = 8
    shrink: float = 0.4
    perturb: float = 0.1


def train(cell: Cell, home: Path) -> dict[str, float | None]:
    """One cell. Option of an arm: `start`, one of the recipe's arms.

    Returns:
        accuracy after the last round; first_accuracy after the first; epochs_to_fit: of the last round, until 99 % of an
        epoch's training samples were right, None where that was never so.
    """
    cell.never_held_out()
    scale = Scale(**cell.scale)
    start = str(cell.options["start"])
    asked: dict[str, Any] = {
        "data": recipe_data(cell, home),
        "pixel_noise": scale.pixel_noise, "rounds": scale.rounds, "first": scale.first, "width": scale.width,
        "shrink": scale.shrink, "perturb": scale.perturb, "arms": [start], "seeds": 1, "engine": {"kind": "plain"},
        "optimizer": {"base": "adamw", "lr": scale.lr},
        "trainer": {"batch_size": scale.batch, "epochs": scale.epochs, "seed": cell.seed}}
    with tempfile.TemporaryDirectory(prefix="everbatch-cell-") as folder:
        values = run(config.build(GrowingData, asked, {"output": folder})).values
    by_round, fitted = values["accuracy"][start][0], values["epochs_to_99_percent"][start][0]
    return {"accuracy": by_round[-1], "first_accuracy": by_round[0], "epochs_to_fit": fitted[-1] or None}
