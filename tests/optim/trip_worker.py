"""One step of SAM with DynamicSparsity on a real ZeRO-2 engine, counted: `trip_worker.py OUT.json`, on one rank."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

import hosts

from everbatch import compose
from everbatch.optim import SAM, DynamicSparsity
from trips import walk

WARM = 3
"""Steps in which engine and library set themselves up."""


def main() -> None:
    dist.init_process_group("gloo")
    cls = compose(SAM, DynamicSparsity, base=torch.optim.SGD)
    run = hosts.start(hosts.BY_NAME["zero2"], cls, {"rho": 0.05, "density": 0.5, "update_every": 100})
    (x, y), *_ = hosts.batches(1)

    def closure() -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(run.forward(x), y)
        run.opt.backward(loss)
        return loss

    for _ in range(WARM):
        run.opt.step(closure)
    trip = walk(lambda: run.opt.step(closure))
    assert run.opt.last_applied and run.opt.last_passes == 2
    found = {"hops": trip.hops, "text": trip.text(most=30), "shards": len(run.opt.host.shards)}
    Path(sys.argv[1]).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's threads outlive the group


if __name__ == "__main__":
    main()
