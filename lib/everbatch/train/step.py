"""The verbs of the Trainer, innermost, in the order a batch travels, and the step that calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everbatch import seeds
from everbatch.data import Batch, Task
from everbatch.data.batch import split_parts
from everbatch.distributed import World
from everbatch.errors import check
from everbatch.evaluate.evaluator import evaluating
from everbatch.nn import frozen_statistics
from everbatch.optim.mixin import OptimizerMixin
from everbatch.problems import Problem
from everbatch.report.recorder import Recorder
from everbatch.rows import Rows, each, rows_of, stacked
from everbatch.train.begun import Begun
from everbatch.train.diagnosis import warn_of_no_units
from everbatch.train.growth import Growth
from everbatch.train.launch import Engine
from everbatch.train.outputs import Pick, described, told
from everbatch.train.passes import ASIDE, OutputFn, Passes
from everbatch.train.record import StepRecord
from everbatch.train.run import Run
from everbatch.train.settings import TrainerConfig

__all__ = ["Stepper"]


class Stepper:
    """What a step needs, its verbs, and the step. `Trainer` builds it and runs it over a stream."""

    config: TrainerConfig
    world: World
    seed: int
    device: torch.device
    engine: Engine
    optimizer: OptimizerMixin
    module: nn.Module
    """The bare model."""
    problem: Problem
    """What is learned: losses, units and scores."""
    begun: Begun
    base_rates: list[float]
    """Learning rate of each parameter group, as the optimizer was given it."""
    growth: Growth
    augment: Callable[[Any], Any] | None
    prepare: Callable[[Any], Any] | None
    output_fn: OutputFn | None
    recorder: Recorder | None
    folder: Path | None
    identity: Mapping[str, Any]
    needs: dict[str, str]
    pick: Pick | None
    """Makes the network return its logits, where it returns more."""
    run: Run
    step: int
    """Steps begun, over all runs of this trainer."""
    serves = False
    """Whether it predicts while it trains, so that the model is in evaluation mode on purpose."""
    learns = True
    """Whether a step takes a gradient; without, it is one forward of each part."""
    tells_end = True
    """Whether `fit` says that nothing was left to train; a recipe says it itself."""
    _looked_in = -1
    """Task in which it was looked whether units count."""
    handles_signals = True
    """Whether `fit` takes the signals that ask a run to end, in the main thread and with a folder."""

    # -------------------------------------------------------------------------- verbs, innermost
    def configure_model(self, model: nn.Module) -> nn.Module:
        """Change the model before the engine is built."""
        return model

    def configure_stream(self, stream: Any) -> Any:
        """Change which samples each task trains on, before anything looks at them."""
        return stream

    def on_task_start(self, task: Task) -> None:
        """Before the first step of a task; not called again when a run resumes inside it."""

    def draw_batch(self, parts: list[Batch]) -> list[Batch]:
        """On the host: add parts to the batch of the stream."""
        return parts

    def augment_batch(self, parts: list[Batch]) -> list[Batch]:
        """Once per step: augment, move to the device, prepare. The stream part keeps its raw inputs in
        `extras`."""
        kept = self.run.peeked.pop(self.step, None)
        if kept is None:
            return self.ready(parts, self.step)
        # The stream's was made before its step, for `peek`, if nobody has changed its inputs since.
        rest = [part for part in parts if part.inputs is not kept.extras["raw"]]
        made = iter(self.ready(rest, self.step))
        return [kept if part.inputs is kept.extras["raw"] else next(made) for part in parts]

    def forward(self, batch: Batch) -> Tensor:
        """Outputs of one part, float32: logits (n, classes), or what the problem takes."""
        outputs = self.logits(self.engine.call, batch.inputs)
        stream = self.run.stream
        known = stream.num_classes if stream is not None else 0
        if self.growth.build is not None:
            known = self.run.seen_classes
        shape = (outputs.shape, batch.targets.shape, known)
        if shape not in self.run.fitting:
            self.problem.check(outputs, batch.targets, known)
            self.run.fitting.add(shape)
        return outputs

    def forward_parts(self, parts: Sequence[Batch]) -> Iterable[Tensor]:
        """Logits of all parts of a micro-batch, one `forward` each; the losses of one are taken before
        the next runs."""
        return map(self.forward, parts)

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Named scalars of one part; the problem's loss for the stream."""
        if batch.part != "stream":
            return {}
        problem = self.problem
        losses = problem.losses(outputs, batch.targets)
        if losses.shape != (len(batch),):  # times the weights of rows it would become a table
            check(False, type(problem).__name__, f"losses() of shape {tuple(losses.shape)}",
                  f"be one for each of {len(batch)} rows", "sum or average over all else")
        return {problem.term: batch.mean(losses)}

    def after_step(self, record: StepRecord) -> None:
        """After every step, applied or skipped."""

    def consolidate(self, task: Task) -> None:
        """After the last step of a task."""

    def on_task_end(self, task: Task) -> None:
        """After consolidation, before evaluation."""

    def predict(self, batch: Batch | Rows) -> Tensor:
        """Outputs of a batch whose inputs are ready, in evaluation mode.

        Args:
            batch: a batch, while the trainer evaluates; or model inputs (n, ...), one tensor or several
                by name, at any time: then the model is put into evaluation mode with the ranks' mean
                buffers, no gradient is kept, and modes and buffers are as before.

        Collective for inputs: call it on every rank; ranks may have different ones.
        """
        check(isinstance(batch, Tensor | Batch | dict), "Trainer", f"predict() of a {type(batch).__name__}",
              "get a tensor of inputs (n, ...), or a Batch", "torch.as_tensor(...) makes one of arrays")
        if isinstance(batch, Batch):
            return self.optimizer.predicted(lambda: self.forward(batch))
        with torch.no_grad(), frozen_statistics(self.module), evaluating(self.module, self.world):
            inputs = each(lambda value: value.to(self.device), batch)
            return self.optimizer.predicted(lambda: self.logits(self.engine.call, inputs))

    # -------------------------------------------------------------------------------- the step
    def training_step(self, batch: Batch) -> StepRecord:
        """One step of one batch of the stream: draw, augment, passes, update. Collective."""
        seeds.seed_step(self.seed, self.step, self.world.rank)
        parts = self.augment_batch(self.draw_batch([batch]))
        if self.problem.in_units:
            parts = self._by_units(parts)
        if not self.learns:
            return self._looked_at(parts)
        passes = Passes(self, parts, split_parts(parts, self.config.accumulation))
        loss = self.optimizer.step(passes.loss, **passes.auxiliary())

        found = passes.recorded
        assert found is not None
        outputs = {}
        for part in parts:  # a part of fewer rows than micro-batches was filled up
            if part.part == ASIDE:
                continue
            outputs[part.part] = torch.cat(found.outputs[part.part])[: len(part.targets)]
        applied = self.optimizer.last_applied
        record = StepRecord(self.step, applied, loss, found.terms, parts, outputs)
        self.after_step(record)
        self.step += 1
        return record

    def _looked_at(self, parts: list[Batch]) -> StepRecord:
        """A step that only predicts."""
        with torch.no_grad():
            outputs = {part.part: self.forward(part) for part in parts}
        record = StepRecord(self.step, True, torch.zeros((), device=self.device), {}, parts, outputs)
        self.after_step(record)
        self.step += 1
        return record

    # ------------------------------------------------------------------------- what it is made of
    def _by_units(self, parts: list[Batch]) -> list[Batch]:
        """Weights by which the loss of each part is a mean over its units, wherever they are: rank r's
        share of the rows' sums, over the mean of all ranks' shares of their units. One all-reduce."""
        weights = []
        for part in parts:
            even = torch.full((len(part),), 1.0 / len(part), device=self.device)
            weights.append(even if part.weight is None else part.weight)
        shares = [(weight.double() * self.problem.units(part.targets)).sum()
                  for part, weight in zip(parts, weights, strict=True)]
        means = self.world.sum(torch.stack(shares)) / self.world.size
        if self._looked_in != parts[0].task:  # one host sync per task
            self._looked_in = parts[0].task
            if not bool(means[0] > 0):
                warn_of_no_units(type(self.problem).__name__, f"the batch of step {self.step}, of task {parts[0].task},",
                                 self.world.rank)
        factors = torch.where(means > 0, 1.0 / means, 0.0)  # a part without units has no loss
        return [replace(part, weight=(weight.double() * factor).to(weight.dtype))
                for part, weight, factor in zip(parts, weights, factors, strict=True)]

    def ready(self, parts: list[Batch], step: int) -> list[Batch]:
        """Parts as that step trains on them: augmented, on the device, prepared."""
        raw = parts
        if self.augment is not None:
            parts = self._augmented(parts, step, self.augment)
        if self.device.type != "cpu":  # where batches come from
            parts = [part.to(self.device) for part in parts]
        result = []
        for part, before in zip(parts, raw, strict=True):
            extras = part.extras
            if part.part == "stream":
                extras = {**extras, "raw": before.inputs}
            result.append(replace(part, inputs=self.inputs_of(part.inputs), extras=extras))
        return result

    def _augmented(
        self, parts: list[Batch], step: int, augment: Callable[[Any], Any],
    ) -> list[Batch]:
        """Each row under a seed of its own, the same on any rank."""
        result = []
        with torch.random.fork_rng(devices=[]):
            for part in parts:
                rows = []
                keys = seeds.derive_each(part.ids.tolist(), self.seed, "augment", part.part, step)
                plain = isinstance(part.inputs, Tensor)
                each_row: Any = part.inputs if plain else rows_of(part.inputs)
                for row, key in zip(each_row, keys, strict=True):
                    # Not torch.manual_seed, which seeds devices too: their dropout follows the step.
                    torch.default_generator.manual_seed(key)
                    rows.append(augment(row))
                made = torch.stack(rows) if plain else stacked(rows)
                result.append(replace(part, inputs=made))
        return result

    def inputs_of(self, raw: Rows) -> Rows:
        """Model inputs of samples as the source gives them, without augmentation. Without `prepare`, one
        tensor becomes float32 where the problem takes no ids; what has names stays as it is."""
        if self.prepare is not None:
            return self.prepare(raw)  # type: ignore[no-any-return]
        return raw.float() if isinstance(raw, Tensor) and self.problem.floats else raw

    def logits(self, call: Callable[..., Any], inputs: Rows) -> Tensor:
        """What `call`, a way to run the network, gives of these inputs: its outputs, in float32."""
        half = self.config.precision == "bf16"
        picking = self.pick.on() if self.pick is not None else nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half), picking:
            try:
                logits: Any = call(**inputs) if isinstance(inputs, dict) else call(inputs)
            except Exception as error:
                better = told(error, inputs)
                if better is error:
                    raise
                raise better from error
        if not isinstance(logits, Tensor):
            check(False, "Trainer", f"a network that returns {described(logits)}", "return logits",
                  "name them: Trainer(..., output='logits'), or their index")
        return logits.float()  # type: ignore[no-any-return]

    def bare(self, inputs: Rows) -> Tensor:
        """Outputs of the bare module, float32, for gradients of inputs: no parameter gradient
        is reduced."""
        return self.logits(self.engine.bare, inputs)

    def peek(self, ahead: int) -> Batch | None:
        """Inside a step: the stream part of the step `ahead` steps from now, as that step will train on it;
        None past the end of the task. Memory: the batches in between wait on the device."""
        if not self.run.fetched(ahead):
            return None
        step = self.step + ahead
        if step not in self.run.peeked:
            self.run.peeked[step] = self.ready([self.run.ahead[ahead - 1]], step)[0]
        return self.run.peeked[step]

    def global_rows(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, targets and positions of the whole global batch: a function of the step, without
        communication."""
        assert self.run.loader is not None
        return self.run.loader.global_rows(self.run.task_step)
