"""A class- or task-incremental stream, as `recipes/class_incremental.py` trains it, in this process on plain torch."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.ledger.cells import Cell
from benchmarks.ledger.samples import Samples, recipe_data
from everbatch import config
from everbatch.data import Source, Stream, SubsetSource, class_incremental, stratified_split, task_incremental
from everbatch.evaluate.evaluator import accuracies
from everbatch.experiment import ClassIncremental, Result, named, run
from everbatch.experiment.base import Finished

__all__ = ["Scale", "conducted", "train"]

WATCHED = ("min_accuracy", "stability_gap")
"""What continual evaluation sees beside the ends of tasks."""


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

    def finish(self, done: Finished) -> tuple[dict[str, Any], list[str]]:
        """Beside the recipe's figures, what the last network gives where the task of each test sample is known."""
        own, lines = super().finish(done)
        known = accuracies(done.trainer, replace(done.stream, kind="task"), len(done.stream) - 1, list(done.stream.tasks))
        return {**own, "task_accuracy": statistics.fmean(known)}, lines


def train(cell: Cell, home: Path) -> dict[str, float | None]:
    """One cell. Options of an arm: those of the recipe, nested; `method` by name; `lr` instead of the scale's.

    Returns:
        accuracy (mean over tasks after the last), average_incremental_accuracy, forgetting, backward_transfer; task_accuracy, of
        the same network where the task is known; and with `evaluation` among the options those of `WATCHED`, see
        `everbatch.metrics.Stability`.
    """
    with tempfile.TemporaryDirectory(prefix="everbatch-cell-") as folder:
        values = conducted(cell, home, folder).values
    names = ("average_incremental_accuracy", "forgetting", "backward_transfer", "task_accuracy")
    watched = values.get("evaluation", {})
    found = {name: values[name] for name in names} | {name: watched[name] for name in WATCHED if watched}
    return {"accuracy": values["final_average_accuracy"], **found}


def conducted(cell: Cell, home: Path, folder: str, **more: Any) -> Result:
    """The run of a cell, in a folder; `more`: options of the recipe beside those of the arm."""
    scale, options = Scale(**cell.scale), dict(cell.options)
    lr = float(options.pop("lr", scale.lr))
    method = named.layer(options.pop("method")) if "method" in options else {}
    shared: dict[str, Any] = {
        "data": recipe_data(cell, home),
        "model": {"name": scale.model}, "engine": {"kind": "plain"}, "scenario": scale.scenario, "tasks": scale.tasks,
        "samples": scale.samples, "held_out": cell.held_out, "optimizer": {"lr": lr},
        "trainer": {"batch_size": scale.batch, "epochs": scale.epochs, "seed": cell.seed}}
    return run(config.build(Share, shared, method, options, {"output": folder}, more))
