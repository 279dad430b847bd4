"""The stability gap of rehearsal."""

from __future__ import annotations

from benchmarks.claims.rehearsal import MEMORY
from benchmarks.ledger import Arm, Claim, Contrast, Paper
from benchmarks.protocols.stability import POINTS, Scale, watch

FAR = 0.05

CLAIM = Claim(
    title="Accuracy on old tasks dips at the start of a new one",
    methods=("ContinualEvaluation", "Replay"),
    paper=Paper(authors="De Lange et al.", year=2023, ref="arXiv 2205.13452", where="figure 1 and the tables of section 5"),
    says="Under rehearsal too, the minimum accuracy on old tasks in a new task's first steps lies far below that at its end.",
    protocol="Split MNIST, CIFAR-10, miniImageNet, DomainNet; evaluation after every step, 5 seeds.",
    scaled=f"Digits, 5 tasks of 2 classes, a small convolutional net, memory 200. The minimum over a task's first {POINTS} steps "
           f"against that over its last {POINTS}, on all earlier tasks; far is 5 points.",
    run=watch, scale=Scale(), seeds=5, statistic="dip", minutes=3,
    shown=("accuracy", "min_accuracy", "stability_gap", "windowed_forgetting_10"),
    arms={"ER": Arm(options={"replay": {"method": "er", **MEMORY}}),
          "DER++": Arm(options={"replay": {"method": "dark_er_pp", "alpha": 0.3, **MEMORY}}),
          "fine-tuning": Arm(options={"replay": None})},
    rule=(Contrast(says="ER: last minus first steps' minimum", weights={"ER": 1}, above=FAR),
          Contrast(says="DER++: last minus first steps' minimum", weights={"DER++": 1}, above=FAR),
          Contrast(says="fine-tuning, which does not come back", weights={"fine-tuning": 1}, above=FAR, decides=False)))
