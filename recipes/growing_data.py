"""Data that keep arriving: is a warm start worse than starting over, and does shrink-and-perturb mend it?

torchrun --nproc-per-node 2 recipes/growing_data.py                        noisy digits in two rounds, three arms
torchrun --nproc-per-node 2 recipes/growing_data.py rounds=8 pixel_noise=0
torchrun --nproc-per-node 8 recipes/growing_data.py data.source=torchvision:CIFAR10:ROOT model.name=resnet18 engine.kind=deepspeed

Each round trains on everything that has arrived. The arms differ in where a round starts: from a new network (fresh), from the
last round's (warm), or from the last round's, shrunk and perturbed. On one rank without torchrun, engine ddp is plain torch.
"""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

import torch
from torch import nn

from everbatch import config, seeds
from everbatch.composition import compose
from everbatch.config.strict_yaml import dump_text
from everbatch.contract import base_of, parts_of
from everbatch.data import Source, Stream, TensorSource, growing
from everbatch.distributed import World, init
from everbatch.errors import check, check_real, check_whole
from everbatch.experiment import Job, Parts, check_together, guard, learner, unused_together
from everbatch.nn import SmallConv
from everbatch.optim import ShrinkPerturb
from everbatch.report.plots import compare_curves
from everbatch.report.recorder import Recorder, versions
from everbatch.train import StepRecord, Trainer, TrainerMixin, WarmStart
from everbatch.train.begin import begin_from

KEPT = "this recipe writes no checkpoints"
ARMS = {"fresh": "start over", "warm": "warm start", "shrink_perturb": "shrink and perturb"}


@dataclass(frozen=True, kw_only=True)
class Recipe(Parts):
    """Options of this recipe."""

    trainer: Trainer.Config = field(default_factory=Trainer.Config, metadata={"idle": {
        "checkpoint_every": KEPT, "keep_last": KEPT, "eval_future": "all rounds are tested on the same samples"}})
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
    init: str | None = None
    """Begin with the weights of another run: its folder, one of its checkpoints, or a .safetensors file. Not the arm fresh."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""

    def __post_init__(self) -> None:
        who = "growing_data"
        check_together(self)
        check_whole(who, "rounds", self.rounds, 2)
        check_real(who, "first", self.first, 0.0, 1.0, open_low=True, open_high=True)
        check_real(who, "shrink", self.shrink, 0.0, 1.0)
        check_real(who, "perturb", self.perturb, 0.0)
        check_whole(who, "seeds", self.seeds, 1)
        check_real(who, "pixel_noise", self.pixel_noise, 0.0)
        check_whole(who, "width", self.width, 1, 2**16)
        check(bool(self.arms), who, "arms=()", "name at least one")
        check(len(set(self.arms)) == len(self.arms), who, f"arms={list(self.arms)}", "name each once")
        check(self.optimizer.shrink_perturb is None, who, "optimizer.shrink_perturb", "be null", "set shrink and perturb")
        check(self.conadv is None or self.conadv.placement != "ranks", who, "conadv.placement=ranks",
              "be another", "every rank trains here")

    def unused(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why."""
        found = unused_together(self)
        if self.model.name != "small_conv":
            found["width"] = "it is small_conv's"
        if "shrink_perturb" not in self.arms:
            found |= dict.fromkeys(("shrink", "perturb"), "arms has no shrink_perturb")
        return found


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


def main() -> None:
    """Train every arm with every seed, compare."""
    with guard("growing_data"):
        run(config.parse(Recipe, default_yaml=Path(__file__).with_suffix(".yaml"), prog="growing_data"))


def run(options: Recipe) -> None:
    """All runs, alone in their folder."""
    with Job.of(options, init(), shared=False) as job:
        if not options.dry_run:
            compare(options, job)
        elif job.world.rank == 0:
            print(dump_text(config.resolved(options)))


