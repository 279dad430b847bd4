"""What the contract suite runs: one line per mixin or mix. Which of them runs on which host, and when: `plans.py`.

A new method joins by adding its line to CASES.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any

import hosts
import torch
from maps import MAPS, RIGHT
from task_ends import TaskEnd

from everbatch.composition import compose
from everbatch.contract import sort_parts
from everbatch.errors import CompositionError
from everbatch.optim import (
    ASAM,
    EMA,
    ESAM,
    EWC,
    GSAM,
    LAMB,
    LARS,
    MAS,
    SAM,
    SI,
    WSAM,
    ClipGradNorm,
    DynamicSparsity,
    GradientNorm,
    Ignite,
    LookSAM,
    Refresh,
    ShrinkPerturb,
    StaleSAM,
    SubspaceProjection,
)

FACTORY = functools.partial(hosts.build)


@dataclass(frozen=True)
class Case:
    """Mixins, leftmost first, and their options."""

    name: str
    mixins: tuple[type, ...]
    options: dict[str, Any]
    zero: dict[str, Any]
    """Options at which the class must give the bare base's bits."""
    call: str = ""
    """A method that is called between steps, at CALLS, as a task start would."""
    bases: tuple[str, ...] = ("sgd", "adamw")
    """Bases the mixins stand on; the first stands for all where one is enough."""
    fork: str = ""
    """"branch" or "heads": on a net of which each step reaches a part only (`hosts.Forked`)."""
    amplifies: float = 1.0
    """Factor on the bf16 tolerance, for a method that divides by something small."""


