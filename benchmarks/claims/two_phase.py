"""Two-phase tuning, not there yet."""

from __future__ import annotations

from benchmarks.ledger import Claim, Paper

CLAIM = Claim(
    title="Tuning on what one is judged by is optimistic",
    methods=("everbatch.tune",),
    paper=Paper(authors="Cha and Cho", year=2024, ref="arXiv 2403.09066", where="abstract"),
    says="Options chosen on the stream that is reported score better there than on new class orders of it.",
    protocol="30 random configurations, 5 seeds, tuned on one half of a data set's classes and evaluated on the other.",
    needs="everbatch.tune.TwoPhase")
