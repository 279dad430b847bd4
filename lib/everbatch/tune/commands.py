"""The four commands, each its own process."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from everbatch import config
from everbatch.ends import guard
from everbatch.tune.evaluate import Conventional, Evaluate, conventional, evaluate
from everbatch.tune.pair import ScenarioPair, prepare
from everbatch.tune.search import Search, search

__all__ = ["COMMANDS", "Prepare", "main"]


@dataclass(frozen=True, kw_only=True)
class Prepare(ScenarioPair):
    """Options of `prepare`."""

    output: str = "runs/two_phase"
    """Folder of the whole protocol: tuning and evaluation are written in it."""
    nonce: str | None = None
    """Where the nonce that opens the evaluation data is written; by default in the evaluation folder."""

    @property
    def pair(self) -> ScenarioPair:
        """The options of the pair alone."""
        return ScenarioPair(**{name: getattr(self, name) for name in ScenarioPair.__dataclass_fields__})


def _prepare(options: Prepare) -> None:
    done = prepare(options.pair, options.output, options.nonce)
    said = "wrote" if done["written"] else "found, as it was asked for:"
    train, test = done["samples"]
    print(f"prepare: {said} {options.output}/tuning ({train} samples to train on, {test} to validate) and "
          f"{options.output}/evaluation, sealed; committed to the latter by\n{done['commitment']}")


INTERRUPTED = 130
"""Exit code after a Ctrl-C."""
COMMANDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "prepare": (Prepare, _prepare),
    "search": (Search, search),
    "evaluate": (Evaluate, evaluate),
    "conventional": (Conventional, conventional),
}


SAYS = {
    "prepare": "write two folders: what a search may see, and what it may not, sealed",
    "search": "tune on the first, freeze record.json, and print its SHA-256 to be published",
    "evaluate": "open the second, and run what was chosen on the declared orders; once",
    "conventional": "afterwards: tune on the second too, and say what that would have been worth"}


def usage() -> str:
    """What `--help` without a command prints: the commands in the order in which they are run."""
    lines = [f"  {name:<14}{SAYS[name]}" for name in COMMANDS]
    return "\n".join([f"usage: tune {{{','.join(COMMANDS)}}} [key=value ...]", *lines, "tune COMMAND --help lists its options"])


@contextmanager
def interrupts(act: Callable[..., Any]) -> Iterator[None]:
    """What a Ctrl-C does inside the block; nothing else than before, in a thread beside the main one."""
    mine = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, act) if mine else None
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGINT, before)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m everbatch.tune COMMAND key=value ...`; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in ([], ["-h"], ["--help"]):
        print(usage())
        return 0 if words else 2
    if words[0] not in COMMANDS:
        from everbatch.errors import nearest

        print(f"tune: command {words[0]!r}, must be one of {', '.join(COMMANDS)}; {nearest(words[0], COMMANDS)}", file=sys.stderr)
        return 2
    recipe, act = COMMANDS[words[0]]
    with guard(words[0]):
        options: Any = config.parse(recipe, words[1:], prog=words[0])
        try:
            with interrupts(signal.default_int_handler):  # so that Ray ends, too
                act(options)
        except KeyboardInterrupt:
            said = f"{words[0]}: stopped by Ctrl-C; the same command goes on with what the ledger lacks"
            print(said, file=sys.stderr, flush=True)
            return INTERRUPTED
    return 0
