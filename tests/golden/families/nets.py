"""The small nets that files were computed with, rebuilt from their parameters' names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from golden.comparison import Array, FormatError

__all__ = ["Net", "build"]


class Net(nn.Module):
    """Linear layers fc1, fc2, ... with tanh between them, or batch norm and ReLU after layer 1 (bn) or K (bnK)."""

    def __init__(self, weights: Mapping[str, Array], eps: float, momentum: float) -> None:
        super().__init__()
        for name in sorted({key.rpartition(".")[0] for key in weights}, key=_place):
            shape = weights[f"{name}.weight"].shape
            if name.startswith("fc"):
                self.add_module(name, nn.Linear(shape[1], shape[0], bias=f"{name}.bias" in weights))
            else:
                self.add_module(name, nn.BatchNorm1d(shape[0], eps=eps, momentum=momentum))

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self.children())
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            x = layer(x)
            if isinstance(layer, nn.BatchNorm1d):
                x = torch.relu(x)
            elif isinstance(following, nn.Linear):
                x = torch.tanh(x)
        return x


def build(
    weights: Mapping[str, Array], buffers: Mapping[str, Array] | None = None, *, eps: float = 1e-5,
    momentum: float = 0.1,
) -> Net:
    """The net with these parameters and buffers, in their dtype.

    Raises:
        FormatError: names of layers that no documented net has, or missing buffers.
    """
    missing = [key for key in weights if f"{key.rpartition('.')[0]}.weight" not in weights]
    if not weights or missing:
        raise FormatError(f"no weight beside {missing[0]!r}" if missing else "no initial parameters")
    net = Net(weights, eps, momentum).to(getattr(torch, next(iter(weights.values())).dtype.name))
    state = {name: torch.from_numpy(value.copy()) for name, value in {**weights, **(buffers or {})}.items()}
    odd = sorted(set(state) ^ set(net.state_dict()))
    if odd:
        layers = [name for name, _ in net.named_children()]
        raise FormatError(f"parameters or buffers {odd} do not fit the net of layers {layers}")
    net.load_state_dict(state)
    return net


def _place(name: str) -> tuple[int, int]:
    """Order of a layer: fcK, then bnK (bn: bn1)."""
    match = re.fullmatch(r"(fc|bn)(\d*)", name)
    if match is None or name == "fc":
        raise FormatError(f"layer {name!r}, must be fc1, fc2, ... or bn")
    return int(match[2] or 1), int(match[1] == "bn")
