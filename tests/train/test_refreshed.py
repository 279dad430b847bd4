"""Refresh beside every continual method, by one more word: method=NAME+refresh."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import learning
from everbatch import config, methods
from everbatch.experiment import ClassIncremental, learner, named
from everbatch.optim import Refresh
from everbatch.train import Trainer
from rotation import When

OTHERS = [name for name in named.names() if name not in ("finetune", "refresh", "joint")]
CONTINUAL = [name for name in OTHERS if any(
    named.ROOM in methods.TABLE[key] for key in methods.TABLE if name in named.made_by(key))]
"""Those that keep something of earlier tasks, or are made to stand beside what does."""


def bare() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 15), nn.Tanh(), nn.Linear(15, 6))


@functools.cache
def fitted(words: str, *more: str) -> Any:
    """A small continual run of a method by its name."""
    chosen: Any = config.parse(ClassIncremental, [f"method={words}", "optimizer.lr=0.05", *more])
    torch.manual_seed(0)
    made = learner(chosen.mixins(), Trainer, bare)(
        bare(), chosen.optimizer.build(bare), config=Trainer.Config(batch_size=8, epochs=1, seed=3), prepare=learning.scale,
        device="cpu", num_tasks=3)
    made.fit(learning.stream())
    return made


def test_there_is_something_to_refresh() -> None:
    assert {"er", "dark_er", "dark_er_pp", "lwf", "cpr", "ewc", "online_ewc", "si", "mas", "vcl", "ncl"} <= set(CONTINUAL)


@pytest.mark.parametrize("name", [When(i, 4).param(name) for i, name in enumerate(CONTINUAL)])
def test_by_one_more_word(name: str) -> None:
    """Its unlearning passes run, its information is taken at each task's end, and the run is another."""
    alone, trainer = fitted(name), fitted(f"{name}+refresh", "optimizer.refresh.gamma=0.05")
    state = trainer.optimizer.states[Refresh]
    assert state.tasks == 3 and state.refused == 0 and trainer.step == alone.step >= 12
    weights = [torch.cat([p.detach().flatten() for p in t.module.parameters()]) for t in (alone, trainer)]
    assert weights[1].isfinite().all() and not torch.allclose(*weights, rtol=0, atol=1e-5)
