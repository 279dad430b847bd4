"""Runs whose model grows, and runs that are only launched anew: the small run of `learning` on any engine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import learning
from everbatch import compose
from everbatch.data import Task
from everbatch.nn import PartsHead
from everbatch.optim import EMA, ClipGradNorm
from everbatch.train import GrowingHead, Replay, Trainer, TrainerMixin

ADAMW = functools.partial(
    compose(ClipGradNorm, EMA, base=torch.optim.AdamW), lr=0.01, weight_decay=0.01, max_norm=1.0, ema_decay=0.9)


class Net(nn.Sequential):
    """Layers one after the other, the last of which is the head."""

    def get_classifier(self) -> nn.Module:
        return self[-1]


def model(growths: Sequence[Any] = (), *, first: int = 2, smooth: bool = False) -> nn.Module:
    """A head of `first` classes, and a part for each growth that has classes."""
    sizes = [first, *(g["classes"] for g in growths if "classes" in g)]
    torch.manual_seed(len(sizes) if smooth else 0)
    body = [nn.Flatten(), nn.Linear(64, 15), nn.Tanh()]
    if not smooth:
        body = [nn.Flatten(), nn.Linear(64, 15), nn.BatchNorm1d(15), nn.ReLU(), nn.Dropout(0.2)]
    return Net(*body, PartsHead(15, sizes))


class Anew(TrainerMixin):
    """Launches the trainer anew before every task but the first, adding nothing."""

    def on_task_start(self, task: Task) -> None:
        if task.id:
            self.relaunch({"nothing": task.id})  # type: ignore[attr-defined]
        super().on_task_start(task)  # type: ignore[misc]


class Relaunched(Anew, Replay, Trainer):
    """Rehearses, and is launched anew."""


class Widened(GrowingHead, Trainer):
    """Grows."""


class WidenedMemory(GrowingHead, Replay, Trainer):
    """Grows, and compares with logits of a narrower head."""


def trainer(host: str, cls: type, *, smooth: bool = False, first: int = 2, folder: Path | None = None, **options: Any) -> Any:
    """Of `cls`, whose model is `model` and may grow."""
    grown = functools.partial(model, first=first, smooth=smooth)
    return learning.trainer(host, cls=cls, model=grown(), grown=grown, folder=folder, reset_optimizer=False, **options)
