"""What a task's tokens sum up to, layer by layer: kept on each rank while the task runs, reduced once at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everbatch import seeds
from everbatch.distributed import World
from everbatch.errors import check
from everbatch.optim.subspace.splits import NonFiniteStatistics, clipped

__all__ = ["EXACT_WIDTH", "LayerSums", "TaskSums", "draw_of", "reduced"]

EXACT_WIDTH = 1024
"""Widest layer whose second moment is kept whole; wider ones keep a sketch."""
OVERSAMPLED = 2
"""Columns of a sketch per rank that is wanted of it."""
FIELDS = ("second", "numbers", "load", "importance", "inputs")

LayerSums = dict[str, Tensor]
"""Of one layer, by FIELDS.

    second      (d, d)  sum x x^T,  or (d, k)  sum x x^T Q  for a fixed Gaussian Q: both are linear in the data, so that batches
                and ranks add up exactly
    numbers     (4,) float64: tokens, sum ||x||^2, tokens that were not finite, tokens that were weighed
    load        (E,) float64: sum w(x)
    importance  (E,) float64: sum w(x) ||x||^2
    inputs      (P, d + 1): some tokens of the last step, each with 1 behind it, or 0 where it is padding
"""


def draw_of(width: int, rank: int, name: str, seed: int) -> Tensor | None:
    """Q of a layer that is too wide to be kept whole, (d, k), the same on every rank; None for others."""
    if width <= EXACT_WIDTH:
        return None
    columns = min(width, OVERSAMPLED * clipped("SAME", "wide_rank", rank, width))
    return seeds.normal((seed, "same", name), 0, width * columns).view(width, columns)


class TaskSums:
    """This rank's sums of the present task, by layer. A trainer's checkpoint holds those of every rank.

    Args:
        world: the ranks.

    Memory of a checkpoint that is read: all ranks' sums on each, one after the other.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.layers: dict[str, LayerSums] = {}
        self.draws: dict[str, Tensor | None] = {}
        self.read = False
        """Whether they came from a checkpoint, and are on the CPU yet."""

    def begin(self, name: str, width: int, experts: int, *, probes: int, draw: Tensor | None, dtype: torch.dtype,
              device: torch.device) -> None:
        """Sums of a layer, all zero."""
        columns = width if draw is None else draw.shape[1]
        self.draws[name] = None if draw is None else draw.to(device, dtype)
        sizes: dict[str, tuple[int, ...]] = {
            "second": (width, columns), "numbers": (4,), "load": (experts,), "importance": (experts,),
            "inputs": (probes, width + 1)}
        kinds = {"second": dtype, "inputs": torch.float32}
        self.layers[name] = {key: torch.zeros(size, dtype=kinds.get(key, torch.float64), device=device)
                             for key, size in sizes.items()}

    @torch.no_grad()
    def add(self, name: str, x: Tensor, mask: Tensor | None) -> None:
        """Add the tokens x (..., d) that a layer is given; those whose mask (...) is 0 are padding. No host sync."""
        sums = self.layers[name]
        rows, there, good = cleaned(x, mask, sums["second"].dtype)
        draw = self.draws[name]
        with torch.autocast(rows.device.type, enabled=False):
            sums["second"] += rows.T @ (rows if draw is None else rows @ draw)
        squares = rows.square().sum(dtype=torch.float64)
        sums["numbers"][:3] += torch.stack([(there & good).sum().double(), squares, (there & ~good).sum().double()])
        kept = sums["inputs"]
        at = torch.linspace(0, len(rows) - 1, len(kept), device=rows.device).long()  # spread over the samples
        kept.copy_(torch.cat([rows[at], (there & good)[at, None].to(rows)], dim=1))

    @torch.no_grad()
    def weigh(self, name: str, x: Tensor, weights: Tensor, mask: Tensor | None) -> None:
        """Add how experts were weighed, (..., E). No host sync."""
        sums = self.layers[name]
        rows, there, good = cleaned(x, mask, sums["second"].dtype)
        shares = torch.where((there & good)[:, None], weights.reshape(-1, weights.shape[-1]).double(), 0.0)
        sums["load"] += shares.sum(0)
        sums["importance"] += (shares * rows.square().sum(1, dtype=torch.float64)[:, None]).sum(0)
        sums["numbers"][3] += (there & good).sum()

    # ---------------------------------------------------------------------------------------------- kept by the trainer
    def state_dict(self) -> dict[str, Any]:
        """This rank's row of each tensor."""
        rows = {f"{name}/{key}": sums[key].cpu()[None] for name, sums in self.layers.items() for key in FIELDS}
        slots = np.arange(self.world.size if rows else 0)
        return {"index": {"slots": slots}, "start": self.world.rank, "rows": rows}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over this rank's row; of another number of ranks rank 0 takes the sum of all, and the others nothing. Layers that
        were begun have to be those."""
        rank, others = self.world.rank, len(saved["index"]["slots"])
        self.layers, self.read = {}, True
        for key, rows in saved["rows"].items():
            name, _, field = key.rpartition("/")
            if others == self.world.size:
                mine = rows[rank]
            elif field == "inputs":
                mine = rows[rank % others]
            else:
                mine = rows.sum(0) if rank == 0 else torch.zeros_like(rows[0])
            self.layers.setdefault(name, {})[field] = mine.clone()

    def to(self, device: torch.device, draws: Mapping[str, Tensor | None]) -> None:
        """Go on there, after a checkpoint was read."""
        self.read = False
        for sums in self.layers.values():
            sums |= {field: value.to(device) for field, value in sums.items()}
        kinds = {name: sums["second"].dtype for name, sums in self.layers.items()}
        self.draws = {n: None if q is None else q.to(device, kinds[n]) for n, q in draws.items() if n in kinds}


def cleaned(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (n, d) of x, 0 where padding or not finite; which rows are no padding; which are finite."""
    rows = x.detach().reshape(-1, x.shape[-1]).to(dtype)
    good = torch.isfinite(rows).all(1)
    if mask is None:
        there = torch.ones_like(good)
    else:
        check(mask.shape == x.shape[:-1], "SAME", f"a mask of shape {tuple(mask.shape)} for inputs {tuple(x.shape)}",
              f"be {tuple(x.shape[:-1])}")
        there = mask.reshape(-1).bool()
    return torch.where((there & good)[:, None], rows, 0.0), there, good


@torch.no_grad()
def reduced(sums: LayerSums, world: World, *, name: str, task: int) -> LayerSums:
    """Sums over the ranks, as new tensors, without `inputs`. Collective: two all-reduces, one host sync.

    Raises:
        NonFiniteStatistics: on every rank, more than 1 % of a layer's tokens were not finite.
    """
    second = world.sum(sums["second"].clone())
    small = world.sum(torch.cat([sums[key] for key in ("numbers", "load", "importance")]))
    experts = len(sums["load"])
    numbers, load, importance = torch.split(small, [4, experts, experts])
    seen, _, bad, _ = numbers.tolist()
    if bad > 0.01 * (seen + bad):
        raise NonFiniteStatistics(f"SAME: layer {name!r}, task {task}: {bad:.0f} of {seen + bad:.0f} inputs are not finite, must "
                                  "be at most 1 %; look at the layer before it")
    return {"second": second, "numbers": numbers.clone(), "load": load.clone(), "importance": importance.clone()}
