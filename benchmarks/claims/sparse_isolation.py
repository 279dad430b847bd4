"""Sparse masks of their own for every task."""

from __future__ import annotations

from benchmarks.ledger import Arm, Claim, Contrast, Paper, Tuning
from benchmarks.protocols.stream import Scale, train

CLAIM = Claim(
    title="Isolated sparse masks keep a stream's tasks",
    methods=("DynamicSparsity", "Consolidate"),
    paper=Paper(authors="Yildirim et al.", year=2024, ref="arXiv 2308.14831", where="abstract and the authors' code"),
    says="Task-incremental training with a dynamic sparse mask for each task, frozen after it, forgets nothing and ends more "
    "accurate than dense fine-tuning.",
    protocol="CIFAR-100 in 5, 10 and 20 tasks, miniImageNet; ResNet-18, densities 0.2, 0.1, 0.05, 100 epochs a task.",
    scaled="Digits, 5 tasks of 2 classes with the task id given, a small convolutional net, density 0.2, 8 epochs each; "
    "each arm's learning rate chosen on a part cut from the training samples.",
    run=train, scale=Scale(scenario="task"), seeds=8, shown=("forgetting", "average_incremental_accuracy"), minutes=3,
    arms={"isolated, density 0.2": Arm(options={
              "replay": None, "consolidate": {"isolate": True}, "optimizer": {"dynamic_sparsity": {"density": 0.2}}}),
          "dense fine-tuning": Arm(options={"replay": None})},
    tuning=Tuning(arms=("isolated, density 0.2", "dense fine-tuning"), option="lr", values=(0.01, 0.03, 0.1, 0.3)),
    rule=(Contrast(says="isolated minus dense", weights={"isolated, density 0.2": 1, "dense fine-tuning": -1}),
          Contrast(says="forgetting, dense minus isolated", statistic="forgetting",
                   weights={"dense fine-tuning": 1, "isolated, density 0.2": -1})))
