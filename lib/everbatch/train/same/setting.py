"""What SAME needs around it: experts in the network, and the projection in the optimizer."""

from __future__ import annotations

import fnmatch
import functools
from typing import Any

from torch import nn

from everbatch.contract import base_of, parts_of, route, sort_parts
from everbatch.engines.engine_modes import refuse_moe
from everbatch.errors import check, nearest
from everbatch.nn.experts import MoELoRALinear
from everbatch.nn.experts_attach import UnknownTarget, attach_experts, expert_layers
from everbatch.optim.subspace.projection import SubspaceProjection
from everbatch.train.same.options import SAMEOptions

__all__ = ["projecting", "with_experts"]


def projecting(optimizer: functools.partial[Any], space: str) -> functools.partial[Any]:
    """The optimizer's class with `SubspaceProjection` among its parts, in a legal place, in this space.

    Raises:
        ValueError: it has one in another space; a class with verbs of its own, which cannot be put together anew.
    """
    cls: Any = optimizer.func
    if SubspaceProjection in parts_of(cls):
        given = route(cls, dict(optimizer.keywords))[0][SubspaceProjection].get("space", "grad")
        check(given == space, "SAME", f"space={space!r} and SubspaceProjection in space={given!r}", "be the same",
              "leave SubspaceProjection out of the optimizer: SAME adds it")
        return optimizer
    own = [verb for verb in cls.verbs if verb in vars(cls)]
    check(not own, "SAME", f"{cls.__name__}, which defines {', '.join(own)} itself", "list SubspaceProjection among its parts",
          f"with space={space!r}")
    base = base_of(cls)
    assert base is not None
    parts = sort_parts((*parts_of(cls), SubspaceProjection))
    made = type(f"{cls.__name__}", (*parts, base), {"__module__": cls.__module__})
    return functools.partial(made, **optimizer.keywords, subspaceprojection_space=space)


def with_experts(model: nn.Module, config: SAMEOptions, seed: int) -> dict[str, MoELoRALinear]:
    """Put experts into `model`, and freeze all that is not to be trained. Returns the layers by name.

    Raises:
        UnknownTarget: a pattern of `layers` or `trained` that fits nothing.
        UnsupportedHost: layers of DeepSpeed's own mixture of experts, by name.
    """
    refuse_moe("SAME", model)
    attach_experts(model, config.layers, num_experts=config.experts, rank=config.rank, alpha=config.alpha, top_k=config.top_k,
                   routing="batch" if config.released else config.routing, seed=seed)
    layers = expert_layers(model)
    learning = {f"{path}.{name}" for path, layer in layers.items() for name in layer.names}
    every = [name for name, _ in model.named_parameters()]
    for pattern in config.trained:
        fitting = fnmatch.filter(every, pattern)
        if not fitting:
            others = [name for name in every if name not in learning]
            raise UnknownTarget(f"SAME: trained={list(config.trained)!r}: {pattern!r} fits no parameter of a "
                                f"{type(model).__name__}; {nearest(pattern, others)}")
        learning |= set(fitting)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
    return layers