def compare(options: Recipe, job: Job) -> None:
    """All arms, and the report."""
    world, folder = job.world, job.folder
    train, test = (noisy(source, options.pixel_noise, options.data.source) for source in options.data.open())
    sizes = round_sizes(len(train), options.rounds, options.first)
    accuracy: dict[str, list[list[float]]] = {arm: [] for arm in options.arms}
    epochs: dict[str, list[list[int]]] = {arm: [] for arm in options.arms}
    job.checkpoints = None
    job.begin()
    recorder = Recorder(folder, world.rank, tensorboard=False)
    if world.rank == 0:
        config.dump(options, folder / "config.yaml")
    started = time.perf_counter()
    for seed in range(options.trainer.seed, options.trainer.seed + options.seeds):
        stream = growing(train, test, sizes=sizes, seed=seed)
        for arm in options.arms:
            home = folder / "model.safetensors" if (seed, arm) == (options.trainer.seed, options.arms[-1]) else None
            row, price = one_run(options, stream, arm, seed, world, home)
            accuracy[arm].append(row)
            epochs[arm].append(price)
            shown = " ".join(f"{100 * a:6.2f}" for a in row)
            recorder.say(f"seed {seed}  {ARMS[arm]:<18} test accuracy by round, %: {shown}")
    seconds = time.perf_counter() - started
    pairs = [("fresh", "warm"), ("shrink_perturb", "warm"), ("fresh", "shrink_perturb")]
    gaps = {f"{a}_minus_{b}": gap([x[-1] for x in accuracy[a]], [x[-1] for x in accuracy[b]])
            for a, b in pairs if a in accuracy and b in accuracy}
    arrived = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    curves = {f"{ARMS[arm]} (n={options.seeds})": (arrived, [statistics.fmean(x) for x in zip(*rows, strict=True)])
              for arm, rows in accuracy.items()}
    recorder.figure("accuracy_by_round", compare_curves(curves, x="training samples arrived", y="test accuracy",
                                                        title=f"{train.name}: mean over {options.seeds} seeds"), 0)
    recorder.result({"accuracy": accuracy, "epochs_to_99_percent": epochs, "gaps": gaps, "sizes": sizes, "seconds": seconds,
                     "test_samples": len(test), "world_size": world.size, "versions": versions(),
                     "configuration": config.resolved(options)})
    recorder.say("\n".join([*report(accuracy, epochs), *(verdict(name, g, options.seeds) for name, g in gaps.items()),
                            f"{seconds:.0f} s; see {folder}/result.json and {folder}/figures/accuracy_by_round.png",
                            f"weights of {ARMS[options.arms[-1]]}, seed {options.trainer.seed}: {folder}/model.safetensors"]))
    recorder.close()


def one_run(options: Recipe, stream: Stream, arm: str, seed: int, world: World, home: Path | None = None,
            ) -> tuple[list[float], list[int]]:
    """Test accuracy after each round, and epochs to fit it, of one arm under one seed; its last weights go to `home`."""
    sample = stream.fetch(stream.tasks[0].train_ids[:1])[0]

    def model(number: int) -> nn.Module:
        if options.model.name != "small_conv":
            return options.model.build(sample, stream.num_classes, number)
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
    finally:
        if hasattr(trainer, "close"):  # what works beside it
            trainer.close()
    if home is not None:
        trainer.export(home, options.data.described(sample, options.model))
    return [matrix[k][k] for k in range(len(stream))], list(trainer.states[Fitted].epochs)


def noisy(source: Source, sigma: float, name: str) -> Source:
    """The same samples with noise that belongs to each of them, clamped to the pixel range."""
    if sigma == 0:
        return source
    inputs = source.fetch(torch.arange(len(source)))
    top = 16.0 if name == "digits" else 255.0 if inputs.dtype == torch.uint8 else 1.0
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


def gap(a: list[float], b: list[float]) -> dict[str, float | None]:
    """Paired difference a - b over the seeds: mean, sample standard deviation, standard error of the mean."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else None
    return {"mean": statistics.fmean(differences), "std": spread, "error": None if spread is None else spread / len(a) ** 0.5}


def report(accuracy: dict[str, list[list[float]]], epochs: dict[str, list[list[int]]]) -> list[str]:
    """A line for each arm."""
    lines = ["after the last round          test accuracy, %     epochs until 99 % of the training set"]
    for arm, rows in accuracy.items():
        last = [100 * row[-1] for row in rows]
        spread = f"+- {statistics.stdev(last):.2f}" if len(last) > 1 else ""
        fitted = [e[-1] for e in epochs[arm]]
        reached = [e for e in fitted if e]
        every = len(reached) == len(fitted)
        text = f"{statistics.fmean(reached):.1f}" if every else f"reached in {len(reached)} of {len(fitted)} runs"
        lines.append(f"  {ARMS[arm]:<28}{statistics.fmean(last):6.2f} {spread:<14} {text}")
    return lines


def verdict(name: str, found: dict[str, float | None], count: int) -> str:
    """What a paired difference says, and no more than that."""
    a, b = name.split("_minus_")
    mean, error = 100 * (found["mean"] or 0.0), found["error"]
    head = f"{ARMS[a]} minus {ARMS[b]}: {mean:+.2f} points"
    if error is None:
        return f"{head} with one seed: no statement about spread"
    said = "more than 2 standard errors from zero" if abs(mean) > 200 * error else "no difference beyond 2 standard errors"
    return f"{head}, standard error {100 * error:.2f} over {count} seeds: {said}"


if __name__ == "__main__":
    main()
