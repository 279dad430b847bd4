"""Learning rates by batch, and the polynomial schedule."""

from __future__ import annotations

import doctest
import math
from typing import Any

import pytest
import torch

from everbatch.optim import conadv_peak, lr_at, scaled_lr
from everbatch.optim.layerwise import rules
from everbatch.optim.layerwise.rules import IMAGENET, Peak


def test_examples() -> None:
    assert doctest.testmod(rules).failed == 0


@pytest.mark.parametrize(("batch", "peak"), [
    (1, (10.0, 5)), (16_383, (10.0, 5)), (16_384, (25.0, 5)), (32_767, (25.0, 5)), (32_768, (31.2, 25)), (65_535, (31.2, 25)),
    (65_536, (43.0, 41)), (98_304, (43.0, 41)),
])
def test_the_table_of_conadv(batch: int, peak: tuple[float, float]) -> None:
    assert conadv_peak(batch) == Peak(lr=peak[0], warmup_epochs=peak[1])


def test_scaling() -> None:
    for factor in (1, 2, 7, 128):
        assert scaled_lr(0.1, batch=256 * factor, reference_batch=256) == pytest.approx(0.1 * factor, rel=1e-15)
        root = scaled_lr(0.1, batch=256 * factor, reference_batch=256, rule="sqrt")
        assert root == pytest.approx(0.1 * math.sqrt(factor), rel=1e-15)
    assert scaled_lr(0.4, batch=64, reference_batch=256, rule="sqrt") == 0.2


@pytest.mark.parametrize(("batch", "steps"), [(16_384, 7116), (32_768, 3558), (98_304, 1301)])
def test_the_schedule_of_the_reference_runs(batch: int, steps: int) -> None:
    """Straight from the formula, for the batches whose step counts are known."""
    row = conadv_peak(batch)
    rates = [lr_at(s, peak=row.lr, batch=batch, samples=IMAGENET, warmup_epochs=row.warmup_epochs, train_steps=steps, power=1.6)
             for s in range(steps + 2)]
    warm = math.floor(row.warmup_epochs * IMAGENET / batch)
    assert rates[0] == 0.0
    for s in (1, warm // 2, warm):
        assert rates[s] == pytest.approx(row.lr * (s * batch / IMAGENET) / row.warmup_epochs, rel=1e-14)
    for s in (warm + 1, (warm + steps) // 2, steps - 1):
        left = 1 - (s - warm) / (steps - warm + 1)
        assert rates[s] == pytest.approx((row.lr - 1e-4) * left**1.6 + 1e-4, rel=1e-13)
    assert all(a < b for a, b in zip(rates[:warm], rates[1 : warm + 1], strict=True))
    assert all(a > b for a, b in zip(rates[warm + 1 : -1], rates[warm + 2 :], strict=True))
    assert rates[-1] == 1e-4
    assert 0.99 * row.lr < max(rates) <= row.lr


SMALL: dict[str, Any] = {"peak": 8.0, "batch": 100, "samples": 1000, "warmup_epochs": 2, "train_steps": 50}


def test_the_peak_is_at_the_end_of_the_warm_up_and_the_end_after_the_last_step() -> None:
    rates = [lr_at(s, **SMALL) for s in range(60)]
    assert rates[0] == 0.0 and rates[20] == 8.0 == max(rates)
    assert rates[51:] == [1e-4] * 9
    assert rates[49] == pytest.approx((8.0 - 1e-4) * (2 / 31) ** 2 + 1e-4, rel=1e-14)
    assert lr_at(51, **SMALL, end=0.5) == 0.5 and lr_at(20, **SMALL, power=1.0) == 8.0


def test_without_a_warm_up_it_begins_at_the_peak() -> None:
    rates = [lr_at(s, **{**SMALL, "warmup_epochs": 0}) for s in range(52)]
    assert rates[0] == 8.0 and all(a > b for a, b in zip(rates, rates[1:], strict=False)) and rates[51] == 1e-4


def test_a_warm_up_counts_samples_not_steps() -> None:
    """Twice the batch is at the same rate after half the steps."""
    for s in range(0, 20, 2):
        assert lr_at(s, **SMALL) == lr_at(s // 2, **{**SMALL, "batch": 200, "train_steps": 25})


def test_as_a_torch_scheduler() -> None:
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: lr_at(s, **SMALL))
    for s in range(50):
        assert opt.param_groups[0]["lr"] == lr_at(s, **SMALL)
        opt.step()
        scheduler.step()


@pytest.mark.parametrize(("change", "text"), [
    ({"step": -1}, "step=-1"), ({"step": 0.5}, "step=0.5"), ({"batch": 0}, "batch=0, must be an integer >= 1"),
    ({"batch": -4}, "batch=-4"), ({"batch": 2.0}, "batch=2.0"), ({"samples": 0}, "samples=0"),
    ({"train_steps": 0}, "train_steps=0"), ({"peak": -1.0}, "peak=-1.0"), ({"peak": math.nan}, "peak=nan"),
    ({"peak": 0.1, "end": 0.2}, "peak=0.1.*decays from peak to end"),
    ({"end": -0.1}, "end=-0.1"), ({"power": 0.0}, "power=0.0"), ({"warmup_epochs": -1}, "warmup_epochs=-1"),
    ({"warmup_epochs": 5}, "warmup_epochs=5 is 50 steps, must be shorter than the training of train_steps=50"),
], ids=str)
def test_bad_values_are_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"lr_at: {text}"):
        lr_at(**{"step": 1, **SMALL, **change})


def test_bad_values_of_the_rules_are_named() -> None:
    for batch in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="batch="):
            scaled_lr(0.1, batch=batch, reference_batch=256)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="reference_batch="):
            scaled_lr(0.1, batch=256, reference_batch=batch)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="batch="):
            conadv_peak(batch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lr=-0.1"):
        scaled_lr(-0.1, batch=1, reference_batch=1)
    with pytest.raises(ValueError, match="rule='cubic', must be 'linear' or 'sqrt'"):
        scaled_lr(0.1, batch=1, reference_batch=1, rule="cubic")  # type: ignore[arg-type]
