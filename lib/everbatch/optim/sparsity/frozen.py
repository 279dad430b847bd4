"""What ended tasks have frozen: the proof that nothing moved it, and the room that is left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from everbatch.engines.host import Host
from everbatch.optim.sparsity.masks import Masks
from everbatch.optim.sparsity.options import WHO, Kept

__all__ = ["Capacity", "capacity", "check_frozen", "checksums"]

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element to the integer that its bits are read as."""


@dataclass(frozen=True)
class Capacity:
    """Room in one layer."""

    size: int
    used: int
    """Entries that ended tasks use."""
    shared: dict[int, float]
    """Per ended task: the share of its entries that earlier tasks used already."""

    @property
    def free(self) -> float:
        """Share of entries no ended task uses."""
        return 1.0 - self.used / self.size


@torch.no_grad()
def capacity(masks: Masks, kept: Kept, host: Host) -> dict[str, Capacity]:
    """See `DynamicSparsity.capacity`. One all-reduce."""
    names, tasks = list(masks.shapes), kept.done
    # Row 0: entries in use. Of task k: its entries, then those that earlier ones use as well.
    table = torch.zeros(1 + 2 * tasks, len(names), dtype=torch.int64, device=host.device)
    with host.frozen_too():
        shards = [shard for shard in host.shards if shard.name in masks.shapes]
    for shard in shards:
        at = names.index(shard.name)
        union = torch.zeros_like(shard.data, dtype=torch.bool)
        for k, of_task in enumerate(kept.task_masks):
            mask = of_task[shard.name].bool()
            table[1 + 2 * k, at] += mask.sum()
            table[2 + 2 * k, at] += (mask & union).sum()
            union |= mask
        table[0, at] += union.sum()
    rows = host.total(table).tolist()

    result = {}
    for i, name in enumerate(names):
        shared = {k + 1: rows[2 + 2 * k][i] / max(rows[1 + 2 * k][i], 1) for k in range(tasks)}
        result[name] = Capacity(masks.size(name), rows[0][i], shared)
    return result


def check_frozen(masks: Masks, kept: Kept, host: Host) -> None:
    """Raise, on every rank, if a frozen weight or its stored value changed."""
    used = masks.used(kept)
    if used is None:
        return
    names = list(masks.shapes)
    moved = torch.zeros(len(names), dtype=torch.int64, device=host.device)
    for shard in masks.shards(host, kept):
        name, data = shard.name, shard.data
        frozen = used[name] & kept.masks[name]
        if masks.options.as_released:
            frozen = frozen & (data != 0)  # what growth activated trains as zero there
        moved[names.index(name)] += (frozen & (data != kept.store[name])).sum()

    odd = [name for name, count in zip(names, host.total(moved).tolist(), strict=True) if count]
    now = checksums(masks, kept, host)
    odd += [name for name, value in now.items() if kept.checksums.get(name, value) != value]
    if odd:
        raise RuntimeError(f"{WHO}: frozen weights of {sorted(set(odd))[:5]} changed during task {kept.task}; something moves "
                           "masters without going through the optimizer's step")


def checksums(masks: Masks, kept: Kept, host: Host) -> dict[str, int]:
    """A sum over the stored bits that ended tasks use, each times an odd number of its position;
    the same at any sharding."""
    used, names = masks.used(kept) or {}, list(masks.shapes)
    sums = torch.zeros(len(names), dtype=torch.int64, device=host.device)
    for shard in masks.shards(host, kept):
        name = shard.name
        if name in used:
            at = used[name].reshape(-1).nonzero().view(-1)
            sums[names.index(name)] += _weighted_bits(kept.store[name], at, shard.start)
    return dict(zip(names, host.total(sums).tolist(), strict=True))


def _weighted_bits(stored: Tensor, at: Tensor, start: int) -> Tensor:
    values = stored.reshape(-1)[at]
    bits = values.view(INTEGERS[values.element_size()]).to(torch.int64)
    return (bits * (2 * (at + start) + 1)).sum()
