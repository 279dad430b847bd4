"""Learning rates for large batches: how they grow with the batch, and the polynomial schedule measured in epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from everbatch.errors import check, check_real

__all__ = ["IMAGENET", "Peak", "conadv_peak", "lr_at", "scaled_lr"]

IMAGENET = 1_281_167
"""Training images of ImageNet-1k."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Highest learning rate of a schedule, and how long it takes to get there."""

    lr: float
    """For LARS with the rate inside the momentum buffer (`lr_in_buffer=True`)."""
    warmup_epochs: float
    """Linear warm-up, in epochs."""


CONADV = ((16_384, Peak(lr=10.0, warmup_epochs=5.0)), (32_768, Peak(lr=25.0, warmup_epochs=5.0)),
          (65_536, Peak(lr=31.2, warmup_epochs=25.0)), (math.inf, Peak(lr=43.0, warmup_epochs=41.0)))
"""(batch below which the row holds, row). From the code, not the paper."""


def conadv_peak(batch: int) -> Peak:
    """ConAdv's peak rate and warm-up for ResNet-50 on ImageNet, by global batch.

        batch < 16384: 10, 5 epochs;  < 32768: 25, 5;  < 65536: 31.2, 25;  from 65536: 43, 41

    They belong to LARS with momentum 0.92, weight decay 5e-5, trust_coeff 0.001, trust_eps 0, lr_in_buffer=True, and to
    `lr_at` with power 1.6 and end 1e-4 over 7116 steps (batch 16384), 3558 (32768) or 1301 (98304).

    Raises:
        ValueError: a batch that is no positive integer.

    Source: conadv/ConAdv at 9e02df30; the paper is Liu et al. 2022, arXiv 2106.00221.

    >>> conadv_peak(32_768)
    Peak(lr=31.2, warmup_epochs=25.0)
    """
    _check_count("conadv_peak", "batch", batch)
    return next(row for bound, row in CONADV if batch < bound)


def scaled_lr(lr: float, *, batch: int, reference_batch: int, rule: Literal["linear", "sqrt"] = "linear") -> float:
    """The learning rate for another batch size.

        linear:  lr * batch / reference_batch          SGD, LARS without its own table
        sqrt:    lr * sqrt(batch / reference_batch)    Adam, LAMB

    Args:
        lr: rate that was tuned at `reference_batch`, >= 0.
        batch: global batch to train with, in samples.

    Raises:
        ValueError: a negative rate, a batch that is no positive integer, an unknown rule.

    Source: Goyal et al. 2017, arXiv 1706.02677 (linear); You et al. 2020, arXiv 1904.00962 (square root).

    >>> scaled_lr(0.1, batch=8192, reference_batch=256), scaled_lr(0.001, batch=1024, reference_batch=256, rule="sqrt")
    (3.2, 0.002)
    """
    check_real("scaled_lr", "lr", lr, 0.0)
    _check_count("scaled_lr", "batch", batch)
    _check_count("scaled_lr", "reference_batch", reference_batch)
    check(rule in ("linear", "sqrt"), "scaled_lr", f"rule={rule!r}", "be 'linear' or 'sqrt'")
    ratio = batch / reference_batch
    return lr * (ratio if rule == "linear" else math.sqrt(ratio))


def lr_at(
    step: int, *, peak: float, batch: int, samples: int, warmup_epochs: float, train_steps: int, power: float = 2.0,
    end: float = 1e-4,
) -> float:
    """Learning rate of one update: linear warm-up measured in epochs, then polynomial decay.

        epoch = step * batch / samples;  w = floor(warmup_epochs * samples / batch);  D = train_steps - w + 1
        epoch <= warmup_epochs:  lr = peak * epoch / warmup_epochs
        after it:                lr = (peak - end) * (1 - min(d, D) / D)^power + end,   d = max(1, step - w)

    Step 0 is the first update, and lr(0) = 0 under a warm-up, as in the TPU recipe: that update leaves the weights.
    With the rate outside the momentum buffer it still fills the buffer; with `lr_in_buffer` it adds nothing. The peak
    is reached at the end of the warm-up, exactly if a step falls there, and `end` from step train_steps + 1 on: the
    last update, train_steps - 1, has (peak - end) * (2 / D)^power + end. Without a warm-up lr(0) = peak.

    As a torch scheduler, at base rate 1:  `LambdaLR(opt, lambda step: lr_at(step, peak=...))`.

    Args:
        step: index of the update, >= 0.
        peak: highest rate, >= end.
        batch: global batch, in samples.
        samples: size of the training set.
        warmup_epochs: >= 0, shorter than the training.
        train_steps: number of updates.
        power: exponent of the decay, > 0. 2 for LARS recipes, 1.6 for ConAdv, 1 for LAMB.
        end: final rate, >= 0.

    Raises:
        ValueError: values outside those ranges.

    Source: conadv/ConAdv at 9e02df30, whose rate this is at power 1.6 and end 1e-4.

    >>> [lr_at(s, peak=8.0, batch=100, samples=1000, warmup_epochs=1, train_steps=20) for s in (0, 5, 10, 21)]
    [0.0, 4.0, 8.0, 0.0001]
    """
    who = "lr_at"
    check(isinstance(step, int) and step >= 0, who, f"step={step!r}", "be an integer >= 0")
    for name, count in (("batch", batch), ("samples", samples), ("train_steps", train_steps)):
        _check_count(who, name, count)
    check_real(who, "end", end, 0.0)
    check_real(who, "peak", peak, end, cure="the schedule decays from peak to end")
    check_real(who, "warmup_epochs", warmup_epochs, 0.0)
    check_real(who, "power", power, 0.0, open_low=True)
    warm = math.floor(warmup_epochs * samples / batch)
    check(warm < train_steps, who, f"warmup_epochs={warmup_epochs!r} is {warm} steps",
          f"be shorter than the training of train_steps={train_steps}")
    epoch = step * batch / samples
    if warmup_epochs and epoch <= warmup_epochs:
        return peak * epoch / warmup_epochs
    if not warmup_epochs and step == 0:
        return float(peak)
    rest = train_steps - warm + 1
    gone = min(max(1, step - warm), rest) / rest
    return float((peak - end) * (1.0 - gone) ** power + end)


def _check_count(who: str, name: str, value: int) -> None:
    check(isinstance(value, int) and not isinstance(value, bool) and value >= 1, who, f"{name}={value!r}",
          "be an integer >= 1")
