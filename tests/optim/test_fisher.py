"""Importance estimates against closed forms and loops over single samples; what an estimate must leave alone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from quadratics import same, small_net, weights
from torch import Tensor, nn
from torch.nn import functional

from everbatch.composition import compose
from everbatch.errors import UnsupportedHost
from everbatch.optim import EWC, MAS, NCL, Refresh, diagonal_fisher, output_sensitivity
from everbatch.optim.memory import by_layer, fisher
from everbatch.optim.memory.fisher import ESTIMATORS
from everbatch.optim.memory.importance import slices
from rotation import When

SGD = compose(base=torch.optim.SGD)
G = torch.Generator().manual_seed(3)
X, Y = torch.randn(10, 6, generator=G, dtype=torch.float64), torch.randint(0, 3, (10,), generator=G)
IDS = torch.arange(10) + 100
BATCHES = [(X[:4], Y[:4], IDS[:4]), (X[4:8], Y[4:8], IDS[4:8]), (X[8:], Y[8:], IDS[8:])]


def optimizer(model: nn.Module | None = None) -> tuple[Any, nn.Module]:
    model = (small_net() if model is None else model).double()
    return SGD(model, lr=0.1), model


def by_loop(model: nn.Module, x: Tensor, y: Tensor, kind: str) -> dict[str, Tensor]:
    """One backward at a time."""
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for row, label in zip(x, y, strict=True):
        for c in range(3) if kind == "exact" else [int(label)]:
            logs = model(row[None]).log_softmax(-1)[0]
            model.zero_grad()
            logs[c].backward()
            factor = logs[c].exp().item() if kind in ("exact", "reference") else 1.0
            for n, p in model.named_parameters():
                assert p.grad is not None
                sums[n] += factor * p.grad.square()
    model.zero_grad()
    return {n: s / len(x) for n, s in sums.items()}


def close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name].detach(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("kind", ["empirical", "reference", "exact"])
def test_vectorised_is_one_by_one(kind: Any, chunk: int) -> None:
    opt, model = optimizer()
    close(diagonal_fisher(opt, BATCHES, kind, chunk=chunk), by_loop(model, X, Y, kind))


class Cube(torch.autograd.Function):
    """An operator of a user's, as torch's own pages write them: torch.func knows nothing of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return slope * 3 * x**2


class Foreign(nn.Module):
    """A layer that torch.func cannot take for several rows at once."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.weight
        if self.kind == "function":
            cubed: Tensor = Cube.apply(x)
            return cubed
        total = torch.zeros(6, dtype=x.dtype)
        for row in x:
            total += row  # in place, into what has no rows
        return total + 0 * x


@pytest.mark.parametrize("kind", ["function", "in place"])
def test_what_torch_func_cannot_is_taken_row_by_row_and_said(kind: str) -> None:
    model = nn.Sequential(Foreign(kind), nn.Linear(6, 3)).double()
    opt, _ = optimizer(model)
    with pytest.warns(UserWarning, match="importance: the model does what torch.func cannot .* taken row by row"):
        got = diagonal_fisher(opt, BATCHES, "empirical", chunk=4)
    close(got, by_loop(model, X, Y, "empirical"))
    close(diagonal_fisher(opt, BATCHES, "empirical", chunk=1), got)  # and says nothing


class Rich(nn.Module):
    """Every layer whose weights' gradients are known by row, one of them called twice, and writes in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        self.batch, self.group, self.layer = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm((4, 7))
        self.tokens, self.again, self.norm, self.head = nn.Linear(7, 5), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.flat = nn.BatchNorm1d(5)
        self.batch.running_mean += torch.arange(4)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.batch(self.conv(x.view(-1, 2, 3, 5))), inplace=True)
        x = self.layer(self.group(x).mean(2))
        x = self.norm(self.again(self.tokens(x).tanh()))
        return self.head(self.flat(self.again(x.mean(1)).sigmoid_()))  # type: ignore[no-any-return]


