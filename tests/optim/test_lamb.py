"""LAMB against timm, in closed form, at its limits, and beside other parts."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from quadratics import Quadratic, batch, closure_of, same, small_net, train, weights
from torch import Tensor, nn

from everbatch.errors import CompositionError, UnsupportedHost
from everbatch.optim import LAMB, SAM, ClipGradNorm, OptimizerMixin, groups
from everbatch.optim.layerwise.lamb import adam_direction, lamb_ratio

F64: dict[str, Any] = {"dtype": torch.float64}


class LayerwiseAdamW(LAMB, torch.optim.AdamW):
    pass


class PlainAdamW(OptimizerMixin, torch.optim.AdamW):
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
    LayerwiseAdamW([("w", p)], **{"lr": 0.5, "weight_decay": 0.1, "eps": 0.0, **options}).step()
    return p.detach()


@pytest.mark.parametrize("options", [
    {}, {"max_grad_norm": 0.1}, {"trust_clip": True, "always_adapt": True}, {"decoupled_decay": True},
    {"grad_averaging": False}, {"betas": (0.7, 0.9), "grad_averaging": False, "decoupled_decay": True, "always_adapt": True,
                                "max_grad_norm": 0.2, "trust_clip": True},
], ids=str)
@pytest.mark.parametrize("split", [True, False])
def test_timm(options: dict[str, Any], split: bool) -> None:
    """Six steps with a rate that changes: float64 rounding apart, timm's optimizer."""
    timm = pytest.importorskip("timm.optim")
    options = {"lr": 0.05, "eps": 1e-6, **options}
    ours, theirs = small_net().double(), small_net().double()
    opt = LayerwiseAdamW(named(ours, split=split), **options)
    reference = timm.Lamb(unnamed(named(theirs, split=split)), **{"max_grad_norm": None, **options})
    for i in range(6):
        for group in (*opt.param_groups, *reference.param_groups):
            group["lr"] = options["lr"] * (1 + i % 3)
        opt.step(closure_of(opt, functools.partial(loss_of, ours, i)))
        reference.zero_grad()
        loss_of(theirs, i).backward()
        reference.step()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert not same(weights(ours), weights(small_net().double()))


def test_closed_form_of_the_first_step() -> None:
    """r = sign(g), u = r + 0.1 w = (1.3, -0.6), ||w|| = 5: w - lr * 5 / ||u|| * u."""
    w, g = torch.tensor([3.0, 4.0], **F64), torch.tensor([0.2, -7.0], **F64)
    u = torch.tensor([1.3, -0.6], **F64)
    torch.testing.assert_close(one_step(w, g), w - 0.5 * 5 / u.norm() * u, rtol=1e-14, atol=0)
    r, kept = torch.tensor([1.0, -1.0], **F64), 1 - 0.5 * 0.1
    torch.testing.assert_close(one_step(w, g, decoupled_decay=True), kept * w - 0.5 * 5 * kept / 2**0.5 * r, rtol=1e-14, atol=0)
    torch.testing.assert_close(one_step(w, g, trust_clip=True), w - 0.5 * u, rtol=1e-14, atol=0)
    torch.testing.assert_close(one_step(w, g, max_ratio=2.0), w - 0.5 * 2 * u, rtol=1e-14, atol=0)
    torch.testing.assert_close(one_step(w, g, min_ratio=7.0), w - 0.5 * 7 * u, rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 3.0, 1e8])
def test_the_step_does_not_know_the_gradients_scale(scale: float) -> None:
    """Without eps, over several steps; and without decay a step is lr * ||w|| long."""
    g = torch.Generator().manual_seed(3)
    start, gradients = torch.randn(7, 5, generator=g, **F64), torch.randn(4, 7, 5, generator=g, **F64)
    ends = []
    for factor in (1.0, scale):
        p = nn.Parameter(start.clone())
        opt = LayerwiseAdamW([("w", p)], lr=0.1, eps=0.0, weight_decay=0.0, always_adapt=True)
        for gradient in gradients:
            before = p.detach().clone()
            p.grad = factor * gradient
            opt.step()
            assert (p.detach() - before).norm().item() == pytest.approx(0.1 * before.norm().item(), rel=1e-12)
        ends.append(p.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-14)


def test_the_direction_is_the_one_adam_takes() -> None:
    """Over several steps: AdamW's displacement over -lr, with amsgrad and without."""
    for amsgrad in (False, True):
        g = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(5, generator=g, **F64))
        opt = torch.optim.AdamW([p], lr=0.01, betas=(0.6, 0.7), weight_decay=0.0, amsgrad=amsgrad)
        for t in range(1, 6):
            gradient = torch.randn(5, generator=g, **F64) / t
            moments = {k: v for k, v in opt.state.get(p, {}).items() if k != "step"}
            r, = adam_direction([gradient], [moments], [t], betas=(0.6, 0.7), eps=1e-8, amsgrad=amsgrad)
            before, p.grad = p.detach().clone(), gradient.clone()
            opt.step()
            torch.testing.assert_close(r, (before - p.detach()) / 0.01, rtol=1e-11, atol=0)
            assert torch.equal(gradient, p.grad)


