"""The process group as the rest of the package sees it; the only place outside the hosts that talks to it."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from everbatch.errors import check
from everbatch.processes import end_with_parent

__all__ = ["World", "attempt_store", "enlist", "init", "leave"]


@dataclass(frozen=True)
class World:
    """This process's place among the data-parallel ranks. Methods are collectives: call them on every rank."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """The default process group, or one rank when there is none."""
        if dist.is_available() and dist.is_initialized():
            _settle_at_exit()
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def sum(self, value: Tensor) -> Tensor:
        """Sum `value` over ranks, in place; returns it."""
        if self.size > 1:
            dist.all_reduce(value, group=_group_of(value))
        return value

    def all(self, flag: bool, device: torch.device | str = "cpu") -> bool:
        """Whether `flag` holds on every rank."""
        if self.size == 1:
            return flag
        bad = torch.tensor(0.0 if flag else 1.0, device=device)
        dist.all_reduce(bad, group=_group_of(bad))
        return bad.item() == 0.0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: object) -> list[object]:
        """`value` of every rank, in rank order (small picklable metadata only; slow)."""
        if self.size == 1:
            return [value]
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def require_same(self, what: str, value: str) -> None:
        """Raise `ValueError` on every rank unless all ranks hold the same `value`; names the ranks that differ."""
        values = self.gather(value)
        odd = [rank for rank, other in enumerate(values) if other != values[0]]
        first = values[odd[0]] if odd else ""
        check(not odd, what, f"rank 0 has {values[0]!r}, ranks {odd} have {first!r}", "be the same on every rank",
              "start every rank with the same arguments, data and environment")

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send `send[r]` leading rows, in order, to each rank r; get `receive[r]` rows from each, stacked by rank.

        Both sides know the counts beforehand, so one all-to-all does it. Shapes: (sum(send), ...) to (sum(receive), ...).
        """
        if self.size == 1:
            return rows
        result = rows.new_empty((sum(receive), *rows.shape[1:]))
        flat_in, flat_out = rows.contiguous().flatten(1), result.flatten(1)
        dist.all_to_all_single(flat_out, flat_in, list(receive), list(send), group=_group_of(rows))
        return result

    def exchange_meanwhile(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int],
    ) -> Callable[[], Tensor]:
        """`exchange` of CPU rows that goes on while the caller works; what is returned waits for it.

        It has a process group of its own, made at the first call, so that it neither waits for the
        collectives of the step nor holds them up. Not for `rows` that change meanwhile.
        """
        if self.size == 1:
            return lambda: rows
        result = rows.new_empty((sum(receive), *rows.shape[1:]))
        leaving = rows.contiguous().flatten(1)
        work = dist.all_to_all_single(
            result.flatten(1), leaving, list(receive), list(send), group=_aside(), async_op=True)
        assert work is not None

        def arrived() -> Tensor:
            work.wait()
            return result

        return arrived


def _group_of(value: Tensor) -> dist.ProcessGroup | None:
    """None for the default group; another beside it for CPU tensors where that one, of somebody else, is NCCL's alone."""
    if value.device.type == "cpu" and _serves_no_cpu():
        return _aside()
    return None


def _serves_no_cpu() -> bool:
    """Whether the default group takes no tensors of the CPU."""
    whole = dist.group.WORLD
    return whole is not None and all(device.type != "cpu" for device in whole._device_types)


_beside: list[dist.ProcessGroup] = []


def _aside() -> dist.ProcessGroup:
    """A group of all ranks beside the default one. A collective, once for each default group."""
    try:
        dist.get_process_group_ranks(_beside[0])
    except (IndexError, KeyError):  # none yet, or of a default group that was left
        made = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=_patience_s[0]))
        assert isinstance(made, dist.ProcessGroup)  # of all ranks, this one too
        _beside[:] = [made]
    return _beside[0]


_patience_s = [600.0]
"""Of the last `init`."""


def attempt_store(timeout_s: float = 600.0) -> tuple[Store, int, int]:
    """A connection to the store of this launch, and this process's rank and number of ranks in torchrun's world."""
    store, rank, size = _launch_store(timeout_s)
    # torchrun's static rendezvous keeps one store over restarts, with the addresses of the dead ranks in it.
    return PrefixStore(f"attempt-{_attempt()}", store), rank, size


