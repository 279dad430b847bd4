"""Shrink and perturb: an affine map of the weights, noise that is a function of names and positions."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from quadratics import batch, same, small_net, train, weights
from torch import nn

from everbatch import compose, seeds
from everbatch.engines.shards import Vector
from everbatch.nn import bn_recalibrate
from everbatch.optim import EMA, DynamicSparsity, OptimizerMixin, ShrinkPerturb
from everbatch.optim.restart.fresh import fresh_model


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
    opt.shrink_perturb()
    for name, p in model.named_parameters():
        n = seeds.normal((0, "shrink_perturb", 0, name), 0, p.numel()).view(p.shape)
        torch.testing.assert_close(p.detach(), 0.6 * before[name] + 0.01 * n, rtol=1e-6, atol=1e-8)
    assert same(list(model.buffers()), [torch.zeros(5), torch.ones(5), torch.tensor(0)])


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
    model, opt = trained(noise="gaussian", moments="keep")
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


def test_without_a_factory_the_modules_draw() -> None:
    """A model whose constructor does nothing but build its layers draws as a factory does."""
    ends = []
    for options in ({}, {"factory": build}):
        model, opt = trained(shrink=0.4, perturb=0.1, **options)
        kept = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
        opt.shrink_perturb()
        assert torch.equal(torch.get_rng_state(), kept[0]) and random.getstate() == kept[1]
        assert np.array_equal(np.random.get_state()[1], kept[2])  # noqa: NPY002
        ends.append(weights(model))
    assert same(*ends)


class Block(nn.Module):
    """A module with a parameter of its own that resets its child as well."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        self.inner.reset_parameters()


class Stack(nn.Module):
    """One that reaches its children, and a parameter they share, through plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.first, self.second = nn.Parameter(torch.ones(4)), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.bias = self.first.bias
        self.stages = {"all": [(self.first, 2), (self.second, self.scale)]}

    def reset_parameters(self) -> None:
        for child, _ in self.stages["all"]:
            child.reset_parameters()
        nn.init.ones_(self.stages["all"][1][1])


@pytest.mark.parametrize("build", [Block, Stack])
def test_a_module_that_resets_its_children_leaves_the_live_ones(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    opt = compose(ShrinkPerturb, base=torch.optim.SGD)(model, lr=0.1, shrink=1.0, perturb=1e-9)
    before = weights(model)
    opt.shrink_perturb()
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(weights(model), before, strict=True))


class Odd(nn.Module):
    """A module that cannot draw anew."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_a_module_without_initialiser_is_refused_or_takes_white_noise() -> None:
    def odd() -> nn.Module:
        return nn.Sequential(Odd(), nn.Linear(6, 3))

    with pytest.raises(ValueError, match=r"modules \['0 \(Odd\)'\] have no reset_parameters\(\), must have one; pass factory="):
        Warm(odd(), lr=0.1)
    model = odd()
    opt = Warm(model, lr=0.1, shrink=0.5, perturb=0.0, fallback_sigma=0.3)
    opt.shrink_perturb()
    n = seeds.normal((0, "shrink_perturb", 0, "0.scale"), 0, 6)
    torch.testing.assert_close(model[0].scale.detach(), 0.5 + 0.3 * n)


@pytest.mark.parametrize(("tensors", "chosen"), [
    ("weights", {"0.weight", "3.weight"}), (("3.*", "1.bias"), {"3.weight", "3.bias", "1.bias"}),
    (lambda name, shape: shape == (5,), {"0.bias", "1.weight", "1.bias"})])
def test_choice_of_tensors(tensors: Any, chosen: set[str]) -> None:
    model, opt = trained(shrink=0.5, sigma=0.0, noise="gaussian", tensors=tensors)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt.shrink_perturb()
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), before[name] * (0.5 if name in chosen else 1.0)), name


