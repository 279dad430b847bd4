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
    """Whether weights of one group end elsewhere where each has a step of its own, as by a count of steps in the group."""


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
    start = torch.randn(SHAPE, generator=source, device="cpu").to(device)
    gradients = [(scale * torch.randn(SHAPE, generator=source, device="cpu")).to(device) for _ in range(STEPS)]
    gradients[0] -= start * (start * gradients[0]).sum() / start.square().sum()  # some act on what is at right angles
    (whole,) = _stepped(base, options, [start], [gradients])
    moved = NEAR * (whole - start).norm()
    (again,) = _stepped(base, options, [start], [gradients])
    random = bool((again - whole).norm() > moved)  # of one that draws random numbers two runs tell nothing
    try:  # each of an optimizer of its own, as ranks have them
        parts = [_stepped(base, options, [start.view(-1)[at]], [[g.view(-1)[at] for g in gradients]])[0]
                 for at in (slice(CUT), slice(CUT, None))]
        by_element = random or not bool((torch.cat(parts) - whole.view(-1)).norm() > moved)
    except Exception:  # it takes matrices, and no flat tensor
        by_element = False

    kept = torch.rand(SHAPE, generator=source, device="cpu").to(device) < 0.5
    (sparse,) = _stepped(base, options, [start * kept], [[g * kept for g in gradients]])
    two = [start, -start], [gradients, gradients[::-1]]
    together, in_turn = _stepped(base, options, *two), _stepped(base, options, *two, in_turn=True)
    counts = any(bool((a - b).norm() > moved) for a, b in zip(together, in_turn, strict=True))
    return Habits(by_element, not bool(sparse[~kept].any()), counts and by_element and not random)


def _stepped(
    base: Any, options: Mapping[str, Any], starts: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]], *,
    in_turn: bool = False,
) -> list[Tensor]:
    """Weights of one group after these gradients of each; `in_turn` steps once for each weight, as ZeRO-3 has it."""
    weights = [torch.nn.Parameter(start.clone()) for start in starts]
    known = inspect.signature(base.__init__).parameters
    rate = options["lr"] if options.get("lr") else 1e-2  # one of a warm-up that begins at zero moves nothing
    optimizer = base([{**options, "lr": rate, "params": weights}], **{k: v for k, v in options.items() if k in known})
    step = base.step.__wrapped__ if getattr(base.step, "hooked", False) else base.step
    (group,) = optimizer.param_groups
    for now in zip(*gradients, strict=True):
        for weight, gradient in zip(weights, now, strict=True):
            weight.grad = gradient.clone()
        for some in [[weight] for weight in weights] if in_turn else [weights]:
            group["params"] = some
            with torch.no_grad():
                step(optimizer)
    return [weight.detach() for weight in weights]
