"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from everbatch.contract import Cost
from everbatch.engines.named import ByName
from everbatch.engines.shards import wide
from everbatch.errors import check_real, check_whole
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.standing import standing_in

__all__ = ["EMA", "zero_averages"]


class EMA(OptimizerMixin):
    """Moving average of the masters:  a_1 = theta_1;  a_t = decay * a_{t-1} + (1 - decay) * theta_t  after each applied step.

    `with opt.averaged():` puts the average into the model, on every rank, and the weights back afterwards, bit for bit.
    Buffers (BatchNorm statistics) are not averaged. The average is in fp32 at least: masters in bf16 would not take in steps of
    1 - decay.

    Args (Config):
        ema_decay: in [0, 1).
        ema_every: average after every so many applied steps, >= 1.

    Cost: one copy of the owned masters, kept; no pass, no collective.
    Order: leftmost of the mixins that edit weights, so that it averages what they leave.
    Source: the exponential form of iterate averaging (Polyak and Juditsky 1992), as in `torch.optim.swa_utils.get_ema_avg_fn`.
    """

    left_of = ("DynamicSparsity",)

    minimizes = False
    example = {"ema_decay": 0.5}
    off = {"ema_decay": 0.5}  # it touches no weight
    search = {"ema_decay": (0.999, 0.99, 0.9998)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        ema_decay: float = 0.9998
        """Weight of the old average; in [0, 1)."""
        ema_every: int = 1
        """Applied steps between two averagings; >= 1."""

        def __post_init__(self) -> None:
            check_real("EMA", "ema_decay", self.ema_decay, 0.0, 1.0, open_high=True)
            check_whole("EMA", "ema_every", self.ema_every, 1)

    @dataclass
    class State:
        average: ByName = field(default_factory=ByName)

    def edit_parameters(self) -> None:
        """Fold the new weights into the average."""
        super().edit_parameters()
        config, average = self.configs[EMA], self.states[EMA].average
        with self.host.frozen_too():  # the average of a weight that was frozen on the way goes on towards it
            known = [s for s in self.host.shards if s.name in average]
        if known and self.step_count % config.ema_every == 0:
            kept = [average[s.name] for s in known]
            torch._foreach_lerp_(kept, [s.data.to(a.dtype) for s, a in zip(known, kept, strict=True)], 1.0 - config.ema_decay)
        # At the first step, and where a parameter was unfrozen or added since.
        average.update({s.name: s.data.to(wide(s.data), copy=True) for s in self.host.shards if s.name not in average})

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Compute with the averaged weights inside the block. Collective: two publications; one if the block raises, and the
        next pass then publishes the weights."""
        with standing_in(self.host, self.states[EMA].average):
            yield

    def cost(self) -> Cost:
        """One kept copy."""
        return Cost(state_bytes=4)


def zero_averages(opt: OptimizerMixin, off: Mapping[str, torch.Tensor]) -> None:
    """Set entries of the averages that EMA keeps in `opt` to zero: `off` is true there, slice by slice, by name."""
    for name, average in opt.states[EMA].average.items():
        if name in off:
            average.masked_fill_(off[name], 0.0)