def test_moments_are_those_of_adamw_bit_for_bit() -> None:
    """The base steps at lr = 0: it sees the same gradients, and counts the steps."""
    g = torch.Generator().manual_seed(0)
    gradients = torch.randn(4, 3, 2, generator=g)
    kept = []
    for cls in (LayerwiseAdamW, PlainAdamW):
        p = nn.Parameter(torch.ones(3, 2))
        opt = cls([("w", p)], lr=0.1, weight_decay=0.1, amsgrad=True)
        for gradient in gradients:
            p.grad = gradient.clone()
            opt.step()
        kept.append(opt.state[p])
    assert kept[0].keys() == kept[1].keys() and all(torch.equal(kept[0][k], kept[1][k]) for k in kept[0])


def test_a_norm_of_zero_is_plain_adamw() -> None:
    zero, some = torch.zeros(3, **F64), torch.tensor([1.0, 2.0, 3.0], **F64)
    torch.testing.assert_close(one_step(zero, some), -0.5 * torch.ones(3, **F64), rtol=1e-14, atol=0)  # q = 1, r = sign
    assert torch.equal(one_step(zero, zero, eps=1e-8), zero)
    assert torch.equal(one_step(some, zero, eps=1e-8, weight_decay=0.0, always_adapt=True), some)
    assert lamb_ratio(torch.tensor([0.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 8.0])).tolist() == [1.0, 1.0, 0.25]
    assert lamb_ratio(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 8.0]), low=3.0).tolist() == [1.0, 3.0]


def test_excluded_tensors_are_adamw_bit_for_bit() -> None:
    nets = [small_net(), small_net()]
    g = torch.Generator().manual_seed(0)
    opts = [LayerwiseAdamW(groups(nets[0], weight_decay=0.05), lr=0.1), PlainAdamW(groups(nets[1], weight_decay=0.0), lr=0.1)]
    for _ in range(3):
        for name, p in nets[0].named_parameters():
            p.grad = torch.randn(p.shape, generator=g)
            nets[1].get_parameter(name).grad = p.grad.clone()
        for opt in opts:
            opt.step()
    for (name, a), (_, b) in zip(nets[0].named_parameters(), nets[1].named_parameters(), strict=True):
        assert torch.equal(a, b) == (a.ndim == 1), name


@pytest.mark.parametrize("options", [{"min_ratio": 1.0, "max_ratio": 1.0}, {"min_ratio": 1.0, "trust_clip": True}], ids=str)
def test_ratio_1_is_adamw_bit_for_bit(options: dict[str, Any]) -> None:
    nets = [small_net(), small_net()]
    train(nets[0], LayerwiseAdamW(nets[0], lr=0.1, **options), 0, 4)
    train(nets[1], PlainAdamW(nets[1], lr=0.1), 0, 4)
    assert same(weights(nets[0]), weights(nets[1]))


