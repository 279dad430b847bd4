"""What continual evaluation has to say at a run's end: metrics, lines to print, figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from everbatch.metrics.stability import Stability
from everbatch.train.record import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["drawn", "told"]


def told(
    met: Stability, before: Sequence[Sequence[float]] | None, cost: Mapping[str, Any],
    figures: Mapping[str, Callable[[], Figure]],
) -> Report:
    """The report. `before`: accuracies of the untrained network, and on each task just before it; None where a
    task has none."""
    untrained, ahead = (None, None) if before is None else before
    found = met.summary(random_init=untrained, ahead=ahead)
    windows = [name for name in found if name.startswith("windowed")]
    names = ["min_accuracy", "worst_case_accuracy", "stability_gap", *windows, "learning_accuracy"]
    lines = [f"{name.replace('_', ' '):<30} {_shown(found[name], met.unit == 'fraction')}" for name in names]
    lines.append(f"{cost['points']} evaluations of {cost['weights']} weights on up to {max(cost['subset_samples'])} "
                 f"samples a task: {cost['evaluated_samples']} forwards, {cost['evaluation_seconds']:.1f} s")
    return Report("evaluation", {**found, **cost}, tuple(lines), figures)


def _shown(value: float | None, percent: bool) -> str:
    if value is None:
        return "-"
    return f"{100 * value:6.2f} %" if percent else f"{value:8.3f}"


def drawn(
    met: Stability, curves: Mapping[str, Any], names: Sequence[str], title: str,
) -> dict[str, Callable[[], Figure]]:
    """Figures by name."""
    unit: Any = met.unit

    def over_steps() -> Figure:
        from everbatch.report.curves import accuracy_over_steps

        return accuracy_over_steps(curves["step"], curves["task"], curves["accuracy"], names=names, unit=unit,
                                   title=title)

    def lost() -> Figure:
        from everbatch.report.curves import forgetting_by_task

        return forgetting_by_task(met.matrix(), met.lowest(), names=names, unit=unit, title=title)

    found: dict[str, Callable[[], Figure]] = {"accuracy_over_steps": over_steps}
    return found | ({"forgetting": lost} if len(met.ends) > 1 else {})
