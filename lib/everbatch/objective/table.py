"""Every method as its terms of the unified objective

    L(theta) = CE(B; theta) + output terms + weight terms

Methods differ in which rows are compared with which target, and in which precision and anchor pull
the weights:

    method       rows        outputs, target            precision P of the weights       anchor
    er           memory      cross-entropy, labels      -
    dark_er      memory      squared distance, logits   -
    dark_er_pp   two draws   both                       -
    cls_er       memory      squared distance, average  -
    lwf          stream      cross-entropy, old softmax -
    cpr          stream      KL divergence, uniform     -
    ewc          -           -                          Fisher F of the tasks, summed    merged
    online_ewc   -           -                          F, decayed sum or mean           last task
    si           -           -                          Omega of the path                last task
    mas          -           -                          Omega of the outputs             last task
    ncl          -           -                          Lambda: prior and F, summed      last task
    vcl          -           -                          KL of Gaussians over weights     last task's

A further method is one entry: its divergence, if none here is its own, and its terms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from everbatch.objective.bregman import (
    distillation,
    mean_square,
    negative_entropy,
    squared_norm,
    uniform_divergence,
)
from everbatch.objective.terms import (
    Divergence,
    OutputTerm,
    PosteriorTerm,
    WeightTerm,
    dark_term,
    known_dark_term,
    label_term,
)

__all__ = ["CONFIDENCE", "CROSS_ENTROPY", "MEAN_SQUARE", "SQUARED_DISTANCE", "TABLE", "cls_er", "cpr", "dark_er",
           "dark_er_pp", "er", "ewc", "lwf", "mas", "ncl", "online_ewc", "si",
           "vcl"]

ByName = Mapping[str, Tensor]
Reduction = Literal["element_mean", "sample_sum"]
Ranges = tuple[tuple[int, int], ...]
"""Of classes: first, and the one after the last."""


# -------------------------------------------------------------------------------------- divergences
def _logits(u: Tensor) -> Tensor:
    return u


def _stored(u: Tensor, z: Tensor) -> Tensor:
    return z


def _probabilities(u: Tensor) -> Tensor:
    return u.softmax(-1)


def _one_hot(u: Tensor, y: Tensor) -> Tensor:
    return functional.one_hot(y, u.shape[-1]).to(u)


def _squared(u: Tensor, z: Tensor) -> Tensor:
    return dark_term(u, z, "sample_sum")


CROSS_ENTROPY = Divergence(
    "CE(logits, labels)", _probabilities, negative_entropy, label_term, _one_hot, target_first=True)
"""KL(one-hot y || softmax u), which is the cross-entropy."""
MEAN_SQUARE = Divergence(
    "||logits - stored||^2 / classes", _logits, mean_square, dark_term, _stored)
AVERAGED = replace(MEAN_SQUARE, text="||logits - averages'||^2 / classes")
SQUARED_DISTANCE = Divergence("||logits - stored||^2", _logits, squared_norm, _squared, _stored)


def _known(u: Tensor, z: Tensor) -> Tensor:
    return torch.where(z.isnan(), u.detach(), z)


def _known_squared(u: Tensor, z: Tensor) -> Tensor:
    return known_dark_term(u, z, "sample_sum")


KNOWN_MEAN = replace(MEAN_SQUARE, loss=known_dark_term, target=_known)
KNOWN_DISTANCE = replace(SQUARED_DISTANCE, loss=_known_squared, target=_known)
"""The two over rows of which some were stored with fewer classes: NaN stands for the others."""


def _sureness(u: Tensor, y: Tensor) -> Tensor:
    return uniform_divergence(u.float())


def _uniform(u: Tensor, y: Tensor) -> Tensor:
    return torch.full_like(u, 1.0 / u.shape[-1])


CONFIDENCE = Divergence(
    "KL(softmax(logits), uniform)", _probabilities, negative_entropy, _sureness, _uniform)
"""ln C - H(p): what an entropy bonus is, but for the constant."""


@functools.cache
def _distilling(temperature: float, ranges: Ranges) -> Divergence:
    """KL(softmax(z / T) || softmax(u / T)) over each range of classes, summed, and the entropy of
    the targets, which no logit moves."""
    def tempered(u: Tensor) -> Tensor:
        scaled = u / temperature
        parts = [scaled[..., first:last].softmax(-1) for first, last in ranges]
        return torch.cat(parts, -1) if parts else scaled.softmax(-1)

    def loss(u: Tensor, z: Tensor) -> Tensor:
        u, z = u.float(), z.float()
        parts = [distillation(u[:, a:b], z[:, a:b], temperature) for a, b in ranges]
        return torch.stack(parts).sum(0) if parts else distillation(u, z, temperature)

    def old(u: Tensor, z: Tensor) -> Tensor:
        return tempered(z)

    text = f"CE(softmax(logits / {temperature:g}), old softmax)"
    return Divergence(text, tempered, negative_entropy, loss, old, target_first=True)


# ----------------------------------------------------------------------------------- output methods
@functools.cache
def er(beta: float) -> tuple[OutputTerm, ...]:
    """Experience replay: labels of remembered samples."""
    return (OutputTerm("replay_label", beta, "replay", CROSS_ENTROPY),)


@functools.cache
def dark_er(
    alpha: float, reduction: Reduction = "element_mean", grown: bool = False,
) -> tuple[OutputTerm, ...]:
    """Dark experience replay: logits that were stored with remembered samples; `grown`: of a head
    that has grown since."""
    mean, distance = (KNOWN_MEAN, KNOWN_DISTANCE) if grown else (MEAN_SQUARE, SQUARED_DISTANCE)
    divergence = mean if reduction == "element_mean" else distance
    return (OutputTerm("replay_dark", alpha, "dark", divergence, target="logits"),)


@functools.cache
def dark_er_pp(
    alpha: float, beta: float, reduction: Reduction = "element_mean", grown: bool = False,
) -> tuple[OutputTerm, ...]:
    """Both, of independent draws."""
    return dark_er(alpha, reduction, grown) + er(beta)


@functools.cache
def lwf(alpha: float, temperature: float, ranges: Ranges = ()) -> tuple[OutputTerm, ...]:
    """Learning without forgetting: the model before the task, on the task's own samples; a softmax
    over each range of classes, over all of them where none is given."""
    return (OutputTerm("lwf", alpha, "stream", _distilling(temperature, ranges), target="old"),)


@functools.cache
def cpr(beta: float) -> tuple[OutputTerm, ...]:
    """Classifier-projection regularisation: outputs that are not sure of themselves."""
    return (OutputTerm("cpr", beta, "stream", CONFIDENCE),)


@functools.cache
def cls_er(weight: float, rows: str = "replay") -> tuple[OutputTerm, ...]:
    """Complementary learning systems, beside `er`: logits of slow copies of the model."""
    return (OutputTerm("cls_er", weight, rows, AVERAGED, target="semantic"),)


# ----------------------------------------------------------------------------------- weight methods
def ewc(
    strength: float, precision: ByName, anchor: ByName, constant: float,
) -> tuple[WeightTerm, ...]:
    """One quadratic for each task, which add up to one around their merged weights, and a
    constant."""
    return (WeightTerm("EWC", strength, precision, anchor, constant=constant),)


def online_ewc(strength: float, precision: ByName, anchor: ByName) -> tuple[WeightTerm, ...]:
    """One quadratic around the last task's weights."""
    return (WeightTerm("EWC", strength, precision, anchor),)


