"""Two-phase tuning: search on one scenario, freeze what was chosen, judge it once on another whose data nobody has seen.

    python -m everbatch.tune prepare output=runs/mine            two folders: what the search may see, and what it may not
    python -m everbatch.tune search data=runs/mine/tuning        ends by freezing record.json, and prints its SHA-256
    python -m everbatch.tune evaluate record=runs/mine/search/record.json data=runs/mine/evaluation
    python -m everbatch.tune conventional data=runs/mine/evaluation

Everything that is kept is JSON; a number that is not finite is never written. Four kinds of file:

*A unit*, `units/KEY.json`: one stream, trained once. KEY is the SHA-256 of all that it depends on.

    {"key": "...", "options": {"optimizer.lr": 0.05, ...}, "order": 0,
     "accuracies": [1.0, 0.93, ...],        after each task, over all classes seen
     "avg_acc": 0.93,                       their mean: average incremental accuracy
     "acc": 0.9,                            the last of them: last accuracy
     "seconds": 1.9, "cpu_seconds": 1.6, "ranks": 1}

or, of one that failed, `{"key", "options", "order", "failed": "diverged", "cause": "...", "seconds", "cpu_seconds"}`, where
"failed" is one of diverged, error, time_limit, out_of_memory, died.

*A record*, `record.json`: `{"body": BODY, "sha256": "..."}`, the SHA-256 of BODY as canonical JSON. Of BODY:

    "kind": "two-phase" or "conventional"
    "methods": {"er": {
        "options": {"replay.method": "er"},         what makes it this method
        "space": {"optimizer.lr": [0.01, ...]},     empty: not searched, a bound to compare with
        "paths": ["optimizer.lr", ...],             of the space, in the order in which values are drawn
        "configurations": [                         every one that was drawn, by id
            {"id": 0, "values": {"optimizer.lr": 0.05, ...}, "status": "complete",
             "orders": [{"order": 0, "accuracies": [1.0, 0.93, ...], "avg_acc": 0.93, "acc": 0.9,
                         "seconds": 1.9, "cpu_seconds": 1.6}, ...]}],
        "failures": [{"id": 3, "order": 1, "failed": "diverged", "cause": "..."}],
        "chosen": 0}}                               the id of one that is complete
    "orders": [0, 1]                                the class orders that the search used
    "evaluation_orders": [2, 3, ...]                those declared for the evaluation
    "cost": {"streams": 48, "seconds": 71.0, "cpu_seconds": 64.0}
    and the scenario, the search's own options, what the seal says of both data sets, versions and flags.

"status" is complete (it has all orders), failed, raced_out (left behind by a race) or unsearched (it has none: "space" is empty,
and `orders` too). Only complete configurations can be chosen.

*Rows of an evaluation*, `results.jsonl`, one a line, only ever added to:

    {"protocol": "two-phase", "method": "er", "configuration": 0, "order": 2, "avg_acc": 0.9, "acc": 0.88,
     "accuracies": [...], "seconds": 1.9, "cpu_seconds": 1.6, "record": "<SHA-256 of the record>", "amended": false}

"protocol" is two-phase (also of methods that are not searched) or conventional (the values that were chosen on the evaluation
data itself, on the same orders). A row of a stream that failed has "failed" and "cause" in place of the accuracies.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everbatch.tune.evaluate import Conventional, Evaluate, conventional, evaluate
    from everbatch.tune.pair import EvaluationData, ScenarioPair, prepare
    from everbatch.tune.plan import SearchOptions
    from everbatch.tune.seal import LeakageError
    from everbatch.tune.search import Search, search
    from everbatch.tune.two_phase import TwoPhase, main

__all__ = ["Conventional", "Evaluate", "EvaluationData", "LeakageError", "ScenarioPair", "Search", "SearchOptions", "TwoPhase",
           "conventional", "evaluate", "main", "prepare", "search"]

_HOMES = {"Conventional": "evaluate", "Evaluate": "evaluate", "EvaluationData": "pair", "LeakageError": "seal",
          "ScenarioPair": "pair", "Search": "search", "SearchOptions": "plan", "TwoPhase": "two_phase",
          "conventional": "evaluate", "evaluate": "evaluate", "main": "two_phase", "prepare": "pair", "search": "search"}


def __getattr__(name: str) -> Any:
    """Imported when it is first used: a trial's process needs little of this."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"everbatch.tune.{_HOMES[name]}"), name)
