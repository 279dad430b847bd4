"""The inputs that layers see: forward passes over the whole model on every host, and what is asked of each layer's rows."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from everbatch.distributed import World
from everbatch.engines.host import Host, plain_name, unwrap
from everbatch.errors import check, nearest
from everbatch.optim.memory.replica import Factory, evaluating, replica, require_replica
from everbatch.optim.subspace.splits import NonFiniteStatistics
from everbatch.rows import Rows as Inputs
from everbatch.rows import count_of, each

__all__ = ["Rows", "See", "chosen", "linear_weights", "visit"]

Rows = tuple[Any, ...]
"""(inputs, ...): inputs as the model takes them, one tensor or several by name. Of those with names, "attention_mask" says
which tokens are no padding."""
See = Callable[[str, Tensor, Tensor], None]
"""Is given a weight's name, the tokens (n, d) that its layer multiplies in one pass, and the weight."""


def chosen(who: str, names: Iterable[str], option: str, patterns: Sequence[str]) -> list[str]:
    """The names that some pattern matches, `*` as in a shell, in their order.

    Raises:
        ValueError: a pattern that matches none.
    """
    known = list(names)
    found: set[str] = set()
    for pattern in patterns:
        here = fnmatch.filter(known, pattern)
        check(bool(here), who, f"{option} has {pattern!r}", "match a trained matrix", nearest(pattern, known))
        found.update(here)
    return [name for name in known if name in found]


def linear_weights(host: Host, names: Sequence[str]) -> list[str]:
    """Of these weights those of linear layers: they multiply the last dimension of what the layer is given."""
    assert host.module is not None
    modules = {plain_name(name): module for name, module in unwrap(host.module).named_modules()}
    owners = {name: name.removesuffix(".weight") for name in names}
    return [name for name, owner in owners.items() if owner != name and isinstance(modules.get(owner), nn.Linear)]


@torch.no_grad()
def visit(host: Host, names: Sequence[str], batches: Iterable[Rows], factory: Factory | None, who: str, see: See) -> None:
    """Run the model in evaluation mode over this rank's rows, and show the inputs of every named layer. Collective.

    Args:
        names: weights of modules whose first argument is what they multiply, (..., d).
        batches: this rank's rows; ranks may hold different numbers of them.
        factory: builds the bare model, needed where weights are sharded (see `require_replica`).

    Raises:
        ValueError: on every rank: no rows at all, or inputs that do not fit on some rank.
        NonFiniteStatistics: on every rank: `see` raised it on some rank.
    """
    host.publish_if_dirty()
    require_replica(host, factory, who)
    call, weights, root = replica(host, factory)
    modules = {plain_name(name): module for name, module in root.named_modules()}
    dtype, padding = next(iter(weights.values())).dtype, dict[str, Tensor]()

    def watch(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            see(name, _tokens(given[0], weights[name], padding.get("mask")), weights[name])

        return modules[name.rpartition(".")[0]].register_forward_pre_hook(hook)

    def to_host(value: Tensor) -> Tensor:
        return value.to(host.device, dtype if value.is_floating_point() else None)

    seen, problem, infinite = 0, "", False
    hooks = [watch(name) for name in names]
    try:
        with evaluating(root):
            for rows in batches:
                inputs: Inputs = each(to_host, rows[0])
                count = count_of(inputs)
                padding.clear()
                if isinstance(inputs, dict) and "attention_mask" in inputs:
                    padding["mask"] = inputs["attention_mask"].bool()
                if count:
                    seen += count
                    call(weights, inputs)
    except (ValueError, NonFiniteStatistics) as error:  # one rank's bad row must not leave the others waiting
        problem, infinite = str(error), isinstance(error, NonFiniteStatistics)
    finally:
        for hook in hooks:
            hook.remove()
    mine = seen, problem, infinite
    told: list[Any] = World.current().gather(mine) if host.title != "plain" else [mine]
    for _, text, kind in told:
        if text:
            raise NonFiniteStatistics(text) if kind else ValueError(text)
    check(any(count for count, _, _ in told), who, "no rows on any rank", "be given the task's data")


def _tokens(x: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """(n, d) of inputs (..., d), without padding."""
    width = weight.shape[1:].numel()
    check(x.shape[-1] == width, "visit", f"inputs of shape {tuple(x.shape)} for a weight of width {width}", f"end in {width}")
    x = x.detach()
    if mask is not None and mask.shape == x.shape[:-1]:
        return x[mask]
    return x.reshape(-1, width)
