"""Continual learning: a data set that comes in tasks, class-incremental unless another scenario is named."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from everbatch.data import Stream, StreamName
from everbatch.data.memory import check_memory
from everbatch.distributed import World
from everbatch.errors import check, check_whole
from everbatch.evaluate.evaluator import accuracies
from everbatch.experiment import named
from everbatch.experiment.base import Experiment, Finished, is_share
from everbatch.experiment.data import sample_of
from everbatch.experiment.options import MIXINS, TRAINER_MIXINS
from everbatch.experiment.split import Split
from everbatch.metrics import summary
from everbatch.report.plots import accuracy_heatmap
from everbatch.train import GrowingHead, Replay, Trainer
from everbatch.train.boundaries import refuse_bound

__all__ = ["ClassIncremental"]


@dataclass(frozen=True, kw_only=True)
class ClassIncremental(Experiment):
    """Options of this recipe."""

    title: ClassVar[str] = "class_incremental"
    grows: ClassVar[bool] = True
    words: ClassVar[dict[str, str]] = {"method": f"A method by name, or several joined by +, for all of its options at once; "
                                       f"options given beside it win over it. One of {', '.join(named.names())}."}

    replay: Replay.Config | None = field(default_factory=Replay.Config)
    """Rehearsal; null for plain fine-tuning."""
    tasks: int = 5
    """Tasks into which the classes are divided, rounds, or domains; >= 1."""
    scenario: StreamName = "class"
    """class: no task id at test. task: the task id is given at test. domain: other inputs of the same classes. growing: each
    round trains on all that has arrived. iid: one task. As class, and blurry: a share of each task comes in others; online:
    in a single pass; task_free: no method sees where a task begins or ends."""
    split: Split = field(default_factory=Split)
    output: str = "runs/class_incremental"
    """Folder of this run: model.safetensors, result.json, config.yaml, figures, TensorBoard, checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("class_incremental", "tasks", self.tasks)
        # The command line refuses any number beside what says it; here a default is not told from what was given.
        count = self.split.count(self.scenario, len(self.data.sources))
        check(count is None or self.tasks in (count, ClassIncremental.tasks), "class_incremental",
              f"tasks has no effect here: {self.tasks} of a stream of {count}", "be left out",
              self.split.unused(self.scenario, len(self.data.sources)).get("tasks", ""))
        check(self.model.head == "fixed" or not self.trainer.eval_future, "class_incremental", "trainer.eval_future=true with "
              "model.head=growing", "be false", "the head has no logits of classes to come")
        check(self.trainer.eval_past, "class_incremental", "trainer.eval_past=false", "be true", "its metrics need every row")
        check(not self.consolidate.isolate or self.optimizer.dynamic_sparsity is not None, "class_incremental",
              "consolidate.isolate=true", "go with optimizer.dynamic_sparsity", "its masks are what a task gets of its own")
        if self.split.hides(self.scenario):
            refuse_bound("class_incremental", self._acting())

    def _acting(self) -> dict[type, Any]:
        """The methods that these options compose, but for those of strength 0, and their options."""
        used = {MIXINS[key]: config for key, config in self.optimizer.used().items()}
        active = {part: config for part, config in used.items() if getattr(config, "active", getattr(config, "strength", True))}
        return {**active, **self.mixins(), **({GrowingHead: None} if self.model.head == "growing" else {})}

    def unused(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why."""
        found = super().unused() | self.split.unused(self.scenario, len(self.data.sources))
        if self.split.passes_once(self.scenario) and self.trainer.epochs != 1:
            found["trainer.epochs"] = "an online stream is passed once"
        if self.split.hides(self.scenario):
            found["trainer.reset_optimizer"] = "no task is seen to begin"
        return found

    def settled(self) -> ClassIncremental:
        """With the one epoch of an online stream written out."""
        if not self.split.passes_once(self.scenario):
            return self
        trainer: dict[str, Any] = {"trainer": replace(self.trainer, epochs=1)}
        return replace(self, **trainer)

    @classmethod
    def meaning(cls, word: str, value: str) -> dict[str, Any]:
        """The options that `method=...` stands for."""
        return named.layer(value)

    def stream(self) -> Stream:
        """The samples of `data` as tasks."""
        return self.split.make(self.scenario, self.data.open_all(), self.tasks, self.trainer.seed)

    def more_mixins(self, world: World) -> dict[type, Any]:
        """Who lets the head grow."""
        return {GrowingHead: None} if self.model.head == "growing" else {}

    def check_stream(self, stream: Stream, world: World) -> None:
        """Refuse a memory that a machine cannot hold: never more rows than samples, divided among the machines."""
        held = {part: config.capacity for part, config in self.mixins().items()
                if "store" in getattr(getattr(part, "State", None), "__annotations__", {}) and config.capacity}
        if not held:
            return
        machines = max(1, world.size // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        samples, size = sum(len(task.train_ids) for task in stream.tasks), sample_of(stream).nbytes
        for part, capacity in held.items():
            key = next(key for key, other in TRAINER_MIXINS.items() if other is part)
            rows = min(capacity, samples) / machines
            check_memory(key, f"capacity={capacity}", int(rows * size), f"lower {key}.capacity")

    def before(self, trainer: Trainer, stream: Stream) -> list[float] | None:
        """Accuracy by task of the untrained network, where forward transfer is asked for."""
        return accuracies(trainer, stream, 0, list(stream.tasks)) if self.trainer.eval_future else None

    def finish(self, done: Finished) -> tuple[dict[str, Any], list[str]]:
        """The accuracy matrix, its figure and the field's figures of it; weights of isolated tasks."""
        trainer: Any = done.trainer
        tasks = done.stream.tasks
        figures = summary(done.matrix, counts=[len(task.test_ids) for task in tasks], random_init=done.before)
        heatmap = accuracy_heatmap(done.matrix, title=f"{done.stream.train.name}: {trainer.title}")
        done.recorder.figure("accuracy_matrix", heatmap, trainer.step)
        about = self.data.described(done.sample, self.model)
        for task in tasks if self.consolidate.isolate else ():  # each predicts with a mask and weights of its own
            with trainer.optimizer.task(task.id + 1):
                trainer.export(done.folder / f"model-task-{task.id + 1}.safetensors", {**about, "task": task.name})
        lines = [f"{name.replace('_', ' '):<30} {'-' if value is None else f'{100 * value:6.2f} %'}"
                 for name, value in figures.items()]
        return {"accuracy_matrix": done.matrix, **figures, "classes": done.stream.classes}, lines

    def unit_of(self, headline: str) -> str:
        """All of its own are shares."""
        return super().unit_of(headline) or ("%" if is_share(headline) else "")
