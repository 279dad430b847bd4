"""`python -m benchmarks list | run NAME ... | report [NAME ...]`, with key=value options."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.ledger.cells import Store
from benchmarks.ledger.claim import Claim, claims, find
from benchmarks.ledger.plan import Plan, Settings
from benchmarks.ledger.report import judge, markdown, write
from benchmarks.ledger.rule import Verdict
from benchmarks.ledger.runner import Tally, cores, run_cells
from everbatch.config.strict_yaml import load_text
from everbatch.errors import check, check_real, check_whole, nearest

__all__ = ["carry_out", "main", "run", "split", "usage"]

HOME = "runs/ledger"
OWN = ("results", "jobs", "minutes", "seeds", "arms")


def usage() -> str:
    """What `--help` prints."""
    return f"""python -m benchmarks list [results=DIR]
python -m benchmarks run NAME ... [options] [key=value of the claim's scale]
python -m benchmarks report [NAME ...] [results=DIR]

options of run:
  results=DIR   folder of cells and reports, by default {HOME}; cells found there are not run again
  jobs=N        processes of one thread side by side, by default as many as cores
  minutes=M     start no cell after so long
  seeds=N       by default as many as the claim declares; a verdict needs at least those
  arms=a,b      only these; a verdict needs those that its rule names
  data=DIR      a folder of images (or any source of everbatch.data.load), where the claim has samples
run NAME --help lists the claim's scale."""


def main(argv: Sequence[str] | None = None) -> None:
    """Exit codes: 0; 1 where a cell failed; 2 for what cannot be asked; 130 and 143 after a signal."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Cells are ended with the run; SIGTERM takes the way that Ctrl-C has.
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        code = _main(words)
    except KeyboardInterrupt:
        code = 130
    except (ValueError, ImportError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        code = 2
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # a caller in this process keeps its own
    raise SystemExit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _main(words: Sequence[str]) -> int:
    command, rest = (words[0], words[1:]) if words else ("", [])
    if command in ("", "-h", "--help"):
        print(usage())
        return 0 if command else 2
    known = {"list": _list, "run": _run, "report": _report}
    must = f"be one of {', '.join(known)}"
    check(command in known, "benchmarks", repr(command), must, nearest(command, known))
    names = [word for word in rest if "=" not in word]
    options = dict(word.split("=", 1) for word in rest if "=" in word)
    return known[command](names, options)


def _results(options: Mapping[str, str]) -> Store:
    for key in options:
        check(key == "results", "benchmarks", f"option {key}", "be left out here", nearest(key, ["results"]))
    return Store(Path(options.get("results", HOME)))


# ----------------------------------------------------------------------------------------------------------------------- list
def _list(names: Sequence[str], options: Mapping[str, str]) -> int:
    store = _results(options)
    for name in names:
        find(name)
    rows = [_row(name, claim, store) for name, claim in claims().items() if not names or name in names]
    rows.insert(0, ("name", "verdict", "cells", "minutes", "methods", "source"))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row(name: str, claim: Claim, store: Store) -> tuple[str, ...]:
    said, cells = str(Verdict.NOT_RUN), f"0/{claim.seeds * len(claim.arms_of(claim.scale))}"
    plan, lost = _last(name, claim, store)
    if claim.needs:
        said, cells = f"{said}: needs {claim.needs}", "-"
    elif plan is not None:
        judged = judge(plan)
        said, cells = str(judged.verdict), f"{judged.done}/{judged.total}"
    elif lost:
        said = f"{said} since: {lost}"
    minutes = "-" if claim.needs else f"{claim.minutes:g}"
    return name, said, cells, minutes, ", ".join(claim.methods), str(claim.paper)


def _last(name: str, claim: Claim, store: Store) -> tuple[Plan | None, str]:
    """The claim as it was last run, or why that cannot be told any more."""
    try:
        return Plan.saved(name, claim, store), ""
    except ValueError as error:
        return None, str(error)


# ------------------------------------------------------------------------------------------------------------------------ run
def _run(names: Sequence[str], options: Mapping[str, str]) -> int:
    asked = [name for name in names if name not in ("-h", "--help")]
    check(bool(asked), "benchmarks", "run without a name", "name a claim", "python -m benchmarks list")
    for name in asked:
        find(name)
    if len(asked) < len(names):
        print("\n\n".join(_help(name) for name in asked))
        return 0
    own, scale = split(options)
    minutes = load_text(own.get("minutes", "1e9"))
    check_real("benchmarks", "minutes", minutes, 0.0)
    end, failed = time.monotonic() + 60 * minutes, False
    for name in asked:
        tally = run(name, scale, home=Path(own.get("results", HOME)),
                    jobs=_whole(own, "jobs"), seeds=_whole(own, "seeds"), end=end,
                    arms=own["arms"].split(",") if "arms" in own else None)
        failed = failed or bool(tally.failed)
    return int(failed)


def split(options: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Options of the run, and those of the claim's scale, read as YAML."""
    own = {key: value for key, value in options.items() if key in OWN}
    return own, {key: load_text(value) for key, value in options.items() if key not in OWN}


def _whole(options: Mapping[str, str], name: str) -> int | None:
    if name not in options:
        return None
    value = load_text(options[name])
    check_whole("benchmarks", name, value, 1)
    return int(value)


def run(name: str, options: Mapping[str, Any] | None = None, *, home: Path = Path(HOME), jobs: int | None = None,
        end: float = float("inf"), seeds: int | None = None, arms: Sequence[str] | None = None) -> Tally:
    """Run what of a claim is not there yet, write its report and print it.

    Args:
        name: of the claim.
        options: over the defaults of its scale.
        home: folder of cells and reports.
        jobs: processes side by side; None: as many as cores.
        end: no cell is started after this time of `time.monotonic`.
        seeds: None: as many as the claim declares.
        arms: None: all.

    Raises:
        ValueError: options that the claim has not, or a claim that cannot run yet.
    """
    claim, store = find(name), Store(home)
    check(not claim.needs, name, "a claim that cannot run yet", f"have {claim.needs} first")
    jobs = cores() if jobs is None else jobs
    check_whole("benchmarks", "jobs", jobs, 1)
    plan = Plan.of(name, claim, Settings.of(claim, options, seeds=seeds, arms=arms), store)
    return carry_out(plan, jobs=jobs, end=end)


def carry_out(plan: Plan, *, jobs: int, end: float = float("inf")) -> Tally:
    """`run`, of a claim at settled options."""
    plan.save()

    def say(text: str) -> None:
        print(text, flush=True)

    tally = run_cells(plan.tuning(), plan.store, jobs=jobs, end=end, say=say)
    cells = plan.compared()
    if cells is not None:
        tally = tally.add(run_cells(cells, plan.store, jobs=jobs, end=end, say=say))
    judged = judge(plan)
    path = write(judged)
    print(f"\n{markdown(judged)}\n{judged.done} of {judged.total} cells, {tally.ran} of them now"
          f"{f', {len(tally.failed)} failed' if tally.failed else ''}; see {path}", flush=True)
    return tally


def _help(name: str) -> str:
    claim = find(name)
    if claim.needs:
        return f"{name}: {claim.says}\n  not there yet: {claim.needs}"
    lines = [f"{name}: {claim.says}", f"  arms: {', '.join(claim.arms_of(claim.scale))}; {claim.seeds} seeds; scale:"]
    return "\n".join([*lines, *(f"  {f.name}={getattr(claim.scale, f.name)}" for f in fields(claim.scale))])


# --------------------------------------------------------------------------------------------------------------------- report
def _report(names: Sequence[str], options: Mapping[str, str]) -> int:
    """Reports of the claims asked for, all by default, and one file of all of them."""
    store, texts, rows = _results(options), [], []
    for name in names:
        find(name)
    for name, claim in claims().items():
        if names and name not in names:
            continue
        plan, lost = _last(name, claim, store)
        if plan is None:
            why = f": needs `{claim.needs}`" if claim.needs else f" since: {lost}" if lost else ""
            rows.append(f"| {name} | {Verdict.NOT_RUN}{why} | {claim.says} | {claim.paper} |")
            continue
        judged = judge(plan)
        write(judged)
        rows.append(f"| [{name}]({name}/report.md) | {judged.verdict} | {claim.says} | {claim.paper} |")
        texts.append(markdown(judged))
    head = "# Ledger of claims\n\n| claim | verdict | in words | source |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    (store.home / "report.md").write_text(head)
    print("\n".join([head, *texts]))
    return 0
