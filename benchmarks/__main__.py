"""`python -m benchmarks`, from the root of the repository."""

from __future__ import annotations

from benchmarks.ledger.command import main

if __name__ == "__main__":
    main()