def test_pre_clipping_is_the_clip_of_the_whole_gradient() -> None:
    """Adam forgets a common factor at the first step, not at the second."""
    nets = [small_net().double(), small_net().double()]
    opts = [LayerwiseAdamW(nets[0], lr=0.1, max_grad_norm=0.5), LayerwiseAdamW(nets[1], lr=0.1)]
    for size in (3.0, 0.2, 1.0):
        g = torch.Generator().manual_seed(int(10 * size))
        raw = [torch.randn(p.shape, generator=g, **F64) for p in nets[0].parameters()]
        norm = torch.cat([t.flatten() for t in raw]).norm()
        for a, b, t in zip(nets[0].parameters(), nets[1].parameters(), raw, strict=True):
            a.grad, b.grad = t * size / norm, t * min(size, 0.5) / norm
        for opt in opts:
            opt.step()
    for a, b in zip(weights(nets[0]), weights(nets[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_lr_0_moves_nothing_but_the_moments() -> None:
    for decoupled in (False, True):
        net = small_net()
        before = weights(net)
        opt = LayerwiseAdamW(net, lr=0.0, decoupled_decay=decoupled)
        train(net, opt, 0, 2)
        assert same(weights(net), before)
        assert all(opt.state[p]["exp_avg"].abs().sum() > 0 and opt.state[p]["step"] == 2 for p in net.parameters())


def test_maximize_is_the_step_for_the_negative_loss() -> None:
    g = torch.Generator().manual_seed(3)
    w, d = torch.randn(7, generator=g, **F64), torch.randn(7, generator=g, **F64)
    assert torch.equal(one_step(w, d, maximize=True), one_step(w, -d))


def test_a_parameter_without_dimensions() -> None:
    """Its moments look like a step count; three steps of it are those of a vector of one."""
    ends = []
    for shape in ((), (1,)):
        p = nn.Parameter(torch.full(shape, 2.0, **F64))
        opt = LayerwiseAdamW([("w", p)], lr=0.1, weight_decay=0.1)
        for g in (1.0, -3.0, 0.5):
            p.grad = torch.full(shape, g, **F64)
            opt.step()
        ends.append(p.item())
    assert ends[0] == ends[1] != 2.0


def test_tensors_that_join_late_have_their_own_step_count() -> None:
    """A tensor without a gradient is left, and its bias correction starts with its first."""
    timm_like: list[Tensor] = []
    for late in (0, 2):
        p, q = nn.Parameter(torch.ones(3, **F64)), nn.Parameter(torch.ones(3, **F64))
        opt = LayerwiseAdamW([("p", p), ("q", q)], lr=0.1, weight_decay=0.1)
        for t in range(late + 2):
            p.grad = torch.tensor([1.0, 2.0, -1.0], **F64)
            q.grad = torch.tensor([1.0, -2.0 * (t + 1 - late), 3.0], **F64) if t >= late else None
            opt.step()
        timm_like.append(q.detach())
    assert torch.equal(*timm_like)


def test_state_moves_on_as_if_never_interrupted() -> None:
    net, twin = small_net(), small_net(1)
    opt, other = LayerwiseAdamW(net, lr=0.1, max_grad_norm=0.1), LayerwiseAdamW(twin, lr=0.1, max_grad_norm=0.1)
    train(net, opt, 0, 3)
    other.load_state_dict(opt.state_dict(weights=True))
    train(net, opt, 3, 5)
    train(twin, other, 3, 5)
    assert same(weights(net), weights(twin))


def test_the_group_is_put_back_when_the_base_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Quadratic([1.0, 1.0], [3.0, 4.0])
    opt = LayerwiseAdamW(model, lr=0.3, weight_decay=0.2)

    def fail() -> None:
        assert opt.param_groups[0]["lr"] == 0.0 and opt.param_groups[0]["weight_decay"] == 0.0
        raise RuntimeError("out of memory")

    monkeypatch.setattr(opt, "base_step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step(closure_of(opt, model))
    assert opt.param_groups[0]["lr"] == 0.3 and opt.param_groups[0]["weight_decay"] == 0.2


def test_clip_and_sam_act_before_it() -> None:
    """g = (-3, 4), rho = 2.5: the gradient at the perturbed weights (1.5, 6) is (-1.5, 6), and Adam's direction (-1, 1)."""
    class Mixed(ClipGradNorm, LAMB, SAM, torch.optim.AdamW):
        pass

    model = Quadratic([-1.0, 1.0], [3.0, 4.0])
    opt = Mixed(model, lr=0.5, weight_decay=0.1, rho=2.5, max_norm=1.0, eps=1e-20)
    opt.step(closure_of(opt, model))
    u = torch.tensor([-0.7, 1.4], **F64)
    expected = torch.tensor([3.0, 4.0], **F64) - 0.5 * 5 / u.norm() * u
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-12, atol=0)
    assert opt.metrics["grad_norm"].item() == pytest.approx(math.hypot(1.5, 6.0))


# -------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(("options", "text"), [
    ({"min_ratio": -1.0}, "LAMB: min_ratio=-1.0, must be a finite number >= 0"), ({"min_ratio": math.nan}, "min_ratio=nan"),
    ({"max_ratio": 0.0}, "LAMB: max_ratio=0.0, must be > 0"), ({"max_ratio": math.nan}, "max_ratio=nan"),
    ({"min_ratio": 2.0, "max_ratio": 1.0}, "max_ratio=1.0, must be > 0 and >= min_ratio=2.0"),
    ({"min_ratio": 2.0, "trust_clip": True}, "min_ratio=2.0, must be <= 1 with trust_clip=True"),
    ({"max_grad_norm": 0.0}, "LAMB: max_grad_norm=0.0, must be a finite number > 0; pass None"),
    ({"max_grad_norm": math.inf}, "max_grad_norm=inf"), ({"betas": (1.0, 0.9)}, "beta"), ({"betas": (0.9, -0.1)}, "beta"),
    ({"eps": -1.0}, "epsilon"), ({"lr": -1.0}, "learning rate"),
])
def test_bad_options_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LayerwiseAdamW(small_net(), **{"lr": 0.1, **options})


def test_no_group_with_a_ratio_is_an_error() -> None:
    with pytest.raises(ValueError, match="LAMB: weight_decay=0 in every group.*or always_adapt=True"):
        LayerwiseAdamW(small_net(), lr=0.1, weight_decay=0.0)
    LayerwiseAdamW(small_net(), lr=0.1, weight_decay=0.0, always_adapt=True)


@pytest.mark.parametrize("option", ["capturable", "differentiable"])
def test_a_base_that_divides_by_the_rate_is_refused(option: str) -> None:
    with pytest.raises(UnsupportedHost, match=f"LAMB: AdamW has {option}=True, must be False"):
        LayerwiseAdamW(small_net(), lr=0.1, **{option: True})


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_other_bases_are_refused(base: type) -> None:
    wrong = type("Wrong", (LAMB, base), {})
    with pytest.raises(CompositionError, match=f"Wrong: LAMB stands on {base.__name__}, must stand on torch.optim.AdamW"):
        wrong(small_net(), lr=0.1)
