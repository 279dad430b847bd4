"""Whether a saved state fits an optimizer: all of it is looked at before the first number is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from everbatch.checkpoint.files import CODES
from everbatch.contract import base_of, parts_of
from everbatch.engines.named import ByName, Whole
from everbatch.errors import CheckpointMismatch
from everbatch.optim.composed import Composed

__all__ = ["are_tensors", "fits", "like", "matched"]

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the saved tensors, by kind/name."""


def are_tensors(who: str, saved: Any) -> None:
    """Raise `CheckpointMismatch` unless `saved` has "tensors", by name, and "meta"."""
    good = isinstance(saved, Mapping) and isinstance(saved.get("tensors"), Mapping) and isinstance(saved.get("meta"), Mapping)
    if not good or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in saved["tensors"].items()):
        raise CheckpointMismatch(f"{who}: the state's 'everbatch' entry is not of tensors by name and their 'meta'; save it with "
                                 "this class's state_dict()")


def fits(
    opt: Composed, meta: Any, shapes: Shapes, *, complete: bool, grown: bool = False,
) -> None:
    """Raise `CheckpointMismatch`, naming what differs, unless the state fits the optimizer's model, groups and mixins.

    Args:
        complete: the state must hold the weights.
        grown: the state is of a model that has grown since: names on one side alone are left out.
    """
    who = type(opt).__name__
    try:
        _same_kind(opt, meta)
        _same_weights(opt, meta, shapes, complete, grown)
        _same_groups(opt, meta, grown)
        _scalars(who, meta["scalars"])
        _mixins(opt, meta["mixins"], shapes)
        for key in ("seed", "steps", "skipped"):
            like(who, key, meta[key], 0)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointMismatch(f"{who}: the state's meta is not what state_dict() gives: {what}") from error


def like(who: str, key: str, saved: Any, present: Any, *, optional: bool = False) -> None:
    """Raise `CheckpointMismatch` unless `saved` is of the kind of `present`: a number, a text, a list, a table, true or false.

    Args:
        optional: None will do as well. Where `present` is None, anything does.
    """
    if present is None or (optional and saved is None):
        return
    if isinstance(present, Tensor):
        present = 0.0 if present.dim() == 0 else None
    kinds: tuple[tuple[Any, str], ...] = (
        (bool, "true or false"), (int | float, "a number"), (str, "a text"), (list | tuple, "a list"), (dict, "a table"))
    for kind, name in kinds:
        if isinstance(present, kind):
            good = isinstance(saved, kind) and (kind is bool or not isinstance(saved, bool))
            if not good and not (kind == int | float and _is_tensor(saved)):
                raise CheckpointMismatch(f"{who}: {key} is {repr(saved)[:80]} in the state, must be {name}")
            return


def _same_kind(opt: Composed, meta: Any) -> None:
    who, here = type(opt).__name__, [p.__name__ for p in parts_of(type(opt))]
    if here != list(meta["class"]):
        raise CheckpointMismatch(f"{who}: the state is of {meta['class']}, this class is {here}; compose the same mixins")
    base = base_of(type(opt)).__name__  # type: ignore[union-attr]
    if meta.get("base", base) != base:
        raise CheckpointMismatch(f"{who}: the state is of base {meta['base']}, this class has {base}; compose with the same base")


def _same_weights(
    opt: Composed, meta: Any, shapes: Shapes, complete: bool, grown: bool,
) -> None:
    who, host = type(opt).__name__, opt.host
    held = {n.split("/", 1)[1]: shape for n, shape in shapes.items() if n.startswith("master/")}
    told = {n: tuple(shape) for n, shape in meta.get("shapes", {}).items()}
    with host.with_masters():
        layout = host.master_layout()
    ours = {n: tuple(shape) for n, (_, shape) in layout.items() if shape.numel()}  # an empty one has no piece
    theirs = {**told, **held}
    if grown:
        theirs = {n: shape for n, shape in theirs.items() if n in ours}
        ours = {n: shape for n, shape in ours.items() if n in theirs}
        if not ours:
            raise CheckpointMismatch(f"{who}: the state and the model have no trained parameter in "
                                     "common, must be of one model before and after it grew")
    odd = sorted(set(ours) ^ set(theirs)) or [n for n in ours if ours[n] != theirs[n]]
    if odd:
        raise CheckpointMismatch(f"{who}: parameters {odd[:5]} differ between the state and the model "
                                 f"(shape {[theirs.get(n) for n in odd[:5]]} against {[ours.get(n) for n in odd[:5]]})")
    lacking = sorted(set(ours) - set(held)) if complete else []
    if lacking:
        raise CheckpointMismatch(f"{who}: the state holds no weights of {lacking[:5]}: it was saved where they are the "
                                 f"model's own, and on {host.title} they are not; pass weights=model.state_dict() of the saved "
                                 "model to load_state_dict, or save with state_dict(weights=True)")
    with host.frozen_too():
        every = {n: tuple(shape) for n, (_, shape) in host.master_layout().items()}
    whole = {f"{part.__name__}.{field.name}" for part, state in opt.states.items()
             for field in dataclasses.fields(state) if isinstance(getattr(state, field.name), Whole)}
    for key, shape in shapes.items():
        kind, _, name = key.partition("/")
        if kind not in whole and kind.split(".")[0] in {"moment", *meta["class"]} and every.get(name, shape) != shape:
            raise CheckpointMismatch(f"{who}: {key} has shape {shape} in the state, the parameter has {every[name]}")


