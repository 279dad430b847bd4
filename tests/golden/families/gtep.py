"""`gtep_*`: the configurations that a published search draws, its class orders and the sizes of its tasks."""

from __future__ import annotations

import json
import re

import numpy as np
import torch

from everbatch.data import TensorSource, class_incremental, pilot_increments
from everbatch.tune.spaces import draw, gtep
from golden.comparison import Comparison, FormatError, Vectors

__all__ = ["check"]

NAMES = {"trainer.epochs": "epochs", "trainer.schedule.milestones": "milestones", "optimizer.lr": "lrate",
         "trainer.schedule.factor": "lrate_decay", "trainer.batch_size": "batch_size", "optimizer.weight_decay": "weight_decay",
         "trainer.schedule.kind": "scheduler"}
"""Our paths and the published names of the same options."""
WORDS = {"steps": "steplr"}


def check(file: Vectors, compare: Comparison) -> None:
    """Every list of configurations, every order, every division."""
    lists = [key for key in file.arrays if key.endswith("/trials_json")]
    if not lists:
        raise FormatError("no configurations: keys are like replay/trials_json")
    for key in lists:
        _configurations(key, file, compare)
    for key in [key for key in file.arrays if key.startswith("class_order/")]:
        _, classes, seed = key.split("/")
        order = _order(int(classes.removeprefix("n")), int(seed.removeprefix("seed")))
        compare.close(key, order, file[key])
    for key in [key for key in file.arrays if key.startswith("increments/")]:
        found = {name: int(number) for name, number in re.findall(r"(init|inc|n)(\d+)", key)}
        compare.close(key, np.array(pilot_increments(found["n"], found["init"], found["inc"])), file[key])


def _configurations(key: str, file: Vectors, compare: Comparison) -> None:
    """Drawn with seed 0, which is the published generator; numbers and words in the order of their names."""
    algorithm = key.split("/")[0]
    space = gtep(algorithm)
    for row in json.loads(str(file[key])):
        drawn = {NAMES.get(path, path): value for path, value in draw(space, 0, row["trial"]).items()}
        drawn = {name: WORDS.get(value, value) if isinstance(value, str) else value for name, value in drawn.items()}
        want = row["config"]
        if sorted(drawn) != sorted(want):
            raise FormatError(f"{key}: options {sorted(want)}, we draw {sorted(drawn)}")
        equal = np.array([drawn[name] == want[name] for name in sorted(want)], dtype=np.int64)
        compare.close(f"{key}/{row['trial']}", equal, np.ones_like(equal))


def _order(classes: int, seed: int) -> np.ndarray:  # type: ignore[type-arg]
    """Source classes in the order in which a stream shows them."""
    labels = torch.arange(classes)
    source = TensorSource(torch.zeros(classes, 1), labels, classes=tuple(map(str, range(classes))))
    stream = class_incremental(source, source, increments=[1] * classes, seed=seed)
    return np.array([int(name) for name in stream.classes], dtype=np.int64)
