"""A script around an experiment: options from files and the command line in, an exit code out."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from everbatch import config
from everbatch.distributed import init
from everbatch.ends import guard
from everbatch.experiment.base import Experiment
from everbatch.experiment.run import run
from everbatch.experiment.side_by_side import follow

__all__ = ["main"]


def main(recipe: type[Experiment], script: str | os.PathLike[str]) -> None:
    """Run `recipe` as the script `script`: its defaults are in the YAML file beside it, the rest is said on the command line.

    Exit codes: 0; 1 after an error, told in one line; 130 after a Ctrl-C and 143 after another signal, with a checkpoint.
    """
    with guard(recipe.title):
        follow()
        options = config.parse(recipe, default_yaml=Path(script).with_suffix(".yaml"), prog=recipe.title)
        role = options.set_aside()
        if role is not None and role.adversary:
            options.serve(role)
            return
        init()  # not left by `run` then: ranks that wait in it must not end before an error has been told
        stop_sign = run(options, signals=True, script=script).stop_sign
        if stop_sign:
            raise SystemExit(128 + (signal.SIGINT if stop_sign == signal.SIGINT else signal.SIGTERM))
