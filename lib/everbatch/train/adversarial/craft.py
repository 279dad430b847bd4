"""Crafting adversarial inputs inside an l-infinity box: the kernel of ConAdv, tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from everbatch.errors import check
from everbatch.rows import Rows

__all__ = ["Box", "apply_signs", "craft", "craft_embedding", "embedded", "pixel_box", "random_point", "wrong_targets"]

Losses: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"


@dataclass(frozen=True)
class Box:
    """Where an adversarial input may lie: |x' - x| <= radius and low <= x' <= high, in the space of model inputs.

    Each bound is a 0-dim tensor, or one that broadcasts over (n, C, ...): one value per channel.
    """

    radius: Tensor
    step: Tensor
    """Length of one ascent step."""
    low: Tensor
    high: Tensor

    def clip(self, moved: Tensor, clean: Tensor) -> Tensor:
        """`moved`, brought back into the box around `clean`: same shape and dtype."""
        radius, low, high = (v.to(clean) for v in (self.radius, self.low, self.high))
        return torch.minimum(torch.maximum(moved, torch.maximum(clean - radius, low)), torch.minimum(clean + radius, high))


def pixel_box(
    radius: float, step: float | None = None, *, steps: int = 1, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,),
    low: float = 0.0, high: float = 1.0, channels_last: bool = False,
) -> Box:
    """The box of a radius in pixels for inputs normalised as  x = (raw - mean_c) / std_c,  raw in [low, high].

        radius_c = radius / (255 std_c)     low_c = (low - mean_c) / std_c     high_c = (high - mean_c) / std_c

    Args:
        radius: in 1/255 of the raw range's unit; >= 0.
        step: of one iteration, in the same unit; by default radius / steps.
        mean, std: one value, or one per channel.
        channels_last: inputs are (n, ..., C) rather than (n, C, H, W).

    The released code takes radii and a clip range for inputs in [-1, 1] and applies them to inputs that ImageNet's mean and std
    have carried to about [-2.1, 2.6], which moves every pixel beyond 1 to 1, whatever the radius. Not so here.
    """
    check(len(mean) == len(std) or 1 in (len(mean), len(std)), "pixel_box", f"{len(mean)} means and {len(std)} deviations",
          "be as many, or one")
    length = radius / steps if step is None else step
    one = [1] * (0 if channels_last else 2)  # C before H and W

    def per_channel(value: Callable[[float, float], float]) -> Tensor:
        flat = torch.tensor([value(m, s) for m, s in zip(means, stds, strict=True)], dtype=torch.float64)
        return flat[0] if width == 1 else flat.view(-1, *one)

    width = max(len(mean), len(std))
    means, stds = (list(v) * (width if len(v) == 1 else 1) for v in (mean, std))
    return Box(per_channel(lambda m, s: radius / 255.0 / s), per_channel(lambda m, s: length / 255.0 / s),
               per_channel(lambda m, s: (low - m) / s), per_channel(lambda m, s: (high - m) / s))


def wrong_targets(targets: Tensor, classes: int) -> Tensor:
    """A class drawn uniformly among the others, for each row: (n,) -> (n,). Draws from torch's global generator."""
    return (targets + torch.randint(1, classes, targets.shape, device=targets.device)) % classes


def random_point(clean: Tensor, box: Box) -> Tensor:
    """clip(x + U(-radius, radius)), drawn from torch's global generator."""
    return box.clip(clean + (2 * torch.rand_like(clean) - 1) * box.radius.to(clean), clean)


def apply_signs(clean: Tensor, signs: Tensor, box: Box) -> Tensor:
    """clip(x + step * s): the crafted input from the signs of one step, an eighth to a quarter of its size. s: int8."""
    return box.clip(clean + box.step.to(clean) * signs.to(clean.dtype), clean)


