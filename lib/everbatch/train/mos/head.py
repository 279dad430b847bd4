"""The classifier of a network, whole or by class, whatever the engine shards and however often it has grown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from everbatch.engines.host import Host
from everbatch.engines.shards import Shard
from everbatch.nn.heads import PartsHead, head_of
from everbatch.train.memory.herding import Held
from everbatch.train.mos.merging import Places

__all__ = ["Head"]


@dataclass(frozen=True)
class Head:
    """One linear layer, or one for each growth, class after class."""

    layer: nn.Module
    first: dict[str, int]
    """First class of each layer, by its name."""
    shapes: dict[str, tuple[int, ...]]
    """Whole shapes of weights, layer by layer, then of biases, by parameter name: a flat vector's order."""

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """Raises ValueError for a network whose classifier is no linear layer."""
        path = head_of(model)
        layer: Any = model.get_submodule(path)
        inner: list[tuple[str, Any]] = [(path, layer)]
        if isinstance(layer, PartsHead):
            inner = [(f"{path}.parts.{k}", part) for k, part in enumerate(layer.parts)]
        first, at = {}, 0
        for name, part in inner:
            first[name] = at
            at += part.out_features
        weights = {f"{name}.weight": (part.out_features, part.in_features) for name, part in inner}
        biases = {f"{name}.bias": (part.out_features,) for name, part in inner if part.bias is not None}
        return cls(layer, first, {**weights, **biases})

    @property
    def classes(self) -> int:
        """Of all parts."""
        return sum(shape[0] for name, shape in self.shapes.items() if name.endswith(".weight"))

    def mine(self, shards: list[Shard]) -> list[Tensor]:
        """Views of this rank's masters of the head: flat ones."""
        return [shard.data.view(-1) for shard in shards if shard.name in self.shapes]

    @torch.no_grad()
    def put_back(self, shards: list[Shard], kept: list[Tensor], below: int, rate: float) -> None:
        """Take this rank's masters back to copies of `mine`: all of what is of classes under `below`, and of the rest the part
        1 - rate of the way, as if its learning rate were `rate` times what it is."""
        here = [shard for shard in shards if shard.name in self.shapes]
        for shard, view, before in zip(here, self.mine(shards), kept, strict=True):
            if rate != 1.0:
                view.copy_(torch.lerp(before, view, rate))
            rows, *columns = self.shapes[shard.name]
            old = min(max(below - self.first[shard.name.rpartition(".")[0]], 0), rows) * (columns[0] if columns else 1)
            count = min(max(old - shard.start, 0), len(view))
            view[:count].copy_(before[:count])

    def whole(self, host: Host) -> tuple[Tensor, Tensor | None]:
        """Weight (classes, d) and bias, copies, on every rank. Collective where weights are sharded."""
        pieces = [(shard, shard.data) for shard in host.shards if shard.name in self.shapes]
        values = host.gather(pieces, list(self.shapes))
        weights = torch.cat([values[name] for name in self.shapes if name.endswith(".weight")])
        biases = [values[name] for name in self.shapes if name.endswith(".bias")]
        return weights.clone(), torch.cat(biases).clone() if biases else None

    def write(self, host: Host, weight: Tensor, bias: Tensor | None) -> None:
        """Put a whole head into this rank's masters; the host is to be touched."""
        places = Places(self.shapes)
        mine = places.mine(host.shards)
        vector = torch.cat([weight.flatten(), *([] if bias is None else [bias])])
        for shard, value in zip(mine, places.slices(mine, vector), strict=True):
            shard.data.copy_(value)

    @contextmanager
    def features(self) -> Iterator[Held]:
        """Inside the block: what the head was given last, (n, d)."""
        held = Held()

        def hold(_layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            held.value = inputs[0]

        hook = self.layer.register_forward_pre_hook(hold)
        try:
            yield held
        finally:
            hook.remove()
