"""Weights in one flat tensor that miss steps, against torch's own optimizer over tensors of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from everbatch.engines.clocks import Clocks
from everbatch.engines.shards import Shard

SIZES = {"a": 3, "b": 4, "c": 2}
STEPS = ("a", "a b", "", "b", "a b c", "c", "a c", "", "a b c")
"""The weights that have a gradient at each step; `c` has its first one late, after steps in which none had any."""
BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd, dampening": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "sgd, no momentum": functools.partial(torch.optim.SGD, lr=0.1, weight_decay=0.1),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "adamw, foreach": functools.partial(torch.optim.AdamW, lr=0.01, foreach=True),
    "nadam": functools.partial(torch.optim.NAdam, lr=0.01),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.1, lr_decay=0.1),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
}


class Flat:
    """Weights in one flat tensor under a base optimizer, as DeepSpeed holds them."""

    def __init__(self, base: Callable[..., torch.optim.Optimizer], weights: dict[str, Tensor]) -> None:
        self.flat = torch.cat([*weights.values(), torch.zeros(2)])  # with padding
        self.inner = base([self.flat])
        self.clocks = Clocks(self.inner, lambda: self.shards)
        self.shards, start = [], 0
        for name, value in weights.items():
            self.shards.append(self._shard(name, start, value.numel()))
            start += value.numel()

    def _shard(self, name: str, start: int, count: int) -> Shard:
        return Shard(name, (count,), 0, self.flat, view=lambda t: t.data.narrow(0, start, count), grad=lambda: None,
                     group=lambda: self.inner.param_groups[0], state=lambda: self.clocks.state_of(name))

    def step(self, gradients: dict[str, Tensor]) -> None:
        pieces = [gradients.get(s.name, torch.full((s.numel,), 7.0)) for s in self.shards]  # an old step's, say
        self.flat.grad = torch.cat([*pieces, torch.zeros(2)])
        with self.clocks.stepping(frozenset(SIZES) - set(gradients)):
            self.inner.step()


def gradients(seed: int, names: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(size, generator=g) for n, size in SIZES.items()}
    return {n: drawn[n] for n in names.split()}


def values(state: dict[str, Any]) -> dict[str, Any]:
    """What is neither empty nor a tensor of many elements."""
    return {k: float(v) for k, v in state.items() if isinstance(v, int | float | Tensor) and torch.as_tensor(v).dim() == 0}


@pytest.mark.parametrize("name", BASES)
def test_a_flat_group_does_what_torch_does_with_tensors_of_their_own(name: str) -> None:
    start = gradients(99, "a b c")
    flat, alone = Flat(BASES[name], start), {n: t.clone() for n, t in start.items()}
    apart = BASES[name](list(alone.values()))
    for i, reached in enumerate(STEPS):
        given = gradients(i, reached)
        for n, weight in alone.items():
            weight.grad = given.get(n)
        apart.step()
        flat.step(given)
        for s in flat.shards:
            torch.testing.assert_close(s.data, alone[s.name], rtol=1e-6, atol=1e-7, msg=f"{s.name} after step {i}")
            expected = {k: v for k, v in apart.state.get(alone[s.name], {}).items() if v is not None}
            assert values(dict(flat.clocks.kept(s))) == pytest.approx(values(expected)), (s.name, i)
            for key, moment in s.moments.items():
                torch.testing.assert_close(moment, expected[key], rtol=1e-6, atol=1e-7, msg=f"{key} of {s.name}, step {i}")


@pytest.mark.parametrize("name", ["sgd", "sgd, dampening", "adamw"])
def test_clocks_are_restored_by_name(name: str) -> None:
    start = gradients(99, "a b c")
    whole, again = (Flat(BASES[name], start) for _ in range(2))
    for i, reached in enumerate(STEPS[:5]):
        whole.step(gradients(i, reached))
    # As a checkpoint is read: moments and weights in their places, then the clocks.
    again.flat.copy_(whole.flat)
    for key, value in whole.inner.state[whole.flat].items():
        again.inner.state[again.flat][key] = value.clone()
    saved = {s.name: dict(whole.clocks.kept(s)) for s in whole.shards}
    again.clocks.restore({n: ({k: v for k, v in kept.items() if torch.as_tensor(v).dim() == 0}, bool(kept))
                          for n, kept in saved.items()})
    for i, reached in enumerate(STEPS[5:], start=5):
        for run in (whole, again):
            run.step(gradients(i, reached))
    assert torch.equal(whole.flat[: sum(SIZES.values())], again.flat[: sum(SIZES.values())])


def test_nothing_is_hooked_or_copied_where_every_weight_has_its_gradient() -> None:
    flat = Flat(BASES["adamw"], gradients(99, "a b c"))
    flat.step(gradients(0, "a b c"))
    assert not flat.clocks.behind and not flat.inner._optimizer_step_pre_hooks and not flat.inner._optimizer_step_post_hooks
