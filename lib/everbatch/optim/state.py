"""State of a composed optimizer as data: whole tensors by parameter name, or this rank's pieces of them, and plain values.

Nothing here depends on the host: what ZeRO stage 3 saved on four ranks, plain torch loads on one. A checkpoint (`pieces`) holds
the masters; so does `state_dict` where they are not the model's own weights, which a loop saves with `model.state_dict()`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from everbatch.checkpoint import Checkpoint, Piece
from everbatch.contract import base_of, parts_of
from everbatch.distributed import World
from everbatch.engines.host import plain_name
from everbatch.engines.named import ByName, Whole
from everbatch.engines.shards import Shard
from everbatch.errors import CheckpointMismatch
from everbatch.optim import state_checks
from everbatch.optim.composed import Composed

__all__ = ["check_pieces", "load_pieces", "load_state_dict", "pieces", "refuse_stripping", "state_dict"]


def pieces(opt: Composed) -> tuple[list[Piece], dict[str, Any]]:
    """This rank's slices of masters, moments and mixin state, and the plain values beside them (JSON-able).

    Where every rank holds everything, only rank 0 has slices to write. Cost: no copy; one gather of small metadata.
    """
    host, tensors = opt.host, list[Piece]()
    writer = host.rank == 0 if not host.sharded else host.rank < host.world // host.replicas
    for kind, held in _held(opt).items():
        tensors += [_piece(f"{kind}/{s.name}", s, value) for s, value in held]
    if host.rank == 0:  # who writes whatever the host is
        tensors += [Piece(name, tuple(t.shape), 0, t) for name, t in _whole(opt).items()]
    with host.frozen_too():
        scalars = {s.name: _scalars(opt, s) for s in host.shards}
    merged: dict[str, Any] = {}
    for other in World.current().gather(scalars):
        merged.update(other)  # type: ignore[call-overload]
    return tensors if writer else [], {"scalars": merged, **_plain(opt)}


def check_pieces(opt: Composed, checkpoint: Checkpoint, meta: Any) -> None:
    """Raise `CheckpointMismatch` unless `load_pieces` would take all of it. Local; no tensor data is read."""
    shapes = {name: tuple(checkpoint.shape(name)) for name in checkpoint.names()}
    state_checks.fits(opt, meta, shapes, complete=True)


def load_pieces(opt: Composed, checkpoint: Checkpoint, meta: dict[str, Any]) -> None:
    """Restore what `pieces` gave, reading only this rank's slices.

    Raises:
        CheckpointMismatch: other parameters, shapes, groups, mixins, base or types; nothing is touched then.
    """
    check_pieces(opt, checkpoint, meta)
    known = set(checkpoint.names())
    _restore(opt, meta, lambda key, s: checkpoint.read(f"{key}/{s.name}", s.start, s.numel)
             if f"{key}/{s.name}" in known else None, {n.split("/", 1)[0] for n in known}, checkpoint.whole)


def refuse_stripping(who: str, caller: Any) -> None:
    """Refuse callers that keep of an optimizer's state what torch's own have, and lose the rest without a word."""
    if caller.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
        raise RuntimeError(f"{who}: get_state_dict and get_optimizer_state_dict of torch.distributed keep moments alone, "
                           "and would lose what the mixins hold; save opt.state_dict(), which is whole on every rank")


def state_dict(opt: Composed, *, weights: bool | None = None) -> dict[str, Any]:
    """Everything by name, whole, on every rank: tensors under "tensors", plain values under "meta".

    On plain torch, DDP and FSDP2 torch's own "state" and "param_groups" are there as well, for tools that look at them; on plain
    torch and DDP their tensors are those under "tensors", so that each number is in memory, and in a file of `torch.save`, once.
    """
    host = opt.host
    slices = _held(opt)
    if not (host.masters_apart or (opt.complete_state if weights is None else weights)):
        slices.pop("master", None)
    mine = {kind: {s.name: str(t.dtype).removeprefix("torch.") for s, t in held} for kind, held in slices.items()}
    layout: dict[str, dict[str, str]] = {}
    for other in World.current().gather(mine) if host.sharded else [mine]:
        for kind, held in other.items():  # type: ignore[attr-defined]
            layout.setdefault(kind, {}).update(held)
    whole, scalars = {}, dict[str, Any]()
    with host.frozen_too():
        for kind in sorted(layout):
            dtypes = {n: getattr(torch, layout[kind][n]) for n in host.names if n in layout[kind]}
            whole.update({f"{kind}/{n}": t for n, t in host.gather(slices.get(kind, []), list(dtypes), dtypes).items()})
        numbers = {s.name: _scalars(opt, s) for s in host.shards}
    whole |= {name: t.detach().clone() for name, t in _whole(opt).items()}
    for other in World.current().gather(numbers) if host.sharded else [numbers]:
        scalars.update(other)  # type: ignore[call-overload]
    result: dict[str, Any] = {"everbatch": {"tensors": whole, "meta": {"scalars": scalars, **_plain(opt)}}}
    if getattr(host, "inner", None) is None:
        result = {**_torchs_own(opt, whole), **result}
    return result


def _torchs_own(opt: Composed, whole: Mapping[str, Tensor]) -> dict[str, Any]:
    """What torch's `state_dict` gives, with the copies in `whole` in place of the tensors they were made from."""
    own: dict[str, Any] = torch.optim.Optimizer.state_dict(opt)  # type: ignore[arg-type]
    if opt.host.sharded:  # there they are slices
        return own
    with opt.host.frozen_too():
        names = opt.host.names
    state = {index: {key: whole.get(f"moment.{key}/{names[index]}", value) for key, value in kept.items()}
             if isinstance(index, int) else kept for index, kept in own["state"].items()}
    return {**own, "state": state}


