"""The same run over several seeds: in turn or side by side, resumed seed by seed, and summed up without a best one.

    seeds/S/        the whole folder of the run with seed S
    config.yaml     the options of all of them
    result.json     every headline number by seed, its mean, sample standard deviation and 95 % t interval, and the versions
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from everbatch.checkpoint import folder as runs
from everbatch.config.layers import dump, resolved
from everbatch.config.strict_yaml import load_file
from everbatch.distributed import World
from everbatch.errors import check
from everbatch.experiment.base import Experiment, Result
from everbatch.experiment.job import Job
from everbatch.experiment.side_by_side import side_by_side
from everbatch.metrics.estimate import Estimate, estimate
from everbatch.report.recorder import versions

__all__ = ["check_place", "compared", "refuse_other_folder", "repeat", "sum_up", "told", "went_on"]

OWN = ("output", "resume", "dry_run")
"""Options in which runs of one group may differ."""


@dataclass(frozen=True)
class Member:
    """One seed of a group."""

    seed: int
    options: Experiment

    @property
    def folder(self) -> Path:
        return Path(self.options.output)

    def values(self) -> dict[str, Any]:
        """What its result.json holds, where it has ended with these very options; else nothing."""
        try:
            found = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        same = isinstance(found, dict) and compared(found.get("configuration", {})) == compared(resolved(self.options.settled()))
        return found if same else {}


def repeat(options: Experiment, world: World, one: Callable[[Experiment], Result], script: Path | None, signals: bool) -> Result:
    """Run every seed that has not ended yet, and sum them all up. Collective where the seeds run in turn.

    Args:
        options: of all; `seeds` runs from `trainer.seed` on.
        one: runs a single seed in this process.
        script: what a seed beside others is started by.
        signals: whether a signal asks for checkpoints.

    Raises:
        ValueError: a folder with the runs of other seeds to resume; seeds side by side on several ranks, or without a script.
        RuntimeError: seeds that failed, all told.
    """
    check_place(options, world, script)
    with Job.of(options, world, shared=options.shares_folder) as job:
        job.checkpoints = None
        job.goes_on = went_on(job)
        if job.goes_on:
            runs.together(world, job.folder, lambda: None if world.rank else _check_same(options, job.folder))
        job.begin()
        runs.together(world, job.folder, lambda: None if world.rank else dump(options, job.folder / "config.yaml"))
        members = list(_members(options, job))
        try:
            return _all(members, job, one, script, signals)
        finally:
            job.close()


def went_on(job: Job) -> bool:
    """Whether a group resumes and its folder holds runs of seeds. Collective."""
    there = job.resume and any((job.folder / "seeds").glob("*")) and not runs.half_moved(job.folder)
    return bool(job.world.gather(there)[0])


def _all(members: Sequence[Member], job: Job, one: Callable[[Experiment], Result], script: Path | None, signals: bool) -> Result:
    """Run what is left, and report."""
    assert job.recorder is not None
    ended = _ended(members, job.world)
    waiting = [member for member in members if member.seed not in ended]
    for member in members:
        if member.seed in ended:
            job.recorder.say(f"seed {member.seed} has ended already: see {member.folder / 'result.json'}")
    if job.options.seeds_at_once > 1:
        assert script is not None
        stop_sign = side_by_side({member.seed: member.options for member in waiting}, job.options.seeds_at_once, script,
                                 job.recorder.say, signals=signals)
    else:
        stop_sign = _in_turn(waiting, len(members), job, one)
    if stop_sign:
        return Result({}, job.folder, 0, stop_sign=stop_sign)
    unchanged = not waiting and job.results().get("seeds") == [member.seed for member in members]
    values: Any = runs.together(job.world, job.folder, lambda: None if job.world.rank else _values(members, job))[0]
    if not unchanged:
        recorder = job.recorder
        runs.together(job.world, job.folder, lambda: recorder.result(values))  # no rank goes on before it can be read
    job.recorder.say("\n".join([*told(values, job.options.unit_of), f"see {job.folder}/result.json, and for each seed "
                                f"{job.folder}/seeds/S; tensorboard --logdir {job.folder}"]))
    steps = sum(run["steps"] for run in values["runs"].values())
    return Result(values, job.folder, steps, unchanged=unchanged)


def _in_turn(waiting: Sequence[Member], total: int, job: Job, one: Callable[[Experiment], Result]) -> int:
    """Run one seed after the other in this process; the signal that stopped one, or 0."""
    assert job.recorder is not None
    for member in waiting:
        job.recorder.say(f"seed {member.seed}, {member.seed - job.options.trainer.seed + 1} of {total}")
        result = one(member.options)
        if result.stop_sign:
            return result.stop_sign
    return 0


def _members(options: Experiment, job: Job) -> Iterator[Member]:
    """A run for each seed, in a folder of its own, that goes on where the group does."""
    all_of_them: Any = options  # its fields are made from the table of methods
    for seed in range(options.trainer.seed, options.trainer.seed + options.seeds):
        yield Member(seed, replace(
            all_of_them, seeds=1, seeds_at_once=1, resume=job.goes_on, output=str(job.folder / "seeds" / str(seed)),
            trainer=replace(options.trainer, seed=seed)))


def _ended(members: Sequence[Member], world: World) -> set[int]:
    """Seeds that need no run, as rank 0 finds them."""
    found: Any = world.gather({m.seed for m in members if m.values()} if world.rank == 0 else set())[0]
    return set(found)


def _values(members: Sequence[Member], job: Job) -> dict[str, Any]:
    """What result.json holds of all seeds."""
    every = {member.seed: member.values() for member in members}
    without = [seed for seed, values in every.items() if not values]
    check(not without, job.options.title, f"the results of seeds {without} are of other options",
          "be of the same as the others'", "give this one another folder, or begin it anew without resume=true")
    headlines = {seed: job.options.headlines(values) for seed, values in every.items()}
    kept = ("steps", "seconds", "world_size", "versions")
    return {
        "seeds": list(every), "estimates": sum_up(headlines), "versions": versions(), "configuration": resolved(job.options),
        "runs": {seed: {"folder": f"seeds/{seed}", "headlines": headlines[seed], **{name: values.get(name) for name in kept}}
                 for seed, values in every.items()}}


# ------------------------------------------------------------------------------------------------------------------- numbers
def sum_up(headlines: Mapping[int, Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Mean, sample standard deviation, standard error and t interval of every number, over the seeds that have it.

    Args:
        headlines: numbers by name, by seed; None or not finite where a seed has none.

    Returns:
        By name: an `Estimate` as a dictionary, or `count` 0 alone, and the seeds `without` a number.
    """
    names = dict.fromkeys(name for found in headlines.values() for name in found)
    result: dict[str, dict[str, Any]] = {}
    for name in names:
        values = {seed: found.get(name) for seed, found in headlines.items()}
        good = [value for value in values.values() if value is not None and math.isfinite(value)]
        without = [seed for seed, value in values.items() if value is None or not math.isfinite(value)]
        result[name] = {**(asdict(estimate(good)) if good else {"count": 0}), "without": without}
    return result


