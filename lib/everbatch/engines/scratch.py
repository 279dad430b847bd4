"""Memory for copies of small models' vectors, kept from step to step with the views into it."""

from __future__ import annotations

from typing import Any

import torch

from everbatch.engines.shards import Shard, Vector

__all__ = ["Scratch"]

NOBODY: Any = None
LARGEST = 2**22
"""Elements up to which memory is kept: beyond, making views costs nothing beside the arithmetic, and memory does."""


class Scratch:
    """Lends vectors that lie in one tensor each, over the same shards as before, and takes them back.

    Making 150 views costs as much as a thin model's norm, sum and copy together. What is lent must not outlive its return: only
    for what never leaves a function, or a `with` block.

    Memory: as many copies of a model's masters as are lent at once (two), up to 4 million elements each.
    """

    def __init__(self) -> None:
        self._shards: list[Shard] = []
        """Of what lies here."""
        self._free: list[Vector] = []

    def copy(self, vector: Vector) -> Vector:
        """A copy; give it back with `give`."""
        lent = self._lend(vector)
        if lent is None:
            return vector.clone()
        torch._foreach_copy_(lent.tensors, vector.tensors)
        return lent

    def give(self, *vectors: Vector) -> None:
        """Return what was lent; a vector that was not is let go."""
        for v in vectors:
            if v.lent and v.shards is self._shards:
                v.host = NOBODY  # whoever keeps this memory shall not keep the engine
                self._free.append(v)

    def write_sum(self, into: Vector, a: Vector, b: Vector) -> None:
        """into <- a + b, where `into` has the values of `a`."""
        mine, theirs = a.flat, b.flat
        lent = self._lend(a) if mine is not None and theirs is not None and a.shards == b.shards else None
        if lent is None or mine is None or theirs is None:
            into.add_(b)
            return
        torch.add(mine, theirs, out=lent.flat)
        lent.copy_into(into.tensors)
        self.give(lent)

    def _lend(self, like: Vector) -> Vector | None:
        """A vector over the same shards, with any values; None where memory is not kept."""
        kinds = {(t.dtype, t.device) for t in like.tensors}
        if len(kinds) != 1 or len(like.shards) < 2:
            return None
        ((dtype, device),) = kinds
        if self._shards != like.shards:
            self._shards, self._free = list(like.shards), []
        for lent in self._free:
            if lent.flat is not None and (lent.flat.dtype, lent.flat.device) == (dtype, device):
                self._free.remove(lent)
                lent.host = like.host
                return lent
        size = sum(t.numel() for t in like.tensors)
        if size > LARGEST:
            return None
        lent = Vector(like.host, (), None, flat=torch.empty(size, dtype=dtype, device=device), lent=True)
        lent.shards = self._shards  # the list itself: by it, what is returned is known to be of these shards
        return lent
