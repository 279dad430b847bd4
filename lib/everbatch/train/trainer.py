"""The trainer: built on an engine, run over a stream of tasks; what a user calls."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from everbatch.checkpoint.folder import claimed
from everbatch.contract import parts_of
from everbatch.data import Loader, Stream, as_stream
from everbatch.data.notes import notes_of, tell
from everbatch.distributed import init
from everbatch.errors import check
from everbatch.evaluate.export import export
from everbatch.objective.terms import texts
from everbatch.problems import Problem
from everbatch.report.recorder import Recorder
from everbatch.train import fit, persist, relaunch
from everbatch.train.arguments import check_arguments
from everbatch.train.auxiliary import check_objectives, check_problem, check_targets, needed, problem_of
from everbatch.train.begun import Begun
from everbatch.train.boundaries import check_manner
from everbatch.train.consolidate import Consolidate
from everbatch.train.ddp import check_ddp
from everbatch.train.growth import Build, Growth, check_growable, following
from everbatch.train.launch import check_optimizer, launch
from everbatch.train.outputs import Pick, check_output
from everbatch.train.passes import OutputFn
from everbatch.train.run import Run
from everbatch.train.settings import TrainerConfig
from everbatch.train.step import Stepper
from everbatch.train.task_ends import active_parts

__all__ = ["Trainer"]


def _of_run(path: str) -> Any:
    """An attribute that the trainer's run holds. Reading it costs no Python frame."""
    place, _, name = path.rpartition(".")
    holder = operator.attrgetter(f"run.{place}" if place else "run")
    return property(operator.attrgetter(f"run.{path}"), lambda self, value: setattr(holder(self), name, value))


