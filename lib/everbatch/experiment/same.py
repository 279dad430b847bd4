"""Continual learning by experts: a network that has learned something, frozen, with routers and experts kept right by SAME."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from everbatch.data import StreamName
from everbatch.errors import check
from everbatch.experiment.adapted import Pretrained, small_vit
from everbatch.experiment.model import Model
from everbatch.train import SAME

__all__ = ["Experts"]


@dataclass(frozen=True, kw_only=True)
class Experts(Pretrained):
    """Options of this recipe: tasks of classes that the network has not been trained on, known at test time."""

    title: ClassVar[str] = "same"
    grows: ClassVar[bool] = False

    model: Model = field(default_factory=small_vit)
    same: SAME.Config | None = field(default_factory=lambda: SAME.Config(heads="by_task"))
    """Experts, and what keeps them right; see `everbatch.train.SAME`."""
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

    def headlines(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        """The stream's figures, and how far earlier tasks' routing has drifted in the end."""
        found = super().headlines(values)
        drift = values["same"]["tasks"][-1]["drift"] if "same" in values else {}
        moved = [task["variation"] for task in drift.values()]
        return {**found, "routing_drift": sum(moved) / len(moved) if moved else None}
