"""Parameters that are not trained, whole, on every engine: no optimizer knows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from everbatch.checkpoint import Checkpoint
from everbatch.engines.host import plain_name
from everbatch.errors import CheckpointMismatch

__all__ = ["frozen_as_in", "frozen_of", "set_frozen"]


@contextmanager
def frozen_as_in(kept: Checkpoint, module: nn.Module, *, change: bool) -> Iterator[None]:
    """Inside the block, and after it, what was frozen when `kept` was saved is frozen, and what was trained is trained.

    Args:
        change: freeze and unfreeze parameters that the checkpoint names; False where an engine settled that when it was built.

    Raises:
        CheckpointMismatch: other frozen parameters or shapes than in the checkpoint, unless it has none at all. What is frozen is
            as before then, and so it is if the block raises this.
    """
    saved = {n.removeprefix("frozen/"): tuple(kept.shape(n)) for n in kept.names() if n.startswith("frozen/")}
    trained = {n.removeprefix("master/") for n in kept.names() if n.startswith("master/")}
    named = [(plain_name(name), p) for name, p in module.named_parameters()]
    before = [p.requires_grad for _, p in named]
    try:
        for name, p in named if change else ():
            p.requires_grad_(name in trained or (p.requires_grad and name not in saved))
        ours = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named if not p.requires_grad}
        odd = [n for n in sorted({**ours, **saved}) if ours.get(n) != saved.get(n)] if saved else []
        if odd:
            raise CheckpointMismatch(f"checkpoint {kept.path}: frozen parameters {odd[:5]} have shapes "
                                     f"{[saved.get(n) for n in odd[:5]]} there and {[ours.get(n) for n in odd[:5]]} in the model "
                                     "(None: not frozen); freeze the same part of the same model, or use another folder")
        yield
    except CheckpointMismatch:
        for (_, p), flag in zip(named, before, strict=True):
            p.requires_grad_(flag)
        raise


@torch.no_grad()
def frozen_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all frozen parameters by bare name. Collective where the engine shards them: one gather each."""
    return {plain_name(name): _whole(p) for name, p in module.named_parameters() if not p.requires_grad}


@torch.no_grad()
def set_frozen(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put `frozen_of` back; names that are not in `values` stay. Collective where the engine shards them."""
    for name, p in module.named_parameters():
        value = None if p.requires_grad else values.get(plain_name(name))
        if value is None:
            continue
        if hasattr(p, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                p.data.copy_(value)
        elif isinstance(p, DTensor):
            p.to_local().copy_(distribute_tensor(value.to(p.device), p.device_mesh, p.placements).to_local())
        else:
            p.data.copy_(value)


def _whole(p: Tensor) -> Tensor:
    if hasattr(p, "ds_id"):  # ZeRO-3 shards frozen parameters too
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.data.clone()
    return p.full_tensor() if isinstance(p, DTensor) else p.data.clone()
