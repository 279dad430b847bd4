"""The mixin: where MOS acts in a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from everbatch.data import Batch, Stream, Task
from everbatch.errors import check
from everbatch.evaluate.evaluator import evaluating
from everbatch.nn.adapter_values import AdapterLayout
from everbatch.nn.adapters import adapters_of, attach_adapters
from everbatch.nn.retrieval import retrieve
from everbatch.nn.statistics import frozen_statistics
from everbatch.nn.trunk import AdapterTrunk
from everbatch.rows import Rows
from everbatch.train.mixin import TrainerMixin
from everbatch.train.mos.ends import End, begin_anew
from everbatch.train.mos.head import Head
from everbatch.train.mos.merging import Places, merge_, merges_per_step
from everbatch.train.mos.options import Archive, Options
from everbatch.train.mos.terms import across
from everbatch.train.mos.typed import Typed
from everbatch.train.record import StepRecord

__all__ = ["MOS"]


class MOS(TrainerMixin):
    """Give each task an adapter beside a frozen vision transformer, and let each sample find its own (model surgery).

        theta <- (1 - alpha) theta + alpha * mean_{k < t} theta_k      after every applied step of task t >= 1
        L = CE over the task's classes + orthogonality * CE(M M^T / 0.8, i)      M: old class means, and the batch's features

    Only the adapters and the head are trained. One set of adapters is live, and goes on from task to task; what it is when a
    task ends is kept in an archive, a plain tensor that nothing changes. The head is as wide as the stream, or grows in parts
    (`GrowingHead`): rows of old classes keep every bit in a task's steps.

    When a task ends, each of its classes becomes a Gaussian of features, and from the second task on the head is trained on
    draws of all of them (classifier alignment): what its rows of old classes are moved by, alike on every rank. Prototypes are
    means of the features with the first adapter.

    `predict` gives scores in place of logits: the class of the nearest prototype names an adapter, the head's prediction with it
    names the next, until they agree or four were asked; softmax(head) + softmax(tasks * cosine to the prototypes). Classes of
    tasks that have not ended get the lowest number there is. Inside a task, predictions are the live network's logits.

    Args (Config): see the fields. A trainer of your own also offers `optimizer`, `module`, `engine`, `stream`, `device`,
    `inputs_of(raw)` and `logits(call, inputs)`.

    Raises:
        UnsupportedAdapterTarget: at construction: other blocks than timm's standard one, by name.
        ValueError: at construction: a problem that is not cross-entropy of labels; a head that is no linear layer; a rank above
            the width. Before training: tasks whose classes are not the next ones. At a task's end, `EmptyClass`.
        RuntimeError: a prediction before the first task has ended, outside of training.
        NonFiniteStatistics: features that are not finite, at a task's end.

    Cost: in a step of a later task one pass over the adapters, a copy of the head's old rows, one publication, and with
    orthogonality on several ranks one all-reduce of the batch's features. At a task's end two forwards of its training samples
    (one of the first task), all-reduces of the class sums (classes * d^2 * 8 bytes; d with "diagonal"), and align_epochs *
    classes steps on the head. 4 bytes for each archived weight. Prediction: one pass, and one more of the rows that want
    another adapter, per round.
    Order: right of parts that read more of the logits (`LwF`). Limits: the contrast is over the rows of one micro-batch, of all
    ranks; averages of weights (`EMA`) have no part in predictions after a task, and merges do not reach them.
    Source: Sun et al. 2025, arXiv 2412.09441, and the authors' code. Differs: one merge per step, where their code makes one per
    block in every forward, at evaluation too ("released" makes as many, after the step: their block l computes with l + 1 of
    them); statistics are of the archived adapter; the head's rate is that of the adapters, theirs a tenth (`head_rate`).
    """

    owns = ("adapters",)
    example = {"rank": 4, "dropout": 0.0, "align_epochs": 2, "align_samples": 8, "rows": 6}
    off = {"active": False}
    search = {"alpha": (0.1, 0.03, 0.3), "orthogonality": (0.1, 0.0), "scale": (0.1, 1.0)}

    @dataclass(frozen=True, kw_only=True)
    class Config(Options):
        __doc__ = Options.__doc__

    @classmethod
    def idle(cls, config: MOS.Config) -> dict[str, str]:
        """What has no effect beside the others."""
        found = {} if config.covariance == "low_rank" else {"covariance_rank": "it is of mos.covariance=low_rank"}
        if not config.align_epochs:
            found |= dict.fromkeys(("align_samples", "align_lr"), "mos.align_epochs=0 switches alignment off")
        if not config.alpha:
            found |= dict.fromkeys(("merge_every", "merging"), "mos.alpha=0 switches merging off")
        return found

    @dataclass
    class State(Archive):
        __doc__ = Archive.__doc__

    optimizer: Any
    module: nn.Module
    engine: Any
    stream: Stream | None
    device: torch.device
    __held: list[Tensor] | None = None
    """The head before the step, this rank's slices."""
    __features: Tensor | None = None
    """What the head was given in the stream's forward."""
    __known_head: tuple[Any, tuple[Tensor, Tensor | None]] | None = None
    """When it was gathered, and the head."""
    __found: tuple[AdapterLayout, Head] | None = None
    last_paths: Tensor | None = None
    """Of the last prediction: (n, rounds), the adapters each sample was shown with, -1 behind them."""

    # ---------------------------------------------------------------------------------------------------- the network
    def configure_model(self, model: nn.Module) -> nn.Module:
        """Put adapters in, and freeze all else but the head."""
        config: MOS.Config = self.configs[MOS]
        model = super().configure_model(model)  # type: ignore[misc]
        if not config.active:
            return model
        problem = getattr(self, "problem", None)
        check(problem is None or problem.cross_entropy, "MOS", f"problem={problem!r}", "be cross-entropy of labels")
        self.__found = None
        head = Head.of(model)
        names = attach_adapters(model, config.rank, scale=config.scale, dropout=config.dropout, seed=self.seed)
        trained = tuple(f"{name}." for name in names)
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith(trained) or name in head.shapes)
        return model

    def configure_stream(self, stream: Any) -> Any:
        """Refuse tasks whose classes are not the next ones."""
        stream = super().configure_stream(stream)  # type: ignore[misc]
        seen = 0
        for task in stream.tasks if self.configs[MOS].active else ():
            classes = sorted(task.classes)
            check(classes == list(range(seen, seen + len(classes))), "MOS", f"task {task.id} with classes {classes[:8]} after "
                  f"{seen} others", f"have the next ones, from {seen} on", "use class_incremental(...)")
            seen += len(classes)
        return stream

    def notes(self) -> str:
        """For describe(): what is trained, and how it is pulled."""
        config: MOS.Config = self.configs[MOS]
        if not config.active:
            return ""
        size, depth = self.__layout.size, len(adapters_of(self.module))
        term = f", {config.orthogonality:g} CE(M M^T / 0.8, i) of features" if config.orthogonality else ""
        return (f"{len(self.states[MOS].archive)} adapters of {size} weights archived; {merges_per_step(config.merging, depth)} "
                f"merge(s) of {config.alpha:g} every {config.merge_every} step(s){term}")

    # ------------------------------------------------------------------------------------------------------- training
    def on_task_start(self, task: Task) -> None:
        """Begin the adapters anew, where they do not go on."""
        super().on_task_start(task)  # type: ignore[misc]
        config, state = self.configs[MOS], self.states[MOS]
        if not config.active:
            return
        check(task.id == len(state.ends), "MOS", f"task {task.id} after {len(state.ends)} that have ended",
              "be the next", "build a new trainer for another stream")
        state.inside = True
        if config.init == "fresh" and len(state.archive):
            begin_anew(self, self.__layout, task)

    def draw_batch(self, parts: list[Batch]) -> list[Batch]:
        """Remember the head, where a step may not move all of it as it does."""
        parts = super().draw_batch(parts)  # type: ignore[misc]
        config, state = self.configs[MOS], self.states[MOS]
        wanted = config.active and (state.ends or config.head_rate != 1.0)
        self.__held = [view.clone() for view in self.__head.mine(self.optimizer.host.shards)] if wanted else None
        return parts

    def forward(self, batch: Batch) -> Tensor:
        """Keep the features of the stream's rows, for the term."""
        config = self.configs[MOS]
        wanted = config.active and config.orthogonality and batch.part == "stream" and torch.is_grad_enabled()
        if not wanted:
            return super().forward(batch)  # type: ignore[misc, no-any-return]
        with self.__head.features() as held:
            outputs: Tensor = super().forward(batch)  # type: ignore[misc]
        self.__features = held.value.flatten(1).float()
        return outputs

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The stream's loss over the task's own classes, and the term."""
        config = self.configs[MOS]
        if not config.active or batch.part != "stream":
            return super().loss_terms(outputs, batch)  # type: ignore[misc, no-any-return]
        assert self.stream is not None
        classes = self.stream.tasks[batch.task].classes
        first, last = min(classes), max(classes) + 1
        own = batch if first == 0 else replace(batch, targets=batch.targets - first)
        terms: dict[str, Tensor] = super().loss_terms(outputs[:, first:last], own)  # type: ignore[misc]
        if not config.orthogonality:
            return terms
        features, self.__features = self.__features, None
        check(features is not None and len(features) == len(batch), "MOS", "a mixin that forwards the stream's rows its own way",
              "leave forward() to them", "set mos.orthogonality=0")
        assert features is not None
        means = self.states[MOS].on("means", features.device)
        return terms | {"orthogonality": config.orthogonality * across(features, means, self.world)}

    def after_step(self, record: StepRecord) -> None:
        """Put the head's old rows back, and merge; only where a step was applied."""
        super().after_step(record)  # type: ignore[misc]
        config, state = self.configs[MOS], self.states[MOS]
        held, self.__held = self.__held, None
        if held is None or not record.applied:
            return
        host = self.optimizer.host
        self.__head.put_back(host.shards, held, state.ends[-1] if state.ends else 0, config.head_rate)
        if config.alpha and state.ends and self.optimizer.step_count % config.merge_every == 0:
            times = merges_per_step(config.merging, len(adapters_of(self.module)))
            places = Places(self.__layout.shapes)
            mine = places.mine(host.shards)
            mean = places.slices(mine, state.on("prefix", self.device) / len(state.archive))
            merge_([shard.data for shard in mine], mean, config.alpha, times)
        host.touch()
        host.publish_if_dirty()

    # ------------------------------------------------------------------------------------------------ the task's end
    def consolidate(self, task: Task) -> None:
        """Archive the adapters, take the classes' statistics, align the head. Collective."""
        super().consolidate(task)  # type: ignore[misc]
        config, state = self.configs[MOS], self.states[MOS]
        if not config.active:
            return
        End(self, config, state, self.__layout, self.__head).of(task)

    # ----------------------------------------------------------------------------------------------------- prediction
    def predict(self, batch: Batch | Rows) -> Tensor:
        """Scores (n, classes) by retrieval, once a task has ended; see the class."""
        state = self.states[MOS]
        if not self.configs[MOS].active or state.inside:
            return super().predict(batch)  # type: ignore[misc, no-any-return]
        if not state.ends:
            raise RuntimeError("MOS: predict() before the first task has ended, when no adapter is stored; train a task first")
        if isinstance(batch, Batch):
            return self.__retrieved(_one(batch.inputs))
        with torch.no_grad(), frozen_statistics(self.module), evaluating(self.module, self.world):
            return self.__retrieved(_one(batch).to(self.device))

    def __retrieved(self, inputs: Tensor) -> Tensor:
        """Scores of inputs that are ready, as wide as the head. Collective where ranks share the weights of the network."""
        config, state, host = self.configs[MOS], self.states[MOS], self.optimizer.host
        half = getattr(getattr(self, "config", None), "precision", "fp32") == "bf16"
        trunk = Typed(AdapterTrunk(self.module, state.on("archive", self.device)), host.working_dtype, half)
        weight, bias = self.__classifier()
        sizes = torch.tensor(state.ends).diff(prepend=torch.zeros(1, dtype=torch.int64))
        found = retrieve(
            trunk, inputs, lambda features: functional.linear(features, weight, bias), state.on("prototypes", self.device),
            torch.arange(len(sizes)).repeat_interleave(sizes), len(sizes), ensemble=config.ensemble, on_cycle=config.on_cycle,
            sharded=None if host.apart else self.world)
        self.last_paths = found.path
        lowest = torch.finfo(found.scores.dtype).min
        return functional.pad(found.scores, (0, len(weight) - state.ends[-1]), value=lowest)

    def __classifier(self) -> tuple[Tensor, Tensor | None]:
        """The head, whole, as it is now. Collective where it has changed and is sharded."""
        now = (self.optimizer.step_count, self.optimizer.host.edits, len(self.states[MOS].ends))
        if self.__known_head is None or self.__known_head[0] != now:
            weight, bias = self.__head.whole(self.optimizer.host)
            self.__known_head = now, (weight.float(), None if bias is None else bias.float())
        return self.__known_head[1]

    def exported(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The archive and the prototypes, for `everbatch.nn.Retriever`."""
        config, state = self.configs[MOS], self.states[MOS]
        if not config.active or not state.ends:
            return {}, {}
        tensors = {"retrieval.archive": state.archive.cpu(), "retrieval.prototypes": state.prototypes.cpu()}
        return tensors, {"retrieval": {"ends": state.ends, "ensemble": config.ensemble, "on_cycle": config.on_cycle}}

    # --------------------------------------------------------------------------------------------------------- helpers
    @property
    def __layout(self) -> AdapterLayout:
        return self.__parts()[0]

    @property
    def __head(self) -> Head:
        return self.__parts()[1]

    def __parts(self) -> tuple[AdapterLayout, Head]:
        """Where adapters and head are in the network, which a growth replaces."""
        if self.__found is None:
            self.__found = AdapterLayout.of(self.module), Head.of(self.module)
        return self.__found


def _one(inputs: Rows) -> Tensor:
    """Images: one tensor."""
    check(isinstance(inputs, Tensor), "MOS", f"inputs of type {type(inputs).__name__}", "be one tensor of images")
    return inputs  # type: ignore[return-value]
