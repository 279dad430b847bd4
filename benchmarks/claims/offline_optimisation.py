"""IGNITE on the task it was made for."""

from __future__ import annotations

from typing import Any

from benchmarks.ledger import Arm, Claim, Contrast, Paper
from benchmarks.protocols.offline import FUNCTIONS, Scale, optimise

METHODS: dict[str, dict[str, Any]] = {
    "Adam": {"method": "adam"},
    "Ignite": {"method": "ignite"},
    "Ignite fixed .1": {"method": "ignite", "multiplier": 0.1, "rate": 0.0},
    "Ignite fixed 1": {"method": "ignite", "multiplier": 1.0, "rate": 0.0},
    "SAM": {"method": "sam", "rho": 0.05}}
"""Ignite: as released, multiplier and its rate 1e-3, budget 0.1, rho and r 0.05; fixed: rate 0, as the paper's IGNITE-2."""

CLAIM = Claim(
    title="Ignite finds better designs offline",
    methods=("Ignite",),
    paper=Paper(authors="Dao et al.", year=2024, ref="arXiv 2503.04242", where="abstract (up to 9.6 % better)"),
    says="A surrogate whose mean prediction has a bounded gradient norm in weight space leads gradient ascent to better "
    "true values.",
    protocol="Design-Bench (Ant, D'Kitty, TF-Bind 8 and 10), surrogates of 2 x 2048 units, 16 seeds.",
    scaled="The worse half of a noisy sample of Ackley in 8 and Branin in 2 dimensions, surrogates of 2 x 128 units with "
    "the squared error; the median of 64 candidates after 200 steps. No arm is tuned.",
    run=optimise, scale=Scale(), seeds=10, statistic="score", percent=False, minutes=2,
    shown=("start", "overshoot", "output_gradient", "r2"),
    arms={f"{name}, {function}": Arm(options={"function": function, **options})
          for function in FUNCTIONS for name, options in METHODS.items()},
    # 0.02 of the way from the worst to the best value is the smallest gain worth three passes a step.
    rule=tuple(
        Contrast(says=f"{name} minus Adam, {function}", weights={f"{name}, {function}": 1, f"Adam, {function}": -1},
                 least=0.02, decides=name == "Ignite")
        for function in FUNCTIONS for name in METHODS if name != "Adam"))
