"""Any optimizer mixins in a plain loop on digits, named on the command line with their options.

python recipes/one_method.py SAM rho=0.1
python recipes/one_method.py LookSAM rho=0.1 every=5
python recipes/one_method.py ClipGradNorm DynamicSparsity SAM density=0.2 update_every=20
python recipes/one_method.py LAMB base=AdamW lr=0.005

compose sorts the mixins into a legal order, and refuses, with the reason, those that cannot go together.
"""

from __future__ import annotations

import ast
import sys

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

import torch
from torch.nn import functional

from everbatch import compose, optim
from everbatch.data import load
from everbatch.nn import SmallConv

DEFAULTS = {torch.optim.SGD: {"lr": 0.1, "momentum": 0.9}}


def main(*words: str) -> float:
    """Train four epochs; returns the test accuracy."""
    given = dict(w.split("=") for w in words if "=" in w)
    options = {k: ast.literal_eval(v) if v[:1] in "0123456789-'\"TFN" else v for k, v in given.items()}
    base = getattr(torch.optim, options.pop("base", "SGD"))
    torch.manual_seed(0)
    digits, test, model = load("digits", train=True), load("digits", train=False), SmallConv(1, 10, 8)
    opt = compose(*(getattr(optim, w) for w in words if "=" not in w), base=base)(model, **{**DEFAULTS.get(base, {}), **options})
    for rows in [r for _ in range(4) for r in torch.randperm(len(digits)).split(64)]:
        x, y = digits.fetch(rows).float() / 16, digits.targets[rows]

        def losses(rows: torch.Tensor | None = None, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            chosen = slice(None) if rows is None else rows
            return functional.cross_entropy(model(x[chosen]), y[chosen], reduction="none")

        def closure() -> torch.Tensor:
            loss = losses().mean()
            opt.backward(loss)
            return loss

        def output(x: torch.Tensor = x) -> torch.Tensor:
            value = model(x).amax(1).mean()
            opt.backward(value)
            return value

        opt.step(closure, output=output, per_sample=losses)  # the last two are for Ignite and ESAM alone
    accuracy = (model(test.fetch(torch.arange(len(test))).float() / 16).argmax(1) == test.targets).float().mean().item()
    print(f"{opt.describe()}\ntest accuracy {100 * accuracy:.2f} %")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])
