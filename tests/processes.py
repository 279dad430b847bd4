"""Start real jobs of several processes for tests, with a wall-clock limit on each.

`torchrun` is the real launcher. `Zygote` does what the launcher does (environment, store, ending the others when a rank
fails) for processes forked from one that has imported everything, so that a case costs no imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "tests" / "worker.py"
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "lib")}
# DeepSpeed takes it for the number of devices here. Without it, it asks `numactl` in every backward of ZeRO-3.
FORKED = {**ENVIRONMENT, "LOCAL_SIZE": "1"}
IMPORTED = ("deepspeed", "matplotlib.figure", "sklearn.datasets", "timm", "torch.utils.tensorboard", "pytest", "everbatch.train",
            "everbatch.composition", "everbatch.engines.zero", "everbatch.experiment.main", "jsonargparse")
"""What ranks import, here once."""
FIRST_ENGINE = ("runtime.zero.muon.muon_optimizer", "module_inject.auto_ep_layer", "moe.ep_repack", "moe.ep_router",
                "runtime.superoffload.superoffload_stage3")
"""What DeepSpeed imports with a first engine; the first of them brings all of torch's compiler, a second or two of each rank."""



@dataclass
class Job:
    """How a job of several ranks ended."""

    codes: list[int]
    """Exit code of each rank, negative for a signal; of the launcher, for `torchrun`."""
    out: str
    err: str
    seconds: float
    killed: list[int] = field(default_factory=list)
    """Ranks that had to be ended because another had failed."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(ranks: int, script: Path, *arguments: str, limit: float, restarts: int = 0) -> Job:
    """Run a script under torch.distributed.run; everything it started is killed at the limit."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts),
               "--master-addr", "127.0.0.1", "--master-port", str(free_port()), str(script), *arguments]
    begin = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        out, err = end_launch(process)
        raise AssertionError(f"{script.name} hung for {limit} s:\n{out[-3000:]}\n{err[-3000:]}") from None
    return Job([process.returncode], out, err, time.monotonic() - begin)


