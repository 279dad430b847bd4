"""`evaluate` and `conventional`: the other side is opened once, for what a frozen record chose."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everbatch.checkpoint.folder import claimed
from everbatch.distributed import World
from everbatch.errors import check
from everbatch.tune.drive import Resources, cluster, drive
from everbatch.tune.ledger import Ledger, canonical, write_atomically
from everbatch.tune.pair import OPENED, EvaluationData, commitment
from everbatch.tune.plan import Plan, SearchOptions
from everbatch.tune.progress import Board
from everbatch.tune.record import freeze, read, verify, verify_against
from everbatch.tune.report import report
from everbatch.tune.search import body_of

__all__ = ["Conventional", "Evaluate", "conventional", "evaluate", "results"]

RESULTS = "results.jsonl"


@dataclass(frozen=True, kw_only=True)
class Evaluate(Resources):
    """Options of `evaluate`."""

    record: str = "runs/two_phase/search/record.json"
    """The frozen record."""
    data: str = "runs/two_phase/evaluation"
    """Folder that `prepare` wrote for the evaluation."""
    nonce: str | None = None
    """Where the nonce is; by default in that folder."""
    orders: tuple[int, ...] = ()
    """Some of the declared orders, to run now; by default all. Until all have run, the evaluation is incomplete, and says so."""
    amend: bool = False
    """Evaluate a second record for a method that was evaluated before; marks every result."""


@dataclass(frozen=True, kw_only=True)
class Conventional(Resources):
    """Options of `conventional`."""

    data: str = "runs/two_phase/evaluation"
    """Folder that `prepare` wrote for the evaluation, after `evaluate`."""
    nonce: str | None = None
    """Where the nonce is; by default in that folder."""


def evaluate(options: Evaluate) -> dict[str, Any]:
    """Verify the record, open the evaluation data, run what was chosen on the declared orders. The same call resumes.

    Returns:
        {"complete": bool, "rows": the rows of RESULTS, "flags": ...}

    Raises:
        ValueError: a record that was changed, is of another pair or kind, or does not select what it says; an order that was not
            declared; another record for a method that was evaluated before, without `amend`.
    """
    record = read(options.record)
    body = verify(record)
    data = EvaluationData(options.data, options.nonce)
    plan = data.plan
    verify_against(body, plan, commitment(data.nonce(), plan["data_sha256"], plan))
    for order in options.orders:
        check(order in plan["evaluation_orders"], "evaluate", f"order {order}",
              f"be one of those declared, {plan['evaluation_orders']}", "orders are chosen before tuning, not after")
    with claimed(data.folder, World()):
        state = _open(data, record, body, options.amend)
        search = search_of(body, options)
        whole = plan_on(data, search)
        orders = [order for order in plan["evaluation_orders"] if not options.orders or order in options.orders]
        with cluster(options, data.folder, [Path(whole.data)]) as start:
            _judge(whole, record, orders, start)
    found = results(data.folder)
    complete = not missing_orders(found, record, plan["evaluation_orders"])
    flags = [*body["flags"], *state["flags"]]
    for flag in flags:
        print(f"evaluate: {flag}")
    print(report(record, None, found, data.folder))
    if not complete:
        print(f"evaluate: incomplete, of {len(plan['evaluation_orders'])} declared orders some have not run")
    return {"complete": complete, "rows": found, "flags": flags}


def plan_on(data: EvaluationData, search: SearchOptions) -> Plan:
    """A plan on the evaluation data, which is open by then."""
    plan, path = data.plan, str(data.open().resolve())
    return Plan(search, plan["scenario"], plan["increments"], plan["orders"], path, plan["data_sha256"], data.folder)


def search_of(body: Mapping[str, Any], resources: Resources) -> SearchOptions:
    """The search that a record describes, with the resources of this call."""
    listed = {name: tuple(value) if isinstance(value, list) else value for name, value in body["search"].items()}
    own = {name: getattr(resources, name) for name in Resources.__dataclass_fields__}
    return SearchOptions(**{**listed, **own})


def _open(data: EvaluationData, record: Mapping[str, Any], body: Mapping[str, Any], amend: bool) -> dict[str, Any]:
    """Write down that the data is opened, by whom and when, before it is; on both sides."""
    path = data.folder / OPENED
    state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"records": [], "flags": []}
    digest = record["sha256"]
    earlier = [known for known in state["records"] if known["sha256"] != digest and {*known["methods"]} & {*body["methods"]}]
    if digest not in [known["sha256"] for known in state["records"]]:
        names = sorted({name for known in earlier for name in known["methods"]} & {*body["methods"]})
        check(not earlier or amend, "evaluate", f"a second record ({digest[:12]}) for {', '.join(names)} on this pair",
              f"be the first ({earlier[0]['sha256'][:12] if earlier else ''})", "amend=true evaluates it and marks every result")
        state["records"].append({"sha256": digest, "methods": sorted(body["methods"]), "time": round(time.time(), 3)})
        if earlier:
            state["flags"].append(f"amended: evaluated again for {', '.join(names)}, after results were known")
        if body["frozen"] > state["records"][0]["time"]:
            state["flags"].append("tuned again: the record was frozen after the evaluation data had been opened")
        write_atomically(path, canonical(state))
        write_atomically(data.folder / "records" / f"{digest}.json", canonical(record))
    tuning = Path(data.plan["tuning_folder"])
    if tuning.is_dir() and not (tuning / OPENED).exists():
        write_atomically(tuning / OPENED, canonical({"time": state["records"][0]["time"]}))
    return state


def _judge(plan: Plan, record: Mapping[str, Any], orders: Sequence[int], start: Callable[[], Any]) -> None:
    """Run what a record chose on some orders, and add the rows that are not there yet."""
    body, digest, folder = record["body"], record["sha256"], plan.ledger
    protocol, resources = body["kind"], plan.options
    judged = {name: method for name, method in body["methods"].items() if protocol == "two-phase" or method["space"]}
    chosen = {name: (i := method["chosen"], method["configurations"][i]["values"]) for name, method in judged.items()}
    trials = [plan.trial(name, i, values, [order]) for name, (i, values) in chosen.items() for order in orders]
    if resources.again:
        Ledger(folder).forget_failures([key for trial in trials for _, key in trial.units])
    distinct = list({trial.units[0][1]: trial for trial in trials}.values())
    title = "evaluate" if protocol == "two-phase" else "conventional, on the new orders"
    drive(distinct, resources, folder, Board(title, choosing=False), start)
    amended = bool(json.loads((folder / OPENED).read_text())["records"][1:])
    known = {(row["protocol"], row["method"], row["order"], row["record"]) for row in results(folder) if "failed" not in row}
    for trial in trials:
        (order, key), = trial.units
        if (protocol, trial.method, order, digest) in known:
            continue
        unit = Ledger(folder).read(key) or {"failed": "died", "cause": "no unit", "seconds": 0.0, "cpu_seconds": 0.0}
        kept = ("avg_acc", "acc", "accuracies", "failed", "cause", "seconds", "cpu_seconds")
        _add(folder, {"protocol": protocol, "method": trial.method, "configuration": trial.id, "order": order,
                      **{name: unit[name] for name in kept if name in unit}, "record": digest, "amended": amended})


def _add(folder: Path, row: Mapping[str, Any]) -> None:
    """One line more; those before stay as they are."""
    with (folder / RESULTS).open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        cut_off = file.read() not in (b"", b"\n")
        file.write((b"\n" if cut_off else b"") + canonical(row) + b"\n")


def results(folder: Path) -> list[dict[str, Any]]:
    """Rows of the evaluation; of one that failed and was run again the newest. A last line that a kill cut off is left out."""
    path, found = folder / RESULTS, {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["protocol"], row["method"], row["order"], row["record"]] = row
    return list(found.values())


def missing_orders(rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any], orders: Sequence[int]) -> list[int]:
    """Declared orders on which some method of a two-phase record has not run."""
    there = {(row["method"], row["order"]) for row in rows if row["record"] == record["sha256"]}
    return [order for order in orders if any((name, order) not in there for name in record["body"]["methods"])]


def conventional(options: Conventional) -> dict[str, Any]:
    """Search on the evaluation data itself, as is usual, and judge its choice on the same new orders; after the evaluation alone.

    Raises:
        ValueError: the evaluation is not complete.
    """
    data = EvaluationData(options.data, options.nonce)
    plan, folder = data.plan, data.folder
    opened = folder / OPENED
    state = json.loads(opened.read_text()) if opened.exists() else {"records": []}
    check(bool(state["records"]), "conventional", "no evaluation", "come after `evaluate`",
          "what is learned on the evaluation data must not reach the choice that it judges")
    record = read(folder / "records" / f"{state['records'][-1]['sha256']}.json")
    body = verify(record)
    gone = missing_orders(results(folder), record, plan["evaluation_orders"])
    check(not gone, "conventional", f"an evaluation without orders {gone}", "come after the whole evaluation",
          "run `evaluate` first")
    with claimed(folder, World()):
        search = plan_on(data, search_of(body, options))
        path = folder / (f"conventional-{record['sha256'][:12]}.json" if state["records"][1:] else "conventional.json")
        with cluster(options, folder, [Path(search.data)]) as start:
            if not path.exists():
                search.run(lambda trials: drive(trials, options, folder, Board("conventional"), start))
                whole = {**body_of(search, "conventional"), "commitment": body["commitment"], "flags": [],
                         "evaluation_orders": plan["evaluation_orders"], "frozen": round(time.time(), 3)}
                freeze(whole, path)
            mine = read(path)
            verify(mine, "conventional")
            _judge(search, mine, plan["evaluation_orders"], start)
    print(report(record, mine, results(folder), folder))
    return {"record": mine, "rows": results(folder), "two_phase": record}
