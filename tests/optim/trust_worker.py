"""Jobs of the parity launch of LARS and LAMB: [HOST ...]; every mix on every host. See worker.py.

OUT.json, by key: "mix/host" the largest difference of any weight from the reference: timm's optimizer in one process on
the whole batch, or the same class there for mixes that timm lacks. "timm alone/mix/host" the same for timm's optimizer inside
DeepSpeed. "collectives/mix/host" what the mix adds to its base's step, by name. "engine schedule/host" a difference.
"moved/mix" how far the reference went. A text is an error.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import hosts
import timm.optim
import torch
import torch.distributed as dist
from hosts import BY_NAME, Run
from record import Job, Record
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from everbatch.optim import LAMB, LARS, SAM, ClipGradNorm, OptimizerMixin, groups

STEPS, DECAY = 5, 0.02
RATES = (0.4, 1.0, 0.7, 0.7, 0.3)
"""Factors on the learning rate, by step."""


@dataclass(frozen=True)
class Mix:
    """Parts over a base, and what timm's optimizer is called with instead; None where timm has no such method."""

    parts: tuple[type, ...]
    base: type
    options: dict[str, Any]
    timm: tuple[type, dict[str, Any]] | None = None
    scheduled: bool = False
    """Change the rate at every step."""
    one_group: bool = False
    """Decay everything: the tensor of one element gets a ratio as well."""

    def cls(self) -> type:
        return type("Mixed", (*self.parts, self.base), {})


SGD = {"lr": 1.5, "momentum": 0.9}
ADAMW = {"lr": 0.02, "eps": 1e-4}
LARS_OPTIONS = {"trust_coeff": 0.02}


def lars(scheduled: bool = False, one_group: bool = False, **options: Any) -> Mix:
    options = {**SGD, **LARS_OPTIONS, **options}
    return Mix((LARS,), torch.optim.SGD, options, (timm.optim.Lars, options), scheduled, one_group)


def lamb(scheduled: bool = False, one_group: bool = False, **options: Any) -> Mix:
    options = {**ADAMW, **options}
    theirs = {"max_grad_norm": None, **options}
    return Mix((LAMB,), torch.optim.AdamW, options, (timm.optim.Lamb, theirs), scheduled, one_group)


MIXES = {
    "LARS": lars(scheduled=True),
    "LARS nesterov": lars(nesterov=True, one_group=True),
    "LARS clipped, all": lars(trust_clip=True, always_adapt=True, lr=0.05),
    "LARS lr inside": Mix((LARS,), torch.optim.SGD, {**SGD, **LARS_OPTIONS, "lr_in_buffer": True}, scheduled=True),
    "LAMB": lamb(scheduled=True),
    "LAMB decoupled": lamb(decoupled_decay=True, one_group=True),
    "LAMB clipped, all": lamb(trust_clip=True, always_adapt=True, max_grad_norm=0.3, grad_averaging=False),
    "LARS+SAM+Clip": Mix((ClipGradNorm, LARS, SAM), torch.optim.SGD,
                         {**SGD, **LARS_OPTIONS, "rho": 0.5, "max_norm": 0.3}),
    "LAMB+SAM+Clip": Mix((ClipGradNorm, LAMB, SAM), torch.optim.AdamW, {**ADAMW, "rho": 0.5, "max_norm": 0.3}),
}
HOSTS = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3", "zero3-persistent", "zero1-offload", "zero2-offload",
         "zero3-offload", "zero0-bf16", "zero1-bf16", "zero2-bf16", "zero3-bf16", "zero1-bf16-fp32acc", "zero2-bf16-fp32acc",
         "zero3-bf16-fp32acc")


def grouped(model: nn.Module, mix: Mix) -> list[dict[str, Any]]:
    """Named groups: matrices with decay and vectors without, or everything with decay."""
    if mix.one_group:
        return [{"params": list(model.named_parameters()), "weight_decay": DECAY}]
    return groups(model, weight_decay=DECAY)


OF_BASES = {**torch.optim.SGD([torch.zeros(1)]).defaults, **torch.optim.AdamW([torch.zeros(1)]).defaults}


def unnamed(named: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**g, "params": [p for _, p in g["params"]]} for g in named]


