"""Every method of the table as the unified objective says it: Bregman identities of its terms, and
what describe() prints."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everbatch.composition import compose
from everbatch.data import Batch
from everbatch.objective import bregman as b
from everbatch.objective.table import TABLE
from everbatch.objective.terms import OutputTerm, PosteriorTerm, WeightTerm, evaluate
from everbatch.optim import EWC, MAS, SI, OptimizerMixin
from everbatch.optim.memory.ewc import merge_quadratics
from everbatch.train import Replay, Trainer, TrainerMixin

N, C = 6, 5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


PRECISION = {"w": draw(3, 4).exp(), "b": draw(4, seed=1).exp()}
ANCHOR = {"w": draw(3, 4, seed=2), "b": draw(4, seed=3)}
WEIGHTS = {"w": draw(3, 4, seed=4), "b": draw(4, seed=5), "free": draw(2, seed=6)}

METHODS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "er": lambda: TABLE["er"](0.5),
    "dark_er": lambda: TABLE["dark_er"](0.1),
    "dark_er, sum": lambda: TABLE["dark_er"](0.1, "sample_sum"),
    "dark_er_pp": lambda: TABLE["dark_er_pp"](0.1, 0.5),
    "ewc": lambda: TABLE["ewc"](0.7, PRECISION, ANCHOR, 0.0),
    "online_ewc": lambda: TABLE["online_ewc"](0.7, PRECISION, ANCHOR),
    "si": lambda: TABLE["si"](0.3, PRECISION, ANCHOR),
    "mas": lambda: TABLE["mas"](2.0, PRECISION, ANCHOR),
    "vcl": lambda: TABLE["vcl"](0.7, 50, ANCHOR, {n: p.log() / 2 for n, p in PRECISION.items()},
                               {n: -0.5 + 0.1 * a for n, a in ANCHOR.items()}),
    "ncl": lambda: TABLE["ncl"](0.5, PRECISION, ANCHOR),
    "lwf": lambda: TABLE["lwf"](0.5, 2.0, ((0, 3),)),
    "lwf, by task": lambda: TABLE["lwf"](0.5, 1.5, ((0, 2), (2, 4))),
    "cls_er": lambda: TABLE["cls_er"](0.15),
    "cpr": lambda: TABLE["cpr"](0.2),
}


def test_every_entry_is_checked_here() -> None:
    assert set(TABLE) <= {name.split(",")[0] for name in METHODS}


def part(name: str) -> Batch:
    labels = torch.arange(N) % C
    rows = {"inputs": torch.zeros(N, 1), "ids": torch.arange(N), "position": torch.arange(N)}
    extras = {"logits": draw(N, C, seed=8), "old": draw(N, 4, seed=9), "semantic": draw(N, C, seed=10)}
    return Batch(targets=labels, part=name, extras=extras, **rows)


@pytest.mark.parametrize("name", METHODS)
def test_terms_are_the_divergences_that_their_generators_make(name: str) -> None:
    """Value and gradient of the loss that trains, through autograd, against the definition: D >= 0,
    D(z, z) = 0, and the difference of the generator's slopes."""
    for term in METHODS[name]():
        if isinstance(term, WeightTerm):
            check_weights(term)
        elif isinstance(term, PosteriorTerm):
            check_posterior(term)
        else:
            check_outputs(term)


