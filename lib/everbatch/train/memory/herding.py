"""Exemplars by herding: the samples whose mean is nearest to that of their class, in order of use; and where features are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from everbatch.data import ClassBalanced
from everbatch.data.slots import Ints

__all__ = ["Held", "Herded", "herding", "last_input", "unit"]


def unit(features: Tensor) -> Tensor:
    """Rows of length one: (n, d) to (n, d)."""
    return functional.normalize(features, dim=1)


def herding(features: Tensor, count: int) -> Tensor:
    """The order in which samples are taken, so that the mean of the first k is near to the mean of all, for each k:

        p_k = argmin_x || mu - (phi(x) + sum_{j < k} phi(p_j)) / k ||

    each sample once. Shapes (n, d) -> (min(count, n),) indices. In float64; the first of equals. Cost: count * n * d.

    Source: Rebuffi et al. 2017, Algorithm 4 (Welling 2009).
    """
    phi = features.double()
    mean, squares = phi.mean(0), phi.square().sum(1)
    total, free = torch.zeros_like(mean), torch.ones(len(phi), dtype=torch.bool, device=phi.device)
    taken: list[Tensor] = []
    for k in range(1, min(count, len(phi)) + 1):
        # k^2 times the squared distance, less what does not depend on the sample
        distance = squares + 2.0 * (phi @ (total - k * mean))
        chosen = torch.where(free, distance, torch.inf).argmin()
        taken.append(chosen)
        free[chosen] = False
        total = total + phi[chosen]
    return torch.stack(taken)


class Herded(ClassBalanced):
    """A class-balanced memory that keeps the first of each class, by the place that samples are offered with as `positions`.

    As classes come, each keeps a shorter beginning of its list: iCaRL's reduction of exemplar sets.
    """

    def _keys(self, ids: Ints, positions: Ints, tasks: Ints) -> NDArray[np.float64]:
        return -positions.astype(np.float64)


@dataclass
class Held:
    """What `last_input` has found."""

    value: Any = None


@contextmanager
def last_input(module: nn.Module) -> Iterator[Held]:
    """Inside the block: the input of the linear layer that ran last, the features that a classifier's logits are made of.

    On any engine: the layers are called inside the wrapped network too. Cost: a reference.
    """
    held = Held()

    def hold(_layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        held.value = inputs[0]

    hooks = [layer.register_forward_pre_hook(hold) for layer in module.modules() if isinstance(layer, nn.Linear)]
    try:
        yield held
    finally:
        for hook in hooks:
            hook.remove()
