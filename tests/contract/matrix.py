"""The jobs of a contract launch: STORE [--wide] [--round N] [--only TEXT]; see worker.py. Without a round, everything runs.

    torchrun --nproc-per-node 2 tests/worker.py tests/contract/matrix.py OUT.json STORE --only SAM

OUT.json: {"check/host/case": {"error", "tolerance", "passed", "problem"}}.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path

import engines
import lives
import torch.distributed as dist
from plans import plan
from record import Job, Record

from rotation import parse_round


def jobs(record: Record, *words: str) -> Iterator[Job]:
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("--wide", action="store_true", help="what the wide plan adds")
    parser.add_argument("--round", default="all", help="what is due in this round alone")
    parser.add_argument("--only", default="", help="run only what contains this text (for debugging)")
    args = parser.parse_args(words)
    due = plan(dist.get_world_size()).now(parse_round(args.round), wide=args.wide)
    found: list[Job] = []
    for host, case, base in due.lives:
        found.append((f"{host}/{case}-{base}", functools.partial(lives.live, record, host, case, base, args.store)))
    for source, host, case, base in due.moves:
        name = f"{source}/{host}/{case}-{base}"
        found.append((name, functools.partial(lives.move, record, source, host, case, base, args.store)))
    for host in due.hosts:
        found.append((f"engine/{host}", functools.partial(engines.examine, record, host)))
    yield from (job for job in found if args.only in job[0])
