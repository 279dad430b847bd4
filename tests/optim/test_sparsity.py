"""`DynamicSparsity` in one process: counts, zeros, moments, changes of topology, resume, refusals. Hosts: the contract suite."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everbatch.errors import CompositionError
from everbatch.optim import EMA, SAM, ClipGradNorm, DynamicSparsity, ShrinkPerturb


class Plain(torch.optim.SGD): ...


class Sparse(DynamicSparsity, torch.optim.SGD): ...


class SparseAdam(DynamicSparsity, torch.optim.AdamW): ...


class Full(ClipGradNorm, EMA, DynamicSparsity, SAM, torch.optim.SGD): ...


class Averaging(EMA, DynamicSparsity, torch.optim.SGD): ...


class Warm(DynamicSparsity, ShrinkPerturb, torch.optim.SGD): ...


SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
GROW = ("gradient", "random", "momentum", "random_unfired")


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))


def data(steps: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(7)
    return [(torch.randn(8, 10, generator=g), torch.randint(0, 4, (8,), generator=g)) for _ in range(steps)]


def step(opt: Any, model: nn.Module, x: Tensor, y: Tensor, spoil: float = 1.0) -> Any:
    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y) * spoil
        opt.backward(loss)
        return loss

    return opt.step(closure)


def train(opt: Any, model: nn.Module, begin: int, end: int) -> None:
    for x, y in data(end)[begin:]:
        step(opt, model, x, y)


def build(cls: type = Sparse, seed: int = 0, **options: Any) -> tuple[Any, nn.Module]:
    model = net(seed)
    return cls(model, **{"density": 0.3, "update_every": 2, **SGD, **options}), model


def adam(seed: int = 0, **options: Any) -> tuple[Any, nn.Module]:
    model = net(seed)
    return SparseAdam(model, **{"lr": 0.01, "weight_decay": 0.1, "density": 0.3, "update_every": 2, **options}), model


def off(opt: Any, tensors: dict[str, Tensor]) -> list[Tensor]:
    """What the masks leave out of each tensor."""
    return [tensors[n][~m] for n, m in opt.whole_masks().items() if tensors]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------ zeros and counts
@pytest.mark.parametrize("late", [False, True])
def test_weights_that_are_loaded_after_the_masks_are_masked(late: bool) -> None:
    opt, model = build(Averaging, update_every=100, ema_decay=0.9)
    if late:
        train(opt, model, 0, 2)
    model.load_state_dict(net(5).state_dict())
    train(opt, model, 2, 3)
    for name, mask in opt.whole_masks().items():
        assert not model.get_parameter(name)[~mask].any() and model.get_parameter(name)[mask].any()


def test_a_base_that_moves_zeros_is_masked_and_resumed() -> None:
    """Muon's update of a matrix with zeros has none."""

    class Whitened(DynamicSparsity, torch.optim.Muon): ...

    def matrices() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))

    options = {"lr": 0.05, "weight_decay": 0.1, "density": 0.3, "update_every": 2}
    model = matrices()
    opt = Whitened(model, **options)
    train(opt, model, 0, 3)
    for name, mask in opt.whole_masks().items():
        assert not model.get_parameter(name)[~mask].any() and mask.any()
    other = matrices()
    again = Whitened(other, **options)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(opt.state_dict())
    for m, o in ((model, opt), (other, again)):
        train(o, m, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_density_one_leaves_every_bit() -> None:
    opt, model = build(Full, density=1.0, rho=0.0, max_norm=float("inf"))
    bare_model = net()
    bare = torch.optim.SGD(bare_model.parameters(), **SGD)
    for x, y in data(5):
        step(opt, model, x, y)
        bare.zero_grad()
        nn.functional.cross_entropy(bare_model(x), y).backward()
        bare.step()
    assert_same(weights(model), weights(bare_model))
    assert not opt.states[DynamicSparsity].masks and opt.densities() == dict.fromkeys(opt.densities(), 1.0)


@pytest.mark.parametrize("grow", GROW)
@pytest.mark.parametrize("prune", ["magnitude", "set", "taylor", "soft", "momentum"])
def test_counts_stay_and_pruned_weights_are_exactly_zero(grow: str, prune: str) -> None:
    opt, model = build(Full, grow=grow, prune=prune, rho=0.3, max_norm=0.5)
    want = {n: int(m.sum()) for n, m in opt.whole_masks().items()}
    assert sum(want.values()) == round(0.3 * (160 + 192 + 48)) and want == opt.states[DynamicSparsity].active
    for x, y in data(8):
        step(opt, model, x, y)
        assert all(not t.any() for t in off(opt, weights(model)))
        assert all(not t.any() for t in off(opt, {s.name: s.moments["momentum_buffer"] for s in opt.host.shards if s.moments}))
        assert {n: int(m.sum()) for n, m in opt.whole_masks().items()} == want
        assert all(not t.any() for t in off(opt, opt.states[EMA].average))
    assert opt.states[DynamicSparsity].changes == 4


@pytest.mark.parametrize("options", [
    {"global_threshold": True, "redistribute": "global"}, {"redistribute": "momentum", "grow": "momentum"},
    {"redistribute": "survivors", "grow": "random"}, {"bernoulli": False, "score_steps": 2, "update_every": 3},
])
def test_the_total_stays_where_layers_exchange_weights(options: dict[str, Any]) -> None:
    opt, model = build(**options)
    total = sum(opt.states[DynamicSparsity].active.values())
    train(opt, model, 0, 9)
    state = opt.states[DynamicSparsity]
    assert sum(state.active.values()) == total == sum(int(m.sum()) for m in state.masks.values())
    assert all(int(state.masks[n].sum()) == c > 0 for n, c in state.active.items())


def test_nothing_off_the_mask_is_perturbed() -> None:
    opt, model = build(Full, rho=0.5, max_norm=1.0)
    x, y = data(1)[0]
    seen = []

    def closure() -> Tensor:
        seen.append(weights(model))
        loss = nn.functional.cross_entropy(model(x), y)
        opt.backward(loss)
        return loss

    opt.step(closure)
    assert len(seen) == 2 and not torch.equal(seen[0]["0.weight"], seen[1]["0.weight"])
    assert all(not t.any() for t in off(opt, seen[1]))


def test_what_others_move_is_masked_before_the_next_pass() -> None:
    opt, model = build(Warm, noise="gaussian", sigma=0.1, update_every=9)
    train(opt, model, 0, 1)
    opt.shrink_perturb()
    with torch.no_grad():  # and an edit by hand that says so
        opt.host.shards[0].data.add_(1.0)
        opt.host.touch()
    x, y = data(1)[0]
    seen = []
    opt.step(lambda: (seen.append(weights(model)), opt.backward(nn.functional.cross_entropy(model(x), y)))[1])
    assert all(not t.any() for t in off(opt, seen[0])) and all(not t.any() for t in off(opt, weights(model)))


# ---------------------------------------------------------------------------------------------- one change
def test_rigl_replaces_the_update() -> None:
    opt, model = build(drop_fraction=0.3)
    train(opt, model, 0, 1)
    before, masks = weights(model), opt.whole_masks()
    buffers = {s.name: s.moments["momentum_buffer"].clone() for s in opt.host.shards}
    train(opt, model, 1, 2)
    after, now = weights(model), opt.whole_masks()
    for name in before:
        kept = masks[name] & now[name] if name in masks else torch.ones_like(before[name], dtype=torch.bool)
        assert torch.equal(after[name], torch.where(kept, before[name], torch.zeros(())))
        moment = next(s for s in opt.host.shards if s.name == name).moments["momentum_buffer"]
        assert torch.equal(moment, torch.where(kept, buffers[name], torch.zeros(())))
    assert any(not torch.equal(masks[n], now[n]) for n in masks) and opt.step_count == 2 and opt.last_applied


def test_rigl_takes_the_largest_dense_gradients() -> None:
    opt, model = build(update_every=1, drop_fraction=0.4)
    x, y = data(1)[0]
    loss = nn.functional.cross_entropy(model(x), y)
    dense = dict(zip(weights(model), torch.autograd.grad(loss, list(model.parameters())), strict=True))
    before, masks = weights(model), opt.whole_masks()
    step(opt, model, x, y)
    for name, now in opt.whole_masks().items():
        k = int(0.4 * int(masks[name].sum()))
        size = before[name].abs().where(masks[name], torch.full((), -1.0)).flatten()
        left = torch.zeros_like(size, dtype=torch.bool)
        left[size.topk(int(masks[name].sum()) - k).indices] = True
        score = dense[name].abs().flatten().where(~left, torch.full((), -1.0))
        left[score.topk(k).indices] = True
        assert torch.equal(now.flatten(), left)


def test_set_takes_the_step_and_then_changes() -> None:
    opt, model = build(grow="random", prune="set", update_every=1)
    twin, other = build(drop_fraction=0.0)
    train(opt, model, 0, 1)
    train(twin, other, 0, 1)
    masks = twin.whole_masks()
    for name, now in opt.whole_masks().items():
        kept = masks[name] & now
        assert torch.equal(weights(model)[name], torch.where(kept, weights(other)[name], torch.zeros(())))
        assert not torch.equal(now, masks[name])


@pytest.mark.parametrize("newborn", ["layer_mean_v", "zero"])
def test_adams_second_moment_of_new_weights(newborn: str) -> None:
    opt, model = adam(newborn=newborn)
    train(opt, model, 0, 1)
    masks = opt.whole_masks()
    before = {s.name: s.moments["exp_avg_sq"].clone() for s in opt.host.shards}
    train(opt, model, 1, 2)
    for shard in opt.host.shards:
        if shard.name in masks:
            now = opt.whole_masks()[shard.name]
            born, old = now & ~masks[shard.name], now & masks[shard.name]
            mean = before[shard.name][old].double().mean().float() if newborn == "layer_mean_v" else torch.zeros(())
            assert born.any() and not shard.moments["exp_avg"][born].any()
            torch.testing.assert_close(shard.moments["exp_avg_sq"][born], mean.expand(int(born.sum())))
            assert not shard.moments["exp_avg_sq"][~now].any()


def test_dense_moments_see_everything_and_weights_stay_zero() -> None:
    opt, model = adam(dense_moments=True, topology_step="after", as_released=True)
    for x, y in data(5):
        step(opt, model, x, y)
        assert all(not t.any() for t in off(opt, weights(model)))
    assert all(s.moments["exp_avg"].ne(0).all() for s in opt.host.shards if s.name == "0.weight")


def test_unfired_entries_come_first_and_exploration_grows() -> None:
    opt, model = build(grow="random_unfired", update_every=1, drop_fraction=0.5, density=0.2)
    fired = {n: m.clone() for n, m in opt.whole_masks().items()}
    for x, y in data(3):
        before = opt.whole_masks()
        step(opt, model, x, y)
        for name, now in opt.whole_masks().items():
            born, room = now & ~before[name], int((~fired[name]).sum())
            assert int((born & ~fired[name]).sum()) == min(room, int(0.5 * int(before[name].sum())))
            fired[name] |= now
            assert torch.equal(opt.states[DynamicSparsity].fired[name], fired[name])


def test_momentum_growth_goes_by_a_mean_of_dense_gradients() -> None:
    opt, model = build(grow="momentum", update_every=9, gradient_decay=0.5)
    want = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in data(3):
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
        for t, g in zip(want.values(), grads, strict=True):
            t.lerp_(g, 0.5)
        step(opt, model, x, y)
    for name, kept in opt.states[DynamicSparsity].averages.items():
        torch.testing.assert_close(kept, want[name])


def test_a_skipped_step_changes_nothing() -> None:
    opt, model = build(grow="momentum", score_steps=2, update_every=3, prune="soft")
    train(opt, model, 0, 2)
    before = copy.deepcopy(opt.state_dict(weights=True)["everbatch"])
    x, y = data(1)[0]
    step(opt, model, x, y, spoil=float("nan"))
    after = opt.state_dict(weights=True)["everbatch"]
    assert_same(before["tensors"], after["tensors"])
    assert after["meta"] == before["meta"] | {"skipped": 1}


# --------------------------------------------------------------------------------------------------- state
def test_masks_do_not_touch_the_global_stream_or_depend_on_it() -> None:
    opt, model = build(grow="random")
    torch.manual_seed(11)
    torch.rand(3)
    before = torch.get_rng_state()
    train(opt, model, 0, 4)
    assert torch.equal(torch.get_rng_state(), before)
    other, second = build(grow="random")
    train(other, second, 0, 4)
    assert_same(opt.whole_masks(), other.whole_masks())
    third, _ = build(grow="random", seed=0)
    assert not torch.equal(Sparse(net(), seed=1, density=0.3, **SGD).whole_masks()["0.weight"], third.whole_masks()["0.weight"])


@pytest.mark.parametrize("options", [{}, {"grow": "momentum", "redistribute": "momentum"}, {"grow": "random_unfired"},
                                     {"score_steps": 2, "update_every": 3, "total_steps": 40}])
def test_resume_is_bitwise(options: dict[str, Any]) -> None:
    opt, model = build(**options)
    train(opt, model, 0, 5)
    saved = pickle.loads(pickle.dumps(opt.state_dict(weights=True)))
    train(opt, model, 5, 10)
    twin, other = build(seed=3, **options)
    twin.load_state_dict(saved)
    assert all(m.dtype == torch.bool for m in twin.states[DynamicSparsity].masks.values())
    train(twin, other, 5, 10)
    assert_same(weights(model), weights(other))
    assert_same(opt.state_dict(weights=True)["everbatch"]["tensors"], twin.state_dict(weights=True)["everbatch"]["tensors"])


def test_a_copy_goes_on_alike() -> None:
    opt, model = build()
    train(opt, model, 0, 3)
    twin, other = copy.deepcopy((opt, model))
    train(opt, model, 3, 7)
    train(twin, other, 3, 7)
    assert_same(weights(model), weights(other))


def test_masks_can_be_given() -> None:
    opt, model = build()
    masks = {"0.weight": torch.zeros(16, 10, dtype=torch.bool)}
    masks["0.weight"][3] = True
    opt.set_masks(masks)
    assert opt.states[DynamicSparsity].active["0.weight"] == 10 and opt.densities()["0.weight"] == 1 / 16
    assert all(not t.any() for t in off(opt, weights(model)))
    averaging, model = build(Averaging)
    train(averaging, model, 0, 1)
    averaging.set_masks(masks)
    assert not averaging.states[EMA].average["0.weight"][~masks["0.weight"]].any()
    for bad, text in (({"1.weight": masks["0.weight"]}, "masks of \\['1.weight'\\].*did you mean"),
                      ({"0.weight": torch.ones(2, 2, dtype=torch.bool)}, "have shapes \\[\\(2, 2\\)\\]"),
                      ({"0.weight": torch.ones(16, 10)}, "must be bool tensors"),
                      ({"0.weight": torch.zeros(16, 10, dtype=torch.bool)}, "with an active entry")):
        with pytest.raises(ValueError, match=text):
            opt.set_masks(bad)


@pytest.mark.parametrize("options", [{}, {"grow": "random_unfired"}, {"redistribute": "global"}, {"grow": "momentum"}])
def test_a_layer_that_is_frozen_at_a_change_keeps_its_mask(options: dict[str, Any]) -> None:
    opt, model = build(Averaging, **options)
    train(opt, model, 0, 3)
    state = opt.states[DynamicSparsity]
    mask, active = opt.whole_masks()["2.weight"], dict(state.active)
    model[2].requires_grad_(False)  # type: ignore[index, operator]
    frozen, others = weights(model)["2.weight"], opt.whole_masks()
    assert list(others) == ["0.weight", "2.weight", "4.weight"] and torch.equal(others["2.weight"], mask)
    train(opt, model, 3, 5)
    assert torch.equal(state.masks["2.weight"], mask) and torch.equal(weights(model)["2.weight"], frozen)
    assert sum(state.active.values()) == sum(active.values()) and state.active["2.weight"] == active["2.weight"]
    assert any(not torch.equal(opt.whole_masks()[n], m) for n, m in others.items())
    model[2].requires_grad_(True)  # type: ignore[index, operator]
    assert torch.equal(opt.whole_masks()["2.weight"], mask)
    train(opt, model, 5, 7)
    assert sum(int(m.sum()) for m in opt.whole_masks().values()) == sum(active.values())
    assert not torch.equal(opt.whole_masks()["2.weight"], mask)
    assert all(not t.any() for t in off(opt, weights(model)))


def test_all_layers_frozen_at_a_change() -> None:
    opt, model = build()
    train(opt, model, 0, 1)
    before = opt.whole_masks()
    for i in (0, 2, 4):
        model[i].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    train(opt, model, 1, 3)
    for i in (0, 2, 4):
        model[i].weight.requires_grad_(True)  # type: ignore[index, union-attr]
    assert_same(opt.whole_masks(), before)
    assert opt.states[DynamicSparsity].active == {n: int(m.sum()) for n, m in before.items()}


def test_without_the_module_patterns_are_needed() -> None:
    model = net()
    with pytest.raises(ValueError, match="parameters without their module.*include"):
        Sparse(model.named_parameters(), density=0.3, **SGD)
    opt = Sparse(model.named_parameters(), density=0.3, include=("0.weight", "2.*ght"), **SGD)
    assert list(opt.densities()) == ["0.weight", "2.weight"]


def test_describe_tells_the_cost() -> None:
    text = build(Full, rho=0.1, max_norm=1.0)[0].describe()
    assert "displacement       DynamicSparsity" in text and "edit_gradient      DynamicSparsity, then ClipGradNorm" in text
    assert "every 2 steps" in text


# ------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(("options", "text"), [
    ({"density": 0.0}, "density=0.0, must be in \\(0, 1\\]; pass density=1"), ({"density": 1.2}, "density=1.2"),
    ({"drop_fraction": -0.1}, "drop_fraction=-0.1"), ({"drop_fraction": 1.1}, "drop_fraction=1.1"),
    ({"update_every": 0}, "update_every=0, must be an integer >= 1"), ({"score_steps": 2}, "score_steps=2"),
    ({"score_steps": 0}, "score_steps=0"),
    ({"grow": "rigl"}, "grow='rigl', must be one of gradient, random"), ({"prune": "snip"}, "prune='snip'"),
    ({"distribution": "erdos"}, "distribution='erdos'"), ({"densities": {"0.weight": 2.0}}, "densities\\['0.weight'\\]=2.0"),
    ({"densities": {"9.weight": 0.5}}, "'9.weight' fits no layer"), ({"exclude": ("x",)}, "pattern 'x' fits no parameter"),
    ({"anneal": "cosine"}, "anneal='cosine' without total_steps"), ({"total_steps": 0}, "total_steps=0"),
    ({"stop_fraction": 2.0}, "stop_fraction"),
    ({"gradient_decay": 1.0}, "gradient_decay=1.0"), ({"erk_power": 0.0}, "erk_power=0.0"), ({"begin_step": -1}, "begin_step=-1"),
    ({"as_released": True, "grow_into_used": "forbid"}, "grow_into_used='forbid', must be 'allow'"),
])
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build(**options)


def test_wrong_orders_are_refused() -> None:
    with pytest.raises(CompositionError, match="ClipGradNorm must stand to the left of DynamicSparsity"):
        class _Wrong(DynamicSparsity, ClipGradNorm, torch.optim.SGD): ...
