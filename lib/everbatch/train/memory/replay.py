"""Rehearsal from a memory of earlier samples: ER, DER and DER++, at any world size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from everbatch.data import Batch, Buffer, ClassBalanced, ReplayStore, Reservoir, Ring
from everbatch.data.own_memory import Memory, OwnMemory, check_own
from everbatch.data.tasks import rows_of_stream
from everbatch.errors import check, check_real, check_whole
from everbatch.objective.table import dark_er, dark_er_pp, er
from everbatch.objective.terms import OutputTerm, ProblemTerm, dark_term, evaluate, label_term
from everbatch.problems import Problem
from everbatch.rows import named, unnamed
from everbatch.train.mixin import TrainerMixin, gathers_rows
from everbatch.train.record import StepRecord

__all__ = ["Replay", "dark_term", "label_term"]


MOST_BYTES = 2**30
"""Stored outputs on a rank, of problems other than cross-entropy of labels."""
METHODS = ("er", "dark_er", "dark_er_pp")

_SPELLINGS = {"der": "dark_er", "derpp": "dark_er_pp", "der++": "dark_er_pp", "dark_er++": "dark_er_pp", "der_pp": "dark_er_pp",
              "experience_replay": "er"}
"""What the methods are called elsewhere; read in options, where DER cannot be another method."""


class Replay(TrainerMixin):
    """Rehearse samples of a memory beside each batch of the stream.

        er:            CE(B) + beta * CE(M)
        dark_er:       CE(B) + alpha * mse(u(M1), z(M1))
        dark_er_pp:    CE(B) + alpha * mse(u(M1), z(M1)) + beta * CE(M2)      two independent draws

    CE is the loss of the trainer's problem: of another than classification its own, a mean over its
    units, and u, z are its outputs, compared where units count. Stored are inputs before
    augmentation, labels or targets, and the logits of the pass before the update; on the draw the
    training augmentation is applied anew. Each draw is min(replay_batch, filled)
    samples without replacement, forwarded on its own. The memory is a function of the stream: the
    same at any world size. A skipped step adds nothing.

    Args (Config): see the fields; `capacity=0` switches rehearsal off and leaves every bit of the
    training.

    Cost: one forward and backward of replay_batch samples per draw; payload capacity / world rows
    on each rank's CPU. On several ranks two all-to-alls in a step: of the next step's draws, which
    arrive during the step, and of what is stored. What the next step draws of the present batch
    comes with the latter, so the draws are those of a memory that is asked when they are needed.
    Order: right of mixins that craft from the stream (ConAdv), so that crafted parts are not
    stored.

    Source: Buzzega et al. 2020, arXiv 2004.07211 (DER, DER++), named dark_er here because DER also
    names another method.
    Differs: the memory keeps the samples with the largest hashed keys (the law of reservoir
    sampling, without its history) and, by default, a sample met again in a later epoch refreshes
    its logits instead of entering twice.
    """

    example = {"capacity": 12, "replay_batch": 8, "alpha": 0.3}
    off = {"capacity": 0}
    makes = {name: {"method": name} for name in METHODS}
    search = {"replay_batch": (32, 16, 64), "alpha": (0.3, 0.1, 1.0, 3.0), "beta": (0.5, 0.25, 1.0, 2.0)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        method: Literal["er", "dark_er", "dark_er_pp"] = field(default="dark_er_pp", metadata={"spellings": _SPELLINGS})
        """Which terms: labels, stored logits, or both from independent draws; recipes take der and
        derpp for them, too."""
        capacity: int = 500
        """Samples in the memory, over all ranks; >= 0, 0 switches rehearsal off."""
        replay_batch: int = 32
        """Samples per draw, over all ranks; >= 1."""
        alpha: float = 0.1
        """Weight of the stored-logits term; >= 0."""
        beta: float = 0.5
        """Weight of the label term; >= 0."""
        memory: Literal["reservoir", "class_balanced", "ring"] | Callable[[], Memory] = "reservoir"
        """Which samples stay: uniformly over the stream, equally many of each class, or the last of
        each task; in Python also a class of one's own, `everbatch.data.own_memory.Memory`."""
        key: Literal["stream", "sample"] = "sample"
        """What a sample's key hashes: its place in the stream (every visit counts), or its id (a
        visit refreshes it)."""
        reduction: Literal["element_mean", "sample_sum"] = "element_mean"
        """Squared distance of logits: mean over classes (the authors' code) or sum (the paper)."""

        def __post_init__(self) -> None:
            for name, allowed in (("method", METHODS), ("memory", ("reservoir", "class_balanced", "ring")),
                                  ("key", ("stream", "sample")), ("reduction", ("element_mean", "sample_sum"))):
                value = getattr(self, name)
                if name == "memory" and not isinstance(value, str):
                    check_own("Replay", name, value)
                    continue
                check(value in allowed, "Replay", f"{name}={value!r}", f"be {', '.join(allowed[:-1])} or {allowed[-1]}")
            check_whole("Replay", "capacity", self.capacity)
            check_whole("Replay", "replay_batch", self.replay_batch, 1)
            check_real("Replay", "alpha", self.alpha, 0.0)
            check_real("Replay", "beta", self.beta, 0.0)

    @classmethod
    def idle(cls, config: Replay.Config) -> dict[str, str]:
        """What the method, the memory and a capacity of 0 make of the other options."""
        found: dict[str, str] = {}
        if config.capacity == 0:
            used = ("replay_batch", "alpha", "beta", "memory", "key", "reduction")
            found |= dict.fromkeys(used, "replay.capacity=0 switches rehearsal off")
        if config.method == "er":
            found |= dict.fromkeys(("alpha", "reduction"), "replay.method=er stores no logits")
        if config.method == "dark_er":
            found["beta"] = "replay.method=dark_er has no label term; dark_er_pp has both"
        if config.memory == "ring":
            found["key"] = "replay.memory=ring keeps the last samples of each task"
        if not isinstance(config.memory, str):
            found["key"] = "a memory of one's own decides itself"
        return found

    @classmethod
    def needs_boundaries(cls, config: Replay.Config) -> str:
        """A ring has a place for each task; the others go by samples alone."""
        ring = config.capacity > 0 and config.memory == "ring"
        return "memory='ring' keeps the last samples of each task; reservoir and class_balanced need not know it" if ring else ""

    draws_ahead: ClassVar[bool] = True
    """On several ranks, let the next step's draw arrive during a step: the same draws. A class of
    yours may switch it off."""

    @dataclass
    class State:
        store: ReplayStore | None = None

    def terms(self) -> tuple[OutputTerm | ProblemTerm, ...]:
        """What the method adds to the objective, in the order in which its parts are drawn."""
        config: Replay.Config = self.configs[Replay]
        if not config.capacity:
            return ()
        other = _other_problem(self)
        if other is not None:
            return _of_problem(other, config)
        if config.method == "er":
            return er(config.beta)
        grown = _has_grown(self)
        if config.method == "dark_er":
            return dark_er(config.alpha, config.reduction, grown)
        return dark_er_pp(config.alpha, config.beta, config.reduction, grown)

    def configure_model(self, model: nn.Module) -> nn.Module:
        """Make the empty memory."""
        config: Replay.Config = self.configs[Replay]
        if config.capacity:
            self.states[Replay].store = ReplayStore(_memory(config, self), self.world, self.seed)
        return super().configure_model(model)  # type: ignore[misc, no-any-return]

    def before_fit(self) -> None:
        """Refuse stored outputs that are too large, before the first step: asks the model for one row. Collective."""
        store: ReplayStore | None = self.states[Replay].store
        stream: Any = getattr(self, "stream", None)
        config: Replay.Config = self.configs[Replay]
        if store is None or stream is None or config.method == "er" or _other_problem(self) is None:
            return
        raw, _ = rows_of_stream(stream, stream.tasks[0].train_ids[:1])
        outputs: Tensor = self.predict(self.inputs_of(raw))  # type: ignore[attr-defined]
        _check_size(outputs, config, self.world.size)

    def draw_batch(self, parts: list[Batch]) -> list[Batch]:
        """Add the part "dark" (to be compared with stored logits), the part "replay" (with labels),
        or both; then have what the next step draws on its way."""
        added = Replay.terms(self)
        parts = super().draw_batch(parts)  # type: ignore[misc]
        config: Replay.Config = self.configs[Replay]
        store: ReplayStore | None = self.states[Replay].store
        if store is None:
            return parts
        for term in added:
            rows = store.draw(config.replay_batch, self.step, term.rows)
            if rows is None:  # nothing is stored yet
                continue
            # A part carries what its term is compared with, and no more.
            extras = {} if term.target == "targets" else {term.target: rows[term.target]}
            raw = rows["raw"] if "raw" in rows else unnamed("raw", rows)
            targets = rows.get("aim", rows["targets"])
            drawn = Batch(
                raw, targets, rows["ids"], rows["position"], task=parts[0].task,
                part=term.rows, weight=rows["weight"], extras=extras)
            parts = [*parts, drawn]
        if self.draws_ahead and _can_draw_ahead(self):
            ids, labels, position = self.global_rows(parts[0])
            wanted = [(config.replay_batch, term.rows) for term in added]
            store.ahead(ids.numpy(), labels.numpy(), position.numpy(), parts[0].task,
                        step=self.step + 1, wanted=wanted)
        return parts

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Add the term of a replay part."""
        added = evaluate(Replay.terms(self), outputs, batch) if batch.part in ("dark", "replay") else {}
        terms: dict[str, Tensor] = super().loss_terms(outputs, batch)  # type: ignore[misc]
        return terms | added

    def after_step(self, record: StepRecord) -> None:
        """Offer the stream's samples to the memory, with the logits of the recorded pass."""
        batch = next(part for part in record.parts if part.part == "stream")
        super().after_step(record)  # type: ignore[misc]
        store: ReplayStore | None = self.states[Replay].store
        if store is None:
            return
        if not record.applied:
            store.take_back()
            return
        raw = batch.extras.get("raw", batch.inputs)
        rows = {"raw": raw} if isinstance(raw, Tensor) else named("raw", raw)
        other = _other_problem(self)
        if other is None or self.configs[Replay].method != "er":
            rows["logits"] = record.outputs["stream"].float()
        problem = getattr(self, "problem", None)
        if problem is not None and not problem.labels:
            rows["aim"] = batch.targets  # the index holds labels of the stream
        if other is None and _has_grown(self):
            store.widen("logits", rows["logits"].shape[1])
        ids, targets, position = self.global_rows(batch)
        store.add(ids.numpy(), targets.numpy(), position.numpy(), batch.task, rows)


