"""MOS, not there yet."""

from __future__ import annotations

from benchmarks.ledger import Claim, Paper

CLAIM = Claim(
    title="MOS beats the prototypes of its first adapter",
    methods=("MOS",),
    paper=Paper(authors="Sun et al.", year=2025, ref="arXiv 2412.09441", where="main results table"),
    says="Adapters merged over tasks, classifier alignment and self-refined retrieval end 1 to 7 points above the prototypes "
    "of the first task's adapter.",
    protocol="CIFAR-100, CUB, ImageNet-R and others, pre-trained ViT-B/16, class-incremental.",
    needs="everbatch.train.MOS")
