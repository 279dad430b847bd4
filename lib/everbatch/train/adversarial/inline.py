"""Crafting in the trainer's own process: between its own kernels, or on a side stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from everbatch.nn.statistics import has_buffers_of_its_own
from everbatch.rows import Rows, named
from everbatch.train.adversarial.attack import Attack
from everbatch.train.adversarial.placement import AdversaryLost, Crafted, Job, Placement, modes_of, set_modes

__all__ = ["Inline", "Replica", "SideStream"]


class Inline(Placement):
    """Crafts with the live module, when ordered or when `run_deferred` is called.

    Between the order and the update the weights do not change, so any moment gives the same bits.
    """

    def __init__(self, attack: Attack, module: nn.Module, logits_of: Callable[[Rows], Tensor] | None, rank: int) -> None:
        self.attack, self.module, self.logits_of, self.rank = attack, module, logits_of, rank
        self.defer = False
        """Leave the next orders to `run_deferred`."""
        self._deferred: list[tuple[int, Job]] = []
        self._done: dict[int, Crafted] = {}

    def submit(self, version: int, jobs: list[Job], weights: dict[str, Tensor]) -> None:
        self._deferred += [(version, job) for job in jobs]
        if not self.defer:
            self.run_deferred()

    def run_deferred(self) -> None:
        """Craft what was put off. Before the weights move."""
        jobs, self._deferred = self._deferred, []
        for version, job in jobs:
            self._done[job.step] = self._craft(version, job)

    def collect(self, step: int) -> Crafted:
        if step not in self._done:
            raise AdversaryLost(f"step {step} was ordered from another adversary")
        return self._done.pop(step)

    def _craft(self, version: int, job: Job) -> Crafted:
        return Crafted(self.attack.run(self.module, job.inputs, job.targets, step=job.step, rank=self.rank,
                                       logits_of=self.logits_of), version)


class Replica(Inline):
    """Crafts in the trainer's process with a copy of the model, when an adversary was lost: no engine is asked, so one rank can
    do it alone, also where weights are sharded."""

    def __init__(self, attack: Attack, module: nn.Module, live: nn.Module, rank: int) -> None:
        super().__init__(attack, module, None, rank)
        self.live = live
        """The trainer's module, whose modes the copy takes."""

    def submit(self, version: int, jobs: list[Job], weights: dict[str, Tensor]) -> None:
        set_modes(list(self.module.modules()), modes_of(self.live.modules()))
        for name, value in [*self.module.named_parameters(), *self.module.named_buffers()]:
            value.data = weights[name].detach().clone()
        super().submit(version, jobs, weights)


class SideStream(Inline):
    """Crafts on a second CUDA stream while the main stream trains; on a CPU the same as `Inline`.

    The side stream begins after the weights of this step are final, the main stream waits for it before they move
    (`before_update`), and a crafted batch is used only after its event. Memory that one stream allocated and the other reads is
    marked for the allocator. Where a forward may move buffers other than batch norms' statistics, which crafting puts back, the
    main stream waits at once: two forwards beside each other would lose what one of them moved.
    """

    def __init__(self, attack: Attack, module: nn.Module, logits_of: Callable[[Rows], Tensor] | None, rank: int) -> None:
        super().__init__(attack, module, logits_of, rank)
        cuda = next(module.parameters()).is_cuda
        self.stream: Any = torch.cuda.Stream() if cuda else None  # type: ignore[no-untyped-call]
        self._events: dict[int, Any] = {}
        self._waits = cuda and has_buffers_of_its_own(module)

    def _craft(self, version: int, job: Job) -> Crafted:
        if self.stream is None:
            return super()._craft(version, job)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            done = super()._craft(version, job)
            self._events[job.step] = self.stream.record_event()
        for value in named("inputs", job.inputs).values():
            value.record_stream(self.stream)
        job.targets.record_stream(self.stream)
        if self._waits:
            self.before_update()
        return done

    def before_update(self) -> None:
        """Let the main stream wait until crafting has read the weights, which the update changes in place."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    def collect(self, step: int) -> Crafted:
        done = super().collect(step)
        if step in self._events:
            torch.cuda.current_stream().wait_event(self._events.pop(step))
            done.payload.record_stream(torch.cuda.current_stream())
        return done
