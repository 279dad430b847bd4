"""`run`: a run is a function of its options."""

from __future__ import annotations

import functools
import operator
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from everbatch import config
from everbatch.checkpoint.folder import together
from everbatch.config.strict_yaml import dump_text
from everbatch.contract import parts_of
from everbatch.data import Stream
from everbatch.data.notes import tell
from everbatch.distributed import World, init
from everbatch.experiment.base import Experiment, Finished, Result
from everbatch.experiment.data import sample_of
from everbatch.experiment.job import Job, would_refuse
from everbatch.experiment.model import Factory
from everbatch.experiment.options import learner
from everbatch.experiment.repeat import refuse_other_folder, repeat
from everbatch.experiment.state import as_found
from everbatch.report.recorder import versions
from everbatch.train import Trainer
from everbatch.train.persist import agree

__all__ = ["Result", "run"]


def run(options: Experiment, *, signals: bool = False, script: str | os.PathLike[str] | None = None) -> Result:
    """Train, evaluate and report, in this process: one rank, one of a process group that is there, or one of torchrun's.

    Nothing of the process is changed for good: generators of torch, numpy and Python, the environment, modes of torch and the
    handlers of signals are as before; a process group made here is left; the process never ends here. The same options give the
    same bits, also twice in one process.

    Args:
        options: of this run; the same on every rank.
        signals: take SIGTERM, SIGUSR1 and Ctrl-C during training: a checkpoint is written, and `Result.stop_sign` says so. For
            scripts; needs the main thread. Without it a Ctrl-C is a KeyboardInterrupt, as anywhere.
        script: of these options, which `--config FILE` starts anew; wanted where `seeds_at_once` is more than 1.

    Raises:
        ValueError: options that do not go together, differ between ranks, or name what is not there; another run in the folder.
        CheckpointMismatch: a run to resume that is another.
        RuntimeError: training that diverged; a folder that cannot be written.
    """
    with as_found():
        world = init()
        path = None if script is None else Path(script)
        single = functools.partial(_once, world=world, signals=signals, script=path)
        if options.seeds == 1 or options.dry_run or options.repeats_itself:
            return single(options)
        return repeat(options, world, single, path, signals)


def _once(options: Experiment, *, world: World, signals: bool, script: Path | None) -> Result:
    """`run`, with one seed, or with all of them where the experiment sees to that itself."""
    with as_found(), Job.of(options, world, shared=options.shares_folder) as job:
        job.signals, job.script = signals, script
        if not options.repeats_itself:
            refuse_other_folder(options, world)
        own = options.conduct(job)
        return _run(_settled(options), job, signals) if own is None else own


def _settled(options: Experiment) -> Experiment:
    """What is trained; a value that other options overrule is told: a command line cannot hold one, Python can."""
    settled = options.settled()
    for path, why in options.unused().items():
        given, taken = (operator.attrgetter(path)(one) for one in (options, settled))
        if given != taken:
            tell(f"{options.title}: {path}={given} is taken as {taken}; {why}")
    return settled


def _run(options: Experiment, job: Job, signals: bool) -> Result:
    """`run`, on ranks that agree and own the folder."""
    job.options = options
    world, stream = job.world, options.stream()
    trainer, sample = build(options, job, stream)
    trainer.handles_signals = signals
    try:
        if options.dry_run:
            if world.rank == 0:
                print(_preview(options, trainer, stream))
            return Result({}, job.folder, 0)
        return _trained(options, job, trainer, stream, sample)
    finally:
        job.close(trainer)
        if trainer.engine is not None:  # a launch anew that failed has let go of it already
            trainer.engine.close()


def build(options: Experiment, job: Job, stream: Stream) -> tuple[Trainer, Any]:
    """The trainer of an experiment, and one sample (C, H, W) of its data. Collective."""
    sample = sample_of(stream)
    made = options.trainer_config(job.world)
    options.check_stream(stream, job.world)
    growing = options.model.head == "growing"
    classes = max(stream.seen_classes(0)) + 1 if growing else stream.num_classes
    factory = Factory(model=options.model, shape=tuple(sample.shape), num_classes=classes)
    made_of = learner({**options.more_mixins(job.world), **options.mixins()}, factory=factory)
    model = options.model.build(sample, classes, options.trainer.seed)
    model = model if options.dry_run else options.begun(model, stream, job.world)
    trainer = made_of(
        job.start(model),
        replace(options.optimizer, lr=options.peak_lr).build(factory),
        options.engine.build(made.batch_size, made.accumulation, job.world.size),
        config=made, ddp=options.engine.ddp, augment=options.data.augmentation(sample.shape[-1]), prepare=options.data.prepare,
        folder=job.checkpoints, recorder=job.recorder, num_tasks=len(stream), identity=options.data.identity | job.identity,
        grown=factory if growing else None)
    return trainer, sample


def _preview(options: Experiment, trainer: Trainer, stream: Stream) -> str:
    """What a dry run prints."""
    heading = options.heading(trainer.world)
    lines = [trainer.describe() + would_refuse(trainer, stream)]
    return dump_text(config.resolved(options)) + "\n".join([heading, *lines] if heading else lines)


def _trained(options: Experiment, job: Job, trainer: Trainer, stream: Stream, sample: Any) -> Result:
    """Train and report."""
    world, recorder = job.world, job.recorder
    assert recorder is not None
    agree(world, {"stream": stream.fingerprint()})
    heading = options.heading(world)
    if heading:
        recorder.say(heading)
    before = options.before(trainer, stream)
    matrix = job.fit(trainer, stream)
    if trainer.stopped:
        return Result({}, job.folder, trainer.step, stop_sign=trainer.stop_sign)
    if matrix is None:
        return Result(job.results(), job.folder, trainer.step, unchanged=True)
    seconds = trainer.seconds
    done = Finished(trainer, stream, matrix, before, sample, job.folder, recorder, world)
    own, lines = options.finish(done)
    for report in filter(None, (part.report(trainer) for part in parts_of(type(trainer)))):  # type: ignore[attr-defined]
        own, lines = {**own, report.name: dict(report.values)}, [*lines, *report.lines]
        for name, draw in report.figures.items() if world.rank == 0 else ():
            recorder.figure(name, draw(), trainer.step)
    trainer.export(job.folder / "model.safetensors", options.data.described(sample, options.model))
    values = {
        "test_samples": [len(task.test_ids) for task in stream.tasks], "seconds": seconds, "steps": trainer.step,
        "skipped_steps": trainer.optimizer.skipped_count, "seed": options.trainer.seed, "world_size": world.size,
        "changes": trainer.changes, "describe": trainer.describe(), "stream": stream.fingerprint(), "versions": versions(),
        "configuration": config.resolved(options), **own}
    kept: Any = world.gather(values)[0]  # seconds differ by rank
    together(world, job.folder, lambda: recorder.result(kept))  # no rank goes on before it can read them
    recorder.say("\n".join([*lines, f"{trainer.step} steps in {seconds:.0f} s; see {_written(job.folder)}"]))
    return Result(kept, job.folder, trainer.step)


def _written(folder: Path) -> str:
    """Where the results are, in words."""
    figures = [str(path) for path in sorted((folder / "figures").glob("*.png"))]
    files = [f"{folder}/result.json", f"{folder}/model.safetensors", *figures]
    return f"{', '.join(files)}, and tensorboard --logdir {folder}"
