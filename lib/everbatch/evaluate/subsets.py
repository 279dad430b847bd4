"""Fixed subsets of a task's samples: as many of each class as its share, the same at any time and number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from everbatch.data import Stream
from everbatch.errors import check_whole
from everbatch.seeds import generator

__all__ = ["quotas", "stratified_subset"]


def quotas(counts: Tensor, size: int) -> Tensor:
    """How many of each group to take, (g,): `size` in proportion to `counts` by the largest remainders, the
    earlier group first among equals; all of them where there are no more.

    >>> quotas(torch.tensor([50, 30, 20]), 9).tolist()
    [4, 3, 2]
    """
    total = int(counts.sum())
    if size >= total:
        return counts.clone()
    share, rest = counts * size // total, counts * size % total
    first = torch.sort(rest, descending=True, stable=True).indices[: size - int(share.sum())]
    share[first] += 1
    return share


def stratified_subset(stream: Stream, ids: Tensor, size: int, *key: int | str, by_label: bool = True) -> Tensor:
    """`size` of the samples `ids`, ascending: of each class its share, drawn by `key` alone; all where there are no
    more.

    Args:
        by_label: False draws from all alike, where labels say nothing.

    Raises:
        ValueError: a size below 1.
    """
    check_whole("stratified_subset", "size", size, 1)
    if size >= len(ids):
        return ids.sort().values
    labels = stream.targets(ids) if by_label else torch.zeros_like(ids)
    groups, counts = torch.unique(labels, return_counts=True)
    chosen = []
    for label, count in zip(groups.tolist(), quotas(counts, size).tolist(), strict=True):
        rows = torch.nonzero(labels == label).flatten()
        order = torch.randperm(len(rows), generator=generator(*key, "subset", label))
        chosen.append(rows[order[:count]])
    return ids[torch.cat(chosen)].sort().values
