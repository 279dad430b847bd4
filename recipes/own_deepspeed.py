"""A DeepSpeed engine that you already have, with single mixins on it: SAM and clipping at ZeRO stage 2, on digits.

torchrun --nproc-per-node 2 recipes/own_deepspeed.py            (without a GPU: DS_ACCELERATOR=cpu before it)

The client optimizer is an ordinary torch.optim.SGD, its groups and moments stay the engine's; `SharpSGD.on(engine,
...)` puts the mixins over it, and `opt.step(closure)` calls `engine.backward` and `engine.step` itself: calling them
beside it is an error. The closure runs all micro-batches of one update; `opt.micro_batches` divides each loss by their
number, as DeepSpeed does, and `gradient_accumulation_steps` must be that number (or 1). Clipping is a mixin, so the
engine's own must be off (DeepSpeed's default is 1.0); forgetting it is an error that says so.
"""

from __future__ import annotations

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

import deepspeed
import torch
from torch import Tensor
from torch.nn import functional

from everbatch.data import load
from everbatch.distributed import init
from everbatch.ends import guard
from everbatch.nn import SmallConv
from everbatch.optim import SAM, ClipGradNorm

ACCUMULATION = 2
CONFIG = {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": ACCUMULATION, "gradient_clipping": 0.0,
          "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}


class SharpSGD(ClipGradNorm, SAM, torch.optim.SGD):
    """SAM's gradient, clipped by its global norm, then SGD's update; `on` puts it over a client SGD."""


def main() -> None:
    """One epoch after another, 32 digits per rank and step, in two micro-batches."""
    world = init(lone=True)  # one process without torchrun is a group of its own
    train, test = load("digits", train=True), load("digits", train=False)
    torch.manual_seed(0)  # every rank draws the same weights and the same order of samples
    model = SmallConv(in_chans=1, num_classes=10, image_size=8)
    client = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, optimizer=client, config=CONFIG)
    opt = SharpSGD.on(engine, rho=0.05, max_norm=1.0)
    inputs, held = (s.fetch(torch.arange(len(s))).float().to(engine.device) / 16 for s in (train, test))
    for epoch in range(4):
        for rows in torch.randperm(len(train)).split(32 * world.size)[:-1]:
            def closure(mine: Tensor = rows[world.rank :: world.size]) -> Tensor:
                total = torch.zeros((), device=engine.device)
                for some in opt.micro_batches(mine.chunk(ACCUMULATION)):
                    loss = functional.cross_entropy(engine.module(inputs[some]), train.targets[some].to(engine.device))
                    total += opt.backward(loss)  # half of each loss, so that their sum is the mean
                return total
            loss = world.sum(opt.step(closure)) / world.size
        if world.rank == 0:
            print(f"epoch {epoch + 1}: loss {loss:.4f}, norm {opt.metrics['grad_norm']:.3f}", flush=True)
    with torch.no_grad():  # on every rank: at stage 3 a forward gathers parameters
        right = (engine.module(held).argmax(1).cpu() == test.targets).double().mean()
    if world.rank == 0:
        print(f"{opt.describe()}\ntest accuracy {100 * right:.2f} %", flush=True)


if __name__ == "__main__":
    with guard("own_deepspeed"):
        main()
