"""The weight terms of the objective over a host: their gradient in closed form, and their value."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from everbatch.engines.host import Host
from everbatch.engines.named import ByName
from everbatch.engines.shards import wide
from everbatch.objective.terms import WeightTerm

__all__ = ["penalty", "pull", "weights_now"]


def pull(host: Host, terms: Iterable[WeightTerm]) -> None:
    """Add the terms' gradients to the present gradient, on this rank's slices; no collective."""
    for term in terms:
        if not term.weight:
            continue
        names, weights, gradients = [], [], []
        for shard in host.shards:
            if shard.name not in term.precision:
                continue
            # Also of parameters that the pass did not reach: the term depends on them all.
            gradient = host.claim(shard)
            if gradient is not None:
                names.append(shard.name)
                weights.append(shard.data)
                gradients.append(gradient)
        term.add_gradient_(names, weights, gradients)


def penalty(host: Host, terms: Iterable[WeightTerm]) -> Tensor:
    """The sum of the terms over the whole model: 0-dim float64. One all-reduce for each where
    weights are sharded."""
    total = torch.zeros((), dtype=torch.float64, device=host.device)
    for term in terms:
        mine = term.distance(((s.name, s.data) for s in host.shards), host.device)
        total = total + term.value(host.total(mine))
    return total


def weights_now(host: Host) -> ByName:
    """A copy of the masters, in fp32 at least, so that differences from it are."""
    return ByName({s.name: s.data.to(wide(s.data), copy=True) for s in host.shards})
