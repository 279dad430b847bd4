"""One run in its output folder: agreed on by all ranks, alone in the folder, stopped and resumed with a word."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from everbatch.checkpoint import folder as runs
from everbatch.config.layers import dump, resolved
from everbatch.data import Stream
from everbatch.distributed import World
from everbatch.report.recorder import Recorder
from everbatch.train import persist
from everbatch.train.begin import begin_from
from everbatch.train.signals import Interrupted
from everbatch.train.trainer import Trainer

__all__ = ["Job", "recorded", "restarted", "resumable", "would_refuse"]

COMPARED_BY_TRAINER = ("data", "model", "optimizer", "engine", "trainer")


def would_refuse(trainer: Trainer, stream: Stream) -> str:
    """For a dry run: a line with what `Trainer.fit` would say of these data and options before its first step; or nothing."""
    try:
        trainer.validate(stream)
    except ValueError as error:
        return f"\nthe run itself would be refused: {error}"
    return ""


class Job:
    """What a recipe does around `Trainer.fit`. Make one with `Job.of`, on every rank, right after `init`.

    Attributes:
        recorder: None for a dry run.
        checkpoints: folder for `Trainer`; None for a dry run.
        resume: whether to go on from a checkpoint: asked for, or started again by a launcher, on any rank.
        goes_on: whether there is one.
        script: what starts these options anew as a process of its own; None in a process without one.
        signals: whether a signal asks for a checkpoint.
    """

    script: Path | None = None
    signals: bool = False

    def __init__(self, options: Any, world: World) -> None:
        self.options, self.world, self.folder = options, world, Path(options.output)
        self.resume = bool(getattr(options, "resume", False)) or not world.all(not restarted())
        self.recorder = None if options.dry_run else Recorder(self.folder, world.rank)
        self.checkpoints = None if options.dry_run else self.folder / "checkpoints"
        there = self.resume and resumable(self.folder) and not runs.half_moved(self.folder)
        self.goes_on = bool(world.gather(there)[0])

    @classmethod
    @contextmanager
    def of(cls, options: Any, world: World, *, shared: bool = True) -> Iterator[Job]:
        """Agree on what steers the run, and own its folder inside the block.

        Raises:
            ValueError: on every rank: options that differ, another run in the folder, a folder that cannot be written.
        """
        given = {key: value for key, value in resolved(options).items() if key not in COMPARED_BY_TRAINER}
        persist.agree(world, given, "options")
        if options.dry_run:
            yield cls(options, world)
            return
        with runs.claimed(options.output, world, shared=shared):
            yield cls(options, world)

    def start(self, model: nn.Module) -> nn.Module:
        """The bare model as this run begins with it: with the weights of `init`, where a new run names one. Collective."""
        if self.options.init is not None and not self.goes_on:
            begin_from(model, self.options.init, self.world)
            if self.recorder is not None:
                self.recorder.say(f"begins with the weights of {self.options.init}")
        return model

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must repeat of how this one began."""
        return {} if self.options.init is None else {"init": self.options.init}

    def begin(self) -> None:
        """Make the folder ready: where the run does not go on from a checkpoint there, everything of an earlier run is moved to
        previous/N. Everything is tried for writing. Collective."""
        runs.together(self.world, self.folder, self._ready)
        runs.try_writing(self.folder, self.world, checkpoints=self.checkpoints is not None)

    def _ready(self) -> None:
        moved = None if self.goes_on or self.world.rank else runs.set_aside(self.folder)
        assert self.recorder is not None
        if moved is not None:
            self.recorder.say(f"what an earlier run left in {self.folder} is in {moved} now")
        if self.resume and not self.goes_on:
            self.recorder.say(f"nothing to resume in {self.folder}: this run begins anew")

    def fit(self, trainer: Trainer, stream: Stream) -> list[list[float]] | None:
        """`Trainer.fit` in the folder. None where nothing was left to do: the run had ended, and its results are untouched; or
        where a signal stopped it (`trainer.stopped`), with a checkpoint and a line that says so."""
        trainer.validate(stream)
        self.begin()
        assert self.recorder is not None
        first = self.world.rank == 0
        with recorded(self.options, self.folder / "config.yaml", resume=self.goes_on, write=first) as kept:
            try:
                trainer.tells_end = False  # told below, once it is known whether the results are there
                matrix = trainer.fit(stream, resume=self.goes_on)
            except Interrupted:
                matrix = trainer.matrix
            if trainer.had_ended and self.results().get("steps") == trainer.step:
                kept.unchanged = True
            elif trainer.had_ended:
                self.recorder.say(f"the training is finished, after {trainer.step} steps; only its results are written")
        if trainer.stopped:
            who = "Ctrl-C" if trainer.stop_sign == signal.SIGINT else "a signal"
            self.recorder.say(f"stopped by {who} after step {trainer.step}; a checkpoint was written; go on with resume=true")
            return None
        if kept.unchanged:
            self.recorder.say(f"this run has ended already: nothing was done or written after its "
                              f"{trainer.step} steps; see {self.folder / 'result.json'}")
            return None
        return matrix

    def results(self) -> dict[str, Any]:
        """What result.json in the folder holds, on every rank; nothing where there is none that can be read. Collective."""
        def read() -> dict[str, Any]:
            try:
                found = json.loads((self.folder / "result.json").read_text()) if self.world.rank == 0 else {}
            except (OSError, ValueError):
                found = {}
            return found if isinstance(found, dict) else {}

        found: Any = self.world.gather(read())[0]
        return dict(found)

    def close(self, trainer: Trainer | None = None) -> None:
        """Close the recorder, and end what works for the trainer."""
        if self.recorder is not None:
            self.recorder.close()
        if trainer is not None and hasattr(trainer, "close"):
            trainer.close()


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
