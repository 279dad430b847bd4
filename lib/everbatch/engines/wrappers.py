"""Which DDP wrappers hold an optimizer's parameters, however the parameters were given."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["holds", "is_wrapped"]


def holds(wrapper: DistributedDataParallel, parameters: Iterable[Tensor]) -> bool:
    """Whether the wrapper reduces the gradient of any of these."""
    wanted = set(map(id, parameters))
    return any(id(p) in wanted for p in wrapper.parameters())


def is_wrapped(parameters: list[Tensor]) -> bool:
    """Whether a DDP module that is alive holds any of these parameters.

    Nothing leads from a parameter to its wrapper, so this looks among the interpreter's objects: some hundredths of a second,
    when an optimizer is built in a process group without the wrapper itself, and never in a step.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    alive = [item for item in gc.get_objects() if issubclass(type(item), DistributedDataParallel)]
    return any(holds(wrapper, parameters) for wrapper in alive)
