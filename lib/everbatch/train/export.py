"""The trained model as one safetensors file that others load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from everbatch import checkpoint
from everbatch.optim.hosts.base import plain_name
from everbatch.train.evaluate import mean_buffers

if TYPE_CHECKING:
    from everbatch.train.trainer import Trainer

__all__ = ["export", "whole_state"]


@torch.no_grad()
def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """The bare model's state dict on every rank: masters of trained parameters (fp32 also where the model computes in bf16),
    frozen parameters and buffers (floating ones: their mean over ranks). Collective: one all-reduce per sharded tensor."""
    host = trainer.optimizer.host
    state = dict(host.gather(list(host.weights()), host.names))
    for name, p in trainer.module.named_parameters():
        if not p.requires_grad:
            state[plain_name(name)] = _frozen(p)
    with mean_buffers(trainer.module, trainer.world):
        state |= {plain_name(name): buffer.clone() for name, buffer in trainer.module.named_buffers()}
    return {name: value.detach().cpu() for name, value in state.items()}


def export(trainer: Trainer, path: str | Path) -> Path:
    """Write `whole_state` to one safetensors file, atomically, from rank 0. The names are those of the bare model, so timm and
    `load_state_dict` take it. To write averaged weights: `with opt.averaged(): ...`. Collective."""
    state = whole_state(trainer)
    if trainer.world.rank == 0:
        checkpoint.export_weights(path, state, {"step": str(trainer.step), "format": "pt"})
    trainer.world.barrier()
    return Path(path)


def _frozen(p: Tensor) -> Tensor:
    if hasattr(p, "ds_id"):  # ZeRO-3 shards frozen parameters too
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.data.clone()
    full = getattr(p, "full_tensor", None)
    return full() if full is not None else p.data.clone()
