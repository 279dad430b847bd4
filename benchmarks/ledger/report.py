"""What a claim's cells say: a verdict, a Markdown table, a figure, and all of it as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.ledger.claim import Claim
from benchmarks.ledger.estimate import Estimate, chance, estimate
from benchmarks.ledger.plan import Plan
from benchmarks.ledger.rule import Found, Verdict, found, verdict
from everbatch import config
from everbatch.report.recorder import write_json

__all__ = ["Judged", "judge", "markdown", "plot", "write"]


@dataclass
class Judged:
    """A claim, its cells so far, and what they say."""

    plan: Plan
    verdict: Verdict
    records: dict[str, dict[int, dict[str, Any]]]
    """Of finished cells, by arm and seed."""
    parts: list[Found]
    done: int
    total: int
    """Cells of the comparison."""
    failed: dict[str, str]
    """Label of each cell whose last try failed, and why."""

    def values(self, statistic: str, arm: str) -> dict[int, float | None]:
        """A statistic by seed; None where that run diverged."""
        return {seed: record["values"].get(statistic) for seed, record in self.records[arm].items()}

    def estimate(self, statistic: str, arm: str) -> tuple[Estimate | None, int]:
        """Over the seeds that have a number, and how many diverged."""
        every = self.values(statistic, arm)
        good = [value for value in every.values() if value is not None]
        return (estimate(good) if good else None), len(every) - len(good)


def judge(plan: Plan) -> Judged:
    """Read every cell, form the contrasts, apply the rule."""
    claim, settings = plan.claim, plan.settings
    plan.damaged.clear()
    cells = plan.compared()
    tuning, failed = plan.tuning(), {}
    records: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in settings.arms}
    for arm, seed, cell in _named(plan, cells or []):
        record = plan.record(cell)
        if record is not None:
            records[arm][seed] = record
    for cell in [*tuning, *(cells or [])]:
        cause = plan.store.failure(cell)
        if cause is not None:
            failed[cell.label] = cause
    parts = []
    for contrast in claim.rule_of(settings.scale):
        statistic = contrast.statistic or claim.statistic
        values = {arm: {s: r["values"].get(statistic) for s, r in rows.items()} for arm, rows in records.items()}
        seeds = [seed for seed in settings.seeds if all(seed in values.get(arm, {}) for arm in contrast.weights)]
        parts.append(found(contrast, values, seeds))
    done, total = sum(map(len, records.values())), len(settings.arms) * len(settings.seeds)
    needed = {arm for contrast in claim.rule_of(settings.scale) if contrast.decides for arm in contrast.weights}
    complete = done == total and needed <= set(settings.arms) and len(settings.seeds) >= claim.seeds
    return Judged(plan, verdict(parts, complete=complete), records, parts, done, total, failed)


def _named(plan: Plan, cells: Sequence[Any]) -> list[tuple[str, int, Any]]:
    settings = plan.settings
    pairs = [(arm, seed) for seed in settings.seeds for arm in settings.arms]
    return [(arm, seed, cell) for (arm, seed), cell in zip(pairs, cells, strict=bool(cells))]


# ------------------------------------------------------------------------------------------------------------------ Markdown
def markdown(judged: Judged) -> str:
    """The report of one claim."""
    plan, claim = judged.plan, judged.plan.claim
    lines = [
        f"## {claim.title}", "", f"**Verdict: {judged.verdict}**{_why(judged)}", "",
        f"- Claim: {claim.says}", f"- Source: {claim.paper}", f"- There: {claim.protocol}", f"- Here: {claim.scaled}",
        f"- Scale: {_written(config.resolved(plan.settings.scale))}; {len(plan.settings.seeds)} seeds", *_other(plan),
        *_provenance(judged), "",
        *_tuned(plan), *_arms(judged), "", *_contrasts(judged)]
    if judged.failed:
        lines += ["", "Failed cells, which do not count:", ""]
        lines += [f"- {label}: `{cause.strip().splitlines()[-1]}`" for label, cause in judged.failed.items()]
    lines += [f"- damaged: {text}" for text in plan.damaged]
    return "\n".join(lines) + "\n"


def _why(judged: Judged) -> str:
    """How far from done it is, where it is not."""
    claim, settings = judged.plan.claim, judged.plan.settings
    if judged.verdict is not Verdict.NOT_RUN:
        return ""
    if judged.done < judged.total:
        return f" ({judged.done} of {judged.total} cells)"
    if len(settings.seeds) < claim.seeds:
        return f" ({len(settings.seeds)} of the {claim.seeds} seeds that the claim declares)"
    return f" (of the arms {', '.join(settings.arms)} alone)"


def _written(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def _other(plan: Plan) -> list[str]:
    """What is not as the claim declares it: whoever looks at several scales, or at more seeds, has more than one try."""
    now, declared = (config.resolved(scale) for scale in (plan.settings.scale, plan.claim.scale))
    found = {key: value for key, value in now.items() if value != declared[key]}
    if len(plan.settings.seeds) != plan.claim.seeds:
        found["seeds"] = len(plan.settings.seeds)
    return [f"- Other than declared: {_written(found)}"] if found else []


def _provenance(judged: Judged) -> list[str]:
    """Commits, versions, seconds and load of the cells."""
    records = [record for rows in judged.records.values() for record in rows.values()]
    if not records:
        return []
    commits = sorted({str(record["commit"])[:12] + ("+" if str(record["commit"]).endswith("+") else "") for record in records})
    torches = sorted({str(record["versions"]["torch"]) for record in records})
    loads = sorted(record["load_average"] for record in records)
    seconds = sum(record["cpu_seconds"] for record in records)
    return [f"- Cells: commit {', '.join(commits)}; torch {', '.join(torches)}; {seconds:.0f} CPU seconds; load average "
            f"{loads[0]:.1f} to {loads[-1]:.1f}; data {judged.plan.data or 'made from the seed'}"]


def _tuned(plan: Plan) -> list[str]:
    """The table that options were chosen from."""
    table, tuning = plan.table(), plan.claim.tuning
    if tuning is None:
        return []
    if not table:
        return ["Tuning is not finished.", ""]
    chosen = plan.chosen() or {}
    lines = [f"{tuning.option} by held-out {plan.claim.statistic}, mean of {tuning.seeds} seeds (from {tuning.first_seed}), "
             "never on the test samples:", "", f"| arm | {plan.claim.statistic} by {tuning.option} | chosen |", "|---|---|---|"]
    for arm, row in table.items():
        best = chosen[arm][tuning.option]
        edge = " (an end of the grid)" if len(row) > 1 and best in (min(row), max(row)) else ""
        told = ", ".join(f"{value:g}: {_number(mean, plan.claim)}" for value, mean in row.items())
        lines.append(f"| {arm} | {told} | {best:g}{edge} |")
    return [*lines, ""]


def _arms(judged: Judged) -> list[str]:
    """A row for each arm."""
    claim = judged.plan.claim
    names = [claim.statistic, *claim.shown]
    unit = ", %" if claim.percent else ""
    lines = [f"| arm | n | {claim.statistic}{unit} | 95 % t interval | {''.join(f'{name} | ' for name in names[1:])}s per cell |",
             "|" + "---|" * (5 + len(claim.shown))]
    for arm, rows in judged.records.items():
        value, diverged = judged.estimate(claim.statistic, arm)
        more = [_shown(*judged.estimate(name, arm)) for name in claim.shown]
        seconds = f"{estimate([row['seconds'] for row in rows.values()]).mean:.1f}" if rows else "-"
        count = f"{len(rows)}{f' ({diverged} diverged)' if diverged else ''}"
        lines.append(f"| {arm} | {count} | {'-' if value is None else _number(value.mean, claim)} | {_interval(value, claim)} | "
                     + "".join(f"{text} | " for text in more) + f"{seconds} |")
    return lines


def _shown(value: Estimate | None, without: int) -> str:
    """A mean, and over how many cells where some have no number."""
    if value is None:
        return "-"
    return f"{value.mean:.4g}" + (f" ({value.count} of {value.count + without})" if without else "")


def _contrasts(judged: Judged) -> list[str]:
    """A row for each contrast, and what the verdict hangs on."""
    claim = judged.plan.claim
    unit = ", points" if claim.percent else ""
    heads = ("mean", "standard error", "95 % t interval", "shows above", "does not show below", "says")
    lines = [f"| contrast, paired by seed{unit} | {' | '.join(heads)} |", "|" + "---|" * 7]
    for part in judged.parts:
        of, value = part.contrast, part.estimate
        says = str(part.verdict) if judged.verdict is not Verdict.NOT_RUN else "not run"
        says += "" if of.decides else " (told, not judged)"
        own = claim if of.statistic in (None, claim.statistic) else None
        error = "-" if value is None or value.error is None else _number(value.error, own)
        mean = "-" if value is None else _number(value.mean, own)
        other = "" if own else f" ({of.statistic}{', not in points' if claim.percent else ''})"
        lines.append(f"| {of.says}{other} | {mean} | {error} | {_interval(value, own)} | "
                     f"{_number(of.above, own)} | {_number(of.bar, own)} | {says} |")
    lines.append("")
    lines.append("The claim shows where every judged interval lies above its bound, and does not show at this scale where one "
                 "lies below; all else is undecided.")
    counts = sorted({p.estimate.count for p in judged.parts if p.estimate is not None and p.estimate.count > 1})
    beyond = "of comparisons without an effect lie beyond 2 standard errors.)"
    return [*lines, *(f"(With {n} seeds, {100 * chance(n):.0f} % {beyond}" for n in counts)]


def _number(value: float, claim: Claim | None) -> str:
    if claim is not None and claim.percent:
        return f"{100 * value:.2f}"
    return f"{value:.4g}"


def _interval(value: Estimate | None, claim: Claim | None) -> str:
    if value is None or value.low is None or value.high is None:
        return "-"
    return f"{_number(value.low, claim)} to {_number(value.high, claim)}"


# -------------------------------------------------------------------------------------------------------------------- figure
def plot(judged: Judged, path: Path) -> bool:
    """Means of the arms with t intervals, and the contrasts beside zero; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    claim = judged.plan.claim
    arms = claim.arms_of(judged.plan.settings.scale)
    curves = all(arms[name].series is not None for name in judged.records)
    figure = Figure(figsize=(10.5, 1.6 + 0.42 * max(len(judged.records) if not curves else 5, len(judged.parts), 3)), dpi=110,
                    layout="constrained")
    left, right = figure.subplots(1, 2)
    (_draw_curves if curves else _draw_arms)(judged, left, arms)
    factor, unit = (100, ", %") if claim.percent else (1, "")
    left.set_title(f"{claim.statistic}{unit}: mean, 95 % t interval", fontsize=9)
    shown = [part for part in judged.parts if part.estimate is not None and part.contrast.statistic in (None, claim.statistic)]
    for place, part in enumerate(reversed(shown)):
        assert part.estimate is not None
        _bar(right, part.estimate, place, factor, "C0" if part.contrast.decides else "0.6")
    right.set_yticks(range(len(shown)), [part.contrast.says for part in reversed(shown)], fontsize=8)
    right.axvline(0.0, color="0.3", linewidth=0.8)
    right.set_ylim(-0.7, len(shown) - 0.3)
    right.set_title(f"contrasts, paired by seed{', points' if claim.percent else ''} (grey: not judged)", fontsize=9)
    figure.suptitle(f"{claim.title}: {judged.verdict}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return True


def _draw_arms(judged: Judged, axes: Any, arms: Mapping[str, Any]) -> None:
    """A line for each arm."""
    claim, names = judged.plan.claim, list(judged.records)
    for place, arm in enumerate(reversed(names)):
        value, _ = judged.estimate(claim.statistic, arm)
        if value is not None:
            _bar(axes, value, place, 100 if claim.percent else 1, "C0")
    axes.set_yticks(range(len(names)), names[::-1], fontsize=8)
    axes.set_ylim(-0.7, len(names) - 0.3)


def _draw_curves(judged: Judged, axes: Any, arms: Mapping[str, Any]) -> None:
    """Curves of arms that are points of one."""
    claim, factor = judged.plan.claim, 100 if judged.plan.claim.percent else 1
    for series in dict.fromkeys(arms[name].series for name in judged.records):
        names = [name for name in judged.records if arms[name].series == series]
        points = [(arms[n].x, v) for n in names if (v := judged.estimate(claim.statistic, n)[0]) is not None]
        half = [factor * ((v.high or v.mean) - v.mean) for _, v in points]
        axes.errorbar([x for x, _ in points], [factor * v.mean for _, v in points], half, marker="o", capsize=3, label=series)
    ticks = sorted({arms[name].x for name in judged.records})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8)


