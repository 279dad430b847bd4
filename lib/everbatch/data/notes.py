"""What is said of data beside errors: one line each, once per process, by rank 0."""

from __future__ import annotations

import functools
import os
import sys

from everbatch.distributed import World

__all__ = ["tell"]


@functools.lru_cache(maxsize=1024)
def tell(text: str) -> None:
    """Print one line to stderr, unless this process has said it already or is not rank 0."""
    world = World.current()
    rank = world.rank if world.size > 1 else int(os.environ.get("RANK") or 0)
    if rank == 0:
        print(text, file=sys.stderr, flush=True)
