"""What every placement of an adversary offers, and how the weights of any engine are read whole."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from everbatch.rows import Rows, one_tensor

__all__ = ["AdversaryLost", "Crafted", "Job", "Nobody", "Placement", "modes_of", "set_modes", "slots_of", "whole_weights"]


class AdversaryLost(RuntimeError):
    """An adversary that died, or gave no answer in time."""


@dataclass(frozen=True)
class Job:
    """One batch to craft for."""

    step: int
    """At which it will be trained on."""
    inputs: Rows
    targets: Tensor

    @property
    def tensor(self) -> Tensor:
        """Inputs that are one tensor, as crafting elsewhere wants them."""
        return one_tensor("ConAdv", self.inputs)


@dataclass(frozen=True)
class Crafted:
    """What came of a job."""

    payload: Tensor
    """For `Attack.finish`, on the trainer's device."""
    version: int
    """The step before whose update the weights were read."""


class Placement(abc.ABC):
    """Crafts batches ahead."""

    sent: int = 0
    """Bytes that have left this rank for its adversary, and come back, so far."""

    @abc.abstractmethod
    def submit(self, version: int, jobs: list[Job], weights: dict[str, Tensor]) -> None:
        """Order crafting with `weights` (from `whole_weights`; empty where crafting uses the live module). May raise
        `AdversaryLost`."""

    @abc.abstractmethod
    def collect(self, step: int) -> Crafted:
        """The batch for `step`, which was ordered. Raises `AdversaryLost`."""

    def close(self) -> None:  # noqa: B027
        """End whatever was started."""


class Nobody(Placement):
    """After an adversary was lost, with on_failure="clean"."""

    def submit(self, version: int, jobs: list[Job], weights: dict[str, Tensor]) -> None:
        pass

    def collect(self, step: int) -> Crafted:
        raise AdversaryLost("nobody crafts any more")


def modes_of(modules: Iterable[nn.Module]) -> bytes:
    """The mode of each module, 1 for training: a user may keep some in evaluation mode, and their copies shall be too."""
    return bytes(module.training for module in modules)


def set_modes(modules: Sequence[nn.Module], modes: bytes) -> None:
    """Put each module into its mode."""
    for module, training in zip(modules, modes, strict=True):
        module.training = bool(training)


Slot = tuple[str, dict[str, Any], str]
"""A parameter or buffer: its name in the model, and where its module keeps it under which name."""


def slots_of(model: nn.Module) -> list[Slot]:
    """All parameters and buffers there are, in the order of `named_parameters` and `named_buffers`, each once.

    Made once, for `whole_weights`: a walk over the modules in each step takes longer than copying a small model.
    """
    modules, seen = list(model.named_modules()), set[int]()
    found: list[Slot] = []
    for kind in ("_parameters", "_buffers"):
        for path, module in modules:
            for name, value in getattr(module, kind).items():
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    found.append((f"{path}.{name}" if path else name, getattr(module, kind), name))
    return found


@contextmanager
def whole_weights(slots: list[Slot]) -> Iterator[dict[str, Tensor]]:
    """Parameters and buffers by name, whole and in the precision the model computes with, on every rank; gradients are off.

    The tensors themselves where each rank holds them whole. Cost: nothing there; FSDP2 one all-gather per parameter, ZeRO stage
    3 one gather of all, with the whole model in memory inside the block. Collective there.
    """
    held: dict[str, Any] = {name: values[key] for name, values, key in slots}
    kinds = {type(value) for value in held.values()}  # asking each value takes longer than copying a small model
    with torch.no_grad():
        if hasattr(next(iter(held.values())), "ds_id"):  # all parameters, which come first, or none
            import deepspeed

            # Persistent parameters are there already, and gathering them twice is an error of the engine's.
            absent = [p for p in held.values() if hasattr(p, "ds_id") and p.ds_status.name != "AVAILABLE"]
            with deepspeed.zero.GatheredParameters(absent):
                yield held
        elif any(issubclass(kind, DTensor) for kind in kinds):
            yield {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in held.items()}
        else:
            yield held
