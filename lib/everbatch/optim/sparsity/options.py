"""What `DynamicSparsity` is told, and what it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from everbatch.engines.named import ByName
from everbatch.errors import check, check_real
from everbatch.optim.sparsity import topology
from everbatch.optim.sparsity.grow import CRITERIA as GROW
from everbatch.optim.sparsity.prune import CRITERIA as PRUNE
from everbatch.optim.sparsity.schedule import Schedule

__all__ = ["WHO", "Kept", "Options"]

WHO = "DynamicSparsity"

CHOICES = {
    "distribution": ("erk", "er", "uniform"), "prune": PRUNE, "grow": GROW,
    "redistribute": ("layer", "survivors", "momentum", "global"),
    "anneal": ("auto", "cosine", "linear", "constant"), "topology_step": ("auto", "instead", "after"),
    "newborn": ("layer_mean_v", "zero"), "fresh_init": ("initializer", "zeros"),
    "grow_into_used": ("allow", "forbid", "prefer"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `DynamicSparsity`."""

    density: float = 0.1
    """Share of the maskable weights that is active, over all layers; in (0, 1], 1 switches sparsity
    off."""
    distribution: Literal["erk", "er", "uniform"] = "erk"
    """How the density differs between layers."""
    densities: Mapping[str, float] = field(default_factory=dict)
    """Density of single layers, by name or pattern; in (0, 1]. The others share `density` among
    themselves."""
    erk_power: float = 1.0
    """Exponent of the Erdos-Renyi raw densities; > 0."""
    first_dense: bool = False
    """Keep the first layer dense ("uniform" only; RigL's uniform does)."""
    include: tuple[str, ...] = ()
    """Patterns of parameter names to mask; empty: weights of linear and convolution layers."""
    exclude: tuple[str, ...] = ()
    """Patterns of parameter names that stay dense."""
    min_fan_in: bool = False
    """Give every output row at least one weight at the start."""
    bernoulli: bool = False
    """Draw first masks, and random growth, entry by entry: counts vary, as in the ITOP and CL-DST
    code."""
    prune: Literal["magnitude", "set", "taylor", "soft", "momentum"] = "magnitude"
    """What marks a weight as unimportant."""
    grow: Literal["gradient", "random", "momentum", "random_unfired"] = "gradient"
    """What marks an inactive entry as promising."""
    global_threshold: bool = False
    """Prune by one threshold over all layers instead of one per layer."""
    redistribute: Literal["layer", "survivors", "momentum", "global"] = "layer"
    """Where pruned weights grow again: in their layer, in proportion to what is left (DSR) or to
    the mean momentum (SNFS), or wherever the growth score is largest."""
    update_every: int = 100
    """Steps between two changes of topology; >= 1."""
    drop_fraction: float = 0.3
    """Share of the active weights that the first changes drop; in [0, 1], 0 for a mask that
    stays."""
    drop_floor: float = 0.0
    """What the share falls to; in [0, 1] (ITOP: .005)."""
    anneal: Literal["auto", "cosine", "linear", "constant"] = "auto"
    """How the share falls; auto: cosine if `total_steps` is known, else constant."""
    total_steps: int | None = None
    """Steps of the run, or of a task; None: unknown, topology never stops changing."""
    stop_fraction: float = 0.75
    """Share of `total_steps` after which the topology stays; in [0, 1]."""
    begin_step: int = 0
    """No change up to this step; >= 0."""
    score_steps: int = 1
    """Gradients averaged for growth, the last ones before a change; in [1, update_every)."""
    topology_step: Literal["auto", "instead", "after"] = "auto"
    """Whether a change replaces the optimizer's update or follows it; auto: instead for
    grow="gradient" (RigL)."""
    as_released: bool = False
    """Do as the ITOP and CL-DST code: drop ceil(zeta n) and, by magnitude, every weight that ties
    with the threshold; let active entries take growth's places where too few have a gradient;
    frozen weights have none, and those that growth activates train as zero, but have their stored
    value in prediction. Counts drift."""
    gradient_decay: float = 0.9
    """Decay of the mean dense gradient (momentum criteria); in [0, 1)."""
    newborn: Literal["layer_mean_v", "zero"] = "layer_mean_v"
    """Adam's second moment of a new weight: the mean over its layer, or zero."""
    dense_moments: bool = False
    """Let moments see the dense gradient and survive changes, as the CL-DST code does with Adam;
    costs one more pass over the weights per step."""
    fresh_init: Literal["initializer", "zeros"] = "initializer"
    """Never used weights at the start of a later task: U(-1, 1) / sqrt(fan in), torch's default, or
    zeros."""
    grow_into_used: Literal["allow", "forbid", "prefer"] = "allow"
    """Whether a task may use (frozen) weights of earlier ones: by score, never, before all
    others."""
    per_task_params: bool = True
    """Keep biases, norms and running statistics per task; without it later tasks change what
    earlier ones compute."""
    reset_moments: bool = True
    """Start every task with fresh optimizer state."""

    def __post_init__(self) -> None:
        check_real(WHO, "density", self.density, 0.0, 1.0, open_low=True, cure="pass density=1 to switch sparsity off")
        check_real(WHO, "erk_power", self.erk_power, 0.0, open_low=True)
        check_real(WHO, "gradient_decay", self.gradient_decay, 0.0, 1.0, open_high=True)
        for name, value in self.densities.items():
            check_real(WHO, f"densities[{name!r}]", value, 0.0, 1.0, open_low=True)
        for name, choices in CHOICES.items():
            check(getattr(self, name) in choices, WHO, f"{name}={getattr(self, name)!r}", f"be one of {', '.join(choices)}")
        check(not self.as_released or self.grow_into_used == "allow", WHO, f"grow_into_used={self.grow_into_used!r}",
              "be 'allow' with as_released=True")
        self.schedule(self.total_steps)

    def schedule(self, total: int | None) -> Schedule:
        """The schedule for a task of so many steps."""
        anneal = self.anneal if self.anneal != "auto" else "constant" if total is None else "cosine"
        return Schedule(interval=self.update_every, start=self.drop_fraction, anneal=anneal, floor=self.drop_floor,
                        total=total, begin=self.begin_step, stop=self.stop_fraction, score_steps=self.score_steps)

    @property
    def rules(self) -> topology.Rules:
        """How a change is made."""
        return topology.Rules(self.prune, self.grow, self.global_threshold, self.redistribute, self.as_released,
                              self.bernoulli, self.grow_into_used)

    @property
    def gradients(self) -> bool:
        """Whether a change needs the dense gradient of single steps."""
        return self.grow == "gradient" or self.prune in ("taylor", "soft")

    @property
    def averages(self) -> bool:
        """Whether a mean of dense gradients is kept."""
        return "momentum" in (self.prune, self.grow, self.redistribute)


