"""Two slow copies of the weights: one that keeps what was learned, one that follows what is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from everbatch import seeds
from everbatch.contract import Cost
from everbatch.engines.named import ByName
from everbatch.engines.shards import wide
from everbatch.errors import check_real
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.standing import standing_in

__all__ = ["SemanticMemory"]

Which = Literal["stable", "plastic"]


class SemanticMemory(OptimizerMixin):
    """The two memories of CLS-ER: averages of the weights, a stable and a plastic one; predictions are the stable one's.

        after each applied step t, with probability `often`:     a <- d * a + (1 - d) * theta,     d = min(decay, 1 - 1 / (t + 1))

    each average with its own probability and decay; the first step begins both. `CLSER`, in the trainer, holds the model's
    outputs to theirs. Whether a step counts is a function of seed and step. `with opt.remembered("stable"):` puts an average
    into the model, on every rank, and the weights back afterwards; `Trainer.predict` and the evaluation do so.
    Buffers (BatchNorm statistics) are not averaged. What is exported are the weights themselves, outside of such a block.

    Args (Config): see the fields.

    Cost: two copies of the owned masters, kept; no pass, no collective in the step. A prediction: two publications of the
    weights. Order: left of mixins that edit weights. Limits: none.
    Source: Arani et al. 2022, arXiv 2201.12604, eq. 3; defaults of NeurAI-Lab/CLS-ER. Differs: the averages begin with the
    weights after the first step, theirs before it.
    """

    called_by = "cls_er"
    left_of = ("DynamicSparsity",)
    minimizes = False
    makes = {}  # a part of another method
    example = {"stable_decay": 0.8, "plastic_decay": 0.5}
    off = {"stable_decay": 0.8}  # it touches no weight
    search = {"stable_often": (0.7, 0.3, 0.1), "plastic_often": (0.9, 1.0), "stable_decay": (0.999, 0.99, 0.9),
              "plastic_decay": (0.999, 0.99, 0.9)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        stable_decay: float = 0.999
        """Weight of the old stable average; in [0, 1). The published value is of runs of many thousand steps: an average over the
        last 1 / (1 - decay) steps lags behind a shorter run."""
        plastic_decay: float = 0.999
        """Weight of the old plastic average; in [0, 1)."""
        stable_often: float = 0.7
        """Probability that a step counts for the stable average; in [0, 1]."""
        plastic_often: float = 0.9
        """Probability that a step counts for the plastic average; in [0, 1]."""

        def __post_init__(self) -> None:
            for name in ("stable_decay", "plastic_decay"):
                check_real("SemanticMemory", name, getattr(self, name), 0.0, 1.0, open_high=True)
            for name in ("stable_often", "plastic_often"):
                check_real("SemanticMemory", name, getattr(self, name), 0.0, 1.0)

    @dataclass
    class State:
        stable: ByName = field(default_factory=ByName)
        plastic: ByName = field(default_factory=ByName)

    def edit_parameters(self) -> None:
        """Fold the new weights into the averages that this step counts for."""
        super().edit_parameters()
        config: SemanticMemory.Config = self.configs[SemanticMemory]
        self._semantic_fold("stable", config.stable_decay, config.stable_often)
        self._semantic_fold("plastic", config.plastic_decay, config.plastic_often)

    def _semantic_fold(self, which: Which, decay: float, often: float) -> None:
        average: ByName = getattr(self.states[SemanticMemory], which)
        draw = torch.rand((), generator=seeds.generator(self.seed, "semantic memory", which, self.step_count))
        with self.host.frozen_too():
            known = [shard for shard in self.host.shards if shard.name in average]
        if known and draw.item() < often:
            share = 1.0 - min(decay, 1.0 - 1.0 / (self.step_count + 1))
            kept = [average[shard.name] for shard in known]
            torch._foreach_lerp_(kept, [s.data.to(a.dtype) for s, a in zip(known, kept, strict=True)], share)
        # At the first step, and where a parameter was unfrozen or added since.
        new = {s.name: s.data.to(wide(s.data), copy=True) for s in self.host.shards if s.name not in average}
        average.update(new)

    @contextmanager
    def remembered(self, which: Which) -> Iterator[None]:
        """Compute with an average inside the block; before the first step, with the weights. Collective: see `standing_in`."""
        with standing_in(self.host, getattr(self.states[SemanticMemory], which)):
            yield

    @torch.no_grad()
    def predicted(self, run: Callable[[], Tensor]) -> Tensor:
        """What the stable average predicts."""
        with self.remembered("stable"):
            return super().predicted(run)

    def cost(self) -> Cost:
        """Two kept copies."""
        return Cost(state_bytes=8)
