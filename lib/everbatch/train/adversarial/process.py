"""An adversary process beside each trainer process: weights and batches in shared memory, messages over a pipe.

It needs no place in a process group, so every engine will do. The shared memory has no name once both sides hold it, and the
pipe tells each side of the other's end, so a crash leaves neither memory nor processes behind.
"""

from __future__ import annotations

import atexit
import io
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from everbatch.errors import check
from everbatch.processes import follow_trainer
from everbatch.train.adversarial.attack import Attack
from everbatch.train.adversarial.placement import AdversaryLost, Crafted, Job, Placement, modes_of, set_modes
from everbatch.train.adversarial.wire import layout, room, views

__all__ = ["BesideProcess"]

MEMORY = Path("/dev/shm")
"""Where Linux keeps shared memory; 64 MB in a container by default."""


class BesideProcess(Placement):
    """Crafts in a process of its own, on `device`.

    Two copies of the weights alternate: version v is written while the adversary may still read v - 1, and only after it has
    finished with v - 2. `depth` batches at most are under way. Each answer names the version it was crafted with.

    Args:
        module: a copy of the bare model, on the CPU, as the trainer's was before an engine took it.
        live: the trainer's bare module, whose weights are sent.
        depth: batches that may be under way, tau + 1.
        patience_s: seconds without an answer until the adversary counts as lost; the first answer, before which the process
            starts, may take ten times as long.
        threads: of the adversary on a CPU.

    Cost per step: P bytes of weights and buffers copied, b * |x| of inputs, 8 b of labels, and what comes back: b * |x| bytes as
    int8 signs, or b * |x| in full. Memory: 2 P, depth batches; P once more in the adversary's own space on another device.
    """

    def __init__(self, attack: Attack, module: nn.Module, live: nn.Module, *, rank: int, depth: int, device: torch.device,
                 patience_s: float, threads: int) -> None:
        self.attack, self.module, self.live, self.rank, self.depth = attack, module, live, rank, depth
        self.device, self.patience_s, self.threads = device, patience_s, threads
        self._parts = list(live.modules())
        self._process: Any = None
        self._pipe: Any = None
        self._weights: list[dict[str, Tensor]] = []
        self._inputs: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._results: list[Tensor] = []
        self._bytes = [0, 0]
        """Of the weights, and of one batch with its answer."""
        self._versions: dict[int, int] = {}
        """Version by step of every batch under way."""
        self._done: dict[int, Crafted] = {}
        self._answered = False

    # ---------------------------------------------------------------------------------------------------- the trainer
    def submit(self, version: int, jobs: list[Job], weights: dict[str, Tensor]) -> None:
        if self._process is None:
            self._start(weights, jobs[0])
        # The slot held version - 2, or an older one; nobody may still read it.
        self._await(lambda: all(v > version - 2 for v in self._versions.values()))
        slot, modes = self._weights[version % 2], modes_of(self._parts)
        torch._foreach_copy_(list(slot.values()), [weights[n] for n in slot])
        for job in jobs:
            self._await(lambda: len(self._versions) < self.depth)
            at = job.step % self.depth
            check(job.tensor.shape == self._inputs[at].shape, "ConAdv", f"a batch of {tuple(job.tensor.shape)} after one of "
                  f"{tuple(self._inputs[at].shape)}", "be as large", "leave incomplete batches out")
            self._inputs[at].copy_(job.tensor)
            self._targets[at].copy_(job.targets)
            self._versions[job.step] = version
            if job.tensor.is_cuda:
                torch.cuda.current_stream().synchronize()  # the other process knows nothing of this one's stream
            self._send((job.step, version, at, modes))
            self.sent += self._bytes[1]
        self.sent += self._bytes[0]

    def collect(self, step: int) -> Crafted:
        self._await(lambda: step in self._done)
        return self._done.pop(step)

    def _start(self, weights: dict[str, Tensor], job: Job) -> None:
        def shared(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            made = torch.empty(shape, dtype=dtype, device=self.device)
            if made.is_cuda:
                return made
            room_left = shutil.disk_usage(MEMORY) if MEMORY.is_dir() else None
            if room_left is not None and room_left.total > 0:  # 0: without a limit
                # The kernel would kill the process with SIGBUS, and name nothing; may still, when several ranks ask at once.
                check(made.nbytes <= room_left.free, "ConAdv",
                      f"placement='process' with {room_left.free:,} bytes free in {MEMORY}",
                      f"find {made.nbytes:,} more there", "give a container more (docker run --shm-size)")
            return made.share_memory_()  # type: ignore[no-any-return, no-untyped-call]

        result = torch.int8 if self.attack.signs else job.tensor.dtype if self.attack.embedding is None else torch.float32
        shape = list(job.tensor.shape)
        if self.attack.embedding is not None:
            shape.append(int(self.module.get_submodule(self.attack.embedding).embedding_dim))  # type: ignore[arg-type]
        # One piece of memory for all weights: each shared tensor holds a file open in either process.
        told = layout(weights)
        flat = [shared([room(told)], torch.uint8) for _ in range(2)]
        self._weights = [views(f, told) for f in flat]
        self._inputs = [shared(job.tensor.shape, job.tensor.dtype) for _ in range(self.depth)]
        self._targets = [shared(job.targets.shape, job.targets.dtype) for _ in range(self.depth)]
        self._results = [shared(shape, result) for _ in range(self.depth)]
        self._bytes = [sum(t.nbytes for t in tensors) for tensors in (
            self._weights[0].values(), (self._inputs[0], self._targets[0], self._results[0]))]
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(name="everbatch adversary", daemon=True, target=_adversary, args=(
            theirs, self.attack, self._bones(), flat, told, self._inputs, self._targets, self._results, self.rank, self.threads))
        self._process.start()
        theirs.close()
        atexit.register(self.close)  # before multiprocessing's own, which waits for ever for one that was stopped

    def _bones(self) -> bytes:
        """The module without its weights, which the adversary takes from the shared memory."""
        named: list[Tensor] = [*self.module.parameters(), *self.module.buffers()]
        kept, file = [value.data for value in named], io.BytesIO()
        try:
            for value in named:
                value.data = value.data.new_empty(0)
            torch.save(self.module, file)
        finally:
            for value, data in zip(named, kept, strict=True):
                value.data = data
        return file.getvalue()

    def _send(self, message: tuple[int, int, int, bytes]) -> None:
        try:
            self._pipe.send(message)
        except (BrokenPipeError, OSError) as error:
            raise AdversaryLost(self._epitaph()) from error

    def _await(self, ready: Callable[[], bool]) -> None:
        """Take answers until `ready()`."""
        limit = time.monotonic() + self.patience_s * (1 if self._answered else 10)
        while not ready():
            if not self._pipe.poll(max(0.0, limit - time.monotonic())):
                raise AdversaryLost(f"no answer for {self.patience_s:g} s (process {self._process.pid})")
            try:
                answer = self._pipe.recv()
            except (EOFError, OSError) as error:
                raise AdversaryLost(self._epitaph()) from error
            if isinstance(answer, str):
                raise AdversaryLost(f"it failed:\n{answer}")
            self._answered = True
            step, version, at = answer
            wanted = self._versions.pop(step)
            if version != wanted:
                raise AdversaryLost(f"it crafted step {step} with the weights of step {version}, must be {wanted}")
            self._done[step] = Crafted(self._results[at].to(next(self.live.parameters()).device, copy=True), version)

    def _epitaph(self) -> str:
        self._process.join(1.0)
        return f"process {self._process.pid} ended with exit code {self._process.exitcode}"

    def close(self) -> None:
        if self._process is None:
            return
        atexit.unregister(self.close)
        self._pipe.close()  # the adversary reads the end of the pipe, and ends
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()
        self._process = None
        self._weights, self._inputs, self._targets, self._results, self._answered = [], [], [], [], False
        self._versions.clear()
        self._done.clear()


# ---------------------------------------------------------------------------------------------------------- the adversary
def _adversary(pipe: Any, attack: Attack, bones: bytes, flat: list[Tensor], told: list[list[Any]], inputs: list[Tensor],
               targets: list[Tensor], results: list[Tensor], rank: int, threads: int) -> None:
    """The process: craft what is ordered until the trainer's end of the pipe closes, however that comes about."""
    import signal

    follow_trainer()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    if results[0].is_cuda:
        torch.cuda.set_device(results[0].device)  # whose stream is waited for below
    try:
        module = torch.load(io.BytesIO(bones), weights_only=False)
        parts = list(module.modules())
        # Once: a walk takes longer than copying a small net.
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        weights = [[(value, copy[name]) for name, value in named.items()] for copy in (views(f, told) for f in flat)]
        while True:
            step, version, at, modes = pipe.recv()
            set_modes(parts, modes)
            for value, current in weights[version % 2]:
                value.data = current
            results[at].copy_(attack.run(module, inputs[at], targets[at], step=step, rank=rank))
            if results[at].is_cuda:
                torch.cuda.current_stream().synchronize()
            pipe.send((step, version, at))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except BaseException:
        pipe.send(traceback.format_exc())
