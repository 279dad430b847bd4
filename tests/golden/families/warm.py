"""`shrink_perturb*`: full state dicts before and after the authors' shrink and perturb, with the fresh network they drew."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from everbatch.optim import ShrinkPerturb
from golden.comparison import Array, Comparison, FormatError, Vectors

__all__ = ["check"]


class Opt(ShrinkPerturb, torch.optim.SGD):
    """What runs."""


class Block(nn.Module):
    """The authors' BasicBlock."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


class Residual(nn.Module):
    """A stem, one block, a linear head."""

    def __init__(self, state: dict[str, Array]) -> None:
        super().__init__()
        width, inside = state["conv1.weight"].shape[:2]
        self.conv1 = nn.Conv2d(inside, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.b1 = Block(width, state["b1.conv1.weight"].shape[0], 2)
        self.linear = nn.Linear(*reversed(state["linear.weight"].shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.b1(functional.relu(self.bn1(self.conv1(x)))).mean((2, 3)))  # type: ignore[no-any-return]


class Perceptron(nn.Module):
    """Three linear layers."""

    def __init__(self, state: dict[str, Array]) -> None:
        super().__init__()
        for name in ("lm1", "lm2", "lm3"):
            setattr(self, name, nn.Linear(*reversed(state[f"{name}.weight"].shape)))


def check(file: Vectors, compare: Comparison) -> None:
    """Every pair of factors, on every network of the file."""
    kinds: dict[str, type[nn.Module]] = {"mlp": Perceptron, "resnet": Residual}
    found = [k for k in file.groups() if k in kinds]
    if not found:
        raise FormatError(f"no network: keys begin with {' or '.join(kinds)}")
    for kind in found:
        for j in file.groups(f"{kind}/"):
            at = f"{kind}/{j}"
            before = file.under(f"{at}/before/")
            fresh = kinds[kind](before).double()
            fresh.load_state_dict(_tensors(file.under(f"{at}/fresh_init/")))
            model = kinds[kind](before).double()
            model.load_state_dict(_tensors(before))
            opt = Opt(model, lr=0.1, shrink=float(file[f"{at}/hp_shrink"]), perturb=float(file[f"{at}/hp_perturb"]),
                      factory=lambda fresh=fresh: fresh)  # type: ignore[misc]
            opt.shrink_perturb()
            after = model.state_dict()
            for name, want in file.under(f"{at}/after/").items():
                compare.close(f"{at}/after/{name}", after[name].numpy(), want)


def _tensors(state: dict[str, Array]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in state.items()}
