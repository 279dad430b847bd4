"""The root of the problems: what a trainer, and the methods in it, ask of what is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

__all__ = ["Problem"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What an output is, the loss of each row, how many units count, and the scores.

        loss of a batch = sum over rows of losses(row) / sum over rows of units(row)      over all ranks and micro-batches

    Everything is a sum over rows or a ratio of such sums, so that any number of ranks gives the same numbers. A problem is a
    value: two are equal when class and fields are, and a run resumes only with an equal one.

    A subclass is a frozen dataclass too. It says `losses`, `sums` and `scores`, and `units` and `pool` where its rows have units;
    `Trainer(..., problem=...)` does the rest. n: rows.
    """

    output: str | int | None = None
    """Which entry of what the model returns, where that is a tuple, a dict or an object with attributes; None: `finds`."""

    finds: ClassVar[str | None] = None
    """The entry that is taken where a model returns several and `output` is None; None: such a model is refused."""
    term: ClassVar[str] = "loss"
    """What the loss is recorded as."""
    text: ClassVar[str] = "loss(outputs, targets)"
    """The loss, in words for people."""
    floats: ClassVar[bool] = True
    """Whether inputs without names and without a `prepare` become float32. False for ids."""
    fraction: ClassVar[bool] = True
    """Whether the first score lies in [0, 1], and is shown in percent."""
    labels: ClassVar[bool] = False
    """Whether targets are the stream's labels, one class index for each row. Otherwise they are kept beside the inputs."""
    cross_entropy: ClassVar[bool] = False
    """Whether the loss is the cross-entropy of labels, of which methods know more than `losses` tells: stored logits of classes,
    Fisher information by class. A subclass with `losses` of its own says False, unless it says otherwise."""
    in_units: ClassVar[bool] = False
    """Whether rows have units. True of a subclass with `units` of its own."""
    bounded: ClassVar[bool] = False
    """Whether there is a natural `output_fn`. True of a subclass with one."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "losses" in own and "cross_entropy" not in own:
            cls.cross_entropy = False
        if "units" in own and "in_units" not in own:
            cls.in_units = True
        if "output_fn" in own and "bounded" not in own:
            cls.bounded = True

    # ------------------------------------------------------------------------------------------ what a subclass says
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each row, summed over its units: (n,), differentiable."""
        raise NotImplementedError(f"{type(self).__name__}.losses() is not there, must give the loss of each row")

    def units(self, targets: Tensor) -> Tensor:
        """How many units of each row count: (n,). Asked only where rows have units."""
        raise NotImplementedError(f"{type(self).__name__}.units() is not there, must count the units of each row")

    def pool(self, values: Tensor, targets: Tensor) -> Tensor:
        """A method's own value of each unit (n, ...), summed over the units that count: (n,)."""
        return values

    def sums(self, outputs: Tensor, targets: Tensor, weight: Tensor, allowed: Tensor | None = None) -> Tensor:
        """What scores are made of, each row times its weight (n,), summed: (k,) float64. Added up over batches and ranks.

        `allowed`: the labels that a prediction may take, where `labels`; None: any.
        """
        raise NotImplementedError(f"{type(self).__name__}.sums() is not there, must give sums over the rows")

    def scores(self, sums: Tensor) -> dict[str, float]:
        """The scores, from the sums (k,) over all rows. The first fills the trainer's matrix: larger is better."""
        raise NotImplementedError(f"{type(self).__name__}.scores() is not there, must give scores of sums")

    def check(self, outputs: Tensor, targets: Tensor, known: int) -> None:
        """Raise `ValueError` unless outputs have the shape that `losses` needs. Asked once for each shape.

        `known`: classes of the stream.
        """

    def output_fn(self, outputs: Tensor, batch: Any) -> Tensor:
        """The 0-dim output whose gradient Ignite bounds, a mean over the rows. Asked only where there is a natural one."""
        raise NotImplementedError(f"{type(self).__name__}.output_fn() is not there, must give a scalar")
