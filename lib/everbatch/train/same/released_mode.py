"""The released code's bookkeeping beside a trainer, for comparison; see `everbatch.train.same.released` for its formulas."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from everbatch import seeds
from everbatch.distributed import World
from everbatch.optim.subspace.transforms import Projection
from everbatch.train.same.released import (
    SKETCH_EVERY,
    START_STEP,
    WIDTH,
    Activation,
    curvature_released,
    router_released,
    sketch,
)

__all__ = ["ReleasedMode"]


class ReleasedMode:
    """Sketches of single batches, moving averages that switch experts off, and the two maps of gradients.

    Differs from that code, whose ranks map gradients by factors of their own: all take rank 0's; averages are over all ranks'
    tokens; a sketch acts from the next step on.

    Args:
        experts, tau: of a layer. seed: of the sketches.
    """

    def __init__(self, experts: int, tau: float, seed: int) -> None:
        self.experts, self.tau, self.seed = experts, tau, seed
        self.rows: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def seen(self, name: str, x: Tensor, weights: Tensor) -> None:
        """Keep one forward's tokens, (..., d), and how each was weighed, (..., E)."""
        self.rows[name] = x.detach().reshape(-1, x.shape[-1]).float()
        self.weights[name] = weights.reshape(-1, self.experts).float()

    def begin(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A task's state out of the last one's: its factors become those of before, averages begin anew."""
        found = {}
        for key in [key for key in kept if key.endswith(("/U", "/S"))]:
            found[f"{key}_before"] = kept[key]
        return found

    def after_step(self, kept: dict[str, Tensor], world: World, *, step: int, task: int) -> tuple[dict[str, Tensor], bool]:
        """After step `step` of a task, from 1: the state, and whether maps are to be set anew. Collective."""
        found, changed = dict(kept), step == START_STEP
        for name, rows in self.rows.items():
            weights = self.weights[name]
            pair = torch.stack([weights.mean(0), (weights * rows.square().sum(1, keepdim=True)).mean(0)])
            mean, weighted = world.sum(pair) / world.size
            held = Activation.fresh(self.experts, rows, self.tau)
            if f"{name}/active" in found:
                held.utilisation, held.importance, held.active = (
                    found[f"{name}/{key}"].to(rows) for key in ("utilisation", "importance", "active"))
                held.latched = bool(held.active.sum() == 1)
            held.update(mean, weighted, task)
            found |= {f"{name}/utilisation": held.utilisation, f"{name}/importance": held.importance,
                      f"{name}/active": held.active}
            if (step - 1) % SKETCH_EVERY == 0:
                width = rows.shape[1]
                columns = min(width, WIDTH)
                draw = seeds.normal((self.seed, "released", name, task, step), 0, width * columns).view(width, columns)
                basis, deviations = sketch(rows, draw.to(rows))
                both = torch.cat([basis, deviations[None]])
                both = world.sum(both if world.rank == 0 else torch.zeros_like(both))
                found |= {f"{name}/U": both[:-1].contiguous(), f"{name}/S": both[-1].contiguous()}
                changed = changed or step > START_STEP
        self.rows, self.weights = {}, {}
        return found, changed

    def maps(self, kept: Mapping[str, Tensor], step: int) -> dict[str, Projection]:
        """What acts in the step after `step` steps of a task: the experts' map from its start, the router's from the tenth on."""
        found: dict[str, Projection] = {}
        for key in [key for key in kept if key.endswith("/U_before")]:
            name = key.removesuffix("/U_before")
            shared = Projection(right=curvature_released(kept[key], kept[f"{name}/S_before"]))
            found |= {f"{name}.down_{i}": shared for i in range(self.experts)}
        for key in [key for key in kept if key.endswith("/U")] if step >= START_STEP - 1 else []:
            name = key.removesuffix("/U")
            found[f"{name}.router"] = Projection(right=router_released(kept[key], kept[f"{name}/S"]))
        return found

    def resting(self, kept: Mapping[str, Tensor], names: list[str]) -> Tensor:
        """(layers, experts): which are off, on the CPU."""
        return torch.stack([kept[f"{name}/active"] == 0 for name in names]).cpu()
