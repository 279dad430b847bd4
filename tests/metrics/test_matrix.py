"""Metrics of the accuracy matrix against Mammoth's and PyCIL's numbers, and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from everbatch import metrics

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "cl_metrics.npz")
HAND = np.asarray([[0.8, 0.1, np.nan], [0.6, 0.9, 0.3], [0.7, 0.5, 1.0]])


@pytest.mark.parametrize("case", ["0", "1", "2"])
def test_matches_the_reference_implementations(case: str) -> None:
    a, b = GOLDEN[f"{case}/acc_matrix_full"], GOLDEN[f"{case}/random_init_acc"]
    got = metrics.summary(a, random_init=b, include_last=True, unit="percent")
    want = {
        "final_average_accuracy": "final_average_accuracy",
        "average_incremental_accuracy": "average_incremental_accuracy",
        "backward_transfer": "bwt", "forgetting": "forgetting_mammoth", "forward_transfer": "fwt",
    }
    assert got.keys() == want.keys()
    for name, key in want.items():
        np.testing.assert_allclose(got[name], GOLDEN[f"{case}/{key}"], rtol=1e-9, atol=1e-12)
    pycil = metrics.forgetting(a, include_last=True, unit="percent")
    np.testing.assert_allclose(pycil, GOLDEN[f"{case}/forgetting_pycil"], rtol=1e-9, atol=1e-12)


def test_by_hand() -> None:
    got = metrics.summary(HAND, random_init=[0.0, 0.2, 0.1])
    assert got["final_average_accuracy"] == pytest.approx(2.2 / 3)
    assert got["average_incremental_accuracy"] == pytest.approx((0.8 + 0.75 + 2.2 / 3) / 3)
    assert got["backward_transfer"] == pytest.approx(((0.7 - 0.8) + (0.5 - 0.9)) / 2)
    assert got["forgetting"] == pytest.approx(((0.8 - 0.7) + (0.9 - 0.5)) / 2)
    assert got["forward_transfer"] == pytest.approx(((0.1 - 0.2) + (0.3 - 0.1)) / 2)
    assert metrics.summary(HAND)["forward_transfer"] is None


def test_the_last_row_counts_only_on_request() -> None:
    a = [[0.5, np.nan], [0.7, 0.9]]
    assert metrics.forgetting(a) == pytest.approx(-0.2)
    assert metrics.forgetting(a, include_last=True) == 0.0


def test_counts_pool_the_samples() -> None:
    correct, counts = np.asarray([[8, 0], [5, 30]]), [10, 40]
    a = correct / counts
    np.testing.assert_allclose(metrics.seen_accuracy(a, counts=counts), [8 / 10, 35 / 50])
    got, plain = metrics.summary(a, counts=counts), metrics.summary(a)
    assert got["final_average_accuracy"] == plain["final_average_accuracy"] == pytest.approx((5 / 10 + 30 / 40) / 2)
    assert got["last_accuracy"] == metrics.last_accuracy(a, counts=counts) == pytest.approx(35 / 50)
    assert got["average_incremental_accuracy"] == pytest.approx((8 / 10 + 35 / 50) / 2)  # of accuracies over all classes seen
    assert got["backward_transfer"] == plain["backward_transfer"] and "last_accuracy" not in plain


def test_a_stream_under_way_is_its_beginning() -> None:
    assert metrics.summary(HAND[:2]) == metrics.summary(HAND[:2, :2])


def test_one_task_has_nothing_to_forget() -> None:
    got = metrics.summary([[0.25]], random_init=[0.1])
    assert got == {"final_average_accuracy": 0.25, "average_incremental_accuracy": 0.25, "backward_transfer": None,
                   "forgetting": None, "forward_transfer": None}


@pytest.mark.parametrize(
    ("matrix", "kwargs", "text"),
    [
        ([[50.0]], {}, r"accuracy 50 at \[0, 0\], must be in \[0, 1\]; pass unit='percent'"),
        ([[-0.1]], {}, "accuracy -0.1"),
        ([[101.0]], {"unit": "percent"}, r"must be in \[0, 100\]"),
        ([[0.5]], {"unit": "permille"}, "unit='permille'"),
        ([0.5], {}, "shape"),
        ([[0.5], [0.5]], {}, "shape"),
        ([[0.5, np.nan], [np.nan, 0.5]], {}, "no accuracy of task 0 after task 1"),
        ([[0.5]], {"counts": [1, 2]}, "2 counts"),
        ([[0.5]], {"counts": [0]}, ">= 1"),
        ([[0.5, 0.5], [0.5, 0.5]], {"random_init": [0.1]}, "one per task"),
        ([[0.5, np.nan], [0.5, 0.5]], {"random_init": [0.1, 0.1]}, "no accuracy of a next task"),
    ],
)
def test_bad_input_is_named(matrix: object, kwargs: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        metrics.summary(matrix, **kwargs)
