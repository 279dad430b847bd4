"""How ConAdv is tied to its trainer: the model and its adversarial branch, the pipeline, and when crafting may run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from everbatch.contract import parts_of
from everbatch.data import Batch
from everbatch.errors import check
from everbatch.nn import branch_parameters, convert_split_bn
from everbatch.problems import Problem
from everbatch.train.adversarial.attack import BRANCH, Attack
from everbatch.train.adversarial.fifo import Fifo
from everbatch.train.adversarial.inline import Inline, SideStream
from everbatch.train.adversarial.options import AdversarialOptions
from everbatch.train.adversarial.pipeline import Pipeline
from everbatch.train.adversarial.ranks import Role

__all__ = ["Wiring", "losses_of"]


@dataclass
class Wiring:
    """What ConAdv holds of its trainer, and what it has built for it. Nothing of it is saved."""

    model: nn.Module
    """The bare model, which trains."""
    role: Role | None
    """Where ranks were split: this process's part."""
    branch: list[str]
    """Parameters of the adversarial batch norms, by name."""
    spare: nn.Module | None
    """A copy of the model for crafting elsewhere."""
    lost: bool = False
    """Whether this step's batch was lost with its adversary."""
    attack: Attack | None = None
    """Made, as all below, when the first batch shows shapes, device and engine."""
    pipeline: Pipeline | None = None
    moves_first: bool = False
    """Whether the recorded pass runs at moved weights, which crafting must not read."""
    overlaps: bool = False
    """Whether crafting may wait until DDP reduces gradients."""
    whole_branch: list[Tensor] = field(default_factory=list)
    """The branch's parameters, where DDP waits for the gradient of each."""

    @classmethod
    def of(cls, options: AdversarialOptions, model: nn.Module, role: Role | None) -> Wiring:
        """Split the model's batch norms, and copy it before an engine puts its hooks on it."""
        active = options.weight_adversarial > 0
        split = convert_split_bn(model, (BRANCH,)) if options.split_bn and active else 0
        if options.split_bn and not split:
            logging.getLogger("everbatch").info("ConAdv: the model has no batch norm, nothing to split")
        elsewhere = options.placement in ("process", "ranks") and active
        return cls(
            model=model, role=role,
            branch=[name for name in branch_parameters(model, BRANCH)] if split else [],
            spare=copy.deepcopy(model) if elsewhere else None)

    def begin(self, options: AdversarialOptions, trainer: Any, fifo: Fifo, clean: Batch) -> Pipeline:
        """Build attack and pipeline.

        Args:
            trainer: may offer stream, config, optimizer, engine and bare(inputs).
            clean: the first batch.
        """
        optimizer = getattr(trainer, "optimizer", None)
        check(options.first != "clean" or not self.branch or hasattr(optimizer, "hold"), "ConAdv",
              "first='clean' with an optimizer that moves parameters without a gradient",
              "have an optimizer of everbatch.optim", "compose(base=...), or set first='clamp'")
        self.attack = _attack(options, trainer)
        device = torch.device(options.adversary_device) if options.adversary_device else clean.targets.device
        self.pipeline = Pipeline(
            self.attack, self.model, fifo, tau=options.tau, placement=options.placement, split=bool(self.branch),
            logits_of=getattr(trainer, "bare", None), spare=self.spare, role=self.role,
            on_failure=options.on_failure, patience_s=options.patience_s, threads=options.adversary_threads,
            device=device)
        ddp = isinstance(getattr(getattr(trainer, "engine", None), "call", None), DistributedDataParallel)
        parts = parts_of(type(optimizer)) if optimizer is not None else ()
        self.moves_first = any(getattr(part, "moves_first", False) for part in parts)
        self.overlaps = ddp and not self.moves_first
        live = dict(self.model.named_parameters())
        self.whole_branch = [live[name] for name in self.branch] if ddp else []
        return self.pipeline

    def order(self, version: int, step: int, batch: Batch) -> None:
        """Have the batch of `step` crafted with the weights of step `version`, which is now."""
        assert self.pipeline is not None
        place = self.pipeline.place
        if isinstance(place, Inline):
            place.defer = step > version and self.overlaps and not isinstance(place, SideStream)
        self.pipeline.order(version, [(step, batch)])
        if isinstance(place, Inline):
            place.defer = False
        if isinstance(place, SideStream) and self.moves_first:
            place.before_update()

    def watch(self, term: Tensor) -> None:
        """Have deferred crafting run once the recorded pass has computed its last gradient, that of `term`: DDP's reduction is
        under way then, and the engine's callbacks run in the order in which they were queued, so ours comes before DDP's wait."""
        assert self.pipeline is not None
        place = self.pipeline.place
        if not isinstance(place, Inline) or not term.requires_grad:
            return
        side = isinstance(place, SideStream)
        after: Callable[[], None] = place.before_update if isinstance(place, SideStream) else place.run_deferred

        def queue(_gradient: Tensor) -> None:
            Variable._execution_engine.queue_callback(after)

        if side or self.overlaps:
            term.register_hook(queue)  # type: ignore[no-untyped-call]


def _attack(options: AdversarialOptions, trainer: Any) -> Attack:
    """The attack that crafts for this trainer."""
    classes = options.classes or getattr(getattr(trainer, "stream", None), "num_classes", None)
    check(not options.targeted or classes is not None, "ConAdv", "targeted=True", "know the number of classes",
          "set classes=")
    config = getattr(trainer, "config", None)
    return Attack(
        radius=options.radius, step_size=options.step_size, steps=options.steps, mean=tuple(options.mean),
        std=tuple(options.std), raw_low=options.raw_low, raw_high=options.raw_high, targeted=options.targeted,
        random_start=options.random_start, embedding=options.embedding, classes=int(classes or 0),
        pieces=getattr(config, "accumulation", 1), seed=trainer.seed,
        autocast=getattr(config, "precision", "fp32") == "bf16", problem=losses_of(trainer))


def losses_of(trainer: Any) -> Problem | None:
    """The problem whose losses are attacked; None for the cross-entropy of class indices."""
    problem: Problem | None = getattr(trainer, "problem", None)
    return None if problem is None or problem.cross_entropy else problem
