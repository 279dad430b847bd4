"""Experts put into the linear layers of a network, taken out again, and written into its weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from everbatch import seeds
from everbatch.errors import check, nearest
from everbatch.nn.experts import ADDED, MoELoRALinear, Routing, check_options

__all__ = ["UnknownTarget", "attach_experts", "detach_experts", "expert_layers", "experts_made_of", "merge_experts"]


class UnknownTarget(ValueError):
    """A pattern that no layer of the network fits, or that fits one of a kind that cannot be changed."""


def attach_experts(
    model: nn.Module, layers: Sequence[str] = ("*.mlp.fc1",), *, num_experts: int = 4, rank: int = 4,
    alpha: float | None = None, top_k: int | None = None, routing: Routing = "token", seed: int = 0,
) -> list[str]:
    """Make linear layers of `model` a `MoELoRALinear`, in place; see there for the equations and options.

    Layers change their class and keep their identity, hooks, names, weight and bias: a state dict of the network without experts
    loads (strict=False). `detach_experts` undoes it. Which parameters are trained is left as it is, but for weight and bias of
    these layers, which are frozen.

    Args:
        model: any network; of timm's vision transformers "*.mlp.fc1", of Hugging Face's decoders "*.mlp.up_proj".
        layers: patterns of names, as `fnmatch` has them.
        seed: of what is drawn, with a layer's name: the same on every rank.

    Returns:
        Names of the layers, in the network's order.

    Raises:
        UnknownTarget: a pattern that fits no linear layer, with the nearest names; nothing is changed then.
        ValueError: options out of range; layers that have experts already, or share a weight.

    Cost: E rank (d + o) + E d numbers per layer.
    """
    who = "attach_experts"
    check(not isinstance(layers, str) and len(layers) > 0, who, f"layers={layers!r}", "be patterns of names, at least one")
    check_options(num_experts, rank, alpha, top_k, routing)
    found = _targets(model, layers, who)
    for name, layer in found.items():
        width = layer.in_features
        check(rank <= width, who, f"rank={rank} in {name!r}", f"be at most the width of its inputs, {width}")
    for name, layer in found.items():
        generator = seeds.generator(seed, "experts", name)
        MoELoRALinear.equip(layer, num_experts, rank, alpha, top_k, routing, generator)
        layer.__class__ = MoELoRALinear
        layer.requires_grad_(False)
        for added in layer.names:  # type: ignore[union-attr]
            layer.get_parameter(added).requires_grad_()
    return list(found)


def detach_experts(model: nn.Module) -> list[str]:
    """Undo `attach_experts`, in place: the layers as they were before. Weight and bias stay frozen.

    Returns:
        Names of the layers.
    """
    layers = expert_layers(model)
    for layer in layers.values():
        for added in layer.names:
            delattr(layer, added)
        original = layer.original
        for kept in ADDED:
            layer.__dict__.pop(kept, None)
        layer.__class__ = original  # type: ignore[assignment]
    return list(layers)


@torch.no_grad()
def merge_experts(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> list[str]:
    """Write the experts into the layers' own weights and take them out, in place:  W <- W + s sum_i w_i B_i A_i.

    A layer of one expert computes what it did, to rounding. One of several depends on its inputs through the router, which no
    matrix can, so its weights have to be fixed: w that holds for all inputs, such as the load of the experts or a single one.

    Args:
        weights: by name of a layer, (E,) each; needed for layers of more than one expert.

    Returns:
        Names of the layers.

    Raises:
        ValueError: a layer of several experts without weights, or weights of another number. Nothing is changed then.
    """
    layers, given = expert_layers(model), dict(weights or {})
    for name, layer in layers.items():
        if layer.num_experts == 1:
            given.setdefault(name, torch.ones(1))
        check(name in given, "merge_experts", f"{name!r} of {layer.num_experts} experts", "be given fixed weights (E,): what its "
              "router makes of an input is no matrix", "pass weights={name: ...}, or keep the experts")
        check(given[name].shape == (layer.num_experts,), "merge_experts", f"weights of {name!r} of shape "
              f"{tuple(given[name].shape)}", f"be ({layer.num_experts},)")
    for name, layer in layers.items():
        share = given[name].to(layer.weight)
        pairs = [(layer.get_parameter(f"up_{i}"), layer.get_parameter(f"down_{i}")) for i in range(layer.num_experts)]
        if layer.routing == "batch":  # its products go across experts
            up, down = (sum(w * p for w, p in zip(share, side, strict=True)) for side in zip(*pairs, strict=True))
            layer.weight += layer.scaling * (up @ down)
            continue
        for w, (up, down) in zip(share, pairs, strict=True):
            layer.weight += layer.scaling * w * (up @ down)
    return detach_experts(model)


def expert_layers(model: nn.Module) -> dict[str, MoELoRALinear]:
    """The layers with experts of a model by their names."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, MoELoRALinear)}


def experts_made_of(layer: MoELoRALinear) -> dict[str, Any]:
    """Plain arguments that put experts like these into a layer."""
    return {"num_experts": layer.num_experts, "rank": layer.rank, "alpha": layer.scaling * layer.num_experts * layer.rank,
            "top_k": layer.top_k, "routing": layer.routing}


def _targets(model: nn.Module, patterns: Sequence[str], who: str) -> dict[str, nn.Linear]:
    """Layers by name, all of which can be changed."""
    every = dict(model.named_modules())
    linear = [name for name, layer in every.items() if isinstance(layer, nn.Linear)]
    result: dict[str, nn.Linear] = {}
    for pattern in patterns:
        fitting = [name for name in every if fnmatch.fnmatchcase(name, pattern)]
        if not any(name in linear for name in fitting):
            other = f" but {fitting[0]!r}, a {type(every[fitting[0]]).__name__}," if fitting else ""
            raise UnknownTarget(f"{who}: layers={list(patterns)!r}: {pattern!r} fits nothing{other} in a "
                                f"{type(model).__name__}, must fit linear layers; {nearest(pattern, linear)}")
        result |= {name: every[name] for name in fitting if name in linear}
    for name, layer in result.items():
        kind = type(layer)
        check(not isinstance(layer, MoELoRALinear), who, f"{name!r} with experts", "be without", "detach_experts first")
        if kind is not nn.Linear:  # 4-bit ones, those of nn.MultiheadAttention whose forward nobody calls
            raise UnknownTarget(f"{who}: {name!r} is a {kind.__name__}, must be torch.nn.Linear itself")
    owners: dict[int, list[str]] = {}
    for name, layer in every.items():
        for parameter in layer.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name, layer in result.items():
        sharing = owners[id(layer.weight)]
        check(len(sharing) == 1, who, f"the weight of {name!r}, which {sharing[-1]!r} has too,", "be its own")
    return {name: result[name] for name in every if name in result}
