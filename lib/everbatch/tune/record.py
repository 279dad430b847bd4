"""The record of a search: all it saw, what that selects, and a checksum to publish before the evaluation data is opened."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everbatch.declared import Range
from everbatch.errors import check
from everbatch.tune.ledger import canonical, sha256, write_atomically
from everbatch.tune.spaces import Values, draw_all, method_of, space_from

__all__ = ["freeze", "read", "rows_of", "select", "verify", "verify_against"]

KINDS = ("two-phase", "conventional")


def select(configurations: Sequence[Mapping[str, Any]], orders: Sequence[int]) -> int | None:
    """The id of the best complete configuration; None without any.

    By mean average incremental accuracy over the orders, then mean last accuracy, then less time, then the lower id.
    """
    ranked = []
    for row in configurations:
        done = {unit["order"]: unit for unit in row["orders"]}
        if row["status"] == "complete" and sorted(done) == sorted(orders):
            score = [_mean(done, orders, name) for name in ("avg_acc", "acc", "seconds")]
            ranked.append((-score[0], -score[1], score[2], row["id"]))
    return min(ranked)[3] if ranked else None


def _mean(done: Mapping[int, Mapping[str, Any]], orders: Sequence[int], name: str) -> float:
    return math.fsum(done[order][name] for order in orders) / len(orders)


def rows_of(
    values: Sequence[Mapping[str, Any]], units: Mapping[tuple[int, int], Mapping[str, Any]], orders: Sequence[int],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The configurations and the failures of one method.

    Args:
        values: of each configuration, by id. units: by (id, order). orders: of the search.
    """
    rows, failures = [], []
    for i, chosen in enumerate(values):
        found = [units[i, order] for order in orders if (i, order) in units]
        bad = [unit for unit in found if "failed" in unit]
        good = [{name: unit[name] for name in ("order", "avg_acc", "acc", "accuracies", "seconds", "cpu_seconds")}
                for unit in found if "failed" not in unit]
        status = "failed" if bad else "complete" if len(good) == len(orders) else "raced_out"
        rows.append({"id": i, "values": dict(chosen), "status": status, "orders": good})
        failures += [{"id": i, **{name: unit[name] for name in ("order", "failed", "cause")}} for unit in bad]
    return rows, failures


def freeze(body: Mapping[str, Any], path: Path) -> str:
    """Write a record with its checksum, which is returned. A record that is there already stays.

    Raises:
        ValueError: another record in its place; a method without any complete configuration.
    """
    for name, method in body["methods"].items():
        first = [f": {f['cause']} (configuration {f['id']}, order {f['order']})" for f in method["failures"][:1]]
        none = f"none of {len(method['configurations'])} configurations of {name} finished its orders"
        check(method["chosen"] is not None, "tune", none + "".join(first), "be at least one",
              "see the failures in the ledger; mend their cause and run the same command with again=true")
    digest = sha256(body)
    if path.exists():
        known = read(path)["sha256"]
        check(known == digest, "tune", f"another record ({known[:12]}) in {str(path)!r}", "be frozen once", "name another output")
    write_atomically(path, canonical({"body": body, "sha256": digest}))
    return digest


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A record whose checksum is right.

    Raises:
        ValueError: no such file, no record, or one that was changed after it was frozen.
    """
    check(Path(path).is_file(), "record", f"no file {str(path)!r}", "be what `search` froze")
    try:
        record = json.loads(Path(path).read_text(), parse_constant=_refuse)
        body, said = record["body"], record["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"record: {str(path)!r} cannot be read ({type(error).__name__}), must be what `search` froze") from None
    real = sha256(body)
    check(said == real, "record", f"checksum {real[:12]}, where it says {str(said)[:12]}", "be as it was frozen",
          "it was changed since")
    return {"body": body, "sha256": said}


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} in a record")


def verify(record: Mapping[str, Any], kind: str = "two-phase") -> dict[str, Any]:
    """The body of a record that does not contradict itself.

    Its methods are those of its search, with the options that their names stand for; its configurations are what its seed draws;
    their scores are those of their accuracies, and select its choice.

    Who forges accuracies, scores, choice and checksum together passes here, and is caught by the published SHA-256 alone.

    Raises:
        ValueError: anything else.
    """
    body: dict[str, Any] = record["body"]
    check(body.get("kind") == kind, "record", f"a record of kind {body.get('kind')!r}", f"be a {kind} record",
          "a search on the evaluation data chooses nothing that may be judged on it" if kind == "two-phase" else "")
    try:
        _check_methods(body)
        for name, method in body["methods"].items():
            if not method["space"]:
                bound = {"values": {}, "status": "unsearched", "orders": [], "id": 0}
                check(method["chosen"] == 0 and method["configurations"] == [bound] and not method["failures"], "record",
                      f"{name}, which is not searched, with chosen values", "have none")
                continue
            again = select(method["configurations"], body["orders"])
            check(method["chosen"] == again, "record", f"configuration {method['chosen']} chosen for {name}",
                  f"be {again}, which its scores select")
            _check_scores(name, method, body["orders"])
            _check_drawn(name, method, body["search"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"record: a body that lacks {error} or has it in another form, must be what `search` froze") from None
    return body


def _check_methods(body: Mapping[str, Any]) -> None:
    """What was searched, what stands beside it, and what each of them is."""
    searched, bounds = body["search"]["methods"], body["search"]["bounds"]
    check(sorted(body["methods"]) == sorted([*searched, *bounds]), "record", f"methods {', '.join(sorted(body['methods']))}",
          f"be {', '.join(sorted([*searched, *bounds]))}, as its search says")
    for name, method in body["methods"].items():
        known = method_of(name).options
        check(method["options"] == known, "record", f"options {method['options']} of {name}", f"be {known}")
        found, must = ("with", "be a bound") if method["space"] else ("without", "be searched")
        check(bool(method["space"]) == (name in searched), "record", f"{name} {found} a space", f"{must}, as its search says")


def _check_scores(name: str, method: Mapping[str, Any], orders: Sequence[int]) -> None:
    """Every configuration's orders, status and scores, to the last bit."""
    failed = {failure["id"] for failure in method["failures"]}
    for row in method["configurations"]:
        who, units = f"configuration {row['id']} of {name}", row["orders"]
        listed = [unit["order"] for unit in units]
        check(listed == [order for order in orders if order in listed], "record", f"orders {listed} of {who}",
              f"be those of the search, {list(orders)}, each once")
        status = "failed" if row["id"] in failed else "complete" if listed == list(orders) else "raced_out"
        check(row["status"] == status, "record", f"status {row['status']!r} of {who}",
              f"be {status!r}, as its orders and failures say")
        for unit in units:
            where, scores = f"of order {unit['order']} of {who}", unit.get("accuracies")
            good = isinstance(scores, list) and bool(scores) and all(_is_share(score) for score in scores)
            check(good, "record", f"accuracies {scores} {where}", "be numbers from 0 to 1")
            check(unit["avg_acc"] in _means(scores), "record", f"avg_acc={unit['avg_acc']} {where}",
                  f"be the mean of its accuracies, {_means(scores)[0]}")
            check(unit["acc"] == scores[-1], "record", f"acc={unit['acc']} {where}",
                  f"be the last of its accuracies, {scores[-1]}")


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _means(scores: Sequence[float]) -> tuple[float, float]:
    """What `sum` makes of them, which from Python 3.12 on carries what rounding takes away."""
    plain = 0.0
    for score in scores:
        plain += score
    return plain / len(scores), math.fsum(scores) / len(scores)


