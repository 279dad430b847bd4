"""LARS at a large batch."""

from __future__ import annotations

from benchmarks.ledger import Arm, Claim, Contrast, Paper, Tuning
from benchmarks.protocols.classify import Scale, train

CLAIM = Claim(
    title="LARS trains at batches where SGD loses accuracy",
    methods=("LARS",),
    paper=Paper(authors="You et al.", year=2017, ref="arXiv 1708.03888", where="sections 4 and 5"),
    says="At a large batch and equal epochs, layer-wise trust ratios reach a higher accuracy than SGD, each at its best rate.",
    protocol="ImageNet, AlexNet-BN at 8K and ResNet-50 at 32K, warm-up and polynomial decay.",
    scaled="Digits with pixel noise at batch 512 of 1,347 samples: 60 epochs are 120 updates. Rates chosen on a part cut from "
    "the training samples.",
    run=train, scale=Scale(noise=0.4, batch=512, epochs=60, warmup=5.0), seeds=12, minutes=3,
    arms={"SGD": Arm(options={"method": "SGD"}), "LARS": Arm(options={"method": "LARS"}),
          "SGD, batch 64": Arm(options={"method": "SGD", "batch": 64})},
    tuning=Tuning(arms=("SGD", "LARS", "SGD, batch 64"), option="lr", values={
        "SGD": (0.02, 0.05, 0.1, 0.2, 0.5), "SGD, batch 64": (0.01, 0.02, 0.05, 0.1, 0.2), "LARS": (1.0, 2.0, 5.0, 10.0, 20.0)}),
    rule=(Contrast(says="LARS minus SGD, batch 512", weights={"LARS": 1, "SGD": -1}),
          Contrast(says="LARS, batch 512, minus SGD, batch 64", weights={"LARS": 1, "SGD, batch 64": -1}, decides=False)))
