"""The trainer's state as a checkpoint, and back, at the same world size or another."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from everbatch import checkpoint, runs, seeds
from everbatch.checkpoint import Checkpoint, Piece
from everbatch.checkpoint.manifest import json_problem
from everbatch.compose import base_of, parts_of
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch, check
from everbatch.optim import state as optimizer_state
from everbatch.optim.hosts.local import LocalHost
from everbatch.train.frozen import frozen_as_in, frozen_of, set_frozen
from everbatch.train.modes import in_evaluation, put_into_evaluation

if TYPE_CHECKING:
    from everbatch.train.trainer import Trainer

__all__ = ["agree", "check_plain", "identity", "layout", "load", "options_of", "save", "set_aside"]


def save(trainer: Trainer) -> None:
    """Write a checkpoint of the present step boundary. Collective."""
    pieces, meta = optimizer_state.pieces(trainer.optimizer)
    for name, buffer in trainer.module.named_buffers():
        key = f"buffer/{trainer.world.rank}/{name}"
        pieces.append(Piece(key, tuple(buffer.shape), 0, buffer))
    for name, value in frozen_of(trainer.module).items():
        pieces += [Piece(f"frozen/{name}", tuple(value.shape), 0, value)] if trainer.world.rank == 0 else []
    plain: dict[str, Any] = {}
    for part, state in getattr(trainer, "states", {}).items():
        for field, value in _fields(state).items():
            key = f"{part.__name__}.{field}"
            if hasattr(value, "state_dict"):
                saved, plain[key] = _store_pieces(key, value.state_dict(), trainer.world.rank)
                pieces += saved
            elif isinstance(value, Tensor):
                pieces += [Piece(key, tuple(value.shape), 0, value)] if trainer.world.rank == 0 else []
            else:
                plain[key] = value
    counters = {"step": trainer.step, "task_index": trainer.task_index, "task_step": trainer.task_step,
                "bad_steps": trainer.bad_steps, "matrix": trainer.matrix, "mixins": plain,
                "evaluation": in_evaluation(trainer.module)}
    assert trainer.folder is not None
    checkpoint.save(trainer.folder, trainer.step, pieces, {"optimizer": meta, "trainer": counters, "identity": identity(trainer),
                                                          "seconds": trainer.seconds},
                    world=trainer.world, keep_last=trainer.config.keep_last)


def load(trainer: Trainer, kept: Checkpoint) -> None:
    """Restore a checkpoint: bit for bit at the same world size.

    Another world size or ZeRO stage gets the same weights, moments, mixin state and memory; buffers that differed by rank become
    their mean, and the order of samples follows the new number of ranks only where a batch is divided among them. Parameters that
    the run had frozen or unfrozen by then are so again, but on DeepSpeed, which trains what was trained when it was built.

    Raises:
        CheckpointMismatch: another configuration, stream, class or frozen part, naming what differs; nothing is touched then.
    """
    for part in trainer.module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # after a forward the root stays gathered: in place of its parameters are copies
    ours, theirs = identity(trainer), kept.meta.get("identity", {})
    differs = [k for k in {**ours, **theirs} if not _same(ours.get(k), theirs.get(k))]
    if differs:
        k, more = differs[0], ", ".join(differs[1:6]) + ", ..." * (len(differs) > 6)
        raise CheckpointMismatch(f"checkpoint {kept.path}: made with {k}={theirs.get(k)!r}, this run has {ours.get(k)!r}"
                                 + (f" (and {more} differ)" if more else "")
                                 + "; repeat the configuration, or use another folder")
    with frozen_as_in(kept, trainer.module, change=isinstance(trainer.optimizer.host, LocalHost)):
        optimizer_state.load_pieces(trainer.optimizer, kept, kept.meta["optimizer"])
    saved = kept.meta["trainer"]
    _load_buffers(trainer, kept)
    set_frozen(trainer.module, {n.removeprefix("frozen/"): kept.whole(n) for n in kept.names() if n.startswith("frozen/")})
    if "evaluation" in saved:
        put_into_evaluation(trainer.module, saved["evaluation"])
    for part, state in getattr(trainer, "states", {}).items():
        for field, value in _fields(state).items():
            key = f"{part.__name__}.{field}"
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(_store_state(key, saved["mixins"][key], kept))
            elif isinstance(value, Tensor):
                setattr(state, field, kept.whole(key))
            else:
                setattr(state, field, saved["mixins"][key])
    trainer.step, trainer.task_index, trainer.task_step = saved["step"], saved["task_index"], saved["task_step"]
    trainer._seconds = float(kept.meta.get("seconds", 0.0))
    trainer.bad_steps, trainer.matrix = saved["bad_steps"], [list(row) for row in saved["matrix"]]


def check_plain(identity: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless a checkpoint can hold what the caller of `Trainer` names."""
    for name, value in identity.items():
        check(json_problem(_jsonable(value), name) is None, "Trainer", f"identity[{name!r}]={value!r}",
              "be made of numbers, texts, lists and dicts", "give its text, or numbers that tell it from others")


