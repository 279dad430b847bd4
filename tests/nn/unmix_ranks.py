"""Jobs of the launch of UnMix-TNS layers on ranks. See worker.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from everbatch.distributed import World
from everbatch.evaluate.evaluator import evaluating, mean_buffers
from everbatch.nn import convert_unmix_tns


def layer(**options: Any) -> Any:
    """The same one on every rank."""
    made: Any = nn.BatchNorm2d(4).double()
    convert_unmix_tns(made, 8, **options)
    return made


def rows(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1


def off(whole: Any, mine: Any, outputs: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference of outputs and components."""
    pairs = [(outputs, wanted), (mine.component_means, whole.component_means), (mine.component_vars, whole.component_vars)]
    return max((a - b).abs().max().item() for a, b in pairs if a.numel())


def synchronised(cut: int, **options: Any) -> float:
    """Two steps on shares of a batch, against the whole batch in one process."""
    world, worst = World.current(), 0.0
    whole, mine = layer(**options), layer(synchronised=True, **options)
    part = slice(0, cut) if world.rank == 0 else slice(cut, None)
    for _ in range(2):
        want, y = whole(rows()), mine(rows()[part])
        worst = max(worst, off(whole, mine, y, want[part]))
    return max(float(other) for other in world.gather(worst))  # type: ignore[arg-type]


def own() -> bool:
    """Components of a rank's own stream differ by rank, in evaluation and export too."""
    world, mine = World.current(), layer()
    mine(rows() * (1 + world.rank))
    before = copy.deepcopy(mine.component_means)
    with evaluating(mine, world):
        kept = torch.equal(before, mine.component_means)
    with mean_buffers(mine, world):  # what an export writes
        kept = kept and torch.equal(before, mine.component_means)
    seen: list[Any] = world.gather(before)
    return kept and not torch.equal(seen[0], seen[1])


def jobs(record: Any) -> Iterator[Any]:
    yield record.noted("synchronised", synchronised, 3)
    yield record.noted("by batch", lambda: synchronised(2, dynamic_momentum=True))
    yield record.noted("nothing on a rank", synchronised, 6)
    yield record.noted("own", own)
