"""A class- or task-incremental stream, as `recipes/class_incremental.py` trains it, in this process on plain torch."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ledger.cells import Cell
from benchmarks.ledger.samples import Samples, recipe_data
from everbatch import config
from everbatch.data import Source, Stream, SubsetSource, class_incremental, stratified_split, task_incremental
from everbatch.experiment import ClassIncremental, Result, run

__all__ = ["Scale", "conducted", "train"]


@dataclass(frozen=True, kw_only=True)
class Scale(Samples):
    """What all cells share."""

    samples: int = 0
    """Training samples, a stratified share; 0 for all."""
    model: str = "small_conv"
    """As the recipe's model.name."""
    scenario: str = "class"
    """class: no task id at test; task: the task id is given."""
    tasks: int = 5
    epochs: int = 8
    """Of each task."""
    batch: int = 32
    lr: float = 0.03


@dataclass(frozen=True, kw_only=True)
class Share(ClassIncremental):
    """The recipe, on a stratified share of the training samples."""

    samples: int = 0
    """0 for all."""
    held_out: bool = False
    """Test on a part cut from the training samples."""

    def stream(self) -> Stream:
        """The classes of `data`, divided."""
        train, test = self.data.open()
        if 0 < self.samples < len(train):
            ids = stratified_split(train.targets, self.samples / len(train), seed=0)[1]
            share: Source = SubsetSource(train, ids)
            train = share
        if self.held_out:
            rest, held = stratified_split(train.targets, 0.2, seed=0)
            train, test = SubsetSource(train, rest), SubsetSource(train, held)
        split = {"class": class_incremental, "task": task_incremental}[self.scenario]
        return split(train, test, tasks=self.tasks, seed=self.trainer.seed)


def train(cell: Cell, home: Path) -> dict[str, float | None]:
    """One cell. Options of an arm: those of the recipe, nested; `lr` instead of the scale's.

    Returns:
        accuracy (over all classes after the last task), average_incremental_accuracy, forgetting, backward_transfer.
    """
    with tempfile.TemporaryDirectory(prefix="everbatch-cell-") as folder:
        values = conducted(cell, home, folder).values
    names = ("average_incremental_accuracy", "forgetting", "backward_transfer")
    return {"accuracy": values["final_average_accuracy"], **{name: values[name] for name in names}}


def conducted(cell: Cell, home: Path, folder: str, **more: Any) -> Result:
    """The run of a cell, in a folder; `more`: options of the recipe beside those of the arm."""
    scale, options = Scale(**cell.scale), dict(cell.options)
    lr = float(options.pop("lr", scale.lr))
    shared: dict[str, Any] = {
        "data": recipe_data(cell, home),
        "model": {"name": scale.model}, "engine": {"kind": "plain"}, "scenario": scale.scenario, "tasks": scale.tasks,
        "samples": scale.samples, "held_out": cell.held_out, "optimizer": {"lr": lr},
        "trainer": {"batch_size": scale.batch, "epochs": scale.epochs, "seed": cell.seed}}
    return run(config.build(Share, shared, options, {"output": folder}, more))
