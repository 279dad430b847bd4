"""SAM's flatness; its cells are those of `sam_accuracy`."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.claims.sam_accuracy import CLAIM as ACCURACY
from benchmarks.ledger import Contrast, Paper

CLAIM = replace(
    ACCURACY,
    title="SAM ends in flatter minima than SGD",
    paper=Paper(authors="Foret et al.", year=2021, ref="arXiv 2010.01412", where="figure 3"),
    says="The largest eigenvalue of the training loss's Hessian is smaller after SAM than after SGD.",
    protocol="CIFAR-10, WideResNet, spectrum of the Hessian at several epochs.",
    scaled="Digits with pixel noise, a convolutional net, 20 epochs; power iteration on 512 training samples after the last "
    "step. rho is chosen by accuracy.",
    shown=("eigenvalue",), rule=(Contrast(says="SGD minus SAM", weights={"SGD": 1, "SAM": -1}, statistic="eigenvalue"),))
