"""A training loop of your own, with single mixins in its optimizer: SAM and clipping over torch.optim.SGD, on digits.

python recipes/own_loop.py                               plain torch, a few seconds
torchrun --nproc-per-node 2 recipes/own_loop.py          DDP: the same global batches, the same losses to rounding

No Trainer and no configuration: what everbatch adds to a loop are the class line, `opt.backward` and
`opt.step(closure)`.
"""

from __future__ import annotations

from collections.abc import Iterator

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from everbatch.data import Source, load
from everbatch.distributed import World, init
from everbatch.ends import guard
from everbatch.nn import SmallConv
from everbatch.optim import SAM, ClipGradNorm


class SharpSGD(ClipGradNorm, SAM, torch.optim.SGD):
    """SAM's gradient, clipped by its global norm, then SGD's update."""


def main() -> None:
    """The loop."""
    world = init("cpu")
    train = load("digits", train=True)
    torch.manual_seed(0)  # every rank draws the same weights and the same order of samples
    bare = SmallConv(in_chans=1, num_classes=10, image_size=8)
    model = DistributedDataParallel(bare) if world.size > 1 else bare
    opt = SharpSGD(model, lr=0.1, momentum=0.9, rho=0.05, max_norm=1.0)
    for epoch in range(4):
        for x, y in batches(train, world):
            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                loss = functional.cross_entropy(model(x), y)
                opt.backward(loss)
                return loss
            loss = opt.step(closure)
        say(world, f"epoch {epoch + 1}: loss {world.sum(loss) / world.size:.4f}, norm {opt.metrics['grad_norm']:.3f}")
    say(world, f"{opt.describe()}\ntest accuracy {100 * accuracy(bare):.2f} %")


def batches(source: Source, world: World, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's rows of every global batch of one epoch; the incomplete last batch is left out."""
    for rows in torch.randperm(len(source)).split(size)[:-1]:
        mine = rows[world.rank :: world.size]
        yield source.fetch(mine).float() / 16, source.targets[mine]


@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    """Share of the test digits that are recognised."""
    test = load("digits", train=False)
    guess = model(test.fetch(torch.arange(len(test))).float() / 16).argmax(1)
    return (guess == test.targets).double().mean().item()


def say(world: World, text: str) -> None:
    """Print on rank 0."""
    if world.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    with guard("own_loop"):
        main()
