"""FLOPs and bytes of a step with ConAdv: as counted, and as the arithmetic says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Flops(TorchDispatchMode):
    """Counts the FLOPs of every operator below autograd, crafting's included; adversaries elsewhere are not seen."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def flops(step: Callable[[], Any]) -> int:
    with Flops() as counted:
        step()
    return counted.total


def expected_flops(model: nn.Module, inputs: Tensor, arm: str, steps: int = 1) -> tuple[int, int]:
    """(the trainer's, its adversary's) per step, exactly.

        vanilla 3F - f1;   mixed 6F - 2 f1;   crafting 2F per attack step, in the trainer or elsewhere

    F: one forward; f1: the share of the first convolution, whose input gradient training has no use for.
    """
    twin, first = copy.deepcopy(model), [0]
    conv = next(m for m in twin.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        forward = flops(lambda: twin(inputs))
        conv.register_forward_hook(lambda m, x, _: first.append(flops(lambda: functional.conv2d(
            x[0], m.weight, None, m.stride, m.padding, m.dilation, m.groups))))
        twin(inputs)
    train, craft, kind = 3 * forward - first[-1], 2 * forward * steps, arm.split()[0]
    if kind in ("vanilla", "mixed"):
        return (1 if kind == "vanilla" else 2) * train, 0
    return (2 * train, craft) if kind in ("process", "ranks") else (2 * train + craft, 0)


def bytes_per_step(placement: str, weights: int, batch: int, elements: int, width: int, modules: int) -> tuple[int, int]:
    """(to the adversary, back) of a trainer that sends its adversary the weights, by the docstrings of BesideProcess and
    RemoteRank. `weights`: their bytes; `elements` of a sample, `width` bytes each; between ranks a byte for the mode of each of
    the `modules`; int8 signs come back."""
    if placement == "process":
        return weights + batch * (elements * width + 8), batch * elements
    out = 64 + lines(modules) + weights + lines(batch * elements * width) + lines(batch * 8)
    return out, 64 + lines(batch * elements)


def lines(size: int) -> int:
    """Bytes of a tensor in a message between ranks."""
    return -(-size // 64) * 64


def fleet(trainers: int = 1024, adversaries: int = 342, weights: int = 2 * 25_600_000, batch: int = 96,
          elements: int = 224 * 224 * 3, modules: int = 151) -> dict[str, int]:
    """Bytes per step of ResNet-50 in bf16 on many trainers, by the formula: in total, and over single ends."""
    out, back = bytes_per_step("ranks", weights, batch, elements, width=2, modules=modules)
    serves = -(-trainers // adversaries)
    return {"total": trainers * (out - weights + back) + adversaries * weights, "weights": adversaries * weights,
            "out of a trainer that sends weights": out, "out of another trainer": out - weights, "into a trainer": back,
            f"into an adversary of {serves} trainers": serves * (out - weights) + weights,
            f"out of an adversary of {serves} trainers": serves * back}
