"""Parameters that are not trained, whole, on every engine: no optimizer knows them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from everbatch.optim.hosts.base import plain_name

__all__ = ["frozen_of", "set_frozen"]


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
