"""The adapters of a network as one vector, and adapters read from plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from everbatch.errors import check
from everbatch.nn.adapters import Given, adapters_of

__all__ = ["AdapterLayout", "flat_adapters", "load_adapters", "reading_adapters"]


@dataclass(frozen=True)
class AdapterLayout:
    """Where each parameter of a model's adapters is in one flat vector (P,): by block, and there as in `BottleneckAdapter`."""

    shapes: dict[str, tuple[int, ...]]
    """Whole shapes by parameter name, in order."""

    @classmethod
    def of(cls, model: nn.Module) -> AdapterLayout:
        """Raises ValueError for a model without adapters. Wrappers' prefixes are not part of the names: give the bare module."""
        adapters = adapters_of(model)
        check(bool(adapters), "adapters", f"a {type(model).__name__} without adapters", "have some", "call attach_adapters first")
        return cls({f"{name}.{part}": shape for name, adapter in adapters.items() for part, shape in adapter.shapes.items()})

    @property
    def names(self) -> list[str]:
        """Of the parameters, in order."""
        return list(self.shapes)

    @property
    def size(self) -> int:
        """P."""
        return sum(map(math.prod, self.shapes.values()))

    def flat(self, values: Mapping[str, Tensor]) -> Tensor:
        """(P,) of whole parameters by name, a copy; others in `values` are not read."""
        return torch.cat([values[name].detach().reshape(-1) for name in self.shapes])

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Views into a vector (P,), by parameter name.

        Raises:
            ValueError: a vector of another length.
        """
        check(tuple(vector.shape) == (self.size,), "adapters", f"a vector of shape {tuple(vector.shape)}",
              f"be ({self.size},), as the adapters are")
        pieces = torch.split(vector, [math.prod(shape) for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}


def flat_adapters(model: nn.Module) -> Tensor:
    """The live adapters as one vector (P,), a copy. Of whole parameters: where they are sharded, gather them by
    `AdapterLayout.names` and call its `flat`."""
    layout = AdapterLayout.of(model)
    _check_whole_parameters(model, layout)
    return layout.flat(dict(model.named_parameters()))


@torch.no_grad()
def load_adapters(model: nn.Module, vector: Tensor) -> None:
    """Give the live adapters the values of a vector (P,). Of whole parameters, as `flat_adapters`."""
    layout = AdapterLayout.of(model)
    _check_whole_parameters(model, layout)
    live = dict(model.named_parameters())
    for name, value in layout.named(vector).items():
        live[name].copy_(value)


@contextmanager
def reading_adapters(model: nn.Module, values: Tensor, tasks: Tensor | None = None) -> Iterator[None]:
    """Inside the block adapters read plain tensors in place of their parameters, which are left alone, on any engine.

    Args:
        values: (P,), for all samples; or an archive (T, P), of which each sample reads a row.
        tasks: (n,) int64, the row of each sample of the forwards inside; with an archive alone.

    Raises:
        ValueError: shapes that do not fit.

    Cost: none in the first case; in the second n copies of one block's adapter at a time, and batched products.
    """
    adapters = adapters_of(model)
    layout = AdapterLayout.of(model)
    many = tasks is not None
    check(values.ndim == 1 + many and values.shape[-1] == layout.size, "adapters", f"values of shape {tuple(values.shape)}",
          f"be {'(T, ' if many else '('}{layout.size}{')' if many else ',)'}", "one archive has adapters of one kind")
    parts = torch.split(values, [adapter.size for adapter in adapters.values()], dim=-1)
    try:
        for adapter, part in zip(adapters.values(), parts, strict=True):
            adapter.given = Given(part, tasks)
        yield
    finally:
        for adapter in adapters.values():
            adapter.given = None


def _check_whole_parameters(model: nn.Module, layout: AdapterLayout) -> None:
    live = dict(model.named_parameters())
    odd = [name for name, shape in layout.shapes.items()
           if hasattr(live[name], "ds_id") or hasattr(live[name], "device_mesh") or tuple(live[name].shape) != shape]
    check(not odd, "adapters", f"{odd[:1]} sharded", "be whole", "gather them: optimizer.host.gather, then AdapterLayout.flat")
