"""What two-phase tuning says of its numbers: against hand-made records, brute force and simulation."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everbatch.metrics.estimate import estimate
from everbatch.tune import rankings, tables
from everbatch.tune.choices import choices, search_cost
from everbatch.tune.figure import both_protocols
from everbatch.tune.rankings import above, tau
from everbatch.tune.report import report
from everbatch.tune.statistics import bootstrap, bootstrap_optimism, compare, expected_maximum, optimism

NEW = tuple(range(2, 8))


def method(
    scores: dict[int, list[float]], chosen: int | None, *, failed: tuple[int, ...] = (), raced: tuple[int, ...] = (),
) -> dict[str, Any]:
    """A searched method with a score for each configuration and order."""
    rows = [{"id": i, "values": {"lr": i / 10}, "status": "raced_out" if i in raced else "complete",
             "orders": [{"order": o, "avg_acc": s, "acc": s - 0.1, "seconds": 2.0, "cpu_seconds": 1.0}
                        for o, s in enumerate(each)]}
            for i, each in scores.items()]
    rows += [{"id": i, "values": {"lr": i / 10}, "status": "failed", "orders": []} for i in failed]
    failures = [{"id": i, "order": 0, "failed": "diverged", "cause": "loss is nan"} for i in failed]
    return {"options": {}, "space": {"lr": [0.0, 0.1]}, "configurations": rows, "failures": failures, "chosen": chosen}


def unsearched() -> dict[str, Any]:
    return {"options": {}, "space": {}, "configurations": [{"id": 0, "values": {}, "status": "unsearched", "orders": []}],
            "failures": [], "chosen": 0}


def record(kind: str, **methods: Any) -> dict[str, Any]:
    cost = {"streams": 9, "seconds": 20.0, "cpu_seconds": 9.5}
    body = {"kind": kind, "methods": methods, "orders": [0, 1], "evaluation_orders": list(NEW), "cost": cost}
    return {"body": body, "sha256": f"{kind}-sum"}


def rows(protocol: str, name: str, values: list[float], **more: Any) -> list[dict[str, Any]]:
    return [{"protocol": protocol, "method": name, "configuration": 0, "order": order, "avg_acc": value, "acc": value - 0.1,
             "cpu_seconds": 1.0, "record": f"{protocol}-sum", "amended": False, **more}
            for order, value in zip(NEW, values, strict=False)]


A = [0.90, 0.92, 0.91, 0.93, 0.90, 0.92]
B = [0.88, 0.93, 0.90, 0.91, 0.89, 0.92]
TWO = record("two-phase", er=method({0: [0.7, 0.8], 1: [0.6, 0.7]}, 0),
             derpp=method({0: [0.9, 0.9], 1: [0.8, 0.9]}, 0, failed=(2,)), finetune=unsearched())
CONVENTIONAL = record("conventional", er=method({0: [0.95, 0.97], 1: [0.9, 0.9]}, 0),
                      derpp=method({0: [0.8, 0.9], 1: [0.97, 0.99]}, 1))
ROWS = [*rows("two-phase", "er", A), *rows("two-phase", "derpp", B), *rows("two-phase", "finetune", [0.4] * 6),
        *rows("conventional", "er", A), *rows("conventional", "derpp", [0.87, 0.94, 0.9, 0.9, 0.88, 0.93])]


def test_parts_of_the_optimism_add_up_and_are_paired_over_orders() -> None:
    found = compare(TWO, CONVENTIONAL, ROWS)["optimism"]["derpp"]
    theirs = [0.87, 0.94, 0.9, 0.9, 0.88, 0.93]
    for name, wanted in (("selection", [0.98 - v for v in theirs]), ("transfer", [b - a for a, b in zip(B, theirs, strict=True)]),
                         ("sum", [0.98 - a for a in B])):
        by_hand = estimate(wanted)
        assert found[name]["mean"] == pytest.approx(by_hand.mean) and found[name]["std"] == pytest.approx(by_hand.std)
        assert (found[name]["low"], found[name]["high"]) == pytest.approx((by_hand.low, by_hand.high))
    assert found["sum"]["mean"] == pytest.approx(found["selection"]["mean"] + found["transfer"]["mean"])
    assert found["selection"]["says"] == "resolved" and found["transfer"]["says"] == "not resolved" and not found["same"]


def test_the_same_values_have_a_gap_of_exactly_zero() -> None:
    """Also where the two protocols' streams were run on processors that round differently."""
    other = [row if row["protocol"] == "two-phase" else {**row, "avg_acc": row["avg_acc"] + 1e-9} for row in ROWS]
    found = compare(TWO, CONVENTIONAL, other)["optimism"]["er"]
    assert found["same"] and found["transfer"]["says"] == "exactly 0"
    assert (found["transfer"]["mean"], found["transfer"]["low"], found["transfer"]["high"]) == (0.0, 0.0, 0.0)
    assert found["sum"]["mean"] == found["selection"]["mean"] and "exactly 0" in "\n".join(tables.optimism(
        compare(TWO, CONVENTIONAL, other)))


