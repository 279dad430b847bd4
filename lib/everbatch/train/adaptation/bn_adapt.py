"""BN-adapt: batch norms of a model in use normalise by the batch, mixed with the source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from everbatch.data import Task
from everbatch.errors import check_real, check_whole
from everbatch.nn import adapt_batch_norm
from everbatch.rows import Rows
from everbatch.train.adaptation.unlabelled import (
    Unlabelled,
    accuracies_of,
    begin,
    counted,
    nothing_counted,
    refuse_augment,
    report_of,
    reset_components,
    serve,
)
from everbatch.train.mixin import TrainerMixin
from everbatch.train.record import Report, StepRecord

__all__ = ["BNAdapt"]


@dataclass(frozen=True, kw_only=True)
class Unlearned(Unlabelled):
    """Classification that is only counted."""

    text: ClassVar[str] = "0, nothing is trained"


class BNAdapt(TrainerMixin):
    """Predict a stream with statistics of its batches in the batch norms; nothing is trained:

        mean = (1 - alpha) m + alpha mean_batch        var = (1 - alpha) v + alpha var_batch

    with m, v the source's; alpha is a number, or n / (N + n) for batches of n with a `prior` of N
    samples. alpha=0 predicts as the source does. `convert_unmix_tns` layers stay, so beside them it
    is UnMix-TNS alone. A step is one forward without a gradient; `online` holds the accuracies by
    task, which are the result, of an ordinary stream, best `everbatch.data.ordered`, in which
    nothing is shuffled; `serve(inputs)` takes a batch without labels in its place.

    Args (Config): see the fields.

    Raises:
        NoNormalizationLayers: no batch norm. NoSourceStatistics: one without running statistics.
        ValueError: options out of range; beside other methods of the trainer.

    Cost: no backward, no update; one all-reduce of two numbers. Order: any.
    Limits: classification; under several ranks each normalises by its own rows, unless
    `synchronised`.
    Source: Schneider et al. 2020, arXiv 2006.16971; with alpha=1 Nado et al. 2020, arXiv 2006.10963.
    """

    owns = ("predictions of the stream",)
    makes = {}  # it adapts what another run has trained
    example = {"alpha": 0.5}
    off = {"active": False}
    search = {"prior": (16, 0, 64, 256)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        active: bool = True
        """False: as without it, the stream trains on its labels."""
        alpha: float = 1.0
        """Weight of the batch's statistics; in [0, 1]."""
        prior: int | None = None
        """Samples that the source's statistics count as, in place of alpha; >= 0."""
        synchronised: bool = False
        """The batch is that of all ranks."""
        reset: bool = False
        """Components of UnMix-TNS layers begin anew with each task."""

        def __post_init__(self) -> None:
            check_real("BNAdapt", "alpha", self.alpha, 0.0, 1.0)
            if self.prior is not None:
                check_whole("BNAdapt", "prior", self.prior)

    @dataclass
    class State:
        counts: Tensor = field(default_factory=nothing_counted)

    @classmethod
    def idle(cls, config: Any) -> dict[str, str]:
        """`alpha` beside a prior."""
        return {"alpha": "prior is given"} if config.prior is not None else {}

    @classmethod
    def needs_boundaries(cls, config: Any) -> str:
        """It does to begin anew."""
        return "reset=true begins each task anew" if config is not None and config.reset else ""

    module: nn.Module

    def on_task_start(self, task: Task) -> None:
        """Begin anew where asked to."""
        super().on_task_start(task)  # type: ignore[misc]
        config: BNAdapt.Config = self.configs[BNAdapt]
        if config.active and config.reset:
            reset_components(self.module)

    @property
    def online(self) -> list[float]:
        """Accuracy of the predictions made so far, by task."""
        return accuracies_of(self.states[BNAdapt].counts)

    def serve(self, inputs: Rows) -> Tensor:
        """Predict a batch of inputs, as the source has them, that has no labels: (n, classes).
        Collective where weights are sharded, with as many rows on every rank."""
        return serve(self, inputs).outputs["stream"]

    def configure_model(self, model: nn.Module) -> nn.Module:
        """Give batch norms the batch's statistics."""
        model = super().configure_model(model)  # type: ignore[misc]
        config: BNAdapt.Config = self.configs[BNAdapt]
        if config.active:
            begin(self, "BNAdapt", model, Unlearned())
            refuse_augment(self, "BNAdapt")
            adapt_batch_norm(model, config.alpha, prior=config.prior,
                             synchronised=config.synchronised)
            self.learns = False
        return model

    def after_step(self, record: StepRecord) -> None:
        """Count."""
        super().after_step(record)  # type: ignore[misc]
        if self.configs[BNAdapt].active:
            state, batch = self.states[BNAdapt], record.parts[0]
            state.counts = counted(self, state.counts, record.outputs["stream"], batch)

    def report(self) -> Report | None:
        """The online accuracies."""
        return report_of(self.states[BNAdapt].counts) if self.configs[BNAdapt].active else None
