"""What is done of a comparison: a file for each arm under each seed, so that none is run twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from everbatch.checkpoint import folder as runs
from everbatch.config.layers import dump, resolved
from everbatch.config.strict_yaml import load_file
from everbatch.errors import check
from everbatch.experiment.job import Job
from everbatch.experiment.repeat import compared, went_on
from everbatch.experiment.side_by_side import side_by_side
from everbatch.report.recorder import write_json

__all__ = ["Units"]

Found = tuple[list[float], list[int], int]
"""Test accuracy by round, epochs to fit it, and steps."""


class Units:
    """Results by seed and arm in `seeds/` of a folder; makes the folder ready. Collective.

    Raises:
        ValueError: a folder to resume that holds a comparison with other options.
    """

    def __init__(self, options: Any, job: Job) -> None:
        self.job, self.options = job, options
        job.goes_on = went_on(job)
        if job.goes_on:
            runs.together(job.world, job.folder, lambda: None if job.world.rank else self._check_same())
        job.begin()
        runs.together(job.world, job.folder, lambda: None if job.world.rank else dump(options, job.folder / "config.yaml"))

    def kept(self, seed: int, arm: str) -> Found | None:
        """What an arm that has ended gave; None for one that is still to run. Collective."""
        found: Any = self.job.world.gather(self._read(seed, arm))[0]
        return found if found is None else (found["accuracy"], found["epochs"], found["steps"])

    def keep(self, seed: int, arm: str, accuracy: list[float], epochs: list[int], steps: int) -> Found:
        """Write what an arm gave, and give it back. Collective."""
        found = {"accuracy": accuracy, "epochs": epochs, "steps": steps}
        runs.together(self.job.world, self.job.folder,
                      lambda: None if self.job.world.rank else write_json(self._path(seed, arm), found))
        return accuracy, epochs, steps

    def side_by_side(self) -> int:
        """Run every seed that is not done as a process of its own, and keep what its arms gave; the signal that stopped it, or 0.

        A seed's own folder is seeds/S; the first one's weights are this run's.
        """
        options, job = self.options, self.job
        assert job.recorder is not None and job.script is not None
        seeds = range(options.trainer.seed, options.trainer.seed + options.seeds)
        waiting = {seed: replace(
            options, seeds=1, seeds_at_once=1, resume=job.goes_on, output=str(job.folder / "seeds" / str(seed)),
            trainer=replace(options.trainer, seed=seed))
            for seed in seeds if any(self.kept(seed, arm) is None for arm in options.arms)}
        stop_sign = side_by_side(waiting, options.seeds_at_once, job.script, job.recorder.say, signals=job.signals)
        for seed in waiting if not stop_sign else ():
            home = job.folder / "seeds" / str(seed)
            for arm in options.arms:
                self.keep(seed, arm, **json.loads((home / "seeds" / f"{seed}-{arm}.json").read_text(encoding="utf-8")))
            if seed == seeds[0]:
                shutil.copyfile(home / "model.safetensors", job.folder / "model.safetensors")
        return stop_sign

    def _read(self, seed: int, arm: str) -> dict[str, Any] | None:
        if self.job.world.rank:
            return None
        try:
            found: dict[str, Any] = json.loads(self._path(seed, arm).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # as of a seed's results: what cannot be read is run again
            return None
        return found

    def _path(self, seed: int, arm: str) -> Path:
        return self.job.folder / "seeds" / f"{seed}-{arm}.json"

    def _check_same(self) -> None:
        kept, now = (compared(options) for options in (load_file(self.job.folder / "config.yaml"), resolved(self.options)))
        other = [name for name in now if now[name] != kept.get(name)]
        check(not other, self.options.title, f"resume=true with another {', '.join(other)} than in {self.job.folder}",
              "repeat what it began with", f"see {self.job.folder / 'config.yaml'}, or give this one another folder")
