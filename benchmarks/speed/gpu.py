"""What the methods cost on a GPU: step ratios, host syncs per step, peak memory; `benchmarks/gpu.sh` runs it.

python benchmarks/speed/gpu.py                    ResNet-50 and ViT-S, 64 images of 224 pixels, bf16 autocast
python benchmarks/speed/gpu.py --device cpu       small nets, to try the script

Prints, for each net and method, the median over the rounds of its time to torch's optimizer in the same round with a 95 %
interval; for ConAdv, to plain training of its own loop. Host syncs are what torch's profiler sees of one step: the runtime's
synchronize calls on CUDA, `item()` and the like on a CPU. Peak memory is what an arm takes beyond what was held before it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from conadv_arms import Net, learner
from timing import conv_net, measure, paired

from everbatch import compose
from everbatch.optim import SAM, DynamicSparsity, LookSAM, StaleSAM
from everbatch.report.recorder import versions

METHODS: dict[str, tuple[tuple[type, ...], dict[str, Any]]] = {
    "bare step": ((), {}),
    "SAM": ((SAM,), {"rho": 0.05}),
    "StaleSAM": ((StaleSAM,), {"rho": 0.05}),
    "LookSAM k=5": ((LookSAM,), {"rho": 0.05, "every": 5}),
    "masks, density 0.1": ((DynamicSparsity,), {"density": 0.1, "update_every": 10**9}),
}
CONADV = ("vanilla", "inline", "stream")
"""Arms of ConAdv's own loop; the first is what the others are compared with."""
TORCH = "torch.optim.SGD"
SYNCS = {"cpu": ("aten::_local_scalar_dense",),
         "cuda": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")}
"""What the profiler calls a wait for the device; `item()` would be seen twice on CUDA, by its own name and by the runtime's."""
Step = Callable[[], Any]


def nets(device: str) -> dict[str, Net]:
    """By name; on a CPU nets that are there to run at all."""
    if device == "cpu":
        return {"conv": Net(lambda: conv_net(width=4), 4)}
    import timm

    def made(name: str) -> Net:
        def build() -> nn.Module:
            with torch.device(device):  # drawn there, a second sooner
                return timm.create_model(name, num_classes=1000)

        return Net(build, 64, 224, "bf16")

    return {"ResNet-50": made("resnet50"), "ViT-S": made("vit_small_patch16_224")}


def optimizer_step(name: str, net: Net, device: str) -> Step:
    """One step of torch's optimizer, or of a method over it, on a batch of noise that lies on the device."""
    torch.manual_seed(0)
    model: nn.Module = net.build().to(device)
    x, y = torch.randn(net.batch, 3, net.side, net.side, device=device), torch.arange(net.batch, device=device) % 10
    options = {"lr": 0.01, "momentum": 0.9}

    def loss() -> torch.Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=net.precision == "bf16"):
            return functional.cross_entropy(model(x).float(), y)

    if name == TORCH:
        plain = torch.optim.SGD(model.parameters(), **options)

        def bare() -> None:
            plain.zero_grad()
            loss().backward()
            plain.step()

        return bare
    mixins, more = METHODS[name]
    opt: Any = compose(*mixins, base=torch.optim.SGD)(model, **options, **more)
    return lambda: opt.step(lambda: opt.backward(loss()))


def build(name: str, net: Net, device: str) -> Step:
    """A function that takes one step of an arm."""
    return learner(name, net, device).training_step if name in CONADV else optimizer_step(name, net, device)  # type: ignore[no-any-return]


def syncs(step: Step, cuda: bool, steps: int = 5) -> float:
    """Host syncs per step, over a whole cycle of what acts every five steps."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds) as seen:
        for _ in range(steps):
            step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))  # its table takes a minute for the events of all arms
        events = json.loads(trace.read_text())["traceEvents"]
    counted = sum(event.get("name") in SYNCS["cuda" if cuda else "cpu"] for event in events)
    # The profiler itself waits for the device once, when it ends.
    return (counted - cuda) / steps


def peak(name: str, net: Net, device: str) -> float | None:
    """MiB that an arm takes in its first steps; None where no device counts it."""
    if device == "cpu":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = build(name, net, device)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def waiting(step: Step, cuda: bool, steps: int) -> Step:
    """The step, which waits for the device where `measure` reads the clock: after what is discarded, and after a block."""
    calls = 0

    def run() -> None:
        nonlocal calls
        step()
        calls += 1
        if cuda and calls % (steps + 1) in (0, 1):
            torch.cuda.synchronize()

    return run


def rows(label: str, net: Net, device: str, blocks: int, steps: int) -> list[dict[str, Any]]:
    """What was measured of every arm on one net."""
    cuda, arms = device != "cpu", (TORCH, *METHODS, *CONADV)
    memory = {name: peak(name, net, device) for name in arms}
    built = {name: build(name, net, device) for name in arms}
    for step in built.values():
        for _ in range(3):
            step()
    waits = {name: syncs(step, cuda) for name, step in built.items()}
    times = measure({name: waiting(step, cuda, steps) for name, step in built.items()}, blocks=blocks, steps=steps, discard=1)
    found = []
    for name in arms:
        base = CONADV[0] if name in CONADV else TORCH
        ratio, low, high = paired(times[name], times[base])
        found.append({"net": label, "arm": name, "base": base, "ms": 1e3 * min(times[name]), "ratio": ratio, "low": low,
                      "high": high, "host_syncs": waits[name], "peak_mib": memory[name]})
    return found


def contract(path: Path | None) -> tuple[dict[str, Any], str]:
    """What the contract launch found, and a line about it."""
    if path is None or not path.is_file():
        return {}, "contract: not run"
    found = json.loads(path.read_text())
    left = found.pop("left out", [])
    failed = [key for key, outcome in found.items() if not outcome["passed"]]
    lines = [f"contract: {len(found) - len(failed)} of {len(found)} checks passed, {len(left)} cases left out for want of time"]
    lines += [f"  FAILED {key}: {found[key]['problem']}" for key in failed]
    return {"checks": found, "left out": left}, "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--blocks", type=int, default=12, help="rounds of all arms")
    parser.add_argument("--steps", type=int, default=5, help="steps per round; a multiple of 5, so that LookSAM's cycle fits")
    parser.add_argument("--contract", type=Path, help="what the contract launch found")
    parser.add_argument("--launch", type=int, default=0, help="with what the contract launch ended")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    begin, name = time.monotonic(), torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    checks, line = contract(args.contract)
    print(f"{name}, torch {torch.__version__}, {args.blocks} rounds of {args.steps} steps\n{line}")
    if args.launch:
        print(f"  the contract launch ended with {args.launch}")
    print(f"{'net':<10} {'arm':<20}{'ms':>9}{'ratio':>8}{'95 % interval':>18}{'host syncs':>12}{'peak MiB':>10}")
    result: list[dict[str, Any]] = []
    for label, net in nets(args.device).items():
        result += (found := rows(label, net, args.device, args.blocks, args.steps))
        for r in found:
            memory = "-" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}"
            print(f"{label:<10} {r['arm']:<20}{r['ms']:>9.2f}{r['ratio']:>8.3f}{r['low']:>11.3f}-{r['high']:.3f}"
                  f"{r['host_syncs']:>12.1f}{memory:>10}", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"device": name, "versions": versions(), "launch": args.launch, "contract": checks,
                                             "rows": result, "seconds": time.monotonic() - begin}, indent=1))


if __name__ == "__main__":
    main()
