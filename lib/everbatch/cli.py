"""The `everbatch` command: what is installed, and which methods there are. Training is started by the recipes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from everbatch.version import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="everbatch",
        description="Information about the installation, and two-phase tuning. To train, run a script of recipes/.",
    )
    parser.add_argument("--version", action="version", version=f"everbatch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("versions", help="versions of everbatch and of what it builds on, as every run records them")
    listed = commands.add_parser("methods", help="every method: its key and name in recipes, class, family, cost and source")
    listed.add_argument("--json", action="store_true", help="with descriptions and search spaces, as JSON")
    commands.add_parser("tune", add_help=False, help="two-phase tuning: tune prepare, search, evaluate, conventional")
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["tune"]:  # its options are key=value, as those of a recipe
        from everbatch.tune.commands import main as tune

        return tune(words[1:])
    chosen = parser.parse_args(words)
    if chosen.command == "methods":
        return _methods(as_json=chosen.json)
    from everbatch.report.recorder import versions

    for name, version in versions().items():
        print(f"{name:<14} {version or '-'}")
    return 0


def _methods(*, as_json: bool) -> int:
    """Print the table of methods."""
    from everbatch import methods
    from everbatch.experiment import named

    found, makes = methods.table(), {key: named.made_by(key) for key in methods.TABLE}
    if as_json:
        rows = [{**dataclasses.asdict(fact), "makes": makes[fact.key], "search": methods.search_space([fact.key])}
                for fact in found]
        print(json.dumps(rows, indent=1, default=_plain))
        return 0
    print(f"{'key':<20} {'class':<19} {'family':<10} {f'method= (or {named.NOTHING})':<24} {'cost':<60} source")
    for fact in found:
        cost = textwrap.shorten(fact.cost, 60, placeholder=" ...")
        made = " ".join(makes[fact.key]) or "-"
        print(f"{fact.key:<20} {fact.name:<19} {fact.family:<10} {made:<24} {cost:<60} {fact.source}")
    return 0


def _plain(value: Any) -> Any:
    """A range of a search space as JSON has it."""
    return dataclasses.asdict(value)


if __name__ == "__main__":
    raise SystemExit(main())
