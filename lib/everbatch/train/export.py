"""The trained model as one safetensors file that others load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from everbatch import checkpoint
from everbatch.optim.hosts.base import plain_name
from everbatch.train.evaluate import mean_buffers
from everbatch.train.frozen import frozen_of

if TYPE_CHECKING:
    from everbatch.train.trainer import Trainer

__all__ = ["export", "whole_state"]


@torch.no_grad()
def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """The bare model's state dict on every rank: masters of trained parameters (fp32 also where the model computes in bf16),
    frozen parameters and persistent buffers (floating ones: their mean over ranks); what is tied under each of its names.
    Collective: one all-reduce per sharded tensor."""
    host, module = trainer.optimizer.host, trainer.module
    state = dict(host.gather(list(host.weights()), host.names)) | frozen_of(module)
    first = {id(p): plain_name(name) for name, p in module.named_parameters()}
    for name, p in module.named_parameters(remove_duplicate=False):
        if plain_name(name) not in state:
            state[plain_name(name)] = state[first[id(p)]].clone()
    passing = {f"{path}.{name}".lstrip(".") for path, part in module.named_modules(remove_duplicate=False)
               for name in part._non_persistent_buffers_set}
    with mean_buffers(module, trainer.world):
        state |= {plain_name(name): b.clone() for name, b in module.named_buffers(remove_duplicate=False) if name not in passing}
    return {name: value.detach().cpu() for name, value in state.items()}


def export(trainer: Trainer, path: str | Path) -> Path:
    """Write `whole_state` to one safetensors file, atomically, from rank 0. The names are those of the bare model, so timm and
    `load_state_dict` take it. To write averaged weights: `with opt.averaged(): ...`. Collective."""
    state = whole_state(trainer)
    if trainer.world.rank == 0:
        checkpoint.export_weights(path, state, {"step": str(trainer.step), "format": "pt"})
    trainer.world.barrier()
    return Path(path)

