"""VCL: against autograd through the sampled weights, its predictions, and what it asks for."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import quadratics
import torch
from quadratics import batch, small_net
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import learning
from everbatch import compose, seeds
from everbatch.objective.bregman import gaussian_divergence
from everbatch.optim import SAM, VCL
from everbatch.train import Trainer

SIGMA, PRIOR, SAMPLES, STRENGTH = 0.1, 0.7, 30, 2.0


class VclSGD(VCL, torch.optim.SGD):
    pass


class VclSamSGD(VCL, SAM, torch.optim.SGD):
    pass


def build(model: nn.Module, cls: Any = VclSGD, **change: Any) -> Any:
    options = {"lr": 0.1, "momentum": 0.9, "sigma": SIGMA, "prior": PRIOR, "samples": SAMPLES, "strength": STRENGTH,
               "predictions": 4, "seed": 5}
    return cls(model, **{**options, **change})


def closure_of(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> Any:
    return quadratics.closure_of(opt, lambda: functional.cross_entropy(model(x), y))


def noise(purpose: str, number: int, name: str, like: Tensor) -> Tensor:
    return seeds.normal((5, "vcl", purpose, number, name), 0, like.numel()).to(like).view(like.shape)


class ByHand:
    """The bound in the loss, through autograd: means by SGD, ln sigma by Adam, both of torch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.mean = dict(model.named_parameters())
        self.spread = {n: torch.full_like(p, math.log(SIGMA)).requires_grad_() for n, p in self.mean.items()}
        self.old = {n: (torch.zeros_like(p), torch.full_like(p, PRIOR)) for n, p in self.mean.items()}
        self.sgd = torch.optim.SGD(self.mean.values(), lr=0.1, momentum=0.9)
        self.adam = torch.optim.Adam(self.spread.values(), lr=0.01)

    def step(self, number: int, x: Tensor, y: Tensor) -> None:
        sample = {n: p + noise("step", number, n, p) * self.spread[n].exp() for n, p in self.mean.items()}
        divergence = sum(gaussian_divergence(p, self.spread[n].exp(), *self.old[n]) for n, p in self.mean.items())
        loss = functional.cross_entropy(functional_call(self.model, sample, (x,)), y)
        for opt in (self.sgd, self.adam):
            opt.zero_grad()
        (loss + STRENGTH / SAMPLES * divergence).backward()  # type: ignore[no-untyped-call]
        self.sgd.step()
        self.adam.step()

    def end(self) -> None:
        self.old = {n: (p.detach().clone(), self.spread[n].detach().exp()) for n, p in self.mean.items()}
        self.adam = torch.optim.Adam(self.spread.values(), lr=0.01)


def test_it_is_the_bound_of_the_evidence_through_autograd() -> None:
    model = small_net().double()
    twin = copy.deepcopy(model)
    opt, hand = build(model), ByHand(twin)
    for number in range(8):
        x, y = batch(number)
        opt.step(closure_of(model, opt, x.double(), y))
        hand.step(number, x.double(), y)
        if number == 3:
            opt.consolidate_vcl()
            hand.end()
    state = opt.states[VCL]
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), hand.mean[name].detach(), rtol=0, atol=1e-9)
        torch.testing.assert_close(state.spread[name], hand.spread[name].detach(), rtol=0, atol=1e-9)
    assert state.tasks == 1 and state.steps == 4
    divergence = sum(gaussian_divergence(p, hand.spread[n].exp(), *hand.old[n]) for n, p in hand.mean.items())
    torch.testing.assert_close(opt.vcl_divergence(), STRENGTH / SAMPLES * divergence.detach(), rtol=1e-9, atol=0)  # type: ignore[union-attr]
    assert "2 / samples KL(q(theta), q_old) [VCL]" in opt.describe()


def test_a_prediction_averages_probabilities_and_leaves_every_bit() -> None:
    model = small_net()
    opt = build(model)
    x, _ = batch(0)
    before = copy.deepcopy(model.state_dict())
    got = opt.predicted(lambda: model(x))
    expected = []
    for number in range(4):
        sample = {n: p + SIGMA * noise("prediction", number, n, p) for n, p in model.named_parameters()}
        expected.append(functional_call(model, sample, (x,)).softmax(1))
    torch.testing.assert_close(got.exp(), torch.stack(expected).mean(0).detach(), rtol=1e-5, atol=1e-7)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert torch.equal(build(model, sigma=0.0).predicted(lambda: model(x)), model(x))


def test_in_a_trainer_it_knows_the_samples_and_is_called() -> None:
    sgd = compose(VCL, base=torch.optim.SGD)
    trainer = Trainer(learning.net(smooth=True), functools.partial(sgd, lr=0.1, sigma=0.02, predictions=3), device="cpu",
                      config=Trainer.Config(batch_size=8, epochs=1), prepare=learning.scale)
    trainer.fit(learning.stream())
    optimizer: Any = trainer.optimizer
    assert optimizer.task_samples == 32 and optimizer.states[VCL].tasks == 3
    x = learning.scale(learning.stream().fetch(torch.arange(5)))  # type: ignore[arg-type]
    logs = trainer.predict(x)
    assert torch.allclose(logs.exp().sum(1), torch.ones(5)) and not torch.equal(logs, trainer.module(x))


def test_what_it_needs() -> None:
    model = small_net()
    opt = build(model, samples=0)
    x, y = batch(0)
    with pytest.raises(RuntimeError, match="VclSGD: VCL weighs its divergence by the number of a task's training samples"):
        opt.step(closure_of(model, opt, x, y))
    with pytest.raises(RuntimeError, match=r"VclSGD: VCL needs opt.step\(closure\)"):
        opt.step()
    for wrong, said in (({"sigma": -1.0}, "sigma=-1.0"), ({"prior": 0.0}, "prior=0.0"), ({"predictions": 0}, "predictions=0")):
        with pytest.raises(ValueError, match=f"VCL: {said}"):
            VCL.Config(**wrong)  # type: ignore[arg-type]
    both = build(model, VclSamSGD, rho=0.05)
    both.step(closure_of(model, both, x, y))
    assert both.last_passes == 2
