"""Print the table of methods x hosts, in Markdown, from results of the contract suite alone.

    python tests/contract/table.py RESULT.json [RESULT.json ...]

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
            if key:
                _, host, case = key.split("/")
                cells[case.rsplit("-", 1)[0], host].append(found["passed"])
    methods, hosts = (list(dict.fromkeys(pair[i] for pair in cells)) for i in (0, 1))
    rows = [["method", *hosts], ["---"] * (len(hosts) + 1)]
    rows += [[method, *(mark(cells.get((method, host), [])) for host in hosts)] for method in methods]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mark(passed: list[bool]) -> str:
    return "" if not passed else "yes" if all(passed) else f"{sum(passed)} of {len(passed)}"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print(table([json.loads(Path(name).read_text()) for name in sys.argv[1:]]))
