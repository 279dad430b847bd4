"""Which trials a search runs, round by round, and what its units say in the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from everbatch.errors import check, check_whole, nearest
from everbatch.tune.drive import Resources
from everbatch.tune.ledger import Ledger, unit_key
from everbatch.tune.record import rows_of, select
from everbatch.tune.spaces import CAPACITY, Values, draw_all, gtep, is_rule, method_of, plain_space, space_from
from everbatch.tune.stream import SCENARIO, check_options, flat, plain_options
from everbatch.tune.trial import Trial

__all__ = ["Plan", "SearchOptions"]

REFUSED = {
    "pbt": "population-based training changes values in the middle of a stream, so no values describe what it found",
    "asha": "it stops inside a stream, which drops slow learners, and what it stops depends on which results come first",
    "hyperband": "it stops inside a stream, which drops slow learners",
    "median": "it stops inside a stream, which drops slow learners",
}
"""Schedulers that other tuners have, and why not here."""
SPELLINGS = {"population_based_training": "pbt", "pb2": "pbt", "async_hyperband": "asha", "hb": "hyperband", "bohb": "hyperband",
             "median_stopping_rule": "median", "medianstopping": "median"}


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Resources):
    """What is searched, and how."""

    methods: tuple[str, ...] = ("er", "dark_er_pp")
    """Methods to tune, by their parts with + between them: er, dark_er_pp, ewc, er+refresh; see `everbatch methods`."""
    bounds: tuple[str, ...] = ("finetune",)
    """Methods to compare with, with their own defaults, not searched."""
    space: dict[str, Any] = field(default_factory=dict)
    """Values to search in place of those that the parts declare, by method and option, or of all methods under "all":
    {"all": {"optimizer.lr": [0.1, 0.2]}, "er": {"replay.beta": {"low": 0.1, "high": 2, "log": true}}}; or a YAML file of them."""
    gtep: str | None = None
    """Search the published lists of GTEP of this algorithm (replay, icarl, der ...), for every method, under `space`."""
    trials: int = 12
    """Configurations of each method; GTEP: 30."""
    seed: int = 0
    """Of the configurations; the same seed draws the same ones."""
    race: bool = False
    """After each order leave the worse half of the configurations behind; they are listed, and cannot be chosen."""
    scheduler: str = "none"
    """none: every configuration runs all its orders; race: as race=true."""
    searcher: Literal["random", "optuna"] = "random"
    """random draws all before the first runs; optuna proposes (TPE), in rounds that do not depend on which trial ends first."""
    round_size: int = 4
    """searcher=optuna: configurations of a round; the first of them knows of all rounds before, and of nothing in its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("tune", "trials", self.trials, 1)
        check_whole("tune", "seed", self.seed)
        check_whole("tune", "round_size", self.round_size, 1)
        word = self.scheduler.lower()
        word = SPELLINGS.get(word, word)
        check(word not in REFUSED, "tune", f"scheduler={self.scheduler!r}", "be none or race", REFUSED.get(word, ""))
        check(word in ("none", "race"), "tune", f"scheduler={self.scheduler!r}", "be none or race",
              nearest(word, ["none", "race", *REFUSED]))
        check(not (self.races and self.searcher == "optuna"), "tune", "a race with searcher=optuna", "be one of them",
              "what a race leaves behind has no score that a proposal could learn from")
        names = [*self.methods, *self.bounds]
        check(bool(self.methods), "tune", "methods=[]", "name at least one")
        check(len(set(names)) == len(names), "tune", f"methods {names}", "be named once")
        for name in names:
            method_of(name)

    @property
    def races(self) -> bool:
        """Whether worse configurations are left behind."""
        return self.race or self.scheduler.lower() == "race"

    def space_of(self, method: str) -> dict[str, Values]:
        """What is searched of a method: declared, or published, with what was given in its place."""
        known = [*self.methods, *self.bounds, "all"]
        for name, given in self.space.items():
            check(name in known, "tune", f"space of {name!r}", "be of a method that is searched, or of all", nearest(name, known))
            check(isinstance(given, Mapping), "tune", f"space of {name}: {given!r}", "be values by option")
        declared = gtep(self.gtep) if self.gtep else method_of(method).space
        given = flat({**self.space.get("all", {})}, is_rule) | flat(self.space.get(method, {}), is_rule)
        return {**declared, **space_from(given, "space")}

    def check_scenario(self, scenario: Mapping[str, Any]) -> None:
        """Refuse an option that is in the scenario and in the space of a method, or that a method sets itself: it would hold for
        some of the methods alone. What is as by default in the scenario may be searched.

        Raises:
            ValueError: naming both.
        """
        own = {path: value for path, value in scenario.items() if path not in SCENARIO or value != SCENARIO[path]}
        for method in self.methods:
            named: set[str] = set()
            for path, choices in self.space_of(method).items():
                for value in choices if isinstance(choices, tuple) else (None,):
                    named |= plain_options({path: value}, f"space of {method}").keys()
            check(CAPACITY not in named, "tune", f"{CAPACITY} in the space of {method}", "be left out",
                  "it belongs to the scenario: both phases have the same memory")
            for path, value in own.items():
                also = [other for other in named if f"{other}.".startswith(f"{path}.") or f"{path}.".startswith(f"{other}.")]
                check(not also, "tune", f"{path}={value!r} in the scenario and {', '.join(also)} in the space of {method}",
                      "be in one of them", "the searched methods would not have what the scenario says")
        for method in (*self.methods, *self.bounds):
            for path, value in method_of(method).options.items():
                check(own.get(path, value) == value, "tune", f"{path}={own.get(path)!r} in the scenario",
                      f"be {value!r} or left out", f"{method} sets it")


