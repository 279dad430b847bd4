"""What MOS can be told, and what it keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from everbatch.errors import check, check_real, check_whole
from everbatch.train.mos.gaussians import Covariance

__all__ = ["Archive", "Options"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `MOS`."""

    active: bool = True
    """False: no adapters, nothing is frozen, nothing is done."""
    rank: int = 16
    """Of each adapter, 1 to the network's width."""
    scale: float = 0.1
    """What an adapter's output is multiplied by."""
    dropout: float = 0.1
    """In the adapters, in training; in [0, 1)."""
    init: Literal["carry", "fresh"] = "carry"
    """What a task's adapters begin as: those of the task before, or new ones."""
    head_rate: float = 1.0
    """Learning rate of the head in parts of the adapters', in (0, 1]; published: 0.1."""
    alpha: float = 0.1
    """Share of the stored adapters' mean in a merge, in [0, 1]; 0: none. It is a pull of strength alpha / (lr (1 - alpha)):
    with SGD at lr 0.03 the default leaves all adapters nearly alike."""
    merge_every: int = 1
    """Applied steps between merges; >= 1."""
    merging: Literal["step", "released"] = "step"
    """Merges each time: one, or depth + 1 as the released code."""
    orthogonality: float = 0.1
    """Weight of the term that keeps features apart; >= 0."""
    covariance: Covariance = "full"
    """What of a class's covariance is kept: all, the diagonal, or `covariance_rank` directions and the rest's diagonal."""
    covariance_rank: int = 32
    """Of "low_rank"; >= 1."""
    align_epochs: int = 30
    """Of classifier alignment; >= 0, 0: none."""
    align_samples: int = 0
    """Draws of each class in an epoch, and in a batch; >= 0, 0: five batches' worth."""
    align_lr: float = 0.005
    """Learning rate of alignment, > 0; it falls to 0 by a cosine."""
    on_cycle: Literal["cap", "max_confidence"] = "cap"
    """Of a sample whose adapters never agree: the last one's scores, or those of the surest."""
    ensemble: bool = True
    """Add the prototypes' scores."""
    rows: int = 64
    """Samples per rank in a forward at a task's end; >= 1."""

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("merge_every", 1), ("covariance_rank", 1), ("align_epochs", 0),
                            ("align_samples", 0), ("rows", 1)):
            check_whole("MOS", name, getattr(self, name), least)
        check_real("MOS", "scale", self.scale)
        check_real("MOS", "dropout", self.dropout, 0.0, 1.0, open_high=True)
        check_real("MOS", "head_rate", self.head_rate, 0.0, 1.0, open_low=True)
        check_real("MOS", "alpha", self.alpha, 0.0, 1.0)
        check_real("MOS", "orthogonality", self.orthogonality, 0.0)
        check_real("MOS", "align_lr", self.align_lr, 0.0, open_low=True)
        for name, words in (("init", ("carry", "fresh")), ("merging", ("step", "released")),
                            ("covariance", ("full", "diagonal", "low_rank")), ("on_cycle", ("cap", "max_confidence"))):
            value = getattr(self, name)
            check(value in words, "MOS", f"{name}={value!r}", f"be {' or '.join(words)}")


@dataclass
class Archive:
    """What `MOS` keeps of the tasks that have ended; whole and the same on every rank."""

    archive: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    """(tasks, P): the adapters of each task that has ended."""
    prefix: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """(P,): their sum."""
    means: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    """(classes, d)."""
    spread: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Of each class; see `Sampler`."""
    prototypes: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    """(classes, d): mean features with the first adapter."""
    ends: list[int] = field(default_factory=list)
    """Classes of the tasks up to each that has ended."""
    inside: bool = False
    """Between a task's start and its end."""

    def on(self, name: str, device: torch.device) -> Tensor:
        """One of its tensors, moved to a device once: checkpoints are read on the CPU."""
        value: Tensor = getattr(self, name)
        if value.device != device:
            value = value.to(device)
            setattr(self, name, value)
        return value
