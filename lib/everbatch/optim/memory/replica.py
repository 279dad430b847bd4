"""The model as a function of whole weights, on every host: what importance is estimated on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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

    # What is not trained stays as it is; where masters stand in for weights of fewer bits, what had those bits follows them.
    more = {trained[name].dtype: weights[name].dtype for name in weights}
    fixed: Weights = {}
    for name, p in own.named_parameters():
        if not p.requires_grad:
            fixed[keys[plain_name(name)]] = _whole(p).to(more.get(p.dtype, p.dtype))
    places = {plain_name(name): name for name, _ in root.named_buffers()}
    for name, buffer in own.named_buffers():
        fixed[places[plain_name(name)]] = buffer.to(more.get(buffer.dtype, buffer.dtype))

    def call(w: Weights, x: Rows) -> Tensor:
        given = {keys[name]: t for name, t in w.items()}
        if isinstance(x, dict):
            return _logits(functional_call(root, {**given, **fixed}, (), x))
        return _logits(functional_call(root, {**given, **fixed}, (x,)))

    return call, weights, root


def _logits(result: Any) -> Tensor:
    """The tensor that a model returns, or has under the name that many give it."""
    if isinstance(result, Tensor):
        return result
    found = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    check(isinstance(found, Tensor), "importance", f"a model that returns a {type(result).__name__}", "return a tensor, or have "
          "it under the name logits", "wrap the model, or name its output to the Trainer: output=")
    return found  # type: ignore[return-value]


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
