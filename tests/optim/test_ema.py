"""The average of the weights, by its recursion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quadratics import batch, same, small_net, train, weights

from everbatch.optim import EMA


class AveragedSGD(EMA, torch.optim.SGD):
    pass


def average(opt: Any) -> list[torch.Tensor]:
    return [t.clone() for t in opt.states[EMA].average.values()]


def test_the_recursion() -> None:
    model = small_net()
    opt = AveragedSGD(model, lr=0.5, momentum=0.9, ema_decay=0.7)
    expected: list[torch.Tensor] = []
    for i in range(4):
        train(model, opt, i, i + 1)
        new = weights(model)
        expected = [0.7 * a + 0.3 * w for a, w in zip(expected, new, strict=True)] if expected else new
    for a, e in zip(average(opt), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7)


def test_every() -> None:
    model, past = small_net(), []
    opt = AveragedSGD(model, lr=0.5, ema_decay=0.0, ema_every=3)
    for i in range(6):
        train(model, opt, i, i + 1)
        past.append(weights(model))
        kept = past[0] if i < 2 else past[2] if i < 5 else past[5]
        assert same(average(opt), kept), i


def test_averaged_weights_are_in_the_model_inside_the_block_only() -> None:
    model = small_net()
    opt = AveragedSGD(model, lr=0.5, ema_decay=0.5)
    before = weights(model)
    with opt.averaged():  # nothing averaged yet
        assert same(weights(model), before)
    train(model, opt, 0, 3)
    now = weights(model)
    with opt.averaged():
        assert same(weights(model), average(opt)) and not same(weights(model), now)
        model(batch()[0])
    assert same(weights(model), now)
    with pytest.raises(KeyError), opt.averaged():
        raise KeyError
    assert same(weights(model), now)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_of_half_precision_weights_is_kept_in_fp32(dtype: torch.dtype) -> None:
    def go(opt: Any, model: Any, begin: int, end: int) -> None:
        for i in range(begin, end):
            with torch.no_grad():
                model.weight.fill_(1.0 + (i > 0))
            opt.step(lambda: opt.backward(model.weight.sum() * 0.0))

    model, twin = (torch.nn.Linear(2, 1, bias=False).to(dtype) for _ in range(2))
    opt, other = (AveragedSGD(m, lr=0.5, ema_decay=0.9998) for m in (model, twin))
    go(opt, model, 0, 200)
    expected = torch.ones(1, 2)
    for _ in range(199):
        expected.lerp_(torch.full((1, 2), 2.0), 1.0 - 0.9998)
    assert torch.equal(opt.states[EMA].average["weight"], expected) and expected[0, 0] > 1.03
    with opt.averaged():
        assert torch.equal(model.weight, expected.to(dtype)) and model.weight.dtype == dtype
    assert torch.equal(model.weight, torch.full((1, 2), 2.0, dtype=dtype))
    other.load_state_dict(opt.state_dict(weights=True))
    for o, m in ((opt, model), (other, twin)):
        go(o, m, 200, 203)
    assert same(average(opt), average(other)) and average(other)[0].dtype == torch.float32


def test_training_is_the_bases_bit_for_bit() -> None:
    averaged, bare = small_net(), small_net()
    train(averaged, AveragedSGD(averaged, lr=0.5, momentum=0.9, ema_decay=0.5), 0, 3)
    train(bare, AveragedSGD(bare, lr=0.5, momentum=0.9, ema_decay=0.9), 0, 3)
    assert same(weights(averaged), weights(bare))


def test_a_parameter_unfrozen_or_added_later_joins_at_its_value() -> None:
    model = small_net()
    model[0].bias.requires_grad_(False)
    opt = AveragedSGD([(n, p) for n, p in model.named_parameters() if not n.startswith("2.")], lr=0.5, ema_decay=0.5)
    train(model, opt, 0, 1)
    assert list(opt.states[EMA].average) == ["0.weight"]
    model[0].bias.requires_grad_(True)
    opt.add_param_group({"params": [(n, p) for n, p in model.named_parameters() if n.startswith("2.")]})
    train(model, opt, 1, 2)
    kept = opt.states[EMA].average
    assert sorted(kept) == ["0.bias", "0.weight", "2.bias", "2.weight"] and torch.equal(kept["2.weight"], model[2].weight)
    with opt.averaged():
        assert torch.equal(kept["0.weight"], model[0].weight)


@pytest.mark.parametrize(("name", "value"), [("ema_decay", 1.0), ("ema_decay", -0.1), ("ema_decay", float("nan")),
                                             ("ema_decay", "x"), ("ema_every", 0), ("ema_every", 1.5), ("ema_every", "1")])
def test_bad_values(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"EMA: {name}={value!r}, must be"):
        AveragedSGD(small_net(), lr=0.1, **{name: value})


def test_the_average_is_shown_in_frozen_weights_too() -> None:
    model = small_net()
    opt = AveragedSGD(model, lr=0.1, ema_decay=0.5)
    train(model, opt, 0, 3)
    before, average = weights(model), {n: t.clone() for n, t in opt.states[EMA].average.items()}
    model.requires_grad_(False)
    with opt.averaged():
        assert all(torch.equal(p, average[n]) for n, p in model.named_parameters())
    assert same(weights(model), before)


def test_the_average_of_a_frozen_weight_goes_on_towards_it() -> None:
    model = small_net()
    opt = AveragedSGD(model, lr=0.1, ema_decay=0.5)
    train(model, opt, 0, 3)
    model[0].requires_grad_(False)
    expected = opt.states[EMA].average["0.weight"].clone()
    for i in range(3, 6):
        train(model, opt, i, i + 1)
        expected.lerp_(model[0].weight, 0.5)
    assert torch.equal(opt.states[EMA].average["0.weight"], expected)
