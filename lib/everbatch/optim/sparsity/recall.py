"""Computing as at the end of an earlier task, and what that takes beside masks: whole parameters
and buffers, as plain values."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everbatch.distributed import World
from everbatch.engines.host import Host, plain_name
from everbatch.optim.sparsity.masks import Masks
from everbatch.optim.sparsity.options import WHO, Kept

__all__ = ["bare", "buffers", "set_buffers", "showing"]


@contextmanager
def showing(kept: Kept, host: Host, task: int) -> Iterator[None]:
    """See `DynamicSparsity.task`. Two publications; one if the block raises, and the next pass then
    publishes the weights."""
    if task == kept.task and task:
        yield
        return
    if not (isinstance(task, int) and 1 <= task <= kept.done):
        known = f"1 to {kept.done}" if kept.done else "none"
        raise RuntimeError(f"{WHO}: task({task!r}) has no mask; tasks that ended: {known}, open: {kept.task or 'none'}")
    with host.frozen_too():
        shards = host.shards
    weights = {shard.name: shard.data.clone() for shard in shards}
    statistics = [(buffer, buffer.clone()) for _, buffer in _named_buffers(host)]
    try:
        _show(kept, host, task)
        host.publish_if_dirty()
        yield
    finally:
        with torch.no_grad():  # locally: what raised on one rank must not start a collective
            for shard in shards:
                shard.data.copy_(weights[shard.name])
            for buffer, before in statistics:
                buffer.copy_(before)
        host.touch()
    host.publish_if_dirty()


@torch.no_grad()
def _show(kept: Kept, host: Host, task: int) -> None:
    """Put the task's weights, biases and statistics into the masters and the model."""
    masks, saved = kept.task_masks[task - 1], kept.saved.get(str(task))
    parameters = saved["parameters"] if saved is not None else {}
    with host.frozen_too():
        shards = host.shards
    for shard in shards:
        name, data = shard.name, shard.data
        if name in masks:
            data.copy_(torch.where(masks[name].bool(), kept.store[name], torch.zeros_like(data)))
        elif name in parameters:  # what came after the task stays as it is
            whole = _unpack(parameters[name]).view(-1)
            data.copy_(whole[shard.start : shard.start + shard.numel].view(data.shape))
    if saved is not None:
        set_buffers(host, saved["buffers"])
    host.touch()


# ------------------------------------------------------------------------------ what no mask covers
def bare(masks: Masks, host: Host) -> dict[str, Any]:
    """Whole parameters that have no mask. Collective where weights are sharded."""
    names = [name for name in host.names if name not in masks.shapes]
    held = [(shard, shard.data) for shard in host.shards if shard.name in names]
    return {name: _pack(whole) for name, whole in host.gather(held, names).items()}


def buffers(host: Host) -> dict[str, Any]:
    """All buffers: statistics that differ by rank become their mean, anything else rank 0's.
    Collective with several ranks."""
    world, result = World.current(), {}
    for name, buffer in _named_buffers(host):
        value = buffer.detach().clone()
        if world.size > 1 and value.is_floating_point():
            value = (world.sum(value.double()) / world.size).to(value.dtype)
        elif world.size > 1:
            value = world.sum(value.to(torch.int64) * (world.rank == 0)).to(value.dtype)
        result[name] = _pack(value)
    return result


def set_buffers(host: Host, saved: dict[str, Any]) -> None:
    """Put buffers back, those that were there."""
    for name, buffer in _named_buffers(host):
        if name in saved:
            buffer.copy_(_unpack(saved[name]).view(buffer.shape))


def _named_buffers(host: Host) -> list[tuple[str, Tensor]]:
    module: nn.Module | None = host.module
    pairs = list(module.named_buffers()) if module is not None else []
    return [(plain_name(name), buffer) for name, buffer in pairs]


def _pack(value: Tensor) -> list[Any]:
    """A tensor as plain values: type, shape, and its bytes as text."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    text = base64.b64encode(flat.view(torch.uint8).numpy().tobytes()).decode() if flat.numel() else ""
    return [str(value.dtype).removeprefix("torch."), list(value.shape), text]


def _unpack(kept: list[Any]) -> Tensor:
    raw = np.frombuffer(base64.b64decode(kept[2]), dtype=np.uint8).copy()
    return torch.from_numpy(raw).view(getattr(torch, kept[0])).view(kept[1])
