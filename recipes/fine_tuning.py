"""Continual fine-tuning of a vision transformer with OSFT: what the first task taught it, after a second one.

python recipes/fine_tuning.py            seed 0, about a minute
python recipes/fine_tuning.py 1          another seed

A small timm ViT learns the digits 0 to 4, then 5 to 9, with a head for each task and its blocks in common. The second task is
trained until its loss is as low with OSFT as without; what differs is what is left of the first.
"""

from __future__ import annotations

import copy
import sys

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from everbatch.data import Source, load
from everbatch.ends import guard
from everbatch.optim import OSFT

WIDTH = 48
METHODS = {"plain": {"strength": 0.0}, "OSFT, weight": {"form": "weight"}, "OSFT, factor": {"form": "factor"}}


class Tuner(OSFT, torch.optim.AdamW):
    """AdamW that leaves the leading directions of what it has learnt alone."""


class Tasks(nn.Module):
    """One trunk, a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=WIDTH, depth=3,
                                       num_heads=4, num_classes=0)
        self.heads, self.task = nn.ModuleList([nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5)]), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.task](self.trunk(x))


def rows(source: Source, task: int) -> tuple[Tensor, Tensor]:
    """Images of five digits, and which of the five each is."""
    chosen = torch.tensor([i for i, y in enumerate(source.targets.tolist()) if y // 5 == task])
    return source.fetch(chosen).float() / 16, source.targets[chosen] % 5


def learn(model: Tasks, opt: Tuner, x: Tensor, y: Tensor, until: float) -> float:
    """Epochs until the running loss is so low, thirty at most; returns it."""
    running = 2.0
    for chosen in [c for _ in range(30) for c in torch.randperm(len(x)).split(64)]:

        def closure(chosen: Tensor = chosen) -> Tensor:
            loss = functional.cross_entropy(model(x[chosen]), y[chosen])
            opt.backward(loss)
            return loss

        running = 0.9 * running + 0.1 * opt.step(closure).item()
        if running < until:
            break
    return running


@torch.no_grad()
def accuracy(model: Tasks, source: Source, task: int) -> float:
    """On the test digits of a task, in per cent."""
    x, y = rows(source, task)
    model.task = task
    return 100 * (model.eval()(x).argmax(1) == y).double().mean().item()


def main(*words: str) -> dict[str, tuple[float, float]]:
    """Returns, by method, the loss of the second task and the accuracy on the first after it."""
    torch.manual_seed(int(words[0]) if words else 0)
    data, test = load("digits", train=True), load("digits", train=False)
    first = Tasks()
    learn(first, Tuner(first, lr=2e-3, strength=0.0), *rows(data, 0), until=0.1)
    print(f"first task learnt: {accuracy(first, test, 0):.1f} %")
    found = {}
    for name, options in METHODS.items():
        torch.manual_seed(7)
        model = copy.deepcopy(first).train()
        model.task = 0
        opt = Tuner(model, lr=2e-3, targets=("trunk.blocks.*",), **options)
        opt.consolidate_osft([rows(data, 0)])
        model.task = 1
        loss = learn(model, opt, *rows(data, 1), until=0.1)
        found[name] = loss, accuracy(model, test, 0)
        print(f"{name:<12}  second task: loss {loss:.3f}, {accuracy(model, test, 1):.1f} %; first task: {found[name][1]:.1f} %",
              flush=True)
    return found


if __name__ == "__main__":
    with guard("fine_tuning"):
        main(*sys.argv[1:])
