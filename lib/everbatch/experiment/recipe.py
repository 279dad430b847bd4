"""What recipes share: typed options for data, model, optimizer and engine, and how to build from them, report and fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everbatch.config.layers import dump
from everbatch.ends import guard
from everbatch.experiment.model import Factory, Model
from everbatch.experiment.options import (
    MEMORY,
    MIXINS,
    TRAINER_MIXINS,
    Data,
    Engine,
    Optimizer,
    Parts,
    check_together,
    learner,
    unused_together,
)

__all__ = ["MEMORY", "MIXINS", "TRAINER_MIXINS", "Data", "Engine", "Factory", "Model", "Optimizer", "Parts", "check_together",
           "guard", "learner", "recorded", "restarted", "unused_together"]


def restarted() -> bool:
    """Whether a launcher started this process again, or Slurm requeued its job."""
    return any(os.environ.get(name, "0") != "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


@dataclass
class Kept:
    """What `recorded` is told about a run."""

    unchanged: bool = False
    """Nothing was done, and nothing is to be written."""


@contextmanager
def recorded(options: Any, path: Path, *, resume: bool, write: bool) -> Iterator[Kept]:
    """Keep a run's configuration beside its results: written before the run, but where it resumes from one of the `checkpoints`
    beside it, after it, so that a refused one does not replace the configuration that must be repeated."""
    late, kept = resume and path.exists() and resumable(path.parent), Kept()
    if write and not late:
        dump(options, path)
    yield kept
    if write and late and not kept.unchanged:
        dump(options, path)


def resumable(folder: Path) -> bool:
    """Whether a run's folder holds a checkpoint."""
    return any(any((folder / "checkpoints").glob(f"{prefix}step-[0-9]*")) for prefix in ("", ".old-"))
