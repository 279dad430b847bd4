"""Step time of the sharpness mixins against torch's optimizer, and against each method written by hand as a flat loop.

python benchmarks/speed/sharpness.py                                          plain torch, a net that computes
python benchmarks/speed/sharpness.py --net latency-bound                      a net of many small operators
python benchmarks/speed/sharpness.py --net latency-bound --compile            the same under torch.compile
torchrun --nproc-per-node 2 benchmarks/speed/sharpness.py --host ddp          DDP
torchrun --nproc-per-node 2 benchmarks/speed/sharpness.py --host zero2        DeepSpeed ZeRO stage 2

Prints, for each method, the median over the rounds of its time to that of torch's optimizer in the same round, with a 95 %
interval, beside the flat loop's and the limit. A limit is met at its number or at 1.05 times the flat loop, whichever is larger.
JSON with --json FILE. One thread per process.

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
from flat_loops import LOOPS, Loop
from timing import conv_net, deepspeed_engine, images, measure, paired, ratios

from everbatch import compose
from everbatch.distributed import init
from everbatch.optim import SAM, GradientNorm, LookSAM, StaleSAM
from everbatch.report.recorder import versions

# arm: (mixins, options, passes per step, limit where a net computes, limit where launches count)
ARMS: dict[str, tuple[tuple[type, ...], dict[str, Any], float, float, float]] = {
    "bare step": ((), {}, 1.0, 1.02, 1.04),
    "SAM": ((SAM,), {"rho": 0.05}, 2.0, 2.05, 2.10),
    "LookSAM k=5": ((LookSAM,), {"rho": 0.05, "every": 5}, 1.2, 1.25, 1.35),
    "StaleSAM": ((StaleSAM,), {"rho": 0.05}, 1.0, 1.08, 1.22),
    "GradientNorm": ((GradientNorm,), {"radius": 0.05}, 2.0, 2.10, 2.20),
}
BASE = "torch.optim.SGD"
COMPILED = 2.1
"""Limit of SAM of a compiled module, to torch's optimizer of a compiled module."""
FLOOR = 1.05
"""How far above a loop written by hand a method may be, where that is more than its limit."""
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


def build(host: str, batch: int, net: Callable[[], nn.Module], compiled: bool) -> dict[str, Callable[[], Any]]:
    """An arm is a function that takes one step; every arm has a model of its own, from the same seed."""
    x, y = images(batch)
    arms: dict[str, Callable[[], Any]] = {}

    def wrap(model: nn.Module) -> nn.Module:
        model = DistributedDataParallel(model) if host == "ddp" else model
        return torch.compile(model) if compiled else model  # type: ignore[return-value]

    def by_hand(loop: Callable[[Loop], None], **more: Any) -> Callable[[], None]:
        model = wrap(net())
        mine = Loop(model, torch.optim.SGD(model.parameters(), **LR, **more), lambda: functional.cross_entropy(model(x), y))
        return lambda: loop(mine)

    if host.startswith("zero"):
        engine = deepspeed_engine(model := net(), torch.optim.SGD(model.parameters(), **LR), int(host[-1]), batch)

        def bare() -> None:
            engine.backward(functional.cross_entropy(engine(x), y))
            engine.step()

        arms[BASE] = bare
    else:
        arms[BASE] = by_hand(Loop.sgd)
        twin = wrap(net())
        other = torch.optim.SGD(twin.parameters(), **LR)
        arms["naive two-step SAM"] = lambda: naive_sam(twin, other, lambda: functional.cross_entropy(twin(x), y), 0.05)
        arms |= {f"{name} by hand": by_hand(loop) for name, loop in LOOPS.items()}
    for name, (mixins, options, *_) in ARMS.items():
        arms[name] = _step(host, wrap, compose(*mixins, base=torch.optim.SGD), LR | options, x, y, net)
    if host == "plain":
        arms["fused SGD"] = by_hand(Loop.sgd, fused=True)
        cls = compose(SAM, base=torch.optim.SGD)
        arms["SAM over fused SGD"] = _step(host, wrap, cls, {**LR, "rho": 0.05, "fused": True}, x, y, net)
    return {name: arm for name, arm in arms.items() if not compiled or name in (BASE, "SAM", "SAM by hand", "bare step")}


