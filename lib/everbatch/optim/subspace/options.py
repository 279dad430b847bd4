"""What OSFT and GRIP are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from everbatch.errors import check, check_real, check_whole
from everbatch.optim.memory.replica import Factory

__all__ = ["GripOptions", "OsftOptions"]


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


@dataclass(frozen=True, kw_only=True)
class GripOptions:
    """The options of `GRIP`."""

    routers: tuple[str, ...] = ("*router.weight",)
    """Patterns of the names of the routers' matrices (experts, d), as in a shell."""
    top_k: int = 2
    """Experts that a token is sent to; >= 1."""
    mode: Literal["A", "B"] = "A"
    """Routers are held in every step ("A"), or fitted after unlearning, by a call ("B")."""
    delta: float = 0.999
    """Share of the energy of an expert's tokens along which its row does not move; in (0, 1]."""
    eps_margin: float = 1e-2
    """What is kept of each margin between selected experts and others; >= 0."""
    kaczmarz_iters: int = 100
    """Corrections of each router's rows per step at most; >= 0."""
    tokens: int = 4096
    """Retained tokens per router at most, over all ranks; more are thinned evenly; >= 1."""
    ridge: float = 1e-6
    """Of the fit in mode "B"; > 0."""
    accept_cosine: float = 0.95
    """Cosine of the scores before and after that fit below which a router is left as it is; in [-1, 1]."""
    strength: float = 1.0
    """D + strength * (P(D) - D) of a router's change D; in [0, 1], 0 switches it off."""
    retained: Mapping[str, Tensor] | None = field(default=None, repr=False)
    """Tokens (n, d) of each router by name, to retain at construction."""
    factory: Factory | None = None
    """Builds the bare model on the CPU; needed on ZeRO stage 3 and FSDP2 where samples are retained."""

    def __post_init__(self) -> None:
        check(bool(self.routers), "GRIP", "no routers", "be patterns of names")
        check(self.mode in ("A", "B"), "GRIP", f"mode={self.mode!r}", "be 'A' or 'B'")
        for name, least in (("top_k", 1), ("kaczmarz_iters", 0), ("tokens", 1)):
            check_whole("GRIP", name, getattr(self, name), least)
        check_real("GRIP", "delta", self.delta, 0.0, 1.0, open_low=True)
        check_real("GRIP", "eps_margin", self.eps_margin, 0.0)
        check_real("GRIP", "ridge", self.ridge, 0.0, open_low=True)
        check_real("GRIP", "accept_cosine", self.accept_cosine, -1.0, 1.0)
        check_real("GRIP", "strength", self.strength, 0.0, 1.0)
