"""Which parameters the passes of a step have reached, where an engine fills in zeros for those that none did."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["Reach"]


class Reach:
    """Notes by name which parameters autograd gave a gradient. torch says it with a gradient of None; DeepSpeed's engines hold
    zeros instead, or at stage 3 what an earlier step left.

    Cost: one hook per parameter and backward, no tensor.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]]) -> None:
        self.names = [name for name, _ in named]
        self.last: set[str] = set()
        """Reached since gradients were last discarded."""
        self._earlier: set[str] = set()
        self._mixed = False
        self._all = torch.ones(len(self.names), dtype=torch.float64)
        # The hooks hold the set alone, so neither the model nor the engine is kept alive by them.
        note = self.last.add
        handles = [p.register_post_accumulate_grad_hook(functools.partial(_note, note, name))  # type: ignore[no-untyped-call]
                   for name, p in named]
        weakref.finalize(self, _remove, handles)

    def begin_step(self) -> None:
        """Forget the passes of the step before; gradients that are there stay noted."""
        self._earlier.clear()
        self._mixed = False

    def forget(self) -> None:
        """Gradients are discarded: the next pass begins."""
        self._earlier |= self.last
        self.last.clear()

    def mix(self) -> None:
        """The gradient holds parts of all passes of this step, not of the last alone."""
        self._mixed = True

    def claim(self, name: str) -> None:
        """Something other than a pass gives this parameter a gradient."""
        self.last.add(name)

    def flags(self, device: torch.device) -> Tensor:
        """One number per parameter, in the order of `names`: 1 where this rank has a gradient. (n,) float64."""
        found = self.last | self._earlier if self._mixed else self.last
        if len(found) == len(self.names):
            if self._all.device != device:
                self._all = self._all.to(device)
            return self._all
        return torch.tensor([float(n in found) for n in self.names], dtype=torch.float64, device=device)


def _note(note: Callable[[str], None], name: str, _: Tensor) -> None:
    note(name)


def _remove(handles: Iterable[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