@dataclass
class Kept:
    """What `DynamicSparsity` remembers, and checkpoints hold."""

    masks: ByName = field(default_factory=ByName)
    fired: ByName = field(default_factory=ByName)
    """Entries active at any time since the task began (random_unfired)."""
    scores: ByName = field(default_factory=ByName)
    """Sum of the dense gradients that count for the next change (score_steps > 1)."""
    averages: ByName = field(default_factory=ByName)
    """Running mean of the dense gradient (momentum criteria)."""
    active: dict[str, int] = field(default_factory=dict)
    """Active entries of each whole layer."""
    changes: int = 0
    task: int = 0
    """The open task, counted from 1; 0: none."""
    task_start: int = 0
    """Steps taken before the task began."""
    task_steps: int | None = None
    """Steps of the task, where they are known better than in the configuration."""
    done: int = 0
    """Tasks that ended."""
    store: ByName = field(default_factory=ByName)
    """Values of the weights that ended tasks use."""
    task_masks: list[ByName] = field(default_factory=list)
    saved: dict[str, Any] = field(default_factory=dict)
    """Per ended task: parameters that are not masked, and buffers."""
    checksums: dict[str, int] = field(default_factory=dict)
    """Of the stored values that ended tasks use, by layer."""
    best_score: float | None = None
    best_masks: ByName = field(default_factory=ByName)
    best_weights: ByName = field(default_factory=ByName)
    best_buffers: dict[str, Any] = field(default_factory=dict)
