"""The folder of a run: one owner at a time, whatever an earlier run left moved away whole, tried for writing before training.

    .owner          locked by rank 0 while the run lives; holds host, pid and start. Never deleted, emptied at the end
    previous/N      everything of an earlier run, N from 1
    previous/.N     the same while it is being moved; whoever comes next finishes the move

The lock is the kernel's and ends with its process, also by `kill -9`. Where the file system has none, and for an
owner on another host, the record decides: on this host the process it names must be gone; on another the file's time
must stand still for `WATCH_S` seconds, since its owner touches it every `BEAT_S`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from everbatch.distributed import World
from everbatch.errors import check

__all__ = ["FILES", "FOLDERS", "PARTS", "claimed", "set_aside", "try_writing", "whoever_holds"]

OWNER = ".owner"
FOLDERS = ("checkpoints", "figures", "tensorboard", "seeds")
FILES = ("config.yaml", "model.safetensors", "result.json", "scalars.jsonl")
PARTS = (*FOLDERS, *FILES)
"""What a run leaves in its folder. Anything else there is the user's, and stays."""
BEAT_S, WATCH_S = 5.0, 30.0
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
SEEN_WITHIN_S = 10.0
"""A network file system may show a new file to other nodes late."""


@contextmanager
def claimed(folder: str | os.PathLike[str], world: World, *, shared: bool = True) -> Iterator[None]:
    """Own a folder inside the block; it is made when missing. Collective.

    Nothing happens where this process owns it, or the folder that it is in, already.

    Args:
        folder: of a run.
        world: rank 0 holds the lock.
        shared: check that every rank sees what rank 0 wrote: that all name the same folder, on a disk that they share.

    Raises:
        ValueError: on every rank: another run owns it (its host, pid and start), it cannot be written, or a rank does not see it.

    Cost: two gathers; while it is owned, a file's time is set every `BEAT_S` seconds.
    """
    path = Path(folder)
    claim: Claim | None = None

    def take() -> tuple[bool, str]:
        nonlocal claim
        if world.rank:
            return False, ""
        if Claim.covers(path):
            return True, ""
        claim = Claim(path)
        return False, claim.token

    try:
        covered, token = together(world, path, take)[0]
        if shared and world.size > 1 and not covered:
            together(world, path, lambda: None if world.rank == 0 else _see(path, token))
        yield
    finally:
        if claim is not None:
            claim.release()


