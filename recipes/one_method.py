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
from typing import Any

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

import torch
from torch.nn import functional

from everbatch import compose, methods
from everbatch.config.words import plain_numbers
from everbatch.data import load
from everbatch.errors import check, nearest
from everbatch.experiment import guard
from everbatch.nn import SmallConv

DEFAULTS = {torch.optim.SGD: {"lr": 0.1, "momentum": 0.9}}


BASES = {name: cls for name, cls in vars(torch.optim).items() if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
         and cls not in (torch.optim.Optimizer, torch.optim.LBFGS)}
MIXINS = {part.__name__: part for part in methods.optimizer_mixins().values()}


def value(text: str) -> Any:
    """A number, true, false or null as Python writes them, else the text."""
    try:
        return plain_numbers(ast.literal_eval(text))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return plain_numbers(text)


def named(word: str, known: dict[str, type], what: str) -> type:
    """The class of a name, whatever its case."""
    found = [cls for name, cls in known.items() if name.lower() == word.lower()]
    check(bool(found), what, repr(word), "be one of everbatch.optim" if what == "mixin" else "be one of torch.optim",
          f"{nearest(word, known)}; options are key=value, and --help lists all")
    return found[0]


def usage() -> str:
    """What --help prints."""
    return f"{(__doc__ or '').strip()}\n\nmixins: {', '.join(sorted(MIXINS))}\nbase: {', '.join(sorted(BASES))}"


def main(*words: str) -> float:
    """Train four epochs; returns the test accuracy."""
    options = {key: value(text) for key, _, text in (word.partition("=") for word in words if "=" in word)}
    base = named(str(options.pop("base", "SGD")), BASES, "base optimizer")
    mixins = [named(word, MIXINS, "mixin") for word in words if "=" not in word]
    torch.manual_seed(0)
    digits, test, model = load("digits", train=True), load("digits", train=False), SmallConv(1, 10, 8)
    cls = compose(*mixins, base=base)
    try:
        opt = cls(model, **{**DEFAULTS.get(base, {}), **options})
    except TypeError as error:  # an option that nobody has, or that is of another type
        raise ValueError(f"{error}; given: {', '.join(f'{k}={v!r}' for k, v in options.items())}") from None
    opt.task_samples = len(digits)  # for VCL alone
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
    with guard("one_method"):
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(usage())
        else:
            main(*sys.argv[1:])