def si(strength: float, precision: ByName, anchor: ByName) -> tuple[WeightTerm, ...]:
    """As online EWC, with the importance of the path."""
    return (WeightTerm("SI", strength, precision, anchor, symbol="Omega"),)


def mas(strength: float, precision: ByName, anchor: ByName) -> tuple[WeightTerm, ...]:
    """As online EWC, with the sensitivity of the outputs."""
    return (WeightTerm("MAS", strength, precision, anchor, symbol="Omega"),)


def ncl(strength: float, precision: ByName, anchor: ByName) -> tuple[WeightTerm, ...]:
    """As online EWC, with the precision of a prior beside it; the descent is in its metric."""
    return (WeightTerm("NCL", strength, precision, anchor, symbol="Lambda"),)


def vcl(
    strength: float, samples: int, mean: ByName, spread: ByName, own_spread: ByName,
) -> tuple[PosteriorTerm, ...]:
    """The last task's posterior over the weights is the prior: its means, logarithms of its
    deviations, and those of the present one."""
    return (PosteriorTerm("VCL", strength, samples, mean, spread, own_spread),)


TABLE: dict[str, Callable[..., tuple[Any, ...]]] = {
    "er": er, "dark_er": dark_er, "dark_er_pp": dark_er_pp, "cls_er": cls_er, "lwf": lwf,
    "cpr": cpr,
    "ewc": ewc, "online_ewc": online_ewc, "si": si, "mas": mas, "ncl": ncl, "vcl": vcl,
}
"""Method by name: a function of its weights, and of what it remembers, to its terms."""
