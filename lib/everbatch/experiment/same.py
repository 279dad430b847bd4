"""Continual learning by experts: a network that has learned something, frozen, with routers and experts kept right by SAME."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from everbatch import seeds
from everbatch.data import Source, Stream, StreamName
from everbatch.distributed import World
from everbatch.errors import check
from everbatch.experiment.class_incremental import ClassIncremental
from everbatch.experiment.model import Model
from everbatch.experiment.options import Optimizer
from everbatch.experiment.pretraining import Pretraining, begin_pretrained
from everbatch.experiment.timm_cache import check_cached
from everbatch.train import SAME, Replay

__all__ = ["Experts"]

VIT = {"patch_size": 2, "embed_dim": 48, "depth": 3, "num_heads": 4}
"""A vision transformer that two cores train in half a minute on images of 8 pixels."""


@dataclass(frozen=True, kw_only=True)
class Experts(ClassIncremental):
    """Options of this recipe.

    The network is trained first on a share of the data set's classes (`pretraining`), once: what comes of it is kept. The run is
    on the other classes, in tasks that are known at test time.
    """

    title: ClassVar[str] = "same"
    grows: ClassVar[bool] = False

    same: SAME.Config | None = field(default_factory=lambda: SAME.Config(heads="by_task"))
    """Experts, and what keeps them right; see `everbatch.train.SAME`."""
    replay: Replay.Config | None = None
    """Rehearsal; null for none."""
    pretraining: Pretraining = field(default_factory=lambda: Pretraining(classes=0.4))
    model: Model = field(default_factory=lambda: Model(name="vit_tiny_patch16_224", options=VIT))
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(base="adamw", lr=2e-3))
    tasks: int = 3
    """Tasks into which the classes are divided; >= 1."""
    scenario: StreamName = "task"
    """task: the task id is given at test. class: it is not; then same.heads=joint."""
    output: str = "runs/same"
    """Folder of this run: model.safetensors, result.json, config.yaml, figures, TensorBoard, checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.same is not None, "same", "same=null", "be there", "recipes/class_incremental.py trains without experts")
        heads = self.same.heads if self.same is not None else "joint"
        check(heads == "joint" or self.scenario == "task", "same", f"same.heads={heads} with scenario={self.scenario}",
              "go with scenario=task", "set same.heads=joint")
        check(not self.data.sources, "same", "data.sources", "be left out", "this recipe divides the classes of data.source")
        if self.model.pretrained:
            check_cached(self.model.name, "or leave model.pretrained out, and a network is trained here first")

    def unused(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why."""
        found = super().unused()
        if self.model.pretrained or self.pretraining.weights is not None:
            why = "the network comes with its weights"
            found |= {f"pretraining.{name}": why for name in vars(self.pretraining) if name not in ("weights", "classes")}
        return found

    def stream(self) -> Stream:
        """The classes that the network was not trained on, as tasks."""
        train, test = self.data.open()
        split = self.split
        if split.class_order is None:
            seed = self.trainer.seed if split.order_seed is None else split.order_seed
            rest = torch.tensor(self._rest(train))
            order = rest[torch.randperm(len(rest), generator=seeds.generator(seed, "same", "order"))]
            split = replace(split, class_order=tuple(order.tolist()))
        return split.make(self.scenario, [(train, test)], self.tasks, self.trainer.seed)

    def _rest(self, source: Source) -> tuple[int, ...]:
        own = not (self.model.pretrained or self.pretraining.weights is not None)
        return self.pretraining.rest(source) if own else tuple(range(len(source.classes)))

    def begun(self, model: nn.Module, stream: Stream, world: World) -> nn.Module:
        """With what it has learned before."""
        return begin_pretrained(self.pretraining, self.model, model, self.data.open()[0], self.data, world)

    def headlines(self, values: Any) -> dict[str, float | None]:
        """The stream's figures, and how far earlier tasks' routing has drifted in the end."""
        found = super().headlines(values)
        drift = values["same"]["tasks"][-1]["drift"] if "same" in values else {}
        moved = [task["variation"] for task in drift.values()]
        return {**found, "routing_drift": sum(moved) / len(moved) if moved else None}