def load_state_dict(
    opt: Composed, saved: dict[str, Any], *, weights: Mapping[str, Tensor] | None = None,
    grown: bool = False,
) -> None:
    """Restore what `state_dict` gave, on any host; a plain `state_dict` of the base optimizer alone is an error.

    Args:
        weights: whole weights by name, as `model.state_dict()` of the bare model: masters that the state does not hold.
        grown: the model has grown since: see `OptimizerMixin.load_state_dict`.

    Raises:
        CheckpointMismatch: what does not fit, and on DeepSpeed a state without masters, unless `weights` has them; nothing is
            touched then.
    """
    who = type(opt).__name__
    if not isinstance(saved, Mapping) or "everbatch" not in saved:
        raise CheckpointMismatch(f"{who}: the state has no 'everbatch' entry, so the mixins' state is missing; "
                                 "save it with this class's state_dict()")
    state_checks.are_tensors(who, saved["everbatch"])
    tensors, meta = dict(saved["everbatch"]["tensors"]), saved["everbatch"]["meta"]
    given = {plain_name(name): value for name, value in (weights or {}).items()}
    with opt.host.with_masters():
        known = opt.host.master_layout() if given else {}
    for name in known:
        if name in given:
            tensors.setdefault(f"master/{name}", given[name])
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    state_checks.fits(opt, meta, shapes, complete=opt.host.masters_apart, grown=grown)

    def read(key: str, s: Shard) -> Tensor | None:
        whole = tensors.get(f"{key}/{s.name}")
        return None if whole is None else whole.reshape(-1)[s.start : s.start + s.numel]

    _restore(opt, meta, read, {n.split("/", 1)[0] for n in tensors}, tensors.__getitem__, grown=grown)


def _plain(opt: Composed) -> dict[str, Any]:
    index = opt.host.group_index()
    groups = [{"names": [n for n, i in index.items() if i == k],
               "options": {k: _encode(v) for k, v in g.items() if _is_option(v) and k not in ("params", "param_names")}}
              for k, g in enumerate(opt.host.groups())]
    mixins = {part.__name__: {n: _encode(v) for n, v in _fields(state).items() if not isinstance(v, ByName)}
              for part, state in opt.states.items()}
    base = base_of(type(opt)).__name__  # type: ignore[union-attr]
    with opt.host.with_masters():
        shapes = {n: list(shape) for n, (_, shape) in opt.host.master_layout().items() if shape.numel()}
    return {"class": [p.__name__ for p in parts_of(type(opt))], "base": base, "groups": groups, "mixins": mixins,
            "shapes": shapes, "seed": opt.seed, "steps": opt.step_count, "skipped": opt.skipped_count}


def _held(opt: Composed) -> dict[str, list[tuple[Shard, Tensor]]]:
    """This rank's slices by kind: masters; moments and mixin state also of what is frozen just now."""
    host, result = opt.host, dict[str, list[tuple[Shard, Tensor]]]()
    with host.with_masters():
        trained = set(host.names)
    with host.frozen_too():
        shards = host.shards
    for shard in shards:
        master = {"master": shard.data} if shard.name in trained else {}
        for kind, value in (master | {f"moment.{k}": v for k, v in shard.moments.items()}).items():
            result.setdefault(kind, []).append((shard, value))
    for part, state in opt.states.items():
        for name, kept_by in _by_name(state).items():
            result[f"{part.__name__}.{name}"] = [(s, kept_by[s.name]) for s in shards if s.name in kept_by]
    return result


def _whole(opt: Composed) -> dict[str, Tensor]:
    """Mixin state that every rank holds whole, by kind/key."""
    return {f"{part.__name__}.{name}/{key}": t for part, state in opt.states.items()
            for name, value in _fields(state).items() if isinstance(value, Whole)
            for key, t in value.items()}