CASES = [
    Case("SAM", (SAM,), {"rho": 0.5}, {"rho": 0.0}),
    Case("ClipGradNorm", (ClipGradNorm,), {"max_norm": 0.3}, {"max_norm": float("inf")}),
    Case("EMA", (EMA,), {"ema_decay": 0.5}, {"ema_decay": 0.5}),  # it never touches the weights
    Case("ShrinkPerturb", (ShrinkPerturb,), {"noise": "gaussian", "sigma": 0.05, "shrink": 0.8},
         {"noise": "gaussian", "sigma": 0.0, "shrink": 1.0, "moments": "keep"}, "shrink_perturb"),
    Case("ShrinkPerturb(fresh_init)", (ShrinkPerturb,), {"factory": FACTORY, "perturb": 0.3},
         {"factory": FACTORY, "perturb": 0.0, "shrink": 1.0, "moments": "keep"}, "shrink_perturb"),
    Case("ClipGradNorm+SAM", (ClipGradNorm, SAM), {"rho": 0.5, "max_norm": 0.3}, {"rho": 0.0, "max_norm": float("inf")}),
    Case("ClipGradNorm+EMA+SAM", (ClipGradNorm, EMA, SAM), {"rho": 0.5, "max_norm": 0.3, "ema_decay": 0.5},
         {"rho": 0.0, "max_norm": float("inf")}),
    Case("EMA+ShrinkPerturb+SAM", (EMA, ShrinkPerturb, SAM), {"noise": "gaussian", "sigma": 0.05, "rho": 0.5, "ema_decay": 0.5},
         {"noise": "gaussian", "sigma": 0.0, "shrink": 1.0, "moments": "keep", "rho": 0.0}, "shrink_perturb"),
    Case("LARS", (LARS,), {"trust_coeff": 0.2}, {"trust_coeff": 1e30, "trust_clip": True}, bases=("sgd",)),
    Case("LAMB", (LAMB,), {"max_grad_norm": 0.5}, {"min_ratio": 1.0, "max_ratio": 1.0}, bases=("adamw",)),
    Case("ClipGradNorm+LARS+SAM", (ClipGradNorm, LARS, SAM),
         {"trust_coeff": 0.2, "lr_in_buffer": True, "rho": 0.5, "max_norm": 0.3},
         {"trust_coeff": 1e30, "trust_clip": True, "rho": 0.0, "max_norm": float("inf")}, bases=("sgd",)),
    Case("EWC+SAM", (TaskEnd, EWC, SAM), {"strength": 0.5, "form": "separate", "factory": FACTORY, "rho": 0.3},
         {"strength": 0.0, "factory": FACTORY, "rho": 0.0}, "end_task"),
    Case("EWC", (TaskEnd, EWC), {"strength": 0.5, "factory": FACTORY}, {"strength": 0.0, "factory": FACTORY}, "end_task"),
    Case("SI", (TaskEnd, SI), {"strength": 0.5, "xi": 0.1}, {"strength": 0.0}, "end_task"),
    Case("MAS", (TaskEnd, MAS), {"strength": 0.05, "factory": FACTORY}, {"strength": 0.0, "factory": FACTORY}, "end_task"),
    Case("Refresh+EWC", (TaskEnd, Refresh, EWC),
         {"refresh_gamma": 0.1, "unlearn_steps": 2, "noise_scale": 0.05, "refresh_factory": FACTORY, "strength": 0.5,
          "ewc_factory": FACTORY},
         {"refresh_gamma": 0.0, "refresh_factory": FACTORY, "strength": 0.0, "ewc_factory": FACTORY}, "end_task"),
    Case("Refresh", (TaskEnd, Refresh), {"refresh_gamma": 0.1, "noise_scale": 0.05, "factory": FACTORY},
         {"refresh_gamma": 0.0, "factory": FACTORY}, "end_task"),
    Case("Refresh(normalized)", (TaskEnd, Refresh),
         {"form": "normalized", "every": 1, "delta": 0.01, "noise_coef": 0.1, "factory": FACTORY},
         {"form": "normalized", "delta": 0.0, "factory": FACTORY}, "end_task"),
    Case("DynamicSparsity", (DynamicSparsity,), {"density": 0.3, "update_every": 2}, {"density": 1.0}),
    Case("ClipGradNorm+EMA+DynamicSparsity+SAM", (ClipGradNorm, EMA, DynamicSparsity, SAM),
         {"density": 0.3, "update_every": 3, "grow": "momentum", "score_steps": 2, "redistribute": "momentum", "prune": "soft",
          "rho": 0.5, "max_norm": 0.3, "ema_decay": 0.5},
         {"density": 1.0, "rho": 0.0, "max_norm": float("inf")}),
    Case("SAM(interval)", (SAM,), {"rho": 0.5, "interval": 2}, {"rho": 0.0, "interval": 2}),
    Case("ASAM", (ASAM,), {"rho": 0.5}, {"rho": 0.0}),
    Case("ASAM(elementwise)", (ASAM,), {"rho": 0.5, "adaptive": "elementwise"}, {"rho": 0.0}),
    Case("GSAM", (GSAM,), {"rho": 0.3}, {"rho": 0.0}),
    Case("GradientNorm", (GradientNorm,), {"radius": 0.3}, {"mix": 0.0}),
    Case("WSAM", (WSAM,), {"rho": 0.3, "gamma": 0.6}, {"gamma": 0.0}),
    Case("LookSAM", (LookSAM,), {"rho": 0.3, "every": 3}, {"rho": 0.0}),
    # h - g is some percent of g and is normalised by tensor: bf16 errors of g grow as much; bf16 hosts agree with each other.
    Case("LookSAM(tensor)", (LookSAM,), {"rho": 0.3, "every": 3, "norms": "tensor"}, {"rho": 0.0}, amplifies=2.0),
    Case("StaleSAM", (StaleSAM,), {"rho": 0.3, "tau": 2}, {"rho": 0.0}),
    Case("Ignite", (Ignite,), {"rho": 0.5, "rate": 0.1, "budget": 0.01, "multiplier": 0.1}, {"multiplier": 0.0, "rate": 0.0}),
    # Each rank selects among its own rows, one process among all: equal only where all are selected (gamma 1, ties included),
    # which still runs both passes through per_sample, and perturbs the tensors that a seeded coin picks.
    Case("ESAM", (ESAM,), {"rho": 0.5, "gamma": 1.0, "strict": False, "beta": 0.6}, {"rho": 0.0}),
    Case("ClipGradNorm+EMA+StaleSAM", (ClipGradNorm, EMA, StaleSAM), {"rho": 0.3, "max_norm": 0.3, "ema_decay": 0.5},
         {"rho": 0.0, "max_norm": float("inf")}),
    Case("SubspaceProjection", (SubspaceProjection,), {"projections": MAPS}, {"projections": MAPS, "strength": 0.0}),
    Case("SubspaceProjection(right)", (SubspaceProjection,), {"projections": RIGHT}, {"projections": RIGHT, "strength": 0.0}),
    Case("ClipGradNorm+EMA+SubspaceProjection+SAM", (ClipGradNorm, EMA, SubspaceProjection, SAM),
         {"projections": MAPS, "space": "update", "strength": 0.5, "rho": 0.5, "max_norm": 0.3, "ema_decay": 0.5},
         {"projections": MAPS, "space": "update", "strength": 0.0, "rho": 0.0, "max_norm": float("inf")}),
]


