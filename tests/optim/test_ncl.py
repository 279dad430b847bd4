"""NCL: the step of its equation, its fixed point, and where it must leave the base alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quadratics import batch, small_net, train
from torch import Tensor, nn

from everbatch.objective.bregman import natural_step
from everbatch.optim import NCL


class NclSGD(NCL, torch.optim.SGD):
    pass


class Bowl(nn.Module):
    """1/2 (theta - c)' H (theta - c), of a diagonal H."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.theta = nn.Parameter(torch.randn(7, generator=g, dtype=torch.float64))
        self.c, self.h = torch.randn(7, generator=g, dtype=torch.float64), torch.rand(7, generator=g, dtype=torch.float64) + 0.1
        self.f = torch.rand(7, generator=g, dtype=torch.float64) * 2

    def forward(self) -> Tensor:
        return 0.5 * (self.h * (self.theta - self.c).square()).sum()


def step(opt: Any, model: Bowl) -> None:
    def closure() -> Tensor:
        loss = model()
        opt.backward(loss)
        return loss

    opt.step(closure)


def test_a_step_is_the_kernels() -> None:
    model, prior, lr = Bowl(), 0.3, 0.2
    opt = NclSGD(model, lr=lr, prior=prior, estimator="given")
    step(opt, model)  # the first task is the base's
    start = Bowl()
    with torch.no_grad():
        start.theta -= lr * start.h * (start.theta - start.c)
    torch.testing.assert_close(model.theta, start.theta, rtol=1e-14, atol=1e-15)  # processors fuse products differently

    opt.consolidate_ncl(importance={"theta": model.f})
    mode = model.theta.detach().clone()
    for _ in range(4):
        before = model.theta.detach().clone()
        gradient = model.h * (before - model.c)
        step(opt, model)
        expected = natural_step(before, gradient, mode, prior + model.f, lr * prior)
        torch.testing.assert_close(model.theta.detach(), expected, rtol=1e-12, atol=1e-14)
    away = model.theta.detach() - mode
    torch.testing.assert_close(opt.ncl_penalty(), 0.5 * ((prior + model.f) * away.square()).sum(), rtol=1e-12, atol=0)

    opt.consolidate_ncl(importance={"theta": 2 * model.f})
    state = opt.states[NCL]
    torch.testing.assert_close(state.importance["theta"], 3 * model.f, rtol=1e-14, atol=0)
    assert torch.equal(state.mode["theta"], model.theta) and state.tasks == 2


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_it_comes_to_rest_where_ewc_does(strength: float) -> None:
    model, prior = Bowl(), 0.5
    opt = NclSGD(model, lr=0.4, prior=prior, strength=strength, estimator="given")
    mode = model.theta.detach().clone()
    opt.consolidate_ncl(importance={"theta": model.f})
    for _ in range(400):
        step(opt, model)
    # of  h (theta - c) + 2 * strength * Lambda (theta - mode) = 0
    pull = 2 * strength * (model.f + prior)
    rest = (model.h * model.c + pull * mode) / (model.h + pull)
    torch.testing.assert_close(model.theta.detach(), rest, rtol=1e-9, atol=1e-12)


def test_it_estimates_information_and_says_its_objective() -> None:
    model = small_net()
    twin = copy.deepcopy(model)
    opt: Any = NclSGD(model, lr=0.1, momentum=0.9)
    train(model, opt, 0, 2)
    opt.consolidate_ncl([batch(20), batch(21)])
    assert all(f.min() >= 0 for f in opt.states[NCL].importance.values())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert "0.5 sum Lambda (theta - theta*)^2 [NCL]" in opt.describe()


def test_it_stands_on_sgd() -> None:
    class NclAdam(NCL, torch.optim.AdamW):
        pass

    with pytest.raises(ValueError, match="NCL: base AdamW, must be SGD"):
        NclAdam(Bowl(), lr=0.1, estimator="given")
    for wrong, said in (({"prior": 0.0}, "prior=0.0"), ({"strength": -1.0}, "strength=-1.0"), ({"estimator": "no"}, "estimator")):
        with pytest.raises(ValueError, match=f"NCL: {said}"):
            NCL.Config(**wrong)  # type: ignore[arg-type]
