"""StaleSAM against SAM and SGD."""

from __future__ import annotations

from benchmarks.ledger import Arm, Claim, Contrast, Paper, Tuning
from benchmarks.protocols.classify import Scale, train

CLAIM = Claim(
    title="A stale ascent direction does what SAM's second pass does",
    methods=("StaleSAM", "LookSAM", "SAM"),
    paper=Paper(authors="Foret et al.", year=2021, ref="arXiv 2010.01412", where="table 1; the stale direction is our own"),
    says="StaleSAM, with one pass a step, is no worse than SAM by half a point and better than SGD.",
    protocol="None published for StaleSAM: SAM's, accuracy at equal epochs against SGD.",
    scaled="Digits, a convolutional net, 20 epochs; each method's rho chosen on a part cut from the training samples.",
    run=train, scale=Scale(), seeds=12, shown=("passes", "step_ms"), minutes=3,
    arms={"SGD": Arm(options={"method": "SGD"}), "SAM": Arm(options={"method": "SAM"}),
          "LookSAM k=5": Arm(options={"method": "LookSAM", "every": 5}),
          "StaleSAM tau=1": Arm(options={"method": "StaleSAM", "tau": 1})},
    tuning=Tuning(arms=("SAM", "LookSAM k=5", "StaleSAM tau=1"), option="rho", values=(0.01, 0.02, 0.05, 0.1, 0.2)),
    rule=(Contrast(says="StaleSAM minus SGD", weights={"StaleSAM tau=1": 1, "SGD": -1}),
          Contrast(says="StaleSAM minus SAM", weights={"StaleSAM tau=1": 1, "SAM": -1}, above=-0.005),
          Contrast(says="SAM minus SGD", weights={"SAM": 1, "SGD": -1}, decides=False),
          Contrast(says="LookSAM minus SGD", weights={"LookSAM k=5": 1, "SGD": -1}, decides=False),
          Contrast(says="LookSAM minus SAM", weights={"LookSAM k=5": 1, "SAM": -1}, decides=False)))
