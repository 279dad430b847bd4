"""One model, one data set, a large batch: LARS with warm-up and decay, concurrent adversarial learning, accumulation.

torchrun --nproc-per-node 2 recipes/large_batch.py                       digits, a small ResNet, batch 512 on DeepSpeed ZeRO-1
torchrun --nproc-per-node 2 recipes/large_batch.py conadv=null           the same without the adversarial part
torchrun --nproc-per-node 2 recipes/large_batch.py global_batch=256 lr_rule=linear base_batch=512
bash launch/torchrun.sh recipes/large_batch.py --config recipes/large_batch/resnet50_32k.yaml data.source=imagefolder:PATH

`global_batch` is what one update sees, `micro_batch` what one rank holds at a time; micro-batches are accumulated in between.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

from everbatch import config
from everbatch.config.strict_yaml import dump_text
from everbatch.data import Stream, iid
from everbatch.distributed import init
from everbatch.errors import check, check_whole
from everbatch.evaluate.evaluator import accuracies
from everbatch.experiment.recipe import Data, Engine, Factory, Model, Optimizer, check_together, guard, unused_together
from everbatch.experiment.run import Run, would_refuse
from everbatch.optim.layerwise.rules import scaled_lr
from everbatch.report.plots import compare_curves
from everbatch.report.recorder import versions
from everbatch.train import ConAdv, StepRecord, Trainer, TrainerMixin
from everbatch.train.adversarial import Role, serve, split_ranks

DEFAULT_BATCH = Trainer.Config().batch_size


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Options of this recipe."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    engine: Engine = field(default_factory=Engine)
    trainer: Trainer.Config = field(default_factory=lambda: Trainer.Config(decay_vectors=False), metadata={"idle": {
        "batch_size": "set global_batch", "accumulation": "set micro_batch", "eval_future": "there is one task"}})
    """batch_size and accumulation follow from global_batch and micro_batch, and are left out here."""
    conadv: ConAdv.Config | None = field(default=None, metadata={"idle": {
        **dict.fromkeys(("mean", "std"), "they follow data.mean and data.std"), "classes": "the data have them"}})
    """Concurrent adversarial learning; null for none. Its mean and std are those of data."""
    global_batch: int = 512
    """Samples of one update, over all ranks and micro-batches; a multiple of ranks * micro_batch."""
    micro_batch: int = 128
    """Samples that a rank takes through the model at a time; >= 1. With conadv as many adversarial ones follow them."""
    lr_rule: Literal["none", "linear", "sqrt"] = "none"
    """How optimizer.lr, tuned at base_batch, grows with global_batch: not at all, in proportion (SGD), with the square root
    (Adam, LAMB)."""
    base_batch: int = 256
    """Batch size that optimizer.lr belongs to, with lr_rule=linear or sqrt; >= 1."""
    eval_every: int = 0
    """Epochs between evaluations beside the one at the end; 0 for none."""
    output: str = "runs/large_batch"
    """Folder of this run: model.safetensors, result.json, config.yaml, figures, TensorBoard, checkpoints."""
    init: str | None = None
    """Begin a new run with the weights of another: its folder, one of its checkpoints, or a .safetensors file."""
    resume: bool = False
    """Go on from the newest good checkpoint in the output folder; workers that torchrun restarts do so anyway."""
    dry_run: bool = False
    """Print the resolved configuration and what a step costs, and stop. Opens the data, for its shape."""

    def __post_init__(self) -> None:
        check_together(self)
        for name, least in (("global_batch", 1), ("micro_batch", 1), ("base_batch", 1), ("eval_every", 0)):
            check(getattr(self, name) >= least, "large_batch", f"{name}={getattr(self, name)}", f"be >= {least}")
            check_whole("large_batch", name, getattr(self, name), least)
        check(self.trainer.batch_size in (DEFAULT_BATCH, self.global_batch), "large_batch",
              f"trainer.batch_size={self.trainer.batch_size}", "be left out", "set global_batch")
        check(self.trainer.accumulation == 1, "large_batch", f"trainer.accumulation={self.trainer.accumulation}", "be left out",
              "set micro_batch")
        idle = [name for name in ("ewc", "si", "mas", "shrink_perturb") if getattr(self.optimizer, name) is not None]
        check(not idle, "large_batch", f"optimizer.{', optimizer.'.join(idle)} beside a single task", "be null",
              "they act when a task ends or begins; see recipes/class_incremental.py and recipes/growing_data.py")
        own = None if self.conadv is None else (self.conadv.mean, self.conadv.std)
        check(own in (None, ((0.0,), (1.0,)), (self.data.means, self.data.stds)), "large_batch",
              f"conadv.mean and conadv.std = {own}", "be left out", "they follow data.mean and data.std")

    def unused(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why."""
        found = unused_together(self)
        if self.lr_rule == "none":
            found["base_batch"] = "lr_rule=linear or sqrt scale the rate from it"
        return found

    @property
    def peak_lr(self) -> float:
        """The highest rate of the schedule."""
        if self.lr_rule == "none":
            return self.optimizer.lr
        return scaled_lr(self.optimizer.lr, batch=self.global_batch, reference_batch=self.base_batch, rule=self.lr_rule)


