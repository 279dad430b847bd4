"""Data that keep arriving: is a warm start worse than starting over, and does shrink-and-perturb mend it?

torchrun --nproc-per-node 2 recipes/growing_data.py                        noisy digits in two rounds, three arms
torchrun --nproc-per-node 2 recipes/growing_data.py rounds=8 pixel_noise=0
torchrun --nproc-per-node 8 recipes/growing_data.py data.source=torchvision:CIFAR10:ROOT model.name=resnet18 engine.kind=deepspeed

Each round trains on everything that has arrived. The arms differ in where a round starts: from a new network (fresh), from the
last round's (warm), or from the last round's, shrunk and perturbed. On one rank without torchrun, engine ddp is plain torch.
"""

from __future__ import annotations

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

from everbatch.experiment import GrowingData as Recipe
from everbatch.experiment import main

if __name__ == "__main__":
    main(Recipe, __file__)
