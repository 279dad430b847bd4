"""The proof that every rank has the same masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from everbatch import seeds
from everbatch.distributed import World
from everbatch.engines.host import Host
from everbatch.engines.shards import Shard

__all__ = ["digest", "verify"]

CHUNK = 1 << 22
"""Positions hashed at once."""


def digest(shards: Sequence[Shard], masks: Mapping[str, Tensor], names: Sequence[str], device: torch.device) -> Tensor:
    """Per layer: active entries and a 63-bit sum of hashes of their positions. (2, layers) int64,
    of this rank's slices.

    Sums over ranks do not depend on the sharding, but for layers that are frozen: masks are kept
    for them and shards are not, so their positions count from the start of the slice. Copies of a
    model are sharded alike, so they still have equal sums.
    """
    starts = {s.name: s.start for s in shards}
    result = torch.zeros(2, len(names), dtype=torch.int64, device=device)
    for i, name in enumerate(names):
        if name not in masks:
            continue
        at = masks[name].reshape(-1).nonzero().view(-1) + starts.get(name, 0)
        result[0, i] += at.numel()
        for part in torch.split(at, CHUNK):
            result[1, i] += _mixed(part, seeds.derive("mask", name)).sum()
    return result


def _mixed(values: Tensor, salt: int) -> Tensor:
    """A hash of each integer: multiply and shift in int64, which wraps."""
    x = values * -7046029254386353131 + salt
    x = (x ^ ((x >> 29) & (2**35 - 1))) * -4658895280553007687
    return x ^ ((x >> 32) & (2**32 - 1))


def verify(host: Host, who: str, found: Tensor, names: Sequence[str]) -> dict[str, int]:
    """Active entries of each whole layer, after a proof that every copy of the model has the same
    masks.

    Args: found: what `digest` gave on this rank.

    Raises:
        RuntimeError: copies differ, on every rank alike. Nothing is repaired: where masks differ,
            gradients or weights did.

    Cost: one all-reduce of two integers per layer where weights are sharded, one of two per rank
    where there are copies.
    """
    found = host.total(found)
    world = World.current()
    if host.replicas > 1 and world.size > 1:
        table = torch.zeros(world.size, 2, dtype=torch.int64, device=host.device)
        table[world.rank] = torch.stack([found[0].sum(), _mixed(found[1], 1).sum()])
        rows = world.sum(table).tolist()
        odd = [rank for rank, row in enumerate(rows) if row != rows[0]]
        if odd:
            raise RuntimeError(f"{who}: masks of ranks {odd} differ from rank 0's, must be the same on every rank; the ranks' "
                               "weights or gradients differ: check that the model starts equal and that gradients are reduced")
    return dict(zip(names, found[0].tolist(), strict=True))
