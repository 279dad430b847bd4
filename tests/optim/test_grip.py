"""GRIP: routing in closed form, margins that bind, and routers that hold in training where they would not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quadratics import closure_of, same, weights
from torch import Tensor, nn
from torch.nn import functional

from everbatch import compose
from everbatch.errors import CompositionError
from everbatch.optim import EMA, GRIP, OSFT
from everbatch.optim.subspace.routing import (
    bounds,
    constrained,
    corrected,
    equality_bases,
    free_squares,
    margins,
    routed,
    stability,
)

ROUTER = "router.weight"


class Adam(GRIP, torch.optim.AdamW):
    pass


class Experts(nn.Module):
    """A layer below, a router, and experts of which each token takes two."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Linear(10, 10)
        self.router = nn.Linear(10, 4, bias=False)
        self.experts = nn.ModuleList([nn.Linear(10, 3) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.below(x)
        scores = self.router(h)
        gates = scores.masked_fill(~routed(scores.detach(), 2), -torch.inf).softmax(1)
        return sum(gates[:, [j]] * expert(h) for j, expert in enumerate(self.experts))  # type: ignore[return-value]


def net(seed: int = 0, below: bool = False) -> Experts:
    torch.manual_seed(seed)
    model = Experts()
    model.below.requires_grad_(below)
    return model


def tokens(count: int = 40, rank: int = 10, seed: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, rank, generator=g) @ torch.randn(rank, 10, generator=g)


RETAINED = [(t,) for t in tokens(24, 3).split(7)]


def ascend(model: nn.Module, opt: Any, begin: int, end: int) -> None:
    """Unlearn other samples: their loss goes up."""
    for i in range(begin, end):
        x, y = tokens(8, seed=50 + i), torch.arange(8) % 3
        opt.step(closure_of(opt, lambda x=x, y=y: -functional.cross_entropy(model(x), y)))


# ------------------------------------------------------------------------------------------------------------- kernels
def test_margins_and_bounds() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.5], [0.0, 4.0, 1.0, 1.0]])
    sent = routed(scores, 2)
    assert sent.tolist()[0] == [True, False, True, False] and sent.sum(1).tolist() == [2, 2]
    inf = float("inf")
    assert margins(scores, sent)[:, 0].tolist() == [inf, 1.0, inf, 1.5]
    later = margins(torch.tensor([[3.0, 2.5, 2.0, 0.5]]), sent[:1])
    assert later[:, 0].tolist() == [inf, -0.5, inf, 1.5]
    torch.testing.assert_close(bounds(later, 0.1)[:, 0], torch.tensor([inf, -0.6, inf, 1.4]))
    assert bounds(torch.tensor([0.05]), 0.1).tolist() == [0.0]  # an unmoved router violates nothing
    one, other = sent[:1], torch.tensor([[True, True, False, False]])
    assert float(stability(one, other)) == 0.5 and float(stability(sent, sent)) == 1.0


@pytest.mark.parametrize("count", [6, 40])
def test_a_basis_carries_what_its_expert_was_sent(count: int) -> None:
    """With fewer tokens than dimensions, by the smaller product."""
    x, sent = tokens(count).double(), torch.zeros(count, 3, dtype=torch.bool)
    sent[::2, 0] = sent[1:3, 1] = True  # nothing goes to the last
    got = equality_bases(x, sent, 1.0)
    for j in range(2):
        mine = x[sent[:, j]]
        assert float((mine - mine @ got[j] @ got[j].T).abs().max()) < 1e-9
    assert not got[2].any() and int((got[1].norm(dim=0) > 0.5).sum()) == 2
    assert equality_bases(x, sent, 0.5).shape[2] < got.shape[2]


