"""Parameter groups by the field's usual rule."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeAlias

from torch import nn

from everbatch.engines.host import plain_name
from everbatch.errors import check_real

__all__ = ["groups", "grown_groups"]

Named: TypeAlias = tuple[str, nn.Parameter]


def groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two named groups: weights with decay, and vectors without.

    Parameters of fewer than two dimensions (biases, norm scales) get weight_decay 0, which layer-wise optimizers read as
    "no trust ratio" as well. Frozen parameters are left out; empty groups too.

    >>> from torch import nn
    >>> [(len(g["params"]), g["weight_decay"]) for g in groups(nn.Linear(3, 2), weight_decay=0.1)]
    [(1, 0.1), (1, 0.0)]
    """
    check_real("groups", "weight_decay", weight_decay, 0.0)
    return _by_dimensions([(n, p) for n, p in model.named_parameters() if p.requires_grad], weight_decay)


def grown_groups(
    named: Iterable[Named], born: Sequence[Collection[str]], weight_decay: float | None, *,
    ddp: bool = False,
) -> list[dict[str, Any]]:
    """A named group for each growth, or the two of `groups`: an engine that keeps one count of steps
    for a group must not count those of new parameters with those of old ones.

    Args:
        named: parameters by name; those of a module in DDP where `ddp` says so.
        born: names in the bare model, by growth; empty groups are left out.
        weight_decay: of the weights, with none on vectors; None: no group has one of its own.
    """
    home = {name: k for k, names in enumerate(born) for name in names}
    members: list[list[Named]] = [[] for _ in born]
    for name, p in named:
        members[home[plain_name(name, ddp=ddp)]].append((name, p))
    if weight_decay is None:
        return [{"params": pairs} for pairs in members if pairs]
    trained = [[pair for pair in pairs if pair[1].requires_grad] for pairs in members]
    return [group for pairs in trained for group in _by_dimensions(pairs, weight_decay)]


def _by_dimensions(named: list[Named], weight_decay: float) -> list[dict[str, Any]]:
    pairs = (([x for x in named if x[1].ndim > 1], weight_decay), ([x for x in named if x[1].ndim <= 1], 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in pairs if params]
