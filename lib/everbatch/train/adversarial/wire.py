"""What goes over the wire between a trainer and an adversary on another rank."""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from everbatch import problems
from everbatch.train.adversarial.attack import Attack

__all__ = ["BACK", "FOREVER", "TO_ADVERSARY", "answer_layout", "dead_key", "end_key", "heard_attack", "layout", "link",
           "linked_key", "order_layout", "ready_key", "room", "told_attack", "views"]

TO_ADVERSARY, BACK = 1, 2
"""Message tags; messages of one tag arrive in order."""
FOREVER = datetime.timedelta(days=30)
"""An adversary waits as long as its trainer lives: an evaluation may take hours. A closed connection ends the wait at once."""
LINE = 64


def end_key(trainer: int) -> str:
    """Set in the store when a trainer needs its adversary no more."""
    return f"conadv/end/{trainer}"


def ready_key(rank: int) -> str:
    """Set in the store when the adversary on this rank has its model."""
    return f"conadv/ready/{rank}"


def linked_key(rank: int) -> str:
    """Set in the store when the adversary on this rank is connected to its trainers."""
    return f"conadv/linked/{rank}"


def dead_key(rank: int) -> str:
    """Set in the store when the adversary on this rank has died."""
    return f"conadv/dead/{rank}"


def link(store: Any, trainer: int, end: int, timeout: datetime.timedelta) -> Any:
    """A two-process group of one trainer (0) and its adversary (1), outside every other group: one that breaks breaks alone."""
    group = dist.ProcessGroupGloo(PrefixStore(f"conadv/link/{trainer}", store), end, 2, timeout)
    # Never freed: when the other end closes its connection just then, gloo (torch 2.15) drops its device on the device's own
    # thread, and the process aborts ("terminate called without an active exception").
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    return group


def order_layout(hello: dict[str, Any]) -> list[list[Any]]:
    """What goes to an adversary: (step, version, 1; 0 to end), the modules' modes, the weights from its first trainer, inputs
    and targets."""
    weights = [[f"weights/{name}", shape, kind] for name, shape, kind in hello["weights"]] if hello["carries"] else []
    modes = ["modes", [hello["modes"]], "uint8"]
    inputs, targets = ["inputs", hello["inputs"], hello["dtype"]], ["targets", hello["targets"], hello["targets_dtype"]]
    return [["head", [3], "int64"], modes, *weights, inputs, targets]


def answer_layout(hello: dict[str, Any]) -> list[list[Any]]:
    """What comes back: (step, version), and what was crafted."""
    return [["head", [2], "int64"], ["payload", hello["result"], hello["result_dtype"]]]


def layout(weights: dict[str, Tensor]) -> list[list[Any]]:
    """Name, shape and dtype of each tensor, in plain values."""
    return [[n, list(w.shape), str(w.dtype).removeprefix("torch.")] for n, w in weights.items()]


def views(flat: Tensor, told: list[list[Any]]) -> dict[str, Tensor]:
    """The tensors of a layout in one piece of memory. Each begins on a cache line, as torch's own do: kernels may choose their
    path, and with it the last bit, by that."""
    found, at = {}, 0
    for name, shape, kind in told:
        dtype = getattr(torch, kind)
        size = math.prod(shape) * dtype.itemsize
        found[name] = flat[at : at + size].view(dtype).view(shape)
        at += -(-size // LINE) * LINE
    return found


def told_attack(attack: Attack) -> dict[str, Any]:
    """An attack in plain values, for the other end; its problem by name."""
    problem = attack.problem
    fields = {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}
    fields["problem"] = None if problem is None else [type(problem).__name__, dataclasses.asdict(problem)]
    return fields


def heard_attack(told: dict[str, Any]) -> Attack:
    """The attack of `told_attack`, as JSON brought it."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    if fields["problem"] is not None:
        kind, options = fields["problem"]
        fields["problem"] = getattr(problems, kind)(**options)
    return Attack(**fields)


def room(told: list[list[Any]]) -> int:
    """Bytes that `views` of a layout need."""
    return sum(-(-math.prod(shape) * getattr(torch, kind).itemsize // LINE) * LINE for _, shape, kind in told)
