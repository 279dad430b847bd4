"""Metrics between task ends: the definition by brute force, closed forms, the paper's example of a wrong rise."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from everbatch import metrics
from everbatch.metrics import Stability, largest_drop, largest_rise


def curves(tasks: int = 4, steps: int = 30, seed: int = 0) -> list[tuple[int, int, list[float]]]:
    """(step, task, values) of a run that wanders."""
    draw = np.random.default_rng(seed)
    return [(step + 1, step // steps, draw.random(step // steps + 1).tolist()) for step in range(tasks * steps)]


def met(points: list[tuple[int, int, list[float]]], **options: Any) -> Stability:
    found = Stability(**options)
    for point in points:
        found.add(*point)
    return found


def brute(places: list[int], values: list[float], width: int, sign: int) -> float:
    pairs = [sign * (values[j] - values[i]) for j in range(len(values)) for i in range(j) if places[j] - places[i] < width]
    return max([0.0, *pairs])


@pytest.mark.parametrize("unit", ["points", "iterations"])
def test_windows_are_the_definition_also_where_steps_are_left_out(unit: str) -> None:
    points = [point for point in curves() if point[0] % 7 in (0, 1, 3)]
    found = met(points, windows=(1, 2, 5, 10, 1000), window_unit=unit)
    for task in range(4):
        mine = [(step, values[task]) for step, now, values in points if now >= task]
        places = [step for step, _ in mine] if unit == "iterations" else list(range(len(mine)))
        values = [value for _, value in mine]
        for width in found.widths:
            assert found.drops(width)[task] == brute(places, values, width, -1)
            assert found.rises(width)[task] == brute(places, values, width, 1)
        if task < 3:
            assert found.lowest()[task] == min(values[task] for step, now, values in points if now > task)
    assert found.drops(1) == found.rises(1) == [0.0] * 4


def test_a_rise_from_below_an_earlier_point_counts() -> None:
    assert (largest_rise([0.5, 0.1, 0.9], 3), largest_drop([0.5, 0.1, 0.9], 3)) == (0.8, 0.4)
    assert largest_rise([0.9, 0.2, 0.6, 0.1, 0.85], 5) == 0.75


def test_closed_forms() -> None:
    flat = met([(n, n // 10, [0.5] * (n // 10 + 1)) for n in range(30)]).summary()
    zero = ("stability_gap", "windowed_forgetting_10", "windowed_plasticity_100", "forgetting", "forgetting_with_last",
            "backward_transfer")
    assert all(flat[name] == pytest.approx(0.0, abs=1e-15) for name in zero)
    assert flat["accuracy"] == flat["min_accuracy"] == flat["worst_case_accuracy"] == flat["learning_accuracy"] == 0.5
    falling = [1.0 - 0.01 * n for n in range(50)]
    for width in (1, 2, 10, 50, 80):
        assert largest_drop(falling, width) == pytest.approx(0.01 * (min(width, 50) - 1)) and largest_rise(falling, width) == 0.0
    points = curves()
    widths = [met(points, windows=(w,)).summary()[f"windowed_forgetting_{w}"] for w in (2, 5, 10, 40, 200)]
    assert widths == sorted(widths) and widths[-1] is not None and widths[-1] <= 1.0  # type: ignore[type-var]
    grows = Stability((5,))
    before = [0.0] * 4
    for point in points:
        grows.add(*point)
        now = grows.drops(5)
        assert all(a <= b for a, b in zip(before, now, strict=False))
        before = now


def test_one_task_has_nothing_to_lose() -> None:
    one = met([(n, 0, [0.1 * n]) for n in range(5)]).summary(random_init=[0.1], ahead=[0.1])
    undefined = {"min_accuracy", "stability_gap", "forgetting", "forgetting_with_last", "backward_transfer", "forward_transfer"}
    assert {name for name, value in one.items() if value is None} == undefined
    assert one["worst_case_accuracy"] == one["accuracy"] == 0.4
    assert Stability().summary() == {} and Stability().min_accuracy is None and Stability().worst_case_accuracy is None


def test_by_hand() -> None:
    points = [(1, 0, [0.6]), (2, 0, [0.8]), (3, 1, [0.2, 0.4]), (4, 1, [0.7, 0.9]),
              (5, 2, [0.5, 0.3, 0.1]), (6, 2, [0.6, 0.8, 1.0])]
    found = met(points, windows=(2,), first=1).summary(random_init=[0.5, 0.0, 0.2], ahead=[0.5, 0.1, 0.4])
    want = {
        "accuracy": 0.8, "min_accuracy": 0.25, "worst_case_accuracy": 1 / 3 + 2 / 3 * 0.25, "stability_gap": 0.7 - 0.25,
        "windowed_forgetting_2": (0.6 + 0.6 + 0.0) / 3, "windowed_plasticity_2": (0.5 + 0.5 + 0.9) / 3,
        "forgetting": ((0.8 - 0.6) + (0.9 - 0.8)) / 2, "forgetting_with_last": ((0.8 - 0.6) + (0.9 - 0.8)) / 2,
        "backward_transfer": ((0.6 - 0.8) + (0.8 - 0.9)) / 2, "forward_transfer": ((0.1 - 0.0) + (0.4 - 0.2)) / 2,
        "learning_accuracy": 0.9, "learning_curve_area_1": (0.6 + 0.4 + 0.1) / 3}
    assert found == pytest.approx(want)
    matrix = [[0.8, np.nan, np.nan], [0.7, 0.9, np.nan], [0.6, 0.8, 1.0]]
    assert found["forgetting"] == metrics.forgetting(matrix) and found["backward_transfer"] == metrics.backward_transfer(matrix)


def test_fewer_points_never_lower_the_minimum() -> None:
    points = curves(seed=3)
    assert met([p for p in points if p[0] % 5 == 0]).min_accuracy >= met(points).min_accuracy  # type: ignore[operator]


def test_a_point_costs_the_same_at_any_width() -> None:
    def seconds(width: int) -> float:
        walk = np.random.default_rng(0).random(5_000).tolist()
        begun = time.process_time()
        largest_drop(walk, width)
        return time.process_time() - begun

    few, many = (min(seconds(width) for _ in range(3)) for width in (10, 4_000))
    assert many < 5 * few  # a scan of the window would take hundreds of times as long


@pytest.mark.parametrize(("call", "text"), [
    (lambda m: m.add(1, 0, [0.5]), "step 1 after step 1, must ascend"),
    (lambda m: m.add(2, 2, [0.5] * 3), "task 2 after 1 tasks, must be the present one or the next"),
    (lambda m: m.add(2, 1, [0.5]), "1 values at task 1, must be one for each of 2 tasks"),
    (lambda m: m.add(2, 0, [50.0]), r"accuracy 50 at \[0\], must be in \[0, 1\]"),
    (lambda m: Stability((0,)), "windows=0, must be an integer >= 1"),
    (lambda m: Stability(window_unit="point"), "mean 'points'"),
    (lambda m: Stability(unit="shares"), "must be 'fraction', 'percent' or 'score'")])
def test_what_makes_no_sense_is_refused(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(met([(1, 0, [0.5])]))
