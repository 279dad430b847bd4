"""Ray under the ledger: Tune places trials and starts the dead ones again; what is done, the ledger alone says."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everbatch.errors import check, check_real, check_whole
from everbatch.tune.ledger import Ledger
from everbatch.tune.nodes import check_address, check_nodes_see
from everbatch.tune.overdue import ender
from everbatch.tune.progress import Board, reporter
from everbatch.tune.trial import Trial, plain, trainable

__all__ = ["Resources", "cluster", "drive"]

SETTINGS = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_GLOBAL_CHECKPOINT_S": "3600",
            "TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_AIR_NEW_OUTPUT": "0", "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0"}
"""Trials stay in the folder they were started in, Tune keeps no logs and no state beside the ledger, and a Ctrl-C ends it."""
OBJECT_STORE = 100 * 2**20


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a trial gets, and where."""

    address: str | None = None
    """Of a Ray cluster that is there; by default one is started on this machine, and ended."""
    ranks: int = 1
    """Ranks of a trial. One trains in the trial's own process, more in worker actors of the trial's placement group; those want a
    scenario with engine.kind=ddp, fsdp2 or deepspeed."""
    spread: bool = False
    """Ranks of a trial each on another node (STRICT_SPREAD), in place of close together."""
    cpus: int = 1
    """CPU cores of a rank."""
    gpus: float = 0.0
    """GPUs of a rank."""
    time_limit: float = 3600.0
    """Seconds that a trial may take with all its orders; one that takes longer is ended and listed, from outside where its
    process stands still."""
    again: bool = False
    """Try streams that failed before once more."""

    def __post_init__(self) -> None:
        check_whole("tune", "ranks", self.ranks, 1)
        check_whole("tune", "cpus", self.cpus, 1)
        check_real("tune", "gpus", self.gpus, 0.0)
        check_real("tune", "time_limit", self.time_limit, 0.0, open_low=True)

    @property
    def bundle(self) -> dict[str, float]:
        """Of one rank."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


@contextmanager
def cluster(resources: Resources, folder: Path, files: Sequence[Path]) -> Iterator[Callable[[], Any]]:
    """Ray inside the block, from the first call of what it gives: where the ledger has everything, none is started.

    Args:
        folder: of the ledger, and files: that trials read; every node must see both.

    Raises:
        ImportError: ray is not installed. ValueError: resources that no node has, storage that a node does not see.
    """
    begun: list[Any] = []

    def start() -> Any:
        if not begun:
            ray = _ray(resources)
            begun.append(ray if not ray.is_initialized() else None)
            if begun[0] is not None:
                _init(ray, resources)
            _check_nodes([node["Resources"] for node in ray.nodes() if node["Alive"]], resources)
            if resources.address is not None:
                check_nodes_see(ray, folder, files)

    try:
        yield start
    finally:
        for ray in begun:
            if ray is not None:
                ray.shutdown()


def _ray(resources: Resources) -> Any:
    """The module; before it is imported, what it reads then."""
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    if resources.address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else a token is written into the home folder
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError("tune: ray is not installed; pip install everbatch[tune]") from error


def _init(ray: Any, resources: Resources) -> None:
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    if resources.address is not None:
        check_address(resources.address)
        local = {}
    ray.init(address=resources.address, log_to_driver=False, logging_level="error", **local)


def _check_nodes(nodes: Sequence[dict[str, float]], resources: Resources) -> None:
    """Refuse what no node has: Ray itself would wait for it, forever."""
    def fits(node: dict[str, float]) -> int:
        return int(min(node.get(name, 0.0) // amount for name, amount in resources.bundle.items()))

    room = [min(fits(node), 1) if resources.spread else fits(node) for node in nodes]
    have = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in ("CPU", "GPU")) for node in nodes)
    want = ", ".join(f"{amount:g} {name}" for name, amount in resources.bundle.items())
    check(sum(room) >= resources.ranks, "tune", f"{resources.ranks} rank{'s' * (resources.ranks > 1)} of {want}"
          f"{' each on a node of its own' if resources.spread else ''}", f"fit on the nodes, which have {have}",
          "lower ranks, cpus or gpus, or add nodes")


def drive(trials: Sequence[Trial], resources: Resources, folder: Path, board: Board, start: Callable[[], Any]) -> None:
    """Run trials side by side until each of their units is in the ledger, filled or failed. `start` is what `cluster` gives.

    A process of a trial that dies is started again once, and goes on from its newest checkpoint; after the second death the unit
    is listed as failed. Only what the ledger lacks is submitted.
    """
    left = [trial for trial in trials if missing(trial)]
    board.begin(trials)
    if left:
        start()
        tune: Any = importlib.import_module("ray.tune")
        if resources.address is not None:
            files = {file for trial in left for file in (trial.data, trial.seal) if file is not None}
            check_nodes_see(importlib.import_module("ray"), folder, [Path(file) for file in sorted(files)])
        bundles = [resources.bundle] if resources.ranks == 1 else [{}, *[resources.bundle] * resources.ranks]
        strategy = "STRICT_SPREAD" if resources.spread and resources.ranks > 1 else "PACK"
        tuner = tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory(bundles, strategy=strategy)),
            param_space={"trial": tune.grid_search([plain(trial) for trial in left])},
            tune_config=tune.TuneConfig(
                reuse_actors=resources.ranks == 1, trial_dirname_creator=_short, trial_name_creator=_short),
            run_config=tune.RunConfig(
                name=f"run-{time.time_ns()}", storage_path=os.path.abspath(folder / "ray"), verbose=0,
                callbacks=[reporter(board), ender()], failure_config=tune.FailureConfig(max_failures=1)))
        deaths = _deaths(tuner.fit())
        for trial in left:
            if trial.name in deaths:
                _list_death(trial, deaths[trial.name])
        open_ones = [trial.name for trial in left if missing(trial)]
        if open_ones:  # neither done nor failed: whoever ended Tune, the trials are not to be blamed
            raise RuntimeError(f"tune: stopped before {', '.join(open_ones[:5])} had run; the same command goes on")
    board.end()


def _deaths(results: Any) -> dict[str, str]:
    """Errors by trial, which its folder names: a trial that ended before its first report has no configuration there."""
    found: dict[str, str] = {}
    for result in results:
        if result.error is not None:
            method, number, _ = Path(result.path).name.rsplit("-", 2)
            found[f"{method} #{number}"] = str(result.error)
    return found


def _short(trial: Any) -> str:
    config = trial.config["trial"]
    return f"{config['method']}-{config['id']}-{trial.trial_id}"


def missing(trial: Trial) -> bool:
    """Whether a trial has a unit to fill: one that is not there, with none before it that failed."""
    ledger = Ledger(trial.ledger)
    for _, key in trial.units:
        row = ledger.read(key)
        if row is None or "failed" in row:
            return row is None
    return False


def _list_death(trial: Trial, error: str) -> None:
    """A trial whose process died twice, or that Tune gave up."""
    ledger = Ledger(trial.ledger)
    if not missing(trial):
        return
    order, key = next(unit for unit in trial.units if ledger.read(unit[1]) is None)
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["ended without a word"]
    memory = "OutOfMemory" in error or "low on memory" in error
    # Ray ends with advice where memory ran out; what happened stands above it.
    full = [line for line in lines if "low on memory" in line]
    telling = full or [line for line in lines if "Error" in line or "memory" in line] or lines
    cause = telling[-1]
    if "LeakageError" in error:
        from everbatch.tune.seal import LeakageError

        raise LeakageError(cause.partition("LeakageError: ")[2] or cause)
    ledger.write({"key": key, "options": {p: v for layer in trial.options for p, v in layer.items()}, "order": order,
                  "failed": "out_of_memory" if memory else "died", "cause": cause[:500], "seconds": 0.0, "cpu_seconds": 0.0})