def test_margins_bind_and_kaczmarz_meets_them() -> None:
    """Equality alone lets other experts overtake; with the margins every token keeps its experts, and equality stays."""
    g, x = torch.Generator().manual_seed(0), torch.zeros(40, 10, dtype=torch.float64)
    theta = torch.randn(4, 10, generator=g).double()
    for j in range(4):  # tokens of one pair of experts lie in three dimensions of their own and one in common
        x[j::4, 2 * j : 2 * j + 2] = torch.randn(10, 2, generator=g).double()
        x[j::4, 9] = torch.randn(10, generator=g).double()
    sent = routed(x @ theta.T, 1)
    tau = margins(x @ theta.T, sent)
    basis = equality_bases(x, sent, 1.0)
    bound, free = bounds(tau, 1e-2), free_squares(x, basis)
    delta = 3.0 * torch.randn(4, 10, generator=g).double()
    alone, beyond = constrained(delta, basis, x, bound, free, 0, g)
    assert float(beyond) > 0.1 and float(stability(sent, routed(x @ (theta + alone).T, 1))) < 0.95
    held, beyond = constrained(delta, basis, x, bound, free, 100, g)
    assert float(beyond) < 1e-5 and float((x @ held.T - bound.T).amax()) < 1e-5
    assert float(stability(sent, routed(x @ (theta + held).T, 1))) == 1.0
    for j in range(4):
        assert float((x[sent[:, j]] @ held[j]).abs().max()) < 1e-10
    assert 0.1 < float(held.norm() / delta.norm()) < 1.0
    still, _ = constrained(0 * delta, basis, x, bound, free, 100, g)
    assert not still.any()


def test_the_correction_gives_back_the_scores() -> None:
    theta, x = torch.randn(4, 10, generator=torch.Generator().manual_seed(1)), tokens()
    turn = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(2)))[0]
    found, cosine = corrected(theta, x, x @ turn, 1e-6)
    torch.testing.assert_close(found, theta @ turn, rtol=1e-3, atol=1e-4)
    assert cosine > 1 - 1e-9


# ------------------------------------------------------------------------------------------------------------ in a step
def test_retained_tokens_keep_their_experts_and_others_need_not() -> None:
    ends = {}
    for strength in (0.0, 1.0):
        model = net()
        opt = Adam(model, lr=0.05, weight_decay=0.1, strength=strength, delta=1.0)
        opt.retain_routing(RETAINED)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        ascend(model, opt, 0, 20)
        assert float((model.experts[0].weight.detach() - before["experts.0.weight"]).norm()) > 0.1
        ends[strength] = opt.routing_stability(RETAINED), float((model.router.weight.detach() - before[ROUTER]).norm())
        if strength:
            assert float(opt.metrics["grip_residual"]) < 1e-5
            assert float(opt.metrics["grip_free"]) == pytest.approx(0.6, abs=1e-4)  # three dimensions, and the bias below
    assert ends[1.0][0] == 1.0 and ends[0.0][0] < 0.9
    assert ends[1.0][1] > 0.1  # seven dimensions of ten are free


def test_a_trained_bias_is_put_back_and_counts_in_the_scores() -> None:
    ends = {}
    for strength in (0.0, 1.0):
        model = net()
        model.router = nn.Linear(10, 4)
        with torch.no_grad():
            model.router.bias.copy_(torch.tensor([3.0, 0.0, -3.0, 1.0]))
        opt = Adam(model, lr=0.05, strength=strength, delta=1.0)
        opt.retain_routing(RETAINED)
        with torch.no_grad():
            sent = routed(model.router(model.below(torch.cat([x for x, in RETAINED]))), 2)
        assert torch.equal(opt.states[GRIP].selected()[ROUTER], sent)
        start = model.router.bias.detach().clone()
        ascend(model, opt, 0, 20)
        ends[strength] = opt.routing_stability(RETAINED), bool((model.router.bias == start).all())
    assert ends[1.0] == (1.0, True) and ends[0.0][0] < 0.95 and not ends[0.0][1]


def test_tokens_that_drift_are_taken_anew_with_the_routing_of_before() -> None:
    found = {}
    for refresh in (False, True):
        model = net(below=True)
        opt = Adam(model, lr=0.02, delta=1.0)
        opt.retain_routing(RETAINED)
        before = opt.states[GRIP].selected()[ROUTER]
        for i in range(15):
            ascend(model, opt, i, i + 1)
            if refresh:
                opt.refresh_routing(RETAINED)
        ascend(model, opt, 15, 16)
        assert torch.equal(opt.states[GRIP].selected()[ROUTER], before)
        found[refresh] = opt.routing_stability(RETAINED)
    assert found[True] > 0.95 > found[False], found


