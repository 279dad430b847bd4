"""The stability gap, not there yet."""

from __future__ import annotations

from benchmarks.ledger import Claim, Paper

CLAIM = Claim(
    title="Accuracy on old tasks dips at the start of a new one",
    methods=("ContinualEvaluation",),
    paper=Paper(authors="De Lange et al.", year=2023, ref="arXiv 2205.13452", where="figure 1 and the tables of section 5"),
    says="Under rehearsal too, the minimum accuracy on old tasks in a new task's first steps lies far below that at its end.",
    protocol="Split MNIST, CIFAR-10, miniImageNet, DomainNet; evaluation after every step, 5 seeds.",
    needs="everbatch.train.ContinualEvaluation")
