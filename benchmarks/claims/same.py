"""SAME, not there yet."""

from __future__ import annotations

from benchmarks.ledger import Claim, Paper

CLAIM = Claim(
    title="SAME forgets less than plain experts",
    methods=("SAME",),
    paper=Paper(authors="Xie et al.", year=2026, ref="arXiv 2602.01990", where="main results table (CoIN)"),
    says="Protecting the router's old inputs and scaling experts by curvature lowers forgetting of mixtures of LoRA experts.",
    protocol="CoIN, 8 tasks, LLaVA with experts on feed-forward projections; accuracy after the last task.",
    needs="everbatch.train.SAME")
