"""The trainer: a final step over cooperative verbs, a stream of tasks, evaluation, checkpoints."""

from __future__ import annotations

import functools
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from everbatch import checkpoint, seeds
from everbatch.checkpoint.folder import claimed
from everbatch.contract import parts_of
from everbatch.data import Batch, Loader, Stream, Task, as_stream
from everbatch.data.loader import check_workers
from everbatch.data.notes import notes_of, tell
from everbatch.distributed import init
from everbatch.errors import check, check_whole
from everbatch.evaluate.evaluator import accuracies, predict_inputs
from everbatch.objective.terms import texts
from everbatch.report.recorder import Recorder
from everbatch.train import persist
from everbatch.train.arguments import check_arguments
from everbatch.train.auxiliary import OutputFn, auxiliary, check_objectives
from everbatch.train.consolidate import Consolidate
from everbatch.train.ddp import check_ddp
from everbatch.train.diagnosis import where_not_finite
from everbatch.train.export import export
from everbatch.train.launch import check_optimizer, launch
from everbatch.train.mixin import TrainerMixin
from everbatch.train.modes import evaluation_roots, warn_if_nothing_trains
from everbatch.train.outputs import Pick, check_output, described, foreign_errors
from everbatch.train.record import StepRecord
from everbatch.train.schedule import Schedule
from everbatch.train.signals import Interrupted, StopOnSignal
from everbatch.train.task_ends import active_parts, remember, require_stable, taken

__all__ = ["Trainer"]