def identity(trainer: Trainer) -> dict[str, Any]:
    """What must be equal for a run to be the continuation of another: configuration, stream, classes and their options."""
    check_plain(trainer.identity)
    free = {"keep_last", "checkpoint_every", "workers", "eval_batch", "accumulation"}
    config = {k: v for k, v in dataclasses.asdict(trainer.config).items() if k not in free}
    mixins = {part.__name__: _binding(part, c) for part, c in getattr(trainer, "configs", {}).items()}
    optimizer = {part.__name__: repr(c) for part, c in trainer.optimizer.configs.items()}
    base = base_of(type(trainer.optimizer))
    assert trainer.stream is not None and base is not None
    classes = [[p.__name__ for p in parts_of(type(trainer))], [p.__name__ for p in (*parts_of(type(trainer.optimizer)), base)]]
    values = {"trainer": config, "mixins": mixins, "optimizer": optimizer | trainer._base_options, "classes": classes,
              "lr": trainer._base_lr, "stream": trainer.stream.fingerprint(), "identity": trainer.identity,
              "frozen": trainer._begun_frozen}
    if trainer._begun_evaluation:  # older checkpoints, all of models in training mode, say nothing
        values["evaluation"] = trainer._begun_evaluation
    flat = {f"{a}.{b}": v for a, inner in values.items() if isinstance(inner, dict) for b, v in inner.items()}
    return {k: _jsonable(v) for k, v in {**flat, **{k: v for k, v in values.items() if not isinstance(v, dict)}}.items()}


def _binding(part: type, config: Any) -> str:
    """The options of a mixin that decide what a run gives: all but those it calls free."""
    unbound = getattr(part, "free", ())
    return repr({k: v for k, v in vars(config).items() if k not in unbound}) if unbound else repr(config)


PLAIN = (bool, int, float, str, type(None))


def parts(trainer: Trainer, optimizer: Any) -> dict[str, Any]:
    """Classes and plain options of a trainer's mixins and of its optimizer: ranks that differ there would wait for each other."""
    if not isinstance(optimizer, functools.partial) or not isinstance(optimizer.func, type):
        return {}  # refused by name later on
    cls: Any = optimizer.func
    options = dict(optimizer.keywords)
    plain = {f"optimizer.{k}": v for k, v in options.items() if k != "lr" and isinstance(v, PLAIN)}
    mixins = {f"mixins.{part.__name__}": _binding(part, c) for part, c in getattr(trainer, "configs", {}).items()}
    names = [[p.__name__ for p in parts_of(type(trainer))], [p.__name__ for p in (*parts_of(cls), cls)]]
    return {"classes": names, **mixins, **plain}


def layout(model: nn.Module) -> str:
    """A short text of names and shapes of all parameters."""
    return f"layout {seeds.derive(*(f'{n} {tuple(p.shape)}' for n, p in model.named_parameters())):x}"


def options_of(optimizer: Any) -> dict[str, Any]:
    """Options of the base optimizer, by name, one value per parameter group; without lr and what only picks an implementation."""
    free = {"lr", "foreach", "fused", "capturable", "differentiable"}
    return {name: [g.get(name) for g in optimizer.param_groups] for name in sorted(optimizer.defaults) if name not in free}


def agree(world: World, values: Mapping[str, Any], who: str = "Trainer") -> None:
    """Raise `ValueError` on every rank unless all ranks hold the same values, naming the first that differs. One gather."""
    texts: list[Any] = world.gather({k: repr(v) for k, v in values.items()})
    for k in texts[0]:
        odd = [rank for rank, other in enumerate(texts) if other.get(k) != texts[0][k]]
        check(not odd, who, f"{k} is {texts[0][k]} on rank 0 and {texts[odd[0]].get(k) if odd else ''} on rank {odd[:1]}",
              "be the same on every rank", "start every rank with the same arguments, data and environment")


def set_aside(folder: Path, world: World) -> None:
    """Move checkpoints of an earlier run to `folder`/previous/N.

    Left where they are, they would outlive newer ones with lower steps, and be what the next run resumes from.
    """
    if world.rank == 0 and folder.exists():
        runs.set_aside(folder, [path.name for path in folder.glob("*step-[0-9]*")])


def _load_buffers(trainer: Trainer, kept: Checkpoint) -> None:
    rank, same = trainer.world.rank, kept.world_size == trainer.world.size
    for name, buffer in trainer.module.named_buffers():
        ranks = [rank] if same else range(kept.world_size)
        values = [kept.whole(f"buffer/{r}/{name}").to(buffer.device) for r in ranks]
        mean = torch.stack([v.float() for v in values]).mean(0) if len(values) > 1 and buffer.is_floating_point() else values[0]
        buffer.copy_(mean.to(buffer.dtype))


def _store_pieces(key: str, saved: dict[str, Any], rank: int) -> tuple[list[Piece], dict[str, Any]]:
    """A sample memory: the replicated index once, and this rank's rows of the payload."""
    index, pieces = saved["index"], []
    total = len(index["slots"])
    for name, rows in saved["rows"].items():
        pieces.append(Piece(f"{key}/rows/{name}", (total, *rows.shape[1:]), saved["start"] * rows[:1].numel(), rows))
    plain = {"names": sorted(saved["rows"]), "arrays": sorted(k for k, v in index.items() if isinstance(v, np.ndarray)),
             "numbers": {k: v for k, v in index.items() if not isinstance(v, np.ndarray)}}
    if rank == 0:
        for name in plain["arrays"]:
            array = torch.from_numpy(np.ascontiguousarray(index[name]))
            pieces.append(Piece(f"{key}/index/{name}", tuple(array.shape), 0, array))
    return pieces, plain


def _store_state(key: str, plain: dict[str, Any], kept: Checkpoint) -> dict[str, Any]:
    index: dict[str, Any] = {name: kept.whole(f"{key}/index/{name}").numpy() for name in plain["arrays"]}
    rows = {name: kept.whole(f"{key}/rows/{name}") for name in plain["names"]}
    return {"index": {**index, **plain["numbers"]}, "start": 0, "rows": rows}


def _fields(state: Any) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; NaN is to itself here."""
    return bool(one == other) or json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    return [_jsonable(v) for v in value] if isinstance(value, tuple | list) else value
