"""What rehearsal costs: a step of DER++ beside a loop by hand, 50 tasks, the memory by its size, two ranks, and EWC's Fisher.

python benchmarks/speed/replay.py                       everything; launches torchrun itself for the two ranks
python benchmarks/speed/replay.py step memory           some parts: step, tasks, memory, fisher, ranks
python benchmarks/speed/replay.py ranks --cores 3       two ranks on a core each, and a free one for what arrives meanwhile; on a
                                                        machine of two, the ranks take turns on one and the other is free
python benchmarks/speed/replay.py ranks --width 32      with the net of `step`

Arms of one part alternate in short blocks, one thread per process. Printed are, for each arm, the median over the rounds of its
time to its base's in the same round with a 95 % interval, and the same of the thread's processor seconds, which a busy machine
disturbs less; beside them what can be counted: FLOPs, rows, bytes, all-to-alls. JSON with --json FILE.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from conadv_arms import mixer
from replay_arms import ByHand, Driven, Enlarged, InTime, Learner, flops, stream, trainer
from timing import conv_net, measure, paired

from everbatch.data import ClassBalanced, ReplayStore, Reservoir
from everbatch.distributed import World, init
from everbatch.optim.memory.by_layer import ByLayer
from everbatch.optim.memory.fisher import fisher_sums
from everbatch.report.recorder import versions

BATCH, CAPACITY = 32, 200
LIMITS = {"step": 1.02, "tasks": 1 / 0.98, "ranks": 1.10, "ranks, a core free": 1.03, "fisher": 1 / 3, "draw_ms": 2.0}
Row = dict[str, Any]


def compared(arms: Mapping[str, Callable[[], Any]], base: str, rounds: int, steps: int) -> list[Row]:
    """Each arm beside the base: seconds, and the thread's processor seconds, of every round's block."""
    cpu: dict[str, list[float]] = {name: [] for name in arms}

    def counted(name: str, arm: Callable[[], Any]) -> Callable[[], Any]:
        def step() -> None:
            before = time.thread_time()
            arm()
            cpu[name].append(time.thread_time() - before)
        return step

    # Every step counts: the arms disturb each other's caches alike.
    times = measure({name: counted(name, arm) for name, arm in arms.items()}, blocks=rounds, steps=steps, discard=0)
    rows = []
    for name, seconds in times.items():
        blocks = np.asarray(cpu[name]).reshape(rounds, steps).mean(1)
        theirs = np.asarray(cpu[base]).reshape(rounds, steps).mean(1)
        ratio, low, high = paired(seconds, times[base])
        cpu_ratio, cpu_low, cpu_high = paired(blocks.tolist(), theirs.tolist())
        rows.append({"arm": name, "base": base, "ms": 1e3 * statistics.median(seconds), "ratio": ratio, "interval": [low, high],
                     "cpu_ms": 1e3 * float(np.median(blocks)), "cpu_ratio": cpu_ratio, "cpu_interval": [cpu_low, cpu_high]})
    return rows


def step_part(rounds: int) -> dict[str, Any]:
    """The trainer's step beside the loop by hand."""
    data = stream(1, 2000, 10)
    arms = {"by hand": ByHand(data, BATCH, CAPACITY), "trainer": Driven(trainer(Learner, BATCH, CAPACITY), data)}
    for arm in arms.values():
        for _ in range(8):
            arm()
    counts = {name: flops(arm) for name, arm in arms.items()}
    rows = compared(arms, "by hand", rounds, 1)
    for row in rows:
        row["mflop"] = counts[row["arm"]] / 1e6
    return {"rows": rows, "verdict": verdict(rows[-1], LIMITS["step"])}


def tasks_part(rounds: int) -> dict[str, Any]:
    """The last of 50 tasks beside the first: two runs, one of which has 49 tasks behind it, step by step in turn."""
    data = stream(50, 160, 100)
    first = trainer(Learner, BATCH, CAPACITY, classes=100, width=8)
    last = trainer(Learner, BATCH, CAPACITY, classes=100, width=8)
    for task in range(49):
        driven = Driven(last, data, task)
        for _ in range(2):
            driven()
    arms = {"first task": Driven(first, data, 0), "task 50": Driven(last, data, 49)}
    for arm in arms.values():
        for _ in range(8):
            arm()
    counts = {name: flops(arm) for name, arm in arms.items()}
    rows = compared(arms, "first task", rounds, 2)
    for row in rows:
        row["mflop"] = counts[row["arm"]] / 1e6
        row["memory_bytes"] = arms[row["arm"]].trainer.states[Learner.__mro__[1]].store.num_bytes
    return {"rows": rows, "verdict": verdict(rows[-1], LIMITS["tasks"])}


