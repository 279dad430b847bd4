"""A short run of the digits as a stream of a kind: whole, and cut in the middle of a task and resumed, with the same bits.

python tests/scenario_worker.py FOLDER SCENARIO ...     on as many ranks as were launched
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from everbatch.data import STREAMS, StreamName
from everbatch.distributed import World, init
from everbatch.experiment import ClassIncremental, Engine, Optimizer, Result, run
from everbatch.experiment.split import Split
from everbatch.train import Replay, Schedule, StepRecord, Trainer, TrainerMixin

SPLITS = {"blurry": Split(increments=(5, 3, 2), blur=0.25), "online": Split(first=4, increment=3),
          "task_free": Split(blur=0.2, online=True), "domain": Split(domains="rotated")}


class Halt(TrainerMixin):
    """Sends this rank a signal after a step."""

    at = -1

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        if record.step == Halt.at:
            signal.raise_signal(signal.SIGTERM)

    @classmethod
    def needs_boundaries(cls, config: Any) -> str:
        return ""


class Short(ClassIncremental):
    """That may be cut."""

    def more_mixins(self, world: World) -> dict[type, Any]:
        return {Halt: None, **super().more_mixins(world)}


def options(scenario: StreamName, folder: Path, kind: str = "plain") -> Short:
    """Three tasks in a few steps."""
    made: dict[str, Any] = {
        "engine": Engine(kind=kind),  # type: ignore[arg-type]
        "optimizer": Optimizer(lr=0.03, momentum=0.9), "split": SPLITS.get(scenario, Split()),
        "trainer": Trainer.Config(batch_size=112, epochs=1, schedule=Schedule(kind="cosine")), "tasks": 3, "scenario": scenario,
        "output": str(folder), "replay": Replay.Config(capacity=40, replay_batch=32)}
    return Short(**made)


def same_bits(scenario: StreamName, folder: Path, kind: str = "plain") -> Result:
    """Of a run that was cut in its second task, after it went on."""
    whole = run(options(scenario, folder / "whole", kind))
    Halt.at = whole.steps // 2
    cut = run(options(scenario, folder / "cut", kind), signals=True)
    Halt.at = -1
    assert cut.stop_sign == signal.SIGTERM and cut.steps < whole.steps, cut
    resumed = run(replace(options(scenario, folder / "cut", kind), resume=True))
    weights = [(result.folder / "model.safetensors").read_bytes() for result in (whole, resumed)]
    assert weights[0] == weights[1] and str(whole.values["accuracy_matrix"]) == str(resumed.values["accuracy_matrix"])
    return whole


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    world = init()
    for name in names:
        assert name in STREAMS
        result = same_bits(name, folder / name, "ddp" if world.size > 1 else "plain")
        print(name, result.values["stream"], flush=True) if world.rank == 0 else None
    print("done", os.getpid())


if __name__ == "__main__":
    main()
