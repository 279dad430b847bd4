"""Classifier alignment: the head is trained on what Gaussians of all classes draw, so that old and new classes compare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from everbatch.train.mos.gaussians import Sampler

__all__ = ["MOMENTUM", "drawn", "fit_head"]

Pairs = Iterable[tuple[Tensor, Tensor]]
MOMENTUM = 0.9


def fit_head(
    weight: Tensor, bias: Tensor | None, epochs: Iterable[Pairs], count: int, *, seen: int, lr: float, weight_decay: float,
) -> tuple[Tensor, Tensor | None]:
    """Train a linear head on features that are given: cross-entropy over the first `seen` classes, SGD with momentum 0.9, in
    epoch e of `count` at the rate lr (1 + cos(pi e / count)) / 2.

    Args:
        weight: (classes, d); bias: (classes,), or None. They stay as they are.
        epochs: batches (n, d) and labels (n,) of each.

    Returns:
        The new weight and bias.
    """
    weight = weight.detach().clone().requires_grad_()
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    trained = [weight] if bias is None else [weight, bias]
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=MOMENTUM, weight_decay=weight_decay)
    with torch.enable_grad():
        for epoch, batches in enumerate(epochs):
            optimizer.param_groups[0]["lr"] = lr * (1.0 + math.cos(math.pi * epoch / count)) / 2.0
            for features, labels in batches:
                logits = functional.linear(features, weight, bias)[:, :seen]
                optimizer.zero_grad()
                functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return weight.detach(), None if bias is None else bias.detach()


def drawn(sampler: Sampler, epochs: int, count: int, generator: torch.Generator) -> Iterator[Pairs]:
    """Epochs of samples: `count` of every class, in random order, in as many batches of `count` as there are classes."""
    for _ in range(epochs):
        features, labels = sampler.draw(count, generator)
        order = torch.randperm(len(labels), generator=generator)
        yield list(zip(torch.split(features[order], count), torch.split(labels[order], count), strict=True))
