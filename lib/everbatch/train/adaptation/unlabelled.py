"""What adapting without labels has in common: a loss that knows none, and a count that is no part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from everbatch.contract import parts_of
from everbatch.data import Batch
from everbatch.errors import check
from everbatch.nn import unmix_layers
from everbatch.problems import Classification
from everbatch.rows import Rows, count_of
from everbatch.train.record import Report, StepRecord
from everbatch.train.task_ends import active_parts

__all__ = ["Unlabelled", "accuracies_of", "begin", "counted", "entropy", "nothing_counted",
           "refuse_augment", "refuse_memory", "report_of", "reset_components", "serve"]


def entropy(logits: Tensor) -> Tensor:
    """-sum_c p_c ln p_c of each row's softmax p: (n, classes) -> (n,)."""
    logs = logits.log_softmax(1)
    return -(logs.exp() * logs).sum(1)


@dataclass(frozen=True, kw_only=True)
class Unlabelled(Classification):
    """Classification without a label in the loss, which is the entropy of the predictions; labels
    are counted by."""

    term: ClassVar[str] = "entropy"
    text: ClassVar[str] = "H(softmax(logits))"

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Problem.losses`; nothing is read of the targets."""
        return entropy(outputs)


def begin(trainer: Any, who: str, model: nn.Module, problem: Classification) -> None:
    """Make the trainer one that predicts while it trains, by this loss; refuse what would bring
    labels in.

    Raises:
        ValueError: another problem than classification; other methods of the trainer beside those
            that only look.
    """
    found = getattr(trainer, "problem", None)
    check(isinstance(found, Classification), who, f"problem={found!r}", "be classification")
    parts: list[Any] = [part for part in parts_of(type(trainer)) if part.__name__ != who]
    others = [part.__name__ for part in parts if not part.observes]
    check(not others, who, f"{', '.join(others)} beside it", "stand alone",
          "nothing here may learn from labels")
    trainer.problem = problem
    trainer.serves = True
    model.eval()


def refuse_augment(trainer: Any, who: str) -> None:
    """Refuse to change what is predicted."""
    check(trainer.augment is None, who, "augment=...", "be left out",
          "what it trains on is what it predicts")


def refuse_memory(trainer: Any, who: str) -> None:
    """Refuse parts of the optimizer that look at a task's labels when it ends."""
    found = [part.__name__ for part in active_parts(trainer.optimizer)]
    check(not found, who, f"optimizer with {', '.join(found)}", "not look at labels at a task's end",
          "leave it out")


@torch.no_grad()
def counted(trainer: Any, counts: Tensor, guesses: Tensor, batch: Batch) -> Tensor:
    """`counts`, (tasks, 2), of right and of all predictions over all ranks, with those that were
    made of a batch, (n, classes). Rows of label -1 do not count. One all-reduce of two numbers, and
    no host sync."""
    right, known = guesses.argmax(1) == batch.targets, batch.targets >= 0
    both = trainer.world.sum(torch.stack([right.sum(), known.sum()]))
    counts, index = counts.to(both.device), trainer.run.task_index
    if len(counts) <= index:
        counts = torch.cat([counts, counts.new_zeros(index + 1 - len(counts), 2)])
    counts[index] += both
    return counts


def nothing_counted() -> Tensor:
    """Counts to begin with."""
    return torch.zeros(0, 2, dtype=torch.int64)


def accuracies_of(counts: Tensor) -> list[float]:
    """Online accuracy of each task so far, in [0, 1]; NaN of one without a prediction."""
    right, total = counts.double().cpu().unbind(1)
    return (right / total).tolist()


def report_of(counts: Tensor) -> Report:
    """The accuracies, and their mean over tasks."""
    found = accuracies_of(counts)
    mean = sum(found) / len(found) if found else float("nan")
    line = f"{'online accuracy':<30} {100 * mean:6.2f} %"
    return Report("online", {"accuracy": mean, "by_task": found}, (line,))


def reset_components(model: nn.Module) -> None:
    """Let UnMix-TNS layers begin anew."""
    for layer in unmix_layers(model).values():
        layer.reset()


def serve(trainer: Any, inputs: Rows) -> StepRecord:
    """A step on inputs as a source gives them, of which nobody knows a label."""
    rows = count_of(inputs)
    ids = torch.arange(rows)
    unknown = torch.full((rows,), -1)
    record: StepRecord = trainer.training_step(Batch(inputs, unknown, ids, trainer.step * rows + ids))
    return record
