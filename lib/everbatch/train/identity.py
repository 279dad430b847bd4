"""What makes a run the continuation of another: what must be equal, and what may be changed on the way and is said."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from everbatch.checkpoint.manifest import json_problem
from everbatch.contract import base_of, parts_of
from everbatch.data import Loader, Stream, Task
from everbatch.data.sources import digest, target_bytes
from everbatch.data.tasks import manner
from everbatch.errors import CheckpointMismatch, check
from everbatch.problems import Classification
from everbatch.train.step import Stepper

__all__ = ["changes", "check_plain", "described", "identity", "known", "parts", "steps_per_epoch"]

FREE = ("keep_last", "checkpoint_every", "workers", "eval_batch", "accumulation", "max_bad_steps",
        "compile")
"""Options of the Trainer that change nothing of what a run computes, but for rounding."""
CHANGEABLE = {"lr": "learning rate", "trainer.schedule": "schedule", "trainer.epochs": "epochs"}
"""What a resumed run may have otherwise, and what it is called when that is said."""


def identity(trainer: Stepper) -> dict[str, Any]:
    """The configuration, stream, classes and their options, flat: what is compared when a run resumes."""
    check_plain(trainer.identity)
    config = {k: v for k, v in dataclasses.asdict(trainer.config).items() if k not in FREE}
    mixins = {part.__name__: _binding(part, c) for part, c in getattr(trainer, "configs", {}).items()}
    optimizer = {part.__name__: repr(c) for part, c in trainer.optimizer.configs.items()}
    base = base_of(type(trainer.optimizer))
    assert trainer.run.stream is not None and base is not None
    classes = [[p.__name__ for p in parts_of(type(trainer))], [p.__name__ for p in (*parts_of(type(trainer.optimizer)), base)]]
    begun = trainer.begun
    values = {"trainer": config, "mixins": mixins, "optimizer": optimizer | begun.options, "classes": classes,
              "lr": begun.rates, "stream": known(trainer)[0], "identity": trainer.identity,
              "frozen": begun.frozen}
    if begun.evaluation:  # older checkpoints, all of models in training mode, say nothing
        values["evaluation"] = begun.evaluation
    default = Classification(label_smoothing=trainer.config.label_smoothing)
    if trainer.problem != default:  # older checkpoints, all of it, say nothing
        values["problem"] = repr(trainer.problem)
    flat = {f"{a}.{b}": v for a, inner in values.items() if isinstance(inner, dict) for b, v in inner.items()}
    return {k: _jsonable(v) for k, v in {**flat, **{k: v for k, v in values.items() if not isinstance(v, dict)}}.items()}


def known(trainer: Stepper) -> tuple[str, dict[str, Any]]:
    """The fingerprint and the description of the run's stream, made once in a run: each looks at every source."""
    run, stream = trainer.run, trainer.run.stream
    assert stream is not None
    if run.hashed is None:
        run.hashed = stream.fingerprint(), described(stream)
    return run.hashed


def described(stream: Stream) -> dict[str, Any]:
    """A stream in words, beside its hash: so that a difference can be named."""
    tasks = [[task.name, list(task.classes), len(task.train_ids), len(task.test_ids)] for task in stream.tasks]
    return {"kind": manner(stream), "classes": list(stream.classes), "tasks": tasks, "train": stream.train.name,
            "test": stream.test.name, "samples": {
                f"{part} samples": [digest(target_bytes(source.targets)), source.fingerprint()]
                for part, source in (("training", stream.train), ("test", stream.test))}}


def changes(trainer: Stepper, meta: Mapping[str, Any], path: Any) -> list[str]:
    """What the run changes against a checkpoint, in words; empty where nothing is.

    Raises:
        CheckpointMismatch: what would make it another method or another order of data, by name.
    """
    ours, theirs = identity(trainer), {k: v for k, v in meta["identity"].items() if k.removeprefix("trainer.") not in FREE}
    differs = [k for k in {**ours, **theirs} if not _same(ours.get(k), theirs.get(k))]
    stream, done = trainer.run.stream, meta["trainer"]
    assert stream is not None
    words = _stream_words(meta.get("stream"), stream) if "stream" in differs else ""
    refused = [k for k in differs if k not in CHANGEABLE and k != "stream"]
    if words and not refused:
        raise CheckpointMismatch(f"checkpoint {path}: made with another stream: {words}; repeat the configuration, or use "
                                 "another folder")
    problem = ""
    if "trainer.epochs" in differs:
        problem = _epochs_problem(trainer, done, theirs.get("trainer.epochs"))
        refused = ["trainer.epochs", *refused] if problem else refused
    if refused:
        # The seed decides the class order, and is what a person changed: the option comes first.
        problem = f"also another stream: {words}" if words else problem
        k, more = refused[0], ", ".join(refused[1:6]) + ", ..." * (len(refused) > 6)
        raise CheckpointMismatch(f"checkpoint {path}: made with {k}={theirs.get(k)!r}, this run has {ours.get(k)!r}"
                                 + (f" (and {more} differ)" if more else "") + (f": {problem}" if problem else "")
                                 + "; repeat the configuration, or use another folder")
    if done["task_index"] == len(stream) and "trainer.epochs" not in differs:
        return []  # finished: there is nothing left that a rate could change
    return [f"{CHANGEABLE[k]} {_difference(theirs.get(k), ours.get(k))} from step {done['step']} on" for k in differs]