def _bar(axes: Any, value: Estimate, place: int, factor: float, colour: str) -> None:
    half = None if value.high is None else factor * (value.high - value.mean)
    axes.errorbar([factor * value.mean], [place], xerr=half, marker="o", capsize=3, color=colour)


# --------------------------------------------------------------------------------------------------------------------- files
def write(judged: Judged) -> Path:
    """report.md, result.json and, with matplotlib, figure.png in the claim's folder; returns the report's path."""
    folder, claim = judged.plan.folder, judged.plan.claim
    drawn = plot(judged, folder / "figure.png")
    text = markdown(judged) + (f"\n![{claim.title}](figure.png)\n" if drawn else "\n(no figure: matplotlib is not installed)\n")
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / ".report.md"
    draft.write_text(text)
    draft.replace(folder / "report.md")
    write_json(folder / "result.json", result(judged))
    return folder / "report.md"


def result(judged: Judged) -> dict[str, Any]:
    """All of it as plain values."""
    plan, claim = judged.plan, judged.plan.claim
    contrasts = [{**asdict(part.contrast), "estimate": part.estimate and asdict(part.estimate), "diverged": part.missing,
                  "verdict": str(part.verdict)} for part in judged.parts]
    table = {arm: {str(value): mean for value, mean in row.items()} for arm, row in (plan.table() or {}).items()}
    tuned = {"table": table, "chosen": plan.chosen()}
    cells = {arm: {str(seed): {key: record[key] for key in ("values", "seconds", "commit", "versions", "load_average")}
                   for seed, record in rows.items()} for arm, rows in judged.records.items()}
    return {
        "claim": claim.title, "source": str(claim.paper), "verdict": str(judged.verdict), "done": judged.done, "of": judged.total,
        "scale": config.resolved(plan.settings.scale), "seeds": list(plan.settings.seeds), "data": plan.data,
        "tuning": tuned if claim.tuning else None, "contrasts": contrasts, "cells": cells, "failed": judged.failed}
