"""What the commands leave of an evaluation: the tables as text, the numbers as JSON, the figure as PNG and in TensorBoard."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everbatch.report.recorder import Recorder, versions, write_json
from everbatch.tune import tables
from everbatch.tune.statistics import METRICS, compare

__all__ = ["report"]


def report(
    record: Mapping[str, Any], conventional: Mapping[str, Any] | None, rows: Sequence[Mapping[str, Any]],
    folder: str | os.PathLike[str],
) -> str:
    """Write comparison.json (both accuracies, with versions), comparison.txt and figures/both_protocols.png; returns the text.

    Args:
        record: the two-phase record, {"body": ..., "sha256": ...}; conventional: the same of the search on D_E, or None.
        rows: of the evaluation. folder: for the files; those of an earlier call are replaced.

    Cost: about a second, most of it matplotlib, which may be missing: then there is no figure, and the text says so.
    """
    found = {metric: compare(record, conventional, rows, metric) for metric in METRICS}
    folder = Path(folder)
    write_json(folder / "comparison.json", {**found, "record": record["sha256"], "versions": versions()})
    text = "\n\n".join([tables.report(found["avg_acc"]), "\n".join(tables.results(found["acc"]))])
    (folder / "comparison.txt").write_text(text + "\n")
    if not any(row["new"] is not None for row in found["avg_acc"]["choices"]):
        return text
    if importlib.util.find_spec("matplotlib") is None:
        return f"{text}\n\n(no figure: matplotlib is not installed; pip install everbatch[plot])"
    from everbatch.tune.figure import both_protocols

    with Recorder(folder, progress=False) as recorder:
        drawn = recorder.figure("both_protocols", both_protocols(found["avg_acc"]), 0)
    return f"{text}\n\nsee {folder / 'comparison.json'} and {drawn}"
