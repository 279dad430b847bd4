"""What a file says of converted batch norms, and a network with such layers made again from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from everbatch.errors import check
from everbatch.nn.batch_adapted import BatchAdapted
from everbatch.nn.unmix import UnMixTNS
from everbatch.nn.unmix_convert import made_unmix

__all__ = ["converted_again", "norm_settings"]

UNMIX = ("step", "temperature", "spread", "synchronised", "by_batch", "total_variance", "mode")
BATCH = ("alpha", "prior", "synchronised")


def norm_settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Of each converted batch norm of `model`, by name: its kind and its settings, as JSON has them. Components are buffers."""
    found: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, UnMixTNS):
            own = {key: getattr(layer, key) for key in UNMIX}
            found[name] = {"kind": "unmix_tns", "num_components": len(layer.component_means), **own}
        elif isinstance(layer, BatchAdapted):
            found[name] = {"kind": "batch_adapted", **{key: getattr(layer, key) for key in BATCH}}
    return found


def converted_again(model: nn.Module, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Convert the batch norms of a network as `norm_settings` says, in place; a state dict brings the components.

    Raises:
        ValueError: a name that is no batch norm of the network, or a kind that is unknown.
    """
    for name, told in settings.items():
        layer: Any = dict(model.named_modules()).get(name)
        rest = {key: value for key, value in told.items() if key not in ("kind", "num_components")}
        good = isinstance(layer, _BatchNorm) and told.get("kind") in ("unmix_tns", "batch_adapted")
        check(good, "normalisation", f"{name!r}, a {type(layer).__name__}, to become {told.get('kind')!r}",
              "be a batch norm, and an UnMix-TNS layer or one adapted by the batch")
        if told["kind"] == "unmix_tns":
            by_batch = None if rest["by_batch"] is None else tuple(rest["by_batch"])
            made_unmix(layer, torch.zeros(told["num_components"], layer.num_features), {**rest, "by_batch": by_batch})
        else:
            original, layer.__class__ = type(layer), BatchAdapted
            for key, value in {"original": original, **rest}.items():
                setattr(layer, key, value)
