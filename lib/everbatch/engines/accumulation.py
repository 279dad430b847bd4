"""The micro-batches of one pass: what a loss is divided by, and whether a closure has divided it already."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from everbatch.errors import check

if TYPE_CHECKING:
    from everbatch.engines.host import Host

__all__ = ["Accumulation"]

WRAPPING = {"AliasBackward0", "CloneBackward0", "ReshapeAliasBackward0", "SqueezeBackward0", "ToCopyBackward0", "ViewBackward0"}
"""Last operations of a loss that leave its value as it is."""
ARITHMETIC = {"AddBackward0", "DivBackward0", "MulBackward0", "StackBackward0", "SubBackward0", "SumBackward0", "SumBackward1"}
"""Last operations of a loss that may have weighted it; where a criterion or a mean comes last, none has."""
NEAR = 1e-2
"""Relative distance up to which a returned loss is taken for the sum, or the mean, of the losses given."""


@dataclass
class _Loop:
    """One loop over `micro_batches`."""

    count: int
    divides: bool
    last: bool = False
    """Whether its last micro-batch was reached."""
    ended: bool = False
    given: int = 0
    """Losses that were back-propagated in it."""
    seen: list[tuple[Tensor, bool, float]] = field(default_factory=list)
    """While its closure is looked at: each loss as it came, whether arithmetic made it, and what it was divided by."""


class Accumulation:
    """Divides the losses of one optimizer's passes, and says once when a closure does so as well."""

    def __init__(self, who: str, host: Host) -> None:
        self.who, self.host = who, host
        self._loop: _Loop | None = None
        """The loop of the pass under way, running or ended."""
        self._name = "loss"
        """The closure that runs."""
        self._known: set[str] = set()
        """Closures that have been looked at."""
        self.excused = False
        """Whether gradients may lie about that nobody misses: of a step whose closure raised, of parameters just added."""

    def enter(self, closure: bool) -> None:
        """A step begins: with a closure, gradients that are there were made outside of it, and would be lost; without, they are
        used."""
        name = self.host.left_over() if closure and not self.excused else ""
        if name:
            raise RuntimeError(f"{self.who}: step(closure) found a gradient of a backward outside of the closure ({name}), which "
                               "every pass would forget; run all micro-batches inside the closure (opt.micro_batches), call "
                               "opt.step() without a closure to use the gradients that are there, or opt.zero_grad() before the "
                               "step to forget them")
        self.excused = closure
        if not closure:
            self.complete()

    def leave(self) -> None:
        """A step has come to its end, and no gradient is left."""
        self.excused, self._loop = False, None

    def over(self, batches: Iterable[Any], average: bool) -> Iterator[Any]:
        """See `OptimizerMixin.micro_batches`."""
        items = list(batches)
        check(isinstance(average, bool), self.who, f"micro_batches(average={average!r})", "be True or False")
        check(bool(items), self.who, "micro_batches([])", "hold at least one micro-batch")
        self._agree(len(items))
        loop = self._loop = _Loop(len(items), average and len(items) > 1)
        try:
            for i, item in enumerate(items):
                loop.last = i == len(items) - 1
                self.host.set_sync(loop.last)
                yield item
                if self._loop is not loop:
                    raise RuntimeError(f"{self.who}: another pass, or another loop over micro_batches, began inside this one; "
                                       "loop over pairs, opt.micro_batches(zip(a, b)), or over one after the other")
        finally:
            loop.ended = True
        self.complete()

    def share(self, loss: Tensor) -> Tensor:
        """What is to be back-propagated of a loss: in a loop that averages, its share of the mean."""
        loop = self._loop
        if loop is None:
            self._agree(1)
        if loop is None or loop.ended:
            return loss
        loop.given += 1
        if not loop.divides:
            return loss
        if self._name not in self._known:
            loop.seen.append((loss.detach(), *_made(loss)))
        return loss / loop.count

    def begin(self, name: str) -> None:
        """A pass of the closure `name` begins."""
        self._name, self._loop = name, None

    def complete(self) -> None:
        """Refuse a loop that was left early, and one whose losses went past `opt.backward`, which divides them."""
        loop = self._loop
        if loop is not None and not loop.last:
            raise RuntimeError(f"{self.who}: the loop over micro_batches was left before its last one, which is the one that "
                               "reduces gradients; give it fewer, or loop to the end")
        if loop is not None and loop.divides and loop.given < loop.count:
            what = "no loss was" if not loop.given else f"losses of {loop.given} micro-batches of {loop.count} were"
            raise RuntimeError(f"{self.who}: {what} given to opt.backward(loss) in the loop over micro_batches, so "
                               f"{'others were not' if loop.given else 'none was'} divided; call it in place of "
                               "loss.backward(), or pass average=False and divide")

    def watched(self, name: str, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with its loop over micro-batches looked after."""
        def run() -> Any:
            self.begin(name)
            result = closure()
            self.complete()
            if self._loop is not None and self._loop.seen:
                self._look(self._loop, result)
            return result

        return run

    def _agree(self, count: int) -> None:
        if self._name == "loss":  # an auxiliary objective may take its batch in other pieces
            self.host.check_micro_batches(count)

    def _look(self, loop: _Loop, result: Any) -> None:
        """Warn of a closure that divided its losses itself. Cost: one host sync, in one step."""
        total = float(torch.stack([loss.float() for loss, _, _ in loop.seen]).sum())
        if not math.isfinite(total) or not total:
            return  # shows nothing; the next step is as good
        self._known.add(self._name)
        returned, mean = _number(result), total / loop.count
        if math.isclose(returned, mean, rel_tol=NEAR):
            return
        divided = all(divisor == loop.count for *_, divisor in loop.seen)
        summed = math.isclose(returned, total, rel_tol=NEAR) and all(made for _, made, _ in loop.seen)
        if (divided or summed) and self.host.rank == 0:
            found = f"divided by {loop.count}" if divided else f"whose sum, {total:.4g}, it returned"
            warnings.warn(
                f"{self.who}: the closure gave opt.backward {len(loop.seen)} losses {found}, and opt.micro_batches divides "
                f"each by {loop.count} as well. If they were divided, gradients are {loop.count} times too small: drop that, "
                "or pass average=False. If not, return the mean: the sum of what opt.backward returns", stacklevel=4)


def _number(result: Any) -> float:
    """What a closure returned, if it is one number, else NaN."""
    if isinstance(result, Tensor):
        return float(result) if result.numel() == 1 and not result.is_complex() else math.nan
    return float(result) if isinstance(result, int | float) else math.nan


def _made(loss: Tensor) -> tuple[bool, float]:
    """Whether a loss is the result of arithmetic, and the number it was divided by last (1 if none). No host sync."""
    node: Any = loss.grad_fn
    while node is not None and node.name() in WRAPPING and node.next_functions:
        node = node.next_functions[0][0]
    name = "" if node is None else node.name()
    other = getattr(node, "_saved_other", None) if name in ("DivBackward0", "MulBackward0") else None
    if not isinstance(other, Tensor) or other.device.type != "cpu" or other.numel() != 1:
        return name in ARITHMETIC, 1.0
    number = float(other)
    if name == "MulBackward0":
        return True, round(1 / number, 6) if number else 1.0
    return True, number