def _restore(
    opt: Composed, meta: dict[str, Any], read: Any, kinds: set[str],
    whole: Callable[[str], Tensor], *, grown: bool = False,
) -> None:
    host = opt.host
    with host.frozen_too():
        shards = host.shards
        host.reset_moments()
    groups = state_checks.matched(opt, meta["groups"], grown=grown)
    for group, saved in zip(host.groups(), groups, strict=True):
        for name, value in saved["options"].items() if saved is not None else ():
            value = _decode(value, host.device)
            if torch.is_tensor(group.get(name)):
                group[name].fill_(value)  # a schedule or a captured graph may hold it
            else:
                group[name] = tuple(value) if isinstance(group.get(name), tuple) else value
    moments = sorted(k for k in kinds if k.startswith("moment."))
    state, clocks = host.state(), dict[str, tuple[dict[str, Any], bool]]()
    for shard in shards:
        master = read("master", shard)
        if master is not None:  # frozen: kept with the model
            shard.data.copy_(master.view_as(shard.data))
        kept = state[shard.owner] if shard.owner in state else state.setdefault(shard.owner, {})
        found = False
        for kind in moments:
            value = read(kind, shard)
            if value is not None:
                found = True
                key = kind.split(".", 1)[1]
                if key not in kept:
                    kept[key] = torch.zeros_like(shard.owner, dtype=value.dtype)
                shard.moments[key].copy_(value.view_as(shard.data))
        for key, (kind, value) in meta["scalars"].get(shard.name, {}).items():
            device = shard.owner.device if shard.group.get("capturable") or shard.group.get("fused") else "cpu"
            kept[key] = value if kind == "value" else torch.tensor(value, dtype=getattr(torch, kind), device=device)
        scalars = {key: kept[key] for key in meta["scalars"].get(shard.name, {})}
        clocks[shard.name] = scalars, found or bool(scalars)
        if not kept:
            state.pop(shard.owner, None)
    host.restore_clocks(clocks)
    opt.seed, opt.step_count, opt.skipped_count = meta["seed"], meta["steps"], meta["skipped"]
    for part, fields in opt.states.items():
        for name, value in _fields(fields).items():
            count = meta["mixins"][part.__name__].get(name)
            if isinstance(value, ByName):
                setattr(fields, name, _read_by_name(shards, f"{part.__name__}.{name}", read))
            elif isinstance(count, dict) and count.keys() == {"list"}:
                setattr(fields, name, [_read_by_name(shards, f"{part.__name__}.{name}.{i}", read)
                                       for i in range(count["list"])])
            elif isinstance(value, Whole) and count is not None:
                keys = count["whole"]
                setattr(fields, name, Whole({
                    k: whole(f"{part.__name__}.{name}/{k}").to(host.device, copy=True) for k in keys}))
            elif name in meta["mixins"][part.__name__]:
                setattr(fields, name, _decode(meta["mixins"][part.__name__][name], host.device))
    host.touch()
    host.publish_if_dirty()


def _by_name(state: Any) -> dict[str, ByName]:
    """Per-element state by field; a list of it as field.0, field.1, ..."""
    result = {}
    for name, value in _fields(state).items():
        if isinstance(value, ByName):
            result[name] = value
        elif _is_history(value):
            result.update({f"{name}.{i}": entry for i, entry in enumerate(value)})
    return result


def _is_history(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, ByName) for v in value)


def _read_by_name(shards: list[Shard], key: str, read: Any) -> ByName:
    got = {s.name: (s, read(key, s)) for s in shards}
    return ByName({n: t.to(s.data.device).view_as(s.data).clone() for n, (s, t) in got.items() if t is not None})


def _encode(value: Any) -> Any:
    """A plain value as it is; the length of a list of per-element state; the keys of tensors that are saved whole; a small
    replicated tensor (a multiplier, a covariance's count) as numbers."""
    if isinstance(value, Whole):
        return {"whole": list(value)}
    if _is_history(value):
        return {"list": len(value)}
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    return value


def _decode(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict) and value.keys() == {"tensor", "dtype"}:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]), device=device)
    return value


def _piece(name: str, shard: Shard, value: Tensor) -> Piece:
    return Piece(name, shard.shape, shard.start, value.reshape(-1))


def _scalars(opt: Composed, shard: Shard) -> dict[str, Any]:
    """Per-parameter state that is not per element, such as a step count: name to (dtype or "value", number)."""
    result: dict[str, Any] = {}
    moments = shard.moments
    for key, value in opt.host.kept(shard).items():
        if torch.is_tensor(value):
            if key in moments:
                continue
            if value.dim() == 0:
                result[key] = (str(value.dtype).removeprefix("torch."), value.item())
            elif value.shape != shard.owner.shape:
                raise CheckpointMismatch(f"{type(opt).__name__}: state {key!r} of {shard.name} has shape {tuple(value.shape)}, "
                                         "neither per element nor a number; this base optimizer cannot be saved by name")
        elif _is_plain(value):
            result[key] = ("value", value)
        else:
            raise CheckpointMismatch(f"{type(opt).__name__}: state {key!r} of {shard.name} is a {type(value).__name__}, neither "
                                     "per element nor a number; this base optimizer cannot be saved by name")
    return result


def _fields(state: Any) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def _is_option(value: Any) -> bool:
    """Whether a group's option is kept: a plain value, or a number in a tensor (a learning rate)."""
    return _is_plain(value) or (torch.is_tensor(value) and value.dim() == 0)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str) or (
        isinstance(value, tuple | list) and all(_is_plain(v) for v in value))
