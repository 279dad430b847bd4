"""CoTTA: a slow teacher, asked about several views of each sample, teaches the model on a stream."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from everbatch.data import Batch, Task
from everbatch.errors import check, check_real, check_whole
from everbatch.nn import adapt_batch_norm, unmix_mode
from everbatch.rows import Rows
from everbatch.train.adaptation.unlabelled import (
    Unlabelled,
    accuracies_of,
    begin,
    counted,
    nothing_counted,
    refuse_memory,
    report_of,
    reset_components,
    serve,
)
from everbatch.train.mixin import TrainerMixin
from everbatch.train.record import Report, StepRecord

__all__ = ["CoTTA"]


@dataclass(frozen=True, kw_only=True)
class Taught(Unlabelled):
    """Classification by what a teacher says."""

    term: ClassVar[str] = "consistency"
    text: ClassVar[str] = "H(softmax(teacher), softmax(logits))"


class CoTTA(TrainerMixin):
    """Continual test-time adaptation by a teacher that is an average of the weights:

        L = mean_i -sum_c q_ic ln p_ic          p = softmax(u); q = softmax(teacher's logits)

    Where the source's mean confidence in the batch is below `threshold`, the teacher's logits are
    the mean over `views` of each sample, which the trainer's `augment` makes; else those of the
    sample itself. The teacher, the source, and the return of single weights to it are
    `MeanTeacher`'s, in the optimizer. All weights are trained. Predictions are the teacher's:
    `online` holds their accuracies by task, which are the result. Labels are counted by and reach
    nothing else. The stream is an ordinary one, best `everbatch.data.ordered`, in which nothing is
    shuffled; `serve(inputs)` takes a batch without labels in its place.

    Batch norms normalise by the batch. Components of `convert_unmix_tns` layers belong to teacher
    and model together and move once in each step, with the sample itself.

    Args (Config): see the fields.

    Raises:
        ValueError: views without `augment`; beside other methods of the trainer, or of the
            optimizer that remember tasks; at the first task: an optimizer without MeanTeacher.

    Cost: a forward of the teacher, with views one of the source, and of each view where it is asked
    for them, which costs a host sync; two publications of the weights for each of the two.
    Order: any. Limits: classification.
    Source: Wang et al. 2022, arXiv 2203.13591, and the released code (defaults; views' logits are
    averaged). Differs: copies of the network share their norms' components.
    """

    owns = ("predictions of the stream",)
    makes = {}  # it adapts what another run has trained
    example = {"views": 0}
    off = {"active": False}
    search = {"threshold": (0.92, 0.72, 0.1)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        active: bool = True
        """False: as without it, the stream trains on its labels."""
        views: int = 32
        """Augmented copies that the teacher's answer is a mean of; >= 0, 0: never asks for them."""
        threshold: float = 0.92
        """Confidence of the source below which it does; in [0, 1]."""
        reset: bool = False
        """Begin each task from the first weights and components; moments are reset by
        reset_optimizer."""

        def __post_init__(self) -> None:
            check_whole("CoTTA", "views", self.views)
            check_real("CoTTA", "threshold", self.threshold, 0.0, 1.0)

    @dataclass
    class State:
        counts: Tensor = field(default_factory=nothing_counted)

    @classmethod
    def needs_boundaries(cls, config: Any) -> str:
        """It does to begin anew."""
        return "reset=true begins each task anew" if config is not None and config.reset else ""

    @classmethod
    def idle(cls, config: Any) -> dict[str, str]:
        """A threshold of nothing."""
        return {} if config.views else {"threshold": "views=0 asks for none"}

    optimizer: Any
    module: nn.Module
    device: torch.device
    augment: Any
    views: Any = None
    """What the trainer was given as `augment`."""

    def terms(self) -> tuple[()]:
        """None beside the loss."""
        return ()

    @property
    def online(self) -> list[float]:
        """Accuracy of the predictions made so far, by task."""
        return accuracies_of(self.states[CoTTA].counts)

    def serve(self, inputs: Rows) -> Tensor:
        """Predict a batch of inputs, as the source has them, that has no labels, and adapt to it:
        the teacher's logits (n, classes). Collective, with as many rows on every rank."""
        logits: Tensor = serve(self, inputs).parts[0].extras["teacher"]
        return logits

    def configure_model(self, model: nn.Module) -> nn.Module:
        """Let batch norms normalise by the batch; keep the augmentation for views."""
        model = super().configure_model(model)  # type: ignore[misc]
        config: CoTTA.Config = self.configs[CoTTA]
        if not config.active:
            return model
        begin(self, "CoTTA", model, Taught())
        self.views, self.augment = self.augment or self.views, None
        check(not config.views or self.views is not None, "CoTTA", f"views={config.views} without augment=",
              "have what makes them", "pass Trainer(..., augment=...), or views=0")
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            adapt_batch_norm(model)
        return model

    def on_task_start(self, task: Task) -> None:
        """Refuse what cannot teach or would look at labels; begin anew where asked to."""
        super().on_task_start(task)  # type: ignore[misc]
        config: CoTTA.Config = self.configs[CoTTA]
        if not config.active:
            return
        self.__require_teacher()
        refuse_memory(self, "CoTTA")
        if config.reset:
            self.optimizer.return_to_source()
            reset_components(self.module)

    def __require_teacher(self) -> None:
        kind = type(self.optimizer).__name__
        check(hasattr(self.optimizer, "taught_by"), "CoTTA", f"optimizer {kind}", "hold MeanTeacher",
              "compose(MeanTeacher, base=torch.optim.Adam)")

    def augment_batch(self, parts: list[Batch]) -> list[Batch]:
        """Ask the teacher."""
        parts = super().augment_batch(parts)  # type: ignore[misc]
        if not self.configs[CoTTA].active:
            return parts
        self.__require_teacher()
        with torch.no_grad(), unmix_mode(self.module, "frozen"):
            return [replace(part, extras={**part.extras, "teacher": self._taught(part)})
                    for part in parts]

    def _taught(self, part: Batch) -> Tensor:
        """The teacher's logits of the samples, or of views of them."""
        views = self.configs[CoTTA].views if self._unsure(part) else 0
        with self.optimizer.taught_by("teacher"):
            if not views:
                return self.forward(part)  # type: ignore[attr-defined, no-any-return]
            logits = [self.forward(self._view(part, number)) for number in range(views)]  # type: ignore[attr-defined]
            return torch.stack(logits).mean(0)

    def _unsure(self, part: Batch) -> bool:
        """Whether the source is, of the batch on all ranks."""
        config: CoTTA.Config = self.configs[CoTTA]
        if not config.views:
            return False
        with self.optimizer.taught_by("source"):
            sure = self.forward(part).softmax(1).amax(1).mean()  # type: ignore[attr-defined]
        return bool(self.world.sum(sure) / self.world.size < config.threshold)

    def _view(self, part: Batch, number: int) -> Batch:
        """One augmented copy of each sample, by draws of its own."""
        plain = replace(part, inputs=part.extras["raw"], part=f"view {number}", extras={})
        made: Batch = self._augmented([plain], self.step, self.views)[0]  # type: ignore[attr-defined]
        return replace(made, inputs=self.inputs_of(made.to(self.device).inputs))  # type: ignore[attr-defined]

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The cross-entropy with the teacher."""
        if "teacher" not in batch.extras:
            return super().loss_terms(outputs, batch)  # type: ignore[misc, no-any-return]
        taught = batch.extras["teacher"].softmax(1)
        return {Taught.term: batch.mean(-(taught * outputs.log_softmax(1)).sum(1))}

    def after_step(self, record: StepRecord) -> None:
        """Count."""
        super().after_step(record)  # type: ignore[misc]
        if self.configs[CoTTA].active:
            state, batch = self.states[CoTTA], record.parts[0]
            state.counts = counted(self, state.counts, batch.extras["teacher"], batch)

    def report(self) -> Report | None:
        """The online accuracies."""
        return report_of(self.states[CoTTA].counts) if self.configs[CoTTA].active else None
