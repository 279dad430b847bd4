"""The trainer's state as a checkpoint, and back, at the same world size or another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from everbatch import checkpoint, seeds
from everbatch.checkpoint import Checkpoint, Piece
from everbatch.checkpoint import folder as runs
from everbatch.distributed import World
from everbatch.engines.frozen import frozen_as_in, frozen_of, set_frozen
from everbatch.engines.local import LocalHost
from everbatch.engines.nonfinite import nonfinite_weights
from everbatch.errors import CheckpointMismatch, check
from everbatch.optim import state as optimizer_state
from everbatch.optim.state_checks import like
from everbatch.train.buffers import buffer_pieces, check_buffers, load_buffers, vacant
from everbatch.train.growth import wanted_growths
from everbatch.train.identity import changes, check_plain, identity, known, parts, steps_per_epoch
from everbatch.train.modes import in_evaluation, put_into_evaluation
from everbatch.train.relaunch import replay
from everbatch.train.step import Stepper

__all__ = ["agree", "check_plain", "identity", "layout", "load", "newest", "parts", "save", "set_aside"]

LAYOUT = 2
"""Of what a trainer puts into a checkpoint. 1 held buffers that are not persistent as well, and no description of the stream."""


def save(trainer: Stepper) -> None:
    """Write a checkpoint of the present step boundary. Collective.

    Raises:
        RuntimeError: on every rank, when a weight is not finite, naming it; nothing is written then.
    """
    _refuse_nonfinite(trainer)
    pieces, meta = optimizer_state.pieces(trainer.optimizer)
    pieces += buffer_pieces(trainer.module, trainer.world.rank)
    for name, value in frozen_of(trainer.module).items():
        pieces += [Piece(f"frozen/{name}", tuple(value.shape), 0, value)] if trainer.world.rank == 0 else []
    plain: dict[str, Any] = {}
    for key, _, _, value in _mixin_fields(trainer):
        if hasattr(value, "state_dict"):
            saved, plain[key] = _store_pieces(key, value.state_dict(), trainer.world.rank)
            pieces += saved
        elif isinstance(value, Tensor):
            pieces += [Piece(key, tuple(value.shape), 0, value)] if trainer.world.rank == 0 else []
        elif _of_tensors(value):
            plain[key] = {"tensors": sorted(value)}
            pieces += [Piece(f"{key}/{n}", tuple(t.shape), 0, t) for n, t in value.items() if trainer.world.rank == 0]
        else:
            plain[key] = value
    run, stream = trainer.run, trainer.run.stream
    assert trainer.folder is not None and stream is not None
    counters = {"step": trainer.step, "task_index": run.task_index, "task_step": run.task_step,
                "bad_steps": run.bad_steps, "matrix": run.matrix, "mixins": plain, "changes": run.changes,
                "evaluation": in_evaluation(trainer.module)}
    if run.scores != _of_accuracies(run.matrix):
        counters["scores"] = run.scores
    more: dict[str, Any] = {}
    if trainer.growth.done:
        more["growths"] = {"done": trainer.growth.done, "born": trainer.growth.born}
    given_up = vacant(trainer.module)
    if given_up:
        more["vacant"] = given_up
    everything = {**more, "optimizer": meta, "trainer": counters, "identity": identity(trainer), "layout": LAYOUT,
                  "stream": known(trainer)[1], "seconds": run.seconds}
    checkpoint.save(trainer.folder, trainer.step, pieces, everything, world=trainer.world, keep_last=trainer.config.keep_last,
                    healthy=run.bad_steps == 0)


def _of_accuracies(matrix: Sequence[Sequence[float]]) -> list[list[dict[str, float]]]:
    """The scores of a classification, which its matrix says already."""
    return [[{"accuracy": value} for value in row if value == value] for row in matrix]


def _refuse_nonfinite(trainer: Stepper) -> None:
    """Weights that are not finite are the end of a run, and must not become what it is resumed from."""
    found: list[Any] = trainer.world.gather(nonfinite_weights(trainer.optimizer.host)[:5])
    if any(found):
        names = list(dict.fromkeys(name for theirs in found for name in theirs))[:5]
        raise RuntimeError(f"Trainer: after step {trainer.step - 1} weights {names} are not finite, so no checkpoint was "
                           "written; lower the learning rate or look at the data, and go on from the last checkpoint with "
                           "resume=true")


def newest(trainer: Stepper) -> Checkpoint | None:
    """The checkpoint to go on from, or None; says so where a run ended in skipped steps and goes on from before them."""
    assert trainer.folder is not None
    kept = checkpoint.latest(trainer.folder, world=trainer.world)
    if trainer.world.rank == 0:
        beyond = [step for step in checkpoint.failed(trainer.folder) if kept is None or step > kept.step]
        if beyond:
            start = "no checkpoint before it is healthy, so it begins anew" if kept is None else (
                f"it goes on from step {kept.step}, the last checkpoint whose steps were healthy")
            say(trainer, f"the run in {trainer.folder} ended by too many skipped steps, after step {beyond[-1]}: {start}")
    return kept


def say(trainer: Stepper, text: str) -> None:
    """Print a line on rank 0, above the bar of a recorder where there is one."""
    if trainer.recorder is not None:
        trainer.recorder.say(text)
    elif trainer.world.rank == 0:
        print(f"Trainer: {text}", flush=True)


def load(trainer: Stepper, kept: Checkpoint) -> None:
    """Restore a checkpoint: bit for bit at the same world size.

    Another world size or ZeRO stage gets the same weights, moments, mixin state and memory; buffers that differed by rank become
    their mean, and the order of samples follows the new number of ranks only where a batch is divided among them. Parameters that
    the run had frozen or unfrozen by then are so again, but on DeepSpeed, which trains what was trained when it was built.
    What may differ (`identity.changes`) is said, and kept in `trainer.changes`. Of a run whose model has grown, the growths are
    repeated first: engine and optimizer are new then.

    Raises:
        CheckpointMismatch: on every rank, another configuration, stream, class or frozen part, or entries of another kind than
            `save` writes, naming them; nothing is touched then.
    """
    for part in trainer.module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # after a forward the root stays gathered: in place of its parameters are copies
    with _agreed(trainer.world, kept):
        _check_counters(trainer, kept)
        new = changes(trainer, kept.meta, kept.path)
        growths, born = wanted_growths(kept.meta, kept.path)
    if growths != trainer.growth.done:
        with _as_mismatch(kept):
            replay(trainer, growths, born)
    with frozen_as_in(kept, trainer.module, change=isinstance(trainer.optimizer.host, LocalHost)):
        with _agreed(trainer.world, kept):
            optimizer_state.check_pieces(trainer.optimizer, kept, kept.meta["optimizer"])
            check_buffers(trainer.module, kept, trainer.world)
            _check_mixins(trainer, kept)
            _load_mixins(trainer, kept)  # these check what they hold themselves; they come before the first weight
        optimizer_state.load_pieces(trainer.optimizer, kept, kept.meta["optimizer"])
    saved = kept.meta["trainer"]
    load_buffers(trainer.module, kept, trainer.world)
    set_frozen(trainer.module, {n.removeprefix("frozen/"): kept.whole(n) for n in kept.names() if n.startswith("frozen/")})
    if "evaluation" in saved:
        put_into_evaluation(trainer.module, saved["evaluation"])
    run, stream = trainer.run, trainer.run.stream
    assert stream is not None
    trainer.step = saved["step"]
    run.task_index, run.task_step = saved["task_index"], saved["task_step"]
    run.earlier_seconds = float(kept.meta.get("seconds", 0.0))
    run.bad_steps, run.matrix = saved["bad_steps"], [list(row) for row in saved["matrix"]]
    scores = saved["scores"] if "scores" in saved else _of_accuracies(run.matrix)
    run.scores = [[dict(values) for values in row] for row in scores]
    if new and run.task_index == len(stream):  # a run of one task is prolonged: back into that task
        before = steps_per_epoch(trainer, stream.tasks[0]) * kept.meta["identity"]["trainer.epochs"]
        run.task_index, run.task_step, run.matrix, run.scores = 0, before, [], []
    if len(run.matrix) < len(stream) and kept.world_size != trainer.world.size:
        new.append(f"world_size {kept.world_size} -> {trainer.world.size} from step {trainer.step} on")
    run.changes = [*saved.get("changes", []), *new]
    for text in new:
        say(trainer, f"resumed with another {text}")


@contextmanager
def _agreed(world: World, kept: Checkpoint) -> Iterator[None]:
    """Raise on every rank what one rank finds; whatever a malformed entry raises is a mismatch as well. One gather."""
    problem: str | None = None
    try:
        yield
    except CheckpointMismatch as error:
        problem = str(error)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
        problem = f"checkpoint {kept.path}: its meta is not what a trainer writes: {type(error).__name__}: {error}"
    found = [text for text in world.gather(problem) if text is not None]
    if found:
        raise CheckpointMismatch(str(problem if problem is not None else found[0]))


@contextmanager
def _as_mismatch(kept: Checkpoint) -> Iterator[None]:
    """An error that all ranks raise, as one of the checkpoint."""
    try:
        yield
    except ValueError as error:
        raise CheckpointMismatch(f"checkpoint {kept.path}: {error}") from error


def _check_counters(trainer: Stepper, kept: Checkpoint) -> None:
    saved, stream = kept.meta["trainer"], trainer.run.stream
    assert stream is not None
    limits = {"step": kept.step, "task_index": len(stream), "task_step": kept.step, "bad_steps": kept.step}
    for name, most in limits.items():
        value = saved[name]
        if type(value) is not int or not 0 <= value <= most:
            raise CheckpointMismatch(f"checkpoint {kept.path}: trainer.{name} is {repr(value)[:80]}, must be an integer in "
                                     f"[0, {most}]")
    rows = saved["matrix"]
    good = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
    if not good or not all(type(a) in (int, float) for row in rows for a in row) or saved["task_index"] - len(rows) not in (0, 1):
        raise CheckpointMismatch(f"checkpoint {kept.path}: trainer.matrix is {repr(rows)[:80]}, must be a row of numbers for "
                                 f"each of {saved['task_index']} tasks, but for the last")
    like("Trainer", "seconds", kept.meta.get("seconds", 0.0), 0.0)
    texts = [*saved.get("changes", []), *saved.get("evaluation", [])]
    if not isinstance(kept.meta["identity"], dict) or not all(isinstance(text, str) for text in texts):
        raise CheckpointMismatch(f"checkpoint {kept.path}: identity must be a table, changes and evaluation lists of texts")


def _mixin_fields(trainer: Stepper) -> Iterator[tuple[str, Any, str, Any]]:
    """(key, state, field, value) of all that the trainer's mixins keep."""
    for part, state in getattr(trainer, "states", {}).items():
        for field in dataclasses.fields(state):
            yield f"{part.__name__}.{field.name}", state, field.name, getattr(state, field.name)