def steps_per_epoch(trainer: Stepper, task: Task) -> int:
    """Steps that the trainer makes of one pass over a task."""
    assert trainer.run.stream is not None
    return Loader(trainer.run.stream, task, trainer.config.batch_size, 1, trainer.config.seed, trainer.world).steps_per_epoch


def _epochs_problem(trainer: Stepper, done: Mapping[str, Any], before: Any) -> str:
    """Why the epochs may not change, or "": they may in an unfinished task, and after the task of a one-task run."""
    stream = trainer.run.stream
    assert stream is not None
    if type(before) is not int or before < 1:
        return "the checkpoint's is no number of epochs"
    finished = done["task_index"] == len(stream)
    if finished and len(stream) > 1:
        return f"all {len(stream)} tasks are finished, and only a run of one task can be prolonged after its end"
    per_epoch = steps_per_epoch(trainer, stream.tasks[0 if finished else done["task_index"]])
    steps = before * per_epoch if finished else done["task_step"]
    if trainer.config.epochs * per_epoch < steps or (finished and trainer.config.epochs <= before):
        return f"the task has had {steps} steps, more than {trainer.config.epochs} epochs of {per_epoch} have"
    ended = [part.__name__ for part in parts_of(type(trainer)) if {"consolidate", "on_task_end"} & set(vars(part))]
    ended += [part.__name__ for part in parts_of(type(trainer.optimizer)) if "at_task_end" in vars(part)]
    if finished and ended:
        return f"{', '.join(ended)} acted at the end of the task, which cannot be undone"
    return ""


def _stream_words(theirs: Any, stream: Stream) -> str:
    """What differs between two streams, the first thing of it that a person would name."""
    ours = described(stream)
    if not isinstance(theirs, dict) or theirs.keys() != ours.keys():
        return "other samples, class order or tasks"
    if theirs["kind"] != ours["kind"]:
        return f"its kind is {theirs['kind']!r} there, {ours['kind']!r} here"
    if len(theirs["tasks"]) != len(ours["tasks"]):
        return f"{len(theirs['tasks'])} tasks there, {len(ours['tasks'])} here"
    if theirs["classes"] != ours["classes"]:
        same_set = sorted(map(str, theirs["classes"])) == sorted(ours["classes"])
        return f"the {'class order' if same_set else 'classes'} {_short(theirs['classes'])} there, {_short(ours['classes'])} here"
    for k, (there, here) in enumerate(zip(theirs["tasks"], _jsonable(ours["tasks"]), strict=True)):
        if there[1] != here[1]:
            return f"task {k} has classes {_short(there[1])} there, {_short(here[1])} here"
        for i, part in ((2, "training"), (3, "test")):
            if there[i] != here[i]:
                return f"task {k} ({here[0]}) has {there[i]} {part} samples there, {here[i]} here"
    what = [f"{part} have other labels or come in another order" if there[0] != here[0]
            else f"{part} differ in name, size or content" for part, here in ours["samples"].items()
            if (there := theirs["samples"].get(part)) != here]
    words = f"the {' and the '.join(what)}" if what else "the samples are dealt out otherwise"
    sources = f"{theirs['train']} and {theirs['test']} there, {ours['train']} and {ours['test']} here"
    return f"the same tasks and class order, but other samples, or samples in another order: {words} ({sources})"


def _short(values: list[Any]) -> str:
    return f"[{', '.join(map(str, values[:8]))}{', ...' if len(values) > 8 else ''}]"


def _difference(there: Any, here: Any) -> str:
    """A change in words; of options by name only those that differ, of equal entries of a list one."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = [k for k in {**there, **here} if not _same(there.get(k), here.get(k))]
        return ", ".join(f"{k} {there.get(k)!r} -> {here.get(k)!r}" for k in names)
    if isinstance(there, list) and isinstance(here, list) and len({*map(repr, there)}) == len({*map(repr, here)}) == 1:
        there, here = there[0], here[0]
    return f"{there!r} -> {here!r}"


def check_plain(identity: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless a checkpoint can hold what the caller of `Trainer` names."""
    for name, value in identity.items():
        check(json_problem(_jsonable(value), name) is None, "Trainer", f"identity[{name!r}]={value!r}",
              "be made of numbers, texts, lists and dicts", "give its text, or numbers that tell it from others")


PLAIN = (bool, int, float, str, type(None))


def parts(trainer: Stepper, optimizer: Any) -> dict[str, Any]:
    """Classes and plain options of a trainer's mixins and of its optimizer: ranks that differ there would wait for each other."""
    if not isinstance(optimizer, functools.partial) or not isinstance(optimizer.func, type):
        return {}  # refused by name later on
    cls: Any = optimizer.func
    options = dict(optimizer.keywords)
    plain = {f"optimizer.{k}": v for k, v in options.items() if k != "lr" and isinstance(v, PLAIN)}
    mixins = {f"mixins.{part.__name__}": _binding(part, c) for part, c in getattr(trainer, "configs", {}).items()}
    names = [[p.__name__ for p in parts_of(type(trainer))], [p.__name__ for p in (*parts_of(cls), cls)]]
    return {"classes": names, **mixins, **plain}


def _binding(part: type, config: Any) -> str:
    """The options of a mixin that decide what a run gives: all but those it calls free."""
    unbound = getattr(part, "free", ())
    return repr({k: v for k, v in vars(config).items() if k not in unbound}) if unbound else repr(config)


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; NaN is to itself here."""
    return bool(one == other) or json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    return [_jsonable(v) for v in value] if isinstance(value, tuple | list) else value
