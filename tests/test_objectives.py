"""Bregman divergences: their properties, and the reductions to the losses in use."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from everbatch.objective import bregman as o

G = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


P, Q, U, V = draw(6).softmax(-1), draw(6).softmax(-1), draw(6), draw(6)
ROOT = draw(6, 6)
FULL = ROOT @ ROOT.T
GENERATORS = {"negative entropy": (o.negative_entropy, P, Q), "squared norm": (o.squared_norm, U, V),
              "diagonal": (o.quadratic_form(FULL.diagonal()), U, V), "full": (o.quadratic_form(FULL), U, V)}


@pytest.mark.parametrize("name", GENERATORS)
def test_what_every_divergence_is(name: str) -> None:
    """Positive, zero at equality, unchanged by an affine part, and its gradient is the difference of the generator's."""
    generator, a, b = GENERATORS[name]
    value = o.bregman(generator, a, b)
    assert value > 0
    assert o.bregman(generator, b, b) == 0
    slope = draw(6)
    torch.testing.assert_close(o.bregman(lambda x: generator(x) + slope @ x + 3.0, a, b), value, rtol=1e-12, atol=1e-14)
    moving = a.clone().requires_grad_()
    o.bregman(generator, moving, b).backward()  # type: ignore[no-untyped-call]
    difference = torch.func.grad(generator)(a) - torch.func.grad(generator)(b)
    torch.testing.assert_close(moving.grad, difference, rtol=1e-12, atol=1e-14)


def test_no_gradient_flows_to_the_reference() -> None:
    b = Q.clone().requires_grad_()
    a = P.clone().requires_grad_()
    o.bregman(o.negative_entropy, a, b).backward()  # type: ignore[no-untyped-call]
    assert b.grad is None


def test_reductions() -> None:
    torch.testing.assert_close(o.bregman(o.negative_entropy, P, Q), o.kl_divergence(P, Q), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(o.bregman(o.squared_norm, U, V), (U - V).square().sum(), rtol=1e-12, atol=0)
    diagonal = FULL.diagonal()
    torch.testing.assert_close(2 * o.bregman(o.quadratic_form(diagonal), U, V), o.quadratic_penalty(U, V, diagonal),
                               rtol=1e-11, atol=0)
    onehot = nn.functional.one_hot(torch.tensor(2), 6).double()
    torch.testing.assert_close(o.kl_divergence(onehot, U.softmax(-1)), -U.log_softmax(-1)[2], rtol=1e-12, atol=0)
    uniform = torch.full_like(P, 1 / 6)
    torch.testing.assert_close(o.uniform_divergence(P.log()), o.kl_divergence(P, uniform), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(o.entropy(P.log()), -o.negative_entropy(P), rtol=1e-12, atol=0)


def test_distillation_is_a_divergence_and_the_old_models_entropy() -> None:
    new, old = draw(4, 3), draw(4, 3)
    target, found = (old / 2).softmax(-1), (new / 2).softmax(-1)
    torch.testing.assert_close(o.distillation(new, old), o.kl_divergence(target, found) + o.entropy(old / 2), rtol=1e-12, atol=0)
    powers = torch.softmax(new, -1) ** 0.5  # the reference's form of the tempered softmax
    torch.testing.assert_close(found, powers / powers.sum(-1, keepdim=True), rtol=1e-12, atol=0)


def test_gaussian_divergence_is_torchs() -> None:
    mean, old, s, t = draw(7), draw(7), draw(7).exp(), draw(7).exp()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, s), normal(old, t)).sum()
    torch.testing.assert_close(o.gaussian_divergence(mean, s, old, t), expected, rtol=1e-12, atol=0)


def test_the_natural_step_rests_where_ewc_does() -> None:
    """g = -Lambda (theta - mu) leaves theta; a diagonal precision is the same as its matrix."""
    theta, mode = draw(6), draw(6)
    still = o.natural_step(theta, -FULL @ (theta - mode), mode, FULL, 0.3)
    torch.testing.assert_close(still, theta, rtol=1e-9, atol=1e-10)
    diagonal, g = FULL.diagonal(), draw(6)
    torch.testing.assert_close(o.natural_step(theta, g, mode, diagonal, 0.3),
                               o.natural_step(theta, g, mode, torch.diag(diagonal), 0.3), rtol=1e-10, atol=1e-12)


def test_certain_predictions_are_finite() -> None:
    certain = torch.tensor([1.0, 0.0, 0.0])
    assert o.negative_entropy(certain) == 0
    assert o.kl_divergence(certain, torch.tensor([0.5, 0.5, 0.0])) == pytest.approx(math.log(2))
    assert o.entropy(torch.tensor([500.0, 0.0, 0.0])) == 0