def test_mode_b_corrects_after_unlearning() -> None:
    model = net(below=True)
    opt = Adam(model, lr=0.02, mode="B")
    opt.retain_routing(RETAINED)
    ascend(model, opt, 0, 15)
    before, router = opt.routing_stability(RETAINED), model.router.weight.detach().clone()
    cosines = opt.correct_routing(RETAINED)
    assert cosines[ROUTER] > 0.999 and before < 0.9 and opt.routing_stability(RETAINED) > 0.99
    assert not torch.equal(model.router.weight, router)
    strict = Adam(model, lr=0.02, mode="B", accept_cosine=1.0, ridge=10.0)
    strict.retain_routing(RETAINED)
    kept = model.router.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"router.weight is left as it is: corrected scores have a cosine of 0.\d+ with"):
        strict.correct_routing(RETAINED)
    assert torch.equal(model.router.weight, kept)


def test_a_run_resumed_in_the_middle_has_the_same_bits() -> None:
    model, twin = net(), net(5)
    twin.below.load_state_dict(model.below.state_dict())  # frozen: no part of the state
    opt, other = (Adam(m, lr=0.05, eps_margin=0.5) for m in (model, twin))
    opt.retain_routing(RETAINED)
    ascend(model, opt, 0, 3)
    other.load_state_dict(copy.deepcopy(opt.state_dict(weights=True)))
    for m, o in ((model, opt), (twin, other)):
        ascend(m, o, 3, 8)
    assert same(weights(model), weights(twin))
    assert other.routing_stability(RETAINED) == opt.routing_stability(RETAINED)


def test_given_tokens_are_those_that_the_router_sees() -> None:
    model = net()
    seen, given = Adam(model, lr=0.1), Adam(model, lr=0.1)
    seen.retain_routing(RETAINED)
    with torch.no_grad():
        given.retain_routing(inputs={ROUTER: model.below(torch.cat([x for x, in RETAINED]))})
    for key, value in seen.states[GRIP].kept.items():
        torch.testing.assert_close(given.states[GRIP].kept[key], value)
    few = Adam(model, lr=0.1, tokens=5)
    few.retain_routing(RETAINED)
    assert torch.equal(few.states[GRIP].kept[f"{ROUTER}/inputs"][-1], seen.states[GRIP].kept[f"{ROUTER}/inputs"][-1])
    assert len(few.states[GRIP].selected()[ROUTER]) == 5


def test_bad_input() -> None:
    for options, text in (({"routers": ("*gate.weight",)}, r"routers has '\*gate.weight', must match a trained matrix"),
                          ({"routers": ()}, "no routers"), ({"top_k": 5}, "top_k=5 of the 4 experts"), ({"top_k": 0}, "top_k=0"),
                          ({"mode": "C"}, "mode='C', must be 'A' or 'B'"), ({"delta": 0.0}, "delta=0.0"),
                          ({"eps_margin": -1.0}, "eps_margin=-1"), ({"ridge": 0.0}, "ridge=0.0"), ({"tokens": 0}, "tokens=0"),
                          ({"retained": {"router": tokens()}}, r"inputs of \['router', 'router.weight'\] are missing or"),
                          ({"retained": {ROUTER: tokens()[:, :9]}}, r"of shape \(40, 9\), must be \(n, 10\)"),
                          ({"retained": {ROUTER: tokens() / 0}}, "that are not finite")):
        with pytest.raises(ValueError, match=text):
            Adam(net(), lr=0.1, **options)
    opt = Adam(net(), lr=0.1)
    ascend(net(), opt, 0, 0)
    with pytest.raises(ValueError, match="call retain_routing"):
        opt.routing_stability(RETAINED)
    with pytest.raises(ValueError, match="no rows on any rank"):
        opt.retain_routing([])
    with pytest.raises(ValueError, match="must be in mode 'B'"):
        opt.correct_routing(RETAINED)
    opt.retain_routing(RETAINED)
    with pytest.raises(ValueError, match="7 tokens of router.weight where 24 were retained"):
        opt.refresh_routing(RETAINED[:1])
    with pytest.raises(CompositionError, match="both own the projection"):
        compose(GRIP, OSFT, base=torch.optim.SGD)
    with pytest.raises(CompositionError, match="EMA must stand to the left of GRIP"):
        type("Late", (GRIP, EMA, torch.optim.SGD), {})(net(), lr=0.1)