@pytest.mark.parametrize("options", [{"factory": build}, {}, {"noise": "gaussian"}])
def test_parameters_of_normalisation(options: dict[str, Any]) -> None:
    for rule in ("skip", "reset"):
        model, opt = trained(shrink=0.5, norm_params=rule, **options)
        before = weights(model)
        opt.shrink_perturb()
        after = weights(model)
        want = before[2:4] if rule == "skip" else [torch.ones(5), torch.zeros(5)]
        assert same(after[2:4], want) and not same(after[:2], before[:2])


def test_statistics_can_be_kept_and_recalibrated() -> None:
    model, opt = trained(buffers="keep", factory=build)
    kept = [b.clone() for b in model.buffers()]
    opt.shrink_perturb()
    assert same(list(model.buffers()), kept)
    batches = [batch(i)[0] for i in range(3)]
    before, modes = weights(model), [m.training for m in model.modules()]
    assert bn_recalibrate(model, batches) == 1
    with torch.no_grad():
        hidden = [model[0](x) for x in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert same(weights(model), before) and [m.training for m in model.modules()] == modes and model[1].momentum == 0.1
    statistics = [b.clone() for b in model.buffers()]
    with pytest.raises(ValueError, match="bn_recalibrate: no batches, must get at least one"):
        bn_recalibrate(model, [])
    assert same(list(model.buffers()), statistics) and bn_recalibrate(small_net(), []) == 0


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_moments_can_be_scaled(base: Any) -> None:
    cls = type("Scaled", (ShrinkPerturb, base), {})
    torch.manual_seed(0)
    model = build()
    momentum = {"momentum": 0.9} if base is torch.optim.SGD else {}
    opt = cls(model, lr=0.1, shrink=0.5, noise="gaussian", moments="scale", **momentum)
    train(model, opt, 0, 2)
    before = [{k: v.clone() for k, v in s.items()} for s in opt.state.values()]
    opt.shrink_perturb()
    factors = {"momentum_buffer": 0.5, "exp_avg": 0.5, "exp_avg_sq": 0.25, "step": 1.0}
    for now, old in zip(opt.state.values(), before, strict=True):
        assert all(torch.equal(now[k], old[k] * factors[k]) for k in old)


def test_an_average_takes_the_same_map() -> None:
    class Averaged(EMA, ShrinkPerturb, torch.optim.SGD):
        pass

    model = build()
    opt = Averaged(model, lr=0.5, ema_decay=0.5, shrink=0.4, perturb=0.1, factory=build)
    train(model, opt, 0, 3)
    before = {n: a.clone() for n, a in opt.states[EMA].average.items()}
    opt.shrink_perturb()
    for name, draw in fresh_model(build, 0, "shrink_perturb", 0).named_parameters():
        torch.testing.assert_close(opt.states[EMA].average[name], 0.4 * before[name] + 0.1 * draw.detach())


class Masked(OptimizerMixin):
    """Stands for sparsity: every second entry may not move."""

    def displacement(self, vector: Vector) -> Vector:
        return super().displacement(vector).map_(lambda s, t: t * (torch.arange(t.numel()) % 2).to(t).view(t.shape))


def test_masked_entries_stay() -> None:
    class Sparse(Masked, ShrinkPerturb, torch.optim.SGD):
        pass

    ends = []
    for cls in (Sparse, Warm):
        torch.manual_seed(0)
        model = build()
        before = weights(model)
        cls(model, lr=0.1, factory=build).shrink_perturb()
        ends.append(weights(model))
    for new, free, old in zip(*ends, before, strict=True):
        at = (torch.arange(old.numel()) % 2 == 1).view(old.shape)
        assert torch.equal(new[~at], old[~at]) and torch.equal(new[at], free[at])


def test_half_precision_and_double_masters() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = build().to(dtype)
        before = weights(model)
        Warm(model, lr=0.1, shrink=0.5, perturb=0.0).shrink_perturb()
        assert same(weights(model), [w * 0.5 for w in before])


def test_not_inside_a_step() -> None:
    model, opt = trained(factory=build)

    def closure() -> None:
        opt.shrink_perturb()

    with pytest.raises(RuntimeError, match="called inside a step, must be called between steps"):
        opt.step(closure)


def test_a_factory_that_seeds_itself_is_told() -> None:
    def seeded() -> nn.Module:
        torch.manual_seed(3)
        return build()

    _, opt = trained(factory=seeded)
    opt.shrink_perturb()
    with pytest.warns(UserWarning, match="the same weights as in the round before"):
        opt.shrink_perturb()


@pytest.mark.parametrize(("name", "value"), [
    ("shrink", -0.1), ("shrink", 1.1), ("shrink", float("nan")), ("perturb", -1.0), ("perturb", float("inf")),
    ("fallback_sigma", -1.0), ("noise", "white"), ("factory", 3), ("tensors", "biases"), ("tensors", ()),
    ("norm_params", "mean"), ("buffers", "drop"), ("moments", "halve")])
def test_bad_values(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"ShrinkPerturb: {name}={value!r}, must be")):
        Warm(small_net(), lr=0.1, **{name: value})


