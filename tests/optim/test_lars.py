"""LARS against timm, in closed form, at its limits, and beside other parts."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from quadratics import Quadratic, batch, closure_of, same, small_net, train, weights
from torch import Tensor, nn

from everbatch.errors import CompositionError
from everbatch.optim import LAMB, LARS, SAM, ClipGradNorm, OptimizerMixin, groups
from everbatch.optim.layerwise.lars import fold_decay_, lars_ratio

F64: dict[str, Any] = {"dtype": torch.float64}


class LayerwiseSGD(LARS, torch.optim.SGD):
    pass


class PlainSGD(OptimizerMixin, torch.optim.SGD):
    pass


def unnamed(named: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**g, "params": [p for _, p in g["params"]]} for g in named]


def named(model: nn.Module, *, split: bool) -> list[dict[str, Any]]:
    """Groups with decay 0.05: the usual two, or everything in one."""
    if split:
        return groups(model, weight_decay=0.05)
    return [{"params": list(model.named_parameters()), "weight_decay": 0.05}]


def loss_of(model: nn.Module, i: int) -> Tensor:
    x, y = batch(i)
    return nn.functional.cross_entropy(model(x.double()), y)


def one_step(w: Tensor, g: Tensor, **options: Any) -> Tensor:
    """Weights after one step from w with gradient g, as one tensor with weight_decay 0.1 unless given."""
    p = nn.Parameter(w.clone())
    p.grad = g.clone()
    LayerwiseSGD([("w", p)], **{"lr": 1.0, "weight_decay": 0.1, "trust_eps": 0.0, **options}).step()
    return p.detach()


@pytest.mark.parametrize("options", [
    {}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "trust_clip": True, "lr": 0.01}, {"momentum": 0.9, "trust_clip": True, "always_adapt": True},
], ids=str)
@pytest.mark.parametrize("split", [True, False])
def test_the_bits_of_timm(options: dict[str, Any], split: bool) -> None:
    """Six steps with a rate that changes, in float64: biases excluded, or everything in one group."""
    timm = pytest.importorskip("timm.optim")
    options = {"lr": 0.5, "trust_coeff": 0.1, **options}
    ours, theirs = small_net().double(), small_net().double()
    opt = LayerwiseSGD(named(ours, split=split), **options)
    reference = timm.Lars(unnamed(named(theirs, split=split)), **options)
    for i in range(6):
        for group in (*opt.param_groups, *reference.param_groups):
            group["lr"] = options["lr"] * (1 + i % 3)
        opt.step(closure_of(opt, functools.partial(loss_of, ours, i)))
        reference.zero_grad()
        loss_of(theirs, i).backward()
        reference.step()
    assert same(weights(ours), weights(theirs))
    assert not same(weights(ours), weights(small_net().double()))


def test_closed_form() -> None:
    """||w|| = 5, ||g|| = 10, decay 0.1: q = c * 5 / (10 + 0.5), d = q * (g + 0.1 w)."""
    w, g = torch.tensor([3.0, 4.0], **F64), torch.tensor([6.0, -8.0], **F64)
    moved = one_step(w, g, lr=0.5, trust_coeff=0.02)
    q = 0.02 * 5 / 10.5
    torch.testing.assert_close(moved, w - 0.5 * q * torch.tensor([6.3, -7.6], **F64), rtol=1e-15, atol=0)


def test_eps_and_clipping_in_closed_form() -> None:
    w, g = torch.tensor([3.0, 4.0], **F64), torch.tensor([6.0, -8.0], **F64)
    d = torch.tensor([6.3, -7.6], **F64)
    q = 0.02 * 5 / (10.5 + 1.5)
    torch.testing.assert_close(one_step(w, g, trust_coeff=0.02, trust_eps=1.5), w - q * d, rtol=1e-15, atol=0)
    # LARC: q / lr above 1 is 1, below it the rate does not matter.
    torch.testing.assert_close(one_step(w, g, lr=q / 2, trust_coeff=0.02, trust_eps=1.5, trust_clip=True), w - q / 2 * d,
                               rtol=1e-15, atol=0)
    torch.testing.assert_close(one_step(w, g, lr=q * 2, trust_coeff=0.02, trust_eps=1.5, trust_clip=True), w - q * d,
                               rtol=1e-15, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 3.0, 1e8])
def test_the_step_does_not_know_the_gradients_scale(scale: float) -> None:
    """Without decay and eps, g and scale * g give one step, of trust_coeff * ||w||."""
    g = torch.Generator().manual_seed(3)
    w, d = torch.randn(7, 5, generator=g, **F64), torch.randn(7, 5, generator=g, **F64)
    options = {"weight_decay": 0.0, "always_adapt": True, "trust_coeff": 0.3}
    moved = one_step(w, d, **options)
    torch.testing.assert_close(one_step(w, scale * d, **options), moved, rtol=1e-14, atol=1e-15)
    assert (moved - w).norm().item() == pytest.approx(0.3 * w.norm().item(), rel=1e-14)


def test_a_norm_of_zero_is_plain_sgd() -> None:
    zero, some = torch.zeros(3, **F64), torch.tensor([1.0, 2.0, 3.0], **F64)
    assert torch.equal(one_step(zero, some, lr=0.5), -0.5 * some)  # q = 1
    assert torch.equal(one_step(some, zero, lr=0.5), some - 0.5 * (0.1 * some))  # decay alone
    assert torch.equal(one_step(zero, zero), zero)
    ratios = lars_ratio(torch.tensor([0.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 4.0]), weight_decay=0.0, trust_coeff=0.5)
    assert ratios.tolist() == [1.0, 1.0, 0.25]


def test_excluded_tensors_are_plain_sgd_bit_for_bit() -> None:
    """A group without decay, beside an adapted one."""
    nets = [small_net(), small_net()]
    options = {"lr": 0.3, "momentum": 0.9, "nesterov": True}
    g = torch.Generator().manual_seed(0)
    opts = [LayerwiseSGD(groups(nets[0], weight_decay=0.05), **options), PlainSGD(groups(nets[1], weight_decay=0.0), **options)]
    for _ in range(3):
        for name, p in nets[0].named_parameters():
            p.grad = torch.randn(p.shape, generator=g)
            nets[1].get_parameter(name).grad = p.grad.clone()
        for opt in opts:
            opt.step()
    for (name, a), (_, b) in zip(nets[0].named_parameters(), nets[1].named_parameters(), strict=True):
        assert torch.equal(a, b) == (a.ndim == 1), name


@pytest.mark.parametrize("nesterov", [False, True])
def test_both_variants_agree_at_a_constant_rate(nesterov: bool) -> None:
    nets = [small_net().double(), small_net().double()]
    for net, inside in zip(nets, (False, True), strict=True):
        opt = LayerwiseSGD(groups(net, weight_decay=0.05), lr=0.7, momentum=0.9, nesterov=nesterov, trust_coeff=0.1,
                           lr_in_buffer=inside)
        for i in range(5):
            opt.step(closure_of(opt, functools.partial(loss_of, net, i)))
    for a, b in zip(weights(nets[0]), weights(nets[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_rate_inside_the_buffer_step_by_step(nesterov: bool) -> None:
    """m <- mu m + lr d; w <- w - m, or w - (lr d + mu m): with a rate that changes, and is 0 at first and in between."""
    g = torch.Generator().manual_seed(1)
    w = torch.randn(4, 3, generator=g, **F64)
    p, m, mu, wd = nn.Parameter(w.clone()), torch.zeros_like(w), 0.9, 0.05
    opt = LayerwiseSGD([("w", p)], lr=1.0, momentum=mu, weight_decay=wd, nesterov=nesterov, trust_coeff=0.1, trust_eps=0.0,
                       lr_in_buffer=True)
    for lr in (0.0, 0.5, 2.0, 0.0, 0.3):
        grad = torch.randn(4, 3, generator=g, **F64)
        d = 0.1 * w.norm() / (grad.norm() + wd * w.norm()) * (grad + wd * w)
        m = mu * m + lr * d
        w = w - (lr * d + mu * m if nesterov else m)
        p.grad, opt.param_groups[0]["lr"] = grad.clone(), lr
        opt.step()
        torch.testing.assert_close(p.detach(), w, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(opt.state[p]["momentum_buffer"], m, rtol=1e-13, atol=1e-15)
        assert opt.param_groups[0]["lr"] == lr and opt.param_groups[0]["weight_decay"] == wd


def test_lr_0_moves_nothing_but_the_buffer() -> None:
    net = small_net()
    before = weights(net)
    opt = LayerwiseSGD(groups(net, weight_decay=0.1), lr=0.0, momentum=0.9, trust_clip=True)
    train(net, opt, 0, 2)
    assert same(weights(net), before)
    assert all(opt.state[p]["momentum_buffer"].abs().sum() > 0 for p in net.parameters())


def test_maximize_is_the_step_for_the_negative_loss() -> None:
    g = torch.Generator().manual_seed(3)
    w, d = torch.randn(7, generator=g, **F64), torch.randn(7, generator=g, **F64)
    torch.testing.assert_close(one_step(w, d, maximize=True), one_step(w, -d), rtol=1e-15, atol=0)


def test_at_the_clips_limit_it_is_sgd_bit_for_bit() -> None:
    """Where q / lr is above 1 everywhere, q is 1."""
    nets = [small_net(), small_net()]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    train(nets[0], LayerwiseSGD(nets[0], trust_coeff=1e30, trust_clip=True, **options), 0, 4)
    train(nets[1], PlainSGD(nets[1], **options), 0, 4)
    assert same(weights(nets[0]), weights(nets[1]))


def test_a_tensor_without_a_gradient_is_left() -> None:
    net = small_net()
    first, last = net[0], net[2]
    opt = LayerwiseSGD(net, lr=1.0, weight_decay=0.1)
    kept = weights(last)
    x, _ = batch()
    opt.step(closure_of(opt, lambda: first(x).square().mean()))
    assert same(weights(last), kept) and not same(weights(first), weights(small_net()[0]))


def test_the_ratios_are_logged() -> None:
    model = Quadratic([1.0, 1.0], [3.0, 4.0])
    opt = LayerwiseSGD(model, lr=1.0, weight_decay=1.0, trust_coeff=0.1, trust_eps=0.0)
    opt.step(closure_of(opt, model))
    assert opt.metrics["trust_ratio_min"].item() == opt.metrics["trust_ratio_max"].item() == pytest.approx(0.05)


def test_the_group_is_put_back_when_the_base_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Quadratic([1.0, 1.0], [3.0, 4.0])
    opt = LayerwiseSGD(model, lr=0.3, weight_decay=0.2, lr_in_buffer=True)

    def fail() -> None:
        assert opt.param_groups[0]["lr"] == 1.0 and opt.param_groups[0]["weight_decay"] == 0.0
        raise RuntimeError("out of memory")

    monkeypatch.setattr(opt, "base_step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step(closure_of(opt, model))
    assert opt.param_groups[0]["lr"] == 0.3 and opt.param_groups[0]["weight_decay"] == 0.2


def test_bf16_gradients_are_rounded_once() -> None:
    g = torch.Generator().manual_seed(5)
    w, d = torch.randn(1000, generator=g), torch.randn(1000, generator=g).bfloat16()
    expected = ((d.double() + 0.1 * w.double()) * 0.7).bfloat16()
    grad = d.clone()
    fold_decay_([grad], [w], [torch.tensor(0.7, **F64)], 0.1)
    # fp32 before the rounding: a result next to a tie may go the other way.
    assert (grad != expected).float().mean() < 1e-2
    torch.testing.assert_close(grad.float(), expected.float(), rtol=2**-7, atol=0)


def test_clip_and_sam_act_before_it() -> None:
    """L = 1/2 ||w||^2, w = (3, 4), rho = 5: the gradient at the perturbed weights is (6, 8), clipped to length 1."""
    class Mixed(ClipGradNorm, LARS, SAM, torch.optim.SGD):
        pass

    model = Quadratic([1.0, 1.0], [3.0, 4.0])
    opt = Mixed(model, lr=2.0, weight_decay=0.1, rho=5.0, max_norm=1.0, trust_coeff=0.03, trust_eps=0.0)
    opt.step(closure_of(opt, model))
    g = torch.tensor([0.6, 0.8], **F64) * (10 / (10 + 1e-6))
    q = 0.03 * 5 / (g.norm() + 0.5)
    expected = torch.tensor([3.0, 4.0], **F64) - 2 * q * (g + 0.1 * torch.tensor([3.0, 4.0], **F64))
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-11, atol=0)
    assert opt.metrics["grad_norm"].item() == pytest.approx(10.0)


# -------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(("options", "text"), [
    ({"trust_coeff": 0.0}, "LARS: trust_coeff=0.0, must be a finite number > 0"),
    ({"trust_coeff": -1.0}, "trust_coeff=-1.0"), ({"trust_coeff": math.nan}, "trust_coeff=nan"),
    ({"trust_coeff": math.inf}, "trust_coeff=inf"), ({"trust_coeff": "1"}, "trust_coeff='1'"),
    ({"trust_eps": -1e-9}, "LARS: trust_eps=-1e-09, must be a finite number >= 0"), ({"trust_eps": math.nan}, "trust_eps=nan"),
    ({"momentum": -0.1}, "momentum"), ({"lr": -1.0}, "learning rate"), ({"weight_decay": -0.1}, "weight_decay"),
    ({"nesterov": True}, "Nesterov"),
])
def test_bad_options_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LayerwiseSGD(small_net(), **{"lr": 0.1, "weight_decay": 0.1, **options})


def test_no_group_with_a_ratio_is_an_error() -> None:
    with pytest.raises(ValueError, match="LARS: weight_decay=0 in every group.*in one group; pass everbatch.optim.groups"):
        LayerwiseSGD(small_net(), lr=0.1)
    LayerwiseSGD(small_net(), lr=0.1, always_adapt=True)


def test_other_bases_and_places_are_refused() -> None:
    class OnAdam(LARS, torch.optim.AdamW):
        pass

    class Outer(OptimizerMixin):
        def update(self) -> None:
            super().update()

    class Inside(LARS, Outer, torch.optim.SGD):
        pass

    class Outside(Outer, LARS, torch.optim.SGD):
        pass

    with pytest.raises(CompositionError, match="OnAdam: LARS stands on AdamW, must stand on torch.optim.SGD"):
        OnAdam(small_net(), lr=0.1)
    with pytest.raises(CompositionError, match=r"Outer wraps the update.*write class Inside\(Outer, LARS, torch.optim.SGD\)"):
        Inside(small_net(), lr=0.1, weight_decay=0.1)
    Outside(small_net(), lr=0.1, weight_decay=0.1)
    with pytest.raises(CompositionError, match="LAMB and LARS both own the trust ratio"):
        type("Both", (LAMB, LARS, torch.optim.SGD), {})
