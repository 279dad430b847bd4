"""Step time of the sharpness mixins against the bare optimizer, and against the widespread two-step SAM written as a naive loop.

python benchmarks/speed/sharpness.py                                          plain torch
torchrun --nproc-per-node 2 benchmarks/speed/sharpness.py --host ddp          DDP
torchrun --nproc-per-node 2 benchmarks/speed/sharpness.py --host zero2        DeepSpeed ZeRO stage 2

Prints the ratios, the limit by the number of passes, the target, and a verdict per method: by the ratio of the least times and by
that of the medians, because on a machine that does other things they may disagree. JSON with --json FILE. One thread per process.

glibc gives large blocks back to the system and faults them in again, an amount that differs from arm to arm and from run to run:
set MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 to measure the methods and not that. The output says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from conadv_arms import mixer
from timing import conv_net, deepspeed_engine, images, measure, ratios

from everbatch import compose
from everbatch.distributed import init
from everbatch.optim import SAM, GradientNorm, LookSAM, StaleSAM
from everbatch.report.recorder import versions

# arm: (mixins, options, passes per step, target ratio)
ARMS: dict[str, tuple[tuple[type, ...], dict[str, Any], float, float]] = {
    "bare step protocol": ((), {}, 1.0, 1.02),
    "SAM": ((SAM,), {"rho": 0.05}, 2.0, 2.05),
    "LookSAM k=5": ((LookSAM,), {"rho": 0.05, "every": 5}, 1.2, 1.25),
    "StaleSAM": ((StaleSAM,), {"rho": 0.05}, 1.0, 1.08),
    "GradientNorm": ((GradientNorm,), {"radius": 0.05}, 2.0, 2.10),
}
NETS = {"compute-bound": conv_net, "latency-bound": mixer}
LR = {"lr": 0.01, "momentum": 0.9}
KEEPS = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} <= set(os.environ)


def naive_sam(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor], rho: float) -> None:
    """The published two-step algorithm, tensor by tensor: climb by rho along the gradient, take the gradient, come back, step."""
    optimizer.zero_grad()
    loss().backward()
    norm = torch.norm(torch.stack([p.grad.norm(2) for p in model.parameters() if p.grad is not None]), 2)
    old = {}
    with torch.no_grad():
        for p in model.parameters():
            old[p] = p.data.clone()
            p.add_(p.grad * (rho / (norm + 1e-12)))
    optimizer.zero_grad()
    loss().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.data = old[p]
    optimizer.step()


def build(host: str, batch: int, net: Callable[[], nn.Module]) -> dict[str, Callable[[], Any]]:
    """An arm is a function that takes one step; every arm has a model of its own, from the same seed."""
    x, y = images(batch)
    arms: dict[str, Callable[[], Any]] = {}

    def wrap(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model) if host == "ddp" else model

    if host.startswith("zero"):
        engine = deepspeed_engine(model := net(), torch.optim.SGD(model.parameters(), **LR), int(host[-1]), batch)

        def bare() -> None:
            engine.backward(functional.cross_entropy(engine(x), y))
            engine.step()

        arms["torch.optim.SGD"] = bare
    else:
        plain = wrap(net())
        sgd = torch.optim.SGD(plain.parameters(), **LR)

        def bare() -> None:
            sgd.zero_grad()
            functional.cross_entropy(plain(x), y).backward()
            sgd.step()

        twin = wrap(net())
        other = torch.optim.SGD(twin.parameters(), **LR)
        arms["torch.optim.SGD"] = bare
        arms["naive two-step SAM"] = lambda: naive_sam(twin, other, lambda: functional.cross_entropy(twin(x), y), 0.05)
    for name, (mixins, options, _, _) in ARMS.items():
        arms[name] = _step(host, wrap, compose(*mixins, base=torch.optim.SGD), options, x, y, net)
    return arms


def _step(host: str, wrap: Callable[[nn.Module], nn.Module], cls: Any, options: dict[str, Any], x: torch.Tensor, y: torch.Tensor,
          net: Callable[[], nn.Module]) -> Callable[[], Any]:
    if host.startswith("zero"):
        engine = deepspeed_engine(model := net(), torch.optim.SGD(model.parameters(), **LR), int(host[-1]), len(x))
        opt, forward = cls.on(engine, **options), engine.module
    else:
        forward = wrap(net())
        opt = cls(forward, **LR, **options)

    def closure() -> torch.Tensor:
        loss = functional.cross_entropy(forward(x), y)
        opt.backward(loss)
        return loss

    return lambda: opt.step(closure)


def verdict(row: dict[str, Any], target: float) -> str:
    """Whether an arm keeps its target, by the least times and by the medians."""
    least, middle = row["ratio_of_minima"], row["ratio_of_medians"]
    met = {(True, True): "met", (False, False): "MISSED"}.get((least <= target, middle <= target), "undecided")
    return f"{row['arm']:<22}{met}: {least:.3f} (least times) and {middle:.3f} (medians), target <= {target:.2f}"


def main() -> None:
    """Measure one host."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=["plain", "ddp", "zero0", "zero1", "zero2", "zero3"], default="plain")
    parser.add_argument("--net", choices=list(NETS), default="compute-bound",
                        help="targets are for compute-bound; latency-bound takes --batch 4")
    parser.add_argument("--batch", type=int, default=32, help="samples per rank and step")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="steps per block; a multiple of 5, so that LookSAM's cycle fits")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = init()
    times = measure(build(args.host, args.batch, NETS[args.net]), blocks=args.blocks, steps=args.steps, discard=5)
    if world.rank == 0:
        rows = ratios(times, "torch.optim.SGD")
        print(f"{args.net}, {args.host}, {world.size} rank(s), batch {args.batch} each, {args.blocks} blocks of {args.steps} "
              f"steps, load {rows[0]['load_average']:.1f}, malloc {'keeps its memory' if KEEPS else 'as it comes'}")
        print(f"{'arm':<22}{'ms (min)':>10}{'median':>9}{'max':>9}{'ratio min':>11}{'median':>8}{'passes':>8}{'target':>8}")
        for row in rows:
            _, _, passes, target = ARMS.get(row["arm"], ((), {}, 2.0 if "SAM" in row["arm"] else 1.0, float("nan")))
            print(f"{row['arm']:<22}{1e3 * row['seconds_min']:>10.1f}{1e3 * row['seconds_median']:>9.1f}"
                  f"{1e3 * row['seconds_max']:>9.1f}{row['ratio_of_minima']:>11.3f}{row['ratio_of_medians']:>8.3f}{passes:>8.2f}"
                  f"{target:>8.2f}")
        verdicts = {row["arm"]: verdict(row, ARMS[row["arm"]][3]) for row in rows if ARMS.get(row["arm"], ((),))[0]}
        print("\n".join(verdicts.values()))
        if args.json:
            result = {"host": args.host, "world": world.size, "malloc_keeps_memory": KEEPS, "rows": rows, "verdicts": verdicts,
                      "versions": versions()}
            args.json.write_text(json.dumps(result, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
