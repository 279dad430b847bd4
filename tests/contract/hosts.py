"""Small real runs on every host, for the contract suite: the same data, the same start, whatever the engine."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from everbatch.contract import parts_of

WIDTH, CLASSES, BATCH = 20, 5, 24
DEVICE = os.environ.get("EVERBATCH_DEVICE", "cpu")
"""Where nets and data are: "cpu" or "cuda"."""


def build(dropout: float = 0.0, norm: bool = False, fork: str = "") -> nn.Module:
    """A smooth net (no kinks that amplify rounding) with odd sizes, so that every sharding pads, and one tensor of 1
    element; drawn from the global stream. With `fork`: `Forked` instead."""
    if fork:
        return Forked(fork)
    layers: list[nn.Module] = [nn.Linear(WIDTH, 31), nn.Tanh(), Scale()]
    layers += [nn.BatchNorm1d(31)] if norm else []
    layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(31, 17), nn.Tanh(), nn.Linear(17, CLASSES))


def net(seed: int = 0, *, dropout: float = 0.0, norm: bool = False, fork: str = "") -> nn.Module:
    """`build` with the global stream seeded, on the suite's device."""
    torch.manual_seed(seed)
    return build(dropout, norm, fork).to(DEVICE)


class Forked(nn.Module):
    """A net of which each pass takes one of two ways; the weights of the other get no gradient.

    branch: the ways are a layer in the middle. heads: they are the last layer, one for each task.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.kind, self.way = nn.Linear(WIDTH, 31), kind, 0
        sizes = (31, 17) if kind == "branch" else (17, CLASSES)
        self.ways = nn.ModuleList(nn.Linear(*sizes) for _ in range(2))
        self.shared = nn.Linear(17, CLASSES) if kind == "branch" else nn.Linear(31, 17)

    def forward(self, x: Tensor) -> Tensor:
        last = (self.ways[self.way], self.shared) if self.kind == "branch" else (self.shared, self.ways[self.way])
        x = self.stem(x).tanh()
        return last[1](last[0](x).tanh())  # type: ignore[no-any-return]


WAYS = {"branch": (0, 0, 1, 1, 0, 1), "heads": (0, 0, 0, 1, 1, 1)}
"""Which way a forked net takes at each step of the common data."""


class Scale(nn.Module):
    """A learned scalar: a parameter smaller than any world size above one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def batches(steps: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    made = [(torch.randn(BATCH, WIDTH, generator=g), torch.randint(0, CLASSES, (BATCH,), generator=g)) for _ in range(steps)]
    return [(x.to(DEVICE), y.to(DEVICE)) for x, y in made]


class Interrupted(Exception):
    """What a failing pass raises."""


@dataclass(frozen=True)
class HostSpec:
    """One engine in one mode."""

    kind: str
    """"plain", "ddp", "fsdp2", "zero"."""
    stage: int = 0
    bf16: bool = False
    fp32_accumulation: bool = False
    offload: bool = False
    persist: int = 0
    """stage3_param_persistence_threshold."""
    replicate: bool = False
    """FSDP2 on a mesh of (ranks, 1): what is sharded on the inner dimension is replicated on the outer (HSDP)."""

    @property
    def name(self) -> str:
        if self.kind != "zero":
            return "hsdp" if self.replicate else self.kind
        flags = [f for f, on in (("bf16", self.bf16), ("fp32acc", self.fp32_accumulation), ("offload", self.offload),
                                 ("persistent", self.persist > 0)) if on]
        return "-".join([f"zero{self.stage}", *flags])


HOSTS = [HostSpec("plain"), HostSpec("ddp"), HostSpec("fsdp2"), HostSpec("fsdp2", replicate=True),
         *(HostSpec("zero", s) for s in range(4)),
         HostSpec("zero", 3, persist=100_000), *(HostSpec("zero", s, offload=True) for s in (1, 2, 3)),
         *(HostSpec("zero", s, bf16=True) for s in range(4)),
         *(HostSpec("zero", s, bf16=True, fp32_accumulation=True) for s in (1, 2, 3)),
         *(HostSpec("zero", s, bf16=True, offload=True) for s in (1, 2, 3))]
BY_NAME = {h.name: h for h in HOSTS}


def deepspeed_config(spec: HostSpec, micro: int, accumulation: int = 1) -> dict[str, Any]:
    # A bucket of the default size takes 2 GiB of a GPU for every engine that is not collected yet.
    zero: dict[str, Any] = {"stage": spec.stage, "stage3_param_persistence_threshold": spec.persist,
                            "reduce_bucket_size": 100_000}
    if spec.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation, "gradient_clipping": 0.0,
              "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "zero_optimization": zero,
              "bf16": {"enabled": spec.bf16}, "steps_per_print": 10**9}
    if spec.fp32_accumulation:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


