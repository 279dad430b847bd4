"""The whole protocol as one object: four commands, each started as a process of its own."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from everbatch import config
from everbatch.ends import guard
from everbatch.errors import check
from everbatch.tune.commands import INTERRUPTED, Prepare, interrupts
from everbatch.tune.drive import Resources
from everbatch.tune.evaluate import Conventional, Evaluate
from everbatch.tune.pair import ScenarioPair
from everbatch.tune.plan import SearchOptions
from everbatch.tune.search import Search

__all__ = ["TwoPhase", "main"]


@dataclass(frozen=True, kw_only=True)
class TwoPhase:
    """Prepare, search, evaluate, and search conventionally to compare; the same call starts and resumes.

    >>> TwoPhase(pair=ScenarioPair(tuning="a.npz", evaluation="b.npz"), output="runs/mine").run()      # doctest: +SKIP

    The processes are separate so that the one that tunes never holds anything of the other side: it is started with the tuning
    folder alone.
    """

    pair: ScenarioPair = field(default_factory=ScenarioPair)
    """What is tuned on and what is judged on."""
    search: SearchOptions = field(default_factory=SearchOptions)
    """What is searched, and with what resources; the other phases have the same."""
    output: str = "runs/two_phase"
    """Folder of everything."""
    nonce: str | None = None
    """Where the nonce that opens the evaluation data is kept; by default in OUTPUT/evaluation."""
    faithful: bool = False
    """The published size: 30 configurations, 5 class orders to tune on."""
    amend: bool = False
    """Evaluate a second record for methods that were evaluated before; marks every result."""
    conventional: bool = True
    """Search on the evaluation data too, in the end, to see what tuning on what one is judged on is worth."""

    def __post_init__(self) -> None:
        default = {"search.trials": SearchOptions.trials, "pair.orders": ScenarioPair.orders}
        for path, why in self.unused().items():
            given = operator.attrgetter(path)(self)
            check(given == default[path], "two_phase", f"{path}={given} has no effect here", "be left out", why)
        self.search.check_scenario(self.pair.whole_scenario)  # before anything is prepared

    @property
    def folder(self) -> Path:
        """Of everything."""
        return Path(self.output)

    def commands(self) -> dict[str, Any]:
        """The options of each command."""
        pair = replace(self.pair, orders=5) if self.faithful else self.pair
        search = replace(self.search, trials=30) if self.faithful else self.search
        evaluation = str(self.folder / "evaluation")
        resources = {one.name: getattr(search, one.name) for one in fields(Resources)}
        found = {
            "prepare": Prepare(**_fields(pair), output=self.output, nonce=self.nonce),
            "search": Search(**_fields(search), data=str(self.folder / "tuning"), output=str(self.folder / "search")),
            "evaluate": Evaluate(**resources, record=str(self.folder / "search" / "record.json"), data=evaluation,
                                 nonce=self.nonce, amend=self.amend),
            "conventional": Conventional(**resources, data=evaluation, nonce=self.nonce)}
        return found if self.conventional else {name: o for name, o in found.items() if name != "conventional"}

    def start(self, command: str) -> None:
        """One phase, in a process of its own.

        Raises:
            RuntimeError: it failed; it has said why on standard error.
        """
        with tempfile.TemporaryDirectory() as folder:
            options = Path(folder) / f"{command}.yaml"
            config.dump(self.commands()[command], options)
            with interrupts(lambda *_: None):  # the phase hears a Ctrl-C itself, and says so
                code = subprocess.run([sys.executable, "-m", "everbatch.tune", command, "--config", str(options)]).returncode
        if code == INTERRUPTED:
            raise SystemExit(code)
        if code:
            raise RuntimeError(f"tune: {command} ended with code {code}; what it printed above says why")

    def run(self) -> None:
        """All phases that are left."""
        known = self.commands()
        for command in known:
            self.start(command)

    def unused(self) -> dict[str, str]:
        """What `faithful` sets."""
        return {"search.trials": "faithful=true sets it", "pair.orders": "faithful=true sets it"} if self.faithful else {}


def _fields(options: Any) -> dict[str, Any]:
    return {one.name: getattr(options, one.name) for one in fields(options)}


def main(script: str | os.PathLike[str]) -> None:
    """Run the protocol as the script `script`: defaults in the YAML file beside it, the rest on the command line."""
    with guard("two_phase"):
        options = config.parse(TwoPhase, default_yaml=Path(script).with_suffix(".yaml"), prog="two_phase")
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        check(alone, "two_phase", "a launch of several processes", "be started without torchrun", "search.ranks= is for trials")
        options.run()
