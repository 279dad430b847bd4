"""Whether two networks of the same weights also compute the same: their layers, one by one."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm

from everbatch.engines.host import plain_name

__all__ = ["unlike"]

OURS = "everbatch."
"""Modules of this library are put into a network by what the file says of them."""
IDLE = {
    "training", "num_classes", "momentum", "inplace", "fused_attn", "grad_checkpointing", "strict_img_size", "distilled_training"}
"""Settings that change no prediction; so do those with one of these in their names:"""
IDLE_PARTS = ("drop", "init")


def unlike(model: nn.Module, other: nn.Module) -> str:
    """What shows that they predict otherwise, in words; "" where nothing does: kinds of layers and their settings, numbers and
    texts that weights do not show, such as heads of an attention. What acts in training alone may differ."""
    one, two = _layers(model), _layers(other)
    own = [name for layers in (one, two) for name, layer in layers.items() if type(layer).__module__.startswith(OURS)]
    for name in sorted(one.keys() | two.keys()):
        layer, wanted = one.get(name), two.get(name)
        if any(name == part or name.startswith(f"{part}.") for part in own) or (_idle(layer) and _idle(wanted)):
            continue
        # Synchronised or not: torch's own are the same when they predict, and others may do more.
        norms = all(isinstance(one, _BatchNorm) and _kind(one).__module__ == _BatchNorm.__module__ for one in (layer, wanted))
        if _kind(layer) is not _kind(wanted) and not norms:
            return f"{name or 'the model'} is {_said(layer)}, there {_said(wanted)}"
        ours, theirs = _settings(layer), _settings(wanted)
        for setting in sorted(ours.keys() & theirs.keys()):
            if ours[setting] != theirs[setting]:
                return f"{name or 'the model'} has {setting}={ours[setting]!r}, there {theirs[setting]!r}"
    return ""


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {plain_name(name): layer for name, layer in model.named_modules()}  # what is wrapped comes after its wrapper


def _kind(layer: nn.Module | None) -> type:
    """The class as it was before `fully_shard`."""
    return next(kind for kind in type(layer).__mro__ if not issubclass(kind, FSDPModule))


def _said(layer: nn.Module | None) -> str:
    return "missing" if layer is None else _kind(layer).__name__


def _idle(layer: nn.Module | None) -> bool:
    """Whether it gives its input in evaluation mode."""
    return layer is None or isinstance(layer, nn.Identity) or "Drop" in type(layer).__name__


def _settings(layer: nn.Module | None) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if _plain(value) and name not in IDLE and name[0] != "_"
            and not any(part in name for part in IDLE_PARTS)}


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float, str)) or (isinstance(value, tuple) and all(map(_plain, value)))
