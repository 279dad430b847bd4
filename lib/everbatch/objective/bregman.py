"""The unified objective of continual learning as pure functions: Bregman divergences and the losses they reduce to.

    L(theta) = CE(B; theta) + alpha * E[D_Phi(h_theta(x), z)] + beta * D_Psi(theta, theta_old)

Every member below is written as the explicit loss; `bregman` evaluates the divergence itself, so that the reductions can be
checked. Shapes: n rows, C classes, d parameters.

Source: Wang et al. 2024, "A Unified and General Framework for Continual Learning", arXiv 2403.13249. The paper's typography has
slips (the sign of the entropy, the order of the arguments), so the losses are the ones stated here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["bregman", "distillation", "entropy", "gaussian_divergence", "kl_divergence",
           "mean_square", "natural_step", "negative_entropy", "quadratic_form", "quadratic_penalty", "squared_norm",
           "uniform_divergence"]


def bregman(generator: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Bregman divergence of a convex generator:  D_G(a, b) = G(a) - G(b) - <grad G(b), a - b>.

    Args:
        generator: strictly convex and differentiable at `b`; maps a tensor to a scalar.
        a: where the gradient flows to: d D / d a = grad G(a) - grad G(b).
        b: the reference point, of the same shape; no gradient flows to it.

    Returns:
        0-dim, >= 0, and 0 for a = b. Not symmetric; an affine part of G changes nothing.
    """
    slope, value = torch.func.grad_and_value(generator)(b.detach())
    divergence: Tensor = generator(a) - value - ((a - b.detach()) * slope).sum()
    return divergence


def negative_entropy(p: Tensor) -> Tensor:
    """sum p ln p over all elements, 0 ln 0 = 0: generates the Kullback-Leibler divergence on probability vectors."""
    return torch.xlogy(p, p).sum()


def squared_norm(u: Tensor) -> Tensor:
    """||u||^2: generates the squared distance."""
    return u.square().sum()


def mean_square(u: Tensor) -> Tensor:
    """||u||^2 / C, C the size of the last dimension: generates the squared distance as a mean over classes."""
    return u.square().sum() / u.shape[-1]


def quadratic_form(precision: Tensor) -> Callable[[Tensor], Tensor]:
    """The generator  Psi(theta) = 1/2 theta' F theta  of EWC, SI, MAS and NCL; F (d,) for a diagonal, or (d, d)."""
    def generator(theta: Tensor) -> Tensor:
        slope = precision * theta if precision.dim() == 1 else precision @ theta
        value: Tensor = 0.5 * (theta * slope).sum()
        return value

    return generator


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = sum_c p_c ln(p_c / q_c) of each row: (..., C), (..., C) -> (...). The member loss takes the target first:
    with a one-hot target the other order is infinite. With a one-hot p it is the cross-entropy -ln q_y."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """H(softmax(u)) of each row, in nats: (..., C) -> (...).

    CPR subtracts beta * its mean over the current batch from the loss.
    Source: Cha et al. 2021, arXiv 2006.07326.
    """
    logs = functional.log_softmax(logits, -1)
    return -(logs.exp() * logs).sum(-1)


def uniform_divergence(logits: Tensor) -> Tensor:
    """KL(softmax(u) || uniform) = ln C - H of each row: (..., C) -> (...). CPR's divergence, an entropy bonus but for ln C."""
    return math.log(logits.shape[-1]) - entropy(logits)


def distillation(logits: Tensor, old_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """LwF's term of each row:  -sum_c q_old,c ln q_new,c  with  q = softmax(u / T): (n, C'), (n, C') -> (n,).

    Args:
        logits: of the model being trained, the old classes only.
        old_logits: of the model before the task, for the same inputs; no gradient flows to them.
        temperature: T > 0.

    It exceeds the divergence KL(q_old || q_new) by H(q_old), a constant.
    Source: Li and Hoiem 2017, arXiv 1606.09282. The reference code has no factor T^2, and neither has this.
    """
    target = functional.softmax(old_logits.detach() / temperature, -1)
    return -(target * functional.log_softmax(logits / temperature, -1)).sum(-1)


def quadratic_penalty(theta: Tensor, anchor: Tensor, importance: Tensor) -> Tensor:
    """sum_i F_i (theta_i - theta*_i)^2: 0-dim. No 1/2, so twice the Bregman divergence of `quadratic_form(F)`."""
    return (importance * (theta - anchor).square()).sum()


def gaussian_divergence(mean: Tensor, deviation: Tensor, old_mean: Tensor, old_deviation: Tensor) -> Tensor:
    """KL(q || q_old) of diagonal Gaussians, summed:  sum ln(s0/s) + (s^2 + (m - m0)^2) / (2 s0^2) - 1/2: 0-dim. VCL's term.

    Source: Nguyen et al. 2018, arXiv 1710.10628.
    """
    spread = (deviation.square() + (mean - old_mean).square()) / (2.0 * old_deviation.square())
    return (torch.log(old_deviation / deviation) + spread - 0.5).sum()


def natural_step(theta: Tensor, gradient: Tensor, mode: Tensor, precision: Tensor, lr: float | Tensor) -> Tensor:
    """NCL's update:  theta - lr * (Lambda^-1 g + theta - mu): (d,). Its fixed point is that of EWC with F = Lambda, lambda = 1.

    Args:
        theta: (d,) parameters.
        gradient: (d,) of the current task's loss alone.
        mode: (d,) mu, the parameters after the previous task.
        precision: (d, d) symmetric positive definite, or (d,) its diagonal.

    Source: Kao et al. 2021, arXiv 2106.08085.
    """
    natural = gradient / precision if precision.dim() == 1 else torch.linalg.solve(precision, gradient)
    return theta - lr * (natural + theta - mode)
