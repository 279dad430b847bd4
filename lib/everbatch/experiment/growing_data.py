"""Data that keep arriving: where each round of training starts, compared over seeds."""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from everbatch import config, seeds
from everbatch.checkpoint.folder import together
from everbatch.composition import compose
from everbatch.config.strict_yaml import dump_text
from everbatch.contract import base_of, parts_of
from everbatch.data import Source, Stream, TensorSource, growing
from everbatch.distributed import World
from everbatch.engines.release import release
from everbatch.errors import check, check_real, check_whole
from everbatch.experiment.base import Experiment, Result
from everbatch.experiment.data import Data, sample_of
from everbatch.experiment.growing_report import ARMS, gap, report, verdict
from everbatch.experiment.growing_units import Units
from everbatch.experiment.job import Job
from everbatch.experiment.options import learner
from everbatch.experiment.repeat import check_place, sum_up
from everbatch.nn import SmallConv
from everbatch.optim import ShrinkPerturb
from everbatch.report.plots import compare_curves
from everbatch.report.recorder import Recorder, versions
from everbatch.rows import one_tensor
from everbatch.train import StepRecord, Trainer, TrainerMixin, WarmStart
from everbatch.train.begin import begin_from

__all__ = ["GrowingData"]

KEPT = "this recipe writes no checkpoints"


@dataclass(frozen=True, kw_only=True)
class GrowingData(Experiment):
    """Options of this recipe."""

    title: ClassVar[str] = "growing_data"
    shares_folder: ClassVar[bool] = False
    repeats_itself: ClassVar[bool] = True

    trainer: Trainer.Config = field(default_factory=Trainer.Config, metadata={"idle": {
        "checkpoint_every": KEPT, "keep_last": KEPT, "eval_future": "all rounds are tested on the same samples",
        "eval_past": "all rounds are tested on the same samples"}})
    shrink: float = 0.4
    """Factor on the old weights; in [0, 1]."""
    perturb: float = 0.1
    """Factor on a fresh initialisation; >= 0."""
    arms: tuple[Literal["fresh", "warm", "shrink_perturb"], ...] = ("fresh", "warm", "shrink_perturb")
    """What is compared."""
    rounds: int = 2
    """Rounds of arriving data; >= 2."""
    first: float = 0.5
    """Share of the training samples that is there in the first round; in (0, 1). The rest comes in equal parts."""
    seeds: int = 5
    """Repetitions, each with its own network, order of arrival and order of batches; >= 1."""
    pixel_noise: float = 0.0
    """Standard deviation of noise put on each image once and for all, as a share of the pixel range: makes a small data set
    easy to memorise and hard to generalise from; >= 0. Loads the data set into memory."""
    width: int = 32
    """Channels of small_conv's first convolution; >= 1."""
    output: str = "runs/growing_data"
    """Folder of this run: result.json, config.yaml, the figure, model.safetensors (of the last arm and the first seed)."""
    resume: bool = False
    """Go on with what the folder holds: an arm that has ended under a seed is not run again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        who = "growing_data"
        check_whole(who, "rounds", self.rounds, 2)
        check_real(who, "first", self.first, 0.0, 1.0, open_low=True, open_high=True)
        check_real(who, "shrink", self.shrink, 0.0, 1.0)
        check_real(who, "perturb", self.perturb, 0.0)
        check_whole(who, "seeds", self.seeds, 1)
        check_real(who, "pixel_noise", self.pixel_noise, 0.0)
        check_whole(who, "width", self.width, 1, 2**16)
        check(bool(self.arms), who, "arms=()", "name at least one")
        check(len(set(self.arms)) == len(self.arms), who, f"arms={list(self.arms)}", "name each once")
        check(self.conadv is None or self.conadv.placement != "ranks", who, "conadv.placement=ranks",
              "be another", "every rank trains here")
        check(self.optimizer.shrink_perturb is None, who, "optimizer.shrink_perturb", "be null", "set shrink and perturb")

    def unused(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why."""
        found = super().unused()
        found.pop("warm_start", None)  # an arm of its own is called by it
        if self.model.name != "small_conv":
            found["width"] = "it is small_conv's"
        if "shrink_perturb" not in self.arms:
            found |= dict.fromkeys(("shrink", "perturb"), "arms has no shrink_perturb")
        return found

    def conduct(self, job: Job) -> Result:
        """Train every arm with every seed, compare."""
        if self.dry_run:
            if job.world.rank == 0:
                print(dump_text(config.resolved(self)))
            return Result({}, job.folder, 0)
        return compare(self, job)


