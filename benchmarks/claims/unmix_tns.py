"""UnMix-TNS on streams with labels in runs."""

from __future__ import annotations

from benchmarks.ledger import Arm, Claim, Contrast, Paper
from benchmarks.protocols.test_time import Scale, errors

STREAMS = {"i.i.d.": ("iid", 64), "Dirichlet": ("dirichlet", 64), "batch 4": ("dirichlet", 4), "batch 1": ("dirichlet", 1)}
NORMS = {"source": "source", "batch statistics": "batch", "UnMix-TNS": "unmix", "balanced UnMix-TNS": "balanced"}
"""Balanced: the first components have the source's mean and variance exactly, not in expectation alone, as published."""

CLAIM = Claim(
    title="UnMix-TNS does not care for the order of labels or the size of batches",
    methods=("UnMix-TNS",),
    paper=Paper(authors="Tomar et al.", year=2024, ref="arXiv 2401.08328", where="main results tables"),
    says="Normalisation by a mixture of components is as accurate on label-correlated test streams, where batch statistics "
    "fail, as on i.i.d. ones.",
    protocol="CIFAR-10-C, CIFAR-100-C, ImageNet-C; Dirichlet-ordered and mixed-domain streams, down to batch size 1.",
    scaled="Digits at 16 pixels, a convolutional net of three layers trained 15 epochs, 449 test samples a stream, 15 families "
    "made here at severity 5; batches of 4 and 1 come in the Dirichlet order.",
    run=errors, scale=Scale(), seeds=3, statistic="error", shown=("clean_error", "worst_error"), minutes=5,
    arms={f"{norm}, {stream}": Arm(options={"norm": kind, "order": order, "rows": rows})
          for norm, kind in NORMS.items() for stream, (order, rows) in STREAMS.items()},
    rule=(Contrast(says="batch statistics minus UnMix-TNS, Dirichlet",
                   weights={"batch statistics, Dirichlet": 1, "UnMix-TNS, Dirichlet": -1}),
          Contrast(says="UnMix-TNS, i.i.d. minus Dirichlet (within two points)", above=-0.02,
                   weights={"UnMix-TNS, i.i.d.": 1, "UnMix-TNS, Dirichlet": -1}),
          Contrast(says="batch statistics minus UnMix-TNS, batch 1",
                   weights={"batch statistics, batch 1": 1, "UnMix-TNS, batch 1": -1}),
          Contrast(says="source minus UnMix-TNS, Dirichlet", decides=False,
                   weights={"source, Dirichlet": 1, "UnMix-TNS, Dirichlet": -1}),
          Contrast(says="UnMix-TNS minus batch statistics, i.i.d.", decides=False,
                   weights={"UnMix-TNS, i.i.d.": 1, "batch statistics, i.i.d.": -1}),
          Contrast(says="UnMix-TNS as published minus balanced, Dirichlet", decides=False,
                   weights={"UnMix-TNS, Dirichlet": 1, "balanced UnMix-TNS, Dirichlet": -1}),
          Contrast(says="batch statistics minus balanced, Dirichlet", decides=False,
                   weights={"batch statistics, Dirichlet": 1, "balanced UnMix-TNS, Dirichlet": -1}),
          Contrast(says="source minus balanced, Dirichlet", decides=False,
                   weights={"source, Dirichlet": 1, "balanced UnMix-TNS, Dirichlet": -1})))
