"""Refresh learning: closed forms of both unlearning steps, when it acts, what it leaves alone."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from quadratics import Quadratic, batch, closure_of, same, small_net, train, weights
from torch import Tensor, nn

from everbatch.composition import compose
from everbatch.errors import CompositionError
from everbatch.experiment import Optimizer
from everbatch.optim import EWC, SAM, Refresh
from everbatch.optim.memory.unlearning import normalized_move, sde_move


class RefreshSGD(Refresh, torch.optim.SGD):
    pass


A = torch.tensor([1.0, 10.0, 0.5], dtype=torch.float64)
W = torch.tensor([1.0, 0.1, -2.0], dtype=torch.float64)
F = torch.tensor([0.3, 2.0, 0.0], dtype=torch.float64)


def quadratic(lr: float = 0.0, fisher: Tensor | None = None, **options: Any) -> tuple[Any, Quadratic]:
    model = Quadratic(A.tolist(), W.tolist())
    opt = RefreshSGD(model, lr=lr, estimator="given", **options)
    if fisher is not None:
        opt.update_fisher(importance={"weight": fisher})
    return opt, model


def seen_by(opt: Any, model: Quadratic) -> list[Tensor]:
    """The weights at the start of every pass of one step."""
    seen = []

    def loss() -> Tensor:
        seen.append(model.weight.detach().clone())
        return model()

    opt.step(closure_of(opt, loss))
    return seen


# ---------------------------------------------------------------------------------------------------- closed forms
@pytest.mark.parametrize("fisher", [None, F])
def test_sde_on_a_quadratic(fisher: Tensor | None) -> None:
    """theta_J = prod (1 + gamma P a) theta_0, then the ordinary step from there."""
    opt, model = quadratic(lr=0.1, fisher=fisher, unlearn_steps=4, gamma=0.03, damping=0.2)
    seen = seen_by(opt, model)
    p = torch.ones(3, dtype=torch.float64) if fisher is None else 1 / (fisher + 0.2)
    for j, there in enumerate(seen):
        torch.testing.assert_close(there, W * (1 + 0.03 * p * A) ** j, rtol=1e-12, atol=0)
    torch.testing.assert_close(model.weight.detach(), seen[-1] * (1 - 0.1 * A), rtol=1e-12, atol=1e-15)


def test_unlearning_raises_the_loss_by_the_preconditioned_slope() -> None:
    """(L(theta') - L(theta)) / gamma -> g' P g."""
    gamma = 1e-6
    opt, model = quadratic(fisher=F, gamma=gamma, damping=0.2)
    before, after = (0.5 * (A * w.square()).sum() for w in seen_by(opt, model))
    g = A * W
    assert ((after - before) / gamma).item() == pytest.approx((g * g / (F + 0.2)).sum().item(), rel=1e-4)


def test_at_its_default_a_refreshed_step_still_learns() -> None:
    """Beside the recipes' learning rate, where nothing is known of earlier tasks: a gamma as large as the rate takes back all
    that the step learns."""
    opt, model = quadratic(lr=Optimizer.lr)
    assert len(seen_by(opt, model)) == 2
    learnt = (W - model.weight.detach()) / (Optimizer.lr * A * W)
    assert bool((learnt > 0.85).all()), learnt.tolist()
    same, other = quadratic(lr=Optimizer.lr, gamma=Optimizer.lr)
    seen_by(same, other)
    torch.testing.assert_close(other.weight.detach(), W * (1 - (Optimizer.lr * A) ** 2), rtol=1e-12, atol=0)


def test_normalized_moves_by_delta_of_the_norm() -> None:
    opt, model = quadratic(form="normalized", delta=0.01, noise_coef=0.0)
    before, after = seen_by(opt, model)
    assert ((after - before).norm() / before.norm()).item() == pytest.approx(0.01, rel=1e-12)
    g = A * W
    torch.testing.assert_close(after, W + 0.01 * W.norm() * g / g.norm(), rtol=1e-12, atol=0)


def test_normalized_in_fp32_on_every_tensor() -> None:
    model = small_net()
    opt = RefreshSGD(model, lr=0.0, form="normalized", delta=1e-3, noise_coef=0.0)
    before, x, y = weights(model), *batch()
    seen = []

    def loss() -> Tensor:
        seen.append(weights(model))
        return nn.functional.cross_entropy(model(x), y)

    opt.step(closure_of(opt, loss))
    for old, new in zip(before, seen[1], strict=True):
        assert ((new.double() - old.double()).norm() / old.double().norm()).item() == pytest.approx(1e-3, rel=1e-4)


def test_normalized_does_not_see_the_scale_of_the_loss_and_stops_at_large_fisher() -> None:
    model = small_net()
    moved = []
    for scale, fisher in ((1.0, 0.0), (1024.0, 0.0), (1.0, 1e30)):
        twin = copy.deepcopy(model)
        opt = RefreshSGD(twin, lr=0.0, form="normalized", delta=1e-3, every=1)
        opt.update_fisher(importance={n: torch.full_like(p, fisher) for n, p in twin.named_parameters()})
        train(twin, opt, 0, 1, scale)
        moved.append(weights(twin))
    assert same(moved[0], moved[1])  # a power of two, so not even rounding differs
    assert same(moved[2], weights(model))


def test_zero_norms_leave_the_noise() -> None:
    zero, noise = torch.zeros(4), torch.tensor([1.0, -2.0, 0.5, 0.0])
    options = {"delta": 0.1, "fisher_coef": 1e-3, "noise_coef": 0.01}
    for gradient, weight_norm in ((zero, torch.tensor(3.0)), (noise, torch.tensor(0.0))):
        got = normalized_move(gradient, weight_norm, gradient.norm(), None, noise, **options)
        torch.testing.assert_close(got, 0.1 * 0.01 * noise, rtol=1e-6, atol=0)


def test_the_noise_has_the_covariance_of_the_equation() -> None:
    """1e5 entries for each of three values of F: variance 2 gamma / (F + damping), within 5 sigma of its estimate."""
    n, gamma, damping = 100_000, 0.02, 0.5
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(n)) for name in "abc"})
    opt = RefreshSGD(model.named_parameters(), lr=0.0, gamma=gamma, damping=damping, noise_scale=1.0, estimator="given")
    fisher = {"a": 0.0, "b": 1.5, "c": 7.0}
    opt.update_fisher(importance={name: torch.full((n,), f) for name, f in fisher.items()})
    opt.step(closure_of(opt, lambda: torch.stack([0.0 * p.sum() for p in model.values()]).sum()))
    for name, f in fisher.items():
        variance = 2 * gamma / (f + damping)
        got = model[name].detach().double()
        assert got.square().mean().item() == pytest.approx(variance, abs=5 * variance * math.sqrt(2 / n))
        assert abs(got.mean().item()) <= 5 * math.sqrt(variance / n)
    cosine = torch.cosine_similarity(model["a"], model["b"], dim=0).item()
    assert abs(cosine) <= 5 / math.sqrt(n)


def test_noise_is_a_function_of_seed_step_and_name_not_of_the_global_stream() -> None:
    def run(seed: int, stream: int) -> list[Tensor]:
        model = small_net()
        opt = RefreshSGD(model, lr=0.1, seed=seed, noise_scale=0.1)
        torch.manual_seed(stream)
        train(model, opt, 0, 4)
        return weights(model)

    assert same(run(0, 1), run(0, 2))
    assert not same(run(0, 1), run(1, 1))
    assert sde_move(torch.ones(2), torch.ones(2), 0.5, None).tolist() == [0.5, 0.5]


# ---------------------------------------------------------------------------------------------------- when it acts
def test_every_second_step() -> None:
    """Steps 0, 2, 4 have a pass before the recorded one, which sees other weights; steps 1, 3 are the bare base's."""
    model = small_net()
    opt = RefreshSGD(model, lr=0.1, momentum=0.9, every=2)
    for i in range(5):
        twin = copy.deepcopy(model)
        bare = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
        bare.load_state_dict(copy.deepcopy(torch.optim.SGD.state_dict(opt)))
        x, y = batch(i)
        nn.functional.cross_entropy(twin(x), y).backward()
        bare.step()
        train(model, opt, i, i + 1)
        assert opt.last_passes == (2 if i % 2 == 0 else 1)
        assert same(weights(model), weights(twin)) == (i % 2 == 1)


@pytest.mark.parametrize("options", [{"gamma": 0.0, "noise_scale": 1.0}, {"form": "normalized", "delta": 0.0}])
def test_switched_off_is_the_bare_base(options: dict[str, Any]) -> None:
    runs = []
    for cls, more in ((RefreshSGD, options), (compose(base=torch.optim.SGD), {})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3))
        opt = cls(model, lr=0.1, momentum=0.9, **more)
        train(model, opt, 0, 5)
        runs.append(weights(model))
        assert opt.last_passes == 1
    assert same(*runs)


def test_the_penalties_are_ascended_with_the_full_loss_only() -> None:
    """Refresh + EWC on a quadratic: the probe's gradient holds 2 lambda F (w - w*) for "full", not for "current_ce"."""

    class Both(Refresh, EWC, torch.optim.SGD):
        pass

    star = torch.tensor([0.2, -0.3, 0.1], dtype=torch.float64)
    for loss in ("full", "current_ce"):
        model = Quadratic(A.tolist(), star.tolist())
        opt = Both(model, lr=0.0, refresh_gamma=0.03, loss=loss, strength=0.5, ewc_estimator="given", refresh_estimator="given")
        opt.consolidate_ewc(importance={"weight": F})
        with torch.no_grad():
            model.weight.copy_(W)
        opt.step(closure_of(opt, model), **({"data": closure_of(opt, model)} if loss == "current_ce" else {}))
        g = A * W + (2 * 0.5 * F * (W - star) if loss == "full" else 0.0)
        torch.testing.assert_close(model.weight.detach(), W + 0.03 * g, rtol=1e-12, atol=0)


def test_statistics_and_gradients_are_left_alone() -> None:
    """At lr 0 and with the move undone by hand, BatchNorm's buffers are those of a run without Refresh."""
    counted = []
    for cls, options in ((RefreshSGD, {"every": 1, "unlearn_steps": 3, "gamma": 1e-30}), (compose(base=torch.optim.SGD), {})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        opt = cls(model, lr=0.1, **options)
        train(model, opt, 0, 3)
        counted.append([b.clone() for b in model.buffers()])
        assert model.training and all(m.training for m in model.modules())
    assert same(*counted)
    assert counted[0][2].item() == 3


def test_a_probe_that_is_not_finite_moves_nothing_and_is_counted() -> None:
    """Only the second of two unlearning passes is bad: the first one's move is taken back as well."""
    model, passes = Quadratic(A.tolist(), W.tolist()), 0
    opt = RefreshSGD(model, lr=0.1, unlearn_steps=2, estimator="given")

    def loss() -> Tensor:
        nonlocal passes
        passes += 1
        return model() * math.nan if passes == 2 else model()

    opt.step(closure_of(opt, loss))
    assert passes == 3 and opt.last_applied
    assert opt.states[Refresh].refused == 1
    torch.testing.assert_close(model.weight.detach(), W * (1 - 0.1 * A), rtol=1e-14, atol=0)


def test_a_skipped_step_puts_the_weights_back() -> None:
    model = small_net()
    opt = RefreshSGD(model, lr=0.1, momentum=0.9, every=1)
    train(model, opt, 0, 2)
    before, state, passes = weights(model), copy.deepcopy(opt.state_dict(weights=True)["everbatch"]), 0
    x, y = batch(5)

    def loss() -> Tensor:
        nonlocal passes
        passes += 1
        return nn.functional.cross_entropy(model(x), y) * (math.nan if passes == 2 else 1.0)

    opt.step(closure_of(opt, loss))
    assert not opt.last_applied and same(weights(model), before)
    assert opt.states[Refresh].refused == 0
    after = opt.state_dict(weights=True)["everbatch"]
    assert all(torch.equal(t, state["tensors"][n]) for n, t in after["tensors"].items())
    assert after["meta"] == {**state["meta"], "skipped": 1}


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_exception_in_any_pass_puts_the_weights_back(failing: int) -> None:
    class Sharp(Refresh, SAM, torch.optim.SGD):
        pass

    model = small_net()
    opt, before, passes = Sharp(model, lr=0.1, rho=0.5), weights(model), 0
    x, y = batch()

    def loss() -> Tensor:
        nonlocal passes
        passes += 1
        if passes == failing:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(model(x), y)

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure_of(opt, loss))
    assert same(weights(model), before)
    twin = small_net()
    other = Sharp(twin, lr=0.1, rho=0.5)
    for m, o in ((model, opt), (twin, other)):
        train(m, o, 0, 3)
    assert same(weights(model), weights(twin))


def test_its_place_is_left_of_further_passes() -> None:
    with pytest.raises(CompositionError, match=r"class Wrong\(Refresh, SAM, SGD\)"):
        type("Wrong", (SAM, Refresh, torch.optim.SGD), {})
    assert compose(SAM, Refresh, base=torch.optim.SGD).__name__ == "RefreshSAMSGD"


# ---------------------------------------------------------------------------------------------------- state
def test_fisher_of_the_last_task_and_of_all() -> None:
    for decay in (1e-5, 1.0, 0.0):
        opt, _ = quadratic(fisher_decay=decay)
        opt.update_fisher(importance={"weight": F})
        assert torch.equal(opt.states[Refresh].fisher["weight"], F)
        opt.update_fisher(importance={"weight": A})
        torch.testing.assert_close(opt.states[Refresh].fisher["weight"], decay * F + A, rtol=1e-15, atol=0)


@pytest.mark.parametrize("form", ["sde", "normalized"])
def test_a_parameter_unfrozen_or_added_after_a_task_has_no_fisher_information(form: str) -> None:
    def fresh() -> tuple[Any, nn.Module]:
        model = small_net()
        model[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
        opt = RefreshSGD([(n, p) for n, p in model.named_parameters() if n != "2.bias"], lr=0.1, estimator="given", form=form,
                         damping=0.3, delta=0.1, fisher_coef=1.0)
        opt.update_fisher(importance={n: torch.full_like(model.get_parameter(n), 2.0) for n in ("0.bias", "2.weight")})
        model[0].weight.requires_grad_(True)  # type: ignore[index, union-attr]
        opt.add_param_group({"params": [("2.bias", model[2].bias)]})  # type: ignore[index, union-attr]
        return opt, model

    (opt, model), (other, twin) = fresh(), fresh()
    for name in ("0.weight", "2.bias"):
        other.states[Refresh].fisher[name] = torch.zeros_like(twin.get_parameter(name))
    train(model, opt, 0, 3)
    train(twin, other, 0, 3)
    assert same(weights(model), weights(twin))


def test_a_frozen_parameter_keeps_its_fisher_information() -> None:
    model = small_net()
    opt = RefreshSGD(model, lr=0.1, estimator="given", fisher_decay=1.0)
    opt.update_fisher(importance={n: torch.ones_like(p) for n, p in model.named_parameters()})
    model[0].requires_grad_(False)  # type: ignore[index, operator]
    opt.update_fisher(importance={n: torch.ones_like(p) for n, p in model[2].named_parameters(prefix="2")})  # type: ignore[index, operator]
    assert {n: t.unique().tolist() for n, t in opt.states[Refresh].fisher.items()} == {
        "0.weight": [1.0], "0.bias": [1.0], "2.weight": [2.0], "2.bias": [2.0]}


def test_resumed_is_uninterrupted() -> None:
    def fresh() -> tuple[Any, nn.Module]:
        model = small_net()
        return RefreshSGD(model, lr=0.1, momentum=0.9, noise_scale=0.05, every=2), model

    opt, model = fresh()
    train(model, opt, 0, 3)
    opt.update_fisher([batch(20), batch(21)])
    saved = copy.deepcopy(opt.state_dict(weights=True))
    other, twin = fresh()
    train(twin, other, 5, 6)
    other.load_state_dict(saved)
    for o, m in ((opt, model), (other, twin)):
        train(m, o, 3, 8)
    assert same(weights(model), weights(twin))
    assert pickle.loads(pickle.dumps(opt)).states[Refresh].tasks == 1


# ---------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(("options", "text"), [
    ({"form": "paper"}, "Refresh: form='paper', must be sde or normalized"),
    ({"loss": "ce"}, "Refresh: loss='ce', must be full or current_ce"),
    ({"every": 0}, "Refresh: every=0, must be an integer >= 1"),
    ({"unlearn_steps": 0}, "Refresh: unlearn_steps=0, must be an integer >= 1"),
    ({"gamma": -0.1}, "Refresh: gamma=-0.1, must be a finite number >= 0"),
    ({"gamma": math.nan}, "Refresh: gamma=nan"),
    ({"delta": -1e-5}, "Refresh: delta=-1e-05"),
    ({"noise_scale": math.inf}, "Refresh: noise_scale=inf"),
    ({"fisher_coef": -1.0}, "Refresh: fisher_coef=-1.0"),
    ({"noise_coef": -1.0}, "Refresh: noise_coef=-1.0"),
    ({"damping": 0.0}, "Refresh: damping=0.0, must be a finite number >= 1e-08"),
    ({"fisher_decay": 2.0}, r"Refresh: fisher_decay=2.0, must be in \[0, 1\]"),
    ({"estimator": "none"}, "Refresh: estimator='none'"),
    ({"chunk": 0}, "Refresh: chunk=0"),
])
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        RefreshSGD(small_net(), lr=0.1, **options)


def test_a_step_without_what_is_ascended() -> None:
    model = small_net()
    opt = RefreshSGD(model, lr=0.1, loss="current_ce")
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"Refresh needs opt.step\(closure, data=...\)"):
        train(model, opt, 0, 1)
    with pytest.raises(RuntimeError, match=r"Refresh needs opt.step\(closure\)"):
        opt.step()
    assert same(weights(model), before)


def test_bad_fishers_touch_nothing() -> None:
    opt, _ = quadratic(fisher=F)
    for value, text in ((-F, "negative or not finite"), (F * math.nan, "negative or not finite"), (F[:2], "has shape")):
        with pytest.raises(ValueError, match=f"Refresh: importance of .* {text}"):
            opt.update_fisher(importance={"weight": value})
    with pytest.raises(ValueError, match="refresh_estimator"):
        opt.update_fisher([(W, W)])
    assert torch.equal(opt.states[Refresh].fisher["weight"], F) and opt.states[Refresh].tasks == 1
