"""Tuning on what one is judged by."""

from __future__ import annotations

from benchmarks.ledger import Arm, Claim, Contrast, Paper
from benchmarks.protocols.two_phase import Scale, optimism

CLAIM = Claim(
    title="Tuning on what one is judged by is optimistic",
    methods=("everbatch.tune",),
    paper=Paper(authors="Cha and Cho", year=2024, ref="arXiv 2403.09066", where="abstract"),
    says="Options chosen on the stream that is reported score better there than on new class orders of it.",
    protocol="30 random configurations, 5 seeds, tuned on one half of a data set's classes and evaluated on the other.",
    scaled="Digits 0-4 to tune on, 5-9 to be judged on; 8 configurations, 2 orders, 8 new orders, 2 methods. The gap is what the "
    "conventional choice gains over the two-phase choice on the same new orders.",
    run=optimism, scale=Scale(), seeds=5, shown=("reported", "two_phase", "optimism", "gap"), minutes=6,
    arms={"DER++": Arm(options={"method": "dark_er_pp"}), "ER": Arm(options={"method": "er"})},
    rule=(Contrast(says="DER++, reported minus new orders", statistic="optimism", weights={"DER++": 1}),
          Contrast(says="ER, reported minus new orders", statistic="optimism", weights={"ER": 1}),
          Contrast(says="DER++, conventional minus two-phase, on new orders", statistic="gap", weights={"DER++": 1},
                   decides=False),
          Contrast(says="ER, conventional minus two-phase, on new orders", statistic="gap", weights={"ER": 1},
                   decides=False)))
