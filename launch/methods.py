"""Write what is made of the table of methods: the README's table, and imports for type checkers.

    python launch/methods.py            rewrite the blocks
    python launch/methods.py --check    change nothing; exit with 1 where a block is old

Works on the checkout that this file lies in.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from everbatch import methods

ROOT = Path(__file__).parents[1]
BLOCKS = {
    "README.md": ("<!-- methods -->\n", "<!-- /methods -->"),
    "lib/everbatch/optim/__init__.py": ("    # <methods>\n", "    # </methods>"),
    "lib/everbatch/train/__init__.py": ("    # <methods>\n", "    # </methods>"),
}
"""Files, and the lines around what is written in them."""


def readme() -> str:
    """Every method, a row each."""
    rows = [["method", "kind", "what it does", "what it costs", "source"], ["---"] * 5]
    for fact in methods.table():
        rows.append([f"`{fact.name}`", f"{fact.family} mixin", fact.does, fact.cost, fact.source])
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def imports(package: str) -> str:
    """The methods of a package, each under its own name."""
    found = []
    for name, key in methods.names(package).items():
        module = methods.TABLE[key].split(":")[0]
        found.append((module, not name.isupper(), name))  # as the linter wants imports sorted
    return "".join(f"    from {module} import {name} as {name}\n" for module, _, name in sorted(found))


def written(path: str, text: str) -> str:
    """The text of a file with its block as it should be."""
    begin, end = BLOCKS[path]
    front, rest = text.split(begin, 1)
    _, back = rest.split(end, 1)
    package = path.removeprefix("lib/").removesuffix("/__init__.py").replace("/", ".")
    block = readme() if path == "README.md" else imports(package)
    return f"{front}{begin}{block}{end}{back}"


def main(check: bool) -> int:
    """Returns the exit code."""
    old = 0
    for path in BLOCKS:
        text = (ROOT / path).read_text()
        new = written(path, text)
        if new == text:
            continue
        old = 1
        print(f"{path}: {'is old; run python launch/methods.py' if check else 'written'}")
        if not check:
            (ROOT / path).write_text(new)
    return old if check else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
