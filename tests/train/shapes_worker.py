"""Models of every shape in the Trainer on DDP and on FSDP2, as jobs: the same steps to rounding."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from everbatch import compose
from everbatch.data import TensorSource, iid
from everbatch.optim import SAM
from everbatch.train import Trainer
from everbatch.train.blocks import blocks_of

if TYPE_CHECKING:  # tests of one process import the models from here, without the contract suite at hand
    from record import Job, Record


class Net(nn.Module):
    """A layer, a middle that a subclass gives, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layers = nn.Linear(6, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def middle(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x

    def forward(self, x: Tensor) -> Any:
        return self.head(self.middle(self.first(x)))


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers[2].weight = self.layers[0].weight


class TiedToRoot(Net):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(8, 8)
        self.own.weight = self.layers[1].weight

    def middle(self, x: Tensor) -> Tensor:
        return self.own(super().middle(x))  # type: ignore[no-any-return]


class Twice(Net):
    """One block object at two places, and another that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2] = self.layers[0]

    def middle(self, x: Tensor) -> Tensor:
        return self.layers[1](super().middle(x)).tanh()  # type: ignore[no-any-return]


class Read(Net):
    """Reads a weight without calling its layer, before and after others."""

    def middle(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.layers[2].weight, self.layers[2].bias)
        return self.layers[1](self.layers[0](x)).tanh() @ self.layers[0].weight  # type: ignore[no-any-return, operator]


def apply(layer: nn.Linear, x: Tensor) -> Tensor:
    return functional.linear(x, layer.weight).tanh()


class Helped(Net):
    def middle(self, x: Tensor) -> Tensor:
        return self.layers[1].forward(apply(self.layers[0], x)) * getattr(self.layers[2], "bias")  # type: ignore[no-any-return] # noqa: B009


class Nested(Net):
    """Containers in containers, weights in lists, a namespace without a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8)]), nn.ModuleDict({"a": nn.Linear(8, 8)})])
        self.mixed = nn.ModuleDict({"scales": nn.ParameterList([torch.ones(8)]), "block": nn.Linear(8, 8)})
        self.space = nn.Module()
        self.space.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def middle(self, x: Tensor) -> Tensor:
        x = self.deep[1]["a"](self.deep[0][0](super().middle(x)))  # type: ignore[index]
        return self.space.inner(self.mixed["block"](x) * self.mixed["scales"][0])  # type: ignore[index, operator, no-any-return]


class Unused(Net):
    """A layer that no forward uses, and one that every second does."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.sometimes, self.calls = nn.Linear(8, 4), nn.Linear(8, 8), 0

    def middle(self, x: Tensor) -> Tensor:
        self.calls += self.training
        x = super().middle(x)
        return self.sometimes(x) if self.calls > 4 else x


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class Dressed(Net):
    def forward(self, x: Tensor) -> Any:
        hidden = self.middle(self.first(x))
        return Output(self.head(hidden), hidden)


MODELS = {kind.__name__: kind for kind in (Net, Tied, TiedToRoot, Twice, Read, Helped, Nested, Unused, Dressed)}


def trained(kind: type[Net], engine: str) -> tuple[dict[str, Tensor], Tensor]:
    g = torch.Generator().manual_seed(0)
    train, test = (TensorSource(torch.randn(n, 6, generator=g), torch.arange(n) % 4, name=str(n)) for n in (64, 32))
    optimizer = functools.partial(compose(SAM, base=torch.optim.SGD), lr=0.1, rho=0.05, momentum=0.9, weight_decay=0.1)
    trainer = Trainer(kind(), optimizer, engine, config=Trainer.Config(batch_size=8), device="cpu",
                      output="logits" if kind is Dressed else None, ddp={"bucket_cap_mb": 0.001} if engine == "ddp" else None)
    trainer.fit(iid(train, test))
    opt = trainer.optimizer
    return opt.host.gather(list(opt.host.weights()), opt.host.names), trainer.predict(torch.ones(3, 6))


def compare(kind: type[Net]) -> dict[str, Any]:
    (ddp, logits), (fsdp, others) = trained(kind, "ddp"), trained(kind, "fsdp2")
    names = dict(kind().named_parameters())
    return {"off": max(float((ddp[n] - fsdp[n]).abs().max()) for n in ddp), "same": sorted(ddp) == sorted(fsdp) == sorted(names),
            "logits": float((logits - others).abs().max()), "blocks": len(blocks_of(kind())),
            "still": [n for n in ddp if torch.equal(ddp[n], names[n])]}


def jobs(record: Record) -> Iterator[Job]:
    for name, kind in MODELS.items():
        yield record.noted(name, compare, kind)
