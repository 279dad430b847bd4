"""Clipping by the norm over the model: torch's rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from quadratics import Quadratic, batch, closure_of, same, small_net, train, weights
from torch import nn

from everbatch.optim import SAM, ClipGradNorm


class ClippedSGD(ClipGradNorm, torch.optim.SGD):
    pass


def test_closed_form() -> None:
    model = Quadratic([1.0, 1.0], [3.0, 4.0])  # g = w, norm 5
    opt = ClippedSGD(model, lr=1.0, max_norm=2.0)
    opt.step(closure_of(opt, model))
    factor = 2.0 / (5.0 + 1e-6)
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64) * (1 - factor)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-12, atol=0)
    assert opt.metrics["grad_norm"].item() == 5.0


def test_agrees_with_torch() -> None:
    ours, theirs = small_net(), small_net()
    opt = ClippedSGD(ours, lr=0.5, max_norm=0.1)
    base = torch.optim.SGD(theirs.parameters(), lr=0.5)
    for i in range(3):
        train(ours, opt, i, i + 1)
        base.zero_grad()
        x, y = batch(i)
        nn.functional.cross_entropy(theirs(x), y).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        base.step()
        torch.testing.assert_close(opt.metrics["grad_norm"].float(), norm)
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)  # torch adds the squares in float32


@pytest.mark.parametrize("max_norm", [math.inf, 1e9])
def test_below_the_bound_no_bit_changes(max_norm: float) -> None:
    clipped, bare = small_net(), small_net()
    train(clipped, ClippedSGD(clipped, lr=0.1, max_norm=max_norm), 0, 3)
    train(bare, ClippedSGD(bare, lr=0.1, max_norm=math.inf), 0, 3)
    assert same(weights(clipped), weights(bare))


def test_the_final_gradient_is_clipped_not_sams_first() -> None:
    class Both(ClipGradNorm, SAM, torch.optim.SGD):
        pass

    model = Quadratic([1.0, 10.0], [1.0, 0.1])
    opt = Both(model, lr=1.0, rho=0.1 * 2**0.5, max_norm=0.5)
    opt.step(closure_of(opt, model))
    h = torch.tensor([1.1, 2.0], dtype=torch.float64)
    expected = torch.tensor([1.0, 0.1], dtype=torch.float64) - h * (0.5 / (h.norm() + 1e-6))
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-12, atol=0)


def test_no_gradients_at_all() -> None:
    model = small_net()
    before = weights(model)
    opt = ClippedSGD(model, lr=0.1)
    opt.step()
    assert same(weights(model), before) and opt.metrics["grad_norm"].item() == 0.0


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "1", None])
def test_bad_values(value: Any) -> None:
    with pytest.raises(ValueError, match="ClipGradNorm: max_norm=.*, must be > 0; pass math.inf to switch it off"):
        ClippedSGD(small_net(), lr=0.1, max_norm=value)
