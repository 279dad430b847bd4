"""One attack with all its options: the same function of (weights, batch, seed, step, rank) wherever it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from everbatch import seeds
from everbatch.nn import frozen_statistics, split_branch
from everbatch.problems import Problem
from everbatch.rows import Rows, called, device_of, each, one_tensor, split
from everbatch.train.adversarial.craft import Box, apply_signs, craft, craft_embedding, pixel_box, random_point, wrong_targets

__all__ = ["BRANCH", "Attack"]

BRANCH = "adversarial"
"""The batch-norm branch that crafting and the adversarial part of the loss use."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Options of `ConAdv` that crafting needs; plain values, so that it can be sent to another process.

    Its randomness (dropout, random starts, target classes) is torch's global generator, seeded from (seed, step of the batch,
    rank) and put back afterwards: crafting changes no other random number.
    """

    radius: float
    step_size: float | None
    steps: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    raw_low: float
    raw_high: float
    targeted: bool
    random_start: float
    embedding: str | None
    classes: int
    pieces: int
    """Micro-batches, so that batch norm sees the same rows here and in training."""
    autocast: bool
    """bf16 autocast."""
    seed: int
    problem: Problem | None = None
    """Whose losses are attacked; None: cross-entropy of class indices."""

    def box(self, clean: Tensor) -> Box:
        """Of inputs on that device and in that dtype."""
        return _box(self, clean.device, clean.dtype)

    @property
    def signs(self) -> bool:
        """Whether a crafted batch is kept as int8 signs, exactly: one step from the clean input."""
        return self.steps == 1 and self.random_start == 0.0

    def run(self, module: nn.Module, inputs: Rows, targets: Tensor, *, step: int, rank: int,
            logits_of: Callable[[Rows], Tensor] | None = None) -> Tensor:
        """Craft for one batch with the weights `module` has now.

        Args:
            module: the bare model, in training mode; no parameter, gradient, buffer or mode of it changes.
            inputs, targets: (n, ...) model inputs, or several by name, and (n,) labels, or what the problem takes.
            step: at which the batch will be trained on.
            logits_of: how to call the module; by default directly.

        Returns:
            What `finish` turns into the crafted batch: int8 signs, crafted inputs, or an embedding's perturbation.
        """
        call = logits_of or self.forward(module)
        devices = [targets.device] if targets.is_cuda else []
        with torch.random.fork_rng(devices=devices), frozen_statistics(module), split_branch(module, BRANCH):
            seeds.seed_step(seeds.derive(self.seed, "conadv"), step, rank)
            # One draw per batch, the same on every rank, as the released code makes it.
            noisy = torch.rand((), generator=seeds.generator(self.seed, "conadv start", step)).item() < self.random_start
            return torch.cat([self._piece(module, call, x, y, noisy) for x, y in zip(
                split(inputs, self.pieces), targets.tensor_split(self.pieces), strict=True) if len(y)])

    def _piece(self, module: nn.Module, call: Callable[[Rows], Tensor], x: Rows, y: Tensor, noisy: bool) -> Tensor:
        aim = wrong_targets(y, self.classes) if self.targeted else y
        losses = None if self.problem is None else self.problem.losses
        if self.embedding is not None:
            step = self.radius / self.steps if self.step_size is None else self.step_size
            return craft_embedding(call, x, aim, module.get_submodule(self.embedding), self.radius, step, steps=self.steps,
                                   targeted=self.targeted, random_start=noisy, signs_only=self.signs, losses=losses)
        x = one_tensor("ConAdv", x)
        return craft(call, x, aim, self.box(x), steps=self.steps, targeted=self.targeted,
                     start=random_point(x, self.box(x)) if noisy else None, signs_only=self.signs, losses=losses)

    def forward(self, module: nn.Module) -> Callable[[Rows], Tensor]:
        """Calls a bare module as the trainer does: under autocast, or with inputs in the weights' low precision."""
        weights = next(module.parameters()).dtype

        def cast(x: Tensor) -> Tensor:
            return x.to(weights) if x.is_floating_point() and weights == torch.bfloat16 else x

        def call(x: Rows) -> Tensor:
            with torch.autocast(device_of(x).type, torch.bfloat16, enabled=self.autocast):
                return called(module, each(cast, x)).float()  # type: ignore[no-any-return]

        return (lambda x: called(module, x)) if weights == torch.float64 else call

    def finish(self, payload: Tensor, clean: Rows) -> tuple[Rows, Tensor | None]:
        """Inputs of the adversarial part, and what to add to the embedding (None without one), from what `run` gave."""
        payload = payload.to(device_of(clean))  # a checkpoint's are on the CPU
        if self.embedding is not None:
            step = self.radius if self.step_size is None else self.step_size
            return clean, (step * payload).clamp(-self.radius, self.radius) if self.signs else payload
        clean = one_tensor("ConAdv", clean)
        return (apply_signs(clean, payload, self.box(clean)) if self.signs else payload), None

    def noise(self, clean: Tensor, *, step: int, rank: int) -> Tensor:
        """clip(x + U(-radius, radius)) in place of a crafted batch."""
        with torch.random.fork_rng(devices=[clean.device] if clean.is_cuda else []):
            seeds.seed_step(seeds.derive(self.seed, "conadv noise"), step, rank)
            return random_point(clean, self.box(clean))


@functools.lru_cache(maxsize=16)
def _box(attack: Attack, device: torch.device, dtype: torch.dtype) -> Box:
    """Made once: a copy to a GPU per bound and step is nothing to wait for."""
    box = pixel_box(attack.radius, attack.step_size, steps=attack.steps, mean=attack.mean, std=attack.std, low=attack.raw_low,
                    high=attack.raw_high)
    return Box(*(getattr(box, f.name).to(device, dtype) for f in fields(Box)))