def memory_part(rounds: int) -> dict[str, Any]:
    """Adding a batch of 32 and drawing 256, of memories of 500 to 50,000 slots; and 50,000 images in the form of CIFAR's."""
    rows = []
    kinds: dict[str, Callable[[int], Any]] = {
        "reservoir, by sample": lambda n: Reservoir(n, key="sample"), "reservoir, by visit": lambda n: Reservoir(n),
        "class-balanced": lambda n: ClassBalanced(n, key="sample")}
    for kind, make in kinds.items():
        for capacity in (500, 5000, 50_000):
            memory, seen = make(capacity), 2 * capacity
            for start in range(0, seen, 500):
                ids = start + np.arange(500)
                memory.add(ids, ids % 10, ids, 0)
            adding, drawing = [], []
            for step in range(4 * rounds):
                ids = seen + 32 * step + np.arange(32)
                began = time.perf_counter()
                memory.add(ids, ids % 10, ids, 0)
                middle = time.perf_counter()
                memory.draw(256, "replay", step)
                adding.append(middle - began)
                drawing.append(time.perf_counter() - middle)
            rows.append({"memory": kind, "slots": capacity, "add_ms": 1e3 * statistics.median(adding),
                         "draw_ms": 1e3 * statistics.median(drawing)})
    store = ReplayStore(Reservoir(50_000), World())
    images, g = torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8), torch.Generator().manual_seed(0)
    for start in range(0, 50_000, 500):
        ids = start + np.arange(500)
        store.add(ids, ids % 10, ids, 0, {"raw": images, "logits": torch.randn(500, 10, generator=g)})
    seconds, kinds_held = [], set()
    for step in range(4 * rounds):
        began = time.perf_counter()
        drawn = store.draw(256, step)
        seconds.append(time.perf_counter() - began)
        assert drawn is not None
        kinds_held.add(str(drawn["raw"].dtype))
    middle = 1e3 * statistics.median(seconds)
    images_row = {"held": len(store), "type": ", ".join(kinds_held), "bytes_per_sample": store.num_bytes / len(store),
                  "draw_256_ms": middle, "draw_256_ms_max": 1e3 * max(seconds)}
    return {"rows": rows, "images": images_row,
            "verdict": f"{'met' if middle < LIMITS['draw_ms'] else 'MISSED'}: draw of 256 in {middle:.2f} ms, limit 2 ms"}


def fisher_part(rounds: int) -> dict[str, Any]:
    """Diagonal Fisher information by chunks beside sample by sample, as an estimate goes over its second batch; one backward of
    all rows, which gives no gradient of a sample, is the least that the arithmetic takes."""
    rows: list[Row] = []
    nets: dict[str, Callable[[], nn.Module]] = {
        "mixer": mixer, "ResNet-18": lambda: timm.create_model("resnet18", num_classes=10), "conv net": lambda: conv_net(0, 8),
        "MLP": mlp}
    for net, make in nets.items():
        model, count = make().eval(), 32
        for p in model.parameters():  # a head that begins at zero lets no gradient through
            if not p.any():
                nn.init.normal_(p, std=0.02)
        weights = {name: p.detach() for name, p in model.named_parameters()}
        images, targets = torch.rand(count, 3, 32, 32), torch.randint(0, 10, (count,))

        def call(w: Any, x: Any, model: Any = model) -> Any:
            return torch.func.functional_call(model, w, (x,))

        def by_hand(model: Any = model, images: Any = images, targets: Any = targets) -> dict[str, torch.Tensor]:
            sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
            for image, target in zip(images, targets, strict=True):
                model.zero_grad()
                torch.nn.functional.cross_entropy(model(image[None]), target[None]).backward()
                for name, p in model.named_parameters():
                    assert p.grad is not None
                    sums[name] += p.grad.square()
            return sums

        layers, without = ByLayer(), ByLayer()
        without.fits = False

        def chunks(size: int, layers: ByLayer = layers, call: Any = call, weights: Any = weights, x: Any = images,
                   y: Any = targets) -> Any:
            return fisher_sums(call, weights, x, y, "empirical", chunk=size, layers=layers)

        one, other = by_hand(), chunks(16)
        most = {n: float(sums.abs().max()) for n, sums in one.items()}
        # Where all gradients are zero but for rounding, so is what they differ by.
        apart = max(float((one[n] - other[n]).abs().max()) / max(most[n], 1e-9 * max(most.values())) for n in one)
        arms = {"sample by sample": by_hand, "chunk=1": lambda chunks=chunks: chunks(1),
                "chunk=16": lambda chunks=chunks: chunks(16), "chunk=32": lambda chunks=chunks: chunks(32),
                "torch.func, chunk=16": lambda chunks=chunks, without=without: chunks(16, without),
                "one backward of all": lambda call=call, weights=weights, x=images, y=targets: fisher_sums(
                    call, weights, x, y, "batch")}
        found = compared(arms, "sample by sample", max(4, rounds // 5), 1)
        rows += [{**row, "arm": f"{net}, {row['arm']}", "samples": count, "apart": apart} for row in found]
    return {"rows": rows, "verdict": "; ".join(fisher_verdict(rows, net) for net in nets)}


def fisher_verdict(rows: Sequence[Row], net: str) -> str:
    """Whether chunks are three times as fast on a net, or nothing could be: one backward of all rows is not."""
    faster = {row["arm"].removeprefix(f"{net}, "): 1 / row["cpu_ratio"] for row in rows if row["arm"].startswith(f"{net}, ")}
    found, least = faster["chunk=16"], faster["one backward of all"]
    word = "met" if found >= 1 / LIMITS["fisher"] else "MISSED" if least >= 1 / LIMITS["fisher"] else "out of reach"
    return f"{net} {found:.1f} times as fast, {word} (wanted {1 / LIMITS['fisher']:.0f}; one backward of all rows {least:.1f})"


def mlp() -> nn.Module:
    """Two hidden layers of 100: its time is that of reading and writing 318 thousand weights for each sample."""
    sizes = (3072, 100, 100, 10)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def ranks_part(rounds: int, cores: int, width: int) -> dict[str, Any]:
    """On each rank: DER++ that draws ahead or in time, beside the same batch enlarged by constant rows."""
    world = init("cpu")
    have = sorted(os.sched_getaffinity(0))
    pinned = len(have) >= world.size
    if pinned:
        shared = cores > world.size and len(have) == world.size
        main = {have[0 if shared else world.rank]}
        spare = set(have[1:] if shared else have[world.size :]) if cores > world.size else set()
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), main)
        os.sched_setaffinity(0, main | spare)  # threads that come later, gloo's among them, are free to go there
    data = stream(1, 2000, 10)
    trainers = {"constant rows": Enlarged, "in time": InTime, "ahead": Learner}
    arms = {name: Driven(trainer(cls, BATCH * world.size, CAPACITY, engine="ddp", width=width), data)
            for name, cls in trainers.items()}
    sent: dict[str, int] = {}
    for name, arm in arms.items():
        for _ in range(8):
            arm()
        sent[name] = exchanges(arm)
    if pinned:
        os.sched_setaffinity(0, main)
    rows = compared(arms, "constant rows", rounds, 2)
    for row in rows:
        row["all_to_alls"] = sent[row["arm"]]
    free = pinned and bool(spare)
    limit = LIMITS["ranks, a core free"] if free else LIMITS["ranks"]
    return {"rows": rows, "pinned": pinned, "core_free": free, "ranks_on_one_core": pinned and shared,
            "verdict": verdict(rows[-1], limit)}


