"""What an optimizer asks of the problem: auxiliary objectives, losses by row, a Fisher information that means something."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from everbatch.contract import parts_of, route
from everbatch.errors import check
from everbatch.optim import OptimizerMixin
from everbatch.problems import Classification, Problem
from everbatch.train.outputs import check_output
from everbatch.train.passes import OutputFn
from everbatch.train.settings import TrainerConfig

__all__ = ["check_objectives", "check_problem", "check_targets", "needed", "problem_of"]

OF_LABELS = ("reference", "sampled", "exact")
"""Estimators of the Fisher information that weigh, draw or sum over the classes of a row."""


def problem_of(problem: Problem | None, config: TrainerConfig) -> Problem:
    """The problem given, or classification with the configuration's label smoothing."""
    given = problem is None or isinstance(problem, Problem)
    check(given, "Trainer", f"problem={problem!r}", "be one of everbatch.problems", "say problem=CausalLM(), an object")
    if problem is None:
        return Classification(label_smoothing=config.label_smoothing)
    check_output(problem.output)
    check(not config.label_smoothing, "Trainer", f"label_smoothing={config.label_smoothing} beside problem={problem!r}",
          "be left out", "say Classification(label_smoothing=...)")
    return problem


def check_targets(problem: Problem, stream: Any) -> None:
    """Refuse a source with targets of its own under a problem of labels, by which tasks, predictions and memories go: training
    would follow the targets, and the scores the labels. Under other problems refuse labels that the stream has renumbered.

    Raises:
        ValueError: on every rank.
    """
    name, own = type(problem).__name__, getattr(stream, "has_targets", False)
    check(not (problem.labels and own), "Trainer", f"a source with targets of its own and problem={name}",
          "have class indices as labels alone", "give them as labels=, without targets= or target=; or say problem=Regression() "
          "or another whose targets are no labels")
    numbers = getattr(stream, "label_map", None)
    moved = numbers is not None and not torch.equal(numbers, torch.arange(len(numbers)))
    check(problem.labels or own or not moved, "Trainer", f"problem={name} and labels that the stream has numbered anew",
          "be targets of their own", "give them beside the inputs: everbatch.data.RowSource(inputs, targets=...)")


def check_problem(problem: Problem, optimizer: Any) -> None:
    """Refuse, before anything is built, an optimizer that has no meaning for the problem.

    Raises:
        ValueError: rows with units and an optimizer that chooses among rows (ESAM); a problem other than cross-entropy of labels
            and an estimator of the Fisher information that goes over classes.
    """
    cls = getattr(optimizer, "func", None)
    if problem.cross_entropy or not (isinstance(cls, type) and issubclass(cls, OptimizerMixin)):
        return
    name, needs = type(problem).__name__, _declared(cls)
    check(not (problem.in_units and "per_sample" in needs), "Trainer", f"{needs.get('per_sample')} with problem={name}",
          "be another: it chooses rows on each rank, where rows of unequal numbers of units would count differently", "use SAM")
    chosen, _ = route(cls, dict(optimizer.keywords))
    for part in parts_of(cls):
        config = getattr(part, "Config", None)
        values = {**{f.name: f.default for f in fields(config)}, **chosen.get(part, {})} if config is not None else {}
        active = bool(values.get("strength", True))
        check(not (active and values.get("estimator") in OF_LABELS), "Trainer",
              f"{part.__name__} with estimator={values.get('estimator')!r} and problem={name}", "be empirical, batch or given",
              f"it goes over the classes of a row, which {name} has not: set {part.__name__.lower()}_estimator='empirical'")



def check_objectives(
    trainer: type, optimizer: Any, output_fn: OutputFn | None, accumulation: int,
) -> None:
    """Refuse, before anything is built, an optimizer whose objectives this trainer cannot give.

    Args:
        trainer: the composed class. optimizer: the partial it was given.

    Raises:
        ValueError: "output" needed without an `output_fn`; "per_sample" needed with several
            micro-batches, or with a trainer mixin that adds parts to the batch, which such an
            optimizer would not train on.
    """
    cls = getattr(optimizer, "func", None)
    if not (isinstance(cls, type) and issubclass(cls, OptimizerMixin)):
        return  # refused, with more words, where the engine is built
    needs = _declared(cls)
    asking = [part.__name__ for part, config in _options(cls, optimizer).items() if "reference" in part.wants(config)]
    giving = [part for part in parts_of(trainer) if "reference" in getattr(part, "gives", ())]
    check(bool(giving) or not asking, "Trainer", f"{', '.join(asking)} in the optimizer and no memory in the trainer",
          "have one to draw from", "list EpisodicMemory among the trainer's mixins")
    if "output" in needs:
        check(output_fn is not None, "Trainer", f"{needs['output']} in the optimizer and output_fn=None",
              "be given the scalar output whose gradient it bounds; there is no default to guess",
              "pass Trainer(..., output_fn=lambda logits, batch: ...) in a script of your own: options cannot name a function")
    if "per_sample" in needs:
        part = needs["per_sample"]
        check(accumulation == 1, "Trainer", f"accumulation={accumulation} with {part}",
              f"be 1, because {part} selects among the rows of one batch", "use more ranks, or SAM")
        adding = [p.__name__ for p in parts_of(trainer) if {"draw_batch", "augment_batch"} & vars(p).keys()]
        check(not adding, "Trainer", f"{part} in the optimizer and {', '.join(adding)} in the trainer",
              f"not both be used: {part} trains on rows of the stream alone", "use SAM")


def _options(cls: type, optimizer: Any) -> dict[Any, Any]:
    """The options that each part of an optimizer has which asks for objectives by its options."""
    chosen, _ = route(cls, dict(optimizer.keywords))
    return {part: part.Config(**chosen[part]) for part in parts_of(cls) if "wants" in vars(part)}  # type: ignore[attr-defined]


def needed(optimizer: OptimizerMixin) -> dict[str, str]:
    """The auxiliary objectives that an optimizer asks for, by its class and options, and the part that does."""
    names = _declared(type(optimizer))
    for part, config in optimizer.configs.items():
        names |= dict.fromkeys(part.wants(config), part.__name__)  # type: ignore[attr-defined]
    return names


def _declared(cls: type) -> dict[str, str]:
    """Auxiliary objectives that the parts of an optimizer class declare, and who does."""
    return {name: part.__name__ for part in parts_of(cls) for name in part.needs}  # type: ignore[attr-defined]