@dataclass
class Plan:
    """All trials of a search on one file of samples.

    Args:
        options: what is searched. scenario: options of both phases. increments: classes of each task. orders: to tune on.
        data: the file; data_sha256: of it. seal: seal.json where the phase is guarded. ledger: folder of the units.

    Raises:
        ValueError: before anything runs: an option that does not exist, with the nearest; a value that it does not take.
    """

    options: SearchOptions
    scenario: dict[str, Any]
    increments: list[int]
    orders: list[int]
    data: str
    data_sha256: str
    ledger: Path
    seal: str | None = None
    values: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = self.scenario.get("engine.kind", "deepspeed")
        check(self.options.ranks == 1 or kind != "plain", "tune", f"ranks={self.options.ranks} with engine.kind=plain",
              "be 1", "prepare a scenario with engine.kind ddp, fsdp2 or deepspeed")
        self.options.check_scenario(self.scenario)
        for method in self.options.methods:
            space = self.options.space_of(method)
            if self.options.searcher == "random":
                self.values[method] = draw_all(space, self.options.seed, self.options.trials)
                idle = [self.check_options(method, values) for values in self.values[method]]
                for path in flat(self.options.space.get(method, {}), is_rule):
                    why = [found.get(path) for found in idle]
                    check(not all(why), "tune", f"{path} in the space of {method}", "be left out", f"no effect: {why[0]}")
                continue
            for path, choices in space.items():  # what will be proposed is not known yet
                for value in choices if isinstance(choices, tuple) else ():
                    self.check_options(method, {path: value})

    def check_options(self, method: str, values: Mapping[str, Any]) -> Mapping[str, str]:
        """Refuse options of a configuration before it runs; gives those that have no effect, and why."""
        known = {path: value for path, value in values.items() if path != "-"}
        return check_options([self.scenario, method_of(method).within(self.scenario), known], self.increments)

    def trial(self, method: str, i: int, values: Mapping[str, Any], orders: Sequence[int]) -> Trial:
        """One configuration with some of its orders."""
        layers = [dict(self.scenario), method_of(method).within(self.scenario), dict(values)]
        keys = [(order, self.key(method, values, order)) for order in orders]
        return Trial(method=method, id=i, options=layers, increments=self.increments, units=keys, data=self.data,
                     data_sha256=self.data_sha256, seal=self.seal, ledger=str(self.ledger.resolve()), ranks=self.options.ranks,
                     time_limit=self.options.time_limit, cpus=self.options.cpus, gpus=self.options.gpus)

    def key(self, method: str, values: Mapping[str, Any], order: int) -> str:
        """Of a unit: configurations with the same values share it."""
        whole = {**method_of(method).within(self.scenario), **values}
        return unit_key(whole, order, {**self.scenario, "increments": self.increments}, self.data_sha256)

    # ---------------------------------------------------------------------------------------------------------------- rounds
    def run(self, go: Callable[[list[Trial]], None]) -> None:
        """All rounds. `go` runs trials until their units are in the ledger."""
        if self.options.again:
            everything = [self.key(m, v, o) for m, rows in self.values.items() for v in rows for o in self.orders]
            Ledger(self.ledger).forget_failures(everything)
        if self.options.searcher == "optuna":
            from everbatch.tune.proposals import propose

            propose(self, go)
        elif self.options.races:
            self._race(go)
        else:
            go(self.distinct([(m, i) for m, rows in self.values.items() for i in range(len(rows))], self.orders))

    def distinct(self, configurations: Sequence[tuple[str, int]], orders: Sequence[int]) -> list[Trial]:
        """Trials of configurations; of those with the same values the first one's alone."""
        found: dict[str, Trial] = {}
        for method, i in configurations:
            trial = self.trial(method, i, self.values[method][i], orders)
            found.setdefault(trial.units[0][1], trial)
        return list(found.values())

    def _race(self, go: Callable[[list[Trial]], None]) -> None:
        """One order after the other, on which all compared configurations have run; the better half goes on."""
        left = {method: list(range(len(rows))) for method, rows in self.values.items()}
        for number, order in enumerate(self.orders):
            go(self.distinct([(m, i) for m, ids in left.items() for i in ids], [order]))
            behind = self.orders[: number + 1]
            for method, ids in left.items():
                rows, _ = self.rows(method, behind)
                alive = [rows[i] for i in ids if rows[i]["status"] == "complete"]
                keep = math.ceil(len(alive) / 2) if number + 1 < len(self.orders) else len(alive)
                best: list[int] = []
                while len(best) < keep:
                    chosen = select([row for row in alive if row["id"] not in best], behind)
                    assert chosen is not None
                    best.append(chosen)
                left[method] = sorted(best)

    # --------------------------------------------------------------------------------------------------------------- results
    def units(self, method: str, orders: Sequence[int]) -> dict[tuple[int, int], dict[str, Any]]:
        """What the ledger holds of a method, by configuration and order."""
        ledger = Ledger(self.ledger)
        read = {(i, order): ledger.read(self.key(method, values, order))
                for i, values in enumerate(self.values[method]) for order in orders}
        return {place: row for place, row in read.items() if row is not None}

    def rows(self, method: str, orders: Sequence[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Configurations and failures of a method."""
        return rows_of(self.values[method], self.units(method, orders), orders)

    def results(self) -> dict[str, Any]:
        """Of every method, as a record holds it."""
        found: dict[str, Any] = {}
        for method in self.options.methods:
            rows, failures = self.rows(method, self.orders)
            space = self.options.space_of(method)
            found[method] = {"options": method_of(method).options, "space": plain_space(space), "paths": list(space),
                             "configurations": rows, "failures": failures, "chosen": select(rows, self.orders)}
        for method in self.options.bounds:
            row = {"id": 0, "values": {}, "status": "unsearched", "orders": []}
            found[method] = {"options": method_of(method).options, "space": {}, "paths": [],
                             "configurations": [row], "failures": [], "chosen": 0}
        return found

    def cost(self) -> dict[str, float]:
        """Streams that were trained, each counted once, and what they took."""
        units = {row["key"]: row for m in self.options.methods for row in self.units(m, self.orders).values()}
        return {"streams": len(units), "seconds": round(math.fsum(row["seconds"] for row in units.values()), 3),
                "cpu_seconds": round(math.fsum(row["cpu_seconds"] for row in units.values()), 3)}

    def for_choice(self, method: str, orders: Sequence[int], i: int, values: Mapping[str, Any]) -> Trial:
        """A configuration on other orders."""
        return replace(self.trial(method, i, values, orders))
