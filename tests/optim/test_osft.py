"""OSFT: the rank rule in closed form, and what later tasks may and may not move."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quadratics import batch, closure_of, same, train, weights
from torch import Tensor, nn

from everbatch import compose
from everbatch.errors import CompositionError
from everbatch.optim import EMA, OSFT, ClipGradNorm, SubspaceProjection
from everbatch.optim.subspace.ranks import kept_ranks, layer_importance, linear_cka
from everbatch.optim.subspace.splits import NoFreeSubspace, NonFiniteStatistics
from rotation import When


class Adam(OSFT, torch.optim.AdamW):
    pass


def net(seed: int = 0) -> nn.Module:
    """One square matrix and one that is not."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def rows(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [batch(i) for i in range(count)]


def pairs(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, _, vh = torch.linalg.svd(weight.double())
    return u[:, :rank], vh[:rank].T


# -------------------------------------------------------------------------------------------------------- the rank rule
def test_the_kept_share_is_that_of_the_paper() -> None:
    got = kept_ranks({"a": 1.0, "b": 0.5, "c": 1.5}, {"a": 10, "b": 20, "c": 10}, 0.1, 0.8)
    assert got == {"a": 8, "b": 9, "c": 9}  # 0.8, 0.45 and 1.15 of the size; the last leaves a direction free
    assert kept_ranks({"a": 4.0, "b": -1.0}, {"a": 10, "b": 10}, 0.1, 0.3) == {"a": 5, "b": 1}  # over the mean of 2: 2 and 0
    assert kept_ranks({"a": -0.3, "b": -0.1}, {"a": 10, "b": 10}, 0.1, 0.5) == {"a": 5, "b": 5}
    assert kept_ranks({"a": 1.0}, {"a": 10}, 0.0, 0.0) == {"a": 0}
    with pytest.raises(ValueError, match=r"importance of \['b'\] is missing or too much"):
        kept_ranks({"a": 1.0}, {"a": 1, "b": 1}, 0.1, 0.8)
    with pytest.raises(ValueError, match=r"importance of \['a'\] is not finite"):
        kept_ranks({"a": float("nan")}, {"a": 1}, 0.1, 0.8)


def test_importance_is_how_alike_inputs_and_outputs_are() -> None:
    model = net()
    opt = Adam(model, lr=0.1)
    weight, last = model[0].weight.detach(), model[2].weight.detach()
    x = torch.cat([x for x, _ in rows()])
    hidden = torch.tanh(model[0](x)).detach()
    got = layer_importance(opt.host, {"0.weight": weight, "2.weight": last}, rows(), None)
    cosine = nn.functional.cosine_similarity(x, x @ weight.T).mean()
    assert got["0.weight"] == pytest.approx(float(cosine), rel=1e-5)
    a, b = (t.double() - t.double().mean(0) for t in (hidden, hidden @ last.T))
    cka = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert got["2.weight"] == pytest.approx(float(cka), rel=1e-5)
    assert linear_cka(torch.eye(4), torch.linalg.qr(torch.randn(4, 4))[0]) == pytest.approx(1.0)
    assert linear_cka(torch.zeros(4, 4), torch.ones(2, 4)) == 0.0
    assert not model[0]._forward_pre_hooks


def test_what_is_no_linear_layer_counts_as_the_mean_of_the_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 3))
    opt, rows = Adam(model, lr=0.1), [(torch.randn(8, 1, 4, 4),)]
    names = ("0.weight", "2.weight", "3.weight")
    whole = {n: p.detach().flatten(1) for n, p in model.named_parameters() if n in names}
    got = layer_importance(opt.host, whole, rows, None)
    assert list(got) == list(names) and got["0.weight"] == pytest.approx((got["2.weight"] + got["3.weight"]) / 2)
    assert layer_importance(opt.host, {"0.weight": whole["0.weight"]}, rows, None) == {"0.weight": 1.0}
    opt.consolidate_osft(rows)
    assert opt.states[OSFT].on(opt.host.device).keys() == set(names)


