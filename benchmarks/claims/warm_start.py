"""Warm starts, from `recipes/growing_data.py`."""

from __future__ import annotations

from benchmarks.ledger import Arm, Claim, Contrast, Paper
from benchmarks.protocols.growing import Scale, train

CLAIM = Claim(
    title="A warm start generalises worse than starting over",
    methods=("ShrinkPerturb", "WarmStart"),
    paper=Paper(authors="Ash and Adams", year=2020, ref="arXiv 1910.08475", where="table 1"),
    says="A network trained on half of the data and then on all of it ends less accurate than one trained on all of it at once.",
    protocol="CIFAR-10, SVHN, CIFAR-100; ResNet-18 and others, Adam and SGD, no augmentation, to 99 % training accuracy.",
    scaled="Digits with fixed pixel noise, two rounds of 60 epochs, a net of width 8, AdamW: the recipe's default.",
    run=train, scale=Scale(), seeds=16, shown=("first_accuracy", "epochs_to_fit"), minutes=4,
    arms={"start over": Arm(options={"start": "fresh"}), "warm start": Arm(options={"start": "warm"}),
          "shrink and perturb": Arm(options={"start": "shrink_perturb"})},
    rule=(Contrast(says="start over minus warm start", weights={"start over": 1, "warm start": -1}),
          Contrast(says="shrink and perturb minus warm start", decides=False,
                   weights={"shrink and perturb": 1, "warm start": -1}),
          Contrast(says="start over minus shrink and perturb", decides=False,
                   weights={"start over": 1, "shrink and perturb": -1})))
