"""Accuracy, forgetting and transfer from the accuracy matrix of a stream of tasks.

The matrix a has shape (K, T): row k holds the accuracies measured after training task k, column j belongs to task j
(both from 0), NaN where nothing was evaluated. With K < T the stream is under way: the first K columns count, so one
call after every task gives the curves. Entries are fractions in [0, 1] unless `unit="percent"`, or `unit="score"` for what
has no bounds, such as R squared; larger is better in any. With one task there is nothing to forget or to transfer, so those
metrics are None, not 0.

Source: the definitions of Lopez-Paz & Ranzato 2017 (arXiv 1706.08840) for both transfers, Chaudhry et al. 2018 (arXiv
1801.10112) for forgetting, Rebuffi et al. 2017 (arXiv 1611.07725) for average incremental accuracy. Last accuracy is PILOT's and
GTEP's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from everbatch.errors import check

__all__ = [
    "average_incremental_accuracy", "backward_transfer", "final_average_accuracy", "forgetting", "forward_transfer",
    "in_range", "last_accuracy", "seen_accuracy", "summary",
]

Unit = Literal["fraction", "percent", "score"]
_RANGE = {"fraction": (0.0, 1.0), "percent": (0.0, 100.0), "score": (-np.inf, np.inf)}


def in_range(who: str, values: NDArray[np.float64], unit: str) -> None:
    """Raise unless every evaluated entry lies in the range of the unit; names the first that does not."""
    check(unit in _RANGE, who, f"unit={unit!r}", "be 'fraction', 'percent' or 'score'")
    low, high = _RANGE[unit]
    wrong = np.argwhere(~np.isnan(values) & ~((values >= low) & (values <= high)))
    if len(wrong):
        place = tuple(int(i) for i in wrong[0])
        cure = "pass unit='percent' for accuracies in percent, 'score' for what has no bounds" if unit == "fraction" else ""
        check(False, who, f"accuracy {values[place]:g} at {list(place)}", f"be in [{low:g}, {high:g}]", cure)


def _square(who: str, matrix: ArrayLike, unit: str) -> NDArray[np.float64]:
    """The (K, K) float64 part of the matrix that has been trained on, complete on and under its diagonal."""
    full = np.asarray(matrix, dtype=np.float64)
    check(full.ndim == 2 and 1 <= full.shape[0] <= full.shape[1], who, f"accuracy matrix of shape {full.shape}",
          "be (tasks trained, tasks) with at least one row and no more rows than columns")
    in_range(who, full, unit)
    square = full[:, : full.shape[0]]
    missing = np.argwhere(np.isnan(square) & np.tri(len(square), dtype=bool))
    if len(missing):
        k, j = (int(i) for i in missing[0])
        check(False, who, f"no accuracy of task {j} after task {k}", "be evaluated for every task already trained")
    return square


def seen_accuracy(
    matrix: ArrayLike, *, counts: Sequence[int] | None = None, unit: Unit = "fraction",
) -> NDArray[np.float64]:
    """Accuracy over what has been seen after each task: A_k = sum_{j<=k} n_j a_kj / sum_{j<=k} n_j.

    Args:
        matrix: accuracies, shape (K, T).
        counts: number n_j of test samples per task, length T; without them all tasks weigh the same (as in Mammoth and
            PyCIL when tasks are equally large). With them A_k is the accuracy over the pooled test samples.

    Returns:
        Shape (K,), in the unit of the matrix.

    Raises:
        ValueError: entries outside the unit's range, a missing entry under the diagonal, or counts that do not fit.
    """
    a = _square("seen_accuracy", matrix, unit)
    if counts is None:
        weight = np.ones(len(a))
    else:
        tasks = np.asarray(matrix).shape[1]
        check(len(counts) == tasks, "seen_accuracy", f"{len(counts)} counts", f"be one per task ({tasks})")
        check(all(n >= 1 for n in counts), "seen_accuracy", f"counts={list(counts)}", "be >= 1 each")
        weight = np.asarray(counts, dtype=np.float64)[: len(a)]
    return np.asarray([np.average(a[k, : k + 1], weights=weight[: k + 1]) for k in range(len(a))])


def final_average_accuracy(matrix: ArrayLike, *, unit: Unit = "fraction") -> float:
    """Mean accuracy over tasks after the last one, (1/T) sum_j a_Tj: tasks weigh the same, as in forgetting and transfer."""
    return float(seen_accuracy(matrix, unit=unit)[-1])


def last_accuracy(matrix: ArrayLike, *, counts: Sequence[int], unit: Unit = "fraction") -> float:
    """Accuracy over all test samples after the last task, A_T = sum_j n_j a_Tj / sum_j n_j (see `seen_accuracy`)."""
    return float(seen_accuracy(matrix, counts=counts, unit=unit)[-1])


def average_incremental_accuracy(
    matrix: ArrayLike, *, counts: Sequence[int] | None = None, unit: Unit = "fraction",
) -> float:
    """Mean over tasks of the accuracy on everything seen so far, (1/T) sum_k A_k (see `seen_accuracy`)."""
    return float(seen_accuracy(matrix, counts=counts, unit=unit).mean())


def backward_transfer(matrix: ArrayLike, *, unit: Unit = "fraction") -> float | None:
    """What later tasks did to earlier ones, 1/(T-1) sum_{j<T} (a_Tj - a_jj); negative: forgotten. None for one task."""
    a = _square("backward_transfer", matrix, unit)
    return float((a[-1, :-1] - np.diagonal(a)[:-1]).mean()) if len(a) > 1 else None


def forgetting(matrix: ArrayLike, *, include_last: bool = False, unit: Unit = "fraction") -> float | None:
    """How far each task fell from its best, 1/(T-1) sum_{j<T} (max_{j<=k<=T-1} a_kj - a_Tj). None for one task.

    Args:
        matrix: accuracies, shape (K, T).
        include_last: let the maximum run over k = T too, as Mammoth and PyCIL do; then it is never negative. The
            textbook form (default) is negative where the last task improved an earlier one.
    """
    a = _square("forgetting", matrix, unit)
    last = len(a) - 1
    if last == 0:
        return None
    end = last + 1 if include_last else last
    best = np.asarray([a[j:end, j].max() for j in range(last)])
    return float((best - a[last, :last]).mean())


def forward_transfer(matrix: ArrayLike, random_init: ArrayLike, *, unit: Unit = "fraction") -> float | None:
    """What earlier tasks did for a task not yet trained, 1/(T-1) sum_{j>=2} (a_{j-1,j} - b_j). None for one task.

    Args:
        matrix: accuracies, shape (K, T), evaluated one task ahead: a[j-1, j] must be there.
        random_init: accuracies b_j of the untrained network, shape (T,).

    Raises:
        ValueError: the next task was not evaluated, or `random_init` has another length.
    """
    a = _square("forward_transfer", matrix, unit)
    tasks = np.asarray(matrix).shape[1]
    b = np.asarray(random_init, dtype=np.float64)
    check(b.shape == (tasks,), "forward_transfer", f"random_init of shape {b.shape}", f"be one per task ({tasks},)")
    in_range("forward_transfer", b, unit)
    if len(a) == 1:
        return None
    ahead = np.diagonal(a, offset=1) - b[1 : len(a)]
    check(not np.isnan(ahead).any(), "forward_transfer", "no accuracy of a next task in the matrix or in random_init",
          "be evaluated one task ahead", "evaluate task k+1 after task k, or leave forward transfer out")
    return float(ahead.mean())


def summary(
    matrix: ArrayLike, *, random_init: ArrayLike | None = None, counts: Sequence[int] | None = None,
    include_last: bool = False, unit: Unit = "fraction",
) -> dict[str, float | None]:
    """All metrics of this page by name; `forward_transfer` is None without `random_init`, as are those of one task.

    `last_accuracy` is there with `counts` alone; without, it would be the final average accuracy.
    """
    pooled = {} if counts is None else {"last_accuracy": last_accuracy(matrix, counts=counts, unit=unit)}
    return {
        "final_average_accuracy": final_average_accuracy(matrix, unit=unit), **pooled,
        "average_incremental_accuracy": average_incremental_accuracy(matrix, counts=counts, unit=unit),
        "backward_transfer": backward_transfer(matrix, unit=unit),
        "forgetting": forgetting(matrix, include_last=include_last, unit=unit),
        "forward_transfer": None if random_init is None else forward_transfer(matrix, random_init, unit=unit),
    }
