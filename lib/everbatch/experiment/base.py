"""What every experiment is asked: its options, its stream, its mixins, and what it reports at the end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from everbatch.data import Stream
from everbatch.distributed import World
from everbatch.errors import check, check_whole
from everbatch.experiment.data import sample_of
from everbatch.experiment.job import Job
from everbatch.experiment.options import TRAINER_MIXINS, Parts, check_together, unused_together
from everbatch.report.recorder import Recorder
from everbatch.train import Trainer
from everbatch.train.adversarial import Role, serve, split_ranks

__all__ = ["Experiment", "Finished", "Result"]

SETTINGS = ("steps", "skipped_steps", "seed", "world_size", "seconds", "versions", "configuration")
"""What at the top of result.json says how a run was made, not what came of it."""
SECONDS = ("seconds", "evaluation_seconds", "measuring_seconds")
COUNTS = ("adapters", "points", "evaluated_samples")


def is_share(headline: str) -> bool:
    """Whether a headline number is one in [0, 1], as those that a recipe reports itself are, but for counts."""
    part, _, name = headline.rpartition(".")
    return (part in ("", "evaluation") and name not in COUNTS) or headline == "plasticity.final_dormant_units"


def _numbers(values: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: value for name, value in values.items() if value is None or type(value) in (int, float)}


@dataclass(frozen=True, kw_only=True)
class Experiment(Parts):
    """Options that every run has. A subclass adds its own, and says what stream it trains on and what it reports.

    `everbatch.experiment.run` runs one; `everbatch.experiment.main` makes a script of it.
    """

    title: ClassVar[str] = "experiment"
    """What messages begin with."""
    shares_folder: ClassVar[bool] = True
    """Whether every rank must see the output folder, as checkpoints want."""
    grows: ClassVar[bool] = False
    """Whether its tasks bring classes, for which a head may grow."""
    repeats_itself: ClassVar[bool] = False
    """Whether `conduct` runs all `seeds` itself."""

    output: str = "runs/experiment"
    """Folder of this run: model.safetensors, result.json, config.yaml, figures, TensorBoard, checkpoints."""
    init: str | None = None
    """Begin a new run with the weights of another: its folder, one of its checkpoints, or a .safetensors file."""
    resume: bool = False
    """Go on from the newest good checkpoint in the output folder; workers that torchrun restarts do so anyway."""
    seeds: int = 1
    """Runs with this many seeds, from trainer.seed on, each in seeds/S of the output folder, and sums up their numbers: mean,
    standard deviation and 95 % t interval, never a best run; >= 1. A seed that has ended is not run again by resume=true."""
    seeds_at_once: int = 1
    """Seeds that run side by side, each in a process of its own with a share of the cores and one of the GPUs; 1: in turn, as
    they must under torchrun; >= 1."""
    dry_run: bool = False
    """Print the resolved configuration and what a step costs, and stop. Opens the data, for its shape."""

    def __post_init__(self) -> None:
        check_together(self)
        check_whole(self.title, "seeds", self.seeds, 1)
        check_whole(self.title, "seeds_at_once", self.seeds_at_once, 1)
        last = self.trainer.seed + self.seeds - 1
        check(last < 2**32, self.title, f"seeds={self.seeds} from trainer.seed={self.trainer.seed}", "end below 2^32")
        check(self.grows or self.model.head == "fixed", self.title, f"model.head={self.model.head}", "be fixed",
              "only a class-incremental run has classes to come")
        part: Any
        for key, part in TRAINER_MIXINS.items():
            config = getattr(self, key)
            for name, source in part.from_data.items() if config is not None else ():
                allowed = [getattr(part.Config(), name), *([getattr(self.data, source)] if source else [])]
                check(getattr(config, name) in allowed, self.title, f"{key}.{name}={getattr(config, name)}", "be left out",
                      f"it follows data.{source.removesuffix('s')}" if source else "the trainer knows it")

    def unused(self) -> dict[str, str]:
        """Options without an effect beside the others, and why; `everbatch.config.parse` refuses them where a user gives them."""
        found = unused_together(self)
        if self.seeds == 1:
            found["seeds_at_once"] = "there is one seed"
        return found

    # ------------------------------------------------------------------------------------------------ what a subclass says
    def conduct(self, job: Job) -> Result | None:
        """An experiment that is more than one training does all of it here; None: train once on `stream`, and report."""
        return None

    def stream(self) -> Stream:
        """The stream to train on, the same on every rank. No collective."""
        raise NotImplementedError(f"{type(self).__name__}.stream() is not there, must return the stream to train on")

    def check_stream(self, stream: Stream, world: World) -> None:
        """Refuse options that do not go with the stream, the same on every rank."""

    def settled(self) -> Experiment:
        """The same options with what follows from others written out: what config.yaml and result.json hold."""
        return self

    def trainer_config(self, world: World) -> Trainer.Config:
        """What the trainer is given, where it follows from other options too."""
        config: Trainer.Config = self.trainer
        return config

    @property
    def peak_lr(self) -> float:
        """The highest learning rate of the schedule."""
        return float(self.optimizer.lr)

    def more_mixins(self, world: World) -> dict[type, Any]:
        """Trainer mixins to the left of those that options name, and the options of each."""
        return {}

    def heading(self, world: World) -> str:
        """A line to say before training; "" for none."""
        return ""

    def set_aside(self) -> Role | None:
        """This rank's role, where the last ranks of a launch craft adversarial samples; before anything joins a process group."""
        if self.conadv is None or self.conadv.placement != "ranks":
            return None
        check("WORLD_SIZE" in os.environ, self.title, "conadv.placement=ranks in one process", "be started by torchrun")
        return split_ranks(self.conadv.adversaries)

    def serve(self, role: Role) -> None:
        """Craft for the ranks that train."""
        stream = self.stream()
        sample = sample_of(stream)
        serve(role, self.model.build(sample, stream.num_classes, self.trainer.seed))

    def begun(self, model: nn.Module, stream: Stream, world: World) -> nn.Module:
        """The bare model, on the CPU, as a run begins with it: with what it has learned before. Not asked for a dry run.
        Collective."""
        return model

    def before(self, trainer: Trainer, stream: Stream) -> Any:
        """What is measured before the first step, for `finish`. Collective."""

    def finish(self, done: Finished) -> tuple[dict[str, Any], list[str]]:
        """Evaluate, draw, export what this experiment has beside the others. Collective.

        Returns:
            What result.json holds of it, and the lines to print.
        """
        return {}, []

    def headlines(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        """The numbers of a run that are summed up over seeds, from what its result.json holds; None where it has none.

        Without an answer of its own: every number that `finish` gave at the top, those one level below (what mixins report, say
        `evaluation.min_accuracy`), and the seconds.
        """
        found = _numbers({name: value for name, value in values.items() if name not in SETTINGS})
        return {**found, **self.reported(values), "seconds": values.get("seconds")}

    def reported(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        """Numbers one level below the top of a result.json, by dotted names."""
        parts = {name: part for name, part in values.items() if isinstance(part, Mapping) and name not in SETTINGS}
        return {f"{name}.{key}": value for name, part in parts.items() for key, value in _numbers(part).items()}

    def unit_of(self, headline: str) -> str:
        """What a headline number is told in: "%" for a share, which is told in percent; "" for none."""
        return "s" if headline.rpartition(".")[2] in SECONDS else ""


@dataclass(frozen=True)
class Finished:
    """A run whose training has ended."""

    trainer: Trainer
    stream: Stream
    matrix: list[list[float]]
    before: Any
    """What `Experiment.before` gave."""
    sample: Tensor
    """One sample as the source gives it."""
    folder: Path
    recorder: Recorder
    world: World


@dataclass(frozen=True)
class Result:
    """What a run gave; the same on every rank."""

    values: dict[str, Any]
    """What result.json holds; empty for a dry run and for one that was stopped."""
    folder: Path
    steps: int
    """Steps taken so far, by this run and those it went on from."""
    stop_sign: int = 0
    """The signal that stopped it, with a checkpoint in the folder; 0 for none."""
    unchanged: bool = False
    """Whether the run in the folder had ended before: nothing was done, `values` are those of the file."""
