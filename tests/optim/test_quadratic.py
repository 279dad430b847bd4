"""EWC, SI and MAS in closed form: against autograd on the penalty written out, with other mixins, saved and skipped."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quadratics import Quadratic, batch, closure_of, same, small_net, train, weights
from torch import Tensor, nn

from everbatch.optim import EWC, MAS, SAM, SI, diagonal_fisher
from everbatch.optim.memory.ewc import merge_quadratics
from everbatch.optim.memory.si import path_importance


class EwcSGD(EWC, torch.optim.SGD):
    pass


class SiSGD(SI, torch.optim.SGD):
    pass


class MasSGD(MAS, torch.optim.SGD):
    pass


class EwcSamSGD(EWC, SAM, torch.optim.SGD):
    pass


CLASSES: dict[str, tuple[Any, dict[str, Any], Callable[[Any], None]]] = {
    "EWC": (EwcSGD, {"strength": 0.7}, lambda opt: opt.consolidate_ewc([batch(20), batch(21)])),
    "EWC separate": (EwcSGD, {"strength": 0.7, "form": "separate"}, lambda opt: opt.consolidate_ewc([batch(20), batch(21)])),
    "SI": (SiSGD, {"strength": 0.7, "xi": 0.01}, lambda opt: opt.consolidate_si()),
    "SI squares": (SiSGD, {"strength": 0.7, "xi": 0.01, "rule": "grad_square"}, lambda opt: opt.consolidate_si()),
    "MAS": (MasSGD, {"strength": 0.1}, lambda opt: opt.consolidate_mas([batch(20), batch(21)])),
}


def build(name: str, **change: Any) -> tuple[Any, nn.Module]:
    cls, options, _ = CLASSES[name]
    model = small_net()
    return cls(model, lr=0.1, momentum=0.9, **{**options, **change}), model


def life(name: str, **change: Any) -> tuple[Any, nn.Module]:
    """Two tasks and a half."""
    opt, model = build(name, **change)
    for task in range(2):
        train(model, opt, 3 * task, 3 * task + 3)
        CLASSES[name][2](opt)
    train(model, opt, 6, 9)
    return opt, model


# ---------------------------------------------------------------------------------------------------- closed forms
def test_merged_quadratics_are_the_sum() -> None:
    g = torch.Generator().manual_seed(0)
    s, f = (torch.rand(50, generator=g, dtype=torch.float64) for _ in range(2))
    s[:5], f[3:8] = 0, 0
    m, w, t = (torch.randn(50, generator=g, dtype=torch.float64) for _ in range(3))
    total, centre, rest = merge_quadratics(s, m, f, w)
    expected = s * (t - m) ** 2 + f * (t - w) ** 2
    torch.testing.assert_close(total * (t - centre) ** 2 + rest, expected, rtol=1e-10, atol=1e-13)
    assert torch.equal(centre[3:5], w[3:5])  # where no task minds


@pytest.mark.parametrize("form", ["online", "separate", "mean"])
def test_ewc_against_the_penalty_in_the_loss(form: str) -> None:
    """Three tasks of plain SGD with strength * sum_k F_k (theta - theta_k)^2 in the loss, through autograd."""
    model, strength, gamma = small_net().double(), 0.6, 0.7
    twin = copy.deepcopy(model)
    opt = EwcSGD(model, lr=0.1, momentum=0.9, weight_decay=0.01, strength=strength, form=form, gamma=gamma)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    kept: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def penalty() -> Tensor:
        terms = [(f[n] * (p - a[n]).square()).sum() for f, a in kept for n, p in twin.named_parameters()]
        return strength * (torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64))

    for task in range(3):
        data = [tuple(t.double() if t.is_floating_point() else t for t in batch(3 * task + i)) for i in range(3)]
        for x, y in data:
            torch.testing.assert_close(opt.ewc_penalty(), penalty(), rtol=1e-9, atol=1e-13)
            opt.step(closure_of(opt, lambda x=x, y=y: nn.functional.cross_entropy(model(x), y)))
            plain.zero_grad()
            (nn.functional.cross_entropy(twin(x), y) + penalty()).backward()
            plain.step()
        opt.consolidate_ewc(data)
        new = diagonal_fisher(opt, data)
        here = {n: p.detach().clone() for n, p in twin.named_parameters()}
        if form != "separate" and kept:
            old = kept.pop()[0]
            new = {n: (old[n] * task + f) / (task + 1) if form == "mean" else gamma * old[n] + f for n, f in new.items()}
        kept.append((new, here))
    for a, b in zip(weights(model), weights(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_strength_is_without_the_half() -> None:
    """1-d: gradient a w + 2 lambda F (w - w*)."""
    model = Quadratic([2.0], [1.0])
    opt = EwcSGD(model, lr=0.1, strength=0.3, estimator="given")
    opt.consolidate_ewc(importance={"weight": torch.tensor([5.0], dtype=torch.float64)})
    with torch.no_grad():
        model.weight.fill_(1.5)
    opt.step(closure_of(opt, model))
    expected = 1.5 - 0.1 * (2.0 * 1.5 + 2 * 0.3 * 5.0 * 0.5)
    assert model.weight.item() == pytest.approx(expected, rel=1e-14)


def test_sam_sees_the_penalty_in_both_passes() -> None:
    """L = 1/2 a w^2 + lambda F (w - w*)^2: SAM's step on the sum, written out."""
    a, w, f, star = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 10.0], [1.0, 0.1], [3.0, 0.5], [0.2, -0.3]))
    model = Quadratic(a.tolist(), star.tolist())
    opt = EwcSamSGD(model, lr=0.3, rho=0.4, delta=0.0, strength=0.25, estimator="given")
    opt.consolidate_ewc(importance={"weight": f})
    with torch.no_grad():
        model.weight.copy_(w)
    opt.step(closure_of(opt, model))

    def gradient(t: Tensor) -> Tensor:
        return a * t + 2 * 0.25 * f * (t - star)

    g = gradient(w)
    torch.testing.assert_close(model.weight.detach(), w - 0.3 * gradient(w + 0.4 * g / g.norm()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", ["path_integral", "grad_square"])
def test_si_by_hand(rule: str) -> None:
    """A quadratic, two tasks of three steps, with momentum and weight decay."""
    a = torch.tensor([1.0, 4.0], dtype=torch.float64)
    model = Quadratic(a.tolist(), [1.0, -0.5])
    lr, c, xi = 0.1, 0.8, 0.05
    opt = SiSGD(model, lr=lr, momentum=0.9, weight_decay=0.1, strength=c, xi=xi, rule=rule)
    w, v, omega = torch.tensor([1.0, -0.5], dtype=torch.float64), torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    star, importance, first = w.clone(), torch.zeros(2, dtype=torch.float64), True
    for _ in range(2):
        for _ in range(3):
            opt.step(closure_of(opt, model))
            data = a * w
            total = data + 2 * c * importance * (w - star)
            v = total + 0.1 * w if first else 0.9 * v + total + 0.1 * w
            first, new = False, w - lr * v
            omega = omega + (data * (w - new) if rule == "path_integral" else lr * total.square())
            w = new
            torch.testing.assert_close(model.weight.detach(), w, rtol=1e-11, atol=1e-13)
        opt.consolidate_si()
        importance = importance + omega / ((w - star).square() + xi)
        star, omega = w.clone(), torch.zeros(2)
        torch.testing.assert_close(opt.states[SI].importance["weight"], importance, rtol=1e-11, atol=1e-13)


def test_si_reads_the_data_gradient_at_the_weights() -> None:
    """Beside other penalties on either side, and SAM's second pass, the path integral takes the first pass's data gradient."""

    class Left(EWC, SI, SAM, torch.optim.SGD):
        pass

    class Right(SAM, SI, EWC, torch.optim.SGD):
        pass

    for cls in (Left, Right):
        model = Quadratic([1.0, 4.0], [1.0, -0.5])
        opt = cls(model, lr=0.1, rho=0.3, ewc_strength=2.0, si_strength=1.0, estimator="given")
        opt.consolidate_ewc(importance={"weight": torch.ones(2, dtype=torch.float64)})
        with torch.no_grad():
            model.weight.add_(0.3)
        before = model.weight.detach().clone()
        opt.step(closure_of(opt, model))
        expected = torch.tensor([1.0, 4.0], dtype=torch.float64) * before * (before - model.weight.detach())
        torch.testing.assert_close(opt.states[SI].contribution["weight"], expected, rtol=1e-12, atol=1e-14)


def test_mas_keeps_a_moving_average() -> None:
    opt, _ = build("MAS", retain=0.25)
    opt.consolidate_mas([batch(20)])
    first = {n: t.clone() for n, t in opt.states[MAS].importance.items()}
    opt.consolidate_mas([batch(21)])
    twin, _ = build("MAS")
    twin.consolidate_mas([batch(21)])
    for name, got in opt.states[MAS].importance.items():
        torch.testing.assert_close(got, 0.25 * first[name] + 0.75 * twin.states[MAS].importance[name])


# ---------------------------------------------------------------------------------------------------- the contract
@pytest.mark.parametrize("name", CLASSES)
def test_zero_strength_and_the_first_task_are_the_bare_base(name: str) -> None:
    bare, model = torch.optim.SGD, small_net()
    opt = bare(model.parameters(), lr=0.1, momentum=0.9)
    for i in range(9):
        x, y = batch(i)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        if i == 2:
            after_three = weights(model)
    _, off = life(name, strength=0.0)
    assert same(weights(off), weights(model))
    first, untouched = build(name)
    train(untouched, first, 0, 3)
    assert same(weights(untouched), after_three)
    _, on = life(name)
    assert not same(weights(on), weights(model))


@pytest.mark.parametrize("name", CLASSES)
def test_resumed_is_uninterrupted(name: str) -> None:
    opt, model = build(name)
    train(model, opt, 0, 3)
    CLASSES[name][2](opt)
    train(model, opt, 3, 5)
    saved = copy.deepcopy(opt.state_dict(weights=True))
    other, twin = build(name)
    train(twin, other, 7, 9)
    other.load_state_dict(saved)
    for o, m in ((opt, model), (other, twin)):
        train(m, o, 5, 7)
        CLASSES[name][2](o)
        train(m, o, 7, 9)
    assert same(weights(model), weights(twin))
    thawed = pickle.loads(pickle.dumps(opt))
    assert all(torch.equal(a, b) for part in opt.states for a, b in zip(
        opt.states[part].importance.values(), thawed.states[part].importance.values(), strict=True))


@pytest.mark.parametrize("name", CLASSES)
def test_a_skipped_step_changes_nothing(name: str) -> None:
    opt, model = life(name)
    before, tensors = weights(model), copy.deepcopy(opt.state_dict(weights=True)["everbatch"]["tensors"])
    train(model, opt, 9, 10, scale=math.nan)
    assert opt.skipped_count == 1 and same(weights(model), before)
    after = opt.state_dict(weights=True)["everbatch"]["tensors"]
    assert all(torch.equal(after[n], t) for n, t in tensors.items())


def test_what_no_pass_reaches_is_pulled_as_by_a_penalty_in_the_loss() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "spare": nn.Linear(2, 2)})
    opt = EwcSGD(model, lr=0.1, strength=1.0, estimator="given")
    opt.consolidate_ewc(importance={n: torch.ones_like(p) for n, p in model.named_parameters()})
    anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        model["spare"].weight.add_(1.0)
    twin = copy.deepcopy(model)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)

    def loss(m: nn.Module) -> Tensor:
        return m["used"](torch.ones(1, 2)).square().sum()  # type: ignore[index]

    (loss(twin) + sum((p - anchor[n]).square().sum() for n, p in twin.named_parameters())).backward()
    plain.step()
    opt.step(closure_of(opt, lambda: loss(model)))
    for (name, got), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, msg=name)
    assert not torch.equal(model["spare"].weight, anchor["spare.weight"] + 1.0)


