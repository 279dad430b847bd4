"""Class- and task-incremental learning: the classes of one data set, divided into tasks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from everbatch.data import Stream, class_incremental, task_incremental
from everbatch.data.memory import check_memory
from everbatch.distributed import World
from everbatch.errors import check, check_whole
from everbatch.evaluate.evaluator import accuracies
from everbatch.experiment import named
from everbatch.experiment.base import Experiment, Finished
from everbatch.experiment.data import sample_of
from everbatch.metrics import summary
from everbatch.report.plots import accuracy_heatmap
from everbatch.train import GrowingHead, Replay, Trainer

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
    """Tasks into which the classes are divided; >= 1."""
    scenario: Literal["class", "task"] = "class"
    """class: no task id at test; task: the task id is given at test."""
    output: str = "runs/class_incremental"
    """Folder of this run: model.safetensors, result.json, config.yaml, figures, TensorBoard, checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("class_incremental", "tasks", self.tasks)
        check(self.model.head == "fixed" or not self.trainer.eval_future, "class_incremental", "trainer.eval_future=true with "
              "model.head=growing", "be false", "the head has no logits of classes to come")
        check(not self.consolidate.isolate or self.optimizer.dynamic_sparsity is not None, "class_incremental",
              "consolidate.isolate=true", "go with optimizer.dynamic_sparsity", "its masks are what a task gets of its own")

    @classmethod
    def meaning(cls, word: str, value: str) -> dict[str, Any]:
        """The options that `method=...` stands for."""
        return named.layer(value)

    def stream(self) -> Stream:
        """The classes of `data`, divided."""
        split = {"class": class_incremental, "task": task_incremental}[self.scenario]
        samples, test = self.data.open()
        return split(samples, test, tasks=self.tasks, seed=self.trainer.seed)

    def more_mixins(self, world: World) -> dict[type, Any]:
        """Who lets the head grow."""
        return {GrowingHead: None} if self.model.head == "growing" else {}

    def check_stream(self, stream: Stream, world: World) -> None:
        """Refuse a memory that a machine cannot hold: never more rows than samples, divided among the machines."""
        if self.replay is None:
            return
        machines = max(1, world.size // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        rows = min(self.replay.capacity, sum(len(task.train_ids) for task in stream.tasks)) / machines
        sample = sample_of(stream)
        check_memory("replay", f"capacity={self.replay.capacity}", int(rows * sample.nbytes), "lower replay.capacity")

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
        """All are shares."""
        return super().unit_of(headline) or "%"
