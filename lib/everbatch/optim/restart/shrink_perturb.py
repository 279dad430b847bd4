"""Shrink and perturb: warm starts that generalise like fresh ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from everbatch.contract import base_of, parts_of
from everbatch.distributed import World
from everbatch.engines.shards import Shard, Vector
from everbatch.errors import check
from everbatch.optim.ema import EMA
from everbatch.optim.mixin import OptimizerMixin
from everbatch.optim.restart.fresh import digest, fresh_model, redraw, without_initialiser
from everbatch.optim.restart.images import chosen, images
from everbatch.optim.restart.options import Options

__all__ = ["ShrinkPerturb"]

MOMENT_POWERS = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
"""moments="scale": a moment that is linear in the gradient takes the factor once, a quadratic one
twice."""
SCALABLE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)
"""Base optimizers whose moments all stand in MOMENT_POWERS."""


class ShrinkPerturb(OptimizerMixin):
    """Shrink the weights towards zero and add noise, when new data arrive; a call, not part of the
    step.

        fresh_init:  theta <- shrink * theta + perturb * theta_fresh     theta_fresh: a new draw of the initialiser
        gaussian:    theta <- shrink * theta + sigma * n                 n ~ N(0, 1)

    shrink=0, perturb=1 is a fresh start; shrink=1, perturb=0 a plain warm start. The noise is a
    function of (seed, round, name, position): the same at any world size, ZeRO stage and sharding.
    It is written to masters and working copies, and the caller's random streams are unchanged.
    Frozen parameters are skipped, tied ones moved once. Averages that `EMA` keeps take the same map
    with the same noise. What `displacement` filters is respected: noise falls only inside the masks
    of DynamicSparsity, and entries that it freezes stay. Anchors of EWC, SI and MAS stay where they
    are.

    Args (Config): see the fields.

    Raises:
        ValueError: a value out of range; sigma with fresh_init or perturb with gaussian; a module
            without an initialiser; a pattern that fits no parameter; a factory of another model, or
            one that draws differently on some rank; weights that differ between replicas.
        RuntimeError: the call inside a step.

    Cost of a call: one pass over the owned masters, one whole fresh model on each rank's CPU, one
    publication, two gathers of a hash. Nothing per step.
    Order: any.
    Limits: moments="scale" knows SGD, Adam, AdamW, NAdam and RAdam. Without a factory, the
    initialiser is what `reset_parameters` of each module draws, which is not what a model draws
    whose constructor then initialises anew.
    Source: Ash and Adams 2020, arXiv 1910.08475, and the authors' code, whose form (a fresh
    initialisation scaled; BatchNorm scales become shrink * gamma + perturb, statistics and
    optimizer state are reset) is the default. The optax port's schedule (every n steps) never fires
    at the commit read; for one that does see `everbatch.train.WarmStart`.
    """

    minimizes = False
    example = {"noise": "gaussian", "sigma": 0.05, "shrink": 0.8, "factory": None}
    off = {"noise": "gaussian", "sigma": 0.0, "shrink": 1.0, "moments": "keep", "factory": None}
    search = {"shrink": (0.5, 0.3, 0.7, 0.9)}
    call = "shrink_perturb"
    called_by = "warm_start"
    between_tasks = True

    @dataclass(frozen=True, kw_only=True, repr=False)
    class Config(Options):
        __doc__ = Options.__doc__

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
        chosen(config, self.host)

    @torch.no_grad()
    def shrink_perturb(self) -> None:
        """Apply the rule once, between two steps. Collective."""
        if self._objective is not None:
            raise RuntimeError("ShrinkPerturb: called inside a step, must be called between steps; weights would move under a "
                               "gradient that is being accumulated")
        config: ShrinkPerturb.Config = self.configs[ShrinkPerturb]
        state: ShrinkPerturb.State = self.states[ShrinkPerturb]
        names = chosen(config, self.host)
        key = (self.seed, "shrink_perturb", state.round)
        wanted = any(names.values()) or (config.noise == "fresh_init" and config.scale)
        maps = images(config, self.host, names, self.__draw(key) if wanted else {}, key)

        shards = [shard for shard in self.host.shards if shard.name in maps]
        self.__move(shards, [shard.data for shard in shards], maps)
        average = self.states[EMA].average if EMA in self.states else {}
        kept = [shard for shard in shards if shard.name in average]
        self.__move(kept, [average[shard.name] for shard in kept], maps)

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

    def __draw(self, key: tuple[int | str, ...]) -> dict[str, Tensor]:
        """A fresh initialisation, whole, by name, proved to be the same on every rank; empty where
        nothing gives one."""
        config, state = self.configs[ShrinkPerturb], self.states[ShrinkPerturb]
        layout = self.host.master_layout()
        if config.factory is not None:
            model = fresh_model(config.factory, *key)
            draws = {name: p.detach() for name, p in model.named_parameters()}
            missing = [name for name in layout if name not in draws]
            check(not missing, "ShrinkPerturb", f"the factory's model lacks parameters {missing[:3]}", "be the same model")
            odd = [name for name, (_, shape) in layout.items() if draws[name].shape != shape]
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

    def __move(self, shards: list[Shard], old: list[Tensor], maps: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        """Map these tensors in place, so far as `displacement` lets them: masked and frozen entries
        stay as they are."""
        new = [maps[shard.name](o) for shard, o in zip(shards, old, strict=True)]
        if any("displacement" in vars(part) for part in parts_of(type(self))):
            change = [n - o for n, o in zip(new, old, strict=True)]
            allowed = self.displacement(Vector(self.host, shards, [c.clone() for c in change]))
            moved = zip(allowed.tensors, change, new, old, strict=True)
            new = [torch.where(a == c, n, o + a) for a, c, n, o in moved]
        for o, n in zip(old, new, strict=True):
            o.copy_(n)

    def __transform_moments(self) -> None:
        config: ShrinkPerturb.Config = self.configs[ShrinkPerturb]
        if config.moments == "reset":
            self.host.reset_moments()
        elif config.moments == "scale":
            for shard in self.host.shards:
                for name, value in shard.moments.items():
                    value.mul_(config.shrink ** MOMENT_POWERS[name])
