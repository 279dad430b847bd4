"""One rank of a launch: runs the jobs named on the command line, writes what it found to OUT as JSON.

    torchrun --nproc-per-node 2 worker.py OUT.json STORE JOB [JOB ...]         a job is a function of jobs.py, name:argument

OUT.json: {"job/check": {"error", "tolerance", "passed", "problem"}}, written anew after each job. STORE is a folder in which
one launch leaves what a later one, of another size, goes on from.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent / "contract"))
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import jobs
from record import Record

from everbatch.distributed import init


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("jobs", nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # DeepSpeed tells its whole configuration for every engine
    init("cpu", timeout_s=60)
    record = Record()
    for name in args.jobs:
        begin = time.monotonic()
        job, _, argument = name.partition(":")
        getattr(jobs, job)(record, args.store, *([argument] if argument else []))
        if dist.get_rank() == 0:
            partial = args.out.with_suffix(".partial")
            partial.write_text(json.dumps(record.results, indent=1))
            os.replace(partial, args.out)
            print(f"{name} {time.monotonic() - begin:.1f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