@dataclass
class Run:
    """One optimizer over one model on one host, and how to take a step with rows of a global batch."""

    opt: Any
    forward: Callable[[Tensor], Tensor]
    model: nn.Module
    spec: HostSpec
    rank: int
    world: int
    losses: list[Tensor] = field(default_factory=list)

    @property
    def bare(self) -> Any:
        """The net inside DDP."""
        return getattr(self.model, "module", self.model)

    def local(self, x: Tensor) -> Tensor:
        """This rank's rows of a global batch."""
        return x.chunk(self.world)[self.rank]

    def step(self, x: Tensor, y: Tensor, accumulation: int = 1, *, spoil: bool = False, fail_in_pass: int = 0) -> Any:
        """One step on this rank's rows of a global batch.

        Args:
            accumulation: micro-batches per pass.
            spoil: make this rank's loss NaN.
            fail_in_pass: raise `Interrupted` in this pass, after its last forward; 0 for never.
        """
        x, y = self.local(x), self.local(y)
        passes = 0

        def closure() -> Tensor:
            nonlocal passes
            passes += 1
            total = torch.zeros((), device=x.device)
            for rows in self.opt.micro_batches(torch.arange(len(x)).chunk(accumulation)):
                inputs = x[rows].bfloat16() if self.spec.bf16 else x[rows]
                loss = nn.functional.cross_entropy(self.forward(inputs).float(), y[rows])
                if passes == fail_in_pass and rows[-1] == len(x) - 1:
                    raise Interrupted
                total += self.opt.backward(loss * math.nan if spoil else loss)
            return total

        def output() -> Tensor:
            mean = self.forward(x.bfloat16() if self.spec.bf16 else x).float().logsumexp(1).mean()
            self.opt.backward(mean)
            return mean.detach()

        def per_sample(rows: Tensor | None) -> Tensor:
            chosen = slice(None) if rows is None else rows
            inputs = x[chosen].bfloat16() if self.spec.bf16 else x[chosen]
            losses = nn.functional.cross_entropy(self.forward(inputs).float(), y[chosen], reduction="none")
            return losses * math.nan if spoil else losses

        def reference() -> Tensor:
            """Of the same inputs with other labels, so that most steps conflict with it."""
            loss = nn.functional.cross_entropy(self.forward(x.bfloat16() if self.spec.bf16 else x).float(), (y + 2) % CLASSES)
            self.opt.backward(loss)
            return loss.detach()

        known = {"output": output, "per_sample": per_sample, "reference": reference}
        wanted = {name for part in parts_of(type(self.opt)) for name in part.needs}
        wanted |= {name for part, config in self.opt.configs.items() for name in part.wants(config) if name == "reference"}
        loss = self.opt.step(closure, **{name: known[name] for name in wanted if name in known})
        self.losses.append(loss)
        return loss

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """What the model computes now, in evaluation mode, for fixed inputs."""
        inputs = torch.linspace(-1, 1, 2 * WIDTH, device=DEVICE).view(2, WIDTH)
        self.model.eval()
        try:
            return self.forward(inputs.bfloat16() if self.spec.bf16 else inputs).clone()
        finally:
            self.model.train()

    def weights(self) -> dict[str, Tensor]:
        """Whole masters by name, on every rank."""
        host = self.opt.host
        return {n: t.detach().clone() for n, t in host.gather(list(host.weights()), host.names).items()}


def start(spec: HostSpec, cls: type, options: dict[str, Any], *, model: nn.Module | None = None, base: Any = None,
          accumulation: int = 1) -> Run:
    """Put `cls` over a copy of `model` on the host of `spec`."""
    model = copy.deepcopy(model) if model is not None else net()
    base = base or functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and spec.kind != "plain" else (0, 1)
    if spec.bf16:
        # DeepSpeed makes weights bf16 and leaves statistics fp32, which torch's CPU batch norm refuses.
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer.bfloat16() if buffer is not None and buffer.is_floating_point() else buffer
    if spec.kind == "plain":
        return Run(cls(model, **base.keywords, **options), model, model, spec, rank, world)
    if spec.kind == "ddp":
        wrapped = DistributedDataParallel(model, find_unused_parameters=isinstance(model, Forked))
        return Run(cls(wrapped, **base.keywords, **options), wrapped, model, spec, rank, world)
    if spec.kind == "fsdp2":
        names = ("replicas", "shards")
        mesh = init_device_mesh(DEVICE, (world, 1), mesh_dim_names=names) if spec.replicate else None
        for part in model.modules():
            if isinstance(part, nn.Linear):
                fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model, FSDPModule)
        return Run(cls(model, **base.keywords, **options), model, model, spec, rank, world)
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model, optimizer=base(model.parameters()),
        config=deepspeed_config(spec, BATCH // world // accumulation, accumulation))
    return Run(cls.on(engine, **options), engine.module, engine.module, spec, rank, world)


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest absolute difference over all parameters."""
    assert a.keys() == b.keys(), (sorted(a), sorted(b))
    return max((a[n].float() - b[n].float()).abs().max().item() for n in a)
