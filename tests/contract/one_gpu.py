"""The jobs of a contract launch of one rank: STORE SECONDS; see worker.py. With EVERBATCH_DEVICE=cuda it runs on a GPU.

    EVERBATCH_DEVICE=cuda torchrun --nproc-per-node 1 tests/worker.py tests/contract/one_gpu.py OUT.json STORE 200

A few cases on FSDP2 and ZeRO 1 to 3, in fp32 and bf16, every case on plain torch, then every other case on those hosts. "left
out" lists what SECONDS had no room for.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path

import lives
from cases import CASES, MIX
from record import Job, Record

HOSTS = ("fsdp2", "zero1", "zero2", "zero3", "zero2-bf16", "zero3-bf16")
FEW = (MIX, "SAM", "LookSAM", "EMA+ShrinkPerturb+SAM")
"""Cases that the engines run first."""


def jobs(record: Record, store: str, seconds: str) -> Iterator[Job]:
    begin, left = time.monotonic(), list[str]()
    wanted = [(host, case) for case in FEW for host in HOSTS] + [("plain", c.name) for c in CASES]
    wanted += [(host, c.name) for c in CASES if c.name not in FEW for host in HOSTS]
    for host, case in wanted:
        if time.monotonic() - begin > float(seconds):
            left.append(f"{host}/{case}")
            continue
        base = lives.BY_CASE[case].bases[0]
        yield f"{host}/{case}", functools.partial(lives.live, record, host, case, base, Path(store))
    yield record.noted("left out", list, left)
