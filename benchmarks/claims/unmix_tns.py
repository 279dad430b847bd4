"""UnMix-TNS, not there yet."""

from __future__ import annotations

from benchmarks.ledger import Claim, Paper

CLAIM = Claim(
    title="UnMix-TNS stands correlated streams",
    methods=("UnMix-TNS",),
    paper=Paper(authors="Tomar et al.", year=2024, ref="arXiv 2401.08328", where="main results tables"),
    says="Normalisation by a mixture of components is as accurate on label-correlated test streams, where batch statistics "
    "fail, as on i.i.d. ones.",
    protocol="CIFAR-10-C, CIFAR-100-C, ImageNet-C; Dirichlet-ordered and mixed-domain streams, down to batch size 1.",
    needs="everbatch.data.corrupt")