def test_noise_is_of_one_kind() -> None:
    with pytest.raises(ValueError, match="sigma=-1.0, must be a finite number >= 0"):
        Warm(small_net(), lr=0.1, noise="gaussian", sigma=-1.0)
    with pytest.raises(ValueError, match="sigma=0.1 with noise='fresh_init', must be left out; set perturb, or noise='gaussian'"):
        Warm(small_net(), lr=0.1, sigma=0.1)
    with pytest.raises(ValueError, match="perturb=0.1 with noise='gaussian', must be left out; set sigma, or noise='fresh_init'"):
        Warm(small_net(), lr=0.1, perturb=0.1, noise="gaussian")


def test_what_the_call_needs_is_asked_for_at_construction() -> None:
    with pytest.raises(ValueError, match="must get the module for buffers='reset'; pass the module"):
        Warm(small_net().named_parameters(), lr=0.1, factory=small_net)
    Warm(small_net().named_parameters(), lr=0.1, factory=build, buffers="keep")
    with pytest.raises(ValueError, match=r"tensors has '9.weight', must fit the name of a trained parameter; did you mean"):
        Warm(small_net(), lr=0.1, tensors=("9.weight",))
    with pytest.raises(ValueError, match="moments='scale' with Adagrad, must be over SGD, Adam"):
        type("Gradual", (ShrinkPerturb, torch.optim.Adagrad), {})(small_net(), moments="scale")


def test_a_factory_must_build_the_same_model() -> None:
    with pytest.raises(ValueError, match=r"lacks parameters \['1.weight', '1.bias', '3.weight'\], must be the same model"):
        Warm(build(), lr=0.1, factory=small_net).shrink_perturb()
    with pytest.raises(ValueError, match=r"other shapes of \['0.weight', '0.bias', '2.weight'\], must be the same model"):
        wide = lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))  # noqa: E731
        Warm(small_net(), lr=0.1, factory=wide).shrink_perturb()


def test_pruned_weights_stay_zero_and_the_rest_takes_the_rule() -> None:
    class Sparse(DynamicSparsity, ShrinkPerturb, torch.optim.SGD):
        pass

    model = small_net()
    opt = Sparse(model, lr=0.1, density=0.4, factory=small_net)
    train(model, opt, 0, 2)
    before = weights(model)
    opt.shrink_perturb()
    pruned = 0
    for new, old, draw in zip(weights(model), before, fresh_model(small_net, 0, "shrink_perturb", 0).parameters(), strict=True):
        off = (old == 0) if old.dim() > 1 else torch.zeros_like(old, dtype=torch.bool)
        assert bool((new[off] == 0).all())
        torch.testing.assert_close(new[~off], (0.4 * old + 0.1 * draw.detach())[~off])
        pruned += int(off.sum())
    assert pruned == sum(int((~m).sum()) for m in opt.whole_masks().values()) > 0
    train(model, opt, 2, 3)
    assert all(bool((w[~opt.whole_masks()[n]] == 0).all()) for n, w in model.named_parameters() if n in opt.whole_masks())
