"""Configurations that Optuna proposes, in rounds. A round is proposed before any of it runs, and told in the order of its ids, so
the same seed proposes the same ones whichever trial ends first; what is in the ledger is not run again."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from everbatch.declared import Range
from everbatch.errors import check
from everbatch.tune.spaces import Values
from everbatch.tune.trial import Trial

__all__ = ["propose"]


def propose(plan: Any, go: Callable[[list[Trial]], None]) -> None:
    """Fill the `values` of an `everbatch.tune.plan.Plan` round by round, all methods side by side.

    Raises:
        ImportError: optuna is not installed. ValueError: a space with rules, which have no independent values.
    """
    try:
        optuna: Any = importlib.import_module("optuna")
    except ImportError as error:
        raise ImportError("tune: optuna is not installed; pip install everbatch[tune], or searcher=random") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options = plan.options
    spaces = {name: options.space_of(name) for name in options.methods}
    choices = {name: _distributions(optuna, space) for name, space in spaces.items()}
    studies = {name: optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=options.seed))
               for name in options.methods}
    while len(plan.values.setdefault(options.methods[0], [])) < options.trials:
        asked: dict[str, list[Any]] = {}
        for name, study in studies.items():
            rows = plan.values.setdefault(name, [])
            count = min(options.round_size, options.trials - len(rows))
            asked[name] = [study.ask(choices[name]) for _ in range(count)]
            rows += [_values(spaces[name], trial.params) for trial in asked[name]]
        first = {name: len(plan.values[name]) - len(trials) for name, trials in asked.items()}
        fresh = [(name, first[name] + n) for name, trials in asked.items() for n in range(len(trials))]
        go(plan.distinct(fresh, plan.orders))
        for name, trials in asked.items():
            rows, _ = plan.rows(name, plan.orders)
            for n, trial in enumerate(trials):
                row = rows[first[name] + n]
                if row["status"] == "complete":
                    score = math.fsum(unit["avg_acc"] for unit in row["orders"]) / len(row["orders"])
                    studies[name].tell(trial, score)
                else:
                    studies[name].tell(trial, state=optuna.trial.TrialState.FAIL)


def _distributions(optuna: Any, space: Mapping[str, Values]) -> dict[str, Any]:
    found = {}
    for path, values in space.items():
        check(not isinstance(values, Mapping), "tune", f"{path}, which follows another option, with searcher=optuna",
              "be left out")
        if isinstance(values, Range):
            found[path] = optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)
        else:
            places = list(range(len(tuple(values))))  # a list, as milestones are, is no choice that optuna knows
            found[path] = optuna.distributions.CategoricalDistribution(places)
    return found


def _values(space: Mapping[str, Values], params: Mapping[str, Any]) -> dict[str, Any]:
    """What a proposal stands for, in the order of the space."""
    found = {}
    for path, values in space.items():
        given = params[path]
        found[path] = float(f"{given:.6g}") if isinstance(values, Range) else tuple(values)[given]
    return found
