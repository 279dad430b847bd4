"""SAM's accuracy."""

from __future__ import annotations

from benchmarks.ledger import Arm, Claim, Contrast, Paper, Tuning
from benchmarks.protocols.classify import Scale, train

ARMS = {"SGD": Arm(options={"method": "SGD"}), "SAM": Arm(options={"method": "SAM"})}
SCALE = Scale(noise=0.4, curvature=20)
TUNING = Tuning(arms=("SAM",), option="rho", values=(0.01, 0.02, 0.05, 0.1, 0.2))

CLAIM = Claim(
    title="SAM generalises better than SGD",
    methods=("SAM",),
    paper=Paper(authors="Foret et al.", year=2021, ref="arXiv 2010.01412", where="table 1"),
    says="At equal epochs SAM reaches a higher test accuracy than SGD.",
    protocol="CIFAR-10 and 100, WideResNet and others, 200 epochs and more; rho chosen on held-out training samples.",
    scaled="Digits with pixel noise, which leaves something to overfit; a convolutional net, 20 epochs.",
    run=train, scale=SCALE, arms=ARMS, seeds=12, tuning=TUNING, shown=("eigenvalue", "step_ms"), minutes=3,
    rule=(Contrast(says="SAM minus SGD", weights={"SAM": 1, "SGD": -1}),))
