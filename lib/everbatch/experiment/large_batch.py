"""One model, one data set, a large batch in micro-batches; with concurrent adversarial learning or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from everbatch.data import Stream, iid
from everbatch.distributed import World
from everbatch.errors import check, check_whole
from everbatch.evaluate.evaluator import accuracies
from everbatch.experiment.base import Experiment, Finished, is_share
from everbatch.experiment.progress import Progress
from everbatch.optim.layerwise.rules import scaled_lr
from everbatch.report.plots import compare_curves
from everbatch.train import Trainer

__all__ = ["LargeBatch", "micro_batches"]

DEFAULT_BATCH = Trainer.Config().batch_size


@dataclass(frozen=True, kw_only=True)
class LargeBatch(Experiment):
    """Options of this recipe."""

    title: ClassVar[str] = "large_batch"

    trainer: Trainer.Config = field(default_factory=lambda: Trainer.Config(decay_vectors=False), metadata={"idle": {
        "batch_size": "set global_batch", "accumulation": "set micro_batch", "eval_future": "there is one task",
        "eval_past": "there is one task"}})
    """batch_size and accumulation follow from global_batch and micro_batch, and are left out here."""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("global_batch", 1), ("micro_batch", 1), ("base_batch", 1), ("eval_every", 0)):
            check(getattr(self, name) >= least, "large_batch", f"{name}={getattr(self, name)}", f"be >= {least}")
            check_whole("large_batch", name, getattr(self, name), least)
        check(self.trainer.batch_size in (DEFAULT_BATCH, self.global_batch), "large_batch",
              f"trainer.batch_size={self.trainer.batch_size}", "be left out", "set global_batch")
        check(self.trainer.accumulation == 1, "large_batch", f"trainer.accumulation={self.trainer.accumulation}", "be left out",
              "set micro_batch")
        idle = self.optimizer.between_tasks()
        check(not idle, "large_batch", f"optimizer.{', optimizer.'.join(idle)} beside a single task", "be null",
              "they act when a task ends or begins; see recipes/class_incremental.py and recipes/growing_data.py")

    def unused(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why."""
        found = super().unused()
        if self.lr_rule == "none":
            found["base_batch"] = "lr_rule=linear or sqrt scale the rate from it"
        return found

    @property
    def peak_lr(self) -> float:
        """The highest rate of the schedule."""
        if self.lr_rule == "none":
            return float(self.optimizer.lr)
        return scaled_lr(self.optimizer.lr, batch=self.global_batch, reference_batch=self.base_batch, rule=self.lr_rule)

    def stream(self) -> Stream:
        """All samples as one task."""
        return iid(*self.data.open())

    def settled(self) -> LargeBatch:
        """With the trainer's batch size written out."""
        return replace(self, trainer=replace(self.trainer, batch_size=self.global_batch))

    def trainer_config(self, world: World) -> Trainer.Config:
        """With the number of micro-batches."""
        return replace(self.trainer, accumulation=micro_batches(self.global_batch, self.micro_batch, world.size))

    def more_mixins(self, world: World) -> dict[type, Any]:
        """The clock."""
        spare = self.conadv.adversaries if self.conadv is not None and self.conadv.placement == "ranks" else 0
        return {Progress: Progress.Config(eval_every=self.eval_every, devices=world.size + spare)}

    def heading(self, world: World) -> str:
        """How the batch is made up."""
        count = micro_batches(self.global_batch, self.micro_batch, world.size)
        return (f"global batch {self.global_batch} = {world.size} rank{'s' * (world.size > 1)} x {count} micro-batches x "
                f"{self.micro_batch}; peak learning rate {self.peak_lr:g}")

    def finish(self, done: Finished) -> tuple[dict[str, Any], list[str]]:
        """Accuracy, that of the averaged weights, the curve, throughput."""
        trainer: Any = done.trainer
        accuracy, averaged = done.matrix[0][0], None
        if self.optimizer.ema is not None:
            with trainer.optimizer.averaged():  # batch norm statistics stay those of the last weights
                averaged = accuracies(trainer, done.stream, 0, list(done.stream.tasks))[0]
        curve = [*trainer.states[Progress].curve, [self.trainer.epochs, accuracy]]
        if self.eval_every:
            points = ([e for e, _ in curve], [a for _, a in curve])
            drawn = compare_curves({"test": points}, x="epoch", y="test accuracy", title=trainer.title)
            done.recorder.figure("accuracy_by_epoch", drawn, trainer.step)
        values = {
            "accuracy": accuracy, "accuracy_averaged": averaged, "accuracy_by_epoch": curve,
            "throughput": trainer.throughput, "test_samples": len(done.stream.tasks[0].test_ids),
            "peak_lr": self.peak_lr, "accumulation": trainer.config.accumulation}
        return values, _lines(accuracy, averaged, trainer.throughput)

    def headlines(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        """Accuracy, that of the averaged weights where there are any, throughput, what mixins report."""
        averaged = {} if self.optimizer.ema is None else {"accuracy_averaged": values["accuracy_averaged"]}
        reported = self.reported({name: part for name, part in values.items() if name != "throughput"})
        return {"accuracy": values["accuracy"], **averaged, "samples_per_s": values["throughput"]["samples_per_s"], **reported,
                "seconds": values["seconds"]}

    def unit_of(self, headline: str) -> str:
        """Accuracies are shares."""
        return {"samples_per_s": "samples/s"}.get(headline) or super().unit_of(headline) or ("%" if is_share(headline) else "")


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


def _lines(accuracy: float, averaged: float | None, throughput: dict[str, float | None]) -> list[str]:
    """What is printed at the end."""
    lines = [f"test accuracy                   {100 * accuracy:6.2f} %"]
    if averaged is not None:
        lines.append(f"  of the averaged weights       {100 * averaged:6.2f} %")
    if throughput["samples_per_s"] is not None:
        lines.append(f"throughput                      {throughput['samples_per_s']:6.0f} samples/s, "
                     f"{throughput['samples_per_s_per_device']:.0f} on each of {throughput['devices']} devices")
    return lines
