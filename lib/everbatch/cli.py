"""The `everbatch` command: which version is installed, and beside what. Training is started by the recipes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from everbatch.version import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="everbatch", description="Information about the installation. To train, run a script of recipes/.",
    )
    parser.add_argument("--version", action="version", version=f"everbatch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("versions", help="versions of everbatch and of what it builds on, as every run records them")
    parser.parse_args(argv)
    from everbatch.report.recorder import versions

    for name, version in versions().items():
        print(f"{name:<14} {version or '-'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
