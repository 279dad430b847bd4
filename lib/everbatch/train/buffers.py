"""Persistent buffers in checkpoints: each rank's own, as they are by then, whatever length a table has grown to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from everbatch.checkpoint import Checkpoint, Piece
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch
from everbatch.nn.own_buffers import own_buffers

__all__ = ["buffer_pieces", "buffer_problem", "carry_buffers", "check_buffers", "load_buffers",
           "persistent", "vacant"]


def persistent(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that torch's `state_dict` holds, each under its first name."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                result[f"{path}.{name}".lstrip(".")] = buffer
    return result


def vacant(module: nn.Module) -> list[str]:
    """Names of persistent buffers that are None."""
    return [f"{path}.{name}".lstrip(".") for path, part in module.named_modules() for name, buffer in part._buffers.items()
            if buffer is None and name not in part._non_persistent_buffers_set]


def buffer_pieces(module: nn.Module, rank: int) -> list[Piece]:
    """This rank's persistent buffers."""
    return [Piece(f"buffer/{rank}/{name}", tuple(b.shape), 0, b) for name, b in persistent(module).items()]


def check_buffers(module: nn.Module, kept: Checkpoint, world: World) -> None:
    """Raise `CheckpointMismatch` unless `load_buffers` would take them. Local; no tensor data is read.

    Sizes may differ, for tables grow and shrink; a buffer the run made on the way, out of one number or none, is made again, and
    one that it gave up is None again. One that the model has and the checkpoint lacks, that no module could hold, or of another
    number of dimensions, belongs to another model.
    """
    ours, theirs = persistent(module), _saved(kept, world)
    lacking = sorted(set(ours) - set(theirs) - set(kept.meta.get("vacant", ())))
    if lacking:
        raise CheckpointMismatch(f"checkpoint {kept.path}: holds no buffers {lacking[:5]}, which the model has; build the same "
                                 "model")
    odd = [name for name in sorted(set(theirs) - set(ours)) if not _ignored(module, name, kept) and not _room(module, name)]
    if odd:
        raise CheckpointMismatch(f"checkpoint {kept.path}: holds buffers {odd[:5]}, which the model lacks; build the same model")
    for name, buffer in ours.items():
        for key in theirs.get(name, ()):
            shape, dtype = tuple(kept.shape(key)), kept.dtype(key)
            if not _like(buffer, len(shape), dtype):
                raise CheckpointMismatch(f"checkpoint {kept.path}: buffer {name} is {dtype} {shape}, the model's is "
                                         f"{buffer.dtype} {tuple(buffer.shape)}; build the same model")


@torch.no_grad()
def load_buffers(module: nn.Module, kept: Checkpoint, world: World) -> None:
    """Put them back: bit for bit at the same world size; at another, those that differ by rank become their mean, of tables
    of several lengths every rank gets the longest, and of `own_buffers` that of one rank."""
    ours, apart = persistent(module), own_buffers(module)
    for name, keys in _saved(kept, world).items():
        if name not in ours and _ignored(module, name, kept):
            continue
        own = [keys[world.rank % len(keys)]] if name in apart else keys
        values = [kept.whole(key) for key in own]
        value = max(values, key=Tensor.numel)
        if len(values) > 1 and value.is_floating_point() and len({v.shape for v in values}) == 1:
            value = torch.stack(values).to(torch.promote_types(value.dtype, torch.float32)).mean(0)
        _place(module, name, ours.get(name), value)
    _vacate(module, [name for name in kept.meta.get("vacant", ()) if name in ours])


def buffer_problem(known: Mapping[str, Tensor], module: nn.Module) -> str:
    """Why `carry_buffers` would not put these into a module, or "". As `check_buffers`, sizes may
    differ."""
    ours = persistent(module)
    lost = [name for name in known if name not in ours and not _room(module, name)]
    if lost:
        return f"has no place for buffers {lost[:3]}"
    for name, value in known.items():
        own = ours.get(name)
        if own is not None and not _like(own, value.dim(), value.dtype):
            return f"has a buffer {name} of {own.dtype} {tuple(own.shape)}, it was {value.dtype} {tuple(value.shape)}"
    return ""


@torch.no_grad()
def carry_buffers(known: Mapping[str, Tensor], gone: Iterable[str], module: nn.Module) -> None:
    """Put buffers of another model into this one, by name, and None in place of those that are `gone` there. Local."""
    ours = persistent(module)
    _vacate(module, [name for name in gone if name in ours])
    for name, value in known.items():
        _place(module, name, ours.get(name), value)


def _like(own: Tensor, dimensions: int, dtype: torch.dtype) -> bool:
    """Whether what a fresh model has may have become this: anything may, of one number or none."""
    return own.numel() <= 1 or (own.dim(), own.is_floating_point()) == (dimensions, dtype.is_floating_point)


def _vacate(module: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        path, _, last = name.rpartition(".")
        module.get_submodule(path)._buffers[last] = None


def _place(module: nn.Module, name: str, old: Tensor | None, value: Tensor) -> None:
    """Make `value` the buffer, under every name the old one has; in its memory where that fits."""
    if old is not None and old.shape == value.shape and old.dtype == _type(old, value):
        old.copy_(value)
        return
    if old is None:
        path, _, last = name.rpartition(".")
        device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        part = module.get_submodule(path)
        part.register_buffer(last, value.to(device))
        return
    fresh = value.to(old.device, _type(old, value))
    for part in module.modules():
        for last, buffer in part._buffers.items():
            if buffer is old:
                part._buffers[last] = fresh


def _type(old: Tensor, value: Tensor) -> torch.dtype:
    """The value's own type, but for those that engines give to a whole model: they stay the model's."""
    engines = (torch.float32, torch.bfloat16, torch.float16)
    return old.dtype if old.dtype in engines and value.dtype in engines else value.dtype


def _saved(kept: Checkpoint, world: World) -> dict[str, list[str]]:
    """Keys of the saved buffers by name: this rank's where the world is the same, else every rank's."""
    ranks = [world.rank] if kept.world_size == world.size else list(range(kept.world_size))
    result: dict[str, list[str]] = {}
    for rank in ranks:
        prefix = f"buffer/{rank}/"
        for key in kept.names():
            if key.startswith(prefix):
                result.setdefault(key.removeprefix(prefix), []).append(key)
    return result


def _ignored(module: nn.Module, name: str, kept: Checkpoint) -> bool:
    """Whether the buffer is none of the state: not persistent, or unknown in a checkpoint that held those as well."""
    path, _, last = name.rpartition(".")
    part = dict(module.named_modules()).get(path)
    return kept.meta.get("layout", 1) == 1 or (part is not None and last in part._non_persistent_buffers_set)


def _room(module: nn.Module, name: str) -> bool:
    """Whether the module is there and has nothing else of that name: a place kept free, or nothing yet."""
    path, _, last = name.rpartition(".")
    part = dict(module.named_modules()).get(path)
    return part is not None and part._buffers.get(last) is None and (last in part._buffers or not hasattr(part, last))
