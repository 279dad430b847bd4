"""Shrink and perturb: warm starts that generalise like fresh ones."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from everbatch import seeds
from everbatch.contract import base_of, parts_of
from everbatch.distributed import World
from everbatch.engines.shards import Shard, Vector
from everbatch.errors import check, check_real, nearest
from everbatch.optim.ema import EMA
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.restart.fresh import digest, fresh_model, normalisers, redraw, without_initialiser

__all__ = ["ShrinkPerturb", "mix"]

Which = Callable[[str, tuple[int, ...]], bool]

MOMENT_POWERS = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
"""moments="scale": a moment that is linear in the gradient takes the factor once, a quadratic one twice."""
SCALABLE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)
"""Base optimizers whose moments all stand in MOMENT_POWERS."""


def mix(old: Tensor, noise: Tensor | None, shrink: float, scale: float) -> Tensor:
    """shrink * old + scale * noise, a new tensor shaped like `old`; a factor of one or a scale of zero leaves every bit.

    Args:
        old: any shape, floating point.
        noise: as many elements, any shape; None where scale is 0.
    """
    new = old.clone() if shrink == 1.0 else old * shrink
    if scale and noise is not None:  # adding zero would turn -0.0 into 0.0
        new.add_(noise.to(new).view(new.shape), alpha=scale)
    return new


class ShrinkPerturb(OptimizerMixin):
    """Shrink the weights towards zero and add noise, when new data arrive; a call, not part of the step.

        fresh_init:  theta <- shrink * theta + perturb * theta_fresh     theta_fresh: a new draw of the initialiser
        gaussian:    theta <- shrink * theta + sigma * n                 n ~ N(0, 1)

    shrink=0, perturb=1 is a fresh start; shrink=1, perturb=0 a plain warm start. The noise is a function of (seed, round, name,
    position): the same at any world size, ZeRO stage and sharding. It is written to masters and working copies, and the
    caller's random streams are unchanged. Frozen parameters are skipped, tied ones moved once. Averages that `EMA` keeps take
    the same map with the same noise. What `displacement` filters is respected: noise falls only inside the masks of
    DynamicSparsity, and entries that it freezes stay. Anchors of EWC, SI and MAS stay where they are.

    Args (Config): see the fields.

    Raises:
        ValueError: a value out of range; sigma with fresh_init or perturb with gaussian; a module without an initialiser; a
            pattern that fits no parameter; a factory of another model, or one that draws differently on some rank; weights
            that differ between replicas.
        RuntimeError: the call inside a step.

    Cost of a call: one pass over the owned masters, one whole fresh model on each rank's CPU, one publication, two gathers of
    a hash. Nothing per step.
    Order: any.
    Limits: moments="scale" knows SGD, Adam, AdamW, NAdam and RAdam. Without a factory, the initialiser is what
    `reset_parameters` of each module draws, which is not what a model draws whose constructor then initialises anew.
    Source: Ash and Adams 2020, arXiv 1910.08475, and the authors' code, whose form (a fresh initialisation scaled; BatchNorm
    scales become shrink * gamma + perturb, statistics and optimizer state are reset) is the default. The optax port's schedule
    (every n steps) never fires at the commit read; for one that does see `everbatch.train.WarmStart`.
    """

    minimizes = False
    example = {"noise": "gaussian", "sigma": 0.05, "shrink": 0.8, "factory": None}
    off = {"noise": "gaussian", "sigma": 0.0, "shrink": 1.0, "moments": "keep", "factory": None}
    search = {"shrink": (0.5, 0.3, 0.7, 0.9)}
    call = "shrink_perturb"
    called_by = "warm_start"
    between_tasks = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        shrink: float = 0.4
        """Factor on the old weights; in [0, 1]."""
        perturb: float | None = None
        """Factor on the fresh initialisation (noise="fresh_init"); >= 0, by default 0.1."""
        noise: Literal["fresh_init", "gaussian"] = "fresh_init"
        """A new draw of the model's initialiser, or white noise."""
        sigma: float | None = None
        """Standard deviation of the white noise (noise="gaussian"); >= 0, by default 0.01."""
        factory: Callable[[], nn.Module] | None = None
        """Builds the bare model anew, drawing from torch's global stream; by default each module's `reset_parameters` draws."""
        fallback_sigma: float | None = None
        """Without a factory: standard deviation of white noise for modules that have no `reset_parameters`; None refuses them."""
        tensors: Literal["all", "weights"] | tuple[str, ...] | Which = "all"
        """Which trained parameters: all; weights (two dimensions or more); name patterns ("*", "?"); or a function of (name,
        shape)."""
        norm_params: Literal["reference", "skip", "reset"] = "reference"
        """Scales and shifts of normalisation layers, where chosen: the rule, as they are, or as new."""
        buffers: Literal["reset", "keep"] = "reset"
        """Running statistics of normalisation layers. Kept ones no longer fit: see `everbatch.nn.bn_recalibrate`."""
        moments: Literal["reset", "keep", "scale"] = "reset"
        """State of the base optimizer: dropped, kept, or multiplied by shrink (squares: shrink^2; a heuristic)."""

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
            """Functions by name, not by address: the text is the same on every rank and in a resumed run."""
            shown = {f.name: getattr(self, f.name) for f in fields(self)}
            texts = {n: getattr(v, "__qualname__", type(v).__name__) if callable(v) else repr(v) for n, v in shown.items()}
            return f"ShrinkPerturb.Config({', '.join(f'{n}={t}' for n, t in texts.items())})"

        @property
        def scale(self) -> float:
            """Factor on the noise."""
            given, usual = (self.perturb, 0.1) if self.noise == "fresh_init" else (self.sigma, 0.01)
            return usual if given is None else given

    @dataclass
    class State:
        round: int = 0
        """Calls so far; part of the key of the noise."""
        drawn: str = ""
        """Hash of the last fresh initialisation."""

    def on_attach(self) -> None:
        """Refuse what the call could not do, before any training."""
        config: ShrinkPerturb.Config = self.configs[ShrinkPerturb]
        who, module = "ShrinkPerturb", self.host.module
        base = base_of(type(self))
        assert base is not None
        check(config.moments != "scale" or issubclass(base, SCALABLE), who, f"moments='scale' with {base.__name__}",
              f"be over {', '.join(b.__name__ for b in SCALABLE)}", "use moments='reset' or 'keep'")
        needs = [text for text, needed in (
            ("buffers='reset'", config.buffers == "reset"),
            (f"norm_params={config.norm_params!r}", config.norm_params != "reference"),
            ("noise='fresh_init' without a factory", config.noise == "fresh_init" and config.factory is None)) if needed]
        check(not needs or module is not None, who, "parameters without their module", f"get the module for {', '.join(needs)}",
              "pass the module as the first argument, or buffers='keep', norm_params='reference', a factory or noise='gaussian'")
        if module is not None and config.noise == "fresh_init" and config.factory is None and config.fallback_sigma is None:
            odd = list(without_initialiser(module))
            check(not odd, who, f"no factory, and modules {odd[:3]} have no reset_parameters()", "have one",
                  "pass factory=lambda: make_model(), fallback_sigma=0.01 for white noise there, or noise='gaussian'")
        self.__chosen()

    @torch.no_grad()
    def shrink_perturb(self) -> None:
        """Apply the rule once, between two steps. Collective."""
        if self._objective is not None:
            raise RuntimeError("ShrinkPerturb: called inside a step, must be called between steps; weights would move under a "
                               "gradient that is being accumulated")
        config, state = self.configs[ShrinkPerturb], self.states[ShrinkPerturb]
        images = self.__images(self.__chosen())
        shards = [s for s in self.host.shards if s.name in images]
        old = [s.data for s in shards]
        _write(old, self.__filtered(shards, old, [images[s.name](s.data) for s in shards]))
        average = self.states[EMA].average if EMA in self.states else {}
        kept = [s for s in shards if s.name in average]
        old = [average[s.name] for s in kept]
        _write(old, self.__filtered(kept, old, [images[s.name](average[s.name]) for s in kept]))
        if config.buffers == "reset":
            assert self.host.module is not None  # on_attach
            for part in self.host.module.modules():
                if callable(getattr(part, "reset_running_stats", None)):
                    part.reset_running_stats()  # type: ignore[operator]
        self.__transform_moments()
        state.round += 1
        self.host.touch()
        self.host.publish_if_dirty()
        if self.__together and not self.host.sharded:
            World.current().require_same("ShrinkPerturb: hash of the weights after the call",
                                         digest({s.name: s.data for s in self.host.shards}))

    @property
    def __together(self) -> bool:
        """Whether other ranks make this call as well: a plain host may be one rank's own."""
        return self.host.world > 1 and self.host.title != "plain"

    def __chosen(self) -> dict[str, bool]:
        """Parameters that the call changes: name to whether it is set as new rather than mixed."""
        config: ShrinkPerturb.Config = self.configs[ShrinkPerturb]
        shapes = {n: tuple(shape) for n, (dtype, shape) in self.host.master_layout().items() if dtype.is_floating_point}
        which: Any = config.tensors
        if which == "all":
            names = list(shapes)
        elif which == "weights":
            names = [n for n, shape in shapes.items() if len(shape) >= 2]
        elif callable(which):
            names = [n for n, shape in shapes.items() if which(n, shape)]
        else:
            for pattern in which:
                check(any(fnmatch.fnmatchcase(n, pattern) for n in shapes), "ShrinkPerturb", f"tensors has {pattern!r}",
                      "fit the name of a trained parameter", nearest(pattern, shapes))
            names = [n for n in shapes if any(fnmatch.fnmatchcase(n, pattern) for pattern in which)]
        norms = normalisers(self.host.module) if self.host.module is not None and config.norm_params != "reference" else {}
        if config.norm_params == "reset" and config.factory is None and self.host.module is not None:
            bare = {n for found in without_initialiser(self.host.module).values() for n in found}
            odd = [n for n in names if norms.get(n, "weight") not in ("weight", "bias")
                   and (config.noise == "gaussian" or n in bare)]
            check(not odd, "ShrinkPerturb", f"norm_params='reset' with {odd[:3]}", "know their fresh values", "pass factory=")
        return {n: n in norms for n in names if config.norm_params != "skip" or n not in norms}

    def __images(self, chosen: dict[str, bool]) -> dict[str, Callable[[Tensor], Tensor]]:
        """The map of each owned slice, by name. Draws; touches nothing but the hash in the state."""
        config: ShrinkPerturb.Config = self.configs[ShrinkPerturb]
        scales = dict.fromkeys(chosen, config.scale)
        fresh = self.__draw() if any(chosen.values()) or (config.noise == "fresh_init" and config.scale) else {}
        if config.noise == "fresh_init" and config.factory is None and self.host.module is not None:
            bare = [n for names in without_initialiser(self.host.module).values() for n in names]
            scales |= {n: config.fallback_sigma or 0.0 for n in bare if n in chosen}
        norms = normalisers(self.host.module) if self.host.module is not None else {}
        result: dict[str, Callable[[Tensor], Tensor]] = {}
        for shard in self.host.shards:
            name, new = shard.name, fresh.get(shard.name)
            if name not in chosen:
                continue
            values = None if new is None else new.reshape(-1)[shard.start : shard.start + shard.numel].clone()
            if chosen[name]:
                if values is None:  # white noise without a factory: torch's convention
                    values = torch.full((shard.numel,), 1.0 if norms[name] == "weight" else 0.0)
                result[name] = lambda old, v=values: v.to(old).view(old.shape)  # type: ignore[misc]
                continue
            if scales[name] and (config.noise == "gaussian" or values is None):
                key = (self.seed, "shrink_perturb", self.states[ShrinkPerturb].round, name)
                values = seeds.normal(key, shard.start, shard.numel)
            result[name] = lambda old, v=values, s=scales[name]: mix(old, v, config.shrink, s)  # type: ignore[misc]
        return result

    def __draw(self) -> dict[str, Tensor]:
        """A fresh initialisation, whole, by name; proved to be the same on every rank."""
        config, state = self.configs[ShrinkPerturb], self.states[ShrinkPerturb]
        key, layout = (self.seed, "shrink_perturb", state.round), self.host.master_layout()
        if config.factory is not None:
            draws = {n: p.detach() for n, p in fresh_model(config.factory, *key).named_parameters()}
            missing = [n for n in layout if n not in draws]
            check(not missing, "ShrinkPerturb", f"the factory's model lacks parameters {missing[:3]}", "be the same model")
            odd = [n for n, (_, shape) in layout.items() if draws[n].shape != shape]
            check(not odd, "ShrinkPerturb", f"the factory's model has other shapes of {odd[:3]}", "be the same model")
        elif config.noise == "fresh_init":
            assert self.host.module is not None  # on_attach
            draws = redraw(self.host.module, layout, *key)
        else:
            return {}
        drawn = digest(draws)
        if self.__together:
            World.current().require_same("ShrinkPerturb: hash of the fresh initialisation", drawn)
        if drawn == state.drawn and self.host.rank == 0:
            warnings.warn("ShrinkPerturb: the factory gave the same weights as in the round before, so the noise repeats; let "
                          "it draw from torch's global stream, without a seed of its own", stacklevel=4)
        state.drawn = drawn
        return draws

    def __filtered(self, shards: list[Shard], old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
        """New values after `displacement` has seen the change: masked and frozen entries stay as they are."""
        if not any("displacement" in vars(part) for part in parts_of(type(self))):
            return new
        change = [n - o for n, o in zip(new, old, strict=True)]
        allowed = self.displacement(Vector(self.host, shards, [c.clone() for c in change]))
        return [torch.where(a == c, n, o + a) for a, c, n, o in zip(allowed.tensors, change, new, old, strict=True)]

    def __transform_moments(self) -> None:
        config: ShrinkPerturb.Config = self.configs[ShrinkPerturb]
        if config.moments == "reset":
            self.host.reset_moments()
        elif config.moments == "scale":
            for shard in self.host.shards:
                for name, value in shard.moments.items():
                    value.mul_(config.shrink ** MOMENT_POWERS[name])


def _write(old: list[Tensor], new: list[Tensor]) -> None:
    for o, n in zip(old, new, strict=True):
        o.copy_(n)
