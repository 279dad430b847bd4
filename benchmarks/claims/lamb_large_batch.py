"""LAMB at a large batch."""

from __future__ import annotations

from benchmarks.ledger import Arm, Claim, Contrast, Paper, Tuning
from benchmarks.protocols.classify import Scale, train

CLAIM = Claim(
    title="LAMB trains at batches where AdamW loses accuracy",
    methods=("LAMB",),
    paper=Paper(authors="You et al.", year=2020, ref="arXiv 1904.00962", where="tables 1 and 3"),
    says="At a large batch and equal epochs, layer-wise trust ratios over Adam reach a higher accuracy than AdamW, each at its "
    "best rate.",
    protocol="BERT pre-training to batch 64K, ImageNet ResNet-50 to 32K; rates tuned.",
    scaled="Digits with pixel noise at batch 512 of 1,347 samples: 60 epochs are 120 updates. Rates chosen on a part cut from "
    "the training samples.",
    run=train, scale=Scale(noise=0.4, batch=512, epochs=60, warmup=5.0, weight_decay=0.01), seeds=12, minutes=3,
    arms={"AdamW": Arm(options={"method": "AdamW"}), "LAMB": Arm(options={"method": "LAMB"})},
    tuning=Tuning(arms=("AdamW", "LAMB"), option="lr", values={
        "AdamW": (0.0005, 0.001, 0.002, 0.005, 0.01), "LAMB": (0.002, 0.005, 0.01, 0.02, 0.05)}),
    rule=(Contrast(says="LAMB minus AdamW, batch 512", weights={"LAMB": 1, "AdamW": -1}),))
