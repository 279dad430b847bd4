"""A network trained on clean images predicts a corrupted stream, in an order and in batches that an arm names.

The network is the same for all arms of a seed: trained once, kept in a file. Each family of corruptions is a stream of its own,
for which normalisation begins anew. Nothing is tuned on the stream, whose labels are looked at to count errors alone.
"""

from __future__ import annotations

import copy
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.ledger.cells import Cell
from benchmarks.ledger.samples import Samples, opened, rows, top
from everbatch import seeds
from everbatch.data import CORRUPTIONS, corrupt, dirichlet_order, stratified_split
from everbatch.data.sources import digest
from everbatch.nn import convert_unmix_tns

__all__ = ["Scale", "errors"]


@dataclass(frozen=True, kw_only=True)
class Scale(Samples):
    """What all cells share."""

    image_size: int | None = 16
    samples: int = 0
    """Training samples, a stratified share; 0 for all."""
    test_samples: int = 0
    """Samples of a stream, a stratified share of the test samples; 0 for all."""
    epochs: int = 15
    batch: int = 64
    lr: float = 0.05
    width: int = 16
    """Channels of the first convolution."""
    severity: int = 5
    components: int = 16
    concentration: float = 0.1
    """Of the Dirichlet order: the smaller, the longer the runs of a class."""


def errors(cell: Cell, home: Path) -> dict[str, float | None]:
    """One cell. Options of an arm: `norm` (source, batch, unmix or balanced), `order` (iid or dirichlet), `rows` of a batch.

    Returns:
        error, a mean over the families; clean_error; worst_error, of the family with most.
    """
    scale, options = Scale(**cell.scale), cell.options
    x, y, classes = _pixels(cell, home, train=False, share=scale.test_samples)
    net = _source(cell, scale, home, x.shape[1], classes)
    order = {"iid": lambda: torch.randperm(len(y), generator=seeds.generator(cell.seed, "iid")).tolist(),
             "dirichlet": lambda: dirichlet_order(y, scale.concentration, cell.seed)}[options["order"]]()
    found = {}
    for family in ("", *CORRUPTIONS):
        stream = corrupt(x, family, scale.severity, seed=cell.seed)[order] if family else x[order]
        model = _normalised(copy.deepcopy(net), options["norm"], scale, int(options["rows"]), cell.seed)
        with torch.no_grad():
            guess = torch.cat([model(part * 2 - 1).argmax(1) for part in stream.split(int(options["rows"]))])
        found[family] = (guess != y[order]).float().mean().item()
    clean = found.pop("")
    return {"error": statistics.fmean(found.values()), "clean_error": clean, "worst_error": max(found.values())}


def _normalised(net: nn.Module, norm: str, scale: Scale, batch: int, seed: int) -> nn.Module:
    """The network with one kind of statistics."""
    net.eval()
    if norm == "batch":
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.train()
    if norm in ("unmix", "balanced"):
        convert_unmix_tns(net, scale.components, batch_size=batch, seed=seed, balanced=norm == "balanced")
    return net


def _source(cell: Cell, scale: Scale, home: Path, channels: int, classes: int) -> nn.Module:
    """The network of a seed, trained or read."""
    torch.manual_seed(seeds.derive(cell.seed, "source"))
    net = nn.Sequential(*_block(channels, scale.width), *_block(scale.width, 2 * scale.width), nn.MaxPool2d(2),
                        *_block(2 * scale.width, 4 * scale.width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(4 * scale.width, classes))
    trained = (scale.samples, scale.epochs, scale.batch, scale.lr, scale.width)
    path = home / "sources" / f"{digest(cell.data, str(trained), str(cell.seed), torch.__version__)}.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net
    _train(net, *_pixels(cell, home, train=True, share=scale.samples)[:2], scale, cell.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    torch.save(net.state_dict(), draft)
    draft.replace(path)
    return net


def _train(net: nn.Module, x: Tensor, y: Tensor, scale: Scale, seed: int) -> None:
    """SGD with momentum, one cosine."""
    optimizer = torch.optim.SGD(net.parameters(), lr=scale.lr, momentum=0.9, weight_decay=5e-4)
    steps = scale.epochs * (len(y) // scale.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(scale.epochs):
        order = torch.randperm(len(y), generator=seeds.generator(seed, "order", epoch))
        for ids in order[: len(y) // scale.batch * scale.batch].split(scale.batch):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[ids] * 2 - 1), y[ids]).backward()
            optimizer.step()
            schedule.step()


def _pixels(cell: Cell, home: Path, *, train: bool, share: int) -> tuple[Tensor, Tensor, int]:
    """Images in [0, 1], labels, and the number of classes."""
    source = opened(cell, home)[0 if train else 1]
    ids = torch.arange(len(source))
    if 0 < share < len(source):
        ids = stratified_split(source.targets, share / len(source), seed=0)[1]
    raw = rows(source, ids)
    return (raw.float() / top(cell, raw)).clamp(0, 1), source.targets[ids], len(source.classes)


def _block(inside: int, outside: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
