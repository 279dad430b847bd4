"""Shrink and perturb as the cure; its cells are those of `warm_start`."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.claims.warm_start import CLAIM as WARM
from benchmarks.ledger import Contrast, Paper

CLAIM = replace(
    WARM,
    title="Shrink and perturb closes the gap of a warm start",
    paper=Paper(authors="Ash and Adams", year=2020, ref="arXiv 1910.08475", where="section 4"),
    says="Old weights shrunk and mixed with a new initialisation are better than a warm start, and not a point worse than "
    "starting over.",
    rule=(Contrast(says="shrink and perturb minus warm start", weights={"shrink and perturb": 1, "warm start": -1}),
          Contrast(says="shrink and perturb minus starting over", above=-0.01,
                   weights={"shrink and perturb": 1, "start over": -1})))
