"""The one owner of forward and backward: an objective that mixins call to ask for the gradient once more, and its micro-batches:
what a loss is divided by, and whether a closure has divided it already."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from everbatch import seeds
from everbatch.engines.host import Host
from everbatch.errors import UnsupportedHost, check

__all__ = ["Accumulation", "Objective", "backward"]

Closure = Callable[..., Any]
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


@dataclass(eq=False)
class Objective:
    """One step's closures, bound to their host. Call it to run a pass; the gradient is in the shards afterwards.

    The first call is the *recorded* pass: it alone moves running statistics and gives the loss. Later calls repeat its noise
    (dropout, stochastic depth) and leave statistics as they are. A *probe* (before the gradient is estimated) has noise of
    its own. The host's `Watch` knows the modules.
    """

    local: ClassVar[bool] = False
    """Whether its passes are local ones, if a call does not say."""
    accumulation: Accumulation
    closures: Mapping[str, Closure]
    penalty: Callable[[], None] | None
    """Adds the gradient of terms in the weights, after every pass of the loss; None: there are none."""
    several: bool
    """Whether the step has more passes than the recorded one."""
    seed: tuple[int, int] = (0, 0)
    loss: Any = None
    passes: int = 0
    recorded: bool = False
    recording: bool = False
    _noise: list[Tensor] = field(default_factory=list)
    _after: list[Tensor] = field(default_factory=list)

    @property
    def host(self) -> Host:
        return self.accumulation.host

    def __call__(self, of: str | Closure = "loss", *, probe: bool = False, local: bool = False) -> Any:
        """Run one pass; returns the closure's result, detached. Collective.

        Args:
            of: "loss" (the step's closure), the name of an auxiliary closure that `step` was given, or a closure. Penalties
                on the weights are added to the loss and to a closure passed here, not to auxiliary ones.
            probe: a pass before the gradient is estimated, with noise of its own.
            local: leave this rank's own, unreduced gradient, in `host.local_gradient()`.
        """
        closure = self.closures.get(of) if isinstance(of, str) else of
        if closure is None and of == "loss" and not self.recorded:
            # step() without a closure: the gradients that are there are the recorded pass
            self.recorded, self.passes = True, 1
            self.host.end_pass()
            if self.penalty is not None:
                self.penalty()
            return None
        if closure is None:
            raise RuntimeError(f"step() was not given {'a closure' if of == 'loss' else f'{of}='}, and a mixin asks for its "
                               "gradient; call opt.step(closure) with a closure that runs forward and opt.backward(loss)")
        first = not self.recorded and not probe
        if self.several and (first or probe):
            self._noise = _random_state()
        if probe:
            seeds.seed_step(seeds.derive(self.seed[0], "probe", self.passes), self.seed[1], self.host.rank)
        elif not first:
            _set_random_state(self._noise)
        self.recording = first
        try:
            result = self._run(of, closure, recorded=first, local=local)
        finally:
            self.recording = self.host.local = False
        self.passes += 1
        if first:
            self.recorded, self.loss = True, _detach(result)
            self._after = _random_state() if self.several else []
        else:
            _set_random_state(self._noise if probe else self._after)
        if self.penalty is not None and not local and (of == "loss" or not isinstance(of, str)):
            self.penalty()
        return _detach(result)

    def _run(self, of: str | Closure, closure: Closure, *, recorded: bool, local: bool) -> Any:
        """The closure, between the host's preparations for a pass and their end."""
        host, micro_batches = self.host, self.accumulation
        counted = isinstance(of, str) and of != "per_sample"
        if counted:
            micro_batches.begin(str(of))
        if host.dirty:
            host.publish()
            host.dirty = False
        host.discard()
        host.local = local
        host.set_sync(True)
        micro_batches.ready = True
        watch = host.watch
        try:
            watch.open(host.meet, recorded=recorded)
            torch.clear_autocast_cache()  # an autocast around the step keeps weights as an earlier pass had them
            with torch.enable_grad():
                result = closure()
        finally:
            micro_batches.ready = False
            if watch.looking or watch.undo:
                watch.close()
        if counted and micro_batches.loop is not None:
            micro_batches.complete()
            micro_batches.look_at(result)
        host.end_pass()
        return result

    def apart(self) -> Objective:
        """The same objective, whose passes are local ones."""
        return _Apart(self)

    def prove(self) -> None:
        """Once, in the first step with several passes, after the recorded one: the same pass again must give the same gradient.

        It begins with the buffers that the recorded one began with: outputs may depend on those that move, as with spectral norm.
        A host that fails to forget the first gradient shows a norm twice as large. Cost: one pass, once.
        """
        if "loss" not in self.closures:
            return
        first = self.host.gradient().norm().item()
        if not math.isfinite(first):  # this step will be skipped; the next one is as good
            return
        with self.host.watch.rolled_back():
            self()
        second = self.host.gradient().norm().item()
        unproven, self.host.unproven = self.host.unproven, ""
        if not abs(second - first) <= 1e-2 * first:
            raise UnsupportedHost(f"DeepSpeed: repeating one pass changed the gradient norm from {first:.6g} to {second:.6g}: "
                                  f"gradients of a discarded pass survive in {unproven}")


class _Apart(Objective):
    """Shares everything with another one, but for a default."""

    local = True

    def __init__(self, whole: Objective) -> None:
        self.__dict__ = whole.__dict__

    def __call__(self, of: str | Closure = "loss", *, probe: bool = False, local: bool = True) -> Any:
        return super().__call__(of, probe=probe, local=local)


class Accumulation:
    """Divides the losses of one optimizer's passes, and says once when a closure does so as well."""

    def __init__(self, who: str, host: Host) -> None:
        self.who, self.host = who, host
        self.loop: _Loop | None = None
        """The loop of the pass under way, running or ended."""
        self._name = "loss"
        """The closure that runs."""
        self.agreed: set[int] = set()
        """Numbers of micro-batches that the host takes."""
        self._known: set[str] = set()
        """Closures that have been looked at."""
        self.ready = False
        """Whether the host is set for a backward that reduces: from the begin of a pass to its first micro-batch or backward."""
        self.excused = False
        """Whether gradients may lie about that nobody misses: of a step whose closure raised, of parameters just added."""

    def leave(self) -> None:
        """A step has come to its end, and no gradient is left."""
        self.excused, self.loop = False, None

    def over(self, batches: Iterable[Any], average: bool) -> Iterator[Any]:
        """See `OptimizerMixin.micro_batches`."""
        items = list(batches)
        if not isinstance(average, bool):
            check(False, self.who, f"micro_batches(average={average!r})", "be True or False")
        if not items:
            check(False, self.who, "micro_batches([])", "hold at least one micro-batch")
        self._agree(len(items))
        loop = self.loop = _Loop(len(items), average and len(items) > 1)
        try:
            for i, item in enumerate(items):
                loop.last = i == len(items) - 1
                if not (self.ready and loop.last):
                    self.host.set_sync(loop.last)
                self.ready = False
                yield item
                if self.loop is not loop:
                    raise RuntimeError(f"{self.who}: another pass, or another loop over micro_batches, began inside this one; "
                                       "loop over pairs, opt.micro_batches(zip(a, b)), or over one after the other")
        finally:
            loop.ended = True
        self.complete()

    def share(self, loss: Tensor) -> Tensor:
        """What is to be back-propagated of a loss: in a loop that averages, its share of the mean."""
        loop, self.ready = self.loop, False
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
        self._name, self.loop = name, None

    def complete(self) -> None:
        """Refuse a loop that was left early, and one whose losses went past `opt.backward`, which divides them."""
        loop = self.loop
        if loop is not None and not loop.last:
            raise RuntimeError(f"{self.who}: the loop over micro_batches was left before its last one, which is the one that "
                               "reduces gradients; give it fewer, or loop to the end")
        if loop is not None and loop.divides and loop.given < loop.count:
            what = "no loss was" if not loop.given else f"losses of {loop.given} micro-batches of {loop.count} were"
            raise RuntimeError(f"{self.who}: {what} given to opt.backward(loss) in the loop over micro_batches, so "
                               f"{'others were not' if loop.given else 'none was'} divided; call it in place of "
                               "loss.backward(), or pass average=False and divide")

    def look_at(self, result: Any) -> None:
        """What a closure returned, beside the losses that it gave to `backward`: in a pass that is looked at."""
        if self.loop is not None and self.loop.seen:
            self._look(self.loop, result)

    def _agree(self, count: int) -> None:
        if self._name == "loss" and count not in self.agreed:  # an auxiliary objective may take its batch in other pieces
            self.host.check_micro_batches(count)
            self.agreed.add(count)

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
                "or pass average=False. If not, return the mean: the sum of what opt.backward returns", stacklevel=5)


class Passing(Protocol):
    """What has passes."""

    _accumulation: Accumulation


def backward(opt: Passing, loss: Tensor) -> Tensor:
    """Back-propagate through the engine in use: `loss.backward()`, scaled under fp16, or `engine.backward`.

    Returns:
        What was back-propagated, detached and unscaled: inside `micro_batches` the loss divided by their number, so that
        the sum of what is returned is the loss of the pass.
    """
    with torch.enable_grad():
        loss = opt._accumulation.share(loss)
        opt._accumulation.host.backward(loss)
    return loss.detach()


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _random_state() -> list[Tensor]:
    state = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state.append(torch.cuda.get_rng_state())
    return state


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])


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