def test_padding_does_not_count() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.mix(x).sum(1)

    torch.manual_seed(0)
    model, x, mask = Tokens(), torch.randn(4, 5, 6), torch.ones(4, 5, dtype=torch.int64)
    mask[:, 3:] = 0
    opt = Adam(model, lr=0.1)
    weight = model.mix.weight.detach()
    got = layer_importance(opt.host, {"mix.weight": weight}, [({"x": x, "attention_mask": mask},)], None)
    kept = x[:, :3].reshape(-1, 6)
    assert got["mix.weight"] == pytest.approx(float(nn.functional.cosine_similarity(kept, kept @ weight.T).mean()), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ in a step
@pytest.mark.parametrize("form", ["weight", "factor"])
def test_what_is_kept_stays_for_fifty_steps_of_adam(form: Any) -> None:
    model = net()
    opt = Adam(model, lr=0.05, weight_decay=0.1, form=form, mrr=0.2, trr=0.6)
    train(model, opt, 0, 10)
    opt.consolidate_osft(rows())
    start = weights(model)
    ranks = {n: p.left.basis.shape[1] for n, p in opt.states[OSFT].on(opt.host.device).items()}
    assert ranks.keys() == {"0.weight", "2.weight"} and all(0 < k < 6 for k in ranks.values())
    train(model, opt, 10, 60)
    for place, name in ((0, "0.weight"), (2, "2.weight")):
        u, v = pairs(start[place], ranks[name])
        change = (weights(model)[place] - start[place]).double()
        assert float((u.T @ change @ v).abs().max()) < 1e-6 < 0.1 < float(change.norm())
        mixed = float((u.T @ change).abs().max())
        assert mixed < 1e-6 if form == "factor" else mixed > 1e-3


def test_gradient_space_does_not_hold_under_adam() -> None:
    model = net()
    opt = Adam(model, lr=0.05, weight_decay=0.1, unfreeze_rank_ratio=0.5, space="grad", pretrained=True)
    start = weights(model)
    train(model, opt, 0, 20)
    u, v = pairs(start[0], 3)
    assert float((u.T @ (weights(model)[0] - start[0]).double() @ v).abs().max()) > 1e-2


def test_nothing_kept_is_plain_fine_tuning_and_all_of_a_square_one_is_frozen() -> None:
    ends = []
    for options in ({"strength": 0.0}, {"mrr": 0.0, "trr": 0.0}, {"unfreeze_rank_ratio": 1.0}):
        model = net()
        opt = Adam(model, lr=0.05, pretrained=True, **options)
        train(model, opt, 0, 4)
        ends.append(weights(model))
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])
    model = net()
    start = weights(model)
    train(model, Adam(model, lr=0.05, pretrained=True, unfreeze_rank_ratio=0.0), 0, 5)
    torch.testing.assert_close(weights(model)[0], start[0], rtol=0, atol=1e-6)
    assert float((weights(model)[2] - start[2]).norm()) > 1e-2  # 3 x 6: three directions of its inputs are free
    with pytest.raises(NoFreeSubspace, match=r"all of \['0.weight'\] is kept.*raise unfreeze_rank_ratio"):
        Adam(net(), lr=0.05, pretrained=True, unfreeze_rank_ratio=0.0, targets=("0.*",))


def test_a_run_resumed_in_the_middle_of_a_task_has_the_same_bits() -> None:
    model, twin = net(), net(5)
    opt, other = (Adam(m, lr=0.05, mrr=0.2, trr=0.6) for m in (model, twin))
    train(model, opt, 0, 2)
    opt.consolidate_osft(rows())
    train(model, opt, 2, 4)
    other.load_state_dict(copy.deepcopy(opt.state_dict(weights=True)))
    for m, o in ((model, opt), (twin, other)):
        train(m, o, 4, 6)
        o.consolidate_osft(rows())
        train(m, o, 6, 8)
    assert same(weights(model), weights(twin)) and other.states[OSFT].tasks == 2


@pytest.mark.parametrize("seed", [When(0, 2).param(0), When(1, 2).param(2)])
def test_a_first_task_is_kept_better_at_an_equal_second(seed: int) -> None:
    """Two regressions, each of three directions of the inputs; the second is trained to the same loss. The form "factor", at
    the rank of a task: with mixed blocks free, so small a net gains little."""
    def task(number: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(number + 10 * seed)
        mix = torch.linalg.qr(torch.randn(16, 16, generator=g))[0][:, :3]
        x = torch.randn(128, 3, generator=g) @ mix.T
        return x, x @ torch.randn(16, 2, generator=g) @ torch.randn(2, 16, generator=g) / 4

    lost, second = {}, {}
    for strength in (0.0, 1.0):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 64, bias=False), nn.Tanh(), nn.Linear(64, 16, bias=False))
        with torch.no_grad():
            for p in model.parameters():
                p *= 0.2
        opt = Adam(model, lr=0.01, strength=strength, form="factor", unfreeze_rank_ratio=0.8)

        def loss(number: int, model: nn.Module = model) -> Tensor:
            x, y = task(number)
            return (model(x) - y).square().mean()

        for _ in range(100):
            opt.step(closure_of(opt, lambda: loss(0)))
        assert loss(0).item() < 5e-3
        opt.consolidate_osft()
        for _ in range(300):
            if opt.step(closure_of(opt, lambda: loss(1))).item() < 0.05:
                break
        second[strength], lost[strength] = loss(1).item(), loss(0).item()
    assert second[1.0] <= 1.1 * second[0.0] < 0.1 and lost[1.0] < 0.5 * lost[0.0], (second, lost)


def test_bad_input() -> None:
    for options, text in (({"mrr": 0.9}, r"trr=0.8, must be in \[0.9, 1"), ({"unfreeze_rank_ratio": 1.5}, "=1.5"),
                          ({"form": "both"}, "form='both', must be 'weight' or 'factor'"), ({"space": "x"}, "space='x'"),
                          ({"targets": ()}, "no targets"), ({"targets": ("0.wieght",)}, "has '0.wieght', must match a trained "
                                                            "matrix; did you mean '0.weight'")):
        with pytest.raises(ValueError, match=text):
            Adam(net(), lr=0.1, **options)
    opt = Adam(net(), lr=0.1)
    with pytest.raises(ValueError, match="no rows on any rank"):
        opt.consolidate_osft([])
    with pytest.raises(NonFiniteStatistics, match="8 of 8 rows are not finite"):
        opt.consolidate_osft([(batch()[0] / 0,)])
    with pytest.raises(ValueError, match="importance of"):
        opt.consolidate_osft(importance={"0.weight": 1.0})
    with pytest.raises(CompositionError, match="both own the projection; keep one of them"):
        compose(OSFT, SubspaceProjection, base=torch.optim.SGD)
    with pytest.raises(CompositionError, match="EMA must stand to the left of OSFT"):
        type("Late", (OSFT, EMA, torch.optim.SGD), {})(net(), lr=0.1)
    assert compose(OSFT, ClipGradNorm, base=torch.optim.SGD).__mro__[1] is ClipGradNorm
