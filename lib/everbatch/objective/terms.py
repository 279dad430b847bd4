"""The terms of the objective L: how far outputs, or weights, are from what is remembered of them.

A term has a value, a gradient and a text. What a method adds to the loss is a choice of terms: see
`table`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from everbatch.contract import parts_of
from everbatch.objective.bregman import bregman, gaussian_divergence, quadratic_form
from everbatch.problems import Problem

__all__ = ["Divergence", "OutputTerm", "PosteriorTerm", "ProblemTerm", "Rows", "WeightTerm", "dark_term", "evaluate",
           "known_dark_term", "label_term", "texts"]

Generator = Callable[[Tensor], Tensor]


# ------------------------------------------------------------------------------------------ outputs
@dataclass(frozen=True)
class Divergence:
    """The divergence D_Phi of a view h of the logits u from a target z, with the loss that it
    reduces to, row by row.

        h first:       D_Phi(h(u), z)
        target first:  D_Phi(z, h(u))      where the other order is infinite: one-hot targets

    `loss` is what trains; `definition` and `gradient` follow from the generator alone, so that the
    one can be checked against the other. They may differ by what does not depend on u.
    """

    text: str
    """The loss of one row, in words for people."""
    of: Callable[[Tensor], Tensor]
    """h: logits (..., C) to what is compared, of any shape."""
    generator: Generator
    """Phi: strictly convex and differentiable where h and z are; maps a row to a scalar."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """Logits (n, C) and targets (n, ...) to losses (n,)."""
    target: Callable[[Tensor, Tensor], Tensor]
    """z in the space of h: of logits (n, C) and targets (n, ...), as the term is given them."""
    target_first: bool = False

    def definition(self, logits: Tensor, targets: Tensor) -> Tensor:
        """D_Phi of each row: (n,), without a graph."""
        pairs = zip(self.of(logits.detach()), self.target(logits, targets), strict=True)
        if self.target_first:
            return torch.stack([bregman(self.generator, z, h) for h, z in pairs])
        return torch.stack([bregman(self.generator, h, z) for h, z in pairs])

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Gradient of each row's divergence with respect to its logits: (n, C).

            h first:       J' (grad Phi(h) - grad Phi(z))      J: Jacobian of h
            target first:  J' Hessian Phi(h) (h - z)
        """
        view = self.of(logits.detach())
        pull_back = torch.func.vjp(self.of, logits.detach())[1]
        slope = torch.func.grad(self.generator)
        rows = []
        for h, z in zip(view, self.target(logits, targets), strict=True):
            if self.target_first:
                hessian = torch.func.vjp(slope, h)[1]  # symmetric: its transpose is itself
                rows.append(hessian(h - z)[0])
            else:
                rows.append(slope(h) - slope(z))
        gradient: Tensor = pull_back(torch.stack(rows))[0]
        return gradient


