"""The batch norms of a model that another way of normalising can take the place of, and the weights of its norms."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from everbatch.errors import NoNormalizationLayers, NoSourceStatistics, check
from everbatch.nn.statistics import TORCH_FORWARDS

__all__ = ["Converted", "affine_of", "batch_norms", "finished", "put_back"]


class Converted(nn.Module):
    """A batch norm that normalises in another way now."""

    original: type[nn.Module]
    """The class that it had."""


NORMS = (_BatchNorm, Converted, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def batch_norms(model: nn.Module, exclude: Sequence[str], who: str) -> dict[str, _BatchNorm]:
    """The batch norms of `model` by name, all of which can be converted; those that match `exclude`, or are converted already,
    are left out.

    Raises:
        NoNormalizationLayers: there is none, converted or not.
        NoSourceStatistics: one without running statistics.
        ValueError: one without shape, split, or with a forward of its own.
    """
    result: dict[str, _BatchNorm] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, _BatchNorm) or any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
            continue
        lazy = isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params()
        kind = type(layer).__name__
        check(not lazy, who, f"{name!r}, a {kind} without shape,", "be initialised", "run one forward before")
        check(_known_forward(layer), who, f"{name!r}, a {kind} with a forward of its own,",
              "be torch's batch norm or timm's BatchNormAct",
              "undo split batch norms first (strip_split_bn), or exclude=['NAME']")
        known = layer.running_mean is not None and layer.running_var is not None
        check(known, who, f"{name!r}, a {kind} without running statistics,", "have the source's statistics",
              "build the model with track_running_stats=True, or exclude=['NAME']", error=NoSourceStatistics)
        result[name] = layer
    found = bool(result) or any(isinstance(layer, Converted) for layer in model.modules())
    check(found, who, f"a {type(model).__name__} without batch norms", "have one to convert",
          "layers that normalise each sample for itself, such as LayerNorm, have no statistics of a batch",
          error=NoNormalizationLayers)
    return result


def _known_forward(layer: _BatchNorm) -> bool:
    """Whether the layer is a plain batch norm, or timm's with drop and activation behind it."""
    if "forward" in layer.__dict__:
        return False
    forward: Any = type(layer).forward
    timms = forward.__module__ == "timm.layers.norm_act" and {"drop", "act"} <= set(layer._modules)
    return forward in TORCH_FORWARDS or timms


def finished(layer: Converted, result: Tensor) -> Tensor:
    """What the original class does after normalising: timm's BatchNormAct drops and activates."""
    for name in ("drop", "act"):
        if name in layer._modules:
            result = layer._modules[name](result)  # type: ignore[misc]
    return result


def put_back(layer: Converted, added: Iterable[str]) -> None:
    """Make a layer its original class again, without these attributes."""
    original: Any = layer.original
    for name in added:
        layer.__dict__.pop(name, None)
    layer.__class__ = original


def affine_of(model: nn.Module, who: str) -> set[str]:
    """Names of the scales and shifts of the norms of `model`: batch norms, converted or not, layer, group, instance and RMS
    norms.

    Raises:
        NoNormalizationLayers: there is none.
    """
    own = {id(p) for part in model.modules() if isinstance(part, NORMS) for p in part.parameters(recurse=False)}
    found = {name for name, p in model.named_parameters() if id(p) in own}
    check(bool(found), who, f"a {type(model).__name__} without scales and shifts of norms", "have some to train",
          "normalise with affine=True, or use a method that trains all weights", error=NoNormalizationLayers)
    return found
