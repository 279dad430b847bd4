"""Shrink and perturb: an affine map of the weights, noise that is a function of names and positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quadratics import batch, same, small_net, train, weights
from torch import nn

from everbatch import seeds
from everbatch.optim import ShrinkPerturb
from everbatch.optim.shrink_perturb import fresh_model


class Warm(ShrinkPerturb, torch.optim.SGD):
    pass


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def trained(seed: int = 0, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = build()
    opt = Warm(model, lr=0.5, momentum=0.9, **options)
    train(model, opt, 0, 2)
    return model, opt


def test_fresh_init_in_closed_form() -> None:
    model, opt = trained(shrink=0.4, perturb=0.1, factory=build)
    before = weights(model)
    opt.shrink_perturb()
    fresh = fresh_model(build, 0, "shrink_perturb", 0)
    for new, old, draw in zip(weights(model), before, fresh.parameters(), strict=True):
        torch.testing.assert_close(new, 0.4 * old + 0.1 * draw.detach(), rtol=1e-6, atol=1e-8)
    norm = model[1]
    assert torch.equal(norm.weight.detach(), before[2] * 0.4 + 0.1)  # a fresh scale is one: no randomness
    assert torch.equal(norm.running_mean, torch.zeros(5)) and torch.equal(norm.running_var, torch.ones(5))
    assert norm.num_batches_tracked.item() == 0
    assert not opt.state, "the moments are dropped"


def test_gaussian_in_closed_form() -> None:
    model, opt = trained(shrink=0.6, sigma=0.01, noise="gaussian")
    before = dict(zip([n for n, _ in model.named_parameters()], weights(model), strict=True))
    statistics = [b.clone() for b in model.buffers()]
    opt.shrink_perturb()
    for name, p in model.named_parameters():
        n = seeds.normal((0, "shrink_perturb", 0, name), 0, p.numel()).view(p.shape)
        torch.testing.assert_close(p.detach(), 0.6 * before[name] + 0.01 * n, rtol=1e-6, atol=1e-8)
    assert same(list(model.buffers()), statistics)


def test_nothing_to_do_leaves_every_bit_but_the_moments() -> None:
    for options in ({"factory": build, "perturb": 0.0}, {"noise": "gaussian", "sigma": 0.0}):
        model, opt = trained(shrink=1.0, **options)
        with torch.no_grad():
            model[0].bias[0] = -0.0
        before = weights(model)
        opt.shrink_perturb()
        assert same(weights(model), before) and torch.signbit(model[0].bias[0]) and not opt.state


def test_shrink_zero_is_a_fresh_start() -> None:
    model, opt = trained(shrink=0.0, perturb=1.0, factory=build)
    opt.shrink_perturb()
    assert same(weights(model), weights(fresh_model(build, 0, "shrink_perturb", 0)))


def test_linear_in_the_weights() -> None:
    def image(*seeds_: int) -> list[torch.Tensor]:
        model, opt = trained(shrink=0.4, perturb=0.1, factory=build)
        parts = [weights(trained(s, shrink=0.4, factory=build)[0]) for s in seeds_]
        with torch.no_grad():
            for p, *terms in zip(model.parameters(), *parts, strict=True) if parts else ((p,) for p in model.parameters()):
                p.copy_(sum(terms, torch.zeros_like(p)))
        opt.shrink_perturb()
        return weights(model)

    for a, b, zero, both in zip(image(1), image(2), image(), image(1, 2), strict=True):
        torch.testing.assert_close(a + b - zero, both)


def test_a_bare_shrink_keeps_the_hypothesis() -> None:
    """ReLU layers without biases: the logits scale by shrink per layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    opt = Warm(model, lr=0.1, shrink=0.5, sigma=0.0, noise="gaussian")
    x = batch()[0]
    before = model(x).detach()
    opt.shrink_perturb()
    assert torch.equal(model(x).detach(), before * 0.25)


def test_streams_are_unchanged_and_rounds_differ() -> None:
    for options in ({"factory": build}, {"noise": "gaussian"}):
        model, opt = trained(**options)
        kept = torch.get_rng_state()
        start = weights(model)
        ends = []
        for _ in range(2):
            with torch.no_grad():
                for p, w in zip(model.parameters(), start, strict=True):
                    p.copy_(w)
            opt.shrink_perturb()
            ends.append(weights(model))
        assert torch.equal(torch.get_rng_state(), kept) and not same(*ends)
        assert opt.states[ShrinkPerturb].round == 2


def test_seeds_differ_and_repeat() -> None:
    ends = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = build()
        Warm(model, lr=0.1, factory=build, seed=seed).shrink_perturb()
        ends.append(weights(model))
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])


def test_frozen_are_skipped_and_tied_are_moved_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    Warm(model, lr=0.1, shrink=0.5, sigma=0.0, noise="gaussian").shrink_perturb()
    assert torch.equal(model[0].bias, before["0.bias"]) and torch.equal(model[0].weight.detach(), before["0.weight"] * 0.5)


def test_moments_can_be_kept() -> None:
    model, opt = trained(noise="gaussian", keep_moments=True)
    kept = [s["momentum_buffer"].clone() for s in opt.state.values()]
    opt.shrink_perturb()
    assert same([s["momentum_buffer"] for s in opt.state.values()], kept)


def test_the_first_step_after_it_is_a_new_optimizers() -> None:
    model, opt = trained(factory=build)
    opt.shrink_perturb()
    other = build()
    other.load_state_dict(model.state_dict())
    train(model, opt, 5, 7)
    train(other, Warm(other, lr=0.5, momentum=0.9, factory=build), 5, 7)
    assert same(weights(model), weights(other))


@pytest.mark.parametrize(("name", "value"), [("shrink", -0.1), ("shrink", 1.1), ("shrink", float("nan")), ("perturb", -1.0),
                                             ("perturb", float("inf")), ("sigma", -1.0), ("sigma", float("nan")),
                                             ("noise", "white")])
def test_bad_values(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"ShrinkPerturb: {name}={value!r}, must be"):
        Warm(small_net(), lr=0.1, factory=small_net, **{name: value})


def test_a_fresh_model_needs_a_factory_of_the_same_model_and_the_module() -> None:
    with pytest.raises(ValueError, match="factory=None, must build the model for noise='fresh_init'; pass factory="):
        Warm(small_net(), lr=0.1)
    with pytest.raises(ValueError, match="must get the module for noise='fresh_init'; pass the module"):
        Warm(small_net().named_parameters(), lr=0.1, factory=small_net)
    with pytest.raises(ValueError, match=r"lacks parameters \['3.weight', '3.bias'\]|lacks parameters"):
        Warm(build(), lr=0.1, factory=small_net).shrink_perturb()
