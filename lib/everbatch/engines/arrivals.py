"""Gradients as autograd gives them to DeepSpeed: which parameters the passes of a step have reached, and in which order.

An engine fills in zeros for parameters that no pass reached; who must know it notes arrivals. ZeRO stages 1 and 2 reduce
gradients in the order in which they arrive, and leave out parameters that a rank's pass does not reach: where ranks take
different branches of a network, gradients of different parameters would be added up, or the ranks wait for each other for ever.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["InOrder", "Reach", "add_local"]


class Reach:
    """Notes by name which parameters autograd gave a gradient. torch says it with a gradient of None; DeepSpeed's engines hold
    zeros instead, or at stage 3 what an earlier step left.

    Cost: one hook per parameter and backward, no tensor.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]], device: torch.device) -> None:
        self.names = [name for name, _ in named]
        self.last: set[str] = set()
        """Reached since gradients were last discarded."""
        self.earlier: set[str] = set()
        """Reached by earlier passes of the step."""
        self.mixed = False
        """Whether the gradient holds parts of all passes of this step, not of the last alone."""
        self.all = torch.ones(len(self.names), dtype=torch.float64, device=device)
        """`flags()` where every parameter was reached."""
        # The hooks hold the set alone, so neither the model nor the engine is kept alive by them.
        note = self.last.add
        handles = [p.register_post_accumulate_grad_hook(functools.partial(_note, note, name))  # type: ignore[no-untyped-call]
                   for name, p in named]
        weakref.finalize(self, _remove, handles)

    def flags(self) -> Tensor:
        """One number per parameter, in the order of `names`: 1 where this rank has a gradient. (n,) float64."""
        found = self.last | self.earlier if self.mixed else self.last
        if len(found) == len(self.names):
            return self.all
        return torch.tensor([float(n in found) for n in self.names], dtype=torch.float64, device=self.all.device)


def _note(note: Callable[[str], None], name: str, _: Tensor) -> None:
    note(name)


def _remove(handles: Iterable[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


class InOrder:
    """Hands gradients to a ZeRO optimizer in the reverse order of the model's parameters, and zeros for those without one.

    A gradient waits until all before it in that order have come; at the end of a backward, what has not come is zero. This is
    how DDP with `find_unused_parameters` does it, but no graph is walked.

    Cost: a few dictionary operations per parameter and backward. Memory: gradients that come early wait; for a model whose
    parameters are registered in the order of their use, none do.
    """

    def __init__(self, zero: Any, parameters: Iterable[Tensor]) -> None:
        self._zero = zero
        group_of = {id(p): i for i, group in enumerate(zero.bit16_groups) for p in group}
        self._order = [(p, group_of[id(p)]) for p in reversed(list(parameters)) if id(p) in group_of]
        self._ready: set[int] = set()
        self._next = 0
        self._deliver: Callable[[Tensor, int], None] = zero.process_gradients
        zero.process_gradients = self._take
        for name in ("reduce_gradients", "overlapping_partition_gradients_reduce_epilogue"):
            setattr(zero, name, functools.partial(self._after, self._rest, getattr(zero, name)))

    def begin(self) -> None:
        """Before a backward; an earlier one may have ended in an error."""
        self._ready.clear()
        self._next = 0

    def _take(self, p: Tensor, group: int) -> None:
        """In the place of `process_gradients`: a parameter's gradient has come."""
        reduces = self._zero.partition_gradients or self._zero.is_gradient_accumulation_boundary()
        again = id(p) in self._ready
        if not reduces or again:  # stage 1 gathers micro-batches first; one that comes twice is DeepSpeed's to judge
            self._deliver(p, group)
            return
        self._ready.add(id(p))
        while self._next < len(self._order) and id(self._order[self._next][0]) in self._ready:
            self._next += 1
            self._deliver(*self._order[self._next - 1])

    def _rest(self) -> None:
        """Before gradients still in buckets are reduced: deliver what waits, and zeros for what never came."""
        for p, group in self._order[self._next :]:
            if self._zero.get_gradient_for_reduction(p) is None and p.grad is None:
                p.grad = torch.zeros(p.shape, dtype=p.dtype, device=p.device)
            self._deliver(p, group)
        self._next = len(self._order)

    @staticmethod
    def _after(first: Callable[[], None], then: Callable[..., Any], *args: Any, **options: Any) -> Any:
        first()
        return then(*args, **options)


def add_local(own: dict[str, Tensor], named: Sequence[tuple[str, Tensor]], loss: Tensor) -> None:
    """Add this rank's gradient to `own`, past the engine: nothing is reduced, nothing of the engine's state moves."""
    trained = [(name, p) for name, p in named if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in trained], allow_unused=True)
    for (name, _), grad in zip(trained, grads, strict=True):
        if grad is not None:
            own[name] = own[name] + grad if name in own else grad