def test_the_winners_curse_has_its_known_size() -> None:
    """Selection optimism in units of one run's deviation, where configurations differ by one: .67 at R=12, S=2, and .38 at R=30,
    S=5."""
    rng = np.random.default_rng(0)
    for count, orders, wanted in ((12, 2, 0.67), (30, 5, 0.38)):
        found = []
        for _ in range(150):
            worth = rng.normal(0, 1, count)
            scores = worth[:, None] + rng.normal(0, 1, (count, orders))
            best = int(scores.mean(1).argmax())
            kept = record("conventional", er=method({i: list(each) for i, each in enumerate(scores)}, best))
            judged = [*rows("two-phase", "er", [0.0]), *rows("conventional", "er", [float(worth[best])])]
            of = optimism(*choices(record("two-phase", er=method({0: [0.0] * orders}, 0)), kept, judged))
            found.append(of["selection"]["mean"])
        assert statistics.fmean(found) == pytest.approx(wanted, abs=3.5 * statistics.stdev(found) / 150**0.5), (count, orders)


def test_the_interval_covers_what_it_says_where_the_bootstrap_does_not() -> None:
    rng, covered = np.random.default_rng(1), {"t": 0, "bootstrap": 0}
    for _ in range(400):
        values = list(rng.normal(0, 1, 5))
        of, other = estimate(values), bootstrap(values)
        assert of.low is not None and of.high is not None and other is not None
        covered["t"] += of.low < 0 < of.high
        covered["bootstrap"] += other[0] < 0 < other[1]
    assert 0.92 < covered["t"] / 400 < 0.98 and covered["bootstrap"] / 400 < 0.90


def test_expected_maximum_is_the_mean_over_all_draws() -> None:
    of = method({0: [0.5, 0.7], 1: [0.9, 0.7], 2: [0.3, 0.1], 3: [0.6, 0.6]}, 1, failed=(4,))
    scores, found = [0.6, 0.8, 0.2, 0.6, 0.0], expected_maximum(of)
    assert len(found) == 5 and found[-1] == pytest.approx(0.8)
    for n in range(1, 6):
        assert found[n - 1] == pytest.approx(statistics.fmean(max(drawn) for drawn in itertools.combinations(scores, n)))
    assert expected_maximum(method({0: [0.5, 0.7], 1: [0.9]}, 0, raced=(1,))) == []


def test_what_is_missing_failed_or_of_another_record_is_told() -> None:
    some = [row for row in ROWS if not (row["method"] == "er" and row["order"] in (3, 4))]
    some += [{"protocol": "two-phase", "method": "er", "order": 3, "failed": "diverged", "cause": "nan", "cpu_seconds": 0.1,
              "record": "two-phase-sum", "amended": True}, {**ROWS[0], "record": "an earlier one", "avg_acc": 0.0}]
    found = compare(TWO, CONVENTIONAL, some)
    er = next(row for row in found["choices"] if (row["protocol"], row["method"]) == ("two-phase", "er"))
    assert er["failed"] == (3,) and er["missing"] == (4,) and er["new"]["count"] == 4 and er["amended"]
    assert found["other_records"] == 1 and found["optimism"]["er"]["orders"] == [2, 5, 6, 7]
    text = tables.report(found)
    for said in ("failed under orders 3", "incomplete: orders 4", "amended", "rows of other records (1)"):
        assert said in text, said
    assert json.loads(json.dumps(found, allow_nan=False))["metric"] == "avg_acc"


def test_cost_counts_every_stream_once_failures_too() -> None:
    derpp = next(c for c in choices(TWO, CONVENTIONAL, ROWS) if (c.protocol, c.method) == ("two-phase", "derpp"))
    assert derpp.streams == 2 * 2 + 1 + 6 and derpp.cpu_seconds == pytest.approx(4 * 1.0 + 6 * 1.0)
    twice = method({0: [0.7, 0.8], 1: [0.7, 0.8], 2: [0.6, 0.7]}, 0)
    twice["configurations"][1]["values"] = dict(twice["configurations"][0]["values"])
    assert search_cost(twice) == (4, 4.0)
    text = "\n".join(tables.results(compare(TWO, CONVENTIONAL, ROWS)))
    assert "two-phase: search 9 streams in 10 CPU s, evaluation 18 streams in 18 CPU s" in text
    assert "(not searched)" in text and "lr=0.1" in text


def test_the_cost_of_an_evaluation_leaves_out_what_other_records_cost() -> None:
    others = [{**row, "record": "an earlier one"} for row in ROWS]
    assert compare(TWO, CONVENTIONAL, [*ROWS, *others])["cost"] == compare(TWO, CONVENTIONAL, ROWS)["cost"]


def test_before_a_conventional_search_there_is_no_optimism() -> None:
    found = compare(TWO, None, ROWS[:18])
    assert found["optimism"] == {} and found["ranks"] is None and list(found["expected_maximum"]) == ["two-phase"]
    assert "optimism" not in tables.report(found)
    with pytest.raises(ValueError, match="compare: metric='accuracy', must be one of avg_acc, acc"):
        compare(TWO, None, ROWS, "accuracy")
    assert compare(TWO, None, ROWS, "acc")["choices"][0]["new"]["mean"] == pytest.approx(statistics.fmean(A) - 0.1)


