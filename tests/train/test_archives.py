"""Tensors by name in a mixin's state: kept in checkpoints, whole, and over a launch anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import growing
import learning
from everbatch import checkpoint
from everbatch.data import Task
from everbatch.errors import CheckpointMismatch
from everbatch.train import GrowingHead, StepRecord, Trainer, TrainerMixin, persist
from learning import stream


class Archive(TrainerMixin):
    """Keeps the weights of the head's first part after every task, and a mean of losses."""

    @dataclass
    class State:
        kept: dict[str, Tensor] = field(default_factory=dict)
        rows: dict[str, Any] = field(default_factory=dict)

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        self.states[Archive].rows["steps"] = record.step + 1

    def on_task_end(self, task: Task) -> None:
        super().on_task_end(task)  # type: ignore[misc]
        weight = self.module[-1].parts[0].weight  # type: ignore[attr-defined]
        self.states[Archive].kept |= {f"task {task.id}": weight.detach().clone(), f"count/{task.id}": torch.tensor(task.id)}


class Archiving(GrowingHead, Archive, Trainer):
    """Grows, and archives."""


def test_tensors_by_name_are_saved_and_resumed(tmp_path: Path) -> None:
    whole = growing.trainer("plain", Archiving, smooth=True)
    whole.fit(stream())
    kept = whole.states[Archive].kept
    assert list(kept) == ["task 0", "count/0", "task 1", "count/1", "task 2", "count/2"]
    for after in (5, 13):
        folder = tmp_path / str(after)
        left = growing.trainer("plain", Archiving, smooth=True, folder=folder, recorder=learning.recorder(folder, after))
        with pytest.raises(learning.Abandoned):
            left.fit(stream())
        again = growing.trainer("plain", Archiving, smooth=True, folder=folder)
        again.fit(stream(), resume=True)
        found = again.states[Archive].kept
        assert found.keys() == kept.keys() and all(torch.equal(found[n], kept[n]) for n in kept)
        assert again.states[Archive].rows == {"steps": learning.STEPS}


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    left = growing.trainer("plain", Archiving, smooth=True, folder=tmp_path, recorder=learning.recorder(tmp_path, 13))
    with pytest.raises(learning.Abandoned):
        left.fit(stream())
    kept = checkpoint.open(tmp_path / "step-00000012")
    told = kept.meta["trainer"]["mixins"]["Archive.kept"]
    assert told == {"tensors": ["count/0", "task 0"]}
    told["tensors"].append("task 9")
    twin = growing.trainer("plain", Archiving, smooth=True, folder=tmp_path)
    twin.run.stream = stream()
    with pytest.raises(CheckpointMismatch, match=r"holds no tensors \['Archive.kept/task 9'\], which its meta names"):
        persist.load(twin, kept)
