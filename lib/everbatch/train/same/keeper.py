"""The layers with experts of one network, and what is worked out for them between steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from everbatch.distributed import World
from everbatch.engines.host import Host
from everbatch.optim.subspace.transforms import Projection
from everbatch.train.same.freezing import resting
from everbatch.train.same.moments import LayerSums, TaskSums, draw_of
from everbatch.train.same.options import SAMEOptions
from everbatch.train.same.rules import maps_of, mean_square, router_map, split_of
from everbatch.train.same.setting import with_experts
from everbatch.train.same.watch import Watch

__all__ = ["Keeper"]

SUMS = ("second", "numbers", "load", "importance")


class Keeper:
    """Puts the experts in, and hooks on them.

    Args:
        model: changed in place. config, seed: the trainer's.
    """

    def __init__(self, model: nn.Module, config: SAMEOptions, seed: int) -> None:
        self.config = config
        self.layers = with_experts(model, config, seed)
        self.names = list(self.layers)
        self.watch = Watch(self.layers)
        self.draws = {name: draw_of(layer.in_features, config.wide_rank, name, seed) for name, layer in self.layers.items()}
        self._applied: Tensor | None = None
        self._told: set[tuple[str, bool]] = set()
        """Layers without a map, as was logged, and whether a task had ended."""

    def begin(self, sums: TaskSums, device: torch.device) -> None:
        """Sums of a task, all zero."""
        for name, layer in self.layers.items():
            sums.begin(name, layer.in_features, self.config.experts, probes=self.config.probes, draw=self.draws[name],
                       dtype=getattr(torch, self.config.statistics), device=device)

    def due(self, name: str, step: int) -> bool:
        """Whether a layer's tokens are summed up in this step of a task."""
        every = self.config.every or (1 if self.draws[name] is None else 10)
        return step % every == 0

    # ------------------------------------------------------------------------------------------------------- what is set
    def maps(self, history: Mapping[str, Tensor], present: Mapping[str, LayerSums] | None, device: torch.device,
             before: str) -> dict[str, Projection]:
        """The maps of every layer: of ended tasks, and for the printed rule of the present one as well. A layer that no token of
        an ended task has reached has none, which is the identity, and logged once."""
        config, found, free = self.config, dict[str, Projection](), list[str]()
        for name in self.names:
            who = f"SAME: layer {name!r}, {before}"
            past = _of(history, name, device)
            if past is not None and past["numbers"][0] > 0:
                split = split_of(past, self.draws[name], config, router=config.router, who=who)
                found |= maps_of(name, config.experts, split, config, config.mu_rel * mean_square(past))
            else:
                free.append(name)
            if present is not None:
                both = present[name] if past is None else {key: value + past[key] for key, value in present[name].items()}
                split = split_of(both, self.draws[name], config, router="paper", who=who)
                if split.rank:
                    found[f"{name}.router"] = Projection(right=router_map(split, config, 0.0, "paper"))
        self._tell(free, bool(history), before)
        return found

    def _tell(self, free: list[str], ended: bool, before: str) -> None:
        """Log, once for each, in which layers nothing is protected: all before the first task ends, later those left out."""
        new = [name for name in free if (name, ended) not in self._told]
        self._told |= {(name, ended) for name in new}
        if not new or World.current().rank:
            return
        log = logging.getLogger("everbatch")
        if ended:
            log.warning("SAME: %s, no training token of an ended task has reached layers %s: their maps are the identity, which "
                        "protects nothing; look at the mask, or leave these layers out", before, new)
        else:
            log.info("SAME: %s, no task has ended: the maps of %d layers are the identity", before, len(new))

    def decided(self, sums: TaskSums, history: Mapping[str, Tensor], world: World, device: torch.device) -> Tensor | None:
        """(layers, experts), who rests, on the CPU and the same on every rank; None while too few tokens were seen. Two
        all-reduces at most, and two host syncs."""
        config = self.config
        first = sums.layers[self.names[0]]
        tokens = float(world.sum(first["numbers"][3].clone()))
        if tokens < config.warmup_tokens:
            return None
        now = world.sum(torch.stack([torch.cat([s["numbers"][3:], s["load"]]) for s in sums.layers.values()]))
        use = now[:, 1:] / now[:, :1].clamp_min(1.0)
        weights = []
        for name in self.names:
            past = _of(history, name, device)
            assert past is not None
            weights.append(past["importance"] / past["numbers"][3].clamp_min(1.0))
        found = resting(use, torch.stack(weights), config.tau, config.least_active)
        # What ranks computed alike may differ in the last bit between devices: all take rank 0's.
        mine = found.double() if world.rank == 0 else torch.zeros_like(use)
        return (world.sum(mine) > 0).cpu()

    def rest(self, rows: Tensor, *, masked: bool) -> list[str]:
        """Tell the layers who rests, (layers, experts); the names of their parameters."""
        if self._applied is not rows:
            named = self.resting(rows)
            for name, layer in self.layers.items():
                layer.frozen = tuple(named.get(name, ()))
            self._applied = rows
        for layer in self.layers.values():
            layer.masked = masked and bool(layer.frozen)
        return [f"{name}.{kind}_{i}" for name, layer in self.layers.items() for i in layer.frozen for kind in ("down", "up")]

    def resting(self, rows: Tensor) -> dict[str, list[int]]:
        """Experts that rest, by layer."""
        pairs = zip(self.names, rows, strict=False)
        return {name: torch.nonzero(row).flatten().tolist() for name, row in pairs if bool(row.any())}

    def routers(self, host: Host) -> dict[str, Tensor]:
        """Whole routers, on every rank. Collective where weights are sharded."""
        names = [f"{name}.router" for name in self.names]
        mine = [(shard, shard.data) for shard in host.shards if shard.name in names]
        whole = host.gather(mine, names)
        return {name: whole[f"{name}.router"] for name in self.names}


def _of(history: Mapping[str, Tensor], name: str, device: torch.device) -> Any:
    """A layer's sums; None where no task has ended."""
    if f"{name}/second" not in history:
        return None
    return {key: history[f"{name}/{key}"].to(device) for key in SUMS}
