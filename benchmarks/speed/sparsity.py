"""Step time under dynamic sparsity against the bare optimizer: between changes of topology, and what a change costs.

python benchmarks/speed/sparsity.py                                           plain torch
torchrun --nproc-per-node 2 benchmarks/speed/sparsity.py --host ddp           DDP
torchrun --nproc-per-node 2 benchmarks/speed/sparsity.py --host zero2         DeepSpeed ZeRO stage 2

Masks do not make dense kernels faster; what is measured is what they cost. Targets: 1.03 between changes, and a change, spread
over an interval of 100 steps, at most 1 % of a step. One thread per process; JSON with --json FILE.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from timing import conv_net, deepspeed_engine, images, measure, ratios

from everbatch import compose
from everbatch.distributed import init
from everbatch.optim import DynamicSparsity
from everbatch.report.recorder import versions

LR = {"lr": 0.01, "momentum": 0.9}
NEVER = 10**9


def arm(host: str, mixins: tuple[type, ...], options: dict[str, Any], batch: int) -> Callable[[], Any]:
    """A function that takes one step of a class on a host, with a model of its own."""
    x, y = images(batch)
    model: nn.Module = conv_net()
    cls: Any = compose(*mixins, base=torch.optim.SGD)
    if host.startswith("zero"):
        engine = deepspeed_engine(model, torch.optim.SGD(model.parameters(), **LR), int(host[-1]), batch)
        opt, forward = cls.on(engine, **options), engine.module
    else:
        forward = DistributedDataParallel(model) if host == "ddp" else model
        opt = cls(forward, **LR, **options)

    def closure() -> torch.Tensor:
        loss = functional.cross_entropy(forward(x), y)
        opt.backward(loss)
        return loss

    return lambda: opt.step(closure)


def change_seconds(host: str, batch: int, repeats: int) -> list[float]:
    """Seconds that a step with a change takes longer than one without: alternating steps of one optimizer."""
    step = arm(host, (DynamicSparsity,), {"density": 0.2, "update_every": 2}, batch)
    plain, change = [], []
    for i in range(2 * repeats + 4):
        started = time.perf_counter()
        step()
        (plain if i % 2 == 0 else change)[:] = [*(plain if i % 2 == 0 else change), time.perf_counter() - started]
    # RigL's change replaces the update, so it is compared with a step that has one: what is left is the change itself.
    even, odd = statistics.median(plain[2:]), change[2:]
    if even > statistics.median(odd):
        even, odd = statistics.median(odd), plain[2:]
    return [t - even for t in odd]


def main() -> None:
    """Measure one host."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=["plain", "ddp", "zero0", "zero1", "zero2", "zero3"], default="plain")
    parser.add_argument("--batch", type=int, default=32, help="samples per rank and step")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="steps per block")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = init()
    base = "SGD (step protocol)"
    arms = {base: arm(args.host, (), {}, args.batch),
            "masks, no change": arm(args.host, (DynamicSparsity,), {"density": 0.2, "update_every": NEVER}, args.batch)}
    rows = ratios(measure(arms, blocks=args.blocks, steps=args.steps), base)
    extra = change_seconds(args.host, args.batch, args.blocks)
    if world.rank == 0:
        step = rows[0]["seconds_median"]
        print(f"{args.host}, {world.size} rank(s), batch {args.batch} each, {args.blocks} blocks of {args.steps} steps, "
              f"load {rows[0]['load_average']:.1f}")
        for row in rows:
            print(f"{row['arm']:<22} {1e3 * row['seconds_min']:8.1f} ms (min) {1e3 * row['seconds_median']:8.1f} (median)   "
                  f"ratio {row['ratio_of_minima']:.3f} (min) {row['ratio_of_medians']:.3f} (median)   target 1.03")
        share = statistics.median(extra) / step / 100
        print(f"a change costs         {1e3 * statistics.median(extra):8.1f} ms (median; {1e3 * min(extra):.1f} to "
              f"{1e3 * max(extra):.1f}), {100 * share:.2f} % of a step at interval 100   target 1 %")
        if args.json:
            result = {"host": args.host, "world": world.size, "rows": rows, "change_seconds": extra, "versions": versions()}
            args.json.write_text(json.dumps(result, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
