"""A run over a stream of tasks: begin or go on, train, evaluate, keep, stop when asked."""

from __future__ import annotations

import math
import signal
import time
import warnings
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from everbatch import checkpoint
from everbatch.contract import parts_of
from everbatch.data import Loader, Stream, Task
from everbatch.evaluate.evaluator import firsts, scores
from everbatch.train import persist
from everbatch.train.boundaries import begins, ends, steps_before, visible_steps
from everbatch.train.consolidate import Consolidate
from everbatch.train.diagnosis import warn_of_no_units, where_not_finite
from everbatch.train.modes import warn_if_nothing_trains
from everbatch.train.record import StepRecord
from everbatch.train.run import Run
from everbatch.train.schedule import set_rates, task_schedule
from everbatch.train.signals import Interrupted, StopOnSignal
from everbatch.train.step import Stepper
from everbatch.train.task_ends import remember, require_stable, taken

__all__ = ["fit", "loader_of", "schedule_of"]


def fit(trainer: Stepper, stream: Stream, *, resume: bool) -> None:
    """`Trainer.fit`, once the ranks agree and own the folder."""
    kept = persist.newest(trainer) if resume and trainer.folder is not None else None
    if kept is None:
        for part in parts_of(type(trainer)):
            part.before_fit(trainer)  # type: ignore[attr-defined]
    run = trainer.run = Run(stream, since=time.monotonic())
    run.stop.asked_at = trainer.step, time.monotonic()
    if trainer.folder is not None and not resume:
        persist.set_aside(trainer.folder, trainer.world)
    if kept is not None:
        persist.load(trainer, kept)
        run.had_ended = run.task_index >= len(stream) and len(run.matrix) >= len(stream)
    if run.had_ended:
        if trainer.tells_end:
            persist.say(trainer, f"the run in {trainer.folder} is finished, after {trainer.step} steps; nothing to train "
                                 "(to prolong a run of one task, raise epochs)")
        run.since = None
        return
    if trainer.folder is not None:
        checkpoint.try_writing(trainer.folder, world=trainer.world)
    if kept is not None:
        persist.say(trainer, f"goes on from step {trainer.step}, {kept.path}")
        if trainer.recorder is not None:
            trainer.recorder.rewind(trainer.step - 1)
    try:
        watched = StopOnSignal(run.stop, active=trainer.folder is not None, rank=trainer.world.rank)
        with watched if trainer.handles_signals else nullcontext():
            _train(trainer, run, stream)
    except BaseException as error:
        _keep_scalars(trainer, error)
        raise
    finally:
        run.in_task = False
    run.rest()
    if run.stop.sign == signal.SIGINT and run.stop.stopped:
        text = (f"stopped by Ctrl-C after step {trainer.step}; a checkpoint is in {trainer.folder}; "
                "go on with resume=True")
        if trainer.recorder is None and trainer.world.rank == 0:
            print(text, flush=True)
        raise Interrupted(text)


def loader_of(trainer: Stepper, stream: Stream, task: Task, *, done: int = 0, workers: int = 0) -> Loader:
    """A task's batches, from its step `done` on."""
    config = trainer.config
    position = (trainer.step - done) * config.batch_size
    return Loader(
        stream, task, config.batch_size, config.epochs, trainer.seed, trainer.world, start=done, workers=workers,
        position0=position)


def schedule_of(trainer: Stepper, loader: Loader, *, done: int = 0) -> LRScheduler:
    """A task's learning rates, from its step `done` on; where tasks are not to be seen, those of the stream from its step."""
    config = trainer.config
    return task_schedule(
        config.schedule, trainer.base_rates, epochs=config.epochs, batch_size=config.batch_size,
        steps_per_epoch=visible_steps(trainer, loader), done=done)


def _train(trainer: Stepper, run: Run, stream: Stream) -> None:
    """Every task that is left, until a signal asks to stop."""
    if len(run.matrix) < run.task_index:  # stopped in that task's evaluation
        run.task_index -= 1
        _close_task(trainer, run, stream)
    while run.task_index < len(stream) and not run.stop.stopped:
        task = stream.tasks[run.task_index]
        if not _run_task(trainer, run, stream, task):
            _save(trainer)
            return
        if ends(stream, run.task_index):
            _end_task(trainer, task)
        _close_task(trainer, run, stream)


def _run_task(trainer: Stepper, run: Run, stream: Stream, task: Task) -> bool:
    """All steps of a task that are left; False where a signal asked to stop."""
    config, stop = trainer.config, run.stop
    loader = loader_of(trainer, stream, task, done=run.task_step, workers=config.workers)
    run.begin_task(loader)
    if run.task_step == 0 and begins(stream, run.task_index):
        if run.task_index and config.reset_optimizer:
            trainer.optimizer.host.reset_moments()
        require_stable(trainer)
        trainer.on_task_start(task)
        trainer.optimizer.host.watch.look_again()
    trainer.optimizer.task_samples = len(task.train_ids)
    run.in_task = True
    if not trainer.serves:
        warn_if_nothing_trains(trainer.module)
    if run.schedule is None or begins(stream, run.task_index):
        before = steps_before(trainer, stream, run.task_index)
        run.schedule = schedule_of(trainer, loader, done=before + run.task_step)
    schedule = run.schedule
    set_rates(trainer.optimizer.param_groups, schedule)
    if trainer.recorder is not None:
        title = f"task {task.id + 1}/{len(stream)}"
        trainer.recorder.bar(len(loader), title, done=run.task_step, show=("loss/total",))
    while run.fetched(1):
        record = trainer.training_step(run.ahead.popleft())
        run.task_step += 1
        _account(trainer, run, record)
        schedule.step()
        set_rates(trainer.optimizer.param_groups, schedule)
        if stop.agree(trainer.world, trainer.step):
            break
        due = config.checkpoint_every and trainer.step % config.checkpoint_every == 0
        if due and run.task_step < len(loader):
            _save(trainer)
    run.in_task = False
    return not (stop.stopped or stop.agree(trainer.world, trainer.step, now=True))


