"""Print the table of methods x hosts, in Markdown, from results of the contract suite alone.

    python tests/contract/table.py RESULT.json [RESULT.json ...]              methods x hosts
    python tests/contract/table.py --pairs RESULT.json [RESULT.json ...]      methods x methods, from a --wide launch

A cell says yes when every check of that method on that host passed, in all files given; how many did, when some failed;
nothing when the method was not run there.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


def table(results: list[dict[str, Any]]) -> str:
    """The table; hosts and methods in the order in which they were met."""
    cells: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for result in results:
        for key, found in result.items():
            if key and " x " not in key:
                _, host, case = key.split("/")
                cells[case.rsplit("-", 1)[0], host].append(found["passed"])
    methods, hosts = (list(dict.fromkeys(pair[i] for pair in cells)) for i in (0, 1))
    rows = [["method", *hosts], ["---"] * (len(hosts) + 1)]
    rows += [[method, *(mark(cells.get((method, host), [])) for host in hosts)] for method in methods]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mark(passed: list[bool]) -> str:
    return "" if not passed else "yes" if all(passed) else f"{sum(passed)} of {len(passed)}"


def pairs(results: list[dict[str, Any]]) -> str:
    """Every two methods: yes when all checks of the two together passed, how many did when some failed, `x` and a number for a
    conflict that is declared when the class is made; the conflicts in full below."""
    from cases import PAIRS

    found: dict[str, list[bool]] = defaultdict(list)
    for result in results:
        for key, value in result.items():
            if " x " in key:
                found[key.split("/")[2].rsplit("-", 1)[0]].append(value["passed"])
    names = list(dict.fromkeys(name for pair in PAIRS for name in pair))
    reasons: list[str] = []

    def cell(a: str, b: str) -> str:
        pair = PAIRS.get((a, b)) or PAIRS.get((b, a))
        if pair is None:
            return ""
        if isinstance(pair, str):
            reason = "both own the perturbation" if "both own the perturbation" in pair else pair
            if reason not in reasons:
                reasons.append(reason)
            return f"x{reasons.index(reason) + 1}"
        return mark(found.get(pair.name, []))

    rows = [["", *names], ["---"] * (len(names) + 1)]
    rows += [[a, *(cell(a, b) for b in names[: i + 1])] + [""] * (len(names) - i - 1) for i, a in enumerate(names)]
    notes = [f"x{i}: {reason}" for i, reason in enumerate(reasons, start=1)]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *notes])


if __name__ == "__main__":
    files = [name for name in sys.argv[1:] if name != "--pairs"]
    if not files:
        sys.exit(__doc__)
    print((pairs if "--pairs" in sys.argv else table)([json.loads(Path(name).read_text()) for name in files]))