def _check_mixins(trainer: Stepper, kept: Checkpoint) -> None:
    saved, names = kept.meta["trainer"]["mixins"], set(kept.names())
    for key, state, field, value in _mixin_fields(trainer):
        if isinstance(value, Tensor):
            needed = [key]
        elif key not in saved:
            raise CheckpointMismatch(f"checkpoint {kept.path}: holds no {key}; it was written by another version of the mixin")
        elif hasattr(value, "load_state_dict"):
            needed = [f"{key}/index/{name}" for name in saved[key]["arrays"]]
            needed += [f"{key}/rows/{name}" for name in saved[key]["names"]]
            like("Trainer", f"{key}.numbers", saved[key]["numbers"], {})
        elif _names_tensors(saved[key]):
            like("Trainer", key, {}, value)
            needed = [f"{key}/{name}" for name in saved[key]["tensors"]]
        else:
            kinds = {f.name: str(f.type) for f in dataclasses.fields(state)}
            like("Trainer", key, saved[key], value, optional="None" in kinds[field])
            needed = []
        lacking = [name for name in needed if name not in names]
        if lacking:
            raise CheckpointMismatch(f"checkpoint {kept.path}: holds no tensors {lacking[:5]}, which its meta names")


def _load_mixins(trainer: Stepper, kept: Checkpoint) -> None:
    saved = kept.meta["trainer"]["mixins"]
    for key, state, field, value in _mixin_fields(trainer):
        if hasattr(value, "load_state_dict"):
            value.load_state_dict(_store_state(key, saved[key], kept))
        elif isinstance(value, Tensor):
            setattr(state, field, kept.whole(key))
        elif _names_tensors(saved[key]):
            setattr(state, field, {name: kept.whole(f"{key}/{name}") for name in saved[key]["tensors"]})
        else:
            setattr(state, field, saved[key])


def _of_tensors(value: Any) -> bool:
    """Whether a field holds tensors by name, the same on every rank, and at least one."""
    return isinstance(value, dict) and bool(value) and all(isinstance(t, Tensor) for t in value.values())


def _names_tensors(saved: Any) -> bool:
    """Whether this stands for such a field in a checkpoint."""
    return isinstance(saved, dict) and saved.keys() == {"tensors"} and isinstance(saved["tensors"], list)


def layout(model: nn.Module) -> str:
    """A short text of names and shapes of all parameters."""
    return f"layout {seeds.derive(*(f'{n} {tuple(p.shape)}' for n, p in model.named_parameters())):x}"


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
