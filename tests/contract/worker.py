"""One process of a contract launch: runs a plan and writes what it found.

    torchrun --nproc-per-node 2 worker.py OUT.json STORE [--wide] [--round N]

Without a round, everything runs.

OUT.json: {"check/host/case": {"error", "tolerance", "passed", "problem"}}, written anew after each case, so that a launch
that dies still tells how far it came.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import logging
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import engines
import lives
from plans import plan
from record import Record

from rotation import parse_round


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--wide", action="store_true", help="what the wide plan adds")
    parser.add_argument("--round", default="all", help="what is due in this round alone")
    parser.add_argument("--only", default="", help="run only what contains this text (for debugging)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # DeepSpeed tells its whole configuration for every engine
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    record, rank = Record(), dist.get_rank()
    todo = plan(dist.get_world_size()).now(parse_round(args.round), wide=args.wide)
    jobs = [(f"{h}/{c}-{b}", lambda h=h, c=c, b=b: lives.live(record, h, c, b, args.store)) for h, c, b in todo.lives]
    jobs += [(f"{s}/{h}/{c}-{b}", lambda s=s, h=h, c=c, b=b: lives.move(record, s, h, c, b, args.store))
             for s, h, c, b in todo.moves]
    jobs += [(f"engine/{h}", lambda h=h: engines.examine(record, h)) for h in todo.hosts]
    for name, job in jobs:
        if args.only not in name:
            continue
        start = time.monotonic()
        job()
        gc.freeze()  # DeepSpeed collects garbage several times per engine; what is here already need not be walked each time
        if rank == 0:
            partial = args.out.with_suffix(".partial")
            partial.write_text(json.dumps(record.results, indent=1))
            os.replace(partial, args.out)
            print(f"{name} {time.monotonic() - start:.2f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
