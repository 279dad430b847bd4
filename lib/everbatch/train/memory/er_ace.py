"""Asymmetric cross-entropy: what arrives does not push down the classes of what is remembered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from everbatch.data import Batch
from everbatch.errors import check
from everbatch.problems import Problem
from everbatch.train.memory.lwf import LwF
from everbatch.train.mixin import TrainerMixin

__all__ = ["ErAce", "asymmetric_losses"]


def asymmetric_losses(problem: Problem, logits: Tensor, targets: Tensor, classes: Tensor) -> Tensor:
    """The losses of rows whose prediction is among `classes` alone:  -log( exp u_y / sum_{c in classes} exp u_c ).

    Shapes (n, C), (n,), (k,) ascending -> (n,). Columns are taken out rather than masked: a mask of -inf and label smoothing
    give NaN. Every target must be one of `classes`.
    """
    return problem.losses(logits[:, classes], torch.searchsorted(classes, targets))


class ErAce(TrainerMixin):
    """Asymmetric cross-entropy: classes of the arriving batch compete among themselves, those of the memory with all.

        L = CE(B; over the classes of B) + what Replay adds          ER-ACE: Replay with method="er", beta=1

    Plain cross-entropy on a batch of new classes pushes down the logits of all others at every step, and what is replayed must
    lift them again. Classes of B are those of the whole global batch: the same at any world size and any number of
    micro-batches, without communication.

    Args (Config): see the fields.

    Raises:
        ValueError: at construction: a problem that is not cross-entropy of labels; LwF with heads="by_task".

    Cost: a second cross-entropy of the batch, over fewer columns.
    Order: any. Limits: cross-entropy of labels.
    Source: Caccia et al. 2022, arXiv 2104.05025, section 4.1, L_ace.
    Differs: the authors' code (and Mammoth's) also leaves classes in that no batch has shown so far, and changes nothing in the
    first task; here the paper's rule holds from the first step. The replayed rows compete with all logits of the head, where
    the paper has the classes seen so far.
    """

    makes = {"er_ace": {"replay.method": "er", "replay.beta": 1.0}}
    example = {}
    off = {"candidates": "all"}
    search = {}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        candidates: Literal["batch", "all"] = "batch"
        """Classes that an arriving sample's own competes with: those of its batch, or all (plain cross-entropy)."""

        def __post_init__(self) -> None:
            check(self.candidates in ("batch", "all"), "ErAce", f"candidates={self.candidates!r}", "be batch or all")

    problem: Problem
    __classes: Tensor
    """Labels of the global batch of this step, ascending."""

    def configure_model(self, model: nn.Module) -> nn.Module:
        """Refuse what has no classes."""
        problem = getattr(self, "problem", None)
        check(problem is not None and problem.cross_entropy, "ErAce", f"problem={type(problem).__name__}",
              "be cross-entropy of labels", "leave it out, or set a trainer's problem=Classification()")
        beside = self.configs.get(LwF)
        check(beside is None or beside.heads == "joint", "ErAce", "LwF(heads='by_task')", "be heads='joint'",
              "one loss is over the task's own numbers of its classes, the other over the stream's")
        return super().configure_model(model)  # type: ignore[misc, no-any-return]

    def augment_batch(self, parts: list[Batch]) -> list[Batch]:
        """Once per step: note the classes of the global batch."""
        ready: list[Batch] = super().augment_batch(parts)  # type: ignore[misc]
        stream = next(part for part in ready if part.part == "stream")
        if self.configs[ErAce].candidates == "batch":
            _, targets, _ = self.global_rows(stream)
            self.__classes = torch.unique(targets).to(stream.targets.device)
        return ready

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Replace the loss of the stream's part."""
        terms: dict[str, Tensor] = super().loss_terms(outputs, batch)  # type: ignore[misc]
        if batch.part == "stream" and self.configs[ErAce].candidates == "batch":
            losses = asymmetric_losses(self.problem, outputs, batch.targets, self.__classes)
            terms[self.problem.term] = batch.mean(losses)
        return terms

    def notes(self) -> str:
        """What describe() says."""
        narrow = self.configs[ErAce].candidates == "batch"
        return "the stream's loss is over the classes of its batch" if narrow else ""
