"""A vision transformer's features under adapters of an archive, without computing twice what no adapter changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from everbatch.errors import check
from everbatch.nn.adapter_values import AdapterLayout, reading_adapters
from everbatch.nn.adapters import AdaptedBlock, Shared

__all__ = ["AdapterTrunk", "Start"]


@dataclass(frozen=True)
class Start:
    """What of a batch no adapter changes: the first block's tokens before its adapter, (n, tokens, width) twice."""

    attended: Tensor
    without: Tensor

    def __getitem__(self, rows: Tensor) -> Start:
        return Start(self.attended[rows], self.without[rows])


class AdapterTrunk:
    """Features of images, each under an adapter of its own.

    The embedding of the patches and all of the first block but its adapter are computed once for a batch; further passes begin
    behind them. Every pass goes through the network's own call, so that engines gather sharded weights as in training; the
    adapters are read from the archive, a plain tensor.

    Args:
        model: a timm vision transformer with adapters, as an engine has it (FSDP2, ZeRO) or bare, in evaluation mode. It is the
            module itself, not DDP's wrapper.
        archive: (T, P), an adapter in each row; see `AdapterLayout`.

    Attributes:
        passes: calls of the network so far.
        rows: samples in them.

    Raises:
        ValueError: a network without adapters, or an archive of another width.

    Cost: a pass for `first`, all but the shared start of one for `again`; two copies of the tokens are kept between them.
    """

    def __init__(self, model: nn.Module, archive: Tensor) -> None:
        layout = AdapterLayout.of(model)
        check(archive.ndim == 2 and archive.shape[1] == layout.size and len(archive) > 0, "AdapterTrunk",
              f"an archive of shape {tuple(archive.shape)}", f"be (T, {layout.size}), T >= 1")
        known = all(hasattr(model, name) for name in ("blocks", "norm", "forward_features", "forward_head"))
        check(known, "AdapterTrunk", f"a {type(model).__name__}", "be a vision transformer of timm itself, not a wrapper of one")
        self.model: Any = model
        self.archive = archive
        self.passes, self.rows = 0, 0

    @torch.no_grad()
    def first(self, inputs: Tensor, task: int = 0) -> tuple[Tensor, Start]:
        """Features (n, width) of all rows under one adapter, and where later passes begin."""
        shared = Shared()
        with reading_adapters(self.model, self.archive[task]):
            features = self._run(inputs, self._whole, shared)
        assert shared.attended is not None and shared.without is not None
        return features, Start(shared.attended, shared.without)

    @torch.no_grad()
    def again(self, start: Start, tasks: Tensor) -> Tensor:
        """Features of these rows under adapters of their own: (n,) int64 to (n, width)."""
        with reading_adapters(self.model, self.archive, tasks):
            return self._run(start.attended, self._behind, Shared(start.attended, start.without))

    def _run(self, inputs: Tensor, forward: Callable[[Tensor], Tensor], shared: Shared) -> Tensor:
        check(not self.model.training, "AdapterTrunk", "a network in training mode", "be in evaluation mode",
              "call model.eval(): with dropout no two passes have the same start")
        self.passes, self.rows = self.passes + 1, self.rows + len(inputs)
        block = next(part for part in self.model.modules() if isinstance(part, AdaptedBlock))
        try:
            block.shared = shared
            with _calling(self.model, forward):
                features: Tensor = self.model(inputs)
        finally:
            block.shared = None
        return features

    def _whole(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.model.forward_head(self.model.forward_features(inputs), pre_logits=True)
        return found

    def _behind(self, tokens: Tensor) -> Tensor:
        """From the first block's adapter on; the block itself does not look at the tokens."""
        found: Tensor = self.model.forward_head(self.model.norm(self.model.blocks(tokens)), pre_logits=True)
        return found


@contextmanager
def _calling(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block, a call of the module runs `forward` inside its hooks."""
    before = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before
