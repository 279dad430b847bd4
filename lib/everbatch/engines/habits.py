"""What a base optimizer does with the elements of a tensor: tried out, for a class's name says little of a foreign one."""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Habits", "habits_of", "trial"]

KNOWN = ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
"""Optimizers of torch that update every element by itself."""
SHAPE, CUT = (40, 33), 700
"""Of what is tried: large enough for those that factor matrices from some size on; and where a flat tensor is cut in two."""
SCALES = (1e-3, 1.0, 30.0)
"""Sizes of gradients: a norm may matter from some size on."""
STEPS, NEAR = 3, 1e-4
"""Steps at each size, and how far two ways may end apart, of how far they went: rounding is 1e-6."""


@dataclass(frozen=True)
class Habits:
    """What was found; where a base cannot be tried out, nothing against it."""

    by_element: bool = True
    """Whether an element's update depends on that element alone, so that slices are updated as the whole is."""
    keeps_zeros: bool = True
    """Whether an element that is zero, and has only had gradients of zero, stays zero."""
    counts_in_groups: bool = False
    """Whether its step changes options of its groups, as a count of steps there."""


@contextlib.contextmanager
def trial(device: torch.device) -> Iterator[None]:
    """Around a trial of an optimizer: no random number of the run is drawn, nothing is compiled, nothing is warned of."""
    streams = torch.random.fork_rng([device] if device.type == "cuda" else [])
    # Compiling a step would take minutes. Whoever compiles has loaded torch's compiler, which takes seconds, before.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    with streams, eager, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def habits_of(base: type, groups: Sequence[Mapping[str, Any]]) -> Habits:
    """Try a base with the options of these parameter groups. Cost: some 10 ms for each kind of options; none for torch's own."""
    if getattr(torch.optim, base.__name__, None) is base and base.__name__ in KNOWN:
        return Habits()
    if base.__module__.startswith("deepspeed."):  # builds kernels, and is an Adam, Adagrad or Lion
        return Habits()
    kinds: dict[str, tuple[torch.device, dict[str, Any]]] = {}
    for group in groups:
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        kinds.setdefault(repr(sorted((k, v) for k, v in options.items() if k not in ("lr", "weight_decay"))), (device, options))
    found = Habits()
    for device, options in kinds.values():
        try:
            with trial(device):
                each = [_tried(base, options, scale, device) for scale in SCALES]
        except Exception:  # whatever stops a foreign optimizer on stand-ins says nothing of what it does to others
            continue
        each.append(found)
        found = Habits(all(h.by_element for h in each), all(h.keeps_zeros for h in each), any(h.counts_in_groups for h in each))
    return found


def _tried(base: type, options: Mapping[str, Any], scale: float, device: torch.device) -> Habits:
    source = torch.Generator().manual_seed(0)
    start = torch.randn(SHAPE, generator=source).to(device)
    gradients = [(scale * torch.randn(SHAPE, generator=source)).to(device) for _ in range(STEPS)]
    gradients[0] -= start * (start * gradients[0]).sum() / start.square().sum()  # some act on what is at right angles
    whole, counts = _stepped(base, options, start, gradients)
    try:  # each of an optimizer of its own, as ranks have them
        parts = [_stepped(base, options, start.view(-1)[at], [g.view(-1)[at] for g in gradients])[0]
                 for at in (slice(CUT), slice(CUT, None))]
        by_element = not bool((torch.cat(parts) - whole.view(-1)).norm() > NEAR * (whole - start).norm())
    except Exception:  # it takes matrices, and no flat tensor
        by_element = False

    kept = torch.rand(SHAPE, generator=source).to(device) < 0.5
    sparse, _ = _stepped(base, options, start * kept, [g * kept for g in gradients])
    return Habits(by_element, not bool(sparse[~kept].any()), counts)


def _stepped(base: Any, options: Mapping[str, Any], start: Tensor, gradients: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """A weight after these gradients, and whether its group's options changed."""
    weight = torch.nn.Parameter(start.clone())
    known = inspect.signature(base.__init__).parameters
    optimizer = base([{**options, "params": [weight]}], **{k: v for k, v in options.items() if k in known})
    before = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    for gradient in gradients:
        weight.grad = gradient.clone()
        with torch.no_grad():
            (base.step.__wrapped__ if getattr(base.step, "hooked", False) else base.step)(optimizer)
    after = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    changed = [k for k, v in after.items() if k not in before or repr(before[k]) != repr(v)]
    return weight.detach(), bool(changed)
