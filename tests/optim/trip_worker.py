"""The job of counting one step of SAM with DynamicSparsity on a real ZeRO-2 engine; see worker.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hosts
import torch
from record import Job, Record

from everbatch import compose
from everbatch.optim import SAM, DynamicSparsity
from trips import walk

WARM = 3
"""Steps in which engine and library set themselves up."""


def step() -> dict[str, Any]:
    """The walk of one step."""
    cls = compose(SAM, DynamicSparsity, base=torch.optim.SGD)
    run = hosts.start(hosts.BY_NAME["zero2"], cls, {"rho": 0.05, "density": 0.5, "update_every": 100})
    (x, y), *_ = hosts.batches(1)

    def closure() -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(run.forward(x), y)
        run.opt.backward(loss)
        return loss

    for _ in range(WARM):
        run.opt.step(closure)
    trip = walk(lambda: run.opt.step(closure))
    assert run.opt.last_applied and run.opt.last_passes == 2
    return {"hops": trip.hops, "text": trip.text(most=30), "shards": len(run.opt.host.shards)}


def jobs(record: Record) -> Iterator[Job]:
    yield record.noted("step", step)
