"""How a run ends on an error: with one line from one rank, and an exit code that says why."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from everbatch.errors import CheckpointMismatch, CompositionError, UnsupportedHost
from everbatch.processes import end

__all__ = ["EXPECTED", "guard", "interrupted", "tell"]

EXPECTED = (ValueError, CompositionError, UnsupportedHost, CheckpointMismatch, RuntimeError, ImportError, OSError)
"""What a user can mend: told in one line. Anything else is ours to mend, and told with its traceback."""
PIPE_CLOSED = 128 + 13
"""What a shell gives for a program whose reader has gone."""


@contextmanager
def guard(prog: str) -> Iterator[None]:
    """End the process with one line and exit code 1 on an error that a user can mend, whatever other ranks wait for.

    Where all ranks fail alike, rank 0 speaks; a rank that fails on its own speaks itself; ranks that fail only because
    another ended speak if that one could not. Until training begins, and after it, a Ctrl-C ends with one line and exit code
    130. Standard output whose reader has gone (`| head`) ends the process without a word. EVERBATCH_TRACEBACK=1 shows where.
    """
    before = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else signal.SIG_IGN
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: interrupted(prog))
    try:
        yield
        sys.stdout.flush()
    except EXPECTED as error:
        if os.environ.get("EVERBATCH_TRACEBACK") == "1":
            raise
        if isinstance(error, BrokenPipeError) and _reader_gone():
            _told("standard output was closed", lost=False)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            end(PIPE_CLOSED)
        lost = _lost(error)
        text = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        if lost:
            text = "another rank ended without a word (killed, or out of memory?); resume=true goes on from the newest checkpoint"
        tell(prog, "; ".join(line.strip() for line in text.splitlines() if line.strip()), lost=lost)
        end(1)
    except SystemExit as stop:
        if not stop.code and not isinstance(stop, KeyboardInterrupt) and not _all_leave():
            tell(prog, "this rank was asked for --help or --print-config and others were not, must be the same on every rank")
            end(2)
        raise
    except KeyboardInterrupt:
        interrupted(prog)
    except Exception as error:
        if os.environ.get("EVERBATCH_TRACEBACK") != "1" and _elsewhere(error):
            # AssertionError, KeyError, AttributeError ...: what other libraries say of a value that they cannot use.
            lines = str(error).strip().splitlines() or ["without a word"]
            tell(prog, f"{type(error).__name__}: {lines[0]} (in {_place(error)}; EVERBATCH_TRACEBACK=1 shows how it came there)")
            end(1)
        _told(f"{type(error).__name__}: {error}", lost=False)
        traceback.print_exc()
        end(1)
    finally:
        if before != signal.SIG_IGN:
            signal.signal(signal.SIGINT, before)


def _place(error: BaseException) -> str:
    """File and line where an error was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}"


def _elsewhere(error: BaseException) -> bool:
    """Whether an error was raised by another library, not by this one or by the script that uses it."""
    parts = Path(_place(error)).parts
    return not Path(_place(error)).is_relative_to(Path(__file__).parent) and bool({"site-packages", "dist-packages"} & set(parts))


def interrupted(prog: str) -> NoReturn:
    """End on a Ctrl-C that no trainer takes."""
    if int(os.environ.get("RANK", "0")) == 0:
        os.write(2, f"{prog}: stopped by Ctrl-C outside of training, nothing was written; resume=true goes on from the newest "
                    "checkpoint, if there is one\n".encode())
    end(130)


def tell(prog: str, text: str, *, lost: bool = False, name_first: bool = True) -> None:
    """Print one line of an error on stderr, unless another rank has told the same, or (`lost`) the error behind it."""
    rank = int(os.environ.get("RANK", "0"))
    if _told(text, lost=lost):
        print(f"{prog}: rank {rank}: {text}" if rank or name_first else f"{prog}: {text}", file=sys.stderr, flush=True)


def _lost(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _told(text: str, *, lost: bool) -> bool:
    """Whether this rank is the one to tell its error; the launcher's store remembers what others told."""
    rank = int(os.environ.get("RANK", "0"))
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return rank == 0 and os.environ.get("LOCAL_RANK", "0") == "0"
    from everbatch.distributed import attempt_store

    try:
        store, _, _ = attempt_store(10.0)
        for _ in range(0 if lost or rank == 0 else 10):  # rank 0 may be about to say the same
            if store.check(["everbatch/error"]):
                break
            time.sleep(0.1)
        told = store.compare_set("everbatch/error", "", text).decode()
        return store.add(f"everbatch/error/{text}", 1) == 1 and (told == text or not lost)
    except (RuntimeError, ValueError):  # the store's owner is gone already: better twice than never
        return True


def _all_leave(limit_s: float = 10.0) -> bool:
    """Whether every rank of the launch leaves before they join, as this one does."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return True
    import torch.distributed as dist

    from everbatch.distributed import attempt_store

    if dist.is_initialized():
        return True
    try:
        store, _, _ = attempt_store(limit_s)
        found, begun = store.add("everbatch/left", 1), time.monotonic()
        while found < size and time.monotonic() - begun < limit_s:
            time.sleep(0.05)
            found = store.add("everbatch/left", 0)
    except RuntimeError:  # another rank holds the store, and has left already or has not come
        return True
    return found >= size


def _reader_gone() -> bool:
    """Whether nobody reads standard output any more."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