def end_launch(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a launcher that ran too long, and give what it printed. Asked first, since only the launcher knows its ranks, each a
    session of its own: killed at once, it would leave them running, with its output held open."""
    process.terminate()
    try:
        return process.communicate(timeout=60)  # ranks that ignore the signal are killed after 30
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()


class Zygote:
    """A process that has imported everything, and forks the ranks of jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env={**os.environ, **FORKED}, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def start(self, script: Path, *arguments: str, ranks: int = 2, limit: float = 60.0,
              rank_arguments: dict[int, Sequence[str]] | None = None, restarts: int | None = None) -> Path:
        """Begin a job; returns the folder in which its pids and outputs appear. One job at a time. With `restarts`: see
        `torchrun`; the job is one process then, the agent."""
        self.count += 1
        folder = self.folder / f"job-{self.count}"
        folder.mkdir(parents=True)
        extra = {str(rank): list(words) for rank, words in (rank_arguments or {}).items()}
        order = {"script": str(script), "arguments": arguments, "ranks": ranks, "limit": limit, "folder": str(folder),
                 "restarts": restarts, "rank_arguments": extra}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return folder

    def finish(self, folder: Path) -> Job:
        """Wait for the job that was started last."""
        assert self.process.stdout is not None
        answer = json.loads(self.process.stdout.readline())
        ranks = range(len(answer["codes"]))
        out, err = ("".join((folder / f"{rank}.{kind}").read_text() for rank in ranks) for kind in ("out", "err"))
        job = Job(answer["codes"], out, err, answer["seconds"], answer["killed"])
        assert not answer["hung"], f"hung: {job}"
        return job

    def torchrun(self, ranks: int, script: Path, *arguments: str, limit: float, restarts: int = 0) -> Job:
        """What `torchrun` does, by the agent that it is made of; but ranks, those that it starts again among them, are forks of
        this process instead of new interpreters, which saves each its imports."""
        return self.run(script, *arguments, ranks=ranks, limit=limit, restarts=restarts)

    def run(self, script: Path, *arguments: str, **options: Any) -> Job:
        return self.finish(self.start(script, *arguments, **options))

    def found(self, jobs: Path, out: Path, *arguments: str, **options: Any) -> dict[str, Any]:
        """What the jobs of a module found (`worker.py`), on ranks that all ended well."""
        job = self.run(WORKER, str(jobs), str(out), *arguments, **options)
        assert not any(job.codes), f"{job.codes}: {job.err[-5000:]}"
        results: dict[str, Any] = json.loads(out.read_text())
        return results

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait(timeout=30)
        self.process.stdout.close()  # type: ignore[union-attr]


def _rank(script: str, arguments: Sequence[str]) -> None:
    """A rank's main program."""
    import runpy

    import torch

    sys.argv = [script, *arguments]
    torch.set_num_threads(1)
    runpy.run_path(script, run_name="__main__")


def _serve() -> None:
    """The zygote's own loop: one order per line of stdin, one answer per line of stdout."""
    import gc
    import importlib

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print on the way is not an answer
    import torch
    import torch.distributed as dist
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in IMPORTED:
        importlib.import_module(name)
    for name in FIRST_ENGINE:
        with contextlib.suppress(ModuleNotFoundError):  # another version of DeepSpeed has it elsewhere: the rank imports it
            importlib.import_module(f"deepspeed.{name}")
    from deepspeed import ops

    from everbatch import methods

    for key in methods.TABLE:  # packages import a method when it is used: here once, not in every rank
        methods.load(key)

    # The operator of `inference_all_reduce`, which nothing here calls, and which takes compilers a minute on a new machine.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_printoptions(threshold=0, edgeitems=1)  # ZeRO-3 formats every parameter, for a message that it does not print
    gc.collect()
    gc.freeze()  # what a rank's collector would walk each time, and so copy from this process page by page
    answers.write("ready\n")

    def rank_of(order: dict[str, Any], rank: int, port: int) -> None:
        """What a launcher tells a rank, and its program."""
        size = str(order["ranks"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size,
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
                          TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_RUN_ID="none")
        _rank(order["script"], [*order["arguments"], *order["rank_arguments"].get(str(rank), [])])

    def agent(order: dict[str, Any]) -> None:
        """The agent of torchrun, as its own main program sets it up."""
        os.setsid()  # it ends with its ranks
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=order["ranks"], run_id="none", rdzv_backend="static",
            rdzv_endpoint=f"127.0.0.1:{free_port()}", rdzv_configs={"rank": 0, "timeout": 900}, max_restarts=order["restarts"],
            start_method="fork")
        elastic_launch(config, _rank)(order["script"], order["arguments"])

    def begin(order: dict[str, Any], number: int, action: Callable[..., None], *arguments: Any) -> int:
        """A process whose output goes to files of this number."""
        pid = os.fork()
        if pid:
            return pid
        for kind, handle in (("out", 1), ("err", 2)):
            os.dup2(os.open(f"{order['folder']}/{number}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), handle)
        code = 0
        try:
            action(order, *arguments)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def serve_store() -> tuple[int, int]:
        """A process with the store in it, as the launcher's agent has: it outlives the ranks."""
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(theirs, str(store.port).encode())
            while True:
                signal.pause()
        port = int(os.read(ours, 20))
        os.close(ours)
        os.close(theirs)
        return pid, port

    for line in sys.stdin:
        order = json.loads(line)
        store, port = serve_store()
        start = time.monotonic()
        alone = order["restarts"] is not None
        if alone:
            pids = {begin(order, 0, agent): 0}
        else:
            pids = {begin(order, rank, rank_of, rank, port): rank for rank in range(order["ranks"])}
        (Path(order["folder"]) / "pids").write_text(" ".join(map(str, pids)))
        codes, ended, hung, failed = [0] * len(pids), [], False, 0.0
        while pids:
            for pid in list(pids):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    rank = pids.pop(pid)
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    failed = failed or (time.monotonic() if codes[rank] else 0.0)
            now = time.monotonic()
            if failed and now - failed > 3.0 and not ended:  # later than the launcher does: ranks shall notice by themselves
                ended = sorted(pids.values())
                for pid in pids:
                    os.kill(pid, signal.SIGTERM)
            if now - start > order["limit"] or (ended and now - failed > 13.0):
                hung = hung or bool(pids)
                for pid in pids:
                    (os.killpg if alone else os.kill)(pid, signal.SIGKILL)
            time.sleep(0.02)
        seconds = time.monotonic() - start
        os.kill(store, signal.SIGKILL)
        os.waitpid(store, 0)
        answers.write(json.dumps({"codes": codes, "seconds": seconds, "killed": ended, "hung": hung}) + "\n")


if __name__ == "__main__":
    _serve()
