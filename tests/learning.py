"""A small continual run with everything in it that a resume could lose, on any engine."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everbatch import compose
from everbatch.config.deepspeed import deepspeed_config
from everbatch.data import Stream, class_incremental, load
from everbatch.data.sources import SubsetSource
from everbatch.distributed import World
from everbatch.optim import EMA, SAM, ClipGradNorm
from everbatch.report.recorder import Recorder
from everbatch.train import Replay, Schedule, Trainer

HOSTS = ("plain", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
PER_TASK, STEPS = 8, 24
"""Steps of each of the three tasks, and of the run."""


class Learner(Replay, Trainer):
    """Rehearsal."""


class Newest:
    """A user's memory: the last samples of the stream, of which those of rare classes are drawn more often."""

    def __init__(self, power: float = 1.0) -> None:
        self.power, self.offers = power, 0
        self.met = np.zeros(6, dtype=np.int64)

    def add(self, held: Any, offered: Any, rng: np.random.Generator) -> Any:
        self.offers += 1
        self.met += np.bincount(offered.targets, minlength=6)
        return offered.positions % held.capacity

    def draw(self, held: Any, count: int, rng: np.random.Generator) -> Any:
        chances = 1.0 / self.met[held.targets[held.filled]] ** self.power
        return rng.choice(held.filled, count, replace=False, p=chances / chances.sum())


class Abandoned(Exception):
    """The run was left as it was, as if its process had vanished."""


class Ending(Recorder):
    """A recorder that ends the run after some step, before a checkpoint of it could be written; after 0, before the first."""

    after = -1
    signal = 0
    """Instead of raising `Abandoned`: a signal to this process."""
    count = 0

    def vanish(self) -> None:
        """Leave without writing what waits, as a killed process does."""
        if self._file is not None:
            self._file.close()
        self.active = False
        raise Abandoned

    def bar(self, *args: Any, **options: Any) -> None:
        super().bar(*args, **options)
        if self.after == 0:
            self.vanish()

    def advance(self, steps: int = 1) -> None:
        super().advance(steps)
        self.count += 1
        if self.count == self.after:
            if not self.signal:
                self.vanish()
            os.kill(os.getpid(), self.signal)
            signal.pause()


def net(seed: int = 0, *, smooth: bool = False) -> nn.Module:
    """Running statistics, dropout, odd sizes; smooth: none of them, so that the number of ranks does not matter."""
    torch.manual_seed(seed)
    if smooth:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 15), nn.Tanh(), nn.Linear(15, 6))
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 15), nn.BatchNorm1d(15), nn.ReLU(), nn.Dropout(0.2), nn.Linear(15, 6))


@functools.cache
def stream() -> Stream:
    """Three tasks of two digits with 16 training samples each; test samples that no number of ranks divides."""
    parts = []
    for train, count in ((True, 16), (False, 11)):
        source = load("digits", train=train)
        ids = [torch.nonzero(source.targets == c).flatten()[: count + 2 * c * (not train)] for c in range(10)]
        parts.append(SubsetSource(source, torch.cat(ids)))
    return class_incremental(*parts, tasks=3, seed=1, classes=range(6))


def jitter(image: Tensor) -> Tensor:
    """Augmentation from torch's global stream."""
    return image.roll(int(torch.randint(0, 3, ())), -1)


def scale(inputs: Tensor) -> Tensor:
    return inputs.float() / 16.0


def engine(host: str, batch: int, accumulation: int, world: int, **raw: Any) -> str | Mapping[str, Any]:
    if not host.startswith("zero"):
        return host
    return deepspeed_config(raw or None, micro_batch=batch // world // accumulation, accumulation=accumulation, world_size=world,
                            stage=int(host[4]), precision="bf16" if host.endswith("bf16") else "fp32")


OPTIMIZER = functools.partial(
    compose(ClipGradNorm, EMA, SAM, base=torch.optim.SGD), lr=0.1, momentum=0.9, weight_decay=1e-3, rho=0.05, max_norm=1.0,
    ema_decay=0.9)
PLAIN = functools.partial(compose(base=torch.optim.SGD), lr=0.1, momentum=0.9)
REPLAY = {"capacity": 20, "replay_batch": 5, "alpha": 0.3, "beta": 0.5}