def _forked(case: Case, fork: str) -> Case:
    """A case on a net of which each step reaches a part only."""
    def moved(options: dict[str, Any]) -> dict[str, Any]:
        return {n: functools.partial(hosts.build, fork=fork) if v is FACTORY else v for n, v in options.items()}

    return replace(case, name=f"{case.name} on {fork}", options=moved(case.options), zero=moved(case.zero), fork=fork)


FORKED = [_forked(Case("bare", (), {}, {}), "branch"), _forked(Case("bare", (), {}, {}), "heads"),
          *(_forked(c, fork) for c, fork in zip([c for c in CASES if SubspaceProjection not in c.mixins],
                                                itertools.cycle(("heads", "branch")), strict=False))]
"""Every method on such a net: what no pass reaches stays where it is."""


def _single(case: Case) -> type | None:
    """The one mixin of a case, helpers of the tests aside."""
    own = [m for m in case.mixins if m is not TaskEnd]
    return own[0] if len(own) == 1 and "(" not in case.name else None


def _pair(a: Case, b: Case) -> Case | str:
    """The case of two mixins together, or the conflict they declare."""
    parts = sort_parts(tuple(dict.fromkeys((*a.mixins, *b.mixins))))
    bases = tuple(base for base in a.bases if base in b.bases)
    if not bases:
        return "no common base"
    try:
        compose(*parts, base=BASES[bases[0]].func)
    except CompositionError as error:
        return str(error).split(": ", 1)[1]

    def named(case: Case, options: dict[str, Any]) -> dict[str, Any]:
        own, title = _single(case), ""
        if own is not None:
            title = own.__name__.lower()
        return {name if name.startswith(f"{title}_") else f"{title}_{name}": value for name, value in options.items()}

    return Case(f"{a.name} x {b.name}", parts, named(a, a.options) | named(b, b.options), named(a, a.zero) | named(b, b.zero),
                a.call or b.call, bases)


# eps well above the gradients' rounding errors: Adam divides by the gradient's size, and would show them as whole steps.
BASES = {"sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
         "adamw": functools.partial(torch.optim.AdamW, lr=0.01, eps=1e-4)}
PAIRS = {(a.name, b.name): _pair(a, b) for a, b in itertools.combinations([c for c in CASES if _single(c)], 2)}
"""Every two mixins: a case, or the reason why they cannot be composed."""
BY_CASE = {c.name: c for c in [*CASES, *FORKED, *(p for p in PAIRS.values() if isinstance(p, Case))]}
MIX = "ClipGradNorm+EMA+SAM"
"""The case that stands for all where a check is about the host."""
UNREACHED = (("bare on branch", "sgd"), (f"{MIX} on heads", "adamw"))
"""Cases and bases that stand for all nets of which each step reaches a part only."""

STEPS, SAVE_AFTER, SKIP_AT, CALLS = 5, 2, 4, (1, 3)
"""Good steps of a life; steps before the save; the step that first meets a NaN; steps before which `call` is called."""

FP32 = [h.name for h in hosts.HOSTS if not h.bf16]
BF16 = [h.name for h in hosts.HOSTS if h.bf16]
DEEPSPEED = [h.name for h in hosts.HOSTS if h.kind == "zero"]

TOLERANCE = {"fp32": 1e-6, "bf16": 6e-3}
"""Largest difference of any master from the single-process fp32 run after STEPS steps.

fp32: sums over ranks in another order; the largest weight is about 0.5, so this is some 20 units in the last place.
bf16: activations and weights carry 8 bits, so gradients of size 0.1 err by some 4e-4; five steps at lr 0.1 with momentum 0.9
sum to about fifteen times 0.1 of that, and clipping and the perturbation scale with norms that err as much.
"""
