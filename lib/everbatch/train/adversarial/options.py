"""The options of ConAdv."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from everbatch.errors import check, check_real, check_whole

__all__ = ["AdversarialOptions"]


@dataclass(frozen=True, kw_only=True)
class AdversarialOptions:
    """See the fields."""

    tau: int = 1
    """Steps between crafting a batch and training on it; >= 0, 0 is AdvProp."""
    radius: float = 4.0
    """Largest change of a pixel, in 1/255 of the raw range; with `embedding`, of an embedding's element. >= 0."""
    steps: int = 1
    """Gradient steps of the attack; >= 1."""
    step_size: float | None = None
    """Length of one, in the unit of radius; null: radius / steps. > 0."""
    mean: tuple[float, ...] = (0.0,)
    """Subtracted from raw pixels in [0, 1] to make model inputs, per channel or one for all."""
    std: tuple[float, ...] = (1.0,)
    """Divides them after that; > 0."""
    raw_low: float = 0.0
    """Least valid raw value."""
    raw_high: float = 1.0
    """Largest valid raw value; > raw_low."""
    targeted: bool = False
    """Towards a random wrong class (the released code), rather than away from the true one."""
    classes: int | None = None
    """Classes of the head, for targeted attacks where the trainer has no stream; >= 2."""
    random_start: float = 0.0
    """Probability that a batch's attack starts from uniform noise; in [0, 1]. The released code: 0.8."""
    first: Literal["clamp", "clean", "random"] = "clamp"
    """The first tau steps of a task: crafted with the first step's weights; no adversarial term; uniform noise."""
    weight_clean: float = 1.0
    """Weight of the clean term; >= 0."""
    weight_adversarial: float = 1.0
    """Weight of the adversarial term; >= 0, 0 switches the mixin off."""
    normalize: bool = False
    """Divide both by the sum of the weights in use; a clean part whose copy is missing or lost counts in full."""
    split_bn: bool = True
    """Give batch norms a second set of weights and statistics for the adversarial part."""
    one_forward: bool = False
    """Run both parts through the network as one batch: larger kernels, half the launches, half the gathers of sharded
    weights. For networks that treat each row for itself, but for split batch norms. Equal to two but for rounding and the
    noise of dropout."""
    embedding: str | None = None
    """Name of the embedding module to perturb, for inputs that are not floating point."""
    placement: Literal["inline", "stream", "process", "ranks"] = "inline"
    """Crafting inside the step (under DDP while gradients are reduced), on a CUDA stream, in a process beside each trainer,
    or on ranks of their own (`everbatch.train.adversarial.split_ranks`)."""
    adversary_device: str | None = None
    """placement="process": where it crafts; null: the trainer's device."""
    adversaries: int = 1
    """placement="ranks": how many of the last ranks craft; >= 1, at most half."""
    on_failure: Literal["clean", "inline", "stop"] = "stop"
    """When an adversary dies or is late: go on without its term, craft in the trainer, or end with an error."""
    patience_s: float = 60.0
    """Seconds without an answer until an adversary counts as lost; > 0."""
    adversary_threads: int = 1
    """placement="process": CPU threads of the adversary; >= 1."""

    def __post_init__(self) -> None:
        who = "ConAdv"
        check_whole(who, "tau", self.tau, 0)
        for name in ("steps", "adversaries", "adversary_threads"):
            check_whole(who, name, getattr(self, name), 1)
        for name in ("radius", "weight_clean", "weight_adversarial"):
            check_real(who, name, getattr(self, name), 0.0)
        check_real(who, "random_start", self.random_start, 0.0, 1.0)
        check_real(who, "patience_s", self.patience_s, 0.0, open_low=True)
        if self.step_size is not None:
            check_real(who, "step_size", self.step_size, 0.0, open_low=True)
        for value in self.mean:
            check_real(who, "mean", value)
        for value in self.std:
            check_real(who, "std", value, 0.0, open_low=True)
        check(len(self.mean) == len(self.std) or 1 in (len(self.mean), len(self.std)), who,
              f"mean={self.mean!r} and std={self.std!r}", "have as many channels")
        check_real(who, "raw_low", self.raw_low)
        check_real(who, "raw_high", self.raw_high)
        check(self.raw_low < self.raw_high, who, f"raw_low={self.raw_low!r}, raw_high={self.raw_high!r}", "ascend")
        check(self.weight_clean + self.weight_adversarial > 0, who, "weight_clean=0, weight_adversarial=0", "not both be 0")
        if self.classes is not None:
            check_whole(who, "classes", self.classes, 2)
        check(self.first != "random" or self.embedding is None, who, "first='random' with embedding",
              "be clamp or clean")
        for name, allowed in (("first", ("clamp", "clean", "random")), ("on_failure", ("clean", "inline", "stop")),
                              ("placement", ("inline", "stream", "process", "ranks"))):
            value = getattr(self, name)
            check(value in allowed, who, f"{name}={value!r}", f"be {', '.join(allowed[:-1])} or {allowed[-1]}")