def start(host: str, mix: Mix, scheduler: Callable[[Any], Any] | None = None) -> Run:
    """A run of a mix on a host, with groups, which the contract suite's own start does not make."""
    spec, model, cls = BY_NAME[host], hosts.net(), mix.cls()
    rank, world = (0, 1) if host == "plain" else (dist.get_rank(), dist.get_world_size())
    if spec.kind == "zero":
        base = mix.base(unnamed(grouped(model, mix)), **{k: v for k, v in mix.options.items() if k in OF_BASES})
        engine, *_ = deepspeed.initialize(model=model, optimizer=base, lr_scheduler=scheduler,
                                          config=hosts.deepspeed_config(spec, hosts.BATCH // world))
        opt = cls.on(engine, **{k: v for k, v in mix.options.items() if k not in OF_BASES})  # type: ignore[attr-defined]
        return Run(opt, engine.module, engine.module, spec, rank, world)
    outer: nn.Module = DistributedDataParallel(model) if spec.kind == "ddp" else model
    if spec.kind == "fsdp2":
        for part in model.children():
            if isinstance(part, nn.Linear):
                fully_shard(part)
        fully_shard(model)
    return Run(cls(grouped(outer, mix), **mix.options), outer, model, spec, rank, world)


def advance(run: Run, mix: Mix, steps: int = STEPS) -> dict[str, Tensor]:
    for (x, y), factor in list(zip(hosts.batches(STEPS), RATES, strict=True))[:steps]:
        for group in run.opt.param_groups if mix.scheduled else ():
            group["lr"] = mix.options["lr"] * factor
        run.step(x, y)
    return run.weights()


@functools.cache
def reference(name: str) -> dict[str, Tensor]:
    """Weights after STEPS steps in one process, by timm where it has the method."""
    mix = MIXES[name]
    if mix.timm is None:
        return advance(start("plain", mix), mix)
    model = hosts.net()
    opt = mix.timm[0](unnamed(grouped(model, mix)), **mix.timm[1])
    for (x, y), factor in zip(hosts.batches(STEPS), RATES, strict=True):
        for group in opt.param_groups if mix.scheduled else ():
            group["lr"] = mix.options["lr"] * factor
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def parity(host: str, name: str) -> float:
    """Largest difference of a mix on a host from its reference."""
    return hosts.difference(advance(start(host, MIXES[name]), MIXES[name]), reference(name))


def counted(host: str, mix: Mix) -> Counter[str]:
    """Collectives of the third step."""
    run = start(host, mix)
    advance(run, mix, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run.step(*hosts.batches(3)[2])
    return Counter(e.name.removeprefix("c10d::").strip("_") for e in profile.events() if e.name.startswith("c10d::"))


def collectives(host: str, name: str) -> dict[str, int]:
    """What a method adds to its base's step."""
    mix = MIXES[name]
    bare = Mix((OptimizerMixin,), mix.base, {k: v for k, v in mix.options.items() if k in OF_BASES})
    more = counted(host, mix)
    more.subtract(counted(host, bare))
    return {k: n for k, n in more.items() if n}


def timm_alone(host: str, name: str) -> float:
    """timm's optimizer as the engine's own: what the mixins are for."""
    mix, spec, model = MIXES[name], BY_NAME[host], hosts.net()
    assert mix.timm is not None
    base = mix.timm[0](unnamed(grouped(model, mix)), **mix.timm[1])
    engine, *_ = deepspeed.initialize(model=model, optimizer=base,
                                      config=hosts.deepspeed_config(spec, hosts.BATCH // dist.get_world_size()))
    for (x, y), factor in zip(hosts.batches(STEPS), RATES, strict=True):
        for group in base.param_groups if mix.scheduled else ():
            group["lr"] = mix.options["lr"] * factor
        x, y = (t.chunk(dist.get_world_size())[dist.get_rank()] for t in (x, y))
        engine.backward(nn.functional.cross_entropy(engine(x), y))
        engine.step()
    return hosts.difference({n: p.detach() for n, p in engine.module.named_parameters()}, reference(name))


def moved(name: str) -> float:
    return hosts.difference(dict(hosts.net().named_parameters()), reference(name))


def engine_schedule(host: str) -> float:
    """A scheduler that the engine steps, in the call in which the rate is rewritten; a loop steps it in one process."""
    def decaying(opt: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.6)

    worst = 0.0
    for name in ("LARS lr inside", "LAMB decoupled"):
        mix = MIXES[name]
        plain = start("plain", mix)
        loop = decaying(plain.opt)
        run = start(host, mix, decaying)
        for x, y in hosts.batches(STEPS):
            plain.step(x, y)
            loop.step()
            run.step(x, y)
            rates = [g["lr"] for g in run.opt.param_groups]
            assert rates == loop.get_last_lr(), (rates, loop.get_last_lr())
        worst = max(worst, hosts.difference(run.weights(), plain.weights()))
    return worst


def jobs(record: Record, *wanted: str) -> Iterator[Job]:
    hosts = wanted or HOSTS
    for name in MIXES:
        yield record.noted(f"moved/{name}", moved, name)
        for host in ("plain", *hosts):
            yield record.noted(f"{name}/{host}", parity, host, name)
    for host in hosts:
        if not BY_NAME[host].bf16 and not BY_NAME[host].offload:
            for name in ("LARS", "LAMB", "LAMB clipped, all"):
                yield record.noted(f"collectives/{name}/{host}", collectives, host, name)
        if host in ("zero0", "zero2", "zero3"):
            yield record.noted(f"engine schedule/{host}", engine_schedule, host)
        if host == "zero2":
            for name, alone in itertools.product(("LARS", "LAMB"), ("zero0", "zero2")):
                yield record.noted(f"timm alone/{name}/{alone}", timm_alone, alone, name)
