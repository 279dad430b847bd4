"""Jobs of a launch that runs ConAdv: STORE HOST/CHECK [HOST/CHECK ...] [--wide]; see worker.py and test_conadv_hosts.py.

With host "plain", on one rank, the parity checks leave in STORE what the runs of all other hosts are compared with.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from record import Job, Record
from torch import Tensor, nn

import learning
from everbatch import compose
from everbatch.distributed import World
from everbatch.optim import LARS, SAM, ClipGradNorm, DynamicSparsity, StaleSAM
from everbatch.train import ConAdv, Replay, Trainer
from learning import Abandoned, everything, stream, whole

SGD = functools.partial(compose(base=torch.optim.SGD), lr=0.1, momentum=0.9, weight_decay=1e-3)
MIXES: dict[str, tuple[tuple[type, ...], dict[str, Any]]] = {
    "LARS": ((LARS,), {"trust_coeff": 0.2}),
    "SAM": ((SAM,), {"rho": 0.05}),
    "StaleSAM": ((StaleSAM,), {"rho": 0.05}),
    "DynamicSparsity": ((DynamicSparsity,), {"density": 0.5, "update_every": 2}),
    "ClipGradNorm+SAM": ((ClipGradNorm, SAM), {"rho": 0.05, "max_norm": 0.5}),
}
TOLERANCE = 3e-6
"""Largest difference of any weight after 24 steps in fp32: sums over ranks in another order, at weights of about 0.5."""


class Adversarial(ConAdv, Trainer):
    """ConAdv alone."""


class Both(ConAdv, Replay, Trainer):
    """ConAdv beside rehearsal."""


def smooth() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 15), nn.Tanh(), nn.Linear(15, 6))


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 15), nn.BatchNorm1d(15), nn.Tanh(), nn.Linear(15, 6))


def build(host: str, *, cls: type = Adversarial, model: nn.Module | None = None, optimizer: Any = SGD, folder: Path | None = None,
          after: int = -1, raw: dict[str, Any] | None = None, config: dict[str, Any] | None = None, **conadv: Any) -> Any:
    options: dict[str, Any] = {"batch_size": 8, "epochs": 2, "seed": 3, "checkpoint_every": 2} | (config or {})
    world = World.current() if host != "plain" else World()
    chosen = learning.engine(host, options["batch_size"], options.get("accumulation", 1), world.size, **(raw or {}))
    mixins = learning.REPLAY if issubclass(cls, Replay) else {}
    return cls(model or learning.net(), optimizer, chosen, config=Trainer.Config(**options), augment=learning.jitter,
               prepare=learning.scale, folder=None if folder is None else folder / "checkpoints", device="cpu", num_tasks=3,
               recorder=None if folder is None else learning.recorder(folder, after),
               **{"radius": 16.0, "tau": 1} | conadv, **mixins)


def run(host: str, **options: Any) -> Any:
    t = build(host, **options)
    t.fit(stream())
    t.close()
    if t.recorder is not None:
        t.recorder.close()
    return t


def fifo(t: Any) -> dict[str, Tensor]:
    queue = t.states[ConAdv].fifo
    queue.drain()
    return {f"fifo/{s}": w.payload for s, w in queue.waiting.items()}


def compared() -> dict[str, dict[str, Any]]:
    """Runs that must take the same steps on every host: without batch norm and dropout, which know their own rows only."""
    runs: dict[str, dict[str, Any]] = {
        "tau 1": {}, "tau 0": {"tau": 0}, "two steps": {"steps": 2}, "clean": {"first": "clean", "tau": 2},
        "one forward": {"one_forward": True, "cls": Both, "tau": 2}, "accumulation": {"config": {"accumulation": 2}},
        "Replay": {"cls": Both}}
    for name, (parts, settings) in MIXES.items():
        opt = functools.partial(compose(*parts, base=torch.optim.SGD), lr=0.1, momentum=0.9, weight_decay=1e-3, **settings)
        runs[name] = {"optimizer": opt}
    return {name: {"model": smooth(), **options} for name, options in runs.items()}


def placements(record: Record, store: Path, host: str, wide: bool) -> None:
    """The same bits wherever crafting runs: with dropout, running statistics and tau beyond one."""
    with record.check(f"placements/{host}") as found:
        for tau in (1, 3) if wide else (2,):
            inline = everything(run(host, tau=tau))
            for placement in ("process", "stream"):
                other = run(host, tau=tau, placement=placement)
                found.same_bits(everything(other), inline, f"{placement}, tau {tau}")
                found.require(placement == "stream" or other.adversary_costs()["bytes_sent"] > 0, "nothing was sent")


def parity(record: Record, store: Path, host: str, wide: bool, name: str) -> None:
    """The steps of one process."""
    with record.check(f"parity {name}/{host}", TOLERANCE) as found:
        mine = whole(run(host, **compared()[name]))
        if host == "plain":
            torch.save(mine, store / f"{name}.pt")
        one = torch.load(store / f"{name}.pt", weights_only=True)
        found.measure(max((mine[n] - one[n]).abs().max().item() for n in one if n.startswith("master")))


def one_forward(record: Record, store: Path, host: str, wide: bool) -> None:
    """To rounding, which batch norm makes larger."""
    with record.check(f"batch norm in one forward/{host}", 1e-5) as found:
        two, one = (everything(run(host, model=normed(), one_forward=both)) for both in (False, True))
        found.require(any("branches" in n and "running_var" in n for n in one), "no statistics of the branch")
        found.measure(max((one[n].double() - two[n].double()).abs().max().item() for n in two if n != "matrix"))


def off(record: Record, store: Path, host: str, wide: bool) -> None:
    """Absent at weight zero."""
    with record.check(f"off/{host}") as found:
        found.same_bits(everything(run(host, weight_adversarial=0.0)), build_plain(host), "weight_adversarial 0")


def resume(record: Record, store: Path, host: str, wide: bool) -> None:
    """Left with a full queue and resumed."""
    opt = functools.partial(compose(SAM, base=torch.optim.SGD), lr=0.1, momentum=0.9, rho=0.05)
    for placement in ("inline", "process") if host in ("ddp", "zero3") else ("inline",):
        with record.check(f"resume {placement}/{host}") as found:
            options = {"cls": Both, "optimizer": opt, "tau": 2, "placement": placement, "random_start": 0.5}
            folder = store / f"{'wide' if wide else 'default'}-{placement}-{host}-{World.current().size}"
            expected = run(host, folder=folder / "whole", **options)
            for after in (5, 11) if wide else (5,):
                t = build(host, folder=folder / str(after), after=after, **options)
                try:
                    t.fit(stream())
                except Abandoned:
                    t.close()
                again = build(host, folder=folder / str(after), model=learning.net(99), **options)
                again.fit(stream(), resume=True)
                found.require(again.step == expected.step, f"{again.step} steps")
                found.same_bits(everything(again), everything(expected), f"after {after}")
                again.close()
                again.recorder.close()


CHECKS = {"placements": placements, "one forward": one_forward, "off": off, "resume": resume,
          **{f"parity {name}": functools.partial(parity, name=name) for name in compared()}}


def build_plain(host: str) -> dict[str, Tensor]:
    """The same run without the mixin."""
    options = {"batch_size": 8, "epochs": 2, "seed": 3}
    chosen = learning.engine(host, 8, 1, World.current().size if host != "plain" else 1)
    t = Trainer(learning.net(), SGD, chosen, config=Trainer.Config(**options), augment=learning.jitter, prepare=learning.scale,
                device="cpu", num_tasks=3)
    t.fit(stream())
    return everything(t)


def fork_adversaries() -> None:
    """Fork adversaries from a server that has imported everything, once per rank, where the library has each import anew."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["everbatch.train.adversarial.process"])
    real = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: context if method == "spawn" else real(method)


def jobs(record: Record, store: str, *names: str) -> Iterator[Job]:
    wide = "--wide" in names
    Path(store).mkdir(parents=True, exist_ok=True)
    if not wide:
        fork_adversaries()
    for name in names:
        if name != "--wide":
            host, _, check = name.partition("/")
            yield name, functools.partial(CHECKS[check], record, Path(store), host, wide)
