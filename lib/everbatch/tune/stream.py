"""One stream: an experiment that a trial runs, and the unit that comes of it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from everbatch import config
from everbatch.checkpoint.folder import FOLDERS
from everbatch.data import Stream, class_incremental
from everbatch.errors import CheckpointMismatch, check, check_whole
from everbatch.experiment import ClassIncremental, run
from everbatch.experiment.base import Finished
from everbatch.metrics import seen_accuracy
from everbatch.tune.ledger import canonical

__all__ = ["OWN", "SCENARIO", "StreamOfOrder", "built", "check_options", "failure", "flat", "plain_options", "unit"]

SCENARIO: dict[str, Any] = {"replay.capacity": 20, "trainer.epochs": 4, "trainer.batch_size": 32, "engine.kind": "plain"}
"""The default: what stays the same in both phases and for all methods."""
OWN = ("data.source", "data.sources", "data.columns", "data.download", "output", "init", "resume", "dry_run", "seeds",
       "seeds_at_once", "trainer.seed", "tasks", "scenario", "split", "increments", "model.init", "trainer.eval_future")
"""Options that the protocol sets itself; nothing else may say which samples a stream holds, or in which order they come."""
FILES = (".yaml", ".yml", ".json")
"""What a group of options would be read from."""


@dataclass(frozen=True, kw_only=True)
class StreamOfOrder(ClassIncremental):
    """A class-incremental run whose seed is its class order; it draws no figures, of which there would be hundreds."""

    title: ClassVar[str] = "tune"

    increments: tuple[int, ...] = ()
    """Classes of each task."""

    def stream(self) -> Stream:
        """Classes in the order of the seed, by numpy's legacy generator as in the published protocol."""
        train, test = self.data.open()
        return class_incremental(train, test, increments=list(self.increments), seed=self.trainer.seed)

    def finish(self, done: Finished) -> tuple[dict[str, Any], list[str]]:
        """Accuracy over all classes seen, after each task."""
        counts = [len(task.test_ids) for task in done.stream.tasks]
        return {"seen_accuracy": [float(a) for a in seen_accuracy(done.matrix, counts=counts)]}, []


def plain_options(options: Mapping[str, Any], who: str) -> dict[str, Any]:
    """Options by their path, as values that JSON can hold.

    Raises:
        ValueError: code, a file of options, or an option that the protocol sets, alone or in a group that holds it.
    """
    kept = {}
    for path, value in flat(options).items():
        name = path.replace("-", "_")
        inside = any(f"{name}.".startswith(f"{own}.") for own in OWN)
        holds = any(f"{own}.".startswith(f"{name}.") for own in OWN)
        check(not inside and not holds, who, f"{path}={value!r}", "be left out", "the protocol sets it")
        check(not (isinstance(value, str) and value.endswith(FILES)), who, f"{path}={value!r}", "be the options themselves",
              "what a file says may change, and no record holds it")
        check(_is_plain(value), who, f"{path}={value!r} of type {type(value).__name__}", "be a plain value",
              "trials take values, never functions or objects, so that none can hold data")
        kept[name] = list(value) if isinstance(value, tuple) else value
    return kept


def flat(tree: Mapping[str, Any], leaf: Callable[[Mapping[str, Any]], bool] = lambda value: not value) -> dict[str, Any]:
    """Nested options by their whole path. A mapping that is a `leaf` is a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and not leaf(value):
            found |= {f"{key}.{rest}": inner for rest, inner in flat(value, leaf).items()}
        else:
            found[str(key)] = value
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def built(options: Sequence[Mapping[str, Any]], increments: list[int], order: int, data: str, output: str) -> StreamOfOrder:
    """The experiment of a stream: options by path, later ones over earlier ones.

    Raises:
        ValueError: an unknown option, with the nearest; a value that the option does not take.
    """
    whole = {"increments": list(increments), "trainer.seed": order, "data.source": data, "output": output, "resume": True}
    return config.build(StreamOfOrder, *options, whole)


def check_options(options: Sequence[Mapping[str, Any]], increments: Sequence[int]) -> Mapping[str, str]:
    """Refuse options of a stream before it runs; what was looked at before in this process is not looked at again.

    Returns:
        Paths of the options that have no effect beside these, and why.

    Raises:
        ValueError: as `built`.
    """
    return _checked(canonical([list(options), list(increments)]))


@functools.lru_cache(maxsize=4096)
def _checked(text: bytes) -> Mapping[str, str]:
    options, increments = json.loads(text)
    return built(options, increments, 0, "digits", "").unused()


def unit(
    key: str, options: Sequence[Mapping[str, Any]], increments: list[int], order: int, data: str, folder: Path, ranks: int = 1,
) -> dict[str, Any]:
    """Train one stream in `folder`, or go on where an attempt before stopped; what came of it, as the ledger keeps it."""
    wall, busy = time.perf_counter(), time.process_time()
    about = {"key": key, "options": {path: v for layer in options for path, v in layer.items()}, "order": order}
    try:
        values = _resumed(built(options, increments, order, data, str(folder)))
        accuracies = values["seen_accuracy"]
        outcome = {"accuracies": accuracies, "avg_acc": sum(accuracies) / len(accuracies), "acc": accuracies[-1]}
    except Exception as error:  # whatever a configuration runs into: it is listed, and the search goes on
        outcome = failure(error)
    spent = {"seconds": round(time.perf_counter() - wall, 3), "cpu_seconds": round(time.process_time() - busy, 3)}
    return {**about, **outcome, **spent, "ranks": ranks}


def _resumed(options: StreamOfOrder) -> dict[str, Any]:
    """The values of a run; one whose checkpoints are another version's begins anew."""
    try:
        return run(options).values
    except CheckpointMismatch:
        for name in FOLDERS:
            shutil.rmtree(Path(options.output) / name, ignore_errors=True)
        return run(options).values


def failure(error: BaseException) -> dict[str, str]:
    """The kind and cause of a stream that failed."""
    text = " ".join(str(error).split())[:500]
    words = any(word in text.lower() for word in ("out of memory", "allocate memory"))
    memory = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or words
    diverged = "finite" in text or "diverged" in text
    kind = "out_of_memory" if memory else "diverged" if diverged else "error"
    return {"failed": kind, "cause": f"{type(error).__name__}: {text}" if text else type(error).__name__}


def take_threads(count: int) -> None:
    """As many threads as the trial was given."""
    import torch

    check_whole("tune", "threads", count, 1)
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)
