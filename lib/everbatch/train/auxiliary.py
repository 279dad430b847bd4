"""What a trainer's step gives to optimizer mixins beside its closure: a mean output, the stream's loss, losses by row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from everbatch.contract import parts_of
from everbatch.data import Batch
from everbatch.errors import check
from everbatch.optim import OptimizerMixin, Refresh

if TYPE_CHECKING:
    from everbatch.train.trainer import Trainer

__all__ = ["OutputFn", "auxiliary", "check_objectives"]

OutputFn = Callable[[Tensor, Batch], Tensor]
"""Maps logits (n, classes) and their batch to a 0-dim tensor, a mean over the rows."""


def check_objectives(trainer: type, optimizer: Any, output_fn: OutputFn | None, accumulation: int) -> None:
    """Refuse, before anything is built, an optimizer whose auxiliary objectives this trainer cannot give.

    Args:
        trainer: the composed class. optimizer: the partial it was given.

    Raises:
        ValueError: "output" needed without an `output_fn`; "per_sample" needed with several micro-batches, or with a trainer
            mixin that adds parts to the batch, which such an optimizer would not train on.
    """
    cls = getattr(optimizer, "func", None)
    if not (isinstance(cls, type) and issubclass(cls, OptimizerMixin)):
        return  # refused, with more words, where the engine is built
    needs = _needs(cls)
    if "output" in needs:
        check(output_fn is not None, "Trainer", f"{needs['output']} in the optimizer and output_fn=None",
              "be given the scalar output whose gradient it bounds; there is no default to guess",
              "pass Trainer(..., output_fn=lambda logits, batch: ...) in a script of your own: options cannot name a function")
    if "per_sample" in needs:
        part = needs["per_sample"]
        check(accumulation == 1, "Trainer", f"accumulation={accumulation} with {part}", f"be 1, because {part} selects among the "
              "rows of one batch", "use more ranks, or SAM")
        adding = [p.__name__ for p in parts_of(trainer) if {"draw_batch", "augment_batch"} & vars(p).keys()]
        check(not adding, "Trainer", f"{part} in the optimizer and {', '.join(adding)} in the trainer", "not both be used: "
              f"{part} trains on rows of the stream alone", "use SAM")


def auxiliary(
    trainer: Trainer, parts: Sequence[Batch], micros: Sequence[tuple[Batch, ...]],
) -> dict[str, Callable[..., Tensor]]:
    """The auxiliary objectives that the trainer's optimizer needs in this step, by name; see `OptimizerMixin.step`.

        data        loss terms of the stream part alone
        output      output_fn of the stream part's logits, averaged over micro-batches
        per_sample  loss terms of the stream part by row

    Args:
        parts: the parts of this step, ready. micros: the same in micro-batches.
    """
    needed = set(_needs(type(trainer.optimizer)))
    if getattr(trainer.optimizer.configs.get(Refresh), "loss", "") == "current_ce":  # an option of it needs one, not the class
        needed.add("data")
    streams = [_stream(micro) for micro in micros]
    known: dict[str, Callable[..., Tensor]] = {
        "data": functools.partial(_data, trainer, streams), "output": functools.partial(_output, trainer, streams),
        "per_sample": functools.partial(_per_sample, trainer, parts)}
    return {name: function for name, function in known.items() if name in needed}


def _needs(cls: type) -> dict[str, str]:
    """Auxiliary objectives that the parts of an optimizer class declare, and who does."""
    return {name: part.__name__ for part in parts_of(cls) for name in part.needs}  # type: ignore[attr-defined]


def _stream(parts: Sequence[Batch]) -> Batch:
    return next(part for part in parts if part.part == "stream")


def _data(trainer: Trainer, streams: Sequence[Batch]) -> Tensor:
    return torch.stack([trainer._micro((part,)) for part in trainer.optimizer.micro_batches(streams, average=False)]).sum()


def _output(trainer: Trainer, streams: Sequence[Batch]) -> Tensor:
    total = []
    for part in trainer.optimizer.micro_batches(streams):  # equally large: the batch size is divisible by their number
        assert trainer.output_fn is not None
        total.append(trainer.optimizer.backward(trainer.output_fn(trainer.forward(part), part)))
    return torch.stack(total).sum()


class _ByRow(Batch):
    """A batch that leaves losses by row, so that the trainer's own `loss_terms` gives them."""

    def mean(self, losses: Tensor) -> Tensor:
        return losses if self.weight is None else losses * self.weight


def _per_sample(trainer: Trainer, parts: Sequence[Batch], rows: Tensor | None = None) -> Tensor:
    """Losses (n,) of those rows of this rank's stream part, with a graph; None: of all."""
    names = [part.part for part in parts]
    check(names == ["stream"], "Trainer", f"parts {', '.join(names)} with {_needs(type(trainer.optimizer))['per_sample']}",
          "be the stream alone, whose rows it trains on")
    part = parts[0]
    weight = None if part.weight is None else part.weight * len(part)  # the mean over all rows is the part's loss then
    part = _rows(replace(part, weight=weight), rows)
    outputs = trainer.forward(part)
    terms = trainer.loss_terms(outputs, _ByRow(**vars(part)))
    odd = [name for name, term in terms.items() if term.shape != (len(part),)]
    check(not odd, "Trainer", f"loss terms {odd} of one number", "be reduced by batch.mean(losses), which keeps rows here")
    if trainer.optimizer.recording:
        trainer._outputs = {"stream": [outputs.detach()]}
        trainer._terms = {name: term.detach().mean() for name, term in terms.items()}
    return torch.stack(list(terms.values())).sum(0)


def _rows(part: Batch, rows: Tensor | None) -> Batch:
    if rows is None:
        return part
    return replace(part, inputs=part.inputs[rows], targets=part.targets[rows], ids=part.ids[rows], position=part.position[rows],
                   weight=None if part.weight is None else part.weight[rows],
                   extras={name: value[rows.to(value.device)] for name, value in part.extras.items()})