class Trainer:
    """Trains a model on a stream of tasks, on any engine, with any trainer mixins to its left in a class statement.

    Args:
        model: a bare module that maps inputs to logits (n, classes), the head as wide as the stream.
        optimizer: `functools.partial(Cls, lr=..., ...)` of a composed optimizer class.
        engine: "plain", "ddp", "fsdp2", or a complete DeepSpeed configuration (`everbatch.config.layers.deepspeed_config`).
        config: see `Trainer.Config`.
        augment: maps one un-augmented sample to a training sample; it may draw from torch's global generator, which is seeded
            for every row by (seed, step, part, sample id), so the result is the same at any world size.
        prepare: maps a batch of (augmented or plain) samples to model inputs: scaling, normalisation.
        folder: where checkpoints go; None for none.
        recorder: where scalars go, given on every rank or on none (ranks but 0 write nothing); None for none.
        device: "cuda" or "cpu"; by default this rank's GPU where there is one.
        num_tasks: tasks of the stream, for mixins that divide something among them; `fit` knows it itself.
        output_fn: maps the stream's logits (n, classes) and batch to a 0-dim tensor, a mean over the rows: the output whose
            gradient `Ignite` bounds. Only for optimizers that ask for it.
        output: name or index of the logits in what the model returns, where that is a tuple, a dict or an object with
            attributes: "logits" for models of Hugging Face, 0 for (logits, auxiliary). None: it returns the logits.
        ddp: options of `DistributedDataParallel` by name, for engine="ddp": bucket_cap_mb, gradient_as_bucket_view and so on.
            find_unused_parameters is True by default: a weight that no rank's pass reaches is left alone, for one walk over the
            graph in each backward (torch prints once that it may be needless); False saves it, where every pass reaches all.
        identity: plain values by name that a resumed run must have too, such as those `augment` and `prepare` were made from.

    Raises:
        ValueError: on every rank, when the ranks were given different configurations, engines or models; an optimizer that needs
            an objective that is not there: `output_fn` (Ignite), losses by row with several micro-batches or Replay (ESAM); an
            identity that JSON cannot hold.

    Memory: what EWC, MAS, Refresh and SI want called at a task's end is called, once, as `Consolidate` does, which need not be
    listed; what a mixin's `consolidate` has called is not called again.

    Modes: every module stays in the mode that it is in when the trainer is built, or is put into later, norms and dropout alike;
    evaluation puts all modes back, and checkpoints keep them.

    Seeds: torch's global generator is reseeded for every step from (seed, step, rank), and everything else is stateless, so a
    resumed run repeats an uninterrupted one bit for bit without any saved random state.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        batch_size: int = 64
        """Samples of the stream per step, over all ranks and micro-batches; >= 1, divisible by ranks * accumulation."""
        epochs: int = 1
        """Passes over each task; >= 1."""
        accumulation: int = 1
        """Micro-batches per step and rank; >= 1."""
        schedule: Schedule = field(default_factory=Schedule)
        """Learning-rate schedule, restarted at every task."""
        precision: Literal["fp32", "bf16"] = "fp32"
        """bf16: autocast on plain, ddp and fsdp2 (masters stay fp32); on DeepSpeed say it in the engine's configuration."""
        seed: int = 0
        """Root of all randomness."""
        decay_vectors: bool = True
        """Weight decay on biases and norm scales too; False for large-batch recipes."""
        reset_optimizer: bool = True
        """Start every task with fresh optimizer moments, as the reference implementations do."""
        eval_batch: int = 256
        """Samples per rank and forward in evaluation; >= 1."""
        eval_future: bool = False
        """Evaluate tasks before they are trained as well (forward transfer)."""
        checkpoint_every: int = 0
        """Steps between checkpoints beside the one after each task; 0 for none."""
        keep_last: int = 2
        """Checkpoints kept; >= 1."""
        max_bad_steps: int = 10
        """Consecutive steps with a gradient that is not finite before the run stops; >= 1."""
        workers: int = 0
        """Processes per rank that fetch batches ahead; 0 fetches in the trainer's."""
        label_smoothing: float = 0.0
        """Share of each target spread evenly over all classes, in the stream's cross-entropy; in [0, 1)."""

        def __post_init__(self) -> None:
            for name, least in (("batch_size", 1), ("epochs", 1), ("accumulation", 1), ("eval_batch", 1), ("keep_last", 1),
                                ("checkpoint_every", 0), ("max_bad_steps", 1), ("workers", 0)):
                value = getattr(self, name)
                check_whole("Trainer", name, value, least)
            check_workers("Trainer", self.workers)
            check(self.precision in ("fp32", "bf16"), "Trainer", f"precision={self.precision!r}", "be fp32 or bf16")
            check(0 <= self.label_smoothing < 1, "Trainer", f"label_smoothing={self.label_smoothing!r}", "be in [0, 1)")

    def __init__(
        self, model: nn.Module, optimizer: functools.partial[Any], engine: str | Mapping[str, Any] = "plain", *,
        config: Config | None = None, augment: Callable[[Tensor], Tensor] | None = None,
        prepare: Callable[[Tensor], Tensor] | None = None, folder: str | Path | None = None, recorder: Recorder | None = None,
        device: str | None = None, num_tasks: int | None = None, output_fn: OutputFn | None = None,
        identity: Mapping[str, Any] | None = None, output: str | int | None = None, ddp: Mapping[str, Any] | None = None,
    ) -> None:
        check_optimizer(optimizer)
        check_output(output)
        check_ddp(ddp, engine)
        check_arguments(model, config, engine, device)
        self.config = config or Trainer.Config()  # not that of a part
        # DDP and FSDP2 want a process group, also of one rank that torchrun did not start.
        self.world, self.seed = init(device, lone=engine in ("ddp", "fsdp2")), self.config.seed
        self.num_tasks = self._tasks_told = num_tasks
        self.identity = dict(identity or {})
        persist.check_plain(self.identity)
        share = self.world.size * self.config.accumulation
        check(self.config.batch_size % share == 0, "Trainer", f"batch_size={self.config.batch_size}",
              f"be divisible by {self.world.size} ranks * {self.config.accumulation} micro-batches")
        check_objectives(type(self), optimizer, output_fn, self.config.accumulation)
        cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.augment, self.prepare, self.recorder, self.output_fn = augment, prepare, recorder, output_fn
        self.folder = None if folder is None else Path(folder)
        self._pick = Pick(output) if output is not None else None
        given = model
        hook = model.register_forward_hook(self._pick) if self._pick is not None else None
        model = self.configure_model(model)
        if hook is not None and model is not given:
            hook.remove()
            model.register_forward_hook(self._pick)  # type: ignore[arg-type]
        persist.agree(self.world, {
            **{f"trainer.{k}": v for k, v in vars(self.config).items()}, "engine": engine, "recorder": recorder is not None,
            "output": output, "ddp": ddp, "checkpoints": folder is not None, "model": persist.layout(model),
            **persist.parts(self, optimizer)})
        self.engine = launch(model, optimizer, engine, world=self.world, device=self.device, seed=self.seed,
                             decay_vectors=self.config.decay_vectors, ddp=ddp)
        self.optimizer, self.module = self.engine.optimizer, self.engine.module
        self.optimizer.complete_state = True
        self._base_lr = [float(g["lr"]) for g in self.optimizer.param_groups]
        self._base_options = persist.options_of(self.optimizer)
        self._begun_evaluation = evaluation_roots(self.module)
        self._begun_frozen = {n: True for n, p in self.module.named_parameters() if not p.requires_grad}
        self.step, self.task_index, self.task_step, self.bad_steps = 0, 0, 0, 0
        self.matrix: list[list[float]] = []
        self.changes: list[str] = []
        """What resumed runs had otherwise than the run before, in words: another learning rate, schedule or number of epochs."""
        self.stream: Stream | None = None
        self.loader: Loader | None = None
        self._outputs: dict[str, list[Tensor]] = {}
        self._terms: dict[str, Tensor] = {}
        self._stop_asked = self.stopped = self.had_ended = False
        self.stop_sign = 0
        self._seconds = 0.0
        self._since: float | None = None
        self._source: Iterator[Batch] = iter(())
        self._ahead: deque[Batch] = deque()
        self._prepared: dict[int, Batch] = {}

    @property
    def title(self) -> str:
        """Method, optimizer and engine, for figures."""
        parts = [p.__name__ for p in parts_of(type(self))] if isinstance(self, TrainerMixin) else []
        return f"{' + '.join(parts) or 'fine-tuning'}, {self.optimizer.host.title}"

    def describe(self) -> str:
        """The trainer's mixins with their options, then what the optimizer says of itself."""
        lines = [f"{type(self).__name__}: {self.title}, {self.world.size} rank{'s' * (self.world.size > 1)}, global batch "
                 f"{self.config.batch_size} in {self.config.accumulation} micro-batch(es)"]
        lines += [f"  {part.__name__:<18} {c!r}".replace(f"{part.__name__}.Config", "")
                  for part, c in getattr(self, "configs", {}).items()]
        lines += [f"  {part.__name__:<18} {part.notes(self)}" for part in parts_of(type(self)) if "notes" in vars(part)]  # type: ignore[attr-defined]
        terms = ["E_stream CE(logits, labels)", *texts(self), *texts(self.optimizer)]
        lines.append(f"  {'objective':<18} L = {' + '.join(terms)}")
        memory = [part.__name__ for part in active_parts(self.optimizer)]
        if memory and not issubclass(type(self), Consolidate):
            lines.append(f"  {'at a task end':<18} {', '.join(memory)} called by the trainer, on the task's training samples")
        return "\n".join([*lines, self.optimizer.describe()])

    # ---------------------------------------------------------------------------------------------- verbs, innermost
    def configure_model(self, model: nn.Module) -> nn.Module:
        """Change the model before the engine is built."""
        return model

    def on_task_start(self, task: Task) -> None:
        """Before the first step of a task; not called again when a run resumes inside it."""

    def draw_batch(self, parts: list[Batch]) -> list[Batch]:
        """On the host: add parts to the batch of the stream."""
        return parts

    def augment_batch(self, parts: list[Batch]) -> list[Batch]:
        """Once per step: augment, move to the device, prepare. The stream part keeps its raw inputs in `extras`."""
        return [self._ready(part) for part in parts]

    def forward(self, batch: Batch) -> Tensor:
        """Logits of one part, (n, classes) float32."""
        outputs = self._logits(self.engine.call, batch.inputs)
        known = self.stream.num_classes if self.stream is not None else 0
        check(outputs.ndim == 2 and outputs.shape[1] >= known, "Trainer", f"logits of {tuple(outputs.shape)}, {known} classes",
              "be (n, classes)", "give the model a head as wide as the stream")
        check(len(outputs) == len(batch.inputs), "Trainer", f"logits of {tuple(outputs.shape)} for {len(batch.inputs)} samples",
              "be one row for each")
        return outputs

    def forward_parts(self, parts: Sequence[Batch]) -> Iterable[Tensor]:
        """Logits of all parts of a micro-batch, one `forward` each; the losses of one are taken before the next runs."""
        return (self.forward(part) for part in parts)

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Named scalars of one part; cross-entropy for the stream."""
        if batch.part != "stream":
            return {}
        rows = functional.cross_entropy(outputs, batch.targets, reduction="none", label_smoothing=self.config.label_smoothing)
        return {"cross_entropy": batch.mean(rows)}

    def after_step(self, record: StepRecord) -> None:
        """After every step, applied or skipped."""

    def consolidate(self, task: Task) -> None:
        """After the last step of a task."""

    def on_task_end(self, task: Task) -> None:
        """After consolidation, before evaluation."""

    def predict(self, batch: Batch | Tensor) -> Tensor:
        """Logits of a batch whose inputs are ready, in evaluation mode.

        Args:
            batch: a batch, while the trainer evaluates; or model inputs (n, ...), at any time: then the model is put into
                evaluation mode with the ranks' mean buffers, no gradient is kept, and modes and buffers are as before.

        Collective for a tensor: call it on every rank; ranks may have different inputs.
        """
        check(isinstance(batch, Tensor | Batch), "Trainer", f"predict() of a {type(batch).__name__}", "get a tensor of inputs "
              "(n, ...), or a Batch", "torch.as_tensor(...) makes one of arrays")
        return predict_inputs(self, batch) if isinstance(batch, Tensor) else self.forward(batch)

    # -------------------------------------------------------------------------------------------------------- the step
    def training_step(self, batch: Batch) -> StepRecord:
        """One step of one batch of the stream: draw, augment, passes, update. Collective."""
        seeds.seed_step(self.seed, self.step, self.world.rank)
        parts = self.augment_batch(self.draw_batch([batch]))
        micros = list(zip(*(part.split(self.config.accumulation) for part in parts), strict=True))

        def closure() -> Tensor:
            if self.optimizer.recording:
                self._outputs, self._terms = {}, {}
            return torch.stack([self._micro(micro) for micro in self.optimizer.micro_batches(micros, average=False)]).sum()

        loss = self.optimizer.step(closure, **auxiliary(self, parts, micros))
        outputs = {part: torch.cat(rows) for part, rows in self._outputs.items()}
        sizes = {part.part: len(part) for part in parts}
        record = StepRecord(self.step, self.optimizer.last_applied, loss, self._terms, parts,
                            {part: rows[: sizes[part]] for part, rows in outputs.items()})
        self.after_step(record)
        self.step += 1
        return record

    def _micro(self, parts: tuple[Batch, ...]) -> Tensor:
        """Forward and backward of one micro-batch, all parts of it; returns its loss, detached."""
        terms: dict[str, Tensor] = {}
        for part, outputs in zip(parts, self.forward_parts(parts), strict=True):
            for name, term in self.loss_terms(outputs, part).items():
                terms[name] = terms[name] + term if name in terms else term
            if self.optimizer.recording:
                self._outputs.setdefault(part.part, []).append(outputs.detach())
        loss = torch.stack(list(terms.values())).sum()
        self.optimizer.backward(loss)
        if self.optimizer.recording:
            for name, term in terms.items():
                self._terms[name] = self._terms[name] + term.detach() if name in self._terms else term.detach()
        return loss.detach()

    def bare(self, inputs: Tensor) -> Tensor:
        """Logits of the bare module, (n, classes) float32, for gradients of inputs: no parameter gradient is reduced."""
        return self._logits(self.engine.bare, inputs)

    def _logits(self, call: Callable[[Tensor], Any], inputs: Tensor) -> Tensor:
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        with autocast, foreign_errors(inputs), self._pick.on() if self._pick is not None else nullcontext():
            logits = call(inputs)
        check(isinstance(logits, Tensor), "Trainer", f"a network that returns {described(logits)}", "return logits",
              "name them: Trainer(..., output='logits'), or their index")
        return logits.float()  # type: ignore[no-any-return]

    def _ready(self, part: Batch, step: int | None = None) -> Batch:
        step = self.step if step is None else step
        if step in self._prepared and self._prepared[step].extras["raw"] is part.inputs:
            return self._prepared.pop(step)
        raw = part.inputs
        inputs = self._augmented(part, step) if self.augment is not None else raw
        extras = {**part.extras, "raw": raw} if part.part == "stream" else part.extras
        part = replace(part, inputs=inputs, extras=extras).to(self.device)
        return replace(part, inputs=self.inputs_of(part.inputs))

    def inputs_of(self, raw: Tensor) -> Tensor:
        """Model inputs of samples as the source gives them, without augmentation."""
        return self.prepare(raw) if self.prepare is not None else raw.float()

    def _augmented(self, part: Batch, step: int) -> Tensor:
        rows = []
        assert self.augment is not None
        with torch.random.fork_rng(devices=[]):
            for row, key in zip(part.inputs, part.ids.tolist(), strict=True):
                # Not torch.manual_seed, which seeds devices as well: their dropout follows the step.
                torch.default_generator.manual_seed(seeds.derive(self.seed, "augment", part.part, step, key))
                rows.append(self.augment(row))
        return torch.stack(rows)

    # --------------------------------------------------------------------------------------------------------- the run
    def fit(self, stream: Stream | Any, *, resume: bool = False) -> list[list[float]]:
        """Train on all tasks; returns the accuracy matrix: row k, after task k, column j, on task j (NaN: not evaluated).

        Args:
            stream: the tasks; or what `everbatch.data.as_stream` makes one of: (train, test), or a list of such pairs.
            resume: go on from the newest good checkpoint in `folder`, if there is one. Learning rate, schedule, and the epochs of
                an unfinished task or of a one-task run may be others than before; that is said and kept in `changes`. A run that
                is finished and not prolonged is left as it is.

        Without `resume`, checkpoints of an earlier run in `folder` are moved to `folder`/previous/N. While it runs, `folder`
        belongs to this run alone. SIGTERM and SIGUSR1 have a checkpoint written, and `stopped` is true afterwards.

        A second call trains on: tasks and the matrix begin anew; weights, optimizer, what mixins remember, the count of steps
        and the samples' positions in the stream go on.

        Raises:
            ValueError: on every rank, when the ranks have different streams; a batch larger than a task; another number of tasks
                than the constructor was told; a second call where Consolidate isolated tasks.
            CheckpointMismatch: a checkpoint of another configuration, stream or model.
            Interrupted: a KeyboardInterrupt, after a Ctrl-C and with a checkpoint in `folder`; a second one ends the process
                with exit code 130. Uncaught it ends a script with that code and one line. Without a folder a Ctrl-C is Python's
                own KeyboardInterrupt, at once.
            RuntimeError: too many consecutive steps without a finite gradient, naming ranks, samples and tensors; a folder that
                cannot be written to; weights that are not finite when a checkpoint is due.
        """
        check(not resume or self.folder is not None, "Trainer", "fit(resume=True) without a folder", "have one",
              "pass Trainer(..., folder=...), where checkpoints go")
        stream = as_stream(stream)
        self.validate(stream)
        self.stream, self.num_tasks = stream, len(stream)
        for note in notes_of(stream):
            tell(f"data: {note}")
        persist.agree(self.world, {**persist.identity(self), "resume": resume})
        with nullcontext() if self.folder is None else claimed(self.folder, self.world):
            return self._fit(stream, resume)

    def _fit(self, stream: Stream, resume: bool) -> list[list[float]]:
        """`fit`, once the ranks agree and own the folder."""
        kept = persist.newest(self) if resume and self.folder is not None else None
        for part in parts_of(type(self)) if kept is None else ():
            if "before_fit" in vars(part):
                part.before_fit(self)  # type: ignore[attr-defined]
        self._stop_asked = self.stopped = self.had_ended = False
        self.stop_sign, self._seconds, self._since = 0, 0.0, time.monotonic()
        self._asked_at = (self.step, time.monotonic())
        self.task_index, self.task_step, self.bad_steps, self.matrix, self.changes = 0, 0, 0, [], []
        if self.folder is not None and not resume:
            persist.set_aside(self.folder, self.world)
        if kept is not None:
            persist.load(self, kept)
            self.had_ended = self.task_index >= len(stream) and len(self.matrix) >= len(stream)
        if self.had_ended:
            if self.tells_end:
                persist.say(self, f"the run in {self.folder} is finished, after {self.step} steps; nothing to train "
                                  "(to prolong a run of one task, raise epochs)")
            self._since = None
            return self.matrix
        if self.folder is not None:
            checkpoint.try_writing(self.folder, world=self.world)
        if kept is not None:
            persist.say(self, f"goes on from step {self.step}, {kept.path}")
            if self.recorder is not None:
                self.recorder.rewind(self.step - 1)
        try:
            with StopOnSignal(self):
                if len(self.matrix) < self.task_index:  # stopped in that task's evaluation
                    self.task_index -= 1
                    self._close_task(stream, stream.tasks[self.task_index])
                while self.task_index < len(stream) and not self.stopped:
                    self._run_task(stream, stream.tasks[self.task_index])
        except BaseException as error:
            self._keep_scalars(error)
            raise
        self._seconds, self._since = self.seconds, None
        if self.stop_sign == signal.SIGINT and self.stopped:
            text = f"stopped by Ctrl-C after step {self.step}; a checkpoint is in {self.folder}; go on with resume=True"
            if self.recorder is None and self.world.rank == 0:
                print(text, flush=True)
            raise Interrupted(text)
        return self.matrix

    @property
    def seconds(self) -> float:
        """Spent in `fit` so far, by this run: over resumes too, up to the checkpoint that each went on from."""
        return self._seconds + (0.0 if self._since is None else time.monotonic() - self._since)

    def _keep_scalars(self, error: BaseException) -> None:
        """Write what led to an error; where that fails as well, on a full disk, say so beside it and not in its place."""
        try:
            if self.recorder is not None:
                self.recorder.flush()
        except Exception as another:
            with warnings.catch_warnings():
                warnings.simplefilter("always")  # made an error by a filter, it would stand in the place of the first
                warnings.warn(f"Trainer: the last scalars before {type(error).__name__} were not written: "
                              f"{type(another).__name__}: {another}", stacklevel=3)

    def validate(self, stream: Stream) -> None:
        """Raise what `fit` would, of any task, before the first step of the first."""
        check(self._tasks_told in (None, len(stream)), "Trainer", f"a stream of {len(stream)} tasks after num_tasks="
              f"{self._tasks_told}", "have as many", "leave num_tasks out, or give the stream's")
        for task in stream.tasks:
            loader = Loader(stream, task, self.config.batch_size, self.config.epochs, self.seed, self.world)
            self._schedule(loader.steps_per_epoch)

    def _run_task(self, stream: Stream, task: Task) -> None:
        config = self.config
        self.loader = Loader(stream, task, config.batch_size, config.epochs, self.seed, self.world, start=self.task_step,
                             workers=config.workers, position0=(self.step - self.task_step) * config.batch_size)
        self._source, self._ahead, self._prepared = iter(self.loader), deque(), {}
        if self.task_step == 0:
            if self.task_index and config.reset_optimizer:
                self.optimizer.host.reset_moments()
            require_stable(self)
            self.on_task_start(task)
            self.optimizer.host.watch.look_again()
        warn_if_nothing_trains(self.module)
        schedule = self._schedule(self.loader.steps_per_epoch, self.task_step)
        self._set_rates(schedule)
        if self.recorder is not None:
            self.recorder.bar(len(self.loader), f"task {task.id + 1}/{len(stream)}", done=self.task_step, show=("loss/total",))
        while self._fetched(1):
            batch = self._ahead.popleft()
            record = self.training_step(batch)
            self.task_step += 1
            self._account(record)
            schedule.step()
            self._set_rates(schedule)
            if self._should_stop():
                break
            if config.checkpoint_every and self.step % config.checkpoint_every == 0 and self.task_step < len(self.loader):
                self._save()
        if self.stopped or self._should_stop(now=True):
            self._save()
            return
        done = taken(self.optimizer)
        self.consolidate(task)
        if not issubclass(type(self), Consolidate):  # which does it where it stands among the mixins
            remember(self, task, done=done)
        self.on_task_end(task)
        self._close_task(stream, task)

    def _close_task(self, stream: Stream, task: Task) -> None:
        """Evaluate after a task, and keep all of it; stopped in between, keep that the evaluation is missing."""
        last = len(stream) if self.config.eval_future else self.task_index + 1
        row = accuracies(self, stream, self.task_index, list(stream.tasks[:last]), stop=self._should_stop)
        if row is None:
            self.task_index, self.task_step = self.task_index + 1, 0
            self._save()
            return
        self.matrix.append(row + [float("nan")] * (len(stream) - last))
        self.task_index, self.task_step = self.task_index + 1, 0
        if self.recorder is not None:
            self.recorder.scalars(self.step - 1, {f"accuracy/task_{j}": a for j, a in enumerate(row)}
                                  | {"accuracy/seen": float(np.mean(row[: self.task_index]))})
            shown = " ".join(f"{100 * a:5.1f}" for a in row)
            self.recorder.say(f"after task {task.id + 1}/{len(stream)} ({task.name}): accuracy by task, %: {shown}")
        self._save()

    def _fetched(self, count: int) -> bool:
        """Whether so many batches of the task are left; they are fetched then."""
        while len(self._ahead) < count and (batch := next(self._source, None)) is not None:
            self._ahead.append(batch)
        return len(self._ahead) >= count

    def peek(self, ahead: int) -> Batch | None:
        """Inside a step: the stream part of the step `ahead` steps from now, as that step will train on it; None past the end
        of the task. Memory: the batches in between wait on the device."""
        if not self._fetched(ahead):
            return None
        batch, step = self._ahead[ahead - 1], self.step + ahead
        if step not in self._prepared:
            self._prepared[step] = self._ready(batch, step)
        return self._prepared[step]

    @property
    def steps_left(self) -> int:
        """Steps of the present task that are not begun."""
        assert self.loader is not None
        return len(self.loader) - self.task_step

    def _schedule(self, steps_per_epoch: int, done: int = 0) -> torch.optim.lr_scheduler.LRScheduler:
        """A task's schedule, `done` steps on. Its groups are its own: each rate is made from the last, and a tensor rounds."""
        like = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in self._base_lr])
        schedule = self.config.schedule.build(like, epochs=self.config.epochs, steps_per_epoch=steps_per_epoch,
                                              batch_size=self.config.batch_size)
        like._opt_called = True  # type: ignore[attr-defined]  # it warns of a schedule that is stepped before its optimizer
        for _ in range(done):
            schedule.step()
        return schedule

    def _set_rates(self, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
        for group, like in zip(self.optimizer.param_groups, schedule.optimizer.param_groups, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(like["lr"])  # a captured graph may hold it
            else:
                group["lr"] = like["lr"]

    def _account(self, record: StepRecord) -> None:
        self.bad_steps = 0 if record.applied else self.bad_steps + 1
        if self.recorder is not None:
            terms = {"loss/total": record.loss, **{f"loss/{name}": term for name, term in record.terms.items()}}
            shares = self.world.sum(torch.stack([term.float() for term in terms.values()])) / self.world.size
            values: dict[str, float | Tensor] = dict(zip(terms, shares, strict=True))
            values |= {"lr": self.optimizer.param_groups[0]["lr"], "steps/skipped": float(self.optimizer.skipped_count)}
            values |= {f"optimizer/{name}": value for name, value in self.optimizer.metrics.items()}
            self.recorder.scalars(record.step, values)
            self.recorder.advance()
        if self.bad_steps >= self.config.max_bad_steps:
            found = where_not_finite(self, record)
            if self.folder is not None and self.world.rank == 0:
                checkpoint.withdraw(self.folder)
            raise RuntimeError(f"Trainer: {self.bad_steps} consecutive steps up to step {record.step} gave a gradient that is "
                               f"not finite, and were skipped on every rank; in the last of them, {found}; lower the learning "
                               "rate or look at the data, or raise max_bad_steps")

    def global_rows(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, targets and positions of the whole global batch: a function of the step, without communication."""
        assert self.loader is not None
        return self.loader.global_rows(self.task_step)

    def _should_stop(self, now: bool = False) -> bool:
        """Whether a signal reached any rank. The answer is a collective, so it is asked for `now`, at every tenth step, and at
        every step where one takes a second or more: launchers wait half a minute."""
        if self._signals and (now or self.world.size == 1 or self._slow or self.step % 10 == 0):
            (begun, since), self._asked_at = self._asked_at, (self.step, time.monotonic())
            spent = time.monotonic() - since
            told = [self._stop_asked, self.stop_sign == signal.SIGINT, spent >= max(1, self.step - begun)]
            some, ctrl_c, self._slow = (bool(n) for n in self.world.sum(torch.tensor([float(t) for t in told])))
            self.stopped = some
            self.stop_sign = signal.SIGINT if ctrl_c else self.stop_sign
        return self.stopped

    def export(self, path: str | Path, metadata: Mapping[str, Any] | None = None) -> Path:
        """Write the bare model's weights and buffers, and what `metadata` and the trainer know of them, to one safetensors file
        that timm and `everbatch.train.load_model` take; see `everbatch.train.export`. Collective."""
        return export(self, path, metadata)

    tells_end = True
    """Whether `fit` says that nothing was left to train; a recipe says it itself."""
    _signals = _slow = False
    _asked_at = (0, 0.0)

    def _save(self) -> None:
        if self.folder is not None:
            if self.recorder is not None:
                self.recorder.flush()  # or a kill would lose scalars of steps that the checkpoint has behind it
            persist.save(self)
