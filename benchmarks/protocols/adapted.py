"""Adapters beside a frozen vision transformer over a class-incremental stream, as `recipes/mos.py` trains them, in this process.

The transformer is the same for all cells: trained once on other classes of the same data, each in four quarter turns, and kept.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.ledger.cells import Cell
from benchmarks.ledger.samples import Samples, recipe_data
from everbatch import config
from everbatch.data import Batch
from everbatch.distributed import World
from everbatch.experiment import AdaptedTasks, run
from everbatch.nn import AdapterTrunk
from everbatch.rows import Rows
from everbatch.train import MOS, TrainerMixin

__all__ = ["Scale", "ends"]

Shown = Literal["retrieved", "prototypes", "latest"]


@dataclass(frozen=True, kw_only=True)
class Scale(Samples):
    """What all cells share."""

    known: float = 0.4
    """Share of the classes that the network is trained on first."""
    pretraining_epochs: int = 150
    tasks: int = 3
    epochs: int = 10
    """Of each task."""
    batch: int = 32
    lr: float = 0.05


class Predicts(TrainerMixin):
    """Predict in another way than retrieval: by the prototypes of the first adapter, or by the live network."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        shown: Shown = "retrieved"

    module: Any
    device: torch.device

    def predict(self, batch: Batch | Rows) -> Tensor:
        """Scores (n, classes)."""
        state, shown = self.states[MOS], self.configs[Predicts].shown
        if shown == "retrieved" or not isinstance(batch, Batch) or not state.ends:
            return super().predict(batch)  # type: ignore[misc, no-any-return]
        if shown == "latest":
            return self.forward(batch)  # type: ignore[attr-defined, no-any-return]
        assert isinstance(batch.inputs, Tensor)
        features, _ = AdapterTrunk(self.module, state.archive).first(batch.inputs)
        cosines = functional.normalize(features, dim=1) @ functional.normalize(state.prototypes, dim=1).T
        return functional.pad(cosines, (0, self.module.num_classes - state.ends[-1]), value=-2.0)


@dataclass(frozen=True, kw_only=True)
class Arms(AdaptedTasks):
    """The recipe, and how an arm predicts."""

    title: ClassVar[str] = "mos"
    shown: Shown = "retrieved"

    def more_mixins(self, world: World) -> dict[type, Any]:
        """Who predicts."""
        return {Predicts: Predicts.Config(shown=self.shown), **super().more_mixins(world)}


def ends(cell: Cell, home: Path) -> dict[str, float | None]:
    """One cell. Options of an arm: those of the recipe, nested, and `shown`: retrieved, prototypes (of the first adapter) or
    latest (the live network, which has the last task's adapters).

    Returns:
        accuracy (over classes seen so far, after the last task), average_incremental_accuracy, forgetting.
    """
    cell.never_held_out()
    scale = Scale(**cell.scale)
    shared: dict[str, Any] = {
        "data": recipe_data(cell, home), "engine": {"kind": "plain"}, "tasks": scale.tasks,
        "optimizer": {"lr": scale.lr, "momentum": 0.9}, "mos": {"rank": 8, "scale": 1.0},
        "pretraining": {"classes": scale.known, "epochs": scale.pretraining_epochs, "cache": str(home / "pretrained")},
        "trainer": {"batch_size": scale.batch, "epochs": scale.epochs, "seed": cell.seed, "schedule": {"kind": "cosine"}}}
    with tempfile.TemporaryDirectory(prefix="everbatch-cell-") as folder:
        values = run(config.build(Arms, shared, dict(cell.options), {"output": folder})).values
    names = ("average_incremental_accuracy", "forgetting")
    return {"accuracy": values["last_accuracy"], **{name: values[name] for name in names}}