class Trainer(Stepper):
    """Trains a model on a stream of tasks, on any engine, with any trainer mixins to its left in a class statement.

    Args:
        model: a bare module that maps inputs to what `problem` takes: for classification logits (n, classes), the head as wide as
            the stream, or as its first task where it grows. Inputs by name are its keyword arguments.
        optimizer: `functools.partial(Cls, lr=..., ...)` of a composed optimizer class.
        engine: "plain", "ddp", "fsdp2", or a complete DeepSpeed configuration (`everbatch.config.layers.deepspeed_config`).
        config: see `Trainer.Config`.
        augment: maps one un-augmented sample to a training sample; it may draw from torch's global generator, which is seeded
            for every row by (seed, step, part, sample id), so the result is the same at any world size.
        prepare: maps a batch of (augmented or plain) samples to model inputs: scaling, normalisation. Without it one tensor
            becomes float32, but for problems whose inputs are ids, and named inputs stay as they are.
        folder: where checkpoints go; None for none.
        recorder: where scalars go, given on every rank or on none (ranks but 0 write nothing); None for none.
        device: "cuda", "cuda:N" or "cpu"; by default this rank's GPU where there is one. "cuda:N" becomes the
            current device of this process.
        num_tasks: tasks of the stream, for mixins that divide something among them; `fit` knows it itself.
        problem: what is learned, of `everbatch.problems`: the loss of each row, its units, the scores. By default
            `Classification(label_smoothing=config.label_smoothing)`.
        output_fn: maps the stream's outputs and batch to a 0-dim tensor, a mean over the rows: the output whose gradient `Ignite`
            bounds. Only for optimizers that ask for it; by default that of the problem, where it has one (`Regression`).
        output: name or index of the logits in what the model returns, where that is a tuple, a dict or an object with
            attributes: "logits" for models of Hugging Face, 0 for (logits, auxiliary). None: as the problem says (`CausalLM`
            takes "logits"), else it returns the logits.
        ddp: options of `DistributedDataParallel` by name, for engine="ddp": bucket_cap_mb, gradient_as_bucket_view and so on.
            find_unused_parameters is True by default: a weight that no rank's pass reaches is left alone, for one walk over the
            graph in each backward (torch prints once that it may be needless); False saves it, where every pass reaches all.
        identity: plain values by name that a resumed run must have too, such as those `augment` and `prepare` were made from.
        grown: for a model that grows between tasks (`relaunch`): a function of the growths so far, plain values, to the bare
            model after them, with fresh weights from torch's global generator; of none, one like `model`.

    Raises:
        ValueError: on every rank, when the ranks were given different configurations, engines or models; an optimizer that needs
            an objective that is not there: `output_fn` (Ignite), losses by row with several micro-batches or Replay (ESAM); a
            method that has no meaning for the problem; an identity that JSON cannot hold.

    Memory: what EWC, MAS, Refresh and SI want called at a task's end is called, once, as `Consolidate` does, which need not be
    listed; what a mixin's `consolidate` has called is not called again.

    Modes: every module stays in the mode that it is in when the trainer is built, or is put into later, norms and dropout alike;
    evaluation puts all modes back, and checkpoints keep them.

    Seeds: torch's global generator is reseeded for every step from (seed, step, rank), and everything else is stateless, so a
    resumed run repeats an uninterrupted one bit for bit without any saved random state.
    """

    Config: TypeAlias = TrainerConfig

    if TYPE_CHECKING:
        stream: Stream | None
        loader: Loader | None
        task_index: int
        task_step: int
        bad_steps: int
        matrix: list[list[float]]
        scores: list[list[dict[str, float]]]
        changes: list[str]
        had_ended: bool
        stopped: bool
        stop_sign: int
        seconds: float
        steps_left: int
    else:  # what a run knows; see `Run`
        stream, loader = _of_run("stream"), _of_run("loader")
        task_index, task_step = _of_run("task_index"), _of_run("task_step")
        matrix, bad_steps = _of_run("matrix"), _of_run("bad_steps")
        scores = _of_run("scores")
        changes, had_ended = _of_run("changes"), _of_run("had_ended")
        stopped, stop_sign = _of_run("stop.stopped"), _of_run("stop.sign")
        seconds, steps_left = _of_run("seconds"), _of_run("steps_left")

    def __init__(
        self, model: nn.Module, optimizer: functools.partial[Any], engine: str | Mapping[str, Any] = "plain", *,
        config: TrainerConfig | None = None, augment: Callable[[Any], Any] | None = None,
        prepare: Callable[[Any], Any] | None = None, folder: str | Path | None = None, recorder: Recorder | None = None,
        device: str | None = None, num_tasks: int | None = None, output_fn: OutputFn | None = None,
        identity: Mapping[str, Any] | None = None, output: str | int | None = None, ddp: Mapping[str, Any] | None = None,
        problem: Problem | None = None, grown: Build | None = None,
    ) -> None:
        check_optimizer(optimizer)
        for part in parts_of(type(self)):
            optimizer = part.for_optimizer(self, optimizer)  # type: ignore[attr-defined]
        check_output(output)
        check_ddp(ddp, engine)
        check_arguments(model, config, engine, device)
        self.config = config or Trainer.Config()  # not that of a part
        self.problem = problem_of(problem, self.config)
        output_fn = self.problem.output_fn if output_fn is None and self.problem.bounded else output_fn
        # DDP and FSDP2 want a process group, also of one rank that torchrun did not start.
        self.world = init(device, lone=engine in ("ddp", "fsdp2"))
        self.seed = self.config.seed
        self.num_tasks = self._tasks_told = num_tasks
        self.identity = dict(identity or {})
        persist.check_plain(self.identity)
        share = self.world.size * self.config.accumulation
        check(self.config.batch_size % share == 0, "Trainer", f"batch_size={self.config.batch_size}",
              f"be divisible by {self.world.size} ranks * {self.config.accumulation} micro-batches")
        check_objectives(type(self), optimizer, output_fn, self.config.accumulation)
        check_problem(self.problem, optimizer)

        cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
        if device is not None and ":" in device:
            torch.cuda.set_device(device)
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.augment, self.prepare = augment, prepare
        self.recorder, self.output_fn = recorder, output_fn
        self.folder = None if folder is None else Path(folder)
        self.run, self.step = Run(), 0
        self.growth = Growth(grown)
        optimizer = following(optimizer, self.growth)
        check_growable(self, optimizer, self.growth)
        self._output, self._put = output, functools.partial(
            launch, optimizer=optimizer, engine=engine, world=self.world, device=self.device, seed=self.seed,
            decay_vectors=self.config.decay_vectors, ddp=ddp, compiled=self.config.compile)
        model = self._configured(model)

        persist.agree(self.world, {
            **{f"trainer.{k}": v for k, v in vars(self.config).items()}, "engine": engine, "recorder": recorder is not None,
            "output": output, "problem": repr(self.problem), "ddp": ddp, "checkpoints": folder is not None,
            "model": persist.layout(model), "grown": grown is not None, **persist.parts(self, optimizer)})
        self.growth.born = self.growth.born_in(nn.Module(), model)
        self._launch(model)
        self.begun = Begun.of(self.optimizer, self.module)
        self.needs = needed(self.optimizer)

    def _launch(self, model: nn.Module) -> None:
        """Put a bare model on the engine, under a new optimizer."""
        self.engine = self._put(model, born=self.growth.born)
        self.optimizer, self.module = self.engine.optimizer, self.engine.module
        self.optimizer.complete_state = True
        self.optimizer.problem = None if self.problem.cross_entropy else self.problem
        self.base_rates = [float(group["lr"]) for group in self.optimizer.param_groups]

    def _configured(self, model: nn.Module) -> nn.Module:
        """The model as mixins want it, returning its logits. A mixin may ask for them, and may give another model."""
        chosen = self.problem.output if self._output is None else self._output
        found = self.problem.finds if chosen is None else chosen
        self.pick = Pick(found, strict=chosen is not None) if found is not None else None
        if self.pick is None:
            return self.configure_model(model)
        hook = model.register_forward_hook(self.pick)
        made = self.configure_model(model)
        if made is not model:
            hook.remove()
            made.register_forward_hook(self.pick)
        return made

    @property
    def title(self) -> str:
        """Method, optimizer and engine, for figures."""
        parts = [p.__name__ for p in parts_of(type(self)) if not p.observes]  # type: ignore[attr-defined]
        return f"{' + '.join(parts) or 'fine-tuning'}, {self.optimizer.host.title}"

    def describe(self) -> str:
        """The trainer's mixins with their options, then what the optimizer says of itself."""
        lines = [f"{type(self).__name__}: {self.title}, {self.world.size} rank{'s' * (self.world.size > 1)}, global batch "
                 f"{self.config.batch_size} in {self.config.accumulation} micro-batch(es)"]
        lines += [f"  {part.__name__:<18} {c!r}".replace(f"{part.__name__}.Config", "")
                  for part, c in getattr(self, "configs", {}).items()]
        notes = {part.__name__: part.notes(self) for part in parts_of(type(self))}  # type: ignore[attr-defined]
        lines += [f"  {name:<18} {note}" for name, note in notes.items() if note]
        if self.problem.in_units:
            lines.append(f"  {'units':<18} count alike on all ranks: 1 all-reduce of a float64 for each part, in a step")
        terms = [f"E_stream {self.problem.text}", *texts(self), *texts(self.optimizer)]
        lines.append(f"  {'objective':<18} L = {' + '.join(terms)}")
        memory = [part.__name__ for part in active_parts(self.optimizer)]
        if memory and not isinstance(self, Consolidate):
            lines.append(f"  {'at a task end':<18} {', '.join(memory)} called by the trainer, on the task's training samples")
        return "\n".join([*lines, self.optimizer.describe()])

    def fit(self, stream: Stream | Any, *, resume: bool = False) -> list[list[float]]:
        """Train on all tasks; returns the accuracy matrix: row k, after task k, column j, on task j (NaN: not evaluated). Of a
        problem that is no classification, its first score; all scores are in `scores[k][j]`, by name.

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
        stream = self.configure_stream(as_stream(stream))
        self._check(stream)
        self.run.stream, self.run.hashed = stream, None  # the run itself begins once it is not refused
        self.num_tasks = len(stream)
        for note in notes_of(stream) if self.problem.labels else ():
            tell(f"data: {note}")
        persist.agree(self.world, {**persist.identity(self), "resume": resume})
        with nullcontext() if self.folder is None else claimed(self.folder, self.world):
            fit.fit(self, stream, resume=resume)
        return self.run.matrix

    def relaunch(self, grow: Any) -> None:
        """Go on with a model that has grown: between tasks, in `on_task_start` (before `super()`), or between two calls of
        `fit`. Collective.

        The engine and the optimizer are built anew around `grown([*growths, grow])`, and all that both models have goes on
        under its name: weights, frozen ones too, moments, averages, what mixins remember, this rank's buffers, modes. A new
        parameter begins with the factory's weights, moments of its own in a parameter group of its own, and the options that
        the optimizer was given. What is frozen is what the factory freezes. `optimizer`, `module` and `engine` are new
        objects; hooks on the old module are gone. Checkpoints hold the growths, and a resumed run repeats them.

        Where nothing is added the run goes on bit for bit.

        Args:
            grow: what the factory is to add: a plain value, as JSON has them.

        Raises:
            ValueError: on every rank, and the trainer is as before: no factory; inside a task or a step; a growth that is no
                plain value or differs by rank; a factory that drops or changes a known parameter, gives the model in use or
                one in an engine, or other bits of new weights on another rank.

        Cost: weights, moments and what mixins keep by name, whole, on the CPU of every rank for the time of the call; the
        building of an engine: 0.1 s to some seconds.
        """
        relaunch.relaunch(self, grow)

    @property
    def growths(self) -> list[Any]:
        """What the model has grown by, in order."""
        return list(self.growth.done)

    def validate(self, stream: Stream) -> None:
        """Raise what `fit` would, of any task, before the first step of the first."""
        self._check(self.configure_stream(stream))

    def _check(self, stream: Stream) -> None:
        check(self._tasks_told in (None, len(stream)), "Trainer", f"a stream of {len(stream)} tasks after num_tasks="
              f"{self._tasks_told}", "have as many", "leave num_tasks out, or give the stream's")
        check_targets(self.problem, stream)
        check_manner(self, stream)
        for task in stream.tasks:
            fit.schedule_of(self, fit.loader_of(self, stream, task))

    def export(self, path: str | Path, metadata: Mapping[str, Any] | None = None, *, parts: bool = False) -> Path:
        """Write the bare model's weights and buffers, and what `metadata` and the trainer know of them, to one safetensors file
        that timm and `everbatch.train.load_model` take; a head in parts as one layer, unless `parts` keeps it so. See
        `everbatch.evaluate.export`. Collective."""
        return export(self, path, metadata, parts=parts)
