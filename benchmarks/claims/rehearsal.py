"""DER++, ER and fine-tuning."""

from __future__ import annotations

from benchmarks.ledger import Arm, Claim, Contrast, Paper
from benchmarks.protocols.stream import Scale, train

MEMORY = {"capacity": 200, "replay_batch": 32, "beta": 0.5}

CLAIM = Claim(
    title="DER++ > ER > fine-tuning in class-incremental streams",
    methods=("Replay",),
    paper=Paper(authors="Buzzega et al.", year=2020, ref="arXiv 2004.07211", where="table 2"),
    says="With a memory of 200 samples, stored logits beside labels beat labels alone, and those beat no memory.",
    protocol="Sequential CIFAR-10 (5 x 2 classes), Tiny-ImageNet, ResNet-18, buffers of 200, 500, 5120; accuracy over all.",
    scaled="Digits, 5 tasks of 2 classes, a small convolutional net, 8 epochs each; the recipe's setting, not tuned by arm.",
    run=train, scale=Scale(), seeds=8, shown=("average_incremental_accuracy", "forgetting"), minutes=3,
    arms={"DER++": Arm(options={"replay": {"method": "dark_er_pp", "alpha": 0.3, **MEMORY}}),
          "ER": Arm(options={"replay": {"method": "er", **MEMORY}}),
          "fine-tuning": Arm(options={"replay": None})},
    rule=(Contrast(says="DER++ minus ER", weights={"DER++": 1, "ER": -1}),
          Contrast(says="ER minus fine-tuning", weights={"ER": 1, "fine-tuning": -1})))
