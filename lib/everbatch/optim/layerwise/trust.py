"""What the layer-wise optimizers share: norms of whole tensors in one collective, and rewritten parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from everbatch.contract import base_of, parts_of
from everbatch.engines.host import Host
from everbatch.engines.shards import Vector
from everbatch.errors import CompositionError, check

if TYPE_CHECKING:
    from everbatch.optim.mixin import OptimizerMixin

__all__ = ["adapted_names", "check_groups", "log_ratios", "norms", "require_place", "rewritten", "trust_ratios"]


def require_place(opt: OptimizerMixin, part: type, base: type) -> None:
    """Refuse a composed class whose base is not `base`, or in which another part wraps the update inside `part`: it
    would see the rewritten gradient and options, or no displacement.

    Raises:
        CompositionError: naming the part, what it stands on or left of, and the corrected class line.
    """
    names = [p.__name__ for p in parts_of(type(opt)) if p is not part]
    inside = [p.__name__ for p in parts_of(type(opt))[parts_of(type(opt)).index(part) + 1 :] if "update" in vars(p)]
    who, needed = type(opt).__name__, f"torch.optim.{base.__name__}"
    line = f"write class {who}({', '.join([*names, part.__name__, needed])}): ..."
    here = base_of(type(opt))
    if here is None or not issubclass(here, base):
        got = here.__name__ if here is not None else "nothing"
        raise CompositionError(f"{who}: {part.__name__} stands on {got}, must stand on {needed}, whose update it "
                               f"completes; {line}")
    if inside:
        raise CompositionError(f"{who}: {inside[0]} wraps the update and stands to the right of {part.__name__}, must "
                               f"stand to its left; {line}")


def check_groups(opt: OptimizerMixin, part: type, *, always_adapt: bool) -> None:
    """Refuse groups in which no tensor would get a ratio: at a layer-wise learning rate that is another method.

    Raises:
        ValueError: weight_decay 0 in every group without `always_adapt`.
    """
    check(bool(adapted_names(opt.host, always_adapt=always_adapt)), part.__name__,
          "weight_decay=0 in every group, which leaves every tensor without a trust ratio", "be > 0 in one group",
          "pass everbatch.optim.groups(model, weight_decay=...), or always_adapt=True")


def adapted_names(host: Host, *, always_adapt: bool) -> dict[int, list[str]]:
    """Names of the parameters that get a trust ratio, by index of their group; the same on every rank.

    Those are the groups with weight decay, or all of them with `always_adapt`.
    """
    groups = enumerate(host.groups())
    chosen: dict[int, list[str]] = {i: [] for i, g in groups if always_adapt or g["weight_decay"] != 0}
    for name, i in host.group_index().items():
        if i in chosen:
            chosen[i].append(name)
    return {i: names for i, names in chosen.items() if names}


def norms(host: Host, names: Sequence[str], *vectors: Vector) -> Tensor:
    """Euclidean norms of whole parameters, of several vectors: (vectors, names) float64, the same on every rank.

    Args:
        names: which parameters, in the order of the result; the same on every rank.
        vectors: slices of a parameter that no rank holds count as zero; slices of other parameters do not count.

    Cost: one all-reduce of vectors x names numbers where weights are sharded, none elsewhere; no host sync. Squares are
    summed in fp32 at least inside a slice, and in float64 across ranks.
    """
    zero = torch.zeros((), dtype=torch.float64, device=host.device)
    rows: list[Tensor] = []
    for vector in vectors:
        found = dict(zip((s.name for s in vector.shards), _squares(vector), strict=True))
        rows += [found.get(name, zero) for name in names]
    return host.total(torch.stack(rows)).sqrt().view(len(vectors), len(names))


def _squares(vector: Vector) -> tuple[Tensor, ...]:
    if not vector.tensors:
        return ()
    wide = torch.float64 if any(t.dtype == torch.float64 for t in vector.tensors) else torch.float32
    local = torch.stack(list(torch._foreach_norm(vector.tensors, 2, dtype=wide)))
    return local.to(vector.host.device, torch.float64).square().unbind()


def trust_ratios(
    host: Host, adapted: Mapping[int, Sequence[str]], weights: Vector, other: Vector,
    rule: Callable[[dict[str, Any], Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Trust ratio of each adapted parameter, 0-dim float64 by name. One collective for all, where weights are sharded.

    Args:
        adapted: what `adapted_names` gave.
        weights, other: slices of the adapted parameters whose norms are compared.
        rule: ratios from a group, and the norms (of the group's parameters) of weights and of the other.
    """
    names = [name for part in adapted.values() for name in part]
    if not names:
        return {}
    lengths, begin, found = norms(host, names, weights, other), 0, []
    for i, part in adapted.items():
        found.append(rule(host.groups()[i], *lengths[:, begin : begin + len(part)]))
        begin += len(part)
    return dict(zip(names, torch.cat(found).unbind(), strict=True))


def log_ratios(opt: OptimizerMixin, ratios: Mapping[str, Tensor]) -> None:
    """Log the smallest and the largest ratio as `trust_ratio_min` and `trust_ratio_max`."""
    if ratios:
        opt.metrics["trust_ratio_min"], opt.metrics["trust_ratio_max"] = torch.stack(list(ratios.values())).aminmax()


@contextmanager
def rewritten(opt: OptimizerMixin, options: Mapping[int, Mapping[str, Any]]) -> Iterator[None]:
    """Inside the block the base's own step sees other options in its groups; they are put back, also when it raises.

    On DeepSpeed they are rewritten around the inner optimizer's step alone, through torch's step hooks: the engine
    steps its scheduler inside the same call, and must meet the true learning rate.

    Args:
        options: by index of the group, what to write over.
    """
    groups = [(opt.host.groups()[i], dict(new)) for i, new in options.items()]
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def put(*_: object) -> None:
        back()
        kept.extend((group, {name: group[name] for name in new}) for group, new in groups)
        for group, new in groups:
            group.update(new)

    def back(*_: object) -> None:
        while kept:
            group, old = kept.pop()
            group.update(old)

    inner = getattr(opt.host, "inner", None)
    hooks = []
    if inner is None:
        put()
    else:
        hooks = [inner.register_step_pre_hook(put), inner.register_step_post_hook(back)]
    try:
        yield
    finally:
        back()
        for hook in hooks:
            hook.remove()
