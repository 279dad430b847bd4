"""Predictions by the nearest mean of exemplars, which herding has chosen: iCaRL's memory and classifier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from everbatch.data import Batch, ReplayStore, Stream, Task, evaluation_batches
from everbatch.data.slots import group_quotas
from everbatch.errors import check, check_real, check_whole
from everbatch.evaluate.evaluator import evaluating
from everbatch.objective.table import CROSS_ENTROPY
from everbatch.objective.terms import OutputTerm, evaluate
from everbatch.rows import Rows, each, unnamed
from everbatch.train.memory.herding import Herded, herding, last_input, unit
from everbatch.train.memory.offer import drawn_part, offer
from everbatch.train.mixin import TrainerMixin

__all__ = ["NearestMean"]

PART = "exemplars"


class NearestMean(TrainerMixin):
    """Keep exemplars that herding chooses, rehearse them, and predict the class whose exemplars' mean is nearest.

        y*(x) = argmin_c || phi(x) - mu_c ||      phi: features of length one;  mu_c: mean of phi over the exemplars of c, made
                                                  of length one
        L = CE(B) + beta * CE(exemplars)

    Features are what the network's last linear layer is given. After each task its classes' exemplars are chosen from all of
    their training samples, and those of earlier classes are cut to the new quota, capacity / classes seen, from the end of
    their lists. Means are of the network as it is when it predicts: they are made anew when weights have changed. The memory is
    the same at any world size, to rounding of the features.

    `predict` gives -||phi - mu_c||^2 in place of logits, for evaluation and for inputs of one's own; passes that other mixins
    ask for see logits. Before the first task has ended, logits are all there is.

    Args (Config): see the fields.

    Raises:
        ValueError: at construction: a problem that is not cross-entropy of labels. At a task's end: fewer slots than classes.

    Cost: in a step one forward and backward of replay_batch exemplars, and one all-to-all. At a task's end one forward of its
    training samples, one all-reduce of the features of each class, and capacity / classes picks among its samples for each of
    its classes. One forward of all exemplars when predictions begin after a step.
    Order: any. Limits: what is exported predicts by logits; a network whose last linear layer gives no logits is taken by its
    word.
    Source: Rebuffi et al. 2017, arXiv 1611.07725, eq. 2, Algorithms 1, 4 and 5.
    Differs: rehearsal by cross-entropy, where the paper has a sigmoid for each class and distils (`method=icarl` adds `LwF` for
    that, of the stream's samples); classes keep one more slot each while the capacity does not divide.
    """

    makes = {"nearest_mean": {}, "icarl": {"lwf.strength": 1.0, "lwf.temperature": 1.0}}
    example = {"capacity": 12, "replay_batch": 6}
    off = {"capacity": 0}
    search = {"replay_batch": (32, 16, 64), "beta": (1.0, 0.5, 2.0)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        capacity: int = 500
        """Exemplars, over all ranks and classes; >= 0, 0 switches it off."""
        replay_batch: int = 32
        """Exemplars that are rehearsed in a step, over all ranks; >= 0, 0 for none."""
        beta: float = 1.0
        """Weight of their loss; >= 0."""
        rows: int = 64
        """Samples per rank in a forward that gives features; >= 1."""

        def __post_init__(self) -> None:
            check_whole("NearestMean", "capacity", self.capacity)
            check_whole("NearestMean", "replay_batch", self.replay_batch)
            check_whole("NearestMean", "rows", self.rows, 1)
            check_real("NearestMean", "beta", self.beta, 0.0)

    @classmethod
    def idle(cls, config: NearestMean.Config) -> dict[str, str]:
        """What a capacity, or a batch, of 0 makes of the other options."""
        if not config.capacity:
            return dict.fromkeys(("replay_batch", "beta", "rows"), "nearest_mean.capacity=0 switches it off")
        return {} if config.replay_batch else {"beta": "nearest_mean.replay_batch=0 rehearses nothing"}

    @dataclass
    class State:
        store: ReplayStore | None = None

    module: nn.Module
    optimizer: Any
    stream: Stream | None
    device: torch.device
    __means: tuple[Any, Tensor] | None = None
    """When they were made, and the class means (classes, d): rows of NaN for classes without exemplars."""

    def terms(self) -> tuple[OutputTerm, ...]:
        """Labels of exemplars."""
        config: NearestMean.Config = self.configs[NearestMean]
        on = config.capacity and config.replay_batch
        return (OutputTerm("exemplar_label", config.beta, PART, CROSS_ENTROPY),) if on else ()

    def configure_model(self, model: nn.Module) -> nn.Module:
        """Make the empty memory."""
        config: NearestMean.Config = self.configs[NearestMean]
        problem = getattr(self, "problem", None)
        check(problem is None or problem.cross_entropy, "NearestMean", f"problem={type(problem).__name__}",
              "be cross-entropy of labels")
        if config.capacity:
            memory = Herded(config.capacity, seed=self.seed, key="sample")
            self.states[NearestMean].store = ReplayStore(memory, self.world, self.seed)
        return super().configure_model(model)  # type: ignore[misc, no-any-return]

    # ------------------------------------------------------------------------------------------------------ rehearsal
    def draw_batch(self, parts: list[Batch]) -> list[Batch]:
        """Add the part "exemplars"."""
        parts = super().draw_batch(parts)  # type: ignore[misc]
        store: ReplayStore | None = self.states[NearestMean].store
        count = self.configs[NearestMean].replay_batch
        rows = store.draw(count, self.step, PART) if store is not None and count else None
        return parts if rows is None else [*parts, drawn_part(rows, parts[0].task, PART)]

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Add the exemplars' loss."""
        added = evaluate(NearestMean.terms(self), outputs, batch) if batch.part == PART else {}
        terms: dict[str, Tensor] = super().loss_terms(outputs, batch)  # type: ignore[misc]
        return terms | added

    # ------------------------------------------------------------------------------------------------------ exemplars
    def consolidate(self, task: Task) -> None:
        """Choose exemplars of the task's classes. Collective."""
        super().consolidate(task)  # type: ignore[misc]
        store: ReplayStore | None = self.states[NearestMean].store
        if store is None:
            return
        stream = self.stream
        assert stream is not None
        labels = stream.targets(task.train_ids)
        new = torch.unique(labels).tolist()
        known = {*store.buffer.seen, *new}  # type: ignore[attr-defined]
        capacity = store.buffer.capacity
        check(capacity >= len(known), "NearestMean", f"capacity={capacity} for {len(known)} classes", "hold one sample of each")
        most = int(group_quotas(capacity, len(known)).max())
        chosen = []
        for label in new:
            ids = task.train_ids[labels == label]
            chosen.append(ids[herding(self.__features(task, ids), most).cpu()])
        places = torch.cat([torch.arange(len(ids)) for ids in chosen])
        offer(store, self, task, torch.cat(chosen), positions=places)
        self.__means = None

    def __features(self, task: Task, ids: Tensor) -> Tensor:
        """Features (n, d) of these samples of the task, the same on every rank. Collective: one all-reduce."""
        table: Tensor | None = None
        assert self.stream is not None
        for batch in evaluation_batches(self.stream, task, self.configs[NearestMean].rows, self.world, ids=ids):
            assert batch.weight is not None
            found = self.__features_of(batch.inputs)
            table = found.new_zeros((len(ids), found.shape[1])) if table is None else table
            real = batch.weight > 0
            table[batch.position[real].to(table.device)] = found[real.to(table.device)]
        assert table is not None  # no class is without samples
        return self.world.sum(table)

    @torch.no_grad()
    def __features_of(self, raw: Rows) -> Tensor:
        """Features of samples as the source gives them: float32, of length one. Every rank calls it as often."""
        inputs: Any = self.inputs_of(each(lambda value: value.to(self.device), raw))  # type: ignore[attr-defined]
        # By the weights that predict, which are others where the optimizer keeps averages or draws them.
        with evaluating(self.module, self.world), last_input(self.module) as held:
            self.optimizer.predicted(lambda: self.logits(self.engine.call, inputs))  # type: ignore[attr-defined]
        return unit(held.value.flatten(1).float())

    # ----------------------------------------------------------------------------------------------------- prediction
    def predict(self, batch: Batch | Rows) -> Tensor:
        """Minus the squared distance to each class's mean, (n, classes), where exemplars are there."""
        store: ReplayStore | None = self.states[NearestMean].store
        other = isinstance(batch, Batch) and batch.part != "evaluation"
        if store is None or not len(store) or other:
            return super().predict(batch)  # type: ignore[misc, no-any-return]
        means = self.__class_means(store)
        with last_input(self.module) as held:
            logits: Tensor = super().predict(batch)  # type: ignore[misc]
        features = unit(held.value.detach().flatten(1).float())
        distance = 2.0 - 2.0 * features @ means.T  # of rows of length one
        lowest = torch.finfo(logits.dtype).min
        return torch.where(distance.isnan(), lowest, -distance).to(logits.dtype)[:, : logits.shape[1]]  # a head may yet grow

    def __class_means(self, store: ReplayStore) -> Tensor:
        """Of all exemplars, by the network as it is. Collective where it has changed: an all-to-all, and an all-reduce."""
        # Not by `step`, which counts only when everything after an update is done.
        now = (self.optimizer.step_count, self.optimizer.host.edits, len(store))
        if self.__means is not None and self.__means[0] == now:
            return self.__means[1]
        rows = store.draw(len(store), self.step, "means")
        assert rows is not None and self.stream is not None
        raw, targets, weight = unnamed("raw", rows), rows["targets"], rows["weight"]
        size = self.configs[NearestMean].rows
        passes = math.ceil(math.ceil(len(store) / self.world.size) / size)
        sums = torch.zeros(self.stream.num_classes, 0)
        for k in range(passes):
            place = torch.arange(k * size, (k + 1) * size)
            place = place[place < len(targets)]
            index = place if len(place) else torch.zeros(1, dtype=torch.int64)  # a rank that has no more goes along
            found = self.__features_of(each(lambda value: value[index], raw))  # noqa: B023  # used at once
            sums = torch.zeros(len(sums), found.shape[1] + 1, dtype=torch.float64, device=found.device) if not k else sums
            counted = torch.cat([found, found.new_ones(len(found), 1)], 1).double()
            counted = counted * ((weight[index] > 0) & bool(len(place))).to(found.device)[:, None]
            sums.index_add_(0, targets[index].to(found.device), counted)
        sums = self.world.sum(sums)
        means = unit((sums[:, :-1] / sums[:, -1:]).float())
        self.__means = now, means
        return means
