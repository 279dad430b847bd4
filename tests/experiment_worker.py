"""One rank that runs the same experiment twice in its process, and looks at what is left of the first.

python tests/experiment_worker.py FOLDER KIND...   plain, ddp, fsdp2, zero0 to zero3; without a launch where WORLD_SIZE is 1
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from everbatch.distributed import init
from everbatch.experiment import ClassIncremental, Engine, Optimizer, Result, run
from everbatch.optim import EWC, SAM, DynamicSparsity
from everbatch.report import recorder
from everbatch.train import Replay, Trainer

KINDS = ("plain", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")


def experiment(kind: str, folder: Path) -> ClassIncremental:
    """Two short tasks of the digits, with replay and mixins over AdamW."""
    engine = Engine(stage=int(kind[4:])) if kind.startswith("zero") else Engine(kind=kind)  # type: ignore[arg-type]
    mixed: dict[str, Any] = {"sam": SAM.Config(rho=0.05), "ewc": EWC.Config(strength=1.0),
                             "dynamic_sparsity": DynamicSparsity.Config(density=0.5)}
    return ClassIncremental(
        engine=engine, optimizer=Optimizer(base="adamw", lr=0.003, **mixed), tasks=2, output=str(folder),
        trainer=Trainer.Config(batch_size=128, epochs=1), replay=Replay.Config(capacity=40, replay_batch=32))


def process_state() -> dict[str, str]:
    """Everything of this process that a run might leave changed, as text."""
    gc.collect()
    engines = [type(o).__name__ for o in gc.get_objects() if issubclass(type(o), Trainer)
               or type(o).__name__ == "DeepSpeedEngine"]
    signals = {s.name: repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    return {
        "environment": json.dumps(dict(os.environ), sort_keys=True), "signals": str(signals), "python": str(random.getstate()),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "torch": str(torch.get_rng_state().tolist()), "gradients": str(torch.is_grad_enabled()),
        "dtype": str(torch.get_default_dtype()), "torch threads": str(torch.get_num_threads()),
        "group": str(dist.is_initialized()), "threads": str(sorted(t.name for t in threading.enumerate())),
        "exit handlers": str(atexit._ncallbacks()), "warnings": str(warnings.filters), "folder": os.getcwd(),
        "path": str(sys.path), "streams": str((id(sys.stdout), id(sys.stderr))), "engines": str(engines)}


def digest(result: Result) -> str:
    """Of the weights and the accuracy matrix."""
    weights = hashlib.sha256((result.folder / "model.safetensors").read_bytes()).hexdigest()
    return f"{weights} {result.values['accuracy_matrix']}"


def twice(kind: str, folder: Path) -> None:
    """Run, look, run again: the same bits, and nothing changed."""
    first = run(experiment(kind, folder / f"{kind}-1"))  # imports what it needs, and compiles it
    before = process_state()
    second = run(experiment(kind, folder / f"{kind}-2"))
    after = process_state()
    changed = [f"{name}: {before[name][:200]} -> {after[name][:200]}" for name in before if before[name] != after[name]]
    assert not changed, changed
    assert digest(first) == digest(second) and first.steps == second.steps >= 10
    assert json.loads((second.folder / "result.json").read_text())["steps"] == second.values["steps"]


def late(path: Path, values: Any, write: Any = recorder.write_json) -> None:
    """Write as ever, on a slow disk."""
    time.sleep(0.2)
    write(path, values)


def main() -> None:
    folder, kinds = Path(sys.argv[1]), sys.argv[2:]
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if not alone and os.environ["RANK"] == "0":  # the rank that writes is the last to be there
        recorder.write_json = late
    if alone:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    else:
        init()  # the caller's own group, which a run must not leave
    for kind in kinds:
        twice(kind, folder)
        assert process_state()["engines"] == "[]"
        assert dist.is_initialized() != alone
    print("done", len(kinds))


if __name__ == "__main__":
    main()
