"""What `ShrinkPerturb` is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from torch import nn

from everbatch.errors import check, check_real

__all__ = ["Options", "Which"]

Which = Callable[[str, tuple[int, ...]], bool]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `ShrinkPerturb`."""

    shrink: float = 0.4
    """Factor on the old weights; in [0, 1]."""
    perturb: float | None = None
    """Factor on the fresh initialisation (noise="fresh_init"); >= 0, by default 0.1."""
    noise: Literal["fresh_init", "gaussian"] = "fresh_init"
    """A new draw of the model's initialiser, or white noise."""
    sigma: float | None = None
    """Standard deviation of the white noise (noise="gaussian"); >= 0, by default 0.01."""
    factory: Callable[[], nn.Module] | None = None
    """Builds the bare model anew, drawing from torch's global stream; by default each module's
    `reset_parameters` draws."""
    fallback_sigma: float | None = None
    """Without a factory: standard deviation of white noise for modules that have no
    `reset_parameters`; None refuses them."""
    tensors: Literal["all", "weights"] | tuple[str, ...] | Which = "all"
    """Which trained parameters: all; weights (two dimensions or more); name patterns ("*", "?"); or
    a function of (name, shape)."""
    norm_params: Literal["reference", "skip", "reset"] = "reference"
    """Scales and shifts of normalisation layers, where chosen: the rule, as they are, or as new."""
    buffers: Literal["reset", "keep"] = "reset"
    """Running statistics of normalisation layers. Kept ones no longer fit: see
    `everbatch.nn.bn_recalibrate`."""
    moments: Literal["reset", "keep", "scale"] = "reset"
    """State of the base optimizer: dropped, kept, or multiplied by shrink (squares: shrink^2; a
    heuristic)."""

    def __post_init__(self) -> None:
        who, fresh = "ShrinkPerturb", self.noise == "fresh_init"
        check(self.noise in ("fresh_init", "gaussian"), who, f"noise={self.noise!r}", "be 'fresh_init' or 'gaussian'")
        check_real(who, "shrink", self.shrink, 0.0, 1.0)
        for name in ("perturb", "sigma", "fallback_sigma"):
            if getattr(self, name) is not None:
                check_real(who, name, getattr(self, name), 0.0)
        check(fresh or self.perturb is None, who, f"perturb={self.perturb!r} with noise='gaussian'",
              "be left out", "set sigma, or noise='fresh_init'")
        check(not fresh or self.sigma is None, who, f"sigma={self.sigma!r} with noise='fresh_init'",
              "be left out", "set perturb, or noise='gaussian'")
        check(self.factory is None or callable(self.factory), who, f"factory={self.factory!r}", "be a function",
              "pass factory=lambda: make_model()")
        named = isinstance(self.tensors, tuple | list) and bool(self.tensors) and all(
            isinstance(t, str) for t in self.tensors)
        check(named or callable(self.tensors) or self.tensors in ("all", "weights"), who, f"tensors={self.tensors!r}",
              "be 'all', 'weights', name patterns, or a function of (name, shape)")
        for name, known in (("norm_params", ("reference", "skip", "reset")), ("buffers", ("reset", "keep")),
                            ("moments", ("reset", "keep", "scale"))):
            check(getattr(self, name) in known, who, f"{name}={getattr(self, name)!r}", f"be one of {known}")

    def __repr__(self) -> str:
        """Functions by name, not by address: the text is the same on every rank and in a resumed
        run."""
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        texts = {n: getattr(v, "__qualname__", type(v).__name__) if callable(v) else repr(v) for n, v in shown.items()}
        return f"ShrinkPerturb.Config({', '.join(f'{n}={t}' for n, t in texts.items())})"

    @property
    def scale(self) -> float:
        """Factor on the noise."""
        given, usual = (self.perturb, 0.1) if self.noise == "fresh_init" else (self.sigma, 0.01)
        return usual if given is None else given