def told(values: Mapping[str, Any], unit_of: Callable[[str], str]) -> list[str]:
    """A line for each headline number, with how many seeds have it where not all do."""
    seeds = values["seeds"]
    wide = max(30, *map(len, values["estimates"])) if values["estimates"] else 30
    lines = [f"{f'{len(seeds)} seeds, from {seeds[0]} to {seeds[-1]}':<{wide}} {'mean':>10} {'std':>10}   95 % t interval"]
    for name, found in values["estimates"].items():
        head = f"{name.replace('_', ' '):<{wide}}"
        if not found["count"]:
            lines.append(f"{head} {'-':>10}")
            continue
        of = Estimate(**{key: value for key, value in found.items() if key != "without"})
        missing = f"   over {of.count} of {len(seeds)} seeds" if found["without"] else ""
        lines.append(f"{head} {_numbers(of, unit_of(name))}{missing}")
    return lines


def _numbers(of: Estimate, unit: str) -> str:
    """Mean, deviation and interval in a unit; a share is told in percent."""
    scale, form = (100, ".2f") if unit == "%" else (1, ".4g")
    mean = f"{scale * of.mean:{form}}"
    if of.std is None or of.low is None or of.high is None:
        return f"{mean:>10} {'-':>10}   - {unit}".rstrip()
    return f"{mean:>10} {f'{scale * of.std:{form}}':>10}   {scale * of.low:{form}} to {scale * of.high:{form}} {unit}".rstrip()


# ------------------------------------------------------------------------------------------------------------------- refusals
def refuse_other_folder(options: Experiment, world: World) -> None:
    """Refuse to resume one run in a folder that holds those of several seeds. Collective where it resumes."""
    if options.resume and not options.dry_run:
        where = Path(options.output)
        several = bool(world.gather(any((where / "seeds").glob("*")))[0])
        check(not several, options.title, f"seeds=1 resumes the folder {str(where)!r} of several seeds",
              "be given the seeds that it began with", f"see {where / 'config.yaml'}, or give this one another folder")


def check_place(options: Experiment, world: World, script: Path | None) -> None:
    """Refuse seeds where they cannot run."""
    title, at_once = options.title, options.seeds_at_once
    check(at_once == 1 or world.size == 1, title, f"seeds_at_once={at_once} on {world.size} ranks", "be 1",
          "under torchrun seeds run in turn")
    check(at_once == 1 or script is not None, title, f"seeds_at_once={at_once} in a process without a script", "be 1",
          "several processes at once are started by everbatch.experiment.main")
    ranks = options.conadv is not None and options.conadv.placement == "ranks"
    check(not ranks, title, f"seeds={options.seeds} with conadv.placement=ranks", "be 1",
          "ranks that craft serve one run; start each seed by itself")


def _check_same(options: Experiment, folder: Path) -> None:
    """The number of seeds is not changed after a look at the first results: an interval would not hold its level."""
    try:
        kept = load_file(folder / "config.yaml")
    except FileNotFoundError:  # ended between making its folder and writing its options
        return
    began = (kept.get("seeds"), kept.get("trainer", {}).get("seed"))
    now = (options.seeds, options.trainer.seed)
    check(now == began, options.title, f"seeds={now[0]} from trainer.seed={now[1]} resumes {began[0]} seeds from {began[1]}",
          "be the same as in the folder", "set seeds and trainer.seed as it has them, or give this one another folder")


def compared(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs of one seed must have in common; as JSON gives it back."""
    kept = {key: value for key, value in configuration.items() if key not in OWN}
    found: dict[str, Any] = json.loads(json.dumps(kept))
    return found
