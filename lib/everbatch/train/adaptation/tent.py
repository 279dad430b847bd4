"""Tent: scales and shifts of norms follow a stream by the entropy of the model's own predictions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from everbatch.data import Task
from everbatch.errors import check
from everbatch.nn import UnMixTNS, adapt_batch_norm
from everbatch.nn.batch_norms import affine_of
from everbatch.rows import Rows
from everbatch.train.adaptation.unlabelled import (
    Unlabelled,
    accuracies_of,
    begin,
    counted,
    nothing_counted,
    refuse_augment,
    refuse_memory,
    report_of,
    reset_components,
    serve,
)
from everbatch.train.mixin import TrainerMixin
from everbatch.train.record import Report, StepRecord

__all__ = ["Tent"]


class Tent(TrainerMixin):
    """Fully test-time adaptation: minimise the entropy of the model's own predictions of a stream:

        L = mean_i -sum_c p_ic ln p_ic         p = softmax(u), over scales and shifts of norms alone

    Everything else is frozen. Each batch is predicted before the step that it is trained on in:
    `online` holds the accuracies of these predictions by task, which are the result. Labels are
    counted by and reach nothing else. The stream is an ordinary one, best `everbatch.data.ordered`,
    in which nothing is shuffled; `serve(inputs)` takes a batch without labels in its place.

    Batch norms normalise by the batch (`adapt_batch_norm`); layers that `convert_unmix_tns` made
    before stay, and layer, group and instance norms as they are. The model is in evaluation mode.
    Rates as in the literature are small, 1e-5 to 1e-3 with Adam: with correlated labels larger ones
    destroy it.

    Args (Config): see the fields.

    Raises:
        NoNormalizationLayers: no norm with weights. NoSourceStatistics: a batch norm without them.
        ValueError: beside other methods of the trainer, or of the optimizer that remember tasks.

    Cost: no pass beyond the step's; one all-reduce of two numbers. Order: any.
    Limits: classification; under several ranks each normalises by its own rows, unless
    `synchronised`.
    Source: Wang et al. 2021, arXiv 2006.10726. Differs: norms of other kinds are trained too, and
    dropout is off.
    """

    owns = ("predictions of the stream",)
    makes = {}  # it adapts what another run has trained
    example = {}
    off = {"active": False}
    search = {"statistics": ("batch", "source")}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        active: bool = True
        """False: as without it, the stream trains on its labels."""
        statistics: Literal["batch", "source"] = "batch"
        """What batch norms normalise by, where they are no UnMix-TNS layers."""
        synchronised: bool = False
        """The batch's statistics are of all ranks."""
        reset: bool = False
        """Begin each task from the first weights and components; moments are reset by
        reset_optimizer."""

        def __post_init__(self) -> None:
            good = self.statistics in ("batch", "source")
            check(good, "Tent", f"statistics={self.statistics!r}", "be batch or source")

    @dataclass
    class State:
        counts: Tensor = field(default_factory=nothing_counted)
        source: dict[str, Tensor] = field(default_factory=dict)
        """First weights, whole, with `reset`."""

    @classmethod
    def needs_boundaries(cls, config: Any) -> str:
        """It does to begin anew."""
        return "reset=true begins each task anew" if config is not None and config.reset else ""

    @property
    def online(self) -> list[float]:
        """Accuracy of the predictions made so far, by task."""
        return accuracies_of(self.states[Tent].counts)

    def serve(self, inputs: Rows) -> Tensor:
        """Predict a batch of inputs, as the source has them, that has no labels, and adapt to it:
        logits (n, classes) of before. Collective, with as many rows on every rank."""
        return serve(self, inputs).outputs["stream"]

    def configure_model(self, model: nn.Module) -> nn.Module:
        """Freeze all but the norms."""
        model = super().configure_model(model)  # type: ignore[misc]
        config: Tent.Config = self.configs[Tent]
        if not config.active:
            return model
        begin(self, "Tent", model, Unlabelled())
        refuse_augment(self, "Tent")
        chosen = affine_of(model, "Tent")
        if config.statistics == "batch" and any(isinstance(m, nn.modules.batchnorm._BatchNorm)
                                                for m in model.modules()):
            adapt_batch_norm(model, synchronised=config.synchronised)
        for name, p in model.named_parameters():
            p.requires_grad_(name in chosen)
        return model

    optimizer: Any
    module: nn.Module

    def on_task_start(self, task: Task) -> None:
        """Refuse what would look at labels; begin anew where asked to."""
        super().on_task_start(task)  # type: ignore[misc]
        config, state = self.configs[Tent], self.states[Tent]
        if config.active:
            refuse_memory(self, "Tent")
        if not (config.active and config.reset):
            return
        host = self.optimizer.host
        if not state.source:
            weights = host.gather(list(host.weights()), host.names)
            state.source = {name: value.clone() for name, value in weights.items()}
            return
        with torch.no_grad():
            for shard in host.shards:
                whole = state.source[shard.name].to(shard.data).reshape(-1)
                shard.data.copy_(whole[shard.start:][:shard.numel].view(shard.data.shape))
        host.touch()
        host.publish_if_dirty()
        reset_components(self.module)

    def after_step(self, record: StepRecord) -> None:
        """Count."""
        super().after_step(record)  # type: ignore[misc]
        if self.configs[Tent].active:
            state, batch = self.states[Tent], record.parts[0]
            state.counts = counted(self, state.counts, record.outputs["stream"], batch)

    def report(self) -> Report | None:
        """The online accuracies."""
        return report_of(self.states[Tent].counts) if self.configs[Tent].active else None

    def notes(self) -> str:
        """What of the model follows."""
        if not self.configs[Tent].active:
            return ""
        unmix = sum(isinstance(layer, UnMixTNS) for layer in self.module.modules())
        return f"trains {len(self.optimizer.host.names)} weights of norms" + (
            f", {unmix} of them UnMix-TNS layers'" if unmix else "")