def _launch_store(timeout_s: float) -> tuple[Store, int, int]:
    names = ("TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    launch = tuple(os.environ.get(name, "") for name in names)
    if launch not in _stores:
        _stores[launch] = next(rendezvous("env://", timeout=datetime.timedelta(seconds=timeout_s)))
    return _stores[launch]


def _attempt() -> str:
    """How often the launcher has started this rank again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def enlist(trainers: int, timeout_s: float = 600.0, *, wait: bool = True) -> None:
    """Tell the other ranks of the launch which attempt this is and how many ranks train; wait until all that train say the same.

    Raises:
        ValueError: another rank says something else. A rank that was started again less often than another waits for what
            will never come; one that was started more often waits for one that may be late.
    """
    store, rank, size = _launch_store(timeout_s)
    attempt, plan = _attempt(), f"{trainers} of {size} ranks train"
    store.set(f"everbatch/rank/{rank}", f"{attempt};{plan}")
    place, begun, pause = f"everbatch/joined/{attempt}/{trainers}", time.monotonic(), 0.01
    found = store.add(place, 1)
    while wait and found < trainers and time.monotonic() - begun < timeout_s:
        time.sleep(pause)
        pause = min(0.5, 1.5 * pause)
        for other in range(size) if time.monotonic() - begun > 1 else ():
            if store.check([f"everbatch/rank/{other}"]):
                count, _, theirs = store.get(f"everbatch/rank/{other}").decode().partition(";")
                check(int(count) <= int(attempt), "init",
                      f"rank {rank} was started again {attempt} times and rank {other} {count} times",
                      "be the same on every rank (TORCHELASTIC_RESTART_COUNT)", "start all ranks anew together")
                check(count != attempt or theirs == plan, "init", f"{plan} on rank {rank} and {theirs} on rank {other}",
                      "be the same on every rank", "start every rank with the same arguments")
        found = store.add(place, 0)


_stores: dict[tuple[str, ...], tuple[Store, int, int]] = {}
_groups = itertools.count()


def init(device: str | None = None, timeout_s: float = 600.0, *, spare: int = 0, lone: bool = False) -> World:
    """Join the process group that `torchrun` describes in the environment, once; one rank without it.

    When torchrun itself is killed, its ranks get SIGTERM: a trainer writes a checkpoint then, any other script ends.

    Args:
        device: "cuda" or "cpu"; by default CUDA where there is one. Decides the backend: nccl with gloo for CPU tensors, or gloo.
        timeout_s: seconds until a collective that some rank never joined raises instead of hanging.
        spare: ranks of torchrun's world, the last ones, that stay outside of the group.
        lone: without torchrun, make a group of this process alone: DeepSpeed wants one, and would look for MPI.
    """
    _patience_s[0] = timeout_s
    if lone and "WORLD_SIZE" not in os.environ and not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
        cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=0, world_size=1,
                                store=dist.HashStore())  # type: ignore[attr-defined]
        _leave_at_exit()
    if "TORCHELASTIC_RUN_ID" in os.environ and threading.current_thread() is threading.main_thread():
        end_with_parent(signal.SIGTERM)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        store, rank, size = attempt_store(timeout_s)
        enlist(size - spare, timeout_s)
        store = PrefixStore(f"group-{next(_groups)}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size - spare,
                                timeout=datetime.timedelta(seconds=timeout_s))
        _leave_at_exit()
    return World.current()


def leave() -> None:
    """Leave the process group, if there is one; `init` may make another. NCCL warns of groups that are open at the end."""
    if not dist.is_available() or not dist.is_initialized():
        return
    theirs = sys.modules.get("deepspeed.comm.comm")
    if theirs is not None and theirs.is_initialized():
        theirs.destroy_process_group()  # torch's, and what DeepSpeed keeps of it
    else:
        dist.destroy_process_group()


@functools.cache
def _leave_at_exit() -> None:
    """Leave whatever group there is at the end, and let its threads settle after that."""
    _settle_at_exit()  # runs after what is registered later
    atexit.register(leave)


@functools.cache
def _settle_at_exit() -> None:
    """Let gloo's threads come to rest before Python is torn down, also those of a group that somebody else made.

    One that lets go of a tensor asks for the GIL; during finalisation that takes the process down ("terminate called without an
    active exception", pytorch issue 190489), after all work is done and on one rank in hundreds. Leaving the group does not end
    the threads while anything, such as a DDP model, holds it."""
    atexit.register(_settle)


def _settle(thread: str = "pt_gloo_runloop", limit_s: float = 1.0) -> None:
    """Wait until no thread of this name is running or about to; without Linux's /proc, two milliseconds."""
    end, calm = time.monotonic() + limit_s, 0
    while calm < 2 and time.monotonic() < end:
        time.sleep(0.001)  # without the GIL: whoever waits for it has it now
        calm = calm + 1 if "R" not in _states(thread) else 0


def _states(thread: str) -> set[str]:
    """The scheduler's letters for this process's threads of a name: R while running or runnable, S asleep."""
    found: set[str] = set()
    for stat in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            _, _, rest = stat.read_text(errors="replace").partition(f"({thread}) ")
            found.update(rest[:1])
    return found
