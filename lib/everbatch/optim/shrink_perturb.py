"""Shrink and perturb: warm starts that generalise like fresh ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from everbatch import seeds
from everbatch.errors import check, check_real
from everbatch.optim.hosts.base import plain_name
from everbatch.optim.mixin import OptimizerMixin

__all__ = ["ShrinkPerturb"]


class ShrinkPerturb(OptimizerMixin):
    """Shrink the weights towards zero and add noise, when new data arrive; a call, not part of the step.

        fresh_init:  theta <- shrink * theta + perturb * theta_fresh     theta_fresh: a new draw of the initialiser
        gaussian:    theta <- shrink * theta + sigma * n                 n ~ N(0, 1)

    Noise is a function of (seed, round, name, position): the same at any world size, ZeRO stage and sharding. It is written
    to masters and working copies. The caller's random streams are unchanged. Frozen and tied parameters: frozen ones are
    skipped, tied ones moved once.

    Args (Config): see the fields. Raises `ValueError` for shrink outside [0, 1], negative or non-finite noise.

    Cost of a call: one pass over the owned masters; one publication. Nothing per step.
    Order: any.
    Source: Ash and Adams 2020, arXiv 1910.08475, and the authors' code, whose form (a fresh initialisation scaled; statistics
    and optimizer state reset) is the default.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        shrink: float = 0.4
        """Factor on the old weights; in [0, 1]."""
        perturb: float = 0.1
        """Factor on the fresh initialisation (noise="fresh_init"); >= 0."""
        noise: Literal["fresh_init", "gaussian"] = "fresh_init"
        """A new draw of the model's initialiser, or white noise."""
        sigma: float = 0.01
        """Standard deviation of the white noise (noise="gaussian"); >= 0."""
        factory: Callable[[], nn.Module] | None = None
        """Builds the bare model anew, on the CPU; needed for noise="fresh_init"."""
        keep_moments: bool = False
        """Keep the base optimizer's state instead of dropping it."""

        def __post_init__(self) -> None:
            check_real("ShrinkPerturb", "shrink", self.shrink, 0.0, 1.0)
            check_real("ShrinkPerturb", "perturb", self.perturb, 0.0)
            check_real("ShrinkPerturb", "sigma", self.sigma, 0.0)
            check(self.noise in ("fresh_init", "gaussian"), "ShrinkPerturb", f"noise={self.noise!r}",
                  "be 'fresh_init' or 'gaussian'")
            check(self.noise == "gaussian" or callable(self.factory), "ShrinkPerturb", f"factory={self.factory!r}",
                  "build the model for noise='fresh_init'", "pass factory=lambda: make_model(), or noise='gaussian'")

    @dataclass
    class State:
        round: int = 0

    def on_attach(self) -> None:
        """Statistics are reset in the module itself, so it must be known."""
        check(self.configs[ShrinkPerturb].noise == "gaussian" or self.host.module is not None, "ShrinkPerturb",
              "parameters without their module", "get the module for noise='fresh_init'",
              "pass the module as the first argument, or noise='gaussian'")

    @torch.no_grad()
    def shrink_perturb(self) -> None:
        """Apply the rule once, between two steps. Collective where weights are sharded."""
        config, state = self.configs[ShrinkPerturb], self.states[ShrinkPerturb]
        key = (self.seed, "shrink_perturb", state.round)
        fresh = fresh_model(config.factory, *key) if config.noise == "fresh_init" else None
        draws = dict(fresh.named_parameters()) if fresh is not None else {}
        missing = [n for n in self.host.names if fresh is not None and n not in draws]
        check(not missing, "ShrinkPerturb", f"the factory's model lacks parameters {missing[:3]}", "be the same model")
        for shard in self.host.shards:
            if fresh is None:
                noise, scale = seeds.normal((*key, shard.name), shard.start, shard.numel), config.sigma
            else:
                noise = draws[shard.name].reshape(-1)[shard.start : shard.start + shard.numel]
                scale = config.perturb
            data = shard.data
            if config.shrink != 1.0:
                data.mul_(config.shrink)
            if scale:  # adding zero would turn -0.0 into 0.0
                data.add_(noise.to(data).view(data.shape), alpha=scale)
        if fresh is not None:
            assert self.host.module is not None  # on_attach
            _reset_statistics(self.host.module, dict(fresh.named_buffers()))
        if not config.keep_moments:
            self.host.reset_moments()
        state.round += 1
        self.host.touch()
        self.host.publish_if_dirty()


def fresh_model(factory: Callable[[], nn.Module], *key: int | str) -> nn.Module:
    """A model from `factory` under a random stream seeded with `key`; the global stream is left as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seeds.derive(*key))  # not torch.manual_seed, which seeds devices as well
        return factory()


def _reset_statistics(module: nn.Module, fresh: dict[str, Tensor]) -> None:
    for wrapped, buffer in module.named_buffers():
        name = plain_name(wrapped)
        if name.rsplit(".", 1)[-1] in ("running_mean", "running_var", "num_batches_tracked"):
            check(name in fresh, "ShrinkPerturb", f"the factory's model lacks the buffer {name}", "be the same model")
            buffer.copy_(fresh[name])