def craft(
    logits_of: Callable[[Tensor], Tensor], clean: Tensor, targets: Tensor, box: Box, *, steps: int = 1, targeted: bool = False,
    start: Tensor | None = None, signs_only: bool = False, losses: Losses | None = None,
) -> Tensor:
    """Adversarial inputs by signed gradient steps on the cross-entropy, or on other losses.

        x_0 = start or x;   x_{j+1} = clip(x_j +- step * sign(grad_x sum_i CE(f(x_j)_i, y_i)))      + untargeted, - targeted

    sign(0) = 0. Rows are independent unless the network couples them (batch norm).

    Args:
        logits_of: (n, ...) -> (n, classes), of the bare module.
        clean: x, floating point.
        targets: (n,) true classes; for `targeted`, the classes to be taken for.
        signs_only: return the signed direction of the only step as int8, for `apply_signs`; needs steps 1 and no start.
        losses: of each row, (outputs, targets) -> (n,); None: cross-entropy.

    Returns:
        x_steps in the dtype of `clean`, or int8 signs; detached.

    Raises:
        RuntimeError: logits that do not depend on the inputs, or inputs that take no gradient: there is no attack then, and
            zero noise would pass for one.

    Cost: per step one forward and the activation half of a backward (2/3 of a training pass); no parameter gradient is
    computed or touched, no collective.
    Source: the one-step form of ConAdv (arXiv 2106.00221) and AdvProp (arXiv 1911.09665); Goodfellow et al., arXiv 1412.6572.
    """
    check(clean.is_floating_point(), "craft", f"inputs of dtype {clean.dtype}", "be floating point",
          "name the module that embeds them (embedding=)")
    at, direction = clean if start is None else start, clean
    for _ in range(steps):
        at = at.detach().requires_grad_()
        with torch.enable_grad():
            logits = logits_of(at)
        direction = _direction(logits, at, targets, targeted, losses)
        at = box.clip(at.detach() + box.step.to(clean) * direction, clean)
    return direction.to(torch.int8) if signs_only else at


def craft_embedding(
    logits_of: Callable[..., Tensor], inputs: Rows, targets: Tensor, embedding: nn.Module, radius: float, step: float, *,
    steps: int = 1, targeted: bool = False, random_start: bool = False, signs_only: bool = False, losses: Losses | None = None,
) -> Tensor:
    """A perturbation of what `embedding` gives, for inputs that have no gradient (token ids): (n, ..., d), or its int8 signs.

        d_0 = 0 or U(-radius, radius);   d_{j+1} = clip(d_j +- step * sign(grad_e sum_i CE(f(e + d_j)_i, y_i)), -radius, radius)

    Args, raises, cost: as `craft`; radius and step in units of the embedding. Add the result with `embedded`.
    """
    delta: Tensor | None = None
    direction = targets
    leaf: list[Tensor] = []

    def perturb(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
        nonlocal delta
        if delta is None:
            delta = (2 * torch.rand_like(out) - 1) * radius if random_start else torch.zeros_like(out)
        leaf.append((out.detach() + delta).requires_grad_())
        return leaf[-1]

    handle = embedding.register_forward_hook(perturb)
    try:
        for _ in range(steps):
            leaf.clear()
            with torch.enable_grad():
                logits = logits_of(inputs)
            if len(leaf) != 1:
                raise RuntimeError(f"craft: the embedding ran {len(leaf)} times in one forward, must run once")
            assert delta is not None
            direction = _direction(logits, leaf[0], targets, targeted, losses)
            delta = (delta.detach() + step * direction).clamp(-radius, radius)
    finally:
        handle.remove()
    assert delta is not None
    return direction.to(torch.int8) if signs_only else delta


def _direction(logits: Tensor, leaf: Tensor, targets: Tensor, targeted: bool, losses: Losses | None) -> Tensor:
    """The sign of the input gradient, away from the true class or towards the target, in the leaf's dtype."""
    with torch.enable_grad():
        outputs = logits.float() if logits.dtype.itemsize < 4 else logits
        loss = functional.cross_entropy(outputs, targets, reduction="sum") if losses is None else losses(outputs, targets).sum()
    slope = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
    if slope is None:
        raise RuntimeError("craft: the loss does not depend on the inputs, so there is no direction to attack; does the model "
                           "detach them?")
    return slope.sign().neg_() if targeted else slope.sign_()


@contextmanager
def embedded(module: nn.Module, delta: Tensor | None) -> Iterator[None]:
    """Add `delta` to what `module` (an embedding) gives, for every forward inside the block; None: nothing.

    The gradient reaches the embedding's own weights; `delta` is constant.
    """
    if delta is None:
        yield
        return
    handle = module.register_forward_hook(lambda _m, _x, out: out + delta.to(out.dtype))
    try:
        yield
    finally:
        handle.remove()