class Progress(TrainerMixin):
    """Throughput by wall clock, and the accuracy between epochs.

    Loading, augmentation and checkpoints count as part of the steps, evaluation does not; nor do the first `SKIPPED` steps of
    a process, in which memory is allocated and kernels are chosen.
    """

    SKIPPED = 3

    @dataclass(frozen=True, kw_only=True)
    class Config:
        eval_every: int = 0
        """Epochs between evaluations; 0 for none."""
        devices: int = 1
        """Over which the throughput is divided."""

        def __post_init__(self) -> None:
            check_whole("Progress", "eval_every", self.eval_every)
            check_whole("Progress", "devices", self.devices, 1)

    @dataclass
    class State:
        curve: list[list[float]] = field(default_factory=list)
        """[epoch, test accuracy]."""

    __last: float | None = None
    __seen = __steps = 0
    __seconds = 0.0

    def after_step(self, record: StepRecord) -> None:
        """Take the time, and evaluate at the end of an epoch."""
        super().after_step(record)  # type: ignore[misc]
        trainer: Any = self
        options, now, batch = self.configs[Progress], time.perf_counter(), trainer.config.batch_size
        if self.__last is not None:
            self.__steps += 1
            seconds = now - self.__last
            if self.__steps > self.SKIPPED:
                self.__seen, self.__seconds = self.__seen + batch, self.__seconds + seconds
            if trainer.recorder is not None:
                rate = batch / seconds
                trainer.recorder.scalars(record.step, {"throughput/samples_per_s": rate,
                                                       "throughput/samples_per_s_per_device": rate / options.devices})
        epoch, rest = divmod(trainer.task_step + 1, trainer.loader.steps_per_epoch)
        if options.eval_every and rest == 0 and epoch % options.eval_every == 0 and epoch < trainer.config.epochs:
            accuracy = accuracies(trainer, trainer.stream, 0, list(trainer.stream.tasks))[0]
            self.states[Progress].curve.append([epoch, accuracy])
            if trainer.recorder is not None:
                trainer.recorder.scalars(record.step, {"accuracy/test": accuracy})
                trainer.recorder.say(f"epoch {epoch}: test accuracy {100 * accuracy:.2f} %")
            now = time.perf_counter()
        self.__last = now

    @property
    def throughput(self) -> dict[str, float | None]:
        """Mean over the counted steps of this process; None without any."""
        rate = self.__seen / self.__seconds if self.__seconds else None
        devices = self.configs[Progress].devices
        return {"samples_per_s": rate, "samples_per_s_per_device": None if rate is None else rate / devices, "devices": devices}


def main() -> None:
    """Train, evaluate, report."""
    with guard("large_batch"):
        options = config.parse(Recipe, default_yaml=Path(__file__).with_suffix(".yaml"), prog="large_batch")
        role = divided(options)
        if role is not None and role.adversary:
            serve(role, build(options)[1])
        else:
            run(options, spare=0 if role is None else role.adversaries)


def divided(options: Recipe) -> Role | None:
    """Set the last ranks aside for crafting, where that is asked for; before anything else joins a process group."""
    if options.conadv is None or options.conadv.placement != "ranks":
        return None
    check("WORLD_SIZE" in os.environ, "large_batch", "conadv.placement=ranks in one process", "be started by torchrun")
    return split_ranks(options.conadv.adversaries)


def build(options: Recipe) -> tuple[Stream, Any]:
    """The stream and the bare model, the same on every rank."""
    stream = iid(*options.data.open())
    sample = stream.fetch(stream.tasks[0].train_ids[:1])[0]
    return stream, options.model.build(sample, stream.num_classes, options.trainer.seed)


def micro_batches(global_batch: int, micro_batch: int, ranks: int) -> int:
    """Micro-batches per step and rank.

    Raises:
        ValueError: sizes that do not fit, naming the nearest that do.
    """
    unit = ranks * micro_batch
    count, rest = divmod(global_batch, unit)
    near = [str(n * unit) for n in (count, count + 1) if n]
    cure = f"nearest: global_batch={' or '.join(near)}"
    if global_batch % ranks == 0:
        share = global_batch // ranks
        fit = [d for d in range(1, share + 1) if share % d == 0]
        below, above = [d for d in fit if d < micro_batch][-1:], [d for d in fit if d > micro_batch][:1]
        cure += f", or micro_batch={' or '.join(map(str, below + above))}"
    check(rest == 0, "large_batch", f"global_batch={global_batch} in micro-batches of {micro_batch} on {ranks} "
          f"rank{'s' * (ranks > 1)}", f"be a multiple of {unit}", cure)
    return count


