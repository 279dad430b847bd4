"""What a run changes in its process, and how it is put back."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from everbatch.distributed import leave

__all__ = ["as_found"]


@contextmanager
def as_found() -> Iterator[None]:
    """Leave the process as it was before the block: generators of random numbers, the environment, modes of torch, filters of
    warnings; a process group that was made inside is left."""
    grouped = dist.is_available() and dist.is_initialized()
    environment = dict(os.environ)
    python, array = random.getstate(), np.random.get_state()  # noqa: NPY002  # what a user's own code may draw from
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)  # noqa: NPY002
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        if not grouped:
            leave()
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
