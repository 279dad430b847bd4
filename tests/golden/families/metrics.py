"""`cl_metrics*`: metrics of accuracy matrices, in percent, row i measured after task i."""

from __future__ import annotations

import math

from everbatch import metrics
from golden.comparison import Comparison, FormatError, Vectors

__all__ = ["check"]

NAMES = {
    "bwt": "backward_transfer", "fwt": "forward_transfer", "forgetting_mammoth": "forgetting",
    "forgetting_pycil": "forgetting", "final_average_accuracy": "final_average_accuracy",
    "average_incremental_accuracy": "average_incremental_accuracy",
}
"""Key in the file to name in `metrics.summary`; both references let the maximum run over the last task too."""


def check(file: Vectors, compare: Comparison) -> None:
    """Every metric of every case that the file holds."""
    cases = file.groups()
    for case in cases:
        matrix, key = file[f"{case}/acc_matrix_full"], f"{case}/random_init_acc"
        start = file[key] if key in file else None
        got = metrics.summary(matrix, random_init=start, include_last=True, unit="percent")
        for key, name in NAMES.items():
            if f"{case}/{key}" in file:
                value = got[name]  # None for one task, where the references divide by zero
                compare.close(f"{case}/{key}", math.nan if value is None else value, file[f"{case}/{key}"])
    if not cases:
        raise FormatError("no case: keys are like 0/acc_matrix_full")
