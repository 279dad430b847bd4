"""SAME against experts without its rules."""

from __future__ import annotations

from benchmarks.ledger import Arm, Claim, Contrast, Paper, Tuning
from benchmarks.protocols.experts import Scale, forgets

PLAIN = {"router": "free", "curvature": False}
RATES = {"adamw": (1e-3, 2e-3, 4e-3), "sgd": (0.01, 0.03, 0.1)}
TUNED = {f"{name}, {base}": base for base in ("adamw", "sgd") for name in ("plain", "null + curvature")}

CLAIM = Claim(
    title="SAME forgets less than plain experts",
    methods=("SAME",),
    paper=Paper(authors="Xie et al.", year=2026, ref="arXiv 2602.01990", where="main results table (CoIN)"),
    says="Protecting the router's old inputs and scaling experts by curvature lowers forgetting of mixtures of LoRA experts.",
    protocol="CoIN, 8 tasks, LLaVA with experts on feed-forward projections; accuracy after the last task.",
    scaled="Digits in quarter turns: a vision transformer of two blocks, trained on four of them, learns the others in 6 tasks "
    "of 4 classes by 4 experts of rank 4, the task known at test. The router's rule is the null space of old inputs, not the "
    "printed one. Every arm with a rule of SAME's or none at its own rate, chosen by held-out samples.",
    run=forgets, scale=Scale(), seeds=3, shown=("forgetting", "learning", "routing"), minutes=4,
    arms={"plain, adamw": Arm(options={"base": "adamw", "lr": 2e-3, **PLAIN}),
          "null + curvature, adamw": Arm(options={"base": "adamw", "lr": 2e-3, "router": "null", "curvature": True}),
          "curvature, adamw": Arm(options={"base": "adamw", "lr": 2e-3, "router": "free", "curvature": True}),
          "printed rule, adamw": Arm(options={"base": "adamw", "lr": 2e-3, "router": "paper", "curvature": False}),
          "plain, sgd": Arm(options={"base": "sgd", "lr": 0.03, **PLAIN}),
          "null + curvature, sgd": Arm(options={"base": "sgd", "lr": 0.03, "router": "null", "curvature": True})},
    tuning=Tuning(arms=tuple(TUNED), option="lr", values={arm: RATES[base] for arm, base in TUNED.items()}, seeds=1),
    rule=(Contrast(says="forgetting: plain minus null + curvature, AdamW", statistic="forgetting",
                   weights={"plain, adamw": 1, "null + curvature, adamw": -1}),
          Contrast(says="routing drift: half of plain's minus null + curvature's, AdamW", statistic="routing",
                   weights={"plain, adamw": 0.5, "null + curvature, adamw": -1}),
          Contrast(says="accuracy: null + curvature minus plain, AdamW", decides=False,
                   weights={"null + curvature, adamw": 1, "plain, adamw": -1}),
          Contrast(says="forgetting: plain minus curvature alone, AdamW", statistic="forgetting", decides=False,
                   weights={"plain, adamw": 1, "curvature, adamw": -1}),
          Contrast(says="routing drift: plain minus the printed rule, AdamW", statistic="routing", decides=False,
                   weights={"plain, adamw": 1, "printed rule, adamw": -1}),
          Contrast(says="forgetting: plain minus null + curvature, SGD", statistic="forgetting", decides=False,
                   weights={"plain, sgd": 1, "null + curvature, sgd": -1}),
          Contrast(says="accuracy: null + curvature minus plain, SGD", decides=False,
                   weights={"null + curvature, sgd": 1, "plain, sgd": -1})))
