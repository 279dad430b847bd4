"""Whether a base optimizer's state can be saved by parameter name: tried out at construction, on parameters of a few numbers.

What can be: per parameter, tensors of its shape and numbers; in the parameter groups, options. What cannot would be lost in a
checkpoint, or be found at the first one, hours later.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from everbatch.contract import base_of
from everbatch.engines.habits import trial
from everbatch.errors import check
from everbatch.optim.composed import Composed, stepping_class
from everbatch.optim.state import _is_option, _is_plain

__all__ = ["check_held", "check_savable"]

PROVEN = ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
"""Optimizers of torch whose state is of the right kind; the tests try them."""
TORCHS = {"state", "param_groups", "defaults", "grad_scale", "found_inf", "_need_device_dtype_check_for_fused",
          "_warned_capturable_if_run_uncaptured"}
"""Attributes that torch's optimizers change and that are no state of the method."""
LARGEST = 32
"""Of each dimension: enough for bases that factor matrices from some size on, and little for those that multiply many."""


def check_savable(opt: Composed, options: Mapping[str, Any]) -> bool:
    """Refuse a base whose state could not be saved by name, at construction.

    Two of its steps are taken on stand-ins for the parameters, of at most 32 elements each way; no random number of the run is
    drawn. Cost: a few milliseconds; torch's own optimizers that are known are not tried.

    Args:
        options: what the base was built with.

    Returns:
        Whether it is a known one. Others are looked at once more after their first step, by `check_held`: what they keep may
        depend on sizes, and some cannot be tried out.

    Raises:
        ValueError: the base keeps something that is neither shaped like its parameter nor a number.
    """
    base = stepping_class(opt)
    if getattr(torch.optim, base.__name__, None) is base and base.__name__ in PROVEN:
        return True
    if base.__module__.startswith("deepspeed."):  # builds kernels, and keeps what Adam keeps
        return False
    try:
        found = _tried(base, _stand_ins(opt.host.groups()), options, opt.host.device)
    except Exception:  # whatever stops a foreign optimizer on stand-ins says nothing about its state
        return False
    _refuse(opt, base, found)
    return False


def check_held(opt: Composed) -> None:
    """Refuse it by the state that it has after a step.

    Raises:
        ValueError: as above.
    """
    base, found = base_of(type(opt)), ""
    assert base is not None
    for p, held in opt.host.state().items():
        found = found or (_odd(p, held) if isinstance(p, Tensor) else f"state[{p!r}], which belongs to no parameter")
    _refuse(opt, base, found)


def _refuse(opt: Composed, base: type, found: str) -> None:
    check(not found, type(opt).__name__, f"base {base.__name__} keeps {found}", "keep tensors shaped like their parameter and "
          "numbers, in state[p] or in the groups, because state is saved by name and slice",
          "use another base, such as torch.optim.AdamW")


def _stand_ins(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A small parameter for each number of dimensions in a group; of groups with the same kind of options, the first."""
    result: list[dict[str, Any]] = []
    seen: set[tuple[str, int]] = set()
    for group in groups:
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        kind = repr([(k, v if _is_plain(v) else type(v)) for k, v in sorted(options.items()) if k not in ("lr", "weight_decay")])
        largest: dict[int, Tensor] = {}
        for p in group["params"]:
            if p.dim() not in largest or p.numel() > largest[p.dim()].numel():
                largest[p.dim()] = p
        new = {d: p for d, p in largest.items() if (kind, d) not in seen}
        seen.update((kind, d) for d in new)
        small = [torch.nn.Parameter(torch.ones(_shape(p), dtype=p.dtype, device=p.device)) for p in new.values()]
        if small:
            result.append({**options, "params": [(f"{len(result)}.{i}", p) for i, p in enumerate(small)]
                           if "param_names" in group else small})
    return result


def _shape(p: Tensor) -> list[int]:
    bound, shape = LARGEST, list(p.shape)
    while torch.Size(min(s, bound) for s in shape).numel() > 2**14 and bound > 1:
        bound //= 2
    return [max(1, min(s, bound)) for s in shape]


def _tried(base: type, groups: list[dict[str, Any]], options: Mapping[str, Any], device: torch.device) -> str:
    """What the base keeps after two steps that could not be saved; "" if all could."""
    known = inspect.signature(base.__init__).parameters  # type: ignore[misc]
    given = {k: v for k, v in options.items() if k in known}
    with trial(device):
        probe: Any = base(groups, **given)
        before, groups_before = _attributes(probe), [dict(g) for g in probe.param_groups]
        step = base.step  # type: ignore[attr-defined]
        for _ in range(2):
            for group in probe.param_groups:
                for p in group["params"]:
                    p.grad = torch.full_like(p, 1e-2)
            with torch.no_grad():
                (step.__wrapped__ if getattr(step, "hooked", False) else step)(probe)
    mine = {p for g in probe.param_groups for p in g["params"]}
    for p, held in probe.state.items():
        if p not in mine:
            return f"state[{p!r}], which belongs to no parameter"
        if odd := _odd(p, held):
            return odd
    for old, group in zip(groups_before, probe.param_groups, strict=True):
        for key, value in group.items():
            if key not in ("params", "param_names") and value is not old.get(key) and not _is_option(value):
                return f"a {type(value).__name__} in its groups ({key!r})"
    after = _attributes(probe)
    changed = sorted(k for k in after if k not in before or not _equal(before[k], after[k]))
    return f"{changed[0]!r} on itself" if changed else ""


def _odd(p: Tensor, held: Mapping[str, Any]) -> str:
    for key, value in held.items():
        if isinstance(value, Tensor):
            if value.dim() and value.shape != p.shape:
                return f"{key!r} of shape {tuple(value.shape)} for a parameter of shape {tuple(p.shape)}"
        elif not _is_plain(value):
            return f"a {type(value).__name__} for each parameter ({key!r})"
    return ""


def _attributes(probe: Any) -> dict[str, Any]:
    """A copy of the data that an optimizer holds outside of its state and groups."""
    kept = {k: _copied(v) for k, v in vars(probe).items() if k not in TORCHS and not k.startswith("_optimizer_")}
    return {k: v for k, v in kept.items() if v is not NotImplemented}


def _copied(value: Any) -> Any:
    """Plain values, tensors, random streams, and containers of them, by value; NotImplemented for what is no data."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, Mapping):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(v) for v in value]
    return value if _is_plain(value) else NotImplemented


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or a is b