def run(options: Recipe, spare: int) -> None:
    """One run, on the ranks that train, alone in its folder."""
    with Run.of(options, init()) as job:
        train(options, spare, job)


def train(options: Recipe, spare: int, job: Run) -> None:
    """What the run does."""
    world, folder, recorder = job.world, job.folder, job.recorder
    accumulation = micro_batches(options.global_batch, options.micro_batch, world.size)
    options = replace(options, trainer=replace(options.trainer, batch_size=options.global_batch))
    job.options = options
    stream, model = build(options)
    adversary = options.conadv and replace(options.conadv, mean=options.data.means, std=options.data.stds)
    learner = type("Learner", (Progress, *((ConAdv,) if adversary else ()), Trainer), {})
    shape = tuple(stream.fetch(stream.tasks[0].train_ids[:1]).shape[1:])
    factory = Factory(model=options.model, shape=shape, num_classes=stream.num_classes)
    trainer = learner(
        job.start(model), replace(options.optimizer, lr=options.peak_lr).build(factory),
        options.engine.build(options.global_batch, accumulation, world.size),
        config=replace(options.trainer, accumulation=accumulation), ddp=options.engine.ddp,
        augment=options.data.augmentation(shape[-1]),
        prepare=options.data.prepare, folder=job.checkpoints, recorder=recorder,
        identity=options.data.identity | job.identity,
        progress_eval_every=options.eval_every, progress_devices=world.size + spare,
        **({f"conadv_{k}": v for k, v in vars(adversary).items()} if adversary else {}))
    batch = (f"global batch {options.global_batch} = {world.size} rank{'s' * (world.size > 1)} x {accumulation} micro-batches x "
             f"{options.micro_batch}; peak learning rate {options.peak_lr:g}")
    if options.dry_run:
        if world.rank == 0:
            print(f"{dump_text(config.resolved(options))}{batch}\n{trainer.describe()}{would_refuse(trainer, stream)}")
        return
    assert recorder is not None
    recorder.say(batch)
    matrix = job.fit(trainer, stream)
    if matrix is None:
        return
    seconds, accuracy, averaged = trainer.seconds, matrix[0][0], None
    if options.optimizer.ema is not None:
        with trainer.optimizer.averaged():  # batch norm statistics stay those of the last weights
            averaged = accuracies(trainer, stream, 0, list(stream.tasks))[0]
    curve = [*trainer.states[Progress].curve, [options.trainer.epochs, accuracy]]
    if options.eval_every:
        points = ([e for e, _ in curve], [a for _, a in curve])
        recorder.figure("accuracy_by_epoch", compare_curves({"test": points}, x="epoch", y="test accuracy", title=trainer.title),
                        trainer.step)
    sample = stream.fetch(stream.tasks[0].train_ids[:1])[0]
    trainer.export(folder / "model.safetensors", options.data.described(sample, options.model))
    recorder.result({
        "accuracy": accuracy, "accuracy_averaged": averaged, "accuracy_by_epoch": curve, "throughput": trainer.throughput,
        "test_samples": len(stream.tasks[0].test_ids), "seconds": seconds, "steps": trainer.step,
        "skipped_steps": trainer.optimizer.skipped_count, "peak_lr": options.peak_lr, "seed": options.trainer.seed,
        "world_size": world.size, "accumulation": accumulation, "changes": trainer.changes,
        "describe": trainer.describe(), "stream": stream.fingerprint(),
        "versions": versions(), "configuration": config.resolved(options)})
    recorder.say(report(accuracy, averaged, trainer.throughput, trainer.step, seconds, folder))
    job.close(trainer)


def report(accuracy: float, averaged: float | None, throughput: dict[str, float | None], steps: int, seconds: float,
           folder: Path) -> str:
    """What is printed at the end."""
    lines = [f"test accuracy                   {100 * accuracy:6.2f} %"]
    if averaged is not None:
        lines.append(f"  of the averaged weights       {100 * averaged:6.2f} %")
    if throughput["samples_per_s"] is not None:
        lines.append(f"throughput                      {throughput['samples_per_s']:6.0f} samples/s, "
                     f"{throughput['samples_per_s_per_device']:.0f} on each of {throughput['devices']} devices")
    return "\n".join([*lines, f"{steps} steps in {seconds:.0f} s; see {folder}/result.json, {folder}/model.safetensors, and "
                     f"tensorboard --logdir {folder}"])


if __name__ == "__main__":
    main()
