"""The state of a model that has grown since it was saved: known names go on, new ones begin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quadratics import batch, closure_of, same
from torch import Tensor, nn

from everbatch import compose
from everbatch.errors import CheckpointMismatch
from everbatch.nn import PartsHead
from everbatch.optim import EMA, ClipGradNorm

OPTIONS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.01, "max_norm": 1.0, "ema_decay": 0.5}


def net(*sizes: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), PartsHead(5, sizes))


def optimizer(target: Any) -> Any:
    return compose(ClipGradNorm, EMA, base=torch.optim.AdamW)(target, **OPTIONS)


def apart(model: nn.Module, *, lr: float = 0.02) -> list[dict[str, Any]]:
    """A group for what was there, and one for the second part of the head."""
    named = list(model.named_parameters())
    new = [pair for pair in named if pair[0].startswith("2.parts.1.")]
    return [{"params": [pair for pair in named if pair not in new]}, {"params": new, "lr": lr}]


def train(model: nn.Module, opt: Any, begin: int, end: int) -> None:
    for i in range(begin, end):
        x, y = batch(i)
        opt.step(closure_of(opt, lambda x=x, y=y: nn.functional.cross_entropy(model(x), y)))


def tensors(opt: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = opt.state_dict(weights=True)["everbatch"]["tensors"]
    return found


def saved() -> tuple[dict[str, Any], dict[str, Tensor]]:
    model = net(3)
    opt = optimizer(model)
    opt.param_groups[0]["lr"] = 0.005
    train(model, opt, 0, 4)
    return opt.state_dict(weights=True), tensors(opt)


def test_known_names_go_on_and_new_ones_begin() -> None:
    state, before = saved()
    model = net(3, 2, seed=5)
    fresh = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = optimizer(apart(model))
    opt.load_state_dict(state, grown=True)
    after = tensors(opt)
    assert same([after[k] for k in before], list(before.values())), "a known tensor changed"
    new = {n for n in fresh if n.startswith("2.parts.1.")}
    assert after.keys() - before.keys() == {f"master/{n}" for n in new}, "moments of what is new"
    assert all(torch.equal(after[f"master/{n}"], fresh[n]) for n in new)
    assert [g["lr"] for g in opt.param_groups] == [0.005, 0.02], "a new group has its own options"
    assert opt.step_count == 4
    train(model, opt, 4, 5)
    steps = {n: float(opt.state[p]["step"]) for n, p in model.named_parameters()}
    assert {steps[n] for n in new} == {1.0} and {steps[n] for n in fresh if n not in new} == {5.0}
    assert set(opt.states[EMA].average) == set(fresh), "the average of what is new begins"


def test_a_growth_of_nothing_is_the_same_bits() -> None:
    state, _ = saved()
    ends = []
    for grown in (False, True):
        model = net(3, seed=7)
        opt = optimizer(model)
        opt.load_state_dict(state, grown=grown)
        train(model, opt, 4, 8)
        ends.append(list(tensors(opt).values()))
    assert same(*ends)


def refuse(target: Any, model: nn.Module, text: str) -> None:
    state, _ = saved()
    opt = optimizer(target)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(CheckpointMismatch, match=text):
        opt.load_state_dict(state, grown=True)
    assert same([p.detach() for p in model.parameters()], before), "touched"


def test_what_does_not_fit_is_refused_before_anything_is_touched() -> None:
    wider = net(5)
    refuse(wider, wider, r"\['2.parts.0.weight', '2.parts.0.bias'\] differ .*\(shape \[\(3, 5\), \(3,\)\]")
    other = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
    strange = nn.Sequential(nn.Identity(), other)
    refuse(strange, strange, "no trained parameter in common")


def test_members_of_two_saved_groups_are_not_put_into_one() -> None:
    model = net(3, 2)
    opt = optimizer(apart(model))
    train(model, opt, 0, 1)
    twin = optimizer(net(3, 2))
    with pytest.raises(CheckpointMismatch, match=r"are in one parameter group here and in two in the state"):
        twin.load_state_dict(opt.state_dict(weights=True), grown=True)


def test_without_the_word_a_grown_model_is_refused() -> None:
    state, _ = saved()
    with pytest.raises(CheckpointMismatch, match="differ between the state and the model"):
        optimizer(apart(net(3, 2))).load_state_dict(state)
