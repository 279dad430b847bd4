"""The methods of the unified objective side by side, on Omniglot."""

from __future__ import annotations

from benchmarks.claims.continual_cifar import ARMS, RULE, SHOWN
from benchmarks.ledger import Claim, Paper
from benchmarks.protocols.stream import Scale, train

CLAIM = Claim(
    title="Rehearsal beats penalties in class-incremental Omniglot, and joint training beats both",
    methods=("Replay", "EWC", "LwF", "AGEM", "Refresh", "Joint"),
    paper=Paper(authors="Buzzega et al.", year=2020, ref="arXiv 2004.07211", where="table 2; the ordering, on other data"),
    says="The ordering of Sequential CIFAR-10 holds with many classes of few drawings.",
    protocol="No paper's own: 50 characters in 10 tasks of 5, 15 drawings each to learn from and 5 to test.",
    scaled="28 pixels, a small convolutional net, 15 epochs a task, defaults and one learning rate for all; "
    "`python -m benchmarks.ledger.omniglot SOURCE FILE` makes the data, given with data=FILE.",
    run=train, scale=Scale(data="omniglot", tasks=10, epochs=15), seeds=3, shown=SHOWN, minutes=12,
    arms=ARMS, rule=RULE)
