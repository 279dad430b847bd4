"""Running statistics of normalisation layers, estimated anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from everbatch.distributed import World
from everbatch.errors import check

__all__ = ["bn_recalibrate"]


@torch.no_grad()
def bn_recalibrate(model: nn.Module, batches: Iterable[Tensor], *, forward: Callable[[Tensor], Any] | None = None,
                   average: bool = True) -> int:
    """Replace BatchNorm's running statistics by the mean of the batch statistics of `batches`, in place.

        mu = (1/B) sum_b mean_b      var = (1/B) sum_b var_b      var_b unbiased, as torch keeps it

    Needed wherever weights were edited and statistics kept: after shrink and perturb with buffers="keep", after averaging
    weights. Only the normalisation layers are put into training mode (dropout stays off, and draws nothing); modes and
    momenta are put back, also when a forward raises; the old statistics are, then. Weights are not touched.

    Args:
        model: holds the layers.
        batches: inputs, at least one batch; as many on every rank.
        forward: runs one batch; `model` itself by default. Pass the engine's or wrapper's call where the model needs it.
        average: mean over the ranks as well, so that all end with the same statistics; one all-reduce.

    Returns:
        The number of layers; 0 when there is none, and then no forward is run.

    Raises:
        ValueError: no batches.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    if not layers:
        return 0
    modes = [(m, m.training) for m in model.modules()]
    momenta = [(m, m.momentum) for m in layers]
    before = [(b, b.clone()) for m in layers for b in m.buffers(recurse=False)]
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
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, momentum in momenta:
            layer.momentum = momentum
    world = World.current()
    if average and world.size > 1:
        kept = [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]
        flat = world.sum(torch.cat([b.reshape(-1).float() for b in kept])) / world.size
        for buffer, mean in zip(kept, torch.split(flat, [b.numel() for b in kept]), strict=True):
            buffer.copy_(mean.view(buffer.shape))
    return len(layers)
