"""Auxiliary objectives: which ones an optimizer needs, and whether a trainer can give them."""

from __future__ import annotations

from typing import Any

from everbatch.contract import parts_of
from everbatch.errors import check
from everbatch.optim import OptimizerMixin
from everbatch.train.passes import OutputFn

__all__ = ["check_objectives", "needed"]


def check_objectives(
    trainer: type, optimizer: Any, output_fn: OutputFn | None, accumulation: int,
) -> None:
    """Refuse, before anything is built, an optimizer whose objectives this trainer cannot give.

    Args:
        trainer: the composed class. optimizer: the partial it was given.

    Raises:
        ValueError: "output" needed without an `output_fn`; "per_sample" needed with several
            micro-batches, or with a trainer mixin that adds parts to the batch, which such an
            optimizer would not train on.
    """
    cls = getattr(optimizer, "func", None)
    if not (isinstance(cls, type) and issubclass(cls, OptimizerMixin)):
        return  # refused, with more words, where the engine is built
    needs = _declared(cls)
    if "output" in needs:
        check(output_fn is not None, "Trainer", f"{needs['output']} in the optimizer and output_fn=None",
              "be given the scalar output whose gradient it bounds; there is no default to guess",
              "pass Trainer(..., output_fn=lambda logits, batch: ...) in a script of your own: options cannot name a function")
    if "per_sample" in needs:
        part = needs["per_sample"]
        check(accumulation == 1, "Trainer", f"accumulation={accumulation} with {part}",
              f"be 1, because {part} selects among the rows of one batch", "use more ranks, or SAM")
        adding = [p.__name__ for p in parts_of(trainer) if {"draw_batch", "augment_batch"} & vars(p).keys()]
        check(not adding, "Trainer", f"{part} in the optimizer and {', '.join(adding)} in the trainer",
              f"not both be used: {part} trains on rows of the stream alone", "use SAM")


def needed(optimizer: OptimizerMixin) -> dict[str, str]:
    """The auxiliary objectives that an optimizer asks for, by its class and options, and the part that does."""
    names = _declared(type(optimizer))
    for part, config in optimizer.configs.items():
        names |= dict.fromkeys(part.wants(config), part.__name__)  # type: ignore[attr-defined]
    return names


def _declared(cls: type) -> dict[str, str]:
    """Auxiliary objectives that the parts of an optimizer class declare, and who does."""
    return {name: part.__name__ for part in parts_of(cls) for name in part.needs}  # type: ignore[attr-defined]
