"""What the benchmark of ConAdv's step time trains, and the training loops it compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from timing import conv_net
from torch import Tensor, nn
from torch.nn import functional

from everbatch import compose
from everbatch.data import Batch
from everbatch.distributed import World
from everbatch.nn import convert_split_bn, split_branch
from everbatch.train import ConAdv

CONADV: dict[str, dict[str, Any]] = {"sequential": {"tau": 0}, **{p: {"tau": 1, "placement": p} for p in (
    "inline", "stream", "process", "ranks")}}


@dataclass(frozen=True)
class Net:
    """What is trained, on how much."""

    build: Callable[[], nn.Module]
    batch: int
    side: int = 32
    """Of the square images."""
    precision: str = "fp32"
    more: int = 1
    """Times as many steps per block."""


def nets(tiny: bool = False) -> dict[str, Net]:
    """The nets of the CPU part. Latency-bound: twice the samples cost a few percent ("mixed once" shows it). Short steps: they
    cost twice as much, but a step is so short that handing a batch over shows."""
    if tiny:
        return {"tiny": Net(lambda: conv_net(width=4), 4)}
    return {"compute-bound": Net(conv_net, 32), "latency-bound": Net(mixer, 4, more=5),
            "short steps": Net(lambda: conv_net(width=8), 4, more=10)}


def mixer() -> nn.Module:
    """Twelve thin blocks of an MLP-Mixer for 32x32 images: many small operators, 0.11 M parameters in 150 tensors."""
    from timm.models.mlp_mixer import MlpMixer

    torch.manual_seed(0)
    return MlpMixer(img_size=32, patch_size=8, embed_dim=32, num_blocks=12, num_classes=10)  # type: ignore[no-any-return]


class Loop:
    """Plain training: the verbs that ConAdv extends, over a ring of noise batches that never ends."""

    def __init__(self, model: nn.Module, ring: list[Batch], precision: str = "fp32") -> None:
        self.world, self.seed, self.step, self.ring = World.current(), 0, 0, ring
        self.config = SimpleNamespace(precision=precision, accumulation=1)
        self.model = self.configure_model(model).train()
        self.optimizer = compose(base=torch.optim.SGD)(self.model, lr=0.01, momentum=0.9)

    def configure_model(self, model: nn.Module) -> nn.Module:
        return model

    def on_task_start(self, task: Any) -> None:
        pass

    def augment_batch(self, parts: list[Batch]) -> list[Batch]:
        return parts

    def forward(self, batch: Batch) -> Tensor:
        with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.model(batch.inputs).float()  # type: ignore[no-any-return]

    def forward_parts(self, parts: list[Batch]) -> list[Tensor]:
        return [self.forward(part) for part in parts]

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"cross_entropy": functional.cross_entropy(outputs, batch.targets)}

    def peek(self, ahead: int) -> Batch:
        return self.ring[(self.step + ahead) % len(self.ring)]

    def training_step(self) -> None:
        parts = self.augment_batch([self.peek(0)])

        def closure() -> Tensor:
            made = zip(self.forward_parts(parts), parts, strict=True)
            loss = torch.stack([term for out, part in made for term in self.loss_terms(out, part).values()]).sum()
            self.optimizer.backward(loss)
            return loss

        self.optimizer.step(closure)
        self.step += 1


class Mixed(Loop):
    """The batch and a copy of it with noise made beforehand, through batch norms of its own: ConAdv's step with no attack."""

    def configure_model(self, model: nn.Module) -> nn.Module:
        convert_split_bn(model)
        noise = torch.Generator().manual_seed(1)
        self.moved = [b.inputs + 0.01 * torch.randn(b.inputs.shape, generator=noise).to(b.inputs) for b in self.ring]
        return model

    def augment_batch(self, parts: list[Batch]) -> list[Batch]:
        return [*parts, replace(parts[0], part="adversarial", inputs=self.moved[self.step % len(self.ring)])]

    def forward(self, batch: Batch) -> Tensor:
        with split_branch(self.model, "adversarial" if batch.part == "adversarial" else "main"):
            return super().forward(batch)


class MixedOnce(Mixed):
    """The same in one forward."""

    def forward_parts(self, parts: list[Batch]) -> list[Tensor]:
        both = replace(parts[0], inputs=torch.cat([part.inputs for part in parts]))
        with split_branch(self.model, "adversarial", halves=True):
            return list(Loop.forward(self, both).chunk(2))


class Learner(ConAdv, Loop):
    """The method."""


def learner(arm: str, net: Net, device: str = "cpu", **options: Any) -> Any:
    """The trainer of one arm; every arm has a model of its own, from the same seed."""
    kind, batch = arm.removesuffix(" split"), net.batch // 2 if arm.endswith(" split") else net.batch
    torch.manual_seed(0)
    model, g, ring = net.build().to(device), torch.Generator().manual_seed(0), []
    for i in range(4):
        x = torch.rand(batch, 3, net.side, net.side, generator=g)
        y, ids = torch.randint(0, 10, (batch,), generator=g), torch.arange(batch) + i * batch
        ring.append(Batch(x, y, ids, ids).to(device))
    if kind in CONADV:
        return Learner(model, ring, net.precision, one_forward=arm != kind, **CONADV[kind], **options)
    return {"vanilla": Loop, "mixed": Mixed, "mixed once": MixedOnce, "mixed split": MixedOnce}[arm](model, ring, net.precision)