@pytest.mark.parametrize("how", ["unfrozen", "added"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_parameter_that_comes_later_starts_with_its_first_task(name: str, how: str) -> None:
    """A task leaves for it what it leaves in an optimizer that begins there; the penalty is too small to count."""
    opt, model = build(name, strength=1e-30)
    late = ("0.weight", "0.bias") if how == "unfrozen" else ("3.weight", "3.bias")
    if how == "unfrozen":
        model[0].requires_grad_(False)  # type: ignore[index, operator]
    train(model, opt, 0, 2)
    CLASSES[name][2](opt)
    if how == "unfrozen":
        model[0].requires_grad_(True)  # type: ignore[index, operator]
    else:
        model.append(nn.Linear(3, 3))  # type: ignore[operator]
        opt.add_param_group({"params": [(f"3.{n}", p) for n, p in model[3].named_parameters()]})  # type: ignore[index, union-attr]
    opt.host.reset_moments()
    twin = copy.deepcopy(model)
    first = CLASSES[name][0](twin, lr=0.1, momentum=0.9, **{**CLASSES[name][1], "strength": 1e-30})
    for o, m in ((opt, model), (first, twin)):
        train(m, o, 2, 4)
        CLASSES[name][2](o)
    assert same(weights(model), weights(twin))
    state, expected = (next(iter(o.states.values())) for o in (opt, first))
    for n in late:
        assert torch.equal(state.importance[n], expected.importance[n]) and torch.equal(state.anchor[n], expected.anchor[n])


@pytest.mark.parametrize("name", CLASSES)
def test_a_parameter_frozen_at_a_tasks_end_keeps_what_it_had(name: str) -> None:
    opt, model = build(name)
    train(model, opt, 0, 2)
    CLASSES[name][2](opt)
    state = next(iter(opt.states.values()))
    before = {n: (state.importance[n].clone(), state.anchor[n].clone()) for n in ("0.weight", "0.bias")}
    model[0].requires_grad_(False)  # type: ignore[index, operator]
    train(model, opt, 2, 4)
    CLASSES[name][2](opt)
    assert all(torch.equal(state.importance[n], f) and torch.equal(state.anchor[n], a) for n, (f, a) in before.items())
    model[0].requires_grad_(True)  # type: ignore[index, operator]
    train(model, opt, 4, 5)


def test_a_mean_counts_the_tasks_in_which_a_parameter_was_trained() -> None:
    opt, model = build("EWC", form="mean", estimator="given")
    for task, importance in enumerate((1.0, 4.0, 10.0)):
        model[0].requires_grad_(task > 0)  # type: ignore[index, operator]
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        opt.consolidate_ewc(importance={n: torch.full_like(p, importance) for n, p in trained.items()})
    kept = opt.states[EWC].importance
    assert {n: set(f.view(-1).tolist()) for n, f in kept.items()} == {
        "0.weight": {7.0}, "0.bias": {7.0}, "2.weight": {5.0}, "2.bias": {5.0}}


def test_si_counts_a_path_on_when_a_parameter_was_frozen_at_a_tasks_end() -> None:
    opt, model = build("SI", strength=1e-30)
    train(model, opt, 0, 2)
    path, anchor = opt.states[SI].contribution["0.bias"].clone(), opt.states[SI].anchor["0.bias"].clone()
    model[0].requires_grad_(False)  # type: ignore[index, operator]
    opt.consolidate_si()
    model[0].requires_grad_(True)  # type: ignore[index, operator]
    opt.consolidate_si()
    expected = path_importance(torch.zeros(5), path, model[0].bias.detach(), anchor, 0.01)  # type: ignore[index, union-attr]
    assert torch.equal(opt.states[SI].importance["0.bias"], expected)


@pytest.mark.parametrize("rule", ["path_integral", "grad_square"])
def test_si_sums_small_steps_of_bf16_weights(rule: str) -> None:
    """A weight of constant gradient 1: the sum of its steps' contributions, which bf16 would stop taking in at 256 of them."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.zeros_(model.weight)
    opt = SiSGD(model, lr=2.0**-9, rule=rule, strength=1e-30)
    for _ in range(512):
        with torch.no_grad():
            model.weight.zero_()  # so that no step rounds
        opt.step(closure_of(opt, lambda: model.weight.sum()))
    assert opt.states[SI].contribution["weight"].item() == 1.0 and model.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", CLASSES)
def test_a_bf16_model_is_pulled_and_saved_with_sums_in_fp32(name: str) -> None:
    cls, options, consolidate = CLASSES[name]

    def fresh() -> tuple[Any, nn.Module]:
        model = small_net().bfloat16()
        return cls(model, lr=0.1, **options), model

    def go(opt: Any, model: nn.Module, begin: int) -> None:
        for i in range(begin, begin + 3):
            x, y = batch(i)
            opt.step(closure_of(opt, lambda x=x, y=y: nn.functional.cross_entropy(model(x.bfloat16()), y)))

    (opt, model), (other, twin) = fresh(), fresh()
    for task in range(2):
        go(opt, model, 3 * task)
        consolidate(opt)
    go(opt, model, 6)
    other.load_state_dict(copy.deepcopy(opt.state_dict(weights=True)))
    for o, m in ((opt, model), (other, twin)):
        go(o, m, 9)
        consolidate(o)
    assert same(weights(model), weights(twin)) and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    state, again = (next(iter(o.states.values())) for o in (opt, other))
    assert {t.dtype for t in state.importance.values()} == {torch.float32}
    assert same(list(state.importance.values()), list(again.importance.values()))


@pytest.mark.parametrize(("cls", "options", "text"), [
    (EwcSGD, {"strength": -1.0}, r"EWC: strength=-1.0, must be a finite number >= 0"),
    (EwcSGD, {"strength": math.nan}, r"EWC: strength=nan"),
    (EwcSGD, {"strength": math.inf}, r"EWC: strength=inf"),
    (EwcSGD, {"gamma": 1.5}, r"EWC: gamma=1.5, must be in \[0, 1\]"),
    (EwcSGD, {"form": "both"}, r"EWC: form='both', must be separate, online or mean"),
    (EwcSGD, {"estimator": "true"}, r"EWC: estimator='true', must be one of reference"),
    (EwcSGD, {"denominator": "n"}, r"EWC: denominator='n', must be samples or loader"),
    (EwcSGD, {"chunk": 0}, r"EWC: chunk=0, must be an integer >= 1"),
    (SiSGD, {"strength": -0.1}, r"SI: strength=-0.1"),
    (SiSGD, {"xi": 0.0}, r"SI: xi=0.0, must be a finite number > 0"),
    (SiSGD, {"rule": "path"}, r"SI: rule='path', must be path_integral or grad_square"),
    (MasSGD, {"strength": -0.1}, r"MAS: strength=-0.1"),
    (MasSGD, {"retain": -0.1}, r"MAS: retain=-0.1, must be in \[0, 1\]"),
    (MasSGD, {"chunk": 1.5}, r"MAS: chunk=1.5"),
])
def test_bad_options(cls: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        cls(small_net(), lr=0.1, **options)


def test_bad_consolidations_touch_nothing() -> None:
    opt, model = build("EWC")
    opt.consolidate_ewc([batch(20)])
    before = copy.deepcopy(opt.state_dict(weights=True)["everbatch"])
    good = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    for batches, text in ((None, "both or neither of batches and importance"), ([], "no rows on any rank"),
                          ([(torch.ones(1, 6), torch.tensor([7]))], "label")):
        with pytest.raises(ValueError, match=text):
            opt.consolidate_ewc(batches)
    with pytest.raises(ValueError, match="both or neither"):
        opt.consolidate_ewc([batch(20)], importance=good)
    with pytest.raises(ValueError, match="is negative or not finite"):
        opt.consolidate_ewc(importance={**good, "0.bias": -good["0.bias"]})
    given = EwcSGD(model, lr=0.1, estimator="given")
    with pytest.raises(ValueError, match=r"must be importance=...; build with ewc_estimator='empirical'"):
        given.consolidate_ewc([batch(20)])
    after = opt.state_dict(weights=True)["everbatch"]
    assert after["meta"] == before["meta"]
    assert all(torch.equal(after["tensors"][n], t) for n, t in before["tensors"].items())