def _other_problem(trainer: Any) -> Problem | None:
    """The trainer's problem where it is another than cross-entropy of labels."""
    problem: Problem | None = getattr(trainer, "problem", None)
    return None if problem is None or problem.cross_entropy else problem


def _of_problem(problem: Problem, config: Replay.Config) -> tuple[ProblemTerm, ...]:
    """The method's terms of a problem other than cross-entropy of labels."""
    dark = ProblemTerm("replay_dark", config.alpha, "dark", problem, "logits", config.reduction)
    label = ProblemTerm("replay_label", config.beta, "replay", problem)
    return {"er": (label,), "dark_er": (dark,), "dark_er_pp": (dark, label)}[config.method]


def _check_size(logits: Tensor, config: Replay.Config, ranks: int) -> None:
    """Refuse to store outputs that no memory was meant for: logits of every token over a large vocabulary."""
    size = config.capacity * logits[0].numel() * 4 // ranks
    check(size <= MOST_BYTES, "Replay", f"method={config.method!r} and outputs of {tuple(logits.shape[1:])} for each of "
          f"{config.capacity} samples, {size / 2**30:.3g} GiB on a rank", f"store at most {MOST_BYTES / 2**30:.3g} GiB",
          "use method='er', a smaller capacity or more ranks")


def _can_draw_ahead(trainer: Any) -> bool:
    """Whether there are ranks to wait for, a next step of this task, and global batches that are
    known without asking other ranks."""
    further = trainer.world.size > 1 and getattr(trainer, "steps_left", 0) > 1
    return bool(further) and not gathers_rows(trainer)


def _has_grown(trainer: Any) -> bool:
    """Whether some logits may be of a narrower head."""
    growth = getattr(trainer, "growth", None)
    return growth is not None and bool(growth.done)


def _memory(config: Replay.Config, trainer: Any) -> Buffer:
    if not isinstance(config.memory, str):
        return OwnMemory(config.memory, config.capacity, seed=trainer.seed)
    if config.memory == "ring":
        tasks = getattr(trainer, "num_tasks", None)
        check(isinstance(tasks, int), "Replay", "memory='ring'", "know the number of tasks",
              "set num_tasks on the trainer before configure_model")
        assert isinstance(tasks, int)
        return Ring(config.capacity, tasks=tasks, seed=trainer.seed)
    kind = {"reservoir": Reservoir, "class_balanced": ClassBalanced}[config.memory]
    return kind(config.capacity, seed=trainer.seed, key=config.key)
