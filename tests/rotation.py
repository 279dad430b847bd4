"""Tests that take turns: what this run leaves out, one of the next has in it.

A rotated test stands at a place of a list whose members take so many turns. A run has a round, by default the number of
commits up to HEAD, so that a commit always runs the same tests, and in a round one turn is due:

    @pytest.mark.parametrize("host", [When(i, 4).param(h) for i, h in enumerate(HOSTS)])

EVERBATCH_ROUND=N fixes the round, EVERBATCH_ROUND=all runs every turn. `Coverage` writes down when each test last ran.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import random
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "EVERBATCH_ROUND"
SEVERAL = "mark.distributed"
"""What a file says that has tests of several ranks."""
Round = int | None
"""None: every turn is due."""


def default_round() -> int:
    """The number of commits up to HEAD; the day where there is no history to count."""
    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
        except OSError:
            return ""

    if git("rev-parse", "--is-shallow-repository") == "false":
        return int(git("rev-list", "--count", "HEAD") or 0)
    return datetime.date.today().toordinal()


def parse_round(text: str | None) -> Round:
    if not text:
        return default_round()
    if text == "all":
        return None
    if not text.isdecimal():
        raise pytest.UsageError(f"{VARIABLE}={text!r}, must be a whole number or all")
    return int(text)


ROUND = parse_round(os.environ.get(VARIABLE))


@functools.cache
def turn(round: int, turns: int) -> int:
    """The turn that is due. Every `turns` rounds make a cycle in which each turn comes once, in an order of the cycle's own: so
    whoever runs every second or every seventh round only meets all of them as well."""
    cycle, place = divmod(round, turns)
    order = list(range(turns))
    random.Random(f"{turns}/{cycle}").shuffle(order)
    return order[place]


def due(place: int, turns: int, round: Round = ROUND) -> bool:
    """Whether what stands at `place` of a list of so many turns runs in a round."""
    return round is None or place % turns == turn(round, turns)


@dataclass(frozen=True)
class When:
    """The rounds in which something runs."""

    place: int = 0
    turns: int = 1
    """1: in every round."""
    slow: bool = False
    """With the mark `slow`."""

    def due(self, round: Round) -> bool:
        return due(self.place, self.turns, round)

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        turns = [pytest.mark.rotated(self.place, self.turns)] if self.turns > 1 else []
        return [*turns, *[pytest.mark.slow] * self.slow]

    def param(self, *values: object, id: str | None = None) -> Any:
        """The values of a test that runs then."""
        return pytest.param(*values, id=id, marks=self.marks)


def in_turn(values: Iterable[str], turns: int) -> dict[str, When]:
    """Each of these in one of so many rounds."""
    return {value: When(place % turns, turns) for place, value in enumerate(values)}


def hosts_in_turn(when: dict[str, When], hosts: Iterable[str]) -> pytest.MarkDecorator:
    """A test of each of these hosts, when the launch that it reads has it."""
    return pytest.mark.parametrize("host", [when[host].param(host) for host in hosts])


def split(items: Iterable[pytest.Item], round: Round = ROUND) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Tests of this round, and those that wait for another."""
    now: list[pytest.Item] = []
    later: list[pytest.Item] = []
    for item in items:
        marker = item.get_closest_marker("rotated")
        (now if marker is None or due(*marker.args, round=round) else later).append(item)
    return now, later


def unread(path: Path, wanted: str) -> bool:
    """Whether only tests of several ranks are wanted (`-m`) and a file has none, as its text tells: it need not be imported."""
    if not (wanted.endswith("and distributed") and path.match("test_*.py")):
        return False
    return SEVERAL not in path.read_text()


class Coverage:
    """When each rotated test last ran: a JSON file of {test: {"round", "when", "outcome"}}, or null for one that never did.

    Args:
        path: of the file; what it holds stays.
        prune: drop tests that were not met, since all there are were, but for those of files that are `unread`.
        wanted: see `unread`.
    """

    def __init__(self, path: Path, *, prune: bool = False, wanted: str = "") -> None:
        self.path = path
        self.prune = prune
        self.wanted = wanted
        self.known: set[str] = set()
        """Rotated tests that were met, whether they are due or not."""
        self.ran: dict[str, dict[str, str | int]] = {}

    def meet(self, items: Iterable[pytest.Item]) -> None:
        self.known.update(item.nodeid for item in items if item.get_closest_marker("rotated"))

    def note(self, test: str, outcome: str, round: Round = ROUND) -> None:
        when = datetime.datetime.now().isoformat(timespec="seconds")
        self.ran[test] = {"round": "all" if round is None else round, "when": when, "outcome": outcome}

    def write(self) -> str:
        """Bring the file up to date; returns what it says in a line."""
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        if self.prune and self.known:
            kept = {test: last for test, last in kept.items() if test in self.known or self._unread(test)}
        now = {test: None for test in self.known} | kept | self.ran
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(now, indent=1, sort_keys=True))
        os.replace(partial, self.path)
        never = sum(last is None for last in now.values())
        return f"{len(self.ran)} of {len(now)} rotated tests ran, {never} never did so far; see {self.path}"


    def _unread(self, test: str) -> bool:
        path = ROOT / test.partition("::")[0]
        return path.exists() and unread(path, self.wanted)


class Rotation:
    """Leaves out what is not due, says which round this is, and writes down what ran."""

    def __init__(self, config: pytest.Config) -> None:
        everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.getoption("ignore")
        folder = config.rootpath / ".pytest_cache"
        if config.pluginmanager.has_plugin("cacheprovider"):
            folder = config.cache.mkdir("everbatch")
        self.coverage = Coverage(folder / "rotation.json", prune=everything, wanted=config.option.markexpr)

    def pytest_ignore_collect(self, collection_path: Path, config: pytest.Config) -> bool | None:
        return unread(collection_path, config.option.markexpr) or None

    def pytest_report_header(self) -> str:
        told = "all" if ROUND is None else str(ROUND)
        return (f"rotation: round {told} ({VARIABLE}=N repeats round N, =all runs every turn); "
                f"when each test last ran: {self.coverage.path}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.coverage.meet(items)  # before -m and -k take some away
        several = (item for item in items if item.get_closest_marker("distributed"))
        silent = sorted({item.path for item in several if unread(item.path, "and distributed")})
        if silent:
            raise pytest.UsageError(f"tests of several ranks in files without the words {SEVERAL}: {silent}")
        items[:], later = split(items)
        if later:
            config.hook.pytest_deselected(items=later)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and "rotated" in report.keywords:
            self.coverage.note(report.nodeid, report.outcome)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Tests that run side by side are met in the workers, and written down by the process that started those."""
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["rotated"] = sorted(self.coverage.known)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.coverage.known.update(getattr(node, "workeroutput", {}).get("rotated", ()))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.coverage.ran:
            terminalreporter.write_line(f"rotation: {self.coverage.write()}")
