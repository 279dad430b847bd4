"""A new run from another run's weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from everbatch import checkpoint
from everbatch.checkpoint import Checkpoint
from everbatch.distributed import World
from everbatch.errors import check
from everbatch.train.adversarial.attack import BRANCH

__all__ = ["begin_from", "weights_of"]


def begin_from(model: nn.Module, run: str | Path, world: World, *, skip: Sequence[str] = ()) -> None:
    """Give a bare model the weights and persistent buffers of another run; its optimizer and memory begin anew. Collective.

    Args:
        model: on the CPU, before an engine takes it.
        run: see `weights_of`.
        skip: patterns of names that stay as they are here, such as "head.*" for a head of other classes.

    Raises:
        ValueError: on every rank: a pattern that fits no name, no weights there, or those of another model, naming what
            differs first; nothing is changed.
        CheckpointMismatch: all checkpoints there are damaged.

    Cost: the run's weights once in memory on every rank.
    """
    given, ours = weights_of(run, world), model.state_dict()
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    needed = {name for name, _ in model.named_parameters()} | (set(ours) - aliases)
    idle = [pattern for pattern in skip if not fnmatch.filter(ours, pattern)]
    check(not idle, "init", f"skip={idle}", f"fit a name of the model, such as {list(ours)[-1]}")
    left = {name for pattern in skip for name in fnmatch.filter({*ours, *given}, pattern)}
    needed, given = needed - left, {name: value for name, value in given.items() if name not in left}
    cure = "start from a run with the same model.name, model.options and number of classes"
    for name in sorted(needed):
        check(name in given, "init", f"{str(run)!r} has no {name!r}", "hold every weight of this model", cure)
        here, there = tuple(ours[name].shape), tuple(given[name].shape)
        check(here == there, "init", f"{name!r} has shape {there} in {str(run)!r} and {here} in this model", "be the same", cure)
    more = sorted(set(given) - set(ours))
    check(not more, "init", f"{str(run)!r} has {more[:1]}, which this model lacks", "be of this model", cure)
    with torch.no_grad():
        for name in needed:
            ours[name].copy_(given[name])


def weights_of(run: str | Path, world: World) -> dict[str, Tensor]:
    """Weights and persistent buffers of a run by the bare model's names, on the CPU; of what ranks held apart, the mean.

    Args:
        run: the folder of a recipe's run (its newest good checkpoint, else its model.safetensors), a folder of checkpoints as
            `Trainer` has it, one checkpoint, or a .safetensors file.

    Raises:
        ValueError, CheckpointMismatch: as `begin_from`.
    """
    path = Path(run)
    if path.is_dir():
        places = [path / "checkpoints", path]
        kept = checkpoint.open(path) if (path / "manifest.json").is_file() else None
        for place in places if kept is None else ():
            kept = kept or (checkpoint.latest(place, world=world) if place.is_dir() else None)
        if kept is not None:
            return _bare(_of_checkpoint(kept))
        path = path / "model.safetensors"
    check(path.is_file(), "init", f"{str(run)!r} holds neither checkpoints nor weights",
          "be the folder of a run, one of its checkpoints or a .safetensors file")
    try:
        return _bare(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"init: {str(path)!r} cannot be read ({error}), must be a .safetensors file") from error


def _of_checkpoint(kept: Checkpoint) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    buffers: dict[str, list[Tensor]] = {}
    for key in kept.names():
        kind, _, name = key.partition("/")
        if kind in ("master", "frozen"):
            found[name] = kept.whole(key)
        elif kind == "buffer":
            buffers.setdefault(name.partition("/")[2], []).append(kept.whole(key))
    for name, values in buffers.items():
        apart = len(values) > 1 and values[0].is_floating_point()
        found[name] = torch.stack([v.float() for v in values]).mean(0).to(values[0].dtype) if apart else values[0]
    return found


def _bare(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the second batch norms that adversarial training adds; the first are the ones that are evaluated."""
    return {name: value for name, value in found.items() if f".branches.{BRANCH}." not in f".{name}"}