def check_outputs(term: OutputTerm) -> None:
    batch = part(term.rows)
    wanted = batch.targets if term.target == "targets" else batch.extras[term.target]
    logits = draw(N, C, seed=7).requires_grad_()
    value = evaluate([term], logits, batch)[term.name]
    (gradient,) = torch.autograd.grad(value, logits)

    # Losses are in fp32, hence the tolerance.
    losses, definition = term.losses(logits, batch).double(), term.divergence.definition(logits, wanted)
    exact = definition
    if term.divergence.target_first:  # more by the entropy of its target, which no logit moves: 0 for labels
        p = term.divergence.target(logits, wanted)
        exact = definition - torch.xlogy(p, p).sum(-1)
    torch.testing.assert_close(losses, exact, rtol=1e-6, atol=1e-6)
    assert (definition > 0).all()
    torch.testing.assert_close(gradient, term.gradient(logits, wanted), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(value.double(), term.weight * losses.mean(), rtol=1e-6, atol=0)

    # Where h is z there is nothing to gain.
    if term.target != "targets":
        still = term.gradient(wanted, wanted)
        torch.testing.assert_close(still, torch.zeros_like(still), rtol=0, atol=1e-12)
    assert evaluate([term], logits, part("another")) == {}


def check_weights(term: WeightTerm) -> None:
    moving = {name: theta.clone().requires_grad_() for name, theta in WEIGHTS.items()}
    value = term.value(term.distance(moving.items()))
    expected = torch.zeros((), dtype=torch.float64)
    for name in PRECISION:
        theta, anchor = WEIGHTS[name].reshape(-1), ANCHOR[name].reshape(-1)
        expected += 2.0 * term.weight * b.bregman(term.generator(name), theta, anchor)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=0)
    assert value > 0 and term.distance(ANCHOR.items()) == 0

    gradients = dict(zip(PRECISION, torch.autograd.grad(value, [moving[n] for n in PRECISION]), strict=True))
    names = list(PRECISION)
    added = [torch.ones_like(WEIGHTS[name]) for name in names]
    term.add_gradient_(names, [WEIGHTS[name] for name in names], added)
    for name, got in zip(names, added, strict=True):
        slope = torch.func.grad(term.generator(name))
        theta, anchor = WEIGHTS[name].reshape(-1), ANCHOR[name].reshape(-1)
        difference = 2.0 * term.weight * (slope(theta) - slope(anchor)).view(got.shape)
        torch.testing.assert_close(gradients[name], difference, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(term.gradient(name, WEIGHTS[name]), difference, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(got - 1.0, difference, rtol=1e-10, atol=1e-12)


def check_posterior(term: PosteriorTerm) -> None:
    """The sum over weights of the divergence that the negative entropy of densities makes, on a grid; gradients by autograd."""
    names = list(ANCHOR)
    theta = {name: WEIGHTS[name].clone().requires_grad_() for name in names}
    spread = {name: term.own_spread[name].clone().requires_grad_() for name in names}
    made = dataclasses.replace(term, own_spread=spread)
    value = made.value(made.distance(theta.items()))

    grid = torch.linspace(-30, 30, 60001, dtype=torch.float64)
    width = grid[1] - grid[0]

    def density(mean: Tensor, log_deviation: Tensor) -> Tensor:
        spread = torch.distributions.Normal(mean, log_deviation.exp())
        return spread.log_prob(grid).clamp_min(-500.0).exp()

    def generator(q: Tensor) -> Tensor:
        return b.negative_entropy(q) * width

    expected = torch.zeros((), dtype=torch.float64)
    for name in names:
        rows = [t.detach().reshape(-1) for t in (theta[name], spread[name], term.mean[name], term.spread[name])]
        for mean, s, old_mean, old_s in zip(*rows, strict=True):
            expected += b.bregman(generator, density(mean, s), density(old_mean, old_s))
    torch.testing.assert_close(value.detach(), 0.7 / 50 * expected, rtol=1e-8, atol=1e-10)
    assert value > 0
    same = dataclasses.replace(term, own_spread=term.spread)
    torch.testing.assert_close(same.distance(ANCHOR.items()), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)

    gradients = torch.autograd.grad(value, [*theta.values(), *spread.values()])
    for name, of_mean, of_spread in zip(names, gradients[:2], gradients[2:], strict=True):
        torch.testing.assert_close(term.gradient(name, WEIGHTS[name]), of_mean, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(term.spread_gradient(name), of_spread, rtol=1e-10, atol=1e-14)


def test_a_sum_of_tasks_is_one_term_and_its_constant() -> None:
    one, two = (TABLE["ewc"](0.7, {"w": draw(4, seed=s).exp()}, {"w": draw(4, seed=s + 1)}, 0.0)[0] for s in (10, 20))
    total, centre, rest = merge_quadratics(one.precision["w"], one.anchor["w"], two.precision["w"], two.anchor["w"])
    (whole,) = TABLE["ewc"](0.7, {"w": total}, {"w": centre}, float(rest.sum()))
    at = [("w", draw(4, seed=30))]
    expected = one.value(one.distance(at)) + two.value(two.distance(at))
    torch.testing.assert_close(whole.value(whole.distance(at)), expected, rtol=1e-12, atol=0)


# --------------------------------------------------------------------------------------- describe()
def test_describe_prints_the_objective_of_the_run() -> None:
    class Trained(Replay, Trainer):
        pass

    optimizer = functools.partial(compose(EWC, SI, MAS, base=torch.optim.SGD), lr=0.1, ewc_strength=0.7,
                                  si_strength=0.0, mas_strength=2.0)
    trainer: Any = Trained(nn.Linear(2, 2), optimizer, device="cpu", alpha=0.1, beta=0.5)
    penalties = "0.7 sum F (theta - theta*)^2 [EWC] + 2 sum Omega (theta - theta*)^2 [MAS]"
    assert f"L = loss + {penalties}\n" in trainer.optimizer.describe()
    outputs = "0.1 E_dark ||logits - stored||^2 / classes + 0.5 E_replay CE(logits, labels)"
    assert f"L = E_stream CE(logits, labels) + {outputs} + {penalties}\n" in trainer.describe()
    off: Any = Trained(nn.Linear(2, 2), functools.partial(compose(base=torch.optim.SGD), lr=0.1), device="cpu", capacity=0)
    assert "L = E_stream CE(logits, labels)\n" in off.describe() and "L = loss\n" in off.optimizer.describe()


def test_describe_names_a_part_that_declares_no_terms() -> None:
    class Own(OptimizerMixin):
        def add_penalty(self) -> None:
            super().add_penalty()

    class Mine(TrainerMixin):
        def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
            return super().loss_terms(outputs, batch)  # type: ignore[misc, no-any-return]

    class Trained(Mine, Trainer):
        pass

    optimizer = functools.partial(compose(Own, base=torch.optim.SGD), lr=0.1)
    trainer: Any = Trained(nn.Linear(2, 2), optimizer, device="cpu")
    assert "L = E_stream CE(logits, labels) + terms of Mine + terms of Own\n" in trainer.describe()
