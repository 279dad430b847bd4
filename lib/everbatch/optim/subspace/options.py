"""What OSFT and GRIP are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from everbatch.errors import check, check_real
from everbatch.optim.memory.replica import Factory

__all__ = ["OsftOptions"]


@dataclass(frozen=True, kw_only=True)
class OsftOptions:
    """The options of `OSFT`."""

    mrr: float = 0.1
    """Share that is kept of a matrix of importance 0; in [0, 1]."""
    trr: float = 0.8
    """Share that is kept of one of average importance; in [mrr, 1]."""
    unfreeze_rank_ratio: float | None = None
    """Share of the directions that is left free, of every matrix alike; in [0, 1]. None: by importance."""
    form: Literal["weight", "factor"] = "weight"
    """Whether what mixes kept and free directions may change ("weight"), or may not."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of the matrices' names, as in a shell; of two dimensions or more."""
    pretrained: bool = False
    """Whether the weights at construction are to be kept as well."""
    space: Literal["update", "grad"] = "update"
    """What is mapped; "grad" is enough for plain SGD alone."""
    strength: float = 1.0
    """D + strength * (P(D) - D); in [0, 1], 0 switches it off."""
    factory: Factory | None = None
    """Builds the bare model on the CPU; needed on ZeRO stage 3 and FSDP2 where importance is measured."""

    def __post_init__(self) -> None:
        check_real("OSFT", "mrr", self.mrr, 0.0, 1.0)
        check_real("OSFT", "trr", self.trr, self.mrr, 1.0)
        check_real("OSFT", "strength", self.strength, 0.0, 1.0)
        if self.unfreeze_rank_ratio is not None:
            check_real("OSFT", "unfreeze_rank_ratio", self.unfreeze_rank_ratio, 0.0, 1.0)
        check(self.form in ("weight", "factor"), "OSFT", f"form={self.form!r}", "be 'weight' or 'factor'")
        check(self.space in ("grad", "update"), "OSFT", f"space={self.space!r}", "be 'update' or 'grad'")
        check(bool(self.targets), "OSFT", "no targets", "be patterns of names")
