"""A frozen vision transformer learns one task after the other by experts, each task with a head of its own.

The transformer is the same for all arms of a seed: trained once on four of the classes, each in four quarter turns, kept in a
file. The others, turned as well, come in tasks of a few classes, where the task is known at test time, so that what is forgotten
is what the features and the routing lose.
"""

from __future__ import annotations

import functools
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.ledger.cells import Cell
from benchmarks.ledger.samples import Samples, opened, rows, top
from everbatch import compose, seeds
from everbatch.data import Stream, SubsetSource, stratified_split, task_incremental
from everbatch.data.sources import TensorSource, digest
from everbatch.metrics import summary
from everbatch.train import SAME, Schedule, Trainer

__all__ = ["Scale", "forgets"]


@dataclass(frozen=True, kw_only=True)
class Scale(Samples):
    """What all cells share."""

    known: int = 4
    """Classes, by label, that the network is trained on first."""
    pretraining_epochs: int = 10
    tasks: int = 6
    epochs: int = 5
    """Of each task."""
    batch: int = 32
    width: int = 32
    depth: int = 2
    experts: int = 4
    rank: int = 4
    delta: float = 0.95
    mu_rel: float = 0.01


class Learner(SAME, Trainer):
    """Experts."""


def forgets(cell: Cell, home: Path) -> dict[str, float | None]:
    """One cell. Options of an arm: `base` (adamw or sgd), `lr`, `router` and `curvature` of SAME, and its `space`.

    Returns:
        accuracy (mean over tasks after the last), forgetting, learning (accuracy of a task when it was learned), and
        routing: the mean total variation of earlier tasks' routing after the last task.
    """
    scale, options = Scale(**cell.scale), dict(cell.options)
    known, stream = _parts(cell, scale, home)
    net = _trunk(cell, scale, home, known, stream.num_classes)
    bases: dict[str, tuple[Any, dict[str, float]]] = {
        "adamw": (torch.optim.AdamW, {"weight_decay": 0.0}), "sgd": (torch.optim.SGD, {"momentum": 0.9})}
    base, more = bases[options.pop("base")]
    optimizer = functools.partial(compose(base=base), lr=float(options.pop("lr")), **more)
    config = Trainer.Config(batch_size=scale.batch, epochs=scale.epochs, seed=cell.seed, schedule=Schedule(kind="cosine"))
    trainer: Any = Learner(
        net, optimizer, config=config, device="cpu", num_tasks=scale.tasks, layers=("*.mlp.fc1",), trained=("head.*",),
        heads="by_task", experts=scale.experts, rank=scale.rank, delta=scale.delta, mu_rel=scale.mu_rel, tau=-1.0, **options)
    matrix = trainer.fit(stream)
    found = summary(matrix)
    drift = trainer.states[SAME].log[-1]["drift"].values()
    return {"accuracy": found["final_average_accuracy"], "forgetting": found["forgetting"],
            "learning": statistics.fmean(row[k] for k, row in enumerate(matrix)),
            "routing": statistics.fmean(task["variation"] for task in drift)}


def _turned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Four quarter turns of every image, each a class of its own."""
    turns = [torch.rot90(x, k, (-2, -1)) for k in range(4)]
    return torch.cat(turns), torch.cat([4 * y + k for k in range(4)])


def _parts(cell: Cell, scale: Scale, home: Path) -> tuple[tuple[Tensor, Tensor], Stream]:
    """Images and labels to train on first, and the stream of the rest."""
    sides = []
    for source in opened(cell, home):
        raw = rows(source, torch.arange(len(source)))
        x = (raw.float() / top(cell, raw)).clamp(0, 1) * 2 - 1
        sides.append(_turned(x, source.targets))
    classes = tuple(str(label) for label in range(4 * len(source.classes)))
    (x, y), test = sides
    known = y < 4 * scale.known
    train, other = (TensorSource(*side, name=name, classes=classes) for side, name in (((x, y), "train"), (test, "test")))
    if cell.held_out:
        rest, held = stratified_split(y, 0.2, seed=0)
        known[held] = False
        return (x[known], y[known]), _stream(cell, scale, SubsetSource(train, rest), SubsetSource(train, held))
    return (x[known], y[known]), _stream(cell, scale, train, other)


def _stream(cell: Cell, scale: Scale, train: Any, test: Any) -> Stream:
    """The classes that the network does not know, in a seeded order."""
    first = 4 * scale.known
    order = torch.randperm(len(train.classes) - first, generator=seeds.generator(cell.seed, "experts", "order"))
    return task_incremental(train, test, tasks=scale.tasks, class_order=(order + first).tolist())


def _trunk(cell: Cell, scale: Scale, home: Path, known: tuple[Tensor, Tensor], classes: int) -> nn.Module:
    """The transformer, with what it has learned of the known classes and a fresh head for the stream's."""
    from timm.models.vision_transformer import VisionTransformer

    side = known[0].shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(cell.seed, "experts", "net"))
        made = functools.partial(VisionTransformer, img_size=side, patch_size=2, in_chans=known[0].shape[1],
                                 embed_dim=scale.width, depth=scale.depth, num_heads=4)
        trunk, net = made(num_classes=4 * scale.known), made(num_classes=classes)
    trained = (scale.known, scale.pretraining_epochs, scale.width, scale.depth, cell.held_out)
    path = home / "trunks" / f"{digest(cell.data, str(trained), str(cell.seed), torch.__version__)}.pt"
    if not path.exists():
        _train(trunk, *known, scale, cell.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        torch.save(trunk.state_dict(), draft)
        draft.replace(path)
    state = torch.load(path, weights_only=True)
    net.load_state_dict({name: value for name, value in state.items() if not name.startswith("head.")}, strict=False)
    return net


def _train(net: nn.Module, x: Tensor, y: Tensor, scale: Scale, seed: int) -> None:
    """AdamW under one cosine."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    steps = scale.pretraining_epochs * (len(y) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(scale.pretraining_epochs):
        order = torch.randperm(len(y), generator=seeds.generator(seed, "experts", "rows", epoch))
        for ids in order[: len(y) // 64 * 64].split(64):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[ids]), y[ids]).backward()
            optimizer.step()
            schedule.step()
