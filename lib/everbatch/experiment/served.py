"""The arms of the test-time recipe: one trained network, put to use in several ways over one corrupted stream."""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from everbatch import seeds
from everbatch.composition import compose
from everbatch.contract import base_of, parts_of
from everbatch.data import (
    Stream,
    SubsetSource,
    TensorSource,
    corrupt,
    dirichlet_order,
    domain_incremental,
    ordered,
    stratified_split,
    task_free,
)
from everbatch.experiment.data import sample_of
from everbatch.experiment.job import Job
from everbatch.experiment.options import learner
from everbatch.experiment.pretraining import begin_pretrained
from everbatch.nn import convert_unmix_tns
from everbatch.optim import MeanTeacher
from everbatch.rows import one_tensor
from everbatch.train import BNAdapt, CoTTA, Tent, Trainer

__all__ = ["ARMS", "Served", "corrupted", "launched"]

ARMS = {"source": "source statistics", "bn_adapt": "batch statistics", "unmix": "UnMix-TNS", "tent": "Tent", "cotta": "CoTTA"}


@dataclass(frozen=True)
class Served:
    """How one arm did."""

    online: list[float]
    """Accuracy by family, of predictions made before they were adapted to."""
    matrix: list[list[float]]
    """Accuracy on the samples kept apart, of family j after family k."""
    seconds: float
    steps: int
    describe: str
    left_out: int
    stop_sign: int = 0

    @property
    def accuracy(self) -> float:
        """The mean over families."""
        return statistics.fmean(self.online)


def corrupted(options: Any) -> Stream:
    """The data set's test samples under each corruption, in order; a share of them kept apart, the same of every family."""
    _, test = options.data.open()
    rest, held = stratified_split(test.targets, options.held, seed=0, names=test.classes)
    raw, seed = one_tensor("data", test.fetch(torch.arange(len(test)))), options.trainer.seed
    pairs, orders = [], []
    for family in options.families:
        values = _corrupted(raw, options.data.scale(raw), family, options.severity, seed)
        name = f"{test.name}, {family.replace('_', ' ')} {options.severity}"
        source = TensorSource(values, test.targets, classes=test.classes, name=name)
        pairs.append((SubsetSource(source, rest), SubsetSource(source, held)))
        orders.append(_order(options, test.targets[rest], seeds.derive(seed, "order", family) % 2**32))
    stream = ordered(domain_incremental(pairs), orders)
    return stream if options.reset else task_free(stream)


def _corrupted(raw: Tensor, top: float, family: str, severity: int, seed: int) -> Tensor:
    """In the range and type of the samples."""
    made = corrupt((raw.float() / top).clamp(0, 1), family, severity, seed=seed) * top
    return (made if raw.is_floating_point() else made.round()).to(raw.dtype)


def _order(options: Any, targets: Tensor, seed: int) -> list[int]:
    if options.order == "iid":
        return torch.randperm(len(targets), generator=seeds.generator(seed, "iid")).tolist()
    return dirichlet_order(targets, options.concentration, seed)


def launched(options: Any, job: Job, stream: Stream, arm: str) -> Served:
    """One arm over the stream: to its end, or to where a signal stops it. Collective."""
    world, sample = job.world, sample_of(stream)
    model = options.model.build(sample, stream.num_classes, options.trainer.seed)
    begin_pretrained(options.pretraining, options.model, model, options.data.open()[0], options.data, world, head=True)
    mixin, settings = _mixin(options, arm)
    if arm == "unmix" or (arm in ("tent", "cotta") and options.norms == "unmix"):
        _unmixed(model, options, world.size)
    settings_of_trainer = replace(options.trainer, reset_optimizer=options.reset)
    engine = options.engine.build(options.trainer.batch_size, options.trainer.accumulation, world.size)
    made_of = learner({mixin: settings})
    trainer: Trainer = made_of(
        model, _optimizer(options, arm), engine, config=settings_of_trainer, ddp=options.engine.ddp, prepare=options.data.prepare,
        augment=options.data.augmentation(sample.shape[-1]) if arm == "cotta" else None,
        folder=job.folder / "arms" / arm, recorder=None, num_tasks=len(stream),
        identity=options.data.identity | {"arm": arm, "severity": options.severity})
    trainer.handles_signals, trainer.tells_end = job.signals, False
    try:
        matrix = trainer.fit(stream, resume=job.resume)
        if trainer.stopped:
            return Served([], [], 0.0, trainer.step, "", 0, trainer.stop_sign)
        about = options.data.described(sample, options.model) | {"arm": arm}
        for name in (f"model-{arm}", *(["model"] if arm == options.arms[-1] else [])):
            trainer.export(job.folder / f"{name}.safetensors", about)
        batch = options.trainer.batch_size
        left = sum(len(task.train_ids) % batch for task in stream.tasks)
        online: list[float] = trainer.online  # type: ignore[attr-defined]
        return Served(online, matrix, trainer.seconds, trainer.step, trainer.describe(), left)
    finally:
        trainer.engine.close()


def _mixin(options: Any, arm: str) -> tuple[type, Any]:
    """The mixin of an arm, and its options. Statistics of a batch are of all ranks, so that their number does not matter."""
    if arm == "tent":
        return Tent, replace(options.tent or Tent.Config(synchronised=True), reset=options.reset)
    if arm == "cotta":
        return CoTTA, replace(options.cotta or CoTTA.Config(), reset=options.reset)
    if arm == "bn_adapt":
        return BNAdapt, options.bn_adapt or BNAdapt.Config(synchronised=True)
    return BNAdapt, BNAdapt.Config(alpha=0.0, reset=options.reset)


def _unmixed(model: nn.Module, options: Any, ranks: int) -> None:
    settings, batch = options.unmix, options.trainer.batch_size
    convert_unmix_tns(
        model, settings.num_components, alpha=settings.alpha, batch_size_max=settings.batch_size_max,
        balanced=settings.balanced,
        batch_size=batch if settings.synchronised else batch // ranks, synchronised=settings.synchronised,
        seed=options.trainer.seed)


def _optimizer(options: Any, arm: str) -> functools.partial[Any]:
    """The options', with CoTTA's teacher."""
    made: functools.partial[Any] = options.optimizer.build()
    kind: Any = made.func
    parts = [part for part in parts_of(kind) if part is not MeanTeacher]
    rest = {name: value for name, value in made.keywords.items() if not name.startswith("meanteacher_")}
    base = base_of(kind)
    assert base is not None
    if arm == "cotta":
        taught = options.optimizer.mean_teacher or MeanTeacher.Config()
        rest |= {"meanteacher_decay": taught.decay, "meanteacher_restore": taught.restore}
        parts.append(MeanTeacher)
    return functools.partial(compose(*parts, base=base), **rest)
