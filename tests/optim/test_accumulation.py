"""Micro-batches: who divides the losses, what a closure that divides them itself is told, and how a loop may be left."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everbatch import compose
from everbatch.optim import SAM, ClipGradNorm, Ignite

PIECES = 4
ROWS = 12
X = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(ROWS) % 3
LABEL = nn.functional.cross_entropy


class Sharp(ClipGradNorm, SAM, torch.optim.SGD):
    pass


class Plain(ClipGradNorm, torch.optim.SGD):
    pass


def started(cls: type = Sharp, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, cls(model, lr=0.1, momentum=0.9, **options)


def pieces() -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.chunk(PIECES), Y.chunk(PIECES), strict=True))


def averaged(model: nn.Module, opt: Any) -> Callable[[], Any]:
    return lambda: sum(opt.backward(LABEL(model(x), y)) for x, y in opt.micro_batches(pieces()))


def divided(model: nn.Module, opt: Any, **average: bool) -> Callable[[], Any]:
    return lambda: sum(opt.backward(LABEL(model(x), y) / PIECES) for x, y in opt.micro_batches(pieces(), **average))


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("cls", [Plain, Sharp])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_default_divides_as_one_does_by_hand(cls: type, scaled: bool) -> None:
    """Bit for bit, in every pass, before the loss is scaled; and the loss of the step is the mean."""
    ends, losses = [], []
    for make, average in ((averaged, {}), (divided, {"average": False})):
        scaler = {"scaler": torch.amp.GradScaler("cpu", init_scale=1024.0)} if scaled else {}
        model, opt = started(cls, **scaler)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses.append([opt.step(make(model, opt, **average)) for _ in range(3)])
        ends.append(weights(model))
    assert same(*ends) and losses[0] == losses[1]
    model, opt = started(cls)
    whole = [opt.step(lambda: opt.backward(LABEL(model(X), Y))) for _ in range(3)]
    for mine, one in zip(ends[0], weights(model), strict=True):
        torch.testing.assert_close(mine, one, rtol=0, atol=1e-6)  # float32 sums in another order
    torch.testing.assert_close(losses[0], whole)


def test_every_loss_of_a_micro_batch_is_divided() -> None:
    """Two backwards for two terms are one backward of their sum; what comes after the loop is whole."""
    ends = []
    for apart in (False, True):
        model, opt = started(Plain)

        def closure(model: Any = model, opt: Any = opt, apart: bool = apart) -> None:
            for x, y in opt.micro_batches(pieces()):
                for loss in ((LABEL(model(x), y), model(x).square().mean()) if apart else
                             (LABEL(model(x), y) + model(x).square().mean(),)):
                    opt.backward(loss)
            opt.backward(model[0].weight.square().sum())

        opt.step(closure)
        ends.append(weights(model))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_auxiliary_closures_average_as_well() -> None:
    ends = []
    for by_hand in (False, True):
        model, opt = started(compose(Ignite, base=torch.optim.SGD), rho=0.5, rate=0.1, budget=0.01, multiplier=0.1)
        parts = PIECES if by_hand else 1

        def output(model: Any = model, opt: Any = opt, parts: int = parts) -> Any:
            loop = opt.micro_batches(pieces(), average=parts == 1)
            return sum(opt.backward(model(x).logsumexp(1).mean() / parts) for x, _ in loop)

        for _ in range(3):
            opt.step(averaged(model, opt), output=output)
        ends.append(weights(model))
    assert same(*ends)


# --------------------------------------------------------------------------------------- a closure that divides itself
def told(loss: Callable[[Tensor, Tensor], Tensor], returned: Callable[[list[Tensor]], Any], **average: bool) -> list[str]:
    """The warnings of two steps whose closure gives `backward` those losses and returns that of them."""
    model, opt = started(Plain)

    def closure() -> Any:
        given = []
        for x, y in opt.micro_batches(pieces(), **average):
            given.append(loss(model(x), y))
            opt.backward(given[-1])
        return returned([g.detach() for g in given])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step(closure)
        opt.step(closure)
    return [str(w.message) for w in caught]


def total(given: list[Tensor]) -> Tensor:
    return torch.stack(given).sum()


DIVIDES: dict[str, tuple[Any, Any]] = {
    "by their number": (lambda o, y: LABEL(o, y) / PIECES, total),
    "times the inverse": (lambda o, y: 0.25 * LABEL(o, y), lambda given: None),
    "in another dtype, nothing returned": (lambda o, y: (LABEL(o, y) / PIECES).double(), lambda given: None),
    "the last loss is returned": (lambda o, y: LABEL(o, y) / PIECES, lambda given: (given[-1] * PIECES).item()),
    "rows of the whole batch": (lambda o, y: LABEL(o, y, reduction="sum") / ROWS, total),
    "weights by row": (lambda o, y: (LABEL(o, y, reduction="none") * (1 / ROWS)).sum(), lambda given: total(given).item()),
    "term by term": (lambda o, y: LABEL(o, y) / PIECES + o.square().mean() / PIECES, total),
}
LEAVES: dict[str, tuple[Any, Any]] = {
    "the mean is returned": (LABEL, lambda given: total(given) / PIECES),
    "nothing is returned": (LABEL, lambda given: None),
    "the sum of means is returned": (LABEL, total),
    "the last loss is returned": (LABEL, lambda given: given[-1]),
    "a dict is returned": (LABEL, lambda given: {"loss": total(given)}),
    "rows of one micro-batch": (lambda o, y: LABEL(o, y, reduction="sum") / len(y), lambda given: None),
    "as many rows as micro-batches": (lambda o, y: LABEL(o, y, reduction="sum") / PIECES, lambda given: total(given) / PIECES),
    "a weighted term": (lambda o, y: LABEL(o, y) + 0.25 * o.square().mean(), lambda given: (total(given) / PIECES).item()),
}


@pytest.mark.parametrize("name", DIVIDES)
def test_a_closure_that_divides_is_told_once(name: str) -> None:
    texts = told(*DIVIDES[name])
    assert len(texts) == 1
    assert "opt.micro_batches divides each by 4 as well" in texts[0] and "average=False" in texts[0]
    assert told(*DIVIDES[name], average=False) == []


@pytest.mark.parametrize("name", LEAVES)
def test_a_closure_that_does_not_divide_is_left_alone(name: str) -> None:
    assert told(*LEAVES[name]) == []


def test_a_loss_that_shows_nothing_is_looked_at_again() -> None:
    model, opt = started(Plain)
    scale = itertools.chain([0.0] * PIECES, itertools.repeat(0.25))

    def closure() -> None:
        for x, y in opt.micro_batches(pieces()):
            opt.backward(LABEL(model(x), y) * next(scale))

    opt.step(closure)
    with pytest.warns(UserWarning, match="losses divided by 4, and opt.micro_batches divides"):
        opt.step(closure)


# ------------------------------------------------------------------------------------------------------ odd loops
def loop_of(opt: Any, model: nn.Module, how: str) -> None:
    def give(x: Tensor, y: Tensor) -> None:
        opt.backward(LABEL(model(x), y))

    if how == "nested":
        for x, y in opt.micro_batches(pieces()):
            for _ in opt.micro_batches(range(2)):
                give(x, y)
    elif how == "two at a time":
        for x, y in zip(opt.micro_batches(X.chunk(2)), opt.micro_batches(Y.chunk(2)), strict=True):
            give(x, y)
    elif how == "left early":
        for x, y in opt.micro_batches(pieces()):
            give(x, y)
            break
    elif how == "past us":
        for x, y in opt.micro_batches(pieces()):
            LABEL(model(x), y).backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("how", "text"), [
    ("nested", r"another loop over micro_batches, began inside this one; loop over pairs, opt.micro_batches\(zip\(a, b\)\)"),
    ("two at a time", "another loop over micro_batches, began inside this one"),
    ("left early", "was left before its last one, which is the one that reduces gradients"),
    ("past us", r"no loss was given to opt.backward\(loss\) in the loop over micro_batches, so none was divided"),
])
def test_a_loop_that_would_be_wrong_without_a_word(how: str, text: str) -> None:
    """It is an error, moves nothing, and the next step is as if it had not been."""
    model, opt = started(Plain)
    before = weights(model)
    with pytest.raises(RuntimeError, match=text):
        opt.step(lambda: loop_of(opt, model, how))
    assert same(weights(model), before)
    opt.step(averaged(model, opt))
    other, twin = started(Plain)
    twin.step(averaged(other, twin))
    assert same(weights(model), weights(other))


def test_a_loop_may_be_counted_along() -> None:
    model, opt = started(Plain)
    other, twin = started(Plain)

    def closure() -> None:
        for _, (x, y) in zip(range(PIECES), opt.micro_batches(pieces()), strict=False):
            opt.backward(LABEL(model(x), y))

    opt.step(closure)
    twin.step(averaged(other, twin))
    assert same(weights(model), weights(other))


def test_a_loop_before_a_step_without_a_closure() -> None:
    model, opt = started(Plain)
    other, twin = started(Plain)
    for x, y in opt.micro_batches(pieces()):
        opt.backward(LABEL(model(x), y))
    assert opt.step() is None
    twin.step(averaged(other, twin))
    assert same(weights(model), weights(other))


# ----------------------------------------------------------------------------------------------- gradients left over
def test_a_framework_that_accumulates_by_itself() -> None:
    """One backward outside, the next in the closure: half of the batch would be lost."""
    model, opt = started(Sharp)
    before = weights(model)
    LABEL(model(X), Y).backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"backward outside of the closure \(0.weight\), which every pass would forget"):
            opt.step(averaged(model, opt))
    assert same(weights(model), before)
    opt.zero_grad(set_to_none=False)
    opt.step(averaged(model, opt))
    other, twin = started(Sharp)
    twin.step(averaged(other, twin))
    assert same(weights(model), weights(other))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_gradient_of_zeros_is_none(sparse: bool) -> None:
    model, opt = started(Plain)
    model[0].weight.grad = torch.zeros(5, 6).to_sparse() if sparse else torch.zeros(5, 6)
    opt.step(averaged(model, opt))
    assert opt.step_count == 1


def test_a_closure_may_be_torchs_own_loop() -> None:
    """zero_grad, forward, loss.backward: what it did before stays right where nothing is scaled or averaged."""
    ends = []
    for classical in (False, True):
        model, opt = started(Sharp)

        def closure(model: Any = model, opt: Any = opt, classical: bool = classical) -> Tensor:
            if classical:
                opt.zero_grad()
            loss = LABEL(model(X), Y)
            loss.backward() if classical else opt.backward(loss)
            return loss

        for _ in range(3):
            opt.step(closure)
        ends.append(weights(model))
    assert same(*ends)


def test_a_closure_that_raises_leaves_nothing_to_complain_about() -> None:
    model, opt = started(Sharp)
    calls = []

    def closure() -> Any:
        calls.append(opt.backward(LABEL(model(X), Y)))
        if len(calls) == 2:  # the second pass
            raise KeyError("stop")
        return calls[-1]

    with pytest.raises(KeyError, match="stop"):
        opt.step(closure)
    opt.step(closure)
    LABEL(model(X), Y).backward()
    with pytest.raises(RuntimeError, match="outside of the closure"):
        opt.step(closure)


def test_what_micro_batches_takes() -> None:
    _, opt = started(Plain)
    with pytest.raises(ValueError, match=r"micro_batches\(average=4\), must be True or False"):
        next(opt.micro_batches([1], average=4))
    with pytest.raises(ValueError, match="must hold at least one micro-batch"):
        list(opt.micro_batches([]))


def test_a_closure_that_gives_no_gradient_is_an_error() -> None:
    model = nn.Linear(2, 2)
    opt = compose(base=torch.optim.SGD)(model, lr=0.1)
    with pytest.raises(RuntimeError, match=r"SGD: no parameter has a gradient after the closure; call opt.backward\(loss\)"):
        opt.step(lambda: model(torch.ones(1, 2)).sum())


def test_a_backward_past_the_optimizer_for_some_micro_batches_is_an_error() -> None:
    model = nn.Linear(2, 2)
    opt = compose(base=torch.optim.SGD)(model, lr=0.1)

    def closure() -> None:
        for i in opt.micro_batches(range(3)):
            loss = model(torch.ones(1, 2)).sum()
            opt.backward(loss) if i else loss.backward()

    with pytest.raises(RuntimeError, match="losses of 2 micro-batches of 3 were given to opt.backward"):
        opt.step(closure)
