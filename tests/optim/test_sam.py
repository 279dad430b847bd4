"""SAM in closed form, and what its second pass must not leave behind."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from quadratics import Quadratic, batch, closure_of, same, small_net, train, weights
from torch import nn

from everbatch import compose
from everbatch.optim import SAM
from everbatch.optim.sharpness.sam import ascent

RHO = 0.1 * 2**0.5


class SharpSGD(SAM, torch.optim.SGD):
    pass


def test_quadratic_in_closed_form() -> None:
    """A = diag(1, 10), w = (1, 0.1): g = (1, 1), e = (0.1, 0.1), h = (1.1, 2.0)."""
    model = Quadratic([1.0, 10.0], [1.0, 0.1])
    opt = SharpSGD(model, lr=1.0, rho=RHO)
    loss = opt.step(closure_of(opt, model))
    expected = torch.tensor([1.0 - 1.1, 0.1 - 2.0], dtype=torch.float64)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-12, atol=0)
    assert loss.item() == pytest.approx(0.5 * (1 + 10 * 0.01), rel=1e-15)  # of the first pass, at the weights themselves
    assert not loss.requires_grad


def test_any_quadratic() -> None:
    """f = A (w + rho A w / ||A w||)."""
    g = torch.Generator().manual_seed(0)
    a, w = torch.rand(9, generator=g, dtype=torch.float64), torch.randn(9, generator=g, dtype=torch.float64)
    model = Quadratic(a.tolist(), w.tolist())
    opt = SharpSGD(model, lr=0.3, rho=0.7)
    opt.step(closure_of(opt, model))
    torch.testing.assert_close(model.weight.detach(), w - 0.3 * a * (w + 0.7 * a * w / (a * w).norm()), rtol=1e-12, atol=1e-15)


def test_the_perturbation_is_rho_long_and_follows_the_gradient() -> None:
    model = small_net()
    opt = SharpSGD(model, lr=0.1, rho=0.37)
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    gradient = opt.host.gradient()
    direction = ascent(gradient, 0.37)
    assert direction.norm().item() == pytest.approx(0.37, rel=1e-6)
    for (_, e), (_, g) in zip(direction, gradient, strict=True):
        torch.testing.assert_close(e, g * (0.37 / gradient.norm()).float())


def test_the_second_pass_sees_the_perturbed_weights_and_the_first_its_own() -> None:
    model, seen = Quadratic([1.0, 10.0], [1.0, 0.1]), []
    opt = SharpSGD(model, lr=0.0, rho=RHO)

    def loss() -> torch.Tensor:
        seen.append(model.weight.detach().clone())
        return model()

    opt.step(closure_of(opt, loss))
    torch.testing.assert_close(seen[0], torch.tensor([1.0, 0.1], dtype=torch.float64), rtol=0, atol=0)
    torch.testing.assert_close(seen[1], torch.tensor([1.1, 0.2], dtype=torch.float64), rtol=1e-12, atol=0)
    assert torch.equal(model.weight.detach(), seen[0])
    assert len(seen) == opt.last_passes == 2


@pytest.mark.parametrize("delta", [0.0, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_zero_gradient_is_a_plain_step(dtype: torch.dtype, delta: float) -> None:
    model = Quadratic([1.0, 10.0], [0.0, 0.0], dtype)
    opt = SharpSGD(model, lr=1.0, rho=RHO, delta=delta)
    opt.step(closure_of(opt, model))
    assert torch.equal(model.weight.detach(), torch.zeros(2, dtype=dtype)) and opt.skipped_count == 0


@pytest.mark.parametrize("delta", [0.0, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_gradient_has_no_direction(dtype: torch.dtype, delta: float) -> None:
    model = Quadratic([1.0, 10.0], [0.0, 0.0], dtype)
    opt = SharpSGD(model, lr=1.0)
    model().backward()
    (move,) = ascent(opt.host.gradient(), RHO, delta).tensors
    assert torch.equal(move, torch.zeros(2, dtype=dtype))


def test_a_gradient_that_is_not_a_number_skips_the_step() -> None:
    model = Quadratic([1.0, float("nan")], [1.0, 0.0])
    opt = SharpSGD(model, lr=1.0, rho=RHO)
    opt.step(closure_of(opt, model))
    assert torch.equal(model.weight.detach(), torch.tensor([1.0, 0.0], dtype=torch.float64)) and opt.skipped_count == 1


def test_rho_zero_is_the_base_bit_for_bit() -> None:
    ours, theirs = small_net(), small_net()
    opt = SharpSGD(ours, lr=0.1, momentum=0.9, weight_decay=0.01, rho=0.0)
    base = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for i in range(4):
        train(ours, opt, i, i + 1)
        base.zero_grad()
        x, y = batch(i)
        nn.functional.cross_entropy(theirs(x), y).backward()
        base.step()
    assert same(weights(ours), weights(theirs)) and opt.last_passes == 1


def test_two_runs_with_the_same_seeds_are_equal() -> None:
    runs = []
    for _ in range(2):
        model = small_net(3)
        opt = SharpSGD(model, lr=0.1, rho=0.5)
        train(model, opt, 0, 4)
        runs.append(weights(model))
    assert same(*runs)


def test_frozen_parameters_and_absent_gradients_stay() -> None:
    model = small_net()
    model[0].bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3))
    model.register_parameter("unused", unused)
    before, seen = weights(model), []
    opt = SharpSGD(model, lr=0.1, rho=0.5)
    x, y = batch()

    def loss() -> torch.Tensor:
        seen.append((model[0].bias.detach().clone(), unused.detach().clone(), model[0].weight.detach().clone()))
        return nn.functional.cross_entropy(model(x), y)

    opt.step(closure_of(opt, loss))
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[0][2], seen[1][2])
    named = dict(zip([n for n, _ in model.named_parameters()], before, strict=True))
    assert torch.equal(model[0].bias, named["0.bias"]) and torch.equal(unused, named["unused"])
    assert unused.grad is None and not torch.equal(model[0].weight, named["0.weight"])


def test_dropout_masks_repeat_and_the_stream_goes_on_as_after_one_pass() -> None:
    states, ends = [], []
    for rho in (1e-30, 0.0):  # far below rounding: the second gradient equals the first if the masks do
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 3))
        opt = SharpSGD(model, lr=0.1, rho=rho)
        train(model, opt, 0, 3)
        states.append(torch.get_rng_state())
        ends.append(weights(model))
    assert same(*ends) and torch.equal(*states)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_move_once(momentum: float | None) -> None:
    ends = []
    for rho in (0.5, 0.0):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Linear(4, 3))
        opt = SharpSGD(model, lr=0.0, rho=rho)
        train(model, opt, 0, 3)
        ends.append([b.clone() for b in model.buffers()])
    assert same(*ends)
    assert ends[0][2].item() == 3


def test_statistics_of_any_kind_are_put_back_after_the_second_pass() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x

    model = nn.Sequential(Counts(), nn.Linear(6, 3))
    opt = SharpSGD(model, lr=0.1, rho=0.5)
    train(model, opt, 0, 3)
    assert model[0].calls.item() == 3


def test_an_exception_in_the_second_pass_restores_the_weights() -> None:
    model = small_net()
    opt = SharpSGD(model, lr=0.1, momentum=0.9, rho=0.5)
    train(model, opt, 0, 2)
    before, flags = weights(model), [m.training for m in model.modules()]
    calls = 0

    def failing() -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyError("out of memory, say")
        x, y = batch(2)
        return nn.functional.cross_entropy(model(x), y)

    with pytest.raises(KeyError):
        opt.step(closure_of(opt, failing))
    assert same(weights(model), before) and [m.training for m in model.modules()] == flags
    other = small_net()
    smooth = SharpSGD(other, lr=0.1, momentum=0.9, rho=0.5)
    train(other, smooth, 0, 2)
    train(model, opt, 2, 4)
    train(other, smooth, 2, 4)
    assert same(weights(model), weights(other))


@pytest.mark.parametrize("name", ["rho", "delta"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "1", None, True])
def test_bad_values(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"SAM: {name}={value!r}, must be a finite number >= 0"):
        SharpSGD(small_net(), lr=0.1, **{name: value})


def test_a_perturbation_of_zero_is_no_loss_of_precision() -> None:
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    opt = compose(SAM, base=torch.optim.SGD)(model, lr=0.1, rho=0.05)
    opt.step(closure_of(opt, lambda: 0.0 * model(torch.ones(1, 3, dtype=torch.bfloat16)).sum()))  # a warning would be an error
    assert opt.metrics["perturbation_norm_ratio"] == 1.0 and opt.metrics["perturbation_cosine"] == 1.0


def test_a_perturbation_that_bf16_swallows_is_told_once_also_after_one_of_zero() -> None:
    model = nn.Linear(4, 4).bfloat16()
    for p in model.parameters():
        nn.init.ones_(p)
    opt = compose(SAM, base=torch.optim.SGD)(model, lr=0.0, rho=1e-4)
    for step in range(201):  # looked at in every hundredth step
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            opt.step(closure_of(opt, lambda s=float(step > 0): s * model(torch.ones(1, 4, dtype=torch.bfloat16)).sum()))
        text = "SAMSGD: the working weights' precision swallows the perturbation: realised norm 0.00"
        assert [str(w.message)[: len(text)] for w in told] == [text] * (step == 100)
    assert opt.metrics["perturbation_norm_ratio"] == 0.0
