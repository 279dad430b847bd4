"""Class-incremental learning with rehearsal, on any number of ranks.

torchrun --nproc-per-node 2 recipes/class_incremental.py                         scikit-learn's digits, DER++, DeepSpeed ZeRO-1
torchrun --nproc-per-node 2 recipes/class_incremental.py replay=null             plain fine-tuning on the same stream
torchrun --nproc-per-node 8 recipes/class_incremental.py data.source=imagefolder:PATH model.name=resnet18 data.image_size=64
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

from everbatch import config
from everbatch.config.strict_yaml import dump_text
from everbatch.data import class_incremental, task_incremental
from everbatch.data.memory import check_memory
from everbatch.distributed import init
from everbatch.errors import check, check_whole
from everbatch.evaluate.evaluator import accuracies
from everbatch.experiment.recipe import MEMORY, Data, Engine, Factory, Model, Optimizer, check_together, guard, unused_together
from everbatch.experiment.run import Run, would_refuse
from everbatch.metrics import summary
from everbatch.report.plots import accuracy_heatmap
from everbatch.report.recorder import versions
from everbatch.train import Consolidate, Replay, Trainer, WarmStart
from everbatch.train.persist import agree


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Options of this recipe."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    engine: Engine = field(default_factory=Engine)
    trainer: Trainer.Config = field(default_factory=Trainer.Config)
    replay: Replay.Config | None = field(default_factory=Replay.Config)
    """Rehearsal; null for plain fine-tuning."""
    consolidate: Consolidate.Config = field(default_factory=Consolidate.Config)
    """What happens at a task's end to ewc, si, mas and refresh of the optimizer, and to isolated tasks of dynamic_sparsity;
    without any of them, nothing."""
    warm_start: WarmStart.Config = field(default_factory=WarmStart.Config)
    """When optimizer.shrink_perturb is called; without it, never."""
    tasks: int = 5
    """Tasks into which the classes are divided; >= 1."""
    scenario: Literal["class", "task"] = "class"
    """class: no task id at test; task: the task id is given at test."""
    output: str = "runs/class_incremental"
    """Folder of this run: model.safetensors, result.json, config.yaml, figures, TensorBoard, checkpoints."""
    init: str | None = None
    """Begin a new run with the weights of another: its folder, one of its checkpoints, or a .safetensors file."""
    resume: bool = False
    """Go on from the newest good checkpoint in the output folder; workers that torchrun restarts do so anyway."""
    dry_run: bool = False
    """Print the resolved configuration and what a step costs, and stop."""

    def __post_init__(self) -> None:
        check_together(self)
        check_whole("class_incremental", "tasks", self.tasks)
        check(not self.consolidate.isolate or self.optimizer.dynamic_sparsity is not None, "class_incremental",
              "consolidate.isolate=true", "go with optimizer.dynamic_sparsity", "its masks are what a task gets of its own")

    def unused(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why."""
        found = unused_together(self)
        if not self.optimizer.remembers and not self.consolidate.isolate:
            found["consolidate"] = f"it calls optimizer.{', optimizer.'.join(MEMORY)}, and none is given"
        if self.optimizer.shrink_perturb is None:
            found["warm_start"] = "it calls optimizer.shrink_perturb, which is not given"
        return found


def main() -> None:
    """Train, evaluate after each task, report."""
    with guard("class_incremental"):
        run(config.parse(Recipe, default_yaml=Path(__file__).with_suffix(".yaml"), prog="class_incremental"))


def run(options: Recipe) -> None:
    """One run, alone in its folder."""
    with Run.of(options, init()) as job:
        train(options, job)


def train(options: Recipe, job: Run) -> None:
    """What the run does."""
    world, folder, recorder = job.world, job.folder, job.recorder
    samples, test = options.data.open()
    split = {"class": class_incremental, "task": task_incremental}[options.scenario]
    stream = split(samples, test, tasks=options.tasks, seed=options.trainer.seed)
    sample = stream.fetch(stream.tasks[0].train_ids[:1])[0]
    mixins: dict[type, Any] = {Replay: options.replay} if options.replay else {}
    if options.replay:  # never more rows than samples, divided among the machines
        rows = min(options.replay.capacity, len(samples)) / max(1, world.size // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        check_memory("replay", f"capacity={options.replay.capacity}", int(rows * sample.nbytes), "lower replay.capacity")
    if options.optimizer.remembers or options.consolidate.isolate:
        mixins[Consolidate] = options.consolidate
    if options.optimizer.shrink_perturb is not None:
        mixins[WarmStart] = options.warm_start
    learner = type("Learner", (*mixins, Trainer), {})
    trainer = learner(
        job.start(options.model.build(sample, stream.num_classes, options.trainer.seed)),
        options.optimizer.build(Factory(model=options.model, shape=tuple(sample.shape), num_classes=stream.num_classes)),
        options.engine.build(options.trainer.batch_size, options.trainer.accumulation, world.size),
        config=options.trainer, ddp=options.engine.ddp,
        augment=options.data.augmentation(sample.shape[-1]), prepare=options.data.prepare,
        folder=job.checkpoints, recorder=recorder, num_tasks=len(stream),
        identity=options.data.identity | job.identity,
        **{f"{part.__name__.lower()}_{k}": v for part, chosen in mixins.items() for k, v in vars(chosen).items()})
    if options.dry_run:
        if world.rank == 0:
            print(dump_text(config.resolved(options)) + trainer.describe() + would_refuse(trainer, stream))
        return
    assert recorder is not None
    agree(world, {"stream": stream.fingerprint()})
    untrained = accuracies(trainer, stream, 0, list(stream.tasks)) if options.trainer.eval_future else None
    matrix = job.fit(trainer, stream)
    if matrix is None:
        return
    seconds = trainer.seconds
    counts = [len(task.test_ids) for task in stream.tasks]
    figures = summary(matrix, counts=counts, random_init=untrained)
    recorder.figure("accuracy_matrix", accuracy_heatmap(matrix, title=f"{samples.name}: {trainer.title}"), trainer.step)
    about = options.data.described(sample, options.model)
    trainer.export(folder / "model.safetensors", about)
    for task in stream.tasks if options.consolidate.isolate else ():  # each predicts with a mask and weights of its own
        with trainer.optimizer.task(task.id + 1):
            trainer.export(folder / f"model-task-{task.id + 1}.safetensors", {**about, "task": task.name})
    recorder.result({
        "accuracy_matrix": matrix, **figures, "test_samples": counts, "classes": stream.classes, "seconds": seconds,
        "steps": trainer.step, "skipped_steps": trainer.optimizer.skipped_count, "seed": options.trainer.seed,
        "world_size": world.size, "changes": trainer.changes,
        "describe": trainer.describe(), "stream": stream.fingerprint(), "versions": versions(),
        "configuration": config.resolved(options)})
    lines = [f"{name.replace('_', ' '):<30} {'-' if value is None else f'{100 * value:6.2f} %'}"
             for name, value in figures.items()]
    recorder.say("\n".join([*lines, f"{trainer.step} steps in {seconds:.0f} s; see {folder}/result.json, "
                            f"{folder}/model.safetensors, "
                            f"{folder}/figures/accuracy_matrix.png, and tensorboard --logdir {folder}"]))
    job.close(trainer)


if __name__ == "__main__":
    main()
