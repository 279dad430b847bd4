"""The options of SAME."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from everbatch.errors import check, check_real, check_whole
from everbatch.nn.experts import check_options
from everbatch.train.same.moments import EXACT_WIDTH

__all__ = ["SAMEOptions"]


@dataclass(frozen=True, kw_only=True)
class SAMEOptions:
    """See the fields; `SAME.Config` has them."""

    layers: tuple[str, ...] = ("*.mlp.fc1",)
    """Patterns of the linear layers that get experts: "*.mlp.fc1" of timm's vision transformers, "*.mlp.up_proj" of Hugging
    Face's decoders. Empty: no experts, and everything else here is off."""
    trained: tuple[str, ...] = ("head.*",)
    """Patterns of parameters that are trained beside routers and experts; all others are frozen."""
    experts: int = 4
    """Per layer; >= 1."""
    rank: int = 4
    """Of each expert; >= 1, at most the width of the layer's inputs."""
    alpha: float | None = None
    """Experts are scaled by alpha / (experts * rank); null: by 2."""
    top_k: int | None = None
    """Weights kept per token, renormalised; null: all."""
    routing: Literal["token", "sample"] = "token"
    """Whether each token is weighed for itself, or all of a sample alike."""
    heads: Literal["joint", "by_task"] = "joint"
    """Whether the stream's loss is over all classes, or over the task's own, as where the task is known at test time."""
    router: Literal["soft", "null", "paper", "free"] = "soft"
    """null: no change of old tokens' routing. soft: little. paper: as printed, which protects nothing. free: no rule."""
    delta: float = 0.95
    """Share of the energy of a layer's old inputs that is protected; in (0, 1]."""
    power: float = 1.0
    """Energy of a direction is its eigenvalue to this power; > 0. 1: share of the trace. 2, the paper's, keeps far fewer."""
    pinned: bool = False
    """router=null: raise where delta leaves fewer than min_free directions, in place of lowering it."""
    min_free: int | None = None
    """router=null: directions that stay free; >= 0, null: a sixteenth of the width, at least 1."""
    window: int = 3
    """router=paper: eigenvalues in a trailing mean; >= 1."""
    start_step: int = 10
    """router=paper: steps of a task before the rule acts; >= 0."""
    refresh: int = 50
    """router=paper: steps between decompositions; >= 1."""
    curvature: bool = True
    """Shrink what an expert learns along directions of old inputs."""
    mu_rel: float = 0.01
    """Of soft and curvature: mu as a share of the mean eigenvalue; > 0. Smaller protects more."""
    space: Literal["update", "grad"] = "update"
    """What is mapped: updates, exact for any optimizer, or gradients, for plain SGD alone."""
    tau: float = 0.1
    """Experts with a score below rest for the task; in [-1, 1], -1: none does. Use and importance follow from the same weights,
    so that scores are near 0: at 0.1, the paper's, mostly all but min_active rest."""
    warmup_tokens: int = 2000
    """Tokens of a task, over all ranks, before it is decided which rest; >= 1."""
    decide_every: int = 0
    """Steps between further decisions in a task; >= 0, 0: it is decided once."""
    action: Literal["grad", "mask"] = "grad"
    """Whether a resting expert still computes and learns nothing, or is also left out of the routing in the task's steps."""
    min_active: int | None = None
    """Experts of a layer that never rest together; >= 1, null: a quarter, at least 1."""
    every: int = 0
    """Steps between those whose tokens are summed up; >= 0, 0: 1 to width 1024, 10 above."""
    wide_rank: int = 128
    """Directions at most of a layer wider than 1024, from a sketch; >= 1."""
    statistics: Literal["float32", "float64"] = "float32"
    """Precision of the sums."""
    mask: str = "attention_mask"
    """Name of the input, where inputs have names, that is 0 at tokens that are padding."""
    probes: int = 64
    """Tokens per layer and task that are kept, to measure how their routing drifts; >= 1."""
    released: bool = False
    """What the released code does in place of the paper's equations, for comparison: it protects nothing."""

    def __post_init__(self) -> None:
        who = "SAME"
        for name in ("layers", "trained"):
            given = getattr(self, name)
            check(not isinstance(given, str), who, f"{name}={given!r}", "be a sequence of patterns")
        check_options(self.experts, self.rank, self.alpha, self.top_k, self.routing, who, ("experts", "rank"))
        for name, words in (("router", ("soft", "null", "paper", "free")), ("space", ("update", "grad")),
                            ("action", ("grad", "mask")), ("routing", ("token", "sample")), ("heads", ("joint", "by_task")),
                            ("statistics", ("float32", "float64"))):
            check(getattr(self, name) in words, who, f"{name}={getattr(self, name)!r}", f"be one of {', '.join(words)}")
        check_real(who, "delta", self.delta, 0.0, 1.0, open_low=True)
        check_real(who, "power", self.power, 0.0, open_low=True)
        check_real(who, "mu_rel", self.mu_rel, 0.0, open_low=True)
        check_real(who, "tau", self.tau, -1.0, 1.0)
        for name, least in (("window", 1), ("start_step", 0), ("refresh", 1), ("warmup_tokens", 1), ("decide_every", 0),
                            ("every", 0), ("wide_rank", 1), ("probes", 1)):
            check_whole(who, name, getattr(self, name), least)
        if self.min_free is not None:
            check_whole(who, "min_free", self.min_free, 0)
        if self.min_active is not None:
            check_whole(who, "min_active", self.min_active, 1, self.experts)
        check(not self.released or self.space == "grad", who, f"released=True in space={self.space!r}", "be in space='grad'",
              "the released code maps gradients")

    @property
    def least_active(self) -> int:
        """Experts of a layer that stay active."""
        return self.min_active or max(1, self.experts // 4)

    def promise(self, widths: Sequence[int]) -> str:
        """Which holds, of layers of these widths."""
        if not widths:
            return "no layers: off"
        if self.released:
            return f"{len(widths)} layers as the released code has them: nothing is promised"
        kept = {"null": "router logits of old inputs in the kept span do not move", "soft": "router logits of old inputs move "
                "little", "paper": "no promise of the router", "free": "no rule for the router"}[self.router]
        if self.space == "grad":
            kept += ", for plain SGD without decay alone (space='grad')"
        wide = sum(width > EXACT_WIDTH for width in widths)
        parts = [f"{len(widths) - wide} layers by exact eigenvectors, to a share of {self.delta:g}"] if wide < len(widths) else []
        if wide:
            parts.append(f"{wide} wider than {EXACT_WIDTH}, to the share that a sketch of rank {self.wide_rank} keeps")
        return f"{kept}; {', '.join(parts)}"
