"""Jobs of the test of SAM(scope="group") where ranks reach different parameters; see worker.py.

OUT.json: {"case/host": for each rank the displacement of each parameter in pass 2, the group's mean gradient of each, how many
all-reduces this rank issued in the group}.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import hosts
import torch
import torch.distributed as dist
from record import Job, Record
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from everbatch import compose
from everbatch.distributed import World
from everbatch.optim import SAM

REACHED = {"all": ("ab", "ab"), "split": ("a", "b"), "none": ("", "ab")}
"""Parameters in the loss of ranks 0 and 1, by case."""
SLOPES = {"a": torch.tensor([1.0, -2.0, 3.0]), "b": torch.tensor([1.0, 0.5, -4.0, 2.0, 7.0])}


class Parts(nn.Module):
    """A linear loss, so that gradients do not depend on the weights, which start at 0: displaced weights are the displacement.
    Nothing reaches `idle`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.idle = (nn.Parameter(torch.zeros(n)) for n in (3, 5, 2))
        self.seen: list[list[Tensor]] = []

    def forward(self, reached: str, x: Tensor) -> Tensor:
        self.seen.append([p.detach().clone() for p in (self.a, self.b, self.idle)])
        return sum(((SLOPES[n] * getattr(self, n)).sum() for n in reached), x.sum())


def measure(host: str, case: str, rank: int) -> tuple[list[Tensor], list[Tensor], int]:
    """One step: see the module's docstring."""
    cls: Any = compose(SAM, base=torch.optim.SGD)
    options = {"rho": 1.0, "scope": "group", "group_size": 2}
    if host == "ddp":
        model: Any = Parts()
        forward: Any = DistributedDataParallel(model, find_unused_parameters=True)
        opt: Any = cls(forward, lr=0.1, **options)
    else:
        run = hosts.start(hosts.BY_NAME[host], cls, options, model=Parts(), base=functools.partial(torch.optim.SGD, lr=0.1))
        model, forward, opt = run.model, run.forward, run.opt
    reached, scale = REACHED[case], (1.0, 10.0)

    def closure() -> Tensor:
        # The second pass is the engine's own, and DeepSpeed wants the same parameters on every rank there.
        mine = "ab" if model.seen else reached[rank]
        loss: Tensor = forward(mine, torch.zeros(1, requires_grad=True)) * scale[rank]
        opt.backward(loss)
        return loss.detach()

    issued, all_reduce = [], dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        issued.extend([1] if kwargs.get("group") is opt._sam_group else [])
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    try:
        opt.step(closure)
    finally:
        dist.all_reduce = all_reduce
    mean = [SLOPES[n] * sum(s for s, r in zip(scale, reached, strict=True) if n in r) / 2 for n in "ab"]
    return model.seen[1], [*mean, torch.zeros(2)], len(issued)


def gathered(host: str, case: str) -> list[Any]:
    """`measure` of every rank, as plain numbers."""
    world = World.current()
    moves, mean, count = measure(host, case, world.rank)
    return world.gather(([move.tolist() for move in moves], [g.tolist() for g in mean], count))


def jobs(record: Record) -> Iterator[Job]:
    for host in ("ddp", "zero0", "zero1"):
        for case in REACHED:
            yield record.noted(f"{case}/{host}", gathered, host, case)