def _end_task(trainer: Stepper, task: Task) -> None:
    """What mixins, and the optimizer's memory, do after the last step of a task."""
    done = taken(trainer.optimizer)
    trainer.consolidate(task)
    if not isinstance(trainer, Consolidate):  # which does it where it stands among the mixins
        remember(trainer, task, done=done)
    trainer.on_task_end(task)


def _close_task(trainer: Stepper, run: Run, stream: Stream) -> None:
    """Evaluate after a task, and keep all of it; stopped meanwhile, keep that the evaluation is missing."""
    task = stream.tasks[run.task_index]
    last = len(stream) if trainer.config.eval_future else run.task_index + 1
    first = 0 if trainer.config.eval_past or run.task_index + 1 == len(stream) else run.task_index

    def stop(now: bool) -> bool:
        return run.stop.agree(trainer.world, trainer.step, now=now)

    found = scores(trainer, stream, run.task_index, list(stream.tasks[first:last]), stop=stop)
    row = firsts(found)
    if row is not None and trainer.problem.in_units:
        if math.isnan(row[run.task_index - first]):
            warn_of_no_units(type(trainer.problem).__name__, f"the test samples of task {task.id}", trainer.world.rank)
    run.end_task()
    if found is not None and row is not None:
        run.matrix.append([float("nan")] * first + row + [float("nan")] * (len(stream) - last))
        run.scores.append(found)
        _tell_scores(trainer, run, stream, task, found, first)
    _save(trainer)


def _tell_scores(trainer: Stepper, run: Run, stream: Stream, task: Task, found: list[dict[str, float]], at: int) -> None:
    """The scores of the tasks from number `at` on."""
    if trainer.recorder is None:
        return
    first, *_ = found[0]
    row = [values[first] for values in found]
    by_task = list(enumerate(found, at))
    written: dict[str, float | Tensor] = {f"{name}/task_{j}": v for j, values in by_task for name, v in values.items()}
    if at == 0:
        written[f"{first}/seen"] = float(np.mean(row[: run.task_index]))
    trainer.recorder.scalars(trainer.step - 1, written)
    in_percent = trainer.problem.fraction
    shown = " ".join(f"{100 * a:5.1f}" if in_percent else f"{a:6.3f}" for a in row)
    done = f"after task {task.id + 1}/{len(stream)} ({task.name})"
    trainer.recorder.say(f"{done}: {first.replace('_', ' ')} by task{', %' * in_percent}: {shown}")


def _account(trainer: Stepper, run: Run, record: StepRecord) -> None:
    """Record a step's scalars; end a run whose gradients stay not finite."""
    run.bad_steps = 0 if record.applied else run.bad_steps + 1
    if trainer.recorder is not None:
        trainer.recorder.scalars(record.step, _scalars(trainer, record))
        trainer.recorder.advance()
    if run.bad_steps >= trainer.config.max_bad_steps:
        found = where_not_finite(trainer.optimizer, trainer.world, record)
        if trainer.folder is not None and trainer.world.rank == 0:
            checkpoint.withdraw(trainer.folder)
        raise RuntimeError(f"Trainer: {run.bad_steps} consecutive steps up to step {record.step} gave a gradient that is "
                           f"not finite, and were skipped on every rank; in the last of them, {found}; lower the learning "
                           "rate or look at the data, or raise max_bad_steps")


def _scalars(trainer: Stepper, record: StepRecord) -> dict[str, float | Tensor]:
    """What is written of a step; one small all-reduce."""
    optimizer = trainer.optimizer
    terms = {"loss/total": record.loss}
    terms |= {f"loss/{name}": term for name, term in record.terms.items()}
    sums = trainer.world.sum(torch.stack([term.float() for term in terms.values()]))
    shares = sums / trainer.world.size
    values: dict[str, float | Tensor] = dict(zip(terms, shares, strict=True))
    values["lr"] = optimizer.param_groups[0]["lr"]
    values["steps/skipped"] = float(optimizer.skipped_count)
    values |= {f"optimizer/{name}": value for name, value in optimizer.metrics.items()}
    return values


def _keep_scalars(trainer: Stepper, error: BaseException) -> None:
    """Write what led to an error; where that fails as well, on a full disk, say so beside it."""
    try:
        if trainer.recorder is not None:
            trainer.recorder.flush()
    except Exception as another:
        with warnings.catch_warnings():
            # Made an error by a filter, it would stand in the place of the first.
            warnings.simplefilter("always")
            warnings.warn(f"Trainer: the last scalars before {type(error).__name__} were not written: "
                          f"{type(another).__name__}: {another}", stacklevel=4)


def _save(trainer: Stepper) -> None:
    if trainer.folder is not None:
        if trainer.recorder is not None:
            # Or a kill would lose scalars of steps that the checkpoint has behind it.
            trainer.recorder.flush()
        persist.save(trainer)
