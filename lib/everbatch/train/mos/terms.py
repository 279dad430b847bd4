"""The term that keeps features apart: every sample, and every old class mean, is most like itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from everbatch.distributed import World

__all__ = ["TEMPERATURE", "across", "identity_contrast"]

TEMPERATURE = 0.8
"""What inner products are divided by, in the released code."""


def identity_contrast(features: Tensor, means: Tensor) -> Tensor:
    """0-dim:  M = [means; features] (rows),  mean_i CE(M M^T / 0.8, i)

    Inner products are not normalised, so that the term also asks for long features.

    Args:
        features: (n, d), with a graph.
        means: (k, d), constants; k may be 0.
    """
    rows = torch.cat([means.to(features), features]) if len(means) else features
    return functional.cross_entropy(rows @ rows.T / TEMPERATURE, torch.arange(len(rows), device=rows.device))


def across(features: Tensor, means: Tensor, world: World) -> Tensor:
    """This rank's share of `identity_contrast` over the rows of all ranks: its mean over ranks, and the mean of the gradients,
    are those of one process with all rows. One all-reduce of the features.

    Args:
        features: (n, d), as many on every rank.
    """
    if world.size == 1:
        return identity_contrast(features, means)
    everywhere = features.new_zeros((world.size, *features.shape))
    everywhere[world.rank] = features.detach()
    everywhere = world.sum(everywhere)
    rows = torch.cat([*everywhere[: world.rank], features, *everywhere[world.rank + 1 :]])
    whole = identity_contrast(rows, means)
    # Through its own rows alone: engines take the mean of what is a sum over ranks.
    return whole.detach() + world.size * (whole - whole.detach())