def trainer(host: str, *, folder: Path | None = None, recorder: Recorder | None = None, model: nn.Module | None = None,
            optimizer: Any = OPTIMIZER, replay: dict[str, Any] | None = None, cls: type = Learner, prepare: Any = scale,
            augment: Any = jitter, raw: dict[str, Any] | None = None, grown: Any = None, **config: Any) -> Any:
    """A trainer of the run; every argument may be replaced."""
    options: dict[str, Any] = {"batch_size": 8, "epochs": 2, "checkpoint_every": 2, "seed": 3,
                               "schedule": Schedule(kind="cosine", warmup_epochs=0.5)} | config
    world = World.current() if host != "plain" else World()
    mixins = (REPLAY | (replay or {})) if issubclass(cls, Replay) else {}
    chosen = engine(host, options["batch_size"], options.get("accumulation", 1), world.size, **(raw or {}))
    return cls(model or net(), optimizer, chosen,
               config=Trainer.Config(**options), augment=augment, prepare=prepare, folder=folder, recorder=recorder, device="cpu",
               num_tasks=3, grown=grown, **mixins)


def recorder(folder: Path, after: int = -1, sign: int = 0, *, rank: int | None = None) -> Ending:
    """A recorder in `folder`; ends the run `after` that many of its own steps, by exception or signal, on `rank` or on all."""
    world = World.current()
    made = Ending(folder, world.rank, tensorboard=False)
    if rank in (None, world.rank):
        made.after, made.signal = after, sign
    return made


def whole(t: Any) -> dict[str, Tensor]:
    """Masters, moments and averages by name, whole, on every rank. A collective."""
    host, kinds = t.optimizer.host, {}
    for shard in host.shards:
        kinds.setdefault("master", []).append((shard, shard.data))
        for key, value in shard.moments.items():
            kinds.setdefault(f"moment.{key}", []).append((shard, value))
        if EMA in t.optimizer.states and t.optimizer.states[EMA].average:
            kinds.setdefault("average", []).append((shard, t.optimizer.states[EMA].average[shard.name]))
    names: set[str] = set()
    for other in World.current().gather(sorted(kinds)):
        names |= set(other)  # type: ignore[call-overload]
    return {f"{kind}/{n}": v.clone() for kind in sorted(names) for n, v in host.gather(kinds.get(kind, []), host.names).items()}


def memory(t: Any) -> dict[str, Tensor]:
    """The replicated index and this rank's rows of the payload, by name. A collective."""
    store = t.states[Replay].store if isinstance(t, Replay) else None
    if store is None:
        return {}
    state = store.state_dict()
    index = {f"index/{k}": torch.as_tensor(np.asarray(v)) for k, v in state["index"].items()}
    return index | {f"rows/{k}": v.clone() for k, v in state["rows"].items()}


def union(t: Any) -> dict[str, Tensor]:
    """`memory` with the rows of all ranks, in the order of slots. A collective."""
    parts: list[Any] = World.current().gather(memory(t)) if t.world.size > 1 else [memory(t)]
    return {k: torch.cat([p[k] for p in parts]) if k.startswith("rows/") else v for k, v in parts[0].items()}


def buffers(t: Any) -> dict[str, Tensor]:
    return {f"buffer/{n}": b.clone() for n, b in t.module.named_buffers()}


def kept(t: Any) -> dict[str, Tensor]:
    """Tensors that trainer mixins keep beside a memory of samples."""
    fields = [(f"state/{part.__name__}.{f.name}", getattr(state, f.name)) for part, state in getattr(t, "states", {}).items()
              for f in dataclasses.fields(state)]
    found = {name: value.clone() for name, value in fields if isinstance(value, Tensor)}
    for name, value in fields:
        if isinstance(value, dict):
            found |= {f"{name}/{key}": inner.clone() for key, inner in value.items() if isinstance(inner, Tensor)}
    return found


def everything(t: Any) -> dict[str, Tensor]:
    """All that a run is, on this rank."""
    counters = [t.step, t.task_index, t.task_step, t.bad_steps, t.optimizer.step_count, t.optimizer.skipped_count]
    return {**whole(t), **memory(t), **kept(t), **buffers(t), "matrix": torch.tensor(t.matrix, dtype=torch.float64),
            "counters": torch.tensor(counters), "lr": torch.tensor([g["lr"] for g in t.optimizer.param_groups])}
