"""torchrun with an exit code that says how the run ended: python launch/start.py ARGUMENTS OF TORCHRUN

130 after a Ctrl-C, 143 after SIGTERM, 128 + N after signal N; else the code of the rank that failed first (128 + N where signal N
killed it). torchrun itself gives 1 for all of these and prints a traceback after what the ranks have said. A first signal is
passed on to the ranks, which get `--shutdown-timeout` (30) seconds to write a checkpoint; a second one ends them at once.
"""

from __future__ import annotations

import os
import signal
import sys


def main(arguments: list[str]) -> int:
    """Start the ranks and wait for them; returns the exit code."""
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:  # raised inside an import, a KeyboardInterrupt may come out as any error, with a traceback
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    signal.signal(signal.SIGINT, before)
    try:
        run(get_args_parser().parse_args(arguments))
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode < 0:
            print(f"everbatch: rank {rank} was ended by signal {-first.exitcode}", file=sys.stderr, flush=True)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:  # before there are ranks
        code = 130
    sys.exit(code)