class Fitted(TrainerMixin):
    """Counts the epochs of each round until an epoch's training accuracy is 99 %: the price of a start."""

    @dataclass
    class State:
        right: int = 0
        epoch: int = 0
        epochs: list[int] = field(default_factory=list)
        """By round; 0 while not reached."""

    def on_task_start(self, task: Any) -> None:
        super().on_task_start(task)  # type: ignore[misc]
        state = self.states[Fitted]
        state.right, state.epoch, state.epochs = 0, 0, [*state.epochs, 0]

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        state, batch = self.states[Fitted], next(p for p in record.parts if p.part == "stream")
        state.right += int((record.outputs["stream"].argmax(1) == batch.targets).sum())
        steps = self.loader.steps_per_epoch  # type: ignore[attr-defined]
        if (self.task_step + 1) % steps == 0:  # type: ignore[attr-defined]
            state.epoch += 1
            right = float(self.world.sum(torch.tensor(float(state.right))))
            if right >= 0.99 * steps * self.config.batch_size and not state.epochs[-1]:  # type: ignore[attr-defined]
                state.epochs[-1] = state.epoch
            state.right = 0


def compare(options: GrowingData, job: Job) -> Result:
    """All arms, and the report."""
    world, folder = job.world, job.folder
    train, test = (noisy(source, options.pixel_noise, options.data) for source in options.data.open())
    sizes = round_sizes(len(train), options.rounds, options.first)
    accuracy: dict[str, list[list[float]]] = {arm: [] for arm in options.arms}
    epochs: dict[str, list[list[int]]] = {arm: [] for arm in options.arms}
    started = time.perf_counter()
    check_place(options, world, job.script)
    job.checkpoints = None
    units = Units(options, job)
    stop_sign = units.side_by_side() if options.seeds_at_once > 1 else 0
    if stop_sign:
        return Result({}, folder, 0, stop_sign=stop_sign)
    recorder = Recorder(folder, world.rank, tensorboard=False)
    steps = 0
    for seed in range(options.trainer.seed, options.trainer.seed + options.seeds):
        stream = growing(train, test, sizes=sizes, seed=seed)
        for arm in options.arms:
            home = folder / "model.safetensors" if (seed, arm) == (options.trainer.seed, options.arms[-1]) else None
            row, price, taken = units.kept(seed, arm) or units.keep(
                seed, arm, *one_run(options, stream, arm, seed, world, home))
            accuracy[arm].append(row)
            epochs[arm].append(price)
            steps += taken
            shown = " ".join(f"{100 * a:6.2f}" for a in row)
            recorder.say(f"seed {seed}  {ARMS[arm]:<18} test accuracy by round, %: {shown}")
    seconds = time.perf_counter() - started
    pairs = [("fresh", "warm"), ("shrink_perturb", "warm"), ("fresh", "shrink_perturb")]
    gaps = {f"{a}_minus_{b}": gap([x[-1] for x in accuracy[a]], [x[-1] for x in accuracy[b]])
            for a, b in pairs if a in accuracy and b in accuracy}
    last = {seed: {arm: rows[place][-1] for arm, rows in accuracy.items()}
            for place, seed in enumerate(range(options.trainer.seed, options.trainer.seed + options.seeds))}
    arrived = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    curves = {f"{ARMS[arm]} (n={options.seeds})": (arrived, [statistics.fmean(x) for x in zip(*rows, strict=True)])
              for arm, rows in accuracy.items()}
    recorder.figure("accuracy_by_round", compare_curves(curves, x="training samples arrived", y="test accuracy",
                                                        title=f"{train.name}: mean over {options.seeds} seeds"), 0)
    values: Any = world.gather({
        "accuracy": accuracy, "epochs_to_99_percent": epochs, "gaps": gaps, "seeds": list(last),
        "estimates": sum_up(last), "sizes": sizes, "seconds": seconds,
        "test_samples": len(test), "world_size": world.size, "versions": versions(),
        "configuration": config.resolved(options)})[0]
    together(world, folder, lambda: recorder.result(values))
    recorder.say("\n".join([*report(accuracy, epochs), *(verdict(name, g, options.seeds) for name, g in gaps.items()),
                            f"{seconds:.0f} s; see {folder}/result.json and {folder}/figures/accuracy_by_round.png",
                            f"weights of {ARMS[options.arms[-1]]}, seed {options.trainer.seed}: {folder}/model.safetensors"]))
    recorder.close()
    return Result(values, folder, steps)


