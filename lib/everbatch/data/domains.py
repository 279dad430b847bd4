"""Domains made from one pair of sources by a fixed transform each: permuted pixels and rotated images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from everbatch.data.datasets import Samples
from everbatch.data.label_space import as_pair
from everbatch.data.memory import check_memory
from everbatch.data.sources import Source, TransformedSource
from everbatch.errors import check, check_real
from everbatch.rows import one_tensor
from everbatch.seeds import generator

__all__ = ["Permute", "Rotate", "permuted", "rotated"]


@dataclass(frozen=True)
class Permute:
    """Shuffles positions: the pixels of (n, C, H, W) images, alike in all channels, or the features of (n, ...)."""

    order: Tensor
    """(positions,) int64 permutation."""

    def __call__(self, inputs: Tensor) -> Tensor:
        channels = inputs.shape[1] if inputs.ndim == 4 else 1
        return inputs.reshape(len(inputs), channels, -1)[..., self.order].reshape(inputs.shape)


@dataclass(frozen=True)
class Rotate:
    """Turns (n, C, H, W) images counter-clockwise about their centre, bilinearly; what comes from outside is 0."""

    degrees: float

    def __call__(self, inputs: Tensor) -> Tensor:
        if self.degrees % 360 == 0:
            return inputs
        height, width = inputs.shape[-2:]
        sine, cosine = math.sin(math.radians(self.degrees)), math.cos(math.radians(self.degrees))
        # The grid is in units of half a side, so a turn of a non-square image needs the ratio of the sides.
        turn = torch.tensor([[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]])
        grid = affine_grid(turn.expand(len(inputs), 2, 3), list(inputs.shape), align_corners=False)
        turned = grid_sample(inputs.float(), grid, align_corners=False)
        return turned.to(inputs.dtype) if inputs.is_floating_point() else turned.round().to(inputs.dtype)


def permuted(
    train: Samples, test: Samples, tasks: int, seed: int = 0, *, identity_first: bool = True,
) -> list[tuple[Source, Source]]:
    """Domains for `domain_incremental`, each with its own permutation of the positions of an input.

    Args:
        train: training samples. test: test samples.
        tasks: number of domains.
        seed: of the permutations.
        identity_first: leave the first domain as it is; False permutes it too, as Mammoth does.
    """
    check(tasks >= 1, "permuted", f"tasks={tasks}", "be at least 1")
    train, test = as_pair("permuted", train, test)
    one = one_tensor("permuted", train.fetch(torch.tensor([0])))
    positions = one[0, 0].numel() if one.ndim == 4 else one[0].numel()
    check_memory("permuted", f"tasks={tasks}", 8 * tasks * positions, "make fewer tasks")
    pairs: list[tuple[Source, Source]] = []
    for task in range(tasks):
        order = torch.randperm(positions, generator=generator(seed, "permuted", task))
        if task == 0 and identity_first:
            order = torch.arange(positions)
        label = f"permuted {seed}.{task}" if task or not identity_first else "permuted 0"
        pairs.append((TransformedSource(train, Permute(order), name=f"{train.name}, {label}"),
                      TransformedSource(test, Permute(order), name=f"{test.name}, {label}")))
    return pairs


def rotated(train: Samples, test: Samples, degrees: Sequence[float]) -> list[tuple[Source, Source]]:
    """Domains for `domain_incremental`, each turned by its angle in `degrees`, counter-clockwise.

    Raises:
        ValueError: no angles, one that is not finite, or samples that are not (C, H, W) images.
    """
    check(len(degrees) > 0, "rotated", "no degrees", "be one angle per domain")
    for angle in degrees:
        check_real("rotated", "degrees", angle)
    train, test = as_pair("rotated", train, test)
    shape = tuple(one_tensor("rotated", train.fetch(torch.tensor([0]))).shape[1:])
    check(len(shape) == 3, "rotated", f"samples of shape {shape}", "be (C, H, W) images")
    return [
        (TransformedSource(train, Rotate(angle), name=f"{train.name}, turned {angle:g}"),
         TransformedSource(test, Rotate(angle), name=f"{test.name}, turned {angle:g}"))
        for angle in degrees
    ]
