"""A ledger of claims: what papers say of the methods here, run small, with a verdict from a rule written down beforehand.

A claim is one file in `benchmarks/claims`, found by its name. Its cells (arm x seed) are run side by side by
`ledger.runner`, each in a process of one thread, and kept as one JSON file each, named by the hash of everything that
decides its numbers; a cell that is there is not run again, whichever claim or process asks for it.
"""

from benchmarks.ledger.cells import Cell
from benchmarks.ledger.claim import Arm, Claim, Contrast, Paper, Tuning
from benchmarks.ledger.estimate import Estimate, estimate
from benchmarks.ledger.rule import Verdict, verdict

__all__ = ["Arm", "Cell", "Claim", "Contrast", "Estimate", "Paper", "Tuning", "Verdict", "estimate", "verdict"]
