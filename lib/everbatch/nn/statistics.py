"""Running statistics of normalisation layers: estimated anew, or kept from moving."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from everbatch.distributed import World
from everbatch.errors import check

__all__ = ["bn_recalibrate", "frozen_statistics"]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@torch.no_grad()
def bn_recalibrate(model: nn.Module, batches: Iterable[Tensor], *, forward: Callable[[Tensor], Any] | None = None,
                   average: bool = True) -> int:
    """Replace BatchNorm's running statistics by the mean of the batch statistics of `batches`, in place.

        mu = (1/B) sum_b mean_b      var = (1/B) sum_b var_b      var_b unbiased, as torch keeps it

    Needed wherever weights were edited and statistics kept: after shrink and perturb with buffers="keep", after averaging
    weights. Only the normalisation layers are put into training mode (dropout stays off, and draws nothing); modes and
    momenta are put back, also when a forward raises; the old statistics are, then. Weights are not touched. A layer that no
    forward reached keeps its statistics: of split layers, all branches but the one in use (see `split_branch`).

    Args:
        model: holds the layers.
        batches: inputs, at least one batch; as many on every rank.
        forward: runs one batch; `model` itself by default. Pass the engine's or wrapper's call where the model needs it.
        average: mean over the ranks whose forwards reached a layer as well, so that all end with the same statistics; one
            all-reduce.

    Returns:
        The number of layers, split ones counted once per branch; 0 when there is none, and then no forward is run.

    Raises:
        ValueError: no batches.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        return 0
    modes = [(m, m.training) for m in model.modules()]
    momenta = [(m, m.momentum) for m in layers]
    before = [(m, b, b.clone()) for m in layers for b in m.buffers(recurse=False)]
    count = 0
    try:
        model.eval()
        for layer in layers:
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None  # torch's cumulative mean
        for inputs in batches:
            (forward or model)(inputs)
            count += 1
        check(count > 0, "bn_recalibrate", "no batches", "get at least one")
        idle = {layer for layer in layers if layer.num_batches_tracked == 0}
        for layer, buffer, value in before:
            if layer in idle:
                buffer.copy_(value)
    except BaseException:
        for _, buffer, value in before:
            buffer.copy_(value)
        raise
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, momentum in momenta:
            layer.momentum = momentum
    world = World.current()
    if average and world.size > 1:
        kept = [(m, b) for m in layers for b in (m.running_mean, m.running_var) if b is not None]
        # A rank's share counts where its forwards reached the layer, so each has its number of such ranks beside it.
        parts = [b.new_zeros(b.numel() + 1, dtype=torch.float32) if m in idle else
                 torch.cat([b.reshape(-1).float(), b.new_ones(1, dtype=torch.float32)]) for m, b in kept]
        flat = world.sum(torch.cat(parts))
        for (_, buffer), total in zip(kept, torch.split(flat, [p.numel() for p in parts]), strict=True):
            buffer.copy_(torch.where(total[-1] > 0, (total[:-1] / total[-1]).view(buffer.shape), buffer))
    return len(layers)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Forwards inside the block give what they would give, and leave every buffer of `model` as it was, bit for bit.

    Batch norm in training mode goes on using the batch's statistics and moves none of its own; other buffers are copied, and
    written back in place at the end, also where a forward put another tensor under the name; DDP broadcasts none. Flags and
    buffers are put back when the block raises as well. Parameters, modes and random numbers are not touched; buffers born
    inside the block stay.

    Run backwards inside the block: writing a buffer back makes autograd refuse graphs that saved it.

    Cost: a walk over the modules, and memory for the copies: none for batch norm in training mode.
    """
    undo: list[Callable[[], None]] = []
    try:
        for module in every_module(model):
            undo += hold_statistics(module)
        yield
    finally:
        for action in reversed(undo):
            action()


def every_module(root: nn.Module) -> list[nn.Module]:
    """`root.modules()` in some order, in a third of the time: steps walk."""
    found, at = [root], {id(root)}
    for module in found:  # it grows
        for child in module._modules.values():
            if child is not None and id(child) not in at:
                at.add(id(child))
                found.append(child)
    return found


def hold_statistics(module: nn.Module) -> list[Callable[[], None]]:
    """Keep one module's own buffers (not its children's) from moving; returns what to call, last first, to let go."""
    undo: list[Callable[[], None]] = []
    # Batch norm without the flag uses the batch as before and moves nothing; momentum = 0 would still count the batch. Instance
    # norm has the flag and moves its statistics without it.
    still: tuple[str, ...] = ()
    if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
        module.track_running_stats, still = False, STATISTICS
        undo.append(functools.partial(setattr, module, "track_running_stats", True))
    if isinstance(module, DistributedDataParallel) and module.broadcast_buffers:
        module.broadcast_buffers = False  # else a forward brings the first rank's
        undo.append(functools.partial(setattr, module, "broadcast_buffers", True))
    for name, tensor in module._buffers.items():
        if tensor is not None and name not in still:
            undo.append(functools.partial(put_back, module, name, tensor, tensor.clone()))
    return undo


def put_back(module: nn.Module, name: str, tensor: Tensor, kept: Tensor) -> None:
    """Make buffer `name` the tensor it was, with the values it had."""
    tensor.copy_(kept)
    module._buffers[name] = tensor