class Odd(nn.Module):
    """A net that is not what it looks like."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.kind, self.first, self.head = kind, nn.Linear(6, 6), nn.Linear(6, 3)
        self.deep = nn.Conv2d(2, 2, 1, groups=2) if kind == "depthwise" else nn.Identity()
        if kind == "scaled":
            self.first.register_parameter("scale", nn.Parameter(torch.full((6,), 0.5)))

    def forward(self, x: Tensor) -> Tensor:
        seen = x.abs().sum(1, keepdim=True) > 0
        order = x[:, 0].argsort()
        if self.kind == "sorted":
            x = x[order]
        x = self.deep(self.first(x).tanh().view(-1, 2, 1, 3)).flatten(1)
        if "elsewhere" in self.kind:
            x = x + (0.5 if self.kind == "used elsewhere" else 1e-4) * x @ self.first.weight
        if self.kind == "scaled":
            x = x * self.first.scale
        y: Tensor = self.head(x - x.mean(0)) if self.kind == "rows see each other" else self.head(x)
        return seen * (y[order.argsort()] if self.kind == "sorted" else y)


@pytest.mark.parametrize("nearby", [2**18, 21])
@pytest.mark.parametrize("kind", ["empirical", "reference", "exact"])
def test_by_layer_is_one_by_one(kind: Any, nearby: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows but those of the first four, which torch.func takes as well; with gradients that fit a cache, and not."""
    monkeypatch.setattr(by_layer, "NEARBY", nearby)
    opt, model = optimizer(Rich())
    x = torch.randn(11, 30, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y = torch.arange(11) % 3
    asked = listened(monkeypatch)
    got = diagonal_fisher(opt, [(x[:6], y[:6]), (x[6:], y[6:])], kind, chunk=4)
    model.eval()
    close(got, by_loop(model, x, y, kind))
    assert asked == [4]


@pytest.mark.parametrize("narrow", [24, 0])
@pytest.mark.parametrize("nearby", [2**18, 21, 1000])
def test_images_by_layer(nearby: int, narrow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to a single place, in every way of summing."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=(2, 1), padding=(3, 1)), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(4, 5, (2, 3)),
        nn.Conv2d(5, 3, 3, padding=1, bias=False), nn.AdaptiveMaxPool2d(1), nn.Conv2d(3, 3, 1), nn.Flatten())
    opt, _ = optimizer(model)
    monkeypatch.setattr(by_layer, "NARROW", narrow)
    x = torch.randn(11, 2, 6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y = torch.arange(11) % 3
    monkeypatch.setattr(by_layer, "NEARBY", nearby)
    asked = listened(monkeypatch)
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]
    got, moved = diagonal_fisher(opt, batches, "empirical", chunk=4), output_sensitivity(opt, batches, chunk=4)
    assert asked == [4, 4]
    model.eval()
    close(got, by_loop(model, x, y, "empirical"))
    close(output_sensitivity(opt, batches, chunk=1), moved)


def listened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows torch.func is asked for, piece by piece."""
    asked: list[int] = []
    torchs = fisher._vectorised

    def vectorised(many: Any, weights: Any, part: Any) -> Any:
        asked.append(len(part[0]))
        return torchs(many, weights, part)

    monkeypatch.setattr(fisher, "_vectorised", vectorised)
    return asked


@pytest.mark.parametrize("kind", ["rows see each other", "used elsewhere", "used a little elsewhere", "depthwise", "scaled"])
def test_a_net_that_is_not_what_it_looks_like_is_not_taken_by_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where the first rows have no gradient at all, in which nothing shows."""
    opt, model = optimizer(Odd(kind))
    asked = listened(monkeypatch)
    close(diagonal_fisher(opt, BATCHES, "empirical", chunk=4), by_loop(model, X, Y, "empirical"))
    assert asked == [4, 4, 2]
    blind = torch.cat([torch.zeros(4, 6, dtype=torch.float64), X])
    labels = torch.cat([Y[:4], Y])
    got = diagonal_fisher(opt, [(blind, labels)], "empirical", chunk=4)
    close({name: g * 14 / 10 for name, g in got.items()}, by_loop(model, X, Y, "empirical"))


@pytest.mark.parametrize("kind", ["reference", "exact"])
def test_rows_may_change_places_on_their_way(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opt, model = optimizer(Odd("sorted"))
    asked = listened(monkeypatch)
    close(diagonal_fisher(opt, BATCHES, kind, chunk=4), by_loop(model, X, Y, kind))
    assert asked == [4]


@pytest.mark.parametrize("shape", ["no rows", "rows last"])
def test_outputs_of_any_shape_are_sensitive(shape: str) -> None:
    """Of a row, all that the model gives for it counts, wherever its dimension is."""
    class Turned(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y.squeeze() if shape == "no rows" else y.T

    model = Turned(nn.Linear(6, 1 if shape == "no rows" else 3)).double()
    opt, _ = optimizer(model)
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in X:
        found = torch.autograd.grad(model(row[None]).square().sum(), list(model.parameters()))
        for name, g in zip(wanted, found, strict=True):
            wanted[name] += g.abs() / len(X)
    for chunk in (1, 4):
        close(output_sensitivity(opt, BATCHES, chunk=chunk), wanted)


def test_autocast_inside_a_net_costs_no_more_by_layer() -> None:
    class Narrow(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x).float()  # type: ignore[no-any-return]

    torch.manual_seed(3)
    model = Narrow(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))
    opt = SGD(model, lr=0.1)
    batches = [(x.float(), y) for x, y, _ in BATCHES] * 4
    one, other = (diagonal_fisher(opt, batches, chunk=chunk) for chunk in (1, 4))
    for name, value in one.items():
        assert float((value - other[name]).norm() / value.norm()) < 0.02, name


def test_a_net_that_does_something_else_with_later_rows_is_taken_otherwise_from_there_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Changes(Odd):
        def forward(self, x: Tensor) -> Tensor:
            x, (weight, bias) = self.first(x).tanh(), self.head.parameters()
            return functional.linear(x, weight, bias) if len(x) == 2 else self.head(x)  # type: ignore[no-any-return]

    opt, model = optimizer(Changes(""))
    asked = listened(monkeypatch)
    close(diagonal_fisher(opt, BATCHES, "empirical", chunk=4), by_loop(model, X, Y, "empirical"))
    assert asked == [4, 2]


def test_an_error_of_the_model_is_no_matter_of_rows() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no such weight") if x.shape[0] else x

    opt, _ = optimizer(nn.Sequential(nn.Linear(6, 3), Broken()))
    with pytest.raises(RuntimeError, match="no such weight"):
        diagonal_fisher(opt, BATCHES, chunk=4)


def test_logistic_regression_in_closed_form() -> None:
    """Two classes with logits (0, w x): the exact Fisher information is mean p (1 - p) x^2."""

    class Logistic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.7, -0.4, 0.2, 1.1, -0.9, 0.3], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            u = x @ self.weight
            return torch.stack([torch.zeros_like(u), u], -1)

    opt, model = optimizer(Logistic())
    p = torch.sigmoid(X @ model.weight.detach())  # type: ignore[operator]
    expected = (p * (1 - p))[:, None] * X.square()
    got = diagonal_fisher(opt, [(X, Y.clamp(max=1))], "exact")
    torch.testing.assert_close(got["weight"], expected.mean(0), rtol=1e-12, atol=0)


def test_the_reference_is_a_part_of_the_exact() -> None:
    opt, _ = optimizer()
    part, whole = (diagonal_fisher(opt, BATCHES, kind) for kind in ("reference", "exact"))
    assert all(bool((part[n] <= whole[n]).all()) for n in part)


def test_batch_squares_the_mean_gradient() -> None:
    opt, model = optimizer()
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y, _ in BATCHES[:2]:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for n, p in model.named_parameters():
            assert p.grad is not None
            expected[n] += p.grad.square() / 2
    close(diagonal_fisher(opt, BATCHES[:2], "batch"), expected)


def test_drawn_labels_are_a_function_of_the_sample() -> None:
    """The same rows in other batches give the same sums; another draw, other labels. Over many draws the mean is the exact."""
    opt, _ = optimizer()
    other = [(X[5:], Y[5:], IDS[5:]), (X[:5], Y[:5], IDS[:5])]
    close(diagonal_fisher(opt, BATCHES, "sampled"), diagonal_fisher(opt, other, "sampled"))
    exact, whole = diagonal_fisher(opt, BATCHES, "exact"), [(X, Y, IDS)]
    draws = [diagonal_fisher(opt, whole, "sampled", draw=i) for i in range(400)]
    for name, value in exact.items():
        stack = torch.stack([d[name] for d in draws])
        assert stack.std(0).max() > 0
        assert bool(((stack.mean(0) - value).abs() <= 5 * stack.std(0) / 20 + 1e-12).all())


def test_the_loaders_denominator_counts_a_short_batch_as_whole() -> None:
    opt, _ = optimizer()
    with pytest.warns(UserWarning, match="a batch of 2 rows after one of 4"):
        got = diagonal_fisher(opt, BATCHES, denominator="loader")
    close(got, {n: f * 10 / 12 for n, f in diagonal_fisher(opt, BATCHES).items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diagonal_fisher(opt, BATCHES)


@pytest.mark.parametrize("per_sample", [True, False])
def test_output_sensitivity(per_sample: bool) -> None:
    opt, model = optimizer()
    parts = X.split(1) if per_sample else (X[:4], X[4:8])
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for rows in parts:
        model.zero_grad()
        model(rows).square().sum(-1).mean().backward()
        for n, p in model.named_parameters():
            assert p.grad is not None
            expected[n] += p.grad.abs() / len(parts)
    got = output_sensitivity(opt, BATCHES if per_sample else BATCHES[:2], per_sample=per_sample, chunk=3)
    close(got, expected)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_an_estimate_leaves_no_trace(kind: Any) -> None:
    """Evaluation mode inside; afterwards modes, statistics, weights, gradients, the random stream as before."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3))
    opt, model = optimizer(model)
    model[1].eval()
    model[4].weight.grad = torch.ones_like(model[4].weight)  # type: ignore[index, union-attr]
    before, modes, stream = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], torch.get_rng_state()
    first = diagonal_fisher(opt, BATCHES[:2], kind)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    assert model[0].weight.grad is None and bool((model[4].weight.grad == 1).all())  # type: ignore[union-attr]
    model.eval()
    close(first, diagonal_fisher(opt, BATCHES[:2], kind))


@pytest.mark.parametrize("kind", ["frozen bf16", "double buffer", "named"])
def test_what_is_not_trained_keeps_its_type_and_logits_may_have_a_name(kind: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.head = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)
            self.below.to(torch.bfloat16 if kind == "frozen bf16" else torch.float32)
            self.register_buffer("shift", torch.linspace(0, 1, 6, dtype=torch.float64))

        def forward(self, x: Tensor) -> Any:
            x = self.below(x.to(self.below.weight.dtype))  # type: ignore[arg-type]
            if kind == "double buffer":
                x = x @ self.shift.diag().to(x) + (x.double() @ self.shift[:, None]).float()  # type: ignore[operator, union-attr]
            found = self.head(x.float())
            return {"logits": found, "more": x} if kind == "named" else found

    torch.manual_seed(0)
    model = Mixed()
    opt: Any = compose(EWC, base=torch.optim.SGD)(model, lr=0.1)
    rows = [(x.float(), y) for x, y, _ in BATCHES]
    got = diagonal_fisher(opt, rows)
    total = torch.zeros_like(model.head.weight)
    for row, label in ((r, t) for x, y in rows for r, t in zip(x, y, strict=True)):
        model.zero_grad()
        result = model(row[None])
        nn.functional.cross_entropy(result["logits"] if kind == "named" else result, label[None]).backward()
        assert model.head.weight.grad is not None
        total += model.head.weight.grad.square() / 10
    near = 2e-2 if kind == "frozen bf16" else 1e-4  # products in bf16 round otherwise with several rows
    torch.testing.assert_close(got["head.weight"], total.detach(), rtol=near, atol=1e-8)


def test_a_model_without_logits_is_told_so() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return [super().forward(x)]

    opt: Any = compose(EWC, base=torch.optim.SGD)(Odd(6, 3), lr=0.1)
    with pytest.raises(ValueError, match="importance: a model that returns a list, must return a tensor, or have it under"):
        diagonal_fisher(opt, [(x.float(), y) for x, y, _ in BATCHES])


def test_frozen_and_tied_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.second.weight = self.first.weight
            self.head.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))  # type: ignore[no-any-return]

    opt, model = optimizer(Tied())
    got = diagonal_fisher(opt, BATCHES)
    assert sorted(got) == ["first.bias", "first.weight", "second.bias"]
    model.zero_grad()
    total = torch.zeros_like(model.first.weight)  # type: ignore[arg-type, union-attr]
    for row, label in zip(X, Y, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(row[None]), label[None]).backward()
        total += model.first.weight.grad.square() / 10  # type: ignore[operator, union-attr]
    torch.testing.assert_close(got["first.weight"], total.detach(), rtol=1e-10, atol=1e-14)


KINDS = [*ESTIMATORS, "sensitivity"]


@pytest.mark.parametrize("kind", [When(place, 4).param(kind) for place, kind in enumerate(KINDS)])
def test_a_mean_over_many_equal_rows_in_bf16_is_that_of_one(kind: Any) -> None:
    """All numbers are powers of two, or 300 times one: no sum rounds in fp32; in bf16 it would stop at 256 terms."""
    model = nn.Linear(1, 2, bias=False).bfloat16()
    nn.init.constant_(model.weight, 0.5)
    opt = SGD(model, lr=0.1)

    def estimate(batches: int) -> dict[str, Tensor]:
        data = [(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), IDS[:1])] * batches
        return output_sensitivity(opt, data) if kind == "sensitivity" else diagonal_fisher(opt, data, kind)

    one, many = estimate(1), estimate(300)
    assert many["weight"].dtype == torch.float32 and torch.equal(many["weight"], one["weight"]) and many["weight"].all()
    kept = slices(opt.host, {"weight": torch.full((2, 1), 257.0)}, "test")
    assert kept["weight"].tolist() == [[257.0], [257.0]]


def test_squares_of_small_gradients_do_not_vanish_in_fp16() -> None:
    model = nn.Linear(1, 2, bias=False).half()
    nn.init.zeros_(model.weight)
    got = diagonal_fisher(SGD(model, lr=0.1), [(torch.full((2, 1), 2.0**-12), torch.tensor([0, 1]))])
    assert torch.equal(got["weight"], torch.full((2, 1), 2.0**-26))


def test_bad_input() -> None:
    opt, model = optimizer()
    before = weights(model)
    with pytest.raises(ValueError, match=r"label \[3\], must be in \[0, 3\)"):
        diagonal_fisher(opt, [(X[:2], torch.tensor([0, 3]))])
    with pytest.raises(ValueError, match="label \\[-1\\]"):
        diagonal_fisher(opt, [(X[:2], torch.tensor([-1, 0]))])
    with pytest.raises(ValueError, match="no rows on any rank"):
        diagonal_fisher(opt, [])
    with pytest.raises(ValueError, match="no ids, must be given for estimator='sampled'"):
        diagonal_fisher(opt, [(X, Y)], "sampled")
    with pytest.raises(ValueError, match="rows of 1 tensor"):
        diagonal_fisher(opt, [(X,)])
    with pytest.raises(ValueError, match="estimator='true', must be one of reference"):
        diagonal_fisher(opt, BATCHES, "true")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="are not finite"):
        diagonal_fisher(opt, [(X * float("nan"), Y)])
    with pytest.raises(UnsupportedHost, match="built without its module"):
        diagonal_fisher(SGD(model.named_parameters(), lr=0.1), BATCHES)
    with pytest.raises(UnsupportedHost, match="EWC: the optimizer was built without its module"):
        compose(EWC, base=torch.optim.SGD)(model.named_parameters(), lr=0.1)
    assert same(weights(model), before)


def test_given_importances_must_fit() -> None:
    opt, model = optimizer()
    good = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    for change, text in (({"2.bias": torch.ones(4)}, r"\['2.bias'\] has shape \[\(4,\)\], must be \[\(3,\)\]"),
                         ({"2.bias": torch.tensor([1.0, -1.0, 0.0])}, r"\['2.bias'\] is negative or not finite"),
                         ({"2.bias": torch.tensor([1.0, float("nan"), 0.0])}, r"\['2.bias'\] is negative or not finite"),
                         ({"3.bias": torch.ones(3)}, r"parameters \['3.bias'\] is missing or too much")):
        with pytest.raises(ValueError, match=text):
            slices(opt.host, {**good, **change}, "test")
    with pytest.raises(ValueError, match="is missing or too much"):
        slices(opt.host, {n: t for n, t in good.items() if n != "0.weight"}, "test")


def test_batch_norm_with_means_far_above_deviations_loses_no_digits() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, 3)).eval()
    x, y = torch.randn(12, 3, 8, 8), torch.arange(12) % 3
    conv, norm = model[0], model[1]
    with torch.no_grad():
        norm.running_var.copy_(conv(x).var((0, 2, 3)))
        conv.bias += 300 * norm.running_var.sqrt()
        norm.running_mean.copy_(conv(x).mean((0, 2, 3)))
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]
    got = diagonal_fisher(SGD(model, lr=0.1), batches, "empirical", chunk=6)["1.weight"].double()
    wanted = by_loop(copy.deepcopy(model).double(), x.double(), y, "empirical")["1.weight"]
    assert float((got - wanted).norm() / wanted.norm()) < 5e-6


@pytest.mark.parametrize(("part", "call"), [(EWC, "consolidate_ewc"), (MAS, "consolidate_mas"), (NCL, "consolidate_ncl"),
                                            (Refresh, "update_fisher")])
def test_every_method_that_estimates_goes_by_layer(part: Any, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = compose(part, base=torch.optim.SGD)(small_net(), lr=0.1)
    asked = listened(monkeypatch)
    getattr(opt, call)([tuple(value.float() if value.is_floating_point() else value for value in rows) for rows in BATCHES])
    assert asked == [4]


def test_batches_may_have_outputs_of_their_own_number() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 5)

        def forward(self, x: Tensor, wide: Tensor) -> Tensor:
            return self.head(x)[:, : wide.shape[1]]  # type: ignore[no-any-return]

    torch.manual_seed(6)
    opt, _ = optimizer(Heads())
    batches = [({"x": x, "wide": torch.zeros(len(x), width)}, y) for (x, y, _), width in zip(BATCHES, (3, 5, 3), strict=True)]
    found = diagonal_fisher(opt, batches, "exact", chunk=4)
    alone = [{n: g * len(batch[1]) for n, g in diagonal_fisher(opt, [batch], "exact").items()} for batch in batches]
    close(found, {n: sum(one[n] for one in alone) / len(X) for n in found})
