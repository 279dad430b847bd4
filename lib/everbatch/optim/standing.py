"""Other weights in the place of the model's own, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from everbatch.engines.host import Host

__all__ = ["standing_in"]


@contextmanager
def standing_in(host: Host, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Compute with these slices, by name, inside the block; what has none stays. The weights are put back afterwards, bit for
    bit. Collective: two publications; one if the block raises, and the next pass then publishes the weights."""
    with host.frozen_too():
        saved = {s.name: s.data.clone() for s in host.shards}
    before, host.replaced = host.replaced, True
    try:
        _write(host, saved | dict(values))
        host.publish_if_dirty()
        yield
    finally:
        host.replaced = before
        _write(host, saved)  # locally: what raised on one rank must not start a collective
    host.publish_if_dirty()


@torch.no_grad()
def _write(host: Host, values: Mapping[str, Tensor]) -> None:
    with host.frozen_too():
        shards = host.shards
    for shard in shards:
        shard.data.copy_(values[shard.name])
    torch.clear_autocast_cache()  # which would go on with the others
    host.touch()
