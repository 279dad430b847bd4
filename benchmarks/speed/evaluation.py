"""What continual evaluation costs beside its forward passes, and what it leaves of a step in which nothing is due.

python benchmarks/speed/evaluation.py                                   plain torch
torchrun --nproc-per-node 2 benchmarks/speed/evaluation.py --host ddp   DDP

An evaluation of five tasks is compared with the bare forwards of the same batches, in rounds; the target is 1.05. Processor
time of rank 0, so that what else runs on the machine counts little; one thread per process. JSON with --json FILE.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from timing import conv_net

from everbatch import compose
from everbatch.data import TensorSource, class_incremental
from everbatch.distributed import init
from everbatch.train import ContinualEvaluation, StepRecord, Trainer, TrainerMixin

TASKS, SUBSET, ROWS = 5, 200, 100


class Rounds(TrainerMixin):
    """In the last task: evaluate by the library and by hand in turn, instead of training on."""

    rounds = 10
    found: dict[str, list[float]]

    def after_step(self, record: StepRecord) -> None:
        super().after_step(record)  # type: ignore[misc]
        me: Any = self
        if me.task_index == TASKS - 1 and not hasattr(self, "found"):
            self.found = {"evaluation": [], "forwards": []}
            tasks = list(me.stream.tasks)
            evaluate = functools.partial(me._ContinualEvaluation__evaluate, TASKS - 1, tasks)
            batches = [batch.inputs for task in tasks for batch in me._kept[1][task.id]]
            arms = {"evaluation": evaluate, "forwards": functools.partial(forwards, me, batches)}
            for number in range(self.rounds):
                for name in list(arms)[:: 1 if number % 2 else -1]:
                    self.found[name].append(seconds(arms[name]))


@torch.no_grad()
def forwards(trainer: Any, batches: list[torch.Tensor]) -> None:
    """The passes alone."""
    trainer.module.eval()
    for inputs in batches:
        trainer.module(inputs)
    trainer.module.train()


def seconds(call: Callable[[], Any]) -> float:
    """Processor time of this process."""
    begun = time.process_time()
    call()
    return time.process_time() - begun


class Learner(ContinualEvaluation, Rounds, Trainer):
    """Evaluates every tenth step."""


def measure(host: str, rounds: int) -> dict[str, Any]:
    """Medians of the rounds."""
    torch.set_num_threads(1)
    world = init("cpu")
    g = torch.Generator().manual_seed(0)
    sources = [TensorSource(torch.randn(n, 3, 32, 32, generator=g), torch.arange(n) % 10, name=str(n)) for n in (160, 1000)]
    config = Trainer.Config(batch_size=16, eval_batch=ROWS // world.size)
    t = Learner(conv_net(width=16), functools.partial(compose(base=torch.optim.SGD), lr=0.01), host, config=config, device="cpu",
                subset=SUBSET, every=10, dense=0)
    t.rounds = rounds
    t.fit(class_incremental(*sources, tasks=TASKS))
    pairs = [a / b for a, b in zip(*t.found.values(), strict=True)]
    return {"host": host, "ranks": world.size, "rounds": rounds, "samples": TASKS * SUBSET,
            **{f"{name}_ms": 1e3 * statistics.median(values) for name, values in t.found.items()},
            "ratio": statistics.median(pairs), "least": min(t.found["evaluation"]) / min(t.found["forwards"])}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Cost of continual evaluation beside its forwards.")
    parser.add_argument("--host", default="plain", choices=("plain", "ddp"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.host, options.rounds)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()))


if __name__ == "__main__":
    main()