def matched(opt: Composed, saved: Sequence[Mapping[str, Any]], *, grown: bool) -> list[Any]:
    """Of each parameter group the saved one that it goes on as: the one at its place; where the
    model has grown, the one that has a member of it, and None where the group is new.

    Raises:
        CheckpointMismatch: other members; in a grown model, members of several saved groups.
    """
    who, host = type(opt).__name__, opt.host
    index = host.group_index()
    names = [[n for n, i in index.items() if i == k] for k in range(len(host.groups()))]
    if not grown:
        if names != [g["names"] for g in saved]:
            raise CheckpointMismatch(f"{who}: the state has {len(saved)} parameter groups with other members than the "
                                     f"{len(names)} here; build the same groups")
        return list(saved)
    home = {name: k for k, group in enumerate(saved) for name in group["names"]}
    result: list[Any] = []
    for members in names:
        homes = sorted({home[name] for name in members if name in home})
        if len(homes) > 1:
            ends = [next(n for n in members if home.get(n) == k) for k in homes[:2]]
            raise CheckpointMismatch(
                f"{who}: {ends} are in one parameter group here and in two in the state, whose "
                "options differ; keep the groups of before, and put new parameters into one of "
                "their own")
        result.append(saved[homes[0]] if homes else None)
    return result


def _same_groups(opt: Composed, meta: Any, grown: bool) -> None:
    who, host = type(opt).__name__, opt.host
    for group, theirs in zip(host.groups(), matched(opt, meta["groups"], grown=grown), strict=True):
        for name, value in theirs["options"].items() if theirs is not None else ():
            like(who, f"group option {name}", value, group.get(name))
            _decodable(who, name, value)
    if grown and host.flat:
        _apart(opt, meta)


def _apart(opt: Composed, meta: Any) -> None:
    """Refuse new parameters beside known ones where a group has one count of steps."""
    known = {name for group in meta["groups"] for name in group["names"]}
    counted = {name for name in known if meta["scalars"].get(name)}
    index = opt.host.group_index()
    for k in sorted({index[name] for name in counted if name in index}):
        new = [name for name, i in index.items() if i == k and name not in known]
        if new:
            old = next(name for name in index if index[name] == k and name in counted)
            raise CheckpointMismatch(
                f"{type(opt).__name__}: {new[:3]} are new and in one parameter group with {old!r}, "
                f"and on {opt.host.title} a group has one count of steps, which would be theirs "
                "too; put what a growth adds into a parameter group of its own")


def _scalars(who: str, saved: Any) -> None:
    for name, values in saved.items():
        for key, (kind, value) in values.items():
            if kind != "value" and (kind not in CODES or not isinstance(value, int | float)):
                raise CheckpointMismatch(f"{who}: {key} of {name} is {value!r} of type {kind!r} in the state, must be a "
                                         f"number of one of {', '.join(CODES)}")


def _mixins(opt: Composed, saved: Any, shapes: Shapes) -> None:
    who = type(opt).__name__
    for part, state in opt.states.items():
        theirs = saved[part.__name__]
        like(who, f"the state of {part.__name__}", theirs, {})
        for field in dataclasses.fields(state):
            key, present = f"{part.__name__}.{field.name}", getattr(state, field.name)
            if field.name not in theirs or isinstance(present, ByName):
                continue
            value = theirs[field.name]
            if isinstance(present, Whole):
                lacking = [k for k in value["whole"] if f"{key}/{k}" not in shapes]
                if lacking:
                    raise CheckpointMismatch(f"{who}: the tensors {lacking[:5]} of {key} are missing in the state")
                continue
            if isinstance(value, dict) and value.keys() == {"list"}:
                count = value["list"]
                if type(count) is not int or not 0 <= count <= max(64, len(shapes)):
                    raise CheckpointMismatch(f"{who}: {key} is a list of {count!r} in the state of {len(shapes)} tensors")
                continue
            if not isinstance(present, list) or not isinstance(value, list):
                like(who, key, value, present, optional="None" in str(field.type))
            _decodable(who, key, value)


def _decodable(who: str, key: str, value: Any) -> None:
    if _is_tensor(value) and value["dtype"] not in CODES:
        raise CheckpointMismatch(f"{who}: {key} is of type {value['dtype']!r} in the state, must be one of {', '.join(CODES)}")
    if _is_tensor(value):
        torch.tensor(value["tensor"])


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"tensor", "dtype"}
