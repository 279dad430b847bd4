"""The model as a function of whole weights, on every host: what importance is estimated on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from everbatch.engines.host import Host, plain_name, unwrap
from everbatch.errors import UnsupportedHost, check
from everbatch.nn.compiled import is_compiled
from everbatch.rows import Rows

__all__ = ["Call", "Factory", "Weights", "evaluating", "replica", "require_replica"]

Factory = Callable[[], nn.Module]
Weights = dict[str, Tensor]
Call = Callable[[Weights, Any], Tensor]
"""Maps weights by name and a batch of inputs, (n, ...) or several by name, to outputs such as logits (n, C), differentiably."""


def require_replica(host: Host, factory: Factory | None, who: str) -> None:
    """Raise `UnsupportedHost` unless the model can be called as a function of whole weights."""
    if host.module is None:
        raise UnsupportedHost(f"{who}: the optimizer was built without its module, and importance needs it; pass the module, not "
                              "its parameters")
    if factory is None and any(_is_partitioned(p) for p in host.module.parameters()):
        raise UnsupportedHost(f"{who}: on {host.title} the weights are sharded, so importance is estimated on a plain replica "
                              "with gathered weights, one per rank; pass factory=lambda: make_model(), or a deep copy taken "
                              "before sharding")


def _is_partitioned(p: Tensor) -> bool:
    return isinstance(p, DTensor) or hasattr(p, "ds_tensor")


def replica(host: Host, factory: Factory | None) -> tuple[Call, Weights, nn.Module]:
    """The model as a function of its trained weights, those weights whole, and the module that is
    called.

    The module's own weights where they are whole and in the masters' dtype; else the masters,
    gathered. Collective then.
    """
    assert host.module is not None
    own = unwrap(host.module)
    apart = any(_is_partitioned(p) for p in own.parameters())
    root = own
    if apart:
        assert factory is not None
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            root = factory().to(host.device)
        for hook in own._forward_hooks.values():
            if getattr(hook, "travels", False):
                root.register_forward_hook(hook)

    layout = host.master_layout()
    trained = {plain_name(name): p for name, p in own.named_parameters() if p.requires_grad}
    if apart or any(trained[name].dtype != layout[name][0] for name in host.names):
        weights = host.gather(list(host.weights()), host.names)
    else:
        weights = {name: trained[name].detach() for name in host.names}
    keys = {plain_name(name): name for name, _ in root.named_parameters()}
    missing = [name for name in weights if name not in keys]
    check(not missing, "importance", f"the factory's model lacks parameters {missing[:3]}", "be the same model")

    # What is not trained stays as it is, in the type that the weights are called in.
    dtype = next(iter(weights.values())).dtype
    fixed: Weights = {}
    for name, p in own.named_parameters():
        if not p.requires_grad:
            fixed[keys[plain_name(name)]] = _whole(p).to(dtype)
    places = {plain_name(name): name for name, _ in root.named_buffers()}
    for name, buffer in own.named_buffers():
        fixed[places[plain_name(name)]] = buffer.to(dtype) if buffer.is_floating_point() else buffer

    def call(w: Weights, x: Rows) -> Tensor:
        given = {keys[name]: t for name, t in w.items()}
        if isinstance(x, dict):
            return functional_call(root, {**given, **fixed}, (), x)  # type: ignore[no-any-return]
        return functional_call(root, {**given, **fixed}, (x,))  # type: ignore[no-any-return]

    return call, weights, root


def _whole(p: Any) -> Tensor:
    """A frozen parameter, whole. Collective where it is sharded."""
    if isinstance(p, DTensor):
        return p.full_tensor().detach()
    if hasattr(p, "ds_tensor"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([p]):
            return p.data.clone()  # type: ignore[no-any-return]
    return p.detach()  # type: ignore[no-any-return]


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every module's own mode after it. What was compiled for training runs as it is: each
    number of rows would be one more graph."""
    modes = [(m, m.training) for m in root.modules()]
    compiled = any(is_compiled(m) for m, _ in modes)
    root.eval()
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
