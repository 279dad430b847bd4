"""MOS against its first adapter's prototypes, and without each of its parts."""

from __future__ import annotations

from benchmarks.ledger import Arm, Claim, Contrast, Paper
from benchmarks.protocols.adapted import Scale, ends

BARE = {"alpha": 0.0, "align_epochs": 0}

CLAIM = Claim(
    title="MOS beats the prototypes of its first adapter",
    methods=("MOS",),
    paper=Paper(authors="Sun et al.", year=2025, ref="arXiv 2412.09441", where="main results table"),
    says="Adapters merged over tasks, classifier alignment and self-refined retrieval end 1 to 7 points above the prototypes "
    "of the first task's adapter.",
    protocol="CIFAR-100, CUB, ImageNet-R and others, pre-trained ViT-B/16, class-incremental.",
    scaled="Digits: a vision transformer of four blocks and width 64, trained on 4 of the classes in quarter turns, learns the "
    "other 6 in 3 tasks of 2, 10 epochs each; the recipe's setting, not tuned by arm.",
    run=ends, scale=Scale(), seeds=3, shown=("average_incremental_accuracy", "forgetting"), minutes=8,
    arms={"MOS": Arm(options={}),
          "first adapter's prototypes": Arm(options={"shown": "prototypes"}),
          "without alignment": Arm(options={"mos": {"align_epochs": 0}}),
          "without merging": Arm(options={"mos": {"alpha": 0.0}}),
          "without ensemble": Arm(options={"mos": {"ensemble": False}}),
          "latest adapter": Arm(options={"shown": "latest"}),
          "adapters one after the other": Arm(options={"shown": "latest", "mos": BARE})},
    rule=(Contrast(says="MOS minus its first adapter's prototypes", weights={"MOS": 1, "first adapter's prototypes": -1}),
          Contrast(says="MOS minus without alignment", weights={"MOS": 1, "without alignment": -1}, decides=False),
          Contrast(says="MOS minus without merging", weights={"MOS": 1, "without merging": -1}, decides=False),
          Contrast(says="MOS minus adapters one after the other", weights={"MOS": 1, "adapters one after the other": -1},
                   decides=False),
          Contrast(says="retrieval: MOS minus the latest adapter", weights={"MOS": 1, "latest adapter": -1}, decides=False)))
