"""The one owner of forward and backward: an objective that mixins call to ask for the gradient once more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from everbatch import seeds

if TYPE_CHECKING:
    from everbatch.engines.host import Host

__all__ = ["Objective"]

Closure = Callable[..., Any]


class Objective:
    """One step's closures, bound to their host. Call it to run a pass; the gradient is in the shards afterwards.

    The first call is the *recorded* pass: it alone moves running statistics and gives the loss. Later calls repeat its noise
    (dropout, stochastic depth) and leave statistics as they are. A *probe* (before the gradient is estimated) has noise of
    its own. The host's `Watch` knows the modules.
    """

    def __init__(
        self, host: Host, closures: Mapping[str, Closure], penalty: Callable[[], None], *, several: bool,
        seed: tuple[int, int] = (0, 0),
    ) -> None:
        self.host, self.closures, self.penalty, self.several, self.seed = host, closures, penalty, several, seed
        self.loss: Any = None
        self.passes = 0
        self.recorded = False
        self.recording = False
        self.local = False
        """Set while passes shall leave this rank's own, unreduced gradient in `host.local_gradient()`."""
        self._noise: list[Tensor] = []
        self._after: list[Tensor] = []

    def __call__(self, of: str | Closure = "loss", *, probe: bool = False) -> Any:
        """Run one pass; returns the closure's result, detached. Collective.

        Args:
            of: "loss" (the step's closure), the name of an auxiliary closure that `step` was given, or a closure. Penalties
                on the weights are added to the loss and to a closure passed here, not to auxiliary ones.
            probe: a pass before the gradient is estimated, with noise of its own.
        """
        closure = self.closures.get(of) if isinstance(of, str) else of
        if closure is None and of == "loss" and not self.recorded:
            # step() without a closure: the gradients that are there are the recorded pass
            self.recorded, self.passes = True, 1
            self.host.end_pass()
            self.penalty()
            return None
        if closure is None:
            raise RuntimeError(f"step() was not given {'a closure' if of == 'loss' else f'{of}='}, and a mixin asks for its "
                               "gradient; call opt.step(closure) with a closure that runs forward and opt.backward(loss)")
        first = not self.recorded and not probe
        self.host.publish_if_dirty()
        self.host.discard()
        if self.several and (first or probe):
            self._noise = _random_state()
        if probe:
            seeds.seed_step(seeds.derive(self.seed[0], "probe", self.passes), self.seed[1], self.host.rank)
        elif not first:
            _set_random_state(self._noise)
        self.recording, self.host.local = first, self.local
        try:
            self.host.set_sync(True)
            with self.host.watch.over(recorded=first), torch.enable_grad():
                result = closure()
            self.host.end_pass()
        finally:
            self.recording = self.host.local = False
        self.passes += 1
        if first:
            self.recorded, self.loss = True, _detach(result)
            self._after = _random_state() if self.several else []
        else:
            _set_random_state(self._noise if probe else self._after)
        if not self.local and (of == "loss" or not isinstance(of, str)):
            self.penalty()
        return _detach(result)


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