# ------------------------------------------------------------------------------------------------------------------------ ranks
def test_few_methods_have_probabilities_and_no_test() -> None:
    found = compare(TWO, CONVENTIONAL, ROWS)["ranks"]
    assert "tau" not in found and found["reported"] == ["derpp", "er"] and found["two_phase"] == ["er", "derpp"]
    (pair,) = found["pairs"]
    assert pair["pair"] == ["er", "derpp"] and pair["changes"] and 0.5 < pair["probability"] < 1.0
    assert "too few for a test of ranks" in tables.report(compare(TWO, CONVENTIONAL, ROWS))
    a, b = {0: 0.9, 1: 0.8}, {0: 0.8, 1: 0.9}
    assert above(a, b) == pytest.approx(0.5, abs=0.05) and above(a, a) == 0.5 and above(a, {0: 0.1}) is None
    assert above({0: 0.9, 1: 0.8}, {0: 0.1, 1: 0.2}) == 1.0


def test_five_methods_are_tested() -> None:
    names = [f"m{i}" for i in range(5)]
    two = record("two-phase", **{n: method({0: [0.5, 0.5]}, 0) for n in names})
    conventional = record("conventional", **{n: method({0: [0.5 + i / 20] * 2}, 0) for i, n in enumerate(names)})
    kept = [row for i, n in enumerate(names) for p in ("two-phase", "conventional") for row in rows(p, n, [0.5 + i / 20] * 6)]
    found = compare(two, conventional, kept)["ranks"]
    assert found["tau"] == pytest.approx(1.0) and found["p"] == pytest.approx(2 / math.factorial(5))
    assert not any(pair["changes"] for pair in found["pairs"]) and rankings.LEAST == 5
    # By hand: of 6 pairs one is turned round.
    turned = tau({"a": 1, "b": 2, "c": 3, "d": 4}, {"a": 1, "b": 2, "c": 4, "d": 3})
    assert turned["tau"] == pytest.approx(2 / 3)


def test_the_bootstrap_of_a_search_sees_noise_and_only_that() -> None:
    same = bootstrap_optimism(method({0: [0.9, 0.9], 1: [0.5, 0.5]}, 0))
    assert same == {"mean": 0.0, "low": 0.0, "high": 0.0}
    rng = np.random.default_rng(0)
    noisy = bootstrap_optimism(method({i: list(rng.normal(0.8, 0.1, 4)) for i in range(12)}, 0))
    assert noisy is not None and 0.02 < noisy["mean"] < 0.1 and noisy["low"] < noisy["mean"] < noisy["high"]
    assert bootstrap_optimism(method({0: [0.9, 0.9]}, 0)) is None


# ----------------------------------------------------------------------------------------------------------------------- figure
def test_the_figure_shows_both_protocols(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = compare(TWO, CONVENTIONAL, ROWS)
    figure = both_protocols(found, tmp_path / "figure.png")
    left, middle, right = figure.axes
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG") and len(right.lines) == 4
    assert [text.get_text() for text in left.get_yticklabels()] == ["finetune", "derpp", "er"]
    assert {"er: transfer gap", "derpp: sum"} <= {text.get_text() for text in middle.get_yticklabels()}
    said = {text.get_text() for text in left.get_legend().get_texts()}
    assert said == {"two-phase, new orders", "conventional, new orders", "conventional, as reported"}
    hollow = [line.get_xdata()[0] for line in left.lines if line.get_fillstyle() == "none"]
    assert hollow == pytest.approx([96.0, 98.0])
    few = compare(TWO, None, [*rows("two-phase", "er", [0.99, 0.5]), *rows("two-phase", "derpp", [0.9, 0.9])])
    left, middle, _ = both_protocols(few).axes
    assert few["choices"][0]["new"]["high"] > 1.5 and left.get_xlim()[1] <= 102 and list(middle.get_xticks()) == []
    with pytest.raises(ValueError, match="both_protocols: no row of an evaluation"):
        both_protocols(compare(TWO, CONVENTIONAL, []))


def test_what_the_commands_leave(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = report(TWO, CONVENTIONAL, ROWS, tmp_path)
    kept = json.loads((tmp_path / "comparison.json").read_text())
    assert kept["avg_acc"] == json.loads(json.dumps(compare(TWO, CONVENTIONAL, ROWS))) and "torch" in kept["versions"]
    assert (tmp_path / "figures" / "both_protocols.png").exists() and list((tmp_path / "tensorboard").iterdir())
    assert "last accuracy" in text and "final average accuracy" not in text
    assert (tmp_path / "comparison.txt").read_text().strip() in text
    assert "see" not in report(TWO, CONVENTIONAL, [], tmp_path / "none") and not (tmp_path / "none" / "figures").exists()