def one_run(options: GrowingData, stream: Stream, arm: str, seed: int, world: World, home: Path | None = None,
            ) -> tuple[list[float], list[int], int]:
    """Test accuracy after each round, epochs to fit it, and steps, of one arm under one seed; its last weights go to `home`."""
    sample = sample_of(stream)

    def model(number: int) -> nn.Module:
        if options.model.name != "small_conv":
            built: nn.Module = options.model.build(sample, stream.num_classes, number)
            return built
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive(number, "model"))
            return SmallConv(sample.shape[0], stream.num_classes, sample.shape[-1], options.width)

    def factory() -> nn.Module:
        # `model` seeds itself; a number drawn from the ambient stream makes it follow that stream.
        return model(int(torch.randint(2**31, ())))

    optimizer = options.optimizer.build()
    if arm != "warm":
        shrink, perturb = (0.0, 1.0) if arm == "fresh" else (options.shrink, options.perturb)
        base = base_of(optimizer.func)
        assert base is not None
        cls = compose(*parts_of(optimizer.func), ShrinkPerturb, base=base)
        optimizer = functools.partial(cls, **optimizer.keywords, shrinkperturb_shrink=shrink, shrinkperturb_perturb=perturb,
                                      shrinkperturb_factory=factory)
    started: dict[type, Any] = {} if arm == "warm" else {WarmStart: options.warm_start}
    made_of = learner({**options.mixins(), **started, Fitted: None})
    engine = options.engine.build(options.trainer.batch_size, options.trainer.accumulation, world.size)
    engine = "plain" if engine == "ddp" and world.size == 1 else engine
    first = model(seed)
    if options.init is not None and arm != "fresh":
        begin_from(first, options.init, world)
    trainer = made_of(first, optimizer, engine, config=replace(options.trainer, seed=seed), prepare=options.data.prepare,
                      ddp=None if engine == "plain" else options.engine.ddp,
                      augment=options.data.augmentation(sample.shape[-1]), num_tasks=len(stream))
    try:
        matrix = trainer.fit(stream)
        if home is not None:
            trainer.export(home, options.data.described(sample, options.model))
    finally:
        if hasattr(trainer, "close"):  # what works beside it
            trainer.close()
        release(getattr(trainer.optimizer.host, "engine", None))
    return [matrix[k][k] for k in range(len(stream))], list(trainer.states[Fitted].epochs), trainer.step


def noisy(source: Source, sigma: float, data: Data) -> Source:
    """The same samples with noise that belongs to each of them, clamped to the pixel range."""
    if sigma == 0:
        return source
    inputs = one_tensor("pixel_noise", source.fetch(torch.arange(len(source))))
    top = data.scale(inputs)
    noise = seeds.normal(("pixel_noise", source.name), 0, inputs.numel()).view(inputs.shape)
    values = (inputs.float() + sigma * top * noise).clamp(0.0, top)
    values = values if inputs.is_floating_point() else values.round()
    return TensorSource(values.to(inputs.dtype), source.targets, classes=source.classes, name=f"{source.name}, noise {sigma:g}")


def round_sizes(total: int, rounds: int, first: float) -> list[int]:
    """New samples of each round: a share of `first`, then equal parts."""
    start = round(first * total)
    rest, extra = divmod(total - start, rounds - 1)
    check(start >= 1 and rest >= 1, "growing_data", f"{total} samples in {rounds} rounds", "be at least one new sample in each")
    return [start, *(rest + (k < extra) for k in range(rounds - 1))]
