"""What the optimizer may ask of one step: the loss and auxiliary objectives, each a run over its micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from everbatch.data import Batch
from everbatch.errors import check
from everbatch.optim.mixin import OptimizerMixin

__all__ = ["ASIDE", "OutputFn", "Pass", "Passes"]

OutputFn = Callable[[Tensor, Batch], Tensor]
"""Maps logits (n, classes) and their batch to a 0-dim tensor, a mean over the rows."""


ASIDE = "reference"
"""A part of the batch that takes no part in the loss: the optimizer asks for its gradient alone."""


@dataclass
class Pass:
    """What one run over the micro-batches gave, in their order; everything detached."""

    losses: list[Tensor] = field(default_factory=list)
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Summed over the micro-batches."""
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    """By part."""


class Runs(Protocol):
    """What passes need of a trainer."""

    optimizer: OptimizerMixin
    output_fn: OutputFn | None
    needs: dict[str, str]
    """Auxiliary objectives that the optimizer asks for, and the part that does."""

    def forward(self, batch: Batch) -> Tensor: ...

    def forward_parts(self, parts: Sequence[Batch]) -> Iterable[Tensor]: ...

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]: ...


class Passes:
    """The objectives of one step, to be given to `optimizer.step`; see `OptimizerMixin.step`.

        loss        all loss terms of all parts
        data        loss terms of the stream part alone
        output      output_fn of the stream part's logits, averaged over micro-batches
        per_sample  loss terms of the stream part by row
        reference   loss terms of the part "reference", which is in no other; not there while no such part is

    Args:
        trainer: its verbs run the parts.
        parts: the parts of this step, ready.
        micros: the same in micro-batches.

    Attributes:
        recorded: what the recorded pass gave; None before it.
    """

    def __init__(self, trainer: Runs, parts: list[Batch], micros: list[tuple[Batch, ...]]) -> None:
        self.trainer, self.optimizer = trainer, trainer.optimizer
        self.parts, self.micros, self.aside = parts, micros, micros[:0]
        if any(part.part == ASIDE for part in parts):
            self.micros = [tuple(p for p in micro if p.part != ASIDE) for micro in micros]
            self.aside = [tuple(p for p in micro if p.part == ASIDE) for micro in micros]
        self.recorded: Pass | None = None

    def auxiliary(self) -> dict[str, Callable[..., Tensor]]:
        """The objectives beside the loss that the optimizer asks for, by name."""
        return {name: getattr(self, name) for name in self.trainer.needs if name != ASIDE or self.aside}

    def loss(self) -> Tensor:
        return self._over(self.micros)

    def data(self) -> Tensor:
        return self._over([(_stream(micro),) for micro in self.micros])

    def reference(self) -> Tensor:
        return self._over(self.aside)

    def output(self) -> Tensor:
        trainer, total = self.trainer, []
        streams = [_stream(micro) for micro in self.micros]
        # Averaged: micro-batches are equally large, for the batch size is divisible by their number.
        for part in self.optimizer.micro_batches(streams):
            assert trainer.output_fn is not None
            value = trainer.output_fn(trainer.forward(part), part)
            total.append(self.optimizer.backward(value))
        return torch.stack(total).sum()

    def per_sample(self, rows: Tensor | None = None) -> Tensor:
        """Losses (n,) of those rows of this rank's stream part, with a graph; None: of all."""
        names = [part.part for part in self.parts]
        check(names == ["stream"], "Trainer", f"parts {', '.join(names)} with {self.trainer.needs['per_sample']}",
              "be the stream alone, whose rows it trains on")
        part = self.parts[0]
        # The mean over all rows is the part's loss then.
        weight = None if part.weight is None else part.weight * len(part)
        part = replace(part, weight=weight)
        part = part if rows is None else part.rows(rows)
        outputs = self.trainer.forward(part)
        terms = self.trainer.loss_terms(outputs, _ByRow(**vars(part)))
        odd = [name for name, term in terms.items() if term.shape != (len(part),)]
        check(not odd, "Trainer", f"loss terms {odd} of one number",
              "be reduced by batch.mean(losses), which keeps rows here")
        if self.optimizer.recording:
            means = {name: term.detach().mean() for name, term in terms.items()}
            self.recorded = Pass([], means, {"stream": [outputs.detach()]})
        return torch.stack(list(terms.values())).sum(0)

    def _over(self, micros: Sequence[tuple[Batch, ...]]) -> Tensor:
        """One pass: forward and backward of each micro-batch, all parts of it. Returns the loss."""
        done = Pass()
        if self.recorded is None and self.optimizer.recording:
            self.recorded = done
        for parts in self.optimizer.micro_batches(micros, average=False):
            terms: dict[str, Tensor] = {}
            for part, outputs in zip(parts, self.trainer.forward_parts(parts), strict=True):
                for name, term in self.trainer.loss_terms(outputs, part).items():
                    if not isinstance(term, Tensor) or term.ndim:
                        term = _one_number(name, term)
                    terms[name] = terms[name] + term if name in terms else term
                if done is self.recorded:
                    done.outputs.setdefault(part.part, []).append(outputs.detach())
            loss = torch.stack(list(terms.values())).sum()
            self.optimizer.backward(loss)
            done.losses.append(loss.detach())
            if done is self.recorded:
                for name, term in terms.items():
                    term = term.detach()
                    done.terms[name] = done.terms[name] + term if name in done.terms else term
        return torch.stack(done.losses).sum()


def _one_number(name: str, term: object) -> Tensor:
    """A loss term without dimensions.

    Raises:
        ValueError: it is not one number.
    """
    got = f"of shape {tuple(term.shape)}" if isinstance(term, Tensor) else f"that is a {type(term).__name__}"
    check(isinstance(term, Tensor) and term.numel() == 1, "Trainer", f"a loss term {name!r} {got}", "be a tensor without "
          "dimensions (0-dim), one number of the part", "reduce it: batch.mean(losses) does over rows, and knows which count")
    assert isinstance(term, Tensor)
    return term.reshape(())


class _ByRow(Batch):
    """A batch that leaves losses by row, so that the trainer's own `loss_terms` gives them."""

    def mean(self, losses: Tensor) -> Tensor:
        return losses if self.weight is None else losses * self.weight


def _stream(parts: Sequence[Batch]) -> Batch:
    return next(part for part in parts if part.part == "stream")
