"""Gradients that FSDP2 keeps beside `p.grad`: whole ones of backwards that did not reduce."""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import FSDPModule

__all__ = ["forget_unreduced", "unreduced"]


def unreduced(module: FSDPModule) -> list[Any]:
    """The parameters of one FSDP2 module that hold an unreduced gradient. torch has no public name for them."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch before 2.13
        groups = [g for g in (getattr(state, "_fsdp_param_group", None),) if g is not None]
    return [p for group in groups for p in group.fsdp_params if _holds(p)]


def forget_unreduced(module: FSDPModule) -> None:
    """Drop them, so that the next backward starts from zero."""
    for p in unreduced(module):
        p.unsharded_accumulated_grad = None
        p._unsharded_param.grad = None


def _holds(p: Any) -> bool:
    whole = getattr(p, "_unsharded_param", None)  # made by the first gather
    return whole is not None and (p.unsharded_accumulated_grad is not None or whole.grad is not None)