def exchanges(step: Callable[[], Any]) -> int:
    """All-to-alls of one step."""
    count, real = 0, dist.all_to_all_single

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return real(*args, **options)

    dist.all_to_all_single = counting
    try:
        step()
    finally:
        dist.all_to_all_single = real
    return count


def verdict(row: Row, limit: float) -> str:
    """Whether an arm keeps its limit, by the median of its pairs; undecided where the limit lies within what was measured."""
    low, high = row["interval"]
    word = "met" if high <= limit else "MISSED" if low > limit else "undecided"
    return (f"{word}: {row['ratio']:.3f} ({low:.3f} to {high:.3f}), of processor seconds {row['cpu_ratio']:.3f} "
            f"({row['cpu_interval'][0]:.3f} to {row['cpu_interval'][1]:.3f}), limit {limit:.3f}")


def launched(rounds: int, cores: int, width: int) -> dict[str, Any]:
    """`ranks_part` under torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, "ranks",
                   "--rounds", str(rounds), "--cores", str(cores), "--width", str(width), "--json", str(out)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, timeout=1800)
        found: dict[str, Any] = json.loads(out.read_text())["ranks"]
        return found


def show(name: str, found: Mapping[str, Any]) -> None:
    """Print one part."""
    print(f"\n{name}: {found['verdict']}", flush=True)
    for row in found["rows"]:
        cells = []
        for key, value in row.items():
            if isinstance(value, list):
                cells.append(f"{key} {value[0]:.3f} to {value[1]:.3f}")
            else:
                cells.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
        print("  " + ", ".join(cells))
    for key in found.keys() - {"rows", "verdict"}:
        print(f"  {key}: {found[key]}")


PARTS = {"step": step_part, "tasks": tasks_part, "memory": memory_part, "fisher": fisher_part}


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="step, tasks, memory, fisher, ranks; all of them")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--cores", type=int, default=2, help="cores that two ranks may use")
    parser.add_argument("--width", type=int, default=16, help="of the two ranks' net; its first layer's channels")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    within = "TORCHELASTIC_RUN_ID" in os.environ
    result: dict[str, Any] = {}
    for name in args.parts or [*PARTS, "ranks"]:
        if name == "ranks":
            part = ranks_part if within else launched
            result[name] = part(args.rounds, args.cores, args.width)
        else:
            result[name] = PARTS[name](args.rounds)
        if not within:
            show(name, result[name])
    load = os.getloadavg()[0]
    if not within:
        print(f"\nload {load:.1f} at the end, {os.cpu_count()} cores", flush=True)
    if args.json and World.current().rank == 0:
        args.json.write_text(json.dumps({**result, "load_average": load, "versions": versions()}, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