def _check_drawn(name: str, method: Mapping[str, Any], search: Mapping[str, Any]) -> None:
    """Whether the seed draws these configurations; of what was proposed instead, whether it lies in the space."""
    rows = method["configurations"]
    check([row["id"] for row in rows] == list(range(search["trials"])), "record", f"{len(rows)} configurations of {name}",
          f"be {search['trials']}, numbered from 0")
    check(sorted(method["space"]) == sorted(method["paths"]), "record", f"paths {method['paths']} of {name}", "be its space")
    space = space_from({path: method["space"][path] for path in method["paths"]}, "record")
    if search["searcher"] == "random":
        drawn = draw_all(space, search["seed"], search["trials"])
        odd = [row["id"] for row, values in zip(rows, drawn, strict=True) if row["values"] != values]
        must = "be those that its seed draws from its space"
    else:
        odd, must = [row["id"] for row in rows if not _inside(row["values"], space)], "lie in its space"
    check(not odd, "record", f"configurations {odd[:5]} of {name}", must)


def _inside(values: Mapping[str, Any], space: Mapping[str, Values]) -> bool:
    return values.keys() == space.keys() and all(
        given.low <= values[path] <= given.high if isinstance(given, Range) else values[path] in given
        for path, given in space.items())


def verify_against(body: Mapping[str, Any], plan: Mapping[str, Any], commitment: str) -> None:
    """Refuse a record of another pair, or of another scenario than that of the evaluation.

    Args:
        body: of the record. plan: of the evaluation data. commitment: what the nonce and the data give.

    Raises:
        ValueError: saying what differs.
    """
    check(body["commitment"] == commitment, "record", f"a search that was committed to other evaluation data "
          f"({body['commitment'][:12]})", f"be committed to this ({commitment[:12]})")
    for name in ("increments", "orders", "evaluation_orders"):
        check(body[name] == plan[name], "record", f"{name}={body[name]}", f"be {plan[name]}, as prepared")
    ours, theirs = plan["scenario"], body["scenario"]
    odd = sorted(path for path in {*ours, *theirs} if ours.get(path) != theirs.get(path))
    check(not odd, "record", ", ".join(f"{path}={theirs.get(path)!r}" for path in odd) + " in the tuning scenario",
          f"be {', '.join(repr(ours.get(path)) for path in odd)}, as in the evaluation")
