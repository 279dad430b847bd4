"""A stream of requests to forget a class, by gradient ascent in a small mixture of experts, with and without GRIP.

python recipes/unlearning.py             seed 0, half a minute
python recipes/unlearning.py 1           another seed

Ascent on a class that is to be forgotten also moves routers: the easy way to raise its loss is to send its tokens to experts
that do not know it, and the retained classes' tokens go astray with them. GRIP holds the routing of retained data, so that
forgetting has to happen in the experts.
"""

from __future__ import annotations

import copy
import sys

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

import torch
from torch import Tensor, nn
from torch.nn import functional

from everbatch.data import Source, load
from everbatch.ends import guard
from everbatch.optim import GRIP, ClipGradNorm

WIDTH, EXPERTS, TOP_K = 32, 8, 2
REQUESTS = (3, 8)
REFRESH = 1
"""Steps after which tokens are taken anew: layers below a router move them."""


class Unlearner(ClipGradNorm, GRIP, torch.optim.AdamW):
    """AdamW whose routers keep retained tokens where they are."""


class Experts(nn.Module):
    """A layer of experts of which each token takes the best two."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        best = self.router(h).topk(TOP_K, dim=-1)
        gates = torch.zeros(*h.shape[:-1], EXPERTS).scatter(-1, best.indices, best.values.softmax(-1))
        every = torch.stack([expert(h) for expert in self.experts], dim=-1)
        return x + (every * gates.unsqueeze(-2)).sum(-1)


class Classifier(nn.Module):
    """Digits as eight tokens, their rows, through two layers of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, WIDTH), nn.Parameter(0.1 * torch.randn(8, WIDTH))
        self.layers, self.head = nn.Sequential(Experts(), Experts()), nn.Linear(8 * WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x.squeeze(1)) + self.place).flatten(1))


def rows(source: Source, classes: set[int]) -> tuple[Tensor, Tensor]:
    """Images and labels of these classes."""
    chosen = torch.tensor([i for i, y in enumerate(source.targets.tolist()) if y in classes])
    return source.fetch(chosen).float() / 16, source.targets[chosen]


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Learn all classes, by plain AdamW."""
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for chosen in [c for _ in range(8) for c in torch.randperm(len(x)).split(64)]:
        opt.zero_grad()
        functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        opt.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In per cent."""
    return 100 * (model(x).argmax(1) == y).double().mean().item()


def forget(model: nn.Module, data: Source, classes: set[int], retained: set[int], strength: float) -> float:
    """Ascend on some classes until they are recognised by chance at most; returns how much routing is unchanged, in per cent."""
    x, y = rows(data, classes)
    kept = [(rows(data, retained)[0][::8],)]  # every eighth retained image is remembered
    opt = Unlearner(model, lr=1e-3, max_norm=1.0, routers=("*router.weight",), top_k=TOP_K, strength=strength)
    opt.retain_routing(kept)
    for step in range(40):
        chosen = torch.randperm(len(x))[:32]

        def closure(chosen: Tensor = chosen) -> Tensor:
            loss = -functional.cross_entropy(model(x[chosen]), y[chosen])
            opt.backward(loss)
            return loss

        opt.step(closure)
        if strength and step % REFRESH == REFRESH - 1:
            opt.refresh_routing(kept)
        if accuracy(model, x, y) < 10.0:
            break
    return 100 * opt.routing_stability(kept)


def main(*words: str) -> dict[str, list[float]]:
    """Returns, for plain ascent and with GRIP, the routing that each request left unchanged."""
    torch.manual_seed(int(words[0]) if words else 0)
    data, test = load("digits", train=True), load("digits", train=False)
    learnt = Classifier()
    train(learnt, *rows(data, set(range(10))))
    print(f"learnt: {accuracy(learnt, *rows(test, set(range(10)))):.1f} % of the test digits")
    found: dict[str, list[float]] = {}
    for name, strength in (("plain", 0.0), ("GRIP", 1.0)):
        torch.manual_seed(7)
        model, found[name] = copy.deepcopy(learnt), []
        for number, request in enumerate(REQUESTS):
            gone = set(REQUESTS[: number + 1])
            left = set(range(10)) - gone
            found[name].append(forget(model, data, {request}, left, strength))
            print(f"{name:>5}, class {request} forgotten: routing unchanged {found[name][-1]:.1f} %, accuracy of "
                  f"{sorted(gone)} {accuracy(model, *rows(test, gone)):.1f} %, of the others "
                  f"{accuracy(model, *rows(test, left)):.1f} %")
    return found


if __name__ == "__main__":
    with guard("unlearning"):
        main(*sys.argv[1:])
