"""Where shrink and perturb puts each weight: which parameters it changes, and by which map."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from everbatch import seeds
from everbatch.engines.host import Host
from everbatch.engines.shards import Shard
from everbatch.errors import check, nearest
from everbatch.optim.restart.fresh import normalisers, without_initialiser
from everbatch.optim.restart.options import Options

__all__ = ["chosen", "images", "mix"]

Map = Callable[[Tensor], Tensor]


def mix(old: Tensor, noise: Tensor | None, shrink: float, scale: float) -> Tensor:
    """shrink * old + scale * noise, a new tensor shaped like `old`; a factor of one or a scale of
    zero leaves every bit.

    Args:
        old: any shape, floating point.
        noise: as many elements, any shape; None where scale is 0.
    """
    new = old.clone() if shrink == 1.0 else old * shrink
    if scale and noise is not None:  # adding zero would turn -0.0 into 0.0
        new.add_(noise.to(new).view(new.shape), alpha=scale)
    return new


def chosen(options: Options, host: Host) -> dict[str, bool]:
    """Parameters that a call changes: name to whether it is set as new rather than mixed."""
    shapes = {n: tuple(shape) for n, (dtype, shape) in host.master_layout().items() if dtype.is_floating_point}
    names = _named(options.tensors, shapes)
    if options.norm_params == "reference" or host.module is None:
        return dict.fromkeys(names, False)
    norms = normalisers(host.module)
    if options.norm_params == "skip":
        return {name: False for name in names if name not in norms}

    # As new: without a factory only what a convention or `reset_parameters` gives.
    if options.factory is None:
        bare = {name for found in without_initialiser(host.module).values() for name in found}
        special = [name for name in names if norms.get(name, "weight") not in ("weight", "bias")]
        odd = [name for name in special if options.noise == "gaussian" or name in bare]
        check(not odd, "ShrinkPerturb", f"norm_params='reset' with {odd[:3]}", "know their fresh values", "pass factory=")
    return {name: name in norms for name in names}


def _named(which: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The parameters that `tensors` names."""
    if which == "all":
        return list(shapes)
    if which == "weights":
        return [name for name, shape in shapes.items() if len(shape) >= 2]
    if callable(which):
        return [name for name, shape in shapes.items() if which(name, shape)]
    for pattern in which:
        check(any(fnmatch.fnmatchcase(name, pattern) for name in shapes), "ShrinkPerturb", f"tensors has {pattern!r}",
              "fit the name of a trained parameter", nearest(pattern, shapes))
    return [name for name in shapes if any(fnmatch.fnmatchcase(name, pattern) for pattern in which)]


def images(
    options: Options, host: Host, names: Mapping[str, bool], fresh: Mapping[str, Tensor], key: tuple[int | str, ...],
) -> dict[str, Map]:
    """The map of each owned slice, by name; touches nothing.

    Args:
        names: what `chosen` gave.
        fresh: a fresh initialisation, whole, by name; empty where none is wanted.
        key: of white noise, before the parameter's name.
    """
    norms = normalisers(host.module) if host.module is not None else {}
    redrawn = options.noise == "fresh_init" and options.factory is None and host.module is not None
    bare: set[str] = set()
    if redrawn and host.module is not None:
        bare = {name for found in without_initialiser(host.module).values() for name in found}
    result: dict[str, Map] = {}
    for shard in host.shards:
        name = shard.name
        if name not in names:
            continue
        new = _slice(fresh[name], shard) if name in fresh else None
        if names[name]:
            if new is None:  # white noise without a factory: torch's convention
                new = torch.full((shard.numel,), 1.0 if norms[name] == "weight" else 0.0)
            result[name] = _set_as(new)
            continue
        scale = (options.fallback_sigma or 0.0) if name in bare else options.scale
        if scale and (options.noise == "gaussian" or new is None):
            new = seeds.normal((*key, name), shard.start, shard.numel)
        result[name] = _mixed_with(new, options.shrink, scale)
    return result


def _slice(whole: Tensor, shard: Shard) -> Tensor:
    return whole.reshape(-1)[shard.start : shard.start + shard.numel].clone()


def _set_as(values: Tensor) -> Map:
    return lambda old: values.to(old).view(old.shape)


def _mixed_with(noise: Tensor | None, shrink: float, scale: float) -> Map:
    return lambda old: mix(old, noise, shrink, scale)
