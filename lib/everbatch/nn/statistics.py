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
TORCH_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
"""Forwards that move statistics where the layer's flag says so, and nowhere else."""


@torch.no_grad()
def bn_recalibrate(model: nn.Module, batches: Iterable[Tensor], *, forward: Callable[[Tensor], Any] | None = None,
                   average: bool = True) -> int:
    """Replace BatchNorm's running statistics by the mean of the batch statistics of `batches`, in place.

        mu = (1/B) sum_b mean_b      var = (1/B) sum_b var_b      var_b unbiased, as torch keeps it

    Needed wherever weights were edited and statistics kept: after shrink and perturb with buffers="keep", after averaging
    weights. Only the normalisation layers are put into training mode (dropout stays off, and draws nothing); modes and
    momenta are put back, also when a forward raises; the old statistics are, then. Weights are not touched. A layer that no
    forward reached keeps its statistics: of split layers, all branches but the one in use (see `split_branch`). So does a
    layer that was put into evaluation mode while others train: a frozen one. Where every layer is in evaluation mode, the
    model itself is, and all of them are estimated.

    Subclasses of torch's layers with a forward of their own must take `momentum=None` for a cumulative mean and count batches,
    as torch's do: that is tried with the first batch, which they cost a second forward of. Norms of other classes are left alone.

    Args:
        model: holds the layers.
        batches: inputs, at least one batch; as many on every rank.
        forward: runs one batch; `model` itself by default. Pass the engine's or wrapper's call where the model needs it.
        average: mean over the ranks whose forwards reached a layer as well, so that all end with the same statistics; one
            all-reduce.

    Returns:
        The number of layers, split ones counted once per branch; 0 when there is none, and then no forward is run.

    Raises:
        ValueError: no batches; a layer with a forward of its own that takes no cumulative mean, by name.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    training = [layer for layer in layers if layer.training]
    layers = training or layers
    if not layers:
        return 0
    own = {name: m for name, m in model.named_modules() if m in set(layers) and not has_torch_forward(m)}
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
            tried = {}
            if own and count == 0:
                tried = run_from_ones(own, functools.partial(forward or model, inputs))
                for layer in layers:
                    layer.reset_running_stats()
            (forward or model)(inputs)
            require_same_means(own, tried)
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


def run_from_ones(layers: dict[str, nn.Module], run: Callable[[], Any]) -> dict[str, Tensor]:
    """Means that layers with a forward of their own have after `run()` from running means of one: by name, of those reached."""
    for layer in layers.values():
        layer.running_mean.fill_(1.0)  # type: ignore[operator]
    try:
        run()
    except TypeError as error:  # momentum * x, where momentum is None
        raise ValueError(f"bn_recalibrate: {kind_of(layers)}, must take momentum=None for a cumulative mean, as torch's do: "
                         f"{error}") from error
    means = {name: layer.running_mean.clone() for name, layer in layers.items()}  # type: ignore[operator]
    return {name: mean for name, mean in means.items() if bool((mean != 1.0).any())}


def require_same_means(layers: dict[str, nn.Module], tried: dict[str, Tensor]) -> None:
    """Refuse layers whose means after one batch depend on where they began, or that did not count it."""
    for name, mean in tried.items():
        layer = layers[name]
        now, counted = layer.running_mean, layer.num_batches_tracked
        good = torch.allclose(mean, now, rtol=1e-4, atol=1e-5) and bool(counted >= 1)  # type: ignore[arg-type, operator]
        check(good, "bn_recalibrate", kind_of({name: layer}), "keep a cumulative mean where momentum is None, and count batches, "
              "as torch's do", "reset such layers yourself, and run forwards in training mode")


def kind_of(layers: dict[str, nn.Module]) -> str:
    """Names and classes of layers, for messages."""
    return f"layers {list(layers)[:3]} of class {type(next(iter(layers.values()))).__name__}, with a forward of their own"


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Forwards inside the block give what they would give, and leave every buffer of `model` as it was, bit for bit.

    Batch norm in training mode goes on using the batch's statistics and moves none of its own; other buffers, those of batch
    norms with a forward of their own included, are copied, and written back in place at the end, also where a forward put
    another tensor under the name; DDP broadcasts none. Flags and buffers are put back when the block raises as well.
    Parameters, modes and random numbers are not touched; buffers born inside the block stay. Numbers that a layer keeps in
    plain attributes, not in buffers, cannot be seen, and move: register them as buffers.

    Run backwards inside the block: writing a buffer back makes autograd refuse graphs that saved it.

    Cost: a walk over the modules, and memory for the copies: none for torch's batch norm in training mode.
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
    """`root.modules()` in some order, in a fifth of the time: steps walk."""
    found: list[Any] = [root]
    walked: set[nn.Module] = set()
    for module in found:  # it grows
        children = module._modules if module is not None else None
        if children and module not in walked:  # a module may stand in several places
            walked.add(module)
            found += children.values()
    once = dict.fromkeys(found)
    once.pop(None, None)
    return list(once)


def hold_statistics(module: nn.Module) -> list[Callable[[], None]]:
    """Keep one module's own buffers (not its children's) from moving; returns what to call, last first, to let go."""
    undo: list[Callable[[], None]] = []
    # Batch norm without the flag uses the batch as before and moves nothing; momentum = 0 would still count the batch. Instance
    # norm has the flag and moves its statistics without it; so may a subclass of batch norm with a forward of its own.
    still: tuple[str, ...] = ()
    if isinstance(module, _BatchNorm) and module.training and module.track_running_stats and has_torch_forward(module):
        module.track_running_stats, still = False, STATISTICS
        undo.append(functools.partial(setattr, module, "track_running_stats", True))
    if isinstance(module, DistributedDataParallel) and module.broadcast_buffers:
        module.broadcast_buffers = False  # else a forward brings the first rank's
        undo.append(functools.partial(setattr, module, "broadcast_buffers", True))
    for name, tensor in module._buffers.items():
        if tensor is not None and name not in still:
            undo.append(functools.partial(put_back, module, name, tensor, tensor.clone()))
    return undo


def has_buffers_of_its_own(model: nn.Module) -> bool:
    """Whether some buffer is none of the statistics that a flag of batch norms keeps from moving."""
    return any(value is not None and not (isinstance(m, _BatchNorm) and has_torch_forward(m) and name in STATISTICS)
               for m in every_module(model) for name, value in m._buffers.items())


def has_torch_forward(module: nn.Module) -> bool:
    """Whether torch's own forward moves a batch norm's statistics; a split layer counts as the class it was made from."""
    kind: Any = getattr(module, "original", type(module))
    return kind.forward in TORCH_FORWARDS and "forward" not in module.__dict__


def put_back(module: nn.Module, name: str, tensor: Tensor, kept: Tensor) -> None:
    """Make buffer `name` the tensor it was, with the values it had."""
    tensor.copy_(kept)
    module._buffers[name] = tensor
