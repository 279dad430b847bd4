"""A network that takes its adapters home: it finds the one that each image wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everbatch.errors import check
from everbatch.nn.heads import head_of
from everbatch.nn.retrieval import retrieve
from everbatch.nn.trunk import AdapterTrunk

__all__ = ["Retriever"]


class Retriever(nn.Module):
    """Predicts as `everbatch.train.MOS` does: scores (n, classes) of images, by `everbatch.nn.retrieve`.

    Args:
        network: a timm vision transformer with adapters and a linear head, for evaluation.
        archive: (T, P), an adapter for each task.
        prototypes: (seen, d), mean features of each class under the first.
        ends: classes of the tasks up to each.
        ensemble, on_cycle: see `retrieve`.

    Attributes:
        last_paths: (n, 4), the tasks whose adapters each sample of the last batch was shown, -1 behind them.

    Raises:
        ValueError: tensors that do not fit.

    Classes of the head that no task has reached get the lowest number there is. Cost: that of `retrieve`.
    """

    archive: Tensor
    prototypes: Tensor

    def __init__(
        self, network: nn.Module, archive: Tensor, prototypes: Tensor, ends: Sequence[int], *, ensemble: bool = True,
        on_cycle: Literal["cap", "max_confidence"] = "cap",
    ) -> None:
        super().__init__()
        check(len(archive) == len(ends) > 0 and len(prototypes) == ends[-1], "Retriever",
              f"{len(archive)} adapters, {len(prototypes)} prototypes and ends={list(ends)}", "be of the same tasks and classes")
        self.network, self.ends, self.ensemble, self.on_cycle = network, list(ends), ensemble, on_cycle
        self.register_buffer("archive", archive)
        self.register_buffer("prototypes", prototypes)
        self.last_paths: Tensor | None = None
        AdapterTrunk(network, archive)

    def forward(self, images: Tensor) -> Tensor:
        """Scores; without gradients."""
        sizes = torch.tensor(self.ends).diff(prepend=torch.zeros(1, dtype=torch.int64))
        head: Any = self.network.get_submodule(head_of(self.network))
        with torch.no_grad():
            found = retrieve(
                AdapterTrunk(self.network, self.archive), images, head, self.prototypes,
                torch.arange(len(sizes)).repeat_interleave(sizes), len(sizes), ensemble=self.ensemble,
                on_cycle=self.on_cycle)
        self.last_paths = found.path
        lowest = torch.finfo(found.scores.dtype).min
        return F.pad(found.scores, (0, head.out_features - self.ends[-1]), value=lowest)
