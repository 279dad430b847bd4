"""From orders to crafted batches, and what becomes of a run that loses its adversary."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from everbatch.data import Batch
from everbatch.rows import Rows
from everbatch.train.adversarial.attack import Attack
from everbatch.train.adversarial.fifo import Fifo, Waiting
from everbatch.train.adversarial.inline import Inline, Replica, SideStream
from everbatch.train.adversarial.placement import AdversaryLost, Crafted, Job, Nobody, Placement, slots_of, whole_weights
from everbatch.train.adversarial.process import BesideProcess
from everbatch.train.adversarial.ranks import RemoteRank, Role

__all__ = ["Pipeline"]


class Pipeline:
    """One trainer rank's crafted batches: ordered `tau` steps ahead, taken when their step comes.

    Args:
        spare: a copy of the bare model for crafting elsewhere; None where the live one crafts.
    """

    def __init__(
        self, attack: Attack, live: nn.Module, fifo: Fifo, *, tau: int, placement: str,
        logits_of: Callable[[Rows], Tensor] | None, spare: nn.Module | None, role: Role | None, device: torch.device,
        on_failure: Literal["clean", "inline", "stop"], patience_s: float, threads: int, split: bool,
    ) -> None:
        self.attack, self.live, self.fifo, self.tau, self.spare, self.on_failure = attack, live, fifo, tau, spare, on_failure
        self.rank = fifo.world.rank
        self.lost = 0
        """Batches that had no crafted copy because an adversary was lost."""
        self._sent = 0
        self._slots = slots_of(live)
        self._ids: dict[int, Tensor] = {}
        """Of batches under way, by step."""
        self.remote = placement in ("process", "ranks")
        if placement == "process":
            assert spare is not None
            self.place: Placement = BesideProcess(attack, spare, live, rank=self.rank, depth=tau + 1, device=device,
                                                  patience_s=patience_s, threads=threads)
        elif placement == "ranks":
            assert role is not None
            self.place = RemoteRank(attack, live, role, split=split, patience_s=patience_s)
        else:
            self.place = (SideStream if placement == "stream" else Inline)(attack, live, logits_of, self.rank)
        fifo.drain = self.drain

    def order(self, version: int, batches: list[tuple[int, Batch]]) -> None:
        """Have these batches crafted with the weights as they are now. Collective where the weights are sharded and crafting
        happens elsewhere, also on a rank that has lost its adversary."""
        jobs = [Job(step, batch.inputs, batch.targets) for step, batch in batches]
        self._ids |= {step: batch.ids for step, batch in batches}
        if not self.remote:
            self.place.submit(version, jobs, {})
            return
        with whole_weights(self._slots) as weights:
            try:
                self.place.submit(version, jobs, weights)
            except AdversaryLost as error:
                self._lose(error)
                self.place.submit(version, jobs, weights)

    def take(self, step: int, ids: Tensor) -> Tensor | None:
        """The crafted batch of this step; None if it was lost with its adversary.

        Raises:
            RuntimeError: it is staler than tau, or belongs to other samples.
        """
        if step in self._ids:
            self._bring(step)
        found = self.fifo.take(step, ids)
        if found is None:
            self.lost += 1
            return None
        if not 0 <= step - found.version <= self.tau:
            raise RuntimeError(f"ConAdv: the batch for step {step} was crafted with the weights of step {found.version}, must be "
                               f"at most {self.tau} steps old")
        return found.payload

    def drain(self) -> None:
        """Bring in everything that is under way."""
        for step in sorted(self._ids):
            self._bring(step)

    def clear(self) -> None:
        """Forget everything that waits or is under way."""
        self.drain()
        self.fifo.waiting.clear()

    @property
    def sent(self) -> int:
        """Bytes that have left this rank for its adversary, and come back, so far."""
        return self._sent + self.place.sent

    def close(self) -> None:
        """End the adversary. What is under way is forgotten."""
        self.place.close()
        self._ids.clear()

    def _bring(self, step: int) -> None:
        ids = self._ids.pop(step)
        try:
            made: Crafted = self.place.collect(step)
        except AdversaryLost as error:
            self._lose(error)
            return
        self.fifo.waiting[step] = Waiting(made.payload, made.version, ids)

    def _lose(self, error: AdversaryLost) -> None:
        """Go on without the adversary, or not at all. What it was working on is lost."""
        if isinstance(self.place, Nobody | Replica):
            return
        if self.on_failure == "stop":
            self.place.close()  # one that is stopped would outlive the run
            raise RuntimeError(f"ConAdv: the adversary of rank {self.rank} is lost: {error}; with on_failure='clean' or 'inline' "
                               "training would go on") from error
        how = "clean batches" if self.on_failure == "clean" else "crafting in the trainer"
        warnings.warn(f"ConAdv: the adversary of rank {self.rank} is lost, going on with {how}: {error}", stacklevel=2)
        self._sent += self.place.sent
        self.place.close()
        if self.on_failure == "clean":
            self.place = Nobody()
        else:
            assert self.spare is not None
            device = next(self.live.parameters()).device
            self.place = Replica(self.attack, self.spare.to(device), self.live, self.rank)
