"""Causal language models: every token is predicted from those before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from everbatch.errors import check
from everbatch.problems.base import Problem

__all__ = ["CausalLM"]


@dataclass(frozen=True, kw_only=True)
class CausalLM(Problem):
    """Logits (n, L, V) against token ids (n, L): the output at t predicts token t + 1. Units are the tokens that count.

        loss = sum over tokens that count of CE / their number      over all ranks and micro-batches, padding left out

    Scored by token_accuracy, token_loss (nats) and perplexity = exp(token_loss). One all-reduce of one float64 for each part of a
    batch in a step, whatever the accumulation.

    Targets come with the rows: `everbatch.data.RowSource(ids, targets=ids)`, padding as `ignore`. Right padding needs no
    attention mask. Do not give the targets to the model, which would take a mean of its own; build models of Hugging Face with
    `use_cache=False`. Of a model's outputs `logits` is taken; other heads get no gradient.
    """

    ignore: int = -100
    """Targets of this value do not count."""
    shift: bool = True
    """False: targets are shifted already, and the output at t predicts target t."""

    finds: ClassVar[str | None] = "logits"
    term: ClassVar[str] = "token_cross_entropy"
    text: ClassVar[str] = "CE(logits, tokens)"
    floats: ClassVar[bool] = False

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Problem.losses`."""
        at, aim = self._pair(outputs, targets)
        flat = functional.cross_entropy(at.flatten(0, 1), aim.flatten().long(), ignore_index=self.ignore, reduction="none")
        return flat.view(aim.shape).sum(1)

    def units(self, targets: Tensor) -> Tensor:
        """Tokens that count."""
        if targets.ndim != 2:  # asked before the first outputs are there to be checked
            _check_targets(targets)
        aim = targets[:, 1:] if self.shift else targets
        return (aim != self.ignore).sum(1)

    def pool(self, values: Tensor, targets: Tensor) -> Tensor:
        """See `Problem.pool`: values (n, L)."""
        at, aim = self._pair(values, targets)
        return (at * (aim != self.ignore)).sum(1)

    def check(self, outputs: Tensor, targets: Tensor, known: int) -> None:
        """See `Problem.check`."""
        _check_targets(targets)
        check(outputs.ndim == 3 and outputs.shape[:2] == targets.shape, "CausalLM",
              f"outputs of shape {tuple(outputs.shape)} for targets of {tuple(targets.shape)}", "be logits (n, L, V)")

    def sums(self, outputs: Tensor, targets: Tensor, weight: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Tokens that are right, their summed loss, and their number."""
        at, aim = self._pair(outputs, targets)
        real = (aim != self.ignore) * weight[:, None].double()
        right = ((at.argmax(-1) == aim) * real).sum()
        loss = (self.losses(outputs, targets).double() * weight.double()).sum()
        return torch.stack([right, loss, real.sum()])

    def scores(self, sums: Tensor) -> dict[str, float]:
        """`token_accuracy`, `token_loss`, `perplexity`; NaN of no tokens."""
        right, loss, tokens = sums.tolist()
        mean = loss / tokens if tokens else math.nan
        return {"token_accuracy": right / tokens if tokens else math.nan, "token_loss": mean,
                "perplexity": math.exp(mean) if not mean > 700.0 else math.inf}

    def _pair(self, values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What is said at each place, and what is to be said there."""
        return (values[:, :-1], targets[:, 1:]) if self.shift else (values, targets)


def _check_targets(targets: Tensor) -> None:
    whole = targets.ndim == 2 and not targets.is_floating_point()
    check(whole, "CausalLM", f"targets of shape {tuple(targets.shape)} and {targets.dtype}", "be token ids (n, L)",
          "let the source give token ids as targets: everbatch.data.RowSource(ids, targets=ids)")
