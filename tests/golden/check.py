"""Hold the library against golden vectors: `python tests/golden/check.py DIR [--json]`.

Checks every .npz file in DIR whose prefix it knows. Exit code 0: all of those passed, and there was at least one.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

# As a script: this checkout's library and tests, installed or not.
sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "lib"), str(Path(__file__).resolve().parents[1])]

from golden.comparison import Comparison, FormatError, NotYet, Result, Vectors  # noqa: E402
from golden.families import FAMILIES, family_of  # noqa: E402

__all__ = ["check_file", "check_folder", "main"]


def check_file(path: Path) -> Result:
    """Check one file; whatever goes wrong with it is its result."""
    family = family_of(path.name)
    if family is None:
        return Result(path.name, "unknown", "no family of this prefix")
    try:
        file = Vectors(path)
    except Exception as error:  # numpy, zipfile and zlib raise many kinds for a damaged file
        return Result(path.name, "fail", f"cannot be read: {_text(error)}")
    compare = Comparison()
    try:
        with warnings.catch_warnings():
            # Some references run into what the library warns of, such as a task that finds too few free weights.
            warnings.simplefilter("ignore", UserWarning)
            family(file, compare)
    except NotYet as reason:
        return Result(path.name, "unknown", str(reason))
    except Exception as error:  # one file that the library refuses must not hide the others
        return Result(path.name, "fail", _text(error))
    if not compare.count:
        return Result(path.name, "fail", "nothing in it to compare")
    return Result(path.name, "pass" if compare.error <= 1 else "fail").measured(compare, file.unused)


def check_folder(folder: Path) -> list[Result]:
    """Check the .npz files of a folder, by name."""
    return [check_file(path) for path in sorted(folder.glob("*.npz"))]


def _text(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, FormatError) else f"{type(error).__name__}: {text}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Hold everbatch against the golden vectors in a folder.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with .npz files in the documented formats")
    parser.add_argument("--json", action="store_true", help="print a list of objects, one per file, instead of lines")
    options = parser.parse_args(argv)
    if not options.folder.is_dir():
        print(f"check.py: {options.folder} is no folder, must be one with .npz files", file=sys.stderr)
        return 2
    results = check_folder(options.folder)
    counts = {status: sum(r.status == status for r in results) for status in ("pass", "fail", "unknown")}
    if options.json:
        print(json.dumps([result.plain() for result in results], indent=1))
    else:
        for result in sorted(results, key=lambda r: r.status == "unknown"):
            print(result.line())
        print(f"{len(results)} files: {counts['pass']} passed, {counts['fail']} failed, "
              f"{counts['unknown']} not known yet")
    if not counts["pass"] and not counts["fail"]:
        print(f"check.py: {options.folder} holds no file that can be checked; known prefixes: {', '.join(FAMILIES)}",
              file=sys.stderr)
        return 2
    return 1 if counts["fail"] else 0


if __name__ == "__main__":
    sys.exit(main())
