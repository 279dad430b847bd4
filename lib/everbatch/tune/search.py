"""`search`: tune on the one side, and freeze the record. It has one data argument, and nothing that could name the other side."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from everbatch.checkpoint.folder import claimed
from everbatch.distributed import World
from everbatch.errors import check
from everbatch.report.recorder import versions
from everbatch.tune.check import check_npz
from everbatch.tune.drive import Resources, cluster, drive
from everbatch.tune.ledger import canonical, write_atomically
from everbatch.tune.pair import OPENED
from everbatch.tune.plan import Plan, SearchOptions
from everbatch.tune.progress import Board
from everbatch.tune.record import freeze, read
from everbatch.tune.seal import Seal, guard, scrub
from everbatch.tune.spaces import is_rule
from everbatch.tune.stream import flat

__all__ = ["Search", "body_of", "identity", "search"]


@dataclass(frozen=True, kw_only=True)
class Search(SearchOptions):
    """Options of `search`."""

    data: str = "runs/two_phase/tuning"
    """Folder that `prepare` wrote to tune on."""
    output: str | None = None
    """Folder of the ledger and of record.json; by default `search` beside the data."""

    @property
    def folder(self) -> Path:
        """Of the ledger."""
        return Path(self.data).parent / "search" if self.output is None else Path(self.output)


def search(options: Search) -> dict[str, Any]:
    """Run what the ledger lacks, choose, and freeze. The same call starts and resumes.

    Returns:
        The record, with its SHA-256 to be published.

    Raises:
        ValueError: another search in the folder, or a record that is frozen; no configuration that finished.
        LeakageError: evaluation data among the samples.
    """
    seal_path = Path(options.data) / "seal.json"
    seal = Seal.read(seal_path)
    scrub(seal)
    guard(seal)  # before the data is opened, and for good
    check_npz(Path(options.data) / "data.npz", seal.body["data_sha256"], str(seal_path))
    folder, body = options.folder, seal.body
    record = folder / "record.json"
    plan = Plan(options, body["scenario"], body["increments"], body["orders"], str((Path(options.data) / "data.npz").resolve()),
                body["data_sha256"], folder, str(seal_path.resolve()))
    with claimed(folder, World()):
        settle(folder, options)
        if record.exists():
            print(f"search: the record was frozen before; its SHA-256 is {read(record)['sha256']}")
            return read(record)
        write_atomically(folder / "configurations.json", canonical(plan.values))  # all of them, before the first runs
        run(plan, options, folder, "search")
        late = (Path(options.data) / OPENED).exists()
        flags = ["frozen after the evaluation data had been opened"] if late else []
        whole = {**body_of(plan, "two-phase"), "commitment": body["commitment"], "evaluation_orders": body["evaluation_orders"],
                 "flags": flags, "frozen": round(time.time(), 3)}
        digest = freeze(whole, record)
    for name, method in whole["methods"].items():
        print(f"search: {name} chose #{method['chosen']} {method['configurations'][method['chosen']]['values']}")
    print(f"search: frozen in {record}; publish its SHA-256 before the evaluation data is opened:\n{digest}")
    return read(record)


def run(plan: Plan, resources: Resources, folder: Path, title: str) -> None:
    """All rounds of a plan, on Ray."""
    with cluster(resources, folder, [Path(file) for file in (plan.data, plan.seal) if file is not None]) as start:
        plan.run(lambda trials: drive(trials, resources, folder, Board(title), start))


def identity(options: SearchOptions) -> dict[str, Any]:
    """The options of a search that its results depend on, a space by path however it was written."""
    free = {field.name for field in fields(Resources)} | {"data", "output"}
    by_path = {name: flat(given, is_rule) if isinstance(given, Mapping) else given for name, given in options.space.items()}
    known = asdict(replace(options, space=by_path))
    return {name: value for name, value in json.loads(canonical(known)).items() if name not in free}


def settle(folder: Path, options: SearchOptions) -> None:
    """Remember the search of a folder, or refuse another one there."""
    path, asked = folder / "search.json", identity(options)
    if path.exists():
        known = json.loads(path.read_text())
        odd = [name for name in asked if known.get(name) != asked[name]]
        now, then = (", ".join(f"{name}={side.get(name)!r}" for name in odd) for side in (asked, known))
        check(not odd, "tune", f"{now} for a search that began in {str(folder)!r} with {then}", "be the same",
              "name another output")
    write_atomically(path, canonical(asked))


def body_of(plan: Plan, kind: str) -> dict[str, Any]:
    """What a record says of a search."""
    options = identity(plan.options)
    return {"kind": kind, "methods": plan.results(), "orders": plan.orders, "scenario": plan.scenario,
            "increments": plan.increments, "data_sha256": plan.data_sha256, "search": options, "cost": plan.cost(),
            "versions": versions()}
