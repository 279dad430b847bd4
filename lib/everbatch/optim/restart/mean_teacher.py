"""A slow copy of the weights that teaches them, and the source that weights now and then return to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from everbatch import seeds
from everbatch.contract import Cost, parts_of
from everbatch.engines.named import ByName
from everbatch.engines.shards import Shard, Vector, wide
from everbatch.errors import check_real
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.standing import standing_in

__all__ = ["MeanTeacher"]

Which = Literal["teacher", "source"]


class MeanTeacher(OptimizerMixin):
    """The weights' average as a teacher, and a return of single weights to where they began.

    After each applied step, with theta_0 the weights before the first one:

        teacher <- decay * teacher + (1 - decay) * theta              from theta_0 on
        theta_i <- theta_0i  with probability `restore`               each weight by a draw of its own

    The draws are a function of (seed, step, name, position): the same at any world size, ZeRO stage
    and sharding. Moments stay. `with opt.taught_by("teacher"):` puts the teacher, or "source" the
    first weights, into the model on every rank, and the weights back afterwards. Predictions are
    the teacher's. Buffers are in neither copy. `CoTTA`, in the trainer, asks the teacher.

    Args (Config): see the fields.

    Cost: two copies of the owned masters, kept; with `restore` one number drawn on the CPU for each
    owned weight, and one publication of the weights in each step. A prediction: two publications.
    Order: left of mixins that edit weights.
    Limits: weights that DynamicSparsity masks, or a displacement leaves out, do not return.
    Source: Wang et al. 2022 (CoTTA), arXiv 2203.13591, eq. 2 and 7 to 8; defaults of the released
    code. The teacher: Tarvainen and Valpola 2017, arXiv 1703.01780.
    """

    called_by = "cotta"
    left_of = ("DynamicSparsity",)
    minimizes = False
    makes = {}  # a part of another method
    example = {"decay": 0.5, "restore": 0.3}
    off = {"decay": 0.5, "restore": 0.0}  # it touches no weight
    search = {"restore": (0.01, 0.0, 0.001, 0.1), "decay": (0.999, 0.99)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        decay: float = 0.999
        """Weight of the old teacher; in [0, 1)."""
        restore: float = 0.01
        """Probability that a weight returns to the source after a step; in [0, 1]."""

        def __post_init__(self) -> None:
            check_real("MeanTeacher", "decay", self.decay, 0.0, 1.0, open_high=True)
            check_real("MeanTeacher", "restore", self.restore, 0.0, 1.0)

    @dataclass
    class State:
        teacher: ByName = field(default_factory=ByName)
        source: ByName = field(default_factory=ByName)

    def update(self) -> None:
        """Keep the weights that the first step is about to move."""
        self._keep_source()
        super().update()

    def edit_parameters(self) -> None:
        """Fold the new weights into the teacher, then let some return."""
        super().edit_parameters()
        self._keep_source()  # of parameters that were unfrozen or added since
        config, teacher = self.configs[MeanTeacher], self.states[MeanTeacher].teacher
        with self.host.frozen_too():
            known = [shard for shard in self.host.shards if shard.name in teacher]
        if known:
            kept = [teacher[shard.name] for shard in known]
            now = [shard.data.to(old.dtype) for shard, old in zip(known, kept, strict=True)]
            torch._foreach_lerp_(kept, now, 1.0 - config.decay)
        if config.restore:
            self._let_return(config.restore)

    def _keep_source(self) -> None:
        state = self.states[MeanTeacher]
        for shard in self.host.shards:
            if shard.name not in state.source:
                state.source[shard.name] = shard.data.to(wide(shard.data), copy=True)
                state.teacher[shard.name] = state.source[shard.name].clone()

    @torch.no_grad()
    def _let_return(self, share: float) -> None:
        """Single weights to the source."""
        shards, source = list(self.host.shards), self.states[MeanTeacher].source
        new = []
        for shard in shards:
            key = (self.seed, "mean teacher", self.step_count, shard.name)
            back = seeds.uniform(key, shard.start, shard.numel) < share
            back = back.to(shard.data.device).view(shard.data.shape)
            new.append(torch.where(back, source[shard.name].to(shard.data.dtype), shard.data))
        self._place(shards, new)

    def _place(self, shards: list[Shard], new: list[Tensor]) -> None:
        """Write masters, so far as `displacement` lets them move."""
        if any("displacement" in vars(part) for part in parts_of(type(self))):
            old = [shard.data.clone() for shard in shards]
            change = [n - o for n, o in zip(new, old, strict=True)]
            allowed = self.displacement(Vector(self.host, shards, [c.clone() for c in change]))
            moved = zip(allowed.tensors, change, new, old, strict=True)
            new = [torch.where(a == c, n, o + a) for a, c, n, o in moved]
        for shard, values in zip(shards, new, strict=True):
            shard.data.copy_(values)
        self.host.touch()

    @torch.no_grad()
    def return_to_source(self) -> None:
        """Put the first weights back, in the teacher too; nothing before the first step. Collective:
        one publication. Between steps."""
        state = self.states[MeanTeacher]
        known = [shard for shard in self.host.shards if shard.name in state.source]
        for shard in known:
            state.teacher[shard.name].copy_(state.source[shard.name])
        self._place(known, [state.source[shard.name].to(shard.data.dtype) for shard in known])
        self.host.publish_if_dirty()

    @contextmanager
    def taught_by(self, which: Which) -> Iterator[None]:
        """Compute with the teacher, or the source, inside the block; before the first step with the
        weights. Collective: see `standing_in`."""
        with standing_in(self.host, getattr(self.states[MeanTeacher], which)):
            yield

    @torch.no_grad()
    def predicted(self, run: Callable[[], Tensor]) -> Tensor:
        """What the teacher predicts."""
        with self.taught_by("teacher"):
            return super().predicted(run)

    def cost(self) -> Cost:
        """Two kept copies."""
        return Cost(state_bytes=8)