class Claim:
    """The lock on a folder and the record in it.

    Raises:
        ValueError: another run owns the folder.
        OSError: it cannot be written.
    """

    held: ClassVar[dict[tuple[int, int], Claim]] = {}
    """By device and inode of the folder, in this process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.token = folder, secrets.token_hex(8)
        self.file = os.open(folder / OWNER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            locked, theirs = _lock(self.file), _read(folder)
            if theirs is not None and (locked is False or _lives(folder, theirs, locked)):
                check(False, "output", f"folder {str(folder)!r} of a run that is under way (host {theirs.get('host')}, process "
                      f"{theirs.get('pid')}, since {theirs.get('start')})", "belong to one run at a time",
                      "give this one another folder, or end that one")
            check(locked is not False, "output", f"folder {str(folder)!r} of a run that is just beginning or ending",
                  "belong to one run at a time", "give this one another folder, or try again")
            self._write({"host": socket.gethostname(), "pid": os.getpid(), "ticks": _ticks(os.getpid()), "token": self.token,
                         "start": time.strftime("%Y-%m-%d %H:%M:%S %z")})
        except BaseException:
            os.close(self.file)
            raise
        self.key = _key(folder)
        Claim.held[self.key] = self
        self._done = threading.Event()
        self._beat = threading.Thread(target=self._beats, daemon=True, name="everbatch owner")
        self._beat.start()

    @classmethod
    def forked(cls) -> None:
        """In a forked child, such as one that loads data: it must not hold the folder longer than the run."""
        for claim in cls.held.values():
            os.close(claim.file)
        cls.held.clear()

    @classmethod
    def covers(cls, folder: Path) -> bool:
        """Whether this process owns the folder or the one that it is in."""
        return any(_key(path) in cls.held for path in (folder, folder.absolute().parent))

    def release(self) -> None:
        """Give the folder up."""
        self._done.set()
        self._beat.join()
        del Claim.held[self.key]
        with contextlib.suppress(OSError):  # a disk that is gone or full by now; the lock ends all the same
            os.ftruncate(self.file, 0)
        os.close(self.file)

    def _write(self, record: dict[str, Any]) -> None:
        text = json.dumps(record).encode()
        os.pwrite(self.file, text, 0)
        os.ftruncate(self.file, len(text))
        os.fsync(self.file)

    def _beats(self) -> None:
        while not self._done.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a server that is away for a moment
                os.utime(self.file)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=Claim.forked)


def set_aside(folder: Path, names: Sequence[str] = PARTS) -> Path | None:
    """Move what an earlier run left in a folder that this process owns to previous/N; returns that, None if there was nothing.

    A kill leaves either nothing moved or previous/.N, and then the next call finishes that move: until it has, no new run writes.
    """
    previous = folder / "previous"
    begun = sorted(previous.glob(".[0-9]*")) if previous.is_dir() else []
    found = [folder / name for name in names if os.path.lexists(folder / name)]
    if not found and not begun:
        return None
    previous.mkdir(exist_ok=True)
    taken = [int(path.name) for path in previous.iterdir() if path.name.isdecimal()]
    number = int(begun[0].name[1:]) if begun else 1 + max(taken, default=0)
    moving = previous / f".{number}"
    moving.mkdir(exist_ok=True)
    for path in found:
        path.rename(moving / path.name)
    moving.rename(previous / str(number))
    return previous / str(number)


def half_moved(folder: Path) -> bool:
    """Whether a kill struck in the middle of `set_aside`."""
    return any((folder / "previous").glob(".[0-9]*"))


def try_writing(folder: Path, world: World, *, checkpoints: bool = True) -> None:
    """Write what a run will write, before it trains: every rank to `checkpoints`, rank 0 to the rest. Collective.

    Raises:
        ValueError: on every rank, naming the path and what is wrong with it.
    """
    def first() -> None:
        for name in FOLDERS if world.rank == 0 else ():
            made = not os.path.lexists(folder / name)
            _try(folder / name, world.rank)
            if made and not (checkpoints and name == "checkpoints"):
                (folder / name).rmdir()
        for name in FILES if world.rank == 0 else ():
            check(not (folder / name).is_dir(), "output", f"{str(folder / name)!r} is a folder", "be a file or not there")
            if (folder / name).exists():  # results are renamed into place: the folder decides
                check(os.access(folder / name, os.W_OK), "output", f"{str(folder / name)!r} cannot be written", "be writable")
        if world.rank == 0:
            _try(folder, world.rank)

    together(world, folder, first)
    if checkpoints:
        together(world, folder, lambda: _try(folder / "checkpoints", world.rank))


@contextmanager
def whoever_holds(file: Path) -> Iterator[Iterator[bool]]:
    """Turns at a piece of work that several processes may begin, by a lock on `file`, which is made and stays.

    Gives an iterator: False about every second while another process has the lock, then True. Where the file system has no
    locks it is True at once. The lock is let go of at the end of the block, or with the process.
    """
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def turns() -> Iterator[bool]:
        while _lock(handle) is False:
            yield False
            time.sleep(1.0)
        yield True

    try:
        yield turns()
    finally:
        os.close(handle)


def together(world: World, folder: Path, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank and gather the results; raise `ValueError` on all ranks if it failed on any."""
    result, problem = None, None
    try:
        result = action()
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        path = error.filename or folder
        problem = f"output: {str(path)!r}: {error.strerror or error}, must be a folder that can be written; give another"
    outcomes: list[Any] = world.gather((result, problem))
    failed = [(rank, text) for rank, (_, text) in enumerate(outcomes) if text is not None]
    if failed:
        rank, text = failed[0]
        raise ValueError(text if rank == 0 else f"{text} (rank {rank})")
    return [outcome[0] for outcome in outcomes]


def _try(folder: Path, rank: int) -> None:
    check(folder.is_dir() or not os.path.lexists(folder), "output", f"{str(folder)!r} is a file", "be a folder or not there")
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".try-{rank}-{os.getpid()}"
    probe.write_bytes(b"everbatch")
    probe.unlink()


def _see(folder: Path, token: str) -> None:
    """Whether this rank finds the record of rank 0."""
    end = time.monotonic() + SEEN_WITHIN_S
    while (_read(folder) or {}).get("token") != token:
        check(time.monotonic() < end, "output", f"rank 0 writes to {str(folder)!r} and this rank does not find it there",
              "be one folder on a disk that all ranks share", "give every rank the same path on a shared file system")
        time.sleep(0.2)


def _lock(file: int) -> bool | None:
    """True: locked; False: another process has it; None: this file system has no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not lockf, which ends when anybody here closes the file
        return True
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / OWNER).read_bytes())
    except (OSError, ValueError):  # none, or one that is being written
        return None
    return record if isinstance(record, dict) else None


def _lives(folder: Path, record: dict[str, Any], locked: bool | None) -> bool:
    """Whether the owner that a record names is still there, where the lock alone does not say so."""
    if record.get("host") == socket.gethostname():
        # Locks of one host see each other; without them the process must be the same one, not another of its number.
        return locked is None and record.get("ticks") is not None and _ticks(record.get("pid")) == record["ticks"]
    print(f"everbatch: {folder} was last owned by process {record.get('pid')} on {record.get('host')}; looking for {WATCH_S:g} s "
          "whether it lives", file=sys.stderr, flush=True)
    before, end = _beat_of(folder), time.monotonic() + WATCH_S
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCH_S / 10))
        if _beat_of(folder) != before:
            return True
    return False


def _beat_of(folder: Path) -> int:
    file = os.open(folder, os.O_RDONLY)  # opening makes a network file system ask its server
    try:
        return (folder / OWNER).stat().st_mtime_ns
    finally:
        os.close(file)


def _ticks(pid: Any) -> str | None:
    """When a process of this host began, in the kernel's ticks; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _key(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError:
        return (-1, -1)
    return status.st_dev, status.st_ino

