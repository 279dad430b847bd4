"""What the contract suite runs: a case for each method of the table, made of what it declares, and mixes by hand.

A new optimizer mixin is here by its line in `everbatch.methods`; a mix with those it shares a verb with is a line of MIXES.
Which of them run on which host, and when, is in `plans`.
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

from everbatch import methods
from everbatch.composition import compose
from everbatch.contract import Made, sort_parts
from everbatch.errors import CompositionError
from everbatch.optim import (
    ASAM,
    EMA,
    EWC,
    LARS,
    NCL,
    SAM,
    VCL,
    ClipGradNorm,
    DynamicSparsity,
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


def declared(part: Any) -> Case:
    """The case of one method. Where it does something at a task's end, that is called between steps."""
    ends = "at_task_end" in vars(part)
    options = methods.options(part, part.example, FACTORY)
    bases = tuple(name.lower() for name in part.bases)
    return Case(part.__name__, (TaskEnd, part) if ends else (part,), options, methods.options(part, part.off, FACTORY),
                "task_ended" if ends else part.call, bases or Case.bases)


SINGLES = [declared(part) for part in methods.optimizer_mixins().values()]
"""Every optimizer mixin of the table alone, at the options that it declares."""
MIXES = [
    Case("ShrinkPerturb(fresh_init)", (ShrinkPerturb,), {"factory": FACTORY, "perturb": 0.3},
         {"factory": FACTORY, "perturb": 0.0, "shrink": 1.0, "moments": "keep"}, "shrink_perturb"),
    Case("ClipGradNorm+SAM", (ClipGradNorm, SAM), {"rho": 0.5, "max_norm": 0.3}, {"rho": 0.0, "max_norm": float("inf")}),
    Case("ClipGradNorm+EMA+SAM", (ClipGradNorm, EMA, SAM), {"rho": 0.5, "max_norm": 0.3, "ema_decay": 0.5},
         {"rho": 0.0, "max_norm": float("inf")}),
    Case("EMA+ShrinkPerturb+SAM", (EMA, ShrinkPerturb, SAM), {"noise": "gaussian", "sigma": 0.05, "rho": 0.5, "ema_decay": 0.5},
         {"noise": "gaussian", "sigma": 0.0, "shrink": 1.0, "moments": "keep", "rho": 0.0}, "shrink_perturb"),
    Case("ClipGradNorm+LARS+SAM", (ClipGradNorm, LARS, SAM),
         {"trust_coeff": 0.2, "lr_in_buffer": True, "rho": 0.5, "max_norm": 0.3},
         {"trust_coeff": 1e30, "trust_clip": True, "rho": 0.0, "max_norm": float("inf")}, bases=("sgd",)),
    Case("EWC+SAM", (TaskEnd, EWC, SAM), {"strength": 0.5, "form": "separate", "factory": FACTORY, "rho": 0.3},
         {"strength": 0.0, "factory": FACTORY, "rho": 0.0}, "task_ended"),
    Case("Refresh+EWC", (TaskEnd, Refresh, EWC),
         {"refresh_gamma": 0.1, "unlearn_steps": 2, "noise_scale": 0.05, "refresh_factory": FACTORY, "strength": 0.5,
          "ewc_factory": FACTORY},
         {"refresh_gamma": 0.0, "refresh_factory": FACTORY, "strength": 0.0, "ewc_factory": FACTORY}, "task_ended"),
    Case("ClipGradNorm+NCL+VCL+SAM", (TaskEnd, ClipGradNorm, NCL, VCL, SAM),
         {"max_norm": 0.3, "ncl_prior": 0.05, "ncl_factory": FACTORY, "sigma": 0.05, "samples": 40, "rho": 0.3},
         {"max_norm": float("inf"), "ncl_strength": 0.0, "ncl_factory": FACTORY, "sigma": 0.0, "rho": 0.0},
         "task_ended", ("sgd",)),
    Case("Refresh(normalized)", (TaskEnd, Refresh),
         {"form": "normalized", "every": 1, "delta": 0.01, "noise_coef": 0.1, "factory": FACTORY},
         {"form": "normalized", "delta": 0.0, "factory": FACTORY}, "task_ended"),
    Case("ClipGradNorm+EMA+DynamicSparsity+SAM", (ClipGradNorm, EMA, DynamicSparsity, SAM),
         {"density": 0.3, "update_every": 3, "grow": "momentum", "score_steps": 2, "redistribute": "momentum", "prune": "soft",
          "rho": 0.5, "max_norm": 0.3, "ema_decay": 0.5},
         {"density": 1.0, "rho": 0.0, "max_norm": float("inf")}),
    Case("SAM(interval)", (SAM,), {"rho": 0.5, "interval": 2}, {"rho": 0.0, "interval": 2}),
    Case("ASAM(elementwise)", (ASAM,), {"rho": 0.5, "adaptive": "elementwise"}, {"rho": 0.0}),
    # h - g is some percent of g and is normalised by tensor: bf16 errors of g grow as much; bf16 hosts agree with each other.
    Case("LookSAM(tensor)", (LookSAM,), {"rho": 0.3, "every": 3, "norms": "tensor"}, {"rho": 0.0}, amplifies=2.0),
    Case("ClipGradNorm+EMA+StaleSAM", (ClipGradNorm, EMA, StaleSAM), {"rho": 0.3, "max_norm": 0.3, "ema_decay": 0.5},
         {"rho": 0.0, "max_norm": float("inf")}),
    Case("SubspaceProjection(right)", (SubspaceProjection,), {"projections": RIGHT}, {"projections": RIGHT, "strength": 0.0}),
    Case("ClipGradNorm+EMA+SubspaceProjection+SAM", (ClipGradNorm, EMA, SubspaceProjection, SAM),
         {"projections": MAPS, "space": "update", "strength": 0.5, "rho": 0.5, "max_norm": 0.3, "ema_decay": 0.5},
         {"projections": MAPS, "space": "update", "strength": 0.0, "rho": 0.0, "max_norm": float("inf")}),
    Case("SubspaceProjection(maps)", (SubspaceProjection,), {"projections": MAPS}, {"projections": MAPS, "strength": 0.0}),
]
"""Several together, and other options of one."""
CASES = [*SINGLES, *MIXES]


def _of_one_net(case: Case) -> bool:
    """Whether a method's options name the suite's own weights."""
    return any(isinstance(part.example, Made) for part in case.mixins)  # type: ignore[attr-defined]


def _forked(case: Case, fork: str) -> Case:
    """A case on a net of which each step reaches a part only."""
    def moved(options: dict[str, Any]) -> dict[str, Any]:
        return {n: functools.partial(hosts.build, fork=fork) if v is FACTORY else v for n, v in options.items()}

    return replace(case, name=f"{case.name} on {fork}", options=moved(case.options), zero=moved(case.zero), fork=fork)


MIX = "ClipGradNorm+EMA+SAM"
"""The case that stands for all where a check is about the host."""
FORKED = [_forked(Case("bare", (), {}, {}), "branch"), _forked(Case("bare", (), {}, {}), "heads"),
          *(_forked(c, "branch" if place % 2 and c.name != MIX else "heads")
            for place, c in enumerate(c for c in CASES if not _of_one_net(c)))]
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
