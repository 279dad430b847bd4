"""One rank of a test's launch: does the jobs of a module one after the other, and writes what it found.

    torchrun --nproc-per-node 2 tests/worker.py JOBS.py OUT.json [ARGUMENT ...]

JOBS.py has a function `jobs(record, *arguments)`: pairs of a name and an action, which puts what it finds into the record.
OUT.json is what the record holds, written anew after each job, so that a launch that dies still tells how far it came.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "contract"), str(HERE)]


def load(path: Path) -> ModuleType:
    """The module of the jobs, with what lies beside it at hand."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    path, out, arguments = Path(sys.argv[1]).resolve(), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # DeepSpeed tells its whole configuration for every engine
    module = load(path)  # before the group: DeepSpeed wants to be imported first

    import torch.distributed as dist
    from record import Record

    from everbatch.distributed import init

    gc.freeze()  # DeepSpeed collects garbage several times per engine; what is here already need not be walked each time
    rank, record = init(os.environ.get("EVERBATCH_DEVICE", "cpu"), timeout_s=60).rank, Record()
    for name, job in module.jobs(record, *arguments):
        begin, used = time.monotonic(), time.process_time()
        job()
        gc.freeze()
        if rank == 0:
            partial = out.with_suffix(".partial")
            partial.write_text(json.dumps(record.results, indent=1))
            os.replace(partial, out)
            print(f"{name} {time.monotonic() - begin:.2f} s, {time.process_time() - used:.2f} s of a processor", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