def _step(host: str, wrap: Callable[[nn.Module], nn.Module], cls: Any, options: dict[str, Any], x: torch.Tensor, y: torch.Tensor,
          net: Callable[[], nn.Module]) -> Callable[[], Any]:
    if host.startswith("zero"):
        engine = deepspeed_engine(model := net(), torch.optim.SGD(model.parameters(), **LR), int(host[-1]), len(x))
        opt, forward = cls.on(engine, **{k: v for k, v in options.items() if k not in LR}), engine.module
    else:
        forward = wrap(net())
        opt = cls(forward, **options)

    def closure() -> torch.Tensor:
        loss = functional.cross_entropy(forward(x), y)
        opt.backward(loss)
        return loss

    return lambda: opt.step(closure)


def verdict(name: str, found: float, limit: float, floor: float | None) -> str:
    """Whether an arm keeps its limit."""
    allowed = limit if floor is None else max(limit, FLOOR * floor)
    by_hand = "" if floor is None else f", {floor:.3f} by hand"
    return f"{name:<20}{'met' if found <= allowed else 'MISSED'}: {found:.3f}, limit {limit:.2f}{by_hand}"


def main() -> None:
    """Measure one host."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=["plain", "ddp", "zero0", "zero1", "zero2", "zero3"], default="plain")
    parser.add_argument("--net", choices=list(NETS), default="compute-bound")
    parser.add_argument("--compile", action="store_true", help="every model under torch.compile; SAM alone")
    parser.add_argument("--batch", type=int, help="samples per rank and step; default 32, latency-bound 4")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=5, help="steps per round; a multiple of 5, so that LookSAM's cycle fits")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = init()
    thin = args.net == "latency-bound"
    batch = args.batch or (4 if thin else 32)
    times = measure(build(args.host, batch, NETS[args.net], args.compile), blocks=args.rounds, steps=args.steps, discard=1)
    if world.rank == 0:
        rows = {row["arm"]: row for row in ratios(times, BASE)}
        for name, row in rows.items():
            row["ratio"], row["low"], row["high"] = paired(times[name], times[BASE])
        print(f"{args.net}, {args.host}{', compiled' * args.compile}, {world.size} rank(s), batch {batch} each, "
              f"{args.rounds} rounds of {args.steps} steps, load {rows[BASE]['load_average']:.1f}, malloc "
              f"{'keeps its memory' if KEEPS else 'as it comes'}")
        print(f"{'arm':<22}{'ms (min)':>10}{'median':>9}{'ratio':>9}{'95 % interval':>18}")
        for name, row in rows.items():
            print(f"{name:<22}{1e3 * row['seconds_min']:>10.2f}{1e3 * row['seconds_median']:>9.2f}{row['ratio']:>9.3f}"
                  f"{row['low']:>10.3f}-{row['high']:.3f}")
        verdicts = []
        for name, (*_, computing, launching) in ARMS.items():
            limit = COMPILED if args.compile else launching if thin else computing
            hand = BASE if name == "bare step" else f"{name} by hand"  # the bare step's loop by hand is the base arm
            by_hand = rows[hand]["ratio"] if hand in rows and not args.host.startswith("zero") else None
            if name in rows and (name == "SAM" or not args.compile):
                verdicts.append(verdict(name, rows[name]["ratio"], limit, by_hand))
        print("\n".join(verdicts))
        if args.json:
            result = {"host": args.host, "net": args.net, "compiled": args.compile, "world": world.size,
                      "malloc_keeps_memory": KEEPS, "rows": list(rows.values()), "verdicts": verdicts, "versions": versions()}
            args.json.write_text(json.dumps(result, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