def label_term(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row: CE(u_i, y_i). Shapes (n, C), (n,) -> (n,). ER's term, averaged over the replay batch."""
    return functional.cross_entropy(logits.float(), targets, reduction="none")


def dark_term(
    logits: Tensor, stored: Tensor, reduction: Literal["element_mean", "sample_sum"] = "element_mean",
) -> Tensor:
    """Squared distance of each row's logits to those stored with it: ||u_i - z_i||^2, divided by C for "element_mean".

    Where the head has grown since, the common prefix is compared. Shapes (n, C), (n, C') -> (n,); with more
    dimensions before the last, (n, L, C) -> (n, L).

    Source: Buzzega et al. 2020, arXiv 2004.07211. The authors' code averages over all n * C elements, hence the default;
    the paper's squared norm is "sample_sum", so alpha there is alpha here divided by C.
    """
    width = min(logits.shape[-1], stored.shape[-1])
    distance = (logits[..., :width].float() - stored[..., :width].float()).square()
    return distance.mean(-1) if reduction == "element_mean" else distance.sum(-1)


def known_dark_term(
    logits: Tensor, stored: Tensor, reduction: Literal["element_mean", "sample_sum"] = "element_mean",
) -> Tensor:
    """`dark_term` of rows that were stored at different times of a head that grows: of each the
    classes it had then, a prefix; the others are NaN in `stored`."""
    width = min(logits.shape[1], stored.shape[1])
    now, before = logits[:, :width].float(), stored[:, :width].float()
    known = ~before.isnan()
    distance = dark_term(now, torch.where(known, before, now.detach()), "sample_sum")
    return distance / known.sum(1).clamp_min(1) if reduction == "element_mean" else distance


class Rows(Protocol):
    """What a term sees of one part of a batch."""

    @property
    def part(self) -> str:
        """Which part it is: "stream", "replay", ..."""

    @property
    def targets(self) -> Tensor:
        """(n,) class indices."""

    @property
    def extras(self) -> Mapping[str, Tensor]:
        """Further rows by name, such as stored "logits"."""

    def mean(self, losses: Tensor, /) -> Tensor:
        """This rank's share of the mean of (n,) losses over the whole part."""


@dataclass(frozen=True)
class OutputTerm:
    """weight * mean over the rows of one part of the batch of their divergence."""

    name: str
    """What the term is recorded as."""
    weight: float
    rows: str
    """The part of the batch."""
    divergence: Divergence
    target: str = "targets"
    """The rows it is compared with: "targets", the labels, or one of the batch's extras."""

    def losses(self, logits: Tensor, batch: Rows) -> Tensor:
        """The loss of each row, without the weight: (n,)."""
        wanted = batch.targets if self.target == "targets" else batch.extras[self.target]
        return self.divergence.loss(logits, wanted)

    def value(self, logits: Tensor, batch: Rows) -> Tensor:
        """The term: 0-dim, with a graph."""
        return self.weight * batch.mean(self.losses(logits, batch))

    def gradient(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Gradient of the term over equally weighted rows with respect to their logits: (n, C)."""
        return self.divergence.gradient(logits, targets) * (self.weight / len(logits))

    @property
    def text(self) -> str:
        return f"{self.weight:g} E_{self.rows} {self.divergence.text}"


@dataclass(frozen=True)
class ProblemTerm:
    """The term of a problem other than cross-entropy of labels: its own losses against the targets, or
    the squared distance of outputs to those stored, over the same units."""

    name: str
    weight: float
    rows: str
    problem: Problem
    target: str = "targets"
    """"targets", or "logits" for stored outputs."""
    reduction: Literal["element_mean", "sample_sum"] = "element_mean"

    def losses(self, outputs: Tensor, batch: Rows) -> Tensor:
        """The loss of each row, without the weight: (n,)."""
        if self.target == "targets":
            return self.problem.losses(outputs, batch.targets)
        stored = batch.extras[self.target]
        if not self.problem.in_units:
            outputs, stored = outputs.reshape(len(outputs), -1), stored.reshape(len(stored), -1)
        return self.problem.pool(dark_term(outputs, stored, self.reduction), batch.targets)

    def value(self, outputs: Tensor, batch: Rows) -> Tensor:
        """The term: 0-dim, with a graph."""
        return self.weight * batch.mean(self.losses(outputs, batch))

    @property
    def text(self) -> str:
        mean = " / entries" if self.reduction == "element_mean" else ""
        what = self.problem.text if self.target == "targets" else f"||outputs - stored||^2{mean}"
        return f"{self.weight:g} E_{self.rows} {what}"


def evaluate(terms: Iterable[OutputTerm | ProblemTerm], logits: Tensor, batch: Rows) -> dict[str, Tensor]:
    """The values of those terms that are about this part of the batch, by name."""
    return {term.name: term.value(logits, batch) for term in terms if term.rows == batch.part}


# ------------------------------------------------------------------------------------------ weights
@dataclass(frozen=True)
class WeightTerm:
    """A pull of every weight to an anchor, by its precision P:

        weight * (sum_i P_i (theta_i - theta*_i)^2 + constant)

    There is no 1/2: it is 2 * weight * D_Psi(theta, theta*) of the generator Psi = 1/2 theta' P
    theta, and the constant. Tensors are by parameter name, of one shape each, whole or slices; a
    name without a precision is not pulled.
    """

    name: str
    """The method, for its text."""
    weight: float
    precision: Mapping[str, Tensor]
    anchor: Mapping[str, Tensor]
    symbol: str = "F"
    """What the precision is called in its text."""
    constant: float = 0.0

    def generator(self, name: str) -> Generator:
        """Psi of one parameter, flattened."""
        return quadratic_form(self.precision[name].reshape(-1))

    def distance(
        self, weights: Iterable[tuple[str, Tensor]], device: torch.device | None = None,
    ) -> Tensor:
        """sum_i P_i (theta_i - theta*_i)^2 over these weights: 0-dim float64."""
        value = torch.zeros((), dtype=torch.float64, device=device)
        for name, theta in weights:
            if name in self.precision:
                away = (theta - self.anchor[name]).square()
                value += (self.precision[name] * away).sum(dtype=torch.float64).to(value)
        return value

    def value(self, distance: Tensor) -> Tensor:
        """The term, of the `distance` summed over all weights: 0-dim float64."""
        return (distance + self.constant) * self.weight

    def gradient(self, name: str, theta: Tensor) -> Tensor:
        """2 * weight * P (theta - theta*) of one parameter."""
        return 2.0 * self.weight * self.precision[name] * (theta - self.anchor[name])

    def add_gradient_(
        self, names: Sequence[str], weights: list[Tensor], gradients: list[Tensor],
    ) -> None:
        """gradients += `gradient`, in place, with one copy of the weights for a moment."""
        if not names:
            return
        factors = [self.precision[name] for name in names]
        away = list(torch._foreach_sub(weights, [self.anchor[name] for name in names]))
        if all(_alike(g, f, a) for g, f, a in zip(gradients, factors, away, strict=True)):
            torch._foreach_addcmul_(gradients, factors, away, value=2.0 * self.weight)
            return
        # Gradients in bf16, or masters on the CPU.
        for g, f, a in zip(gradients, factors, away, strict=True):
            g.add_((f * a).to(g), alpha=2.0 * self.weight)

    @property
    def text(self) -> str:
        return f"{self.weight:g} sum {self.symbol} (theta - theta*)^2 [{self.name}]"


@dataclass(frozen=True)
class PosteriorTerm:
    """The divergence of a factorised Gaussian over the weights from an older one:

        strength / samples * KL( prod N(theta_i, s_i^2) || prod N(m_i, s0_i^2) )

    which is D_Psi(q, q_old) of the negative entropy  Psi(q) = integral q ln q. Tensors are by
    parameter name, of one shape each, whole or slices, or 0-dim for all of a parameter.
    """

    name: str
    """The method, for its text."""
    strength: float
    samples: int
    """Training samples of the task; 0: not known yet."""
    mean: Mapping[str, Tensor]
    spread: Mapping[str, Tensor]
    """m and ln s0 of the older one."""
    own_spread: Mapping[str, Tensor]
    """ln s."""

    @property
    def weight(self) -> float:
        return self.strength / max(self.samples, 1)

    def distance(
        self, weights: Iterable[tuple[str, Tensor]], device: torch.device | None = None,
    ) -> Tensor:
        """The divergence over these weights, the means of the present one: 0-dim float64."""
        value = torch.zeros((), dtype=torch.float64, device=device)
        for name, theta in weights:
            own = self.own_spread[name].double().exp().expand(theta.shape)
            old = self.spread[name].double().exp().expand(theta.shape)
            value += gaussian_divergence(theta.double(), own, self.mean[name].double(), old).to(value)
        return value

    def value(self, distance: Tensor) -> Tensor:
        """The term, of the `distance` summed over all weights: 0-dim float64."""
        return distance * self.weight

    def gradient(self, name: str, theta: Tensor) -> Tensor:
        """weight * (theta - m) / s0^2 of one parameter."""
        return (theta - self.mean[name]) * torch.exp(-2.0 * self.spread[name]) * self.weight

    def spread_gradient(self, name: str) -> Tensor:
        """weight * (s^2 / s0^2 - 1): with respect to ln s, of one parameter."""
        return torch.expm1(2.0 * (self.own_spread[name] - self.spread[name])) * self.weight

    @property
    def text(self) -> str:
        return f"{self.strength:g} / samples KL(q(theta), q_old) [{self.name}]"


def _alike(g: Tensor, f: Tensor, a: Tensor) -> bool:
    return g.dtype == f.dtype == a.dtype and g.device == a.device


# ----------------------------------------------------------------------------------------- in words
def texts(owner: Any) -> list[str]:
    """The terms that the parts of a composed optimizer or trainer add to the loss, as they declare
    them in `terms`.

    Of a part that adds to the loss and declares nothing, only the name is known.
    """
    result: list[str] = []
    for part in parts_of(type(owner)):
        declared = vars(part).get("terms")
        if declared is not None:
            result += [term.text for term in declared(owner) if term.weight]
        elif {"loss_terms", "add_penalty"} & vars(part).keys():
            result.append(f"terms of {part.__name__}")
    return result
