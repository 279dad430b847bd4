"""Complementary learning systems: what is rehearsed is held to what slow copies of the model make of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from everbatch.data import Batch, Task
from everbatch.errors import check, check_real
from everbatch.evaluate.evaluator import evaluating
from everbatch.objective.table import cls_er
from everbatch.objective.terms import OutputTerm, evaluate
from everbatch.train.mixin import TrainerMixin

__all__ = ["CLSER", "surer"]


def surer(stable: Tensor, plastic: Tensor, targets: Tensor) -> Tensor:
    """Of each row the logits that give its label the higher probability: (n, C), (n, C), (n,) -> (n, C)."""
    index = targets[:, None]
    better = stable.softmax(1).gather(1, index) > plastic.softmax(1).gather(1, index)
    return torch.where(better, stable, plastic)


class CLSER(TrainerMixin):
    """Hold the outputs for rehearsed samples to those of the optimizer's two memories (`SemanticMemory`):

        L <- L + strength * mean_i ||u(x_i) - z_i||^2 / classes        z_i: of the stable or the plastic average, whichever gives
                                                                       the label of x_i the higher probability

    Stands beside Replay with method="er", beta=1, whose samples it takes. rows="stream" takes the arriving ones instead, as a
    mean teacher does. The averages are asked once per step, in evaluation mode, without a graph.

    Args (Config): see the fields. A trainer of your own also offers `optimizer` and `module`.

    Raises:
        ValueError: at construction: a problem other than classification. At a task's start: an optimizer without
            SemanticMemory; rows="replay" without a Replay that draws labels.

    Cost: two forwards of the rows in each step, and three publications of the weights.
    Order: left of Replay, right of mixins that craft from the stream. Limits: classification.
    Source: Arani et al. 2022, arXiv 2201.12604, eq. 4 to 6. Differs: the loss of arriving and that of rehearsed samples are means
    of their own, theirs is the mean over both; the averages run in evaluation mode.
    """

    makes = {"cls_er": {"optimizer.semantic_memory": {}, "replay.method": "er", "replay.beta": 1.0}}
    left_of = ("Replay",)
    example = {"strength": 0.5, "rows": "stream"}
    off = {"strength": 0.0}
    search = {"strength": (0.1, 0.15, 0.3, 1.0)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        strength: float = 0.1
        """Weight of the term; >= 0, 0 switches it off."""
        rows: Literal["replay", "stream"] = "replay"
        """Which samples: those that Replay draws for their labels, or those that arrive."""

        def __post_init__(self) -> None:
            check_real("CLSER", "strength", self.strength, 0.0)
            check(self.rows in ("replay", "stream"), "CLSER", f"rows={self.rows!r}", "be replay or stream")

    @classmethod
    def needs_boundaries(cls, config: CLSER.Config) -> str:
        """It does not: where a task starts it only checks."""
        return ""

    optimizer: Any
    module: Any

    def terms(self) -> tuple[OutputTerm, ...]:
        """The term."""
        config: CLSER.Config = self.configs[CLSER]
        return cls_er(config.strength, config.rows)

    def configure_model(self, model: nn.Module) -> nn.Module:
        """Refuse what has no classes."""
        problem = getattr(self, "problem", None)
        check(problem is None or problem.cross_entropy, "CLSER", f"problem={problem!r}", "be classification")
        return super().configure_model(model)  # type: ignore[misc, no-any-return]

    def on_task_start(self, task: Task) -> None:
        """Refuse what would leave the term without rows or averages."""
        config: CLSER.Config = self.configs[CLSER]
        if config.strength:
            kind = type(self.optimizer).__name__
            held = hasattr(self.optimizer, "remembered")
            check(held, "CLSER", f"optimizer {kind}", "hold SemanticMemory, whose averages it asks")
            drawn = {getattr(other, "method", "") for other in self.configs.values()}
            there = config.rows == "stream" or bool(drawn & {"er", "dark_er_pp"})
            check(there, "CLSER", "rows='replay' without rehearsal of labels", "stand beside Replay",
                  "list Replay with method='er', or set rows='stream'")
        super().on_task_start(task)  # type: ignore[misc]

    def augment_batch(self, parts: list[Batch]) -> list[Batch]:
        """Give the rows what the averages make of them."""
        parts = super().augment_batch(parts)  # type: ignore[misc]
        config: CLSER.Config = self.configs[CLSER]
        here = [part for part in parts if part.part == config.rows]
        if not config.strength or not here or not self.step:  # nothing is averaged before the first step
            return parts
        asked = {}
        with torch.no_grad(), evaluating(self.module, self.world):
            for which in ("stable", "plastic"):
                with self.optimizer.remembered(which):
                    asked[which] = [self.forward(part) for part in here]  # type: ignore[attr-defined]
        trio = zip(asked["stable"], asked["plastic"], here, strict=True)
        held = iter([surer(stable, plastic, part.targets) for stable, plastic, part in trio])
        return [replace(p, extras={**p.extras, "semantic": next(held)}) if p.part == config.rows else p for p in parts]

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Add the term."""
        terms: dict[str, Tensor] = super().loss_terms(outputs, batch)  # type: ignore[misc]
        if "semantic" not in batch.extras:
            return terms
        return terms | evaluate(CLSER.terms(self), outputs, batch)
