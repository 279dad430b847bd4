"""Does a stale direction do what SAM's second pass does? Test accuracy of SGD, SAM, LookSAM and StaleSAM at equal epochs.

python benchmarks/claims/stale_sam.py                                             digits, minutes on one core
python benchmarks/claims/stale_sam.py --noise 0.4                                 the same with noisy pixels: more to overfit
python benchmarks/claims/stale_sam.py --data imagefolder:PATH --samples 5000 --epochs 10

Learning rate, schedule, decay, network, order of batches: the same for all methods under one seed, so differences are paired.
Each method's rho is chosen from the grid by accuracy on a part cut from the training samples, with seeds of its own; then every
method trains on all training samples, and the test samples are looked at once, after the last step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from everbatch import compose, seeds
from everbatch.data import load, stratified_split
from everbatch.nn import SmallConv
from everbatch.optim import SAM, LookSAM, StaleSAM
from everbatch.report.recorder import versions

METHODS: dict[str, tuple[tuple[type, ...], dict[str, Any]]] = {
    "SGD": ((), {}), "SAM": ((SAM,), {}), "LookSAM k=5": ((LookSAM,), {"every": 5}), "StaleSAM tau=1": ((StaleSAM,), {"tau": 1})}
TUNING_SEED = 1000
"""The seeds that choose rho begin here, apart from those that are reported."""


@dataclass(frozen=True)
class Difference:
    """Paired difference a - b over seeds."""

    mean: float
    std: float | None
    """Sample standard deviation; None for one seed."""
    error: float | None
    """Standard error of the mean, std / sqrt(n)."""
    count: int

    def verdict(self) -> str:
        """What it says, and no more than that."""
        head = f"{100 * self.mean:+.2f} points"
        if self.error is None:
            return f"{head}, one seed: no statement about spread"
        beyond = abs(self.mean) > 2 * self.error
        said = "beyond 2 standard errors" if beyond else "no difference beyond 2 standard errors"
        return f"{head}, standard error {100 * self.error:.2f} over {self.count} seeds: {said}"


def difference(a: list[float], b: list[float]) -> Difference:
    """Mean, sample standard deviation and standard error of a - b, pair by pair."""
    each = [x - y for x, y in zip(a, b, strict=True)]
    std = statistics.stdev(each) if len(each) > 1 else None
    return Difference(statistics.fmean(each), std, None if std is None else std / len(each) ** 0.5, len(each))


@dataclass(frozen=True)
class Part:
    """Ready inputs and labels, in memory."""

    inputs: Tensor
    targets: Tensor

    def rows(self, ids: Tensor) -> Part:
        return Part(self.inputs[ids], self.targets[ids])


@dataclass(frozen=True)
class Run:
    """One training run."""

    accuracy: float
    passes: float
    """Mean number of passes per step."""
    step_seconds: float
    """Median over the steps."""


def read(args: argparse.Namespace) -> tuple[Part, Part, int]:
    """Training and test part, scaled to about [-1, 1], and the number of classes."""
    parts = []
    for train in (True, False):
        source = load(args.data, train=train, image_size=args.image_size)
        ids = torch.arange(len(source))
        if train and args.samples and args.samples < len(source):
            ids = stratified_split(source.targets, args.samples / len(source), seed=0)[1]
        raw = source.fetch(ids)
        top = 16.0 if args.data == "digits" else 255.0 if raw.dtype == torch.uint8 else 1.0
        values = raw.float() / top
        if args.noise:  # noise that belongs to the image, as in recipes/growing_data.py
            values += args.noise * seeds.normal(("stale_sam", source.name), 0, values.numel()).view(values.shape)
        parts.append(Part(values.clamp(0.0, 1.0) * 2 - 1, source.targets[ids]))
    return parts[0], parts[1], len(source.classes)


def train_once(method: str, rho: float, seed: int, train: Part, test: Part, classes: int, args: argparse.Namespace) -> Run:
    """Train from scratch, test once at the end."""
    torch.manual_seed(seeds.derive(seed, "model"))
    model: nn.Module = SmallConv(train.inputs.shape[1], classes, train.inputs.shape[-1], args.width)
    mixins, options = METHODS[method]
    cls: Any = compose(*mixins, base=torch.optim.SGD)
    opt = cls(model, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, **options, **({"rho": rho} if mixins else {}))
    count = len(train.targets)
    steps = args.epochs * (count // args.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    passes, spent = 0, []
    for epoch in range(args.epochs):
        order = torch.randperm(count, generator=seeds.generator(seed, "order", epoch))
        for rows in order[: count // args.batch * args.batch].split(args.batch):
            x, y = train.inputs[rows], train.targets[rows]
            begun = time.perf_counter()

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                loss = functional.cross_entropy(model(x), y)
                opt.backward(loss)
                return loss

            opt.step(closure)
            spent.append(time.perf_counter() - begun)
            passes += opt.last_passes
            schedule.step()
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum())
                    for x, y in zip(test.inputs.split(500), test.targets.split(500), strict=True))
    return Run(right / len(test.targets), passes / steps, statistics.median(spent))


def choose(train: Part, classes: int, args: argparse.Namespace) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Each method's rho with the best mean validation accuracy (the smallest of equals), and the table it was chosen from."""
    rest, held = stratified_split(train.targets, 0.2, seed=0)
    table: dict[str, dict[str, float]] = {}
    for method in [m for m in METHODS if METHODS[m][0]]:
        table[method] = {}
        for rho in sorted(args.rho):
            found = [train_once(method, rho, TUNING_SEED + s, train.rows(rest), train.rows(held), classes, args).accuracy
                     for s in range(args.tuning_seeds)]
            table[method][str(rho)] = statistics.fmean(found)
    return {m: float(max(row, key=lambda r: row[r])) for m, row in table.items()}, table


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Tune, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, or any source of everbatch.data.load")
    parser.add_argument("--image-size", type=int, help="side in pixels; by default the size the data has")
    parser.add_argument("--samples", type=int, help="training samples, a stratified share; by default all")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of fixed pixel noise, share of the range")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--tuning-seeds", type=int, default=3)
    parser.add_argument("--rho", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1, 0.2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05, help="the same for all methods; cosine decay to 0")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--width", type=int, default=16, help="channels of the net's first convolution")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begun = time.perf_counter()
    train, test, classes = read(args)
    print(f"{args.data}, pixel noise {args.noise:g}: {len(train.targets)} training and {len(test.targets)} test samples; "
          f"{args.epochs} epochs, batch {args.batch}, lr {args.lr:g} (cosine) for all, momentum 0.9, "
          f"decay {args.weight_decay:g}, width {args.width}")
    chosen, table = choose(train, classes, args)
    print(f"rho, chosen on 20 % cut from the training samples (never on the test samples), mean of {args.tuning_seeds} seeds, "
          "validation %:")
    for method, row in table.items():
        shown = "  ".join(f"{rho}: {100 * a:.2f}" for rho, a in row.items())
        edge = len(args.rho) > 1 and chosen[method] in (min(args.rho), max(args.rho))
        print(f"  {method:<16}{shown}   -> {chosen[method]:g}{' (an end of the grid)' if edge else ''}")
    runs: dict[str, list[Run]] = {m: [] for m in METHODS}
    for seed in range(args.seeds):
        for method in METHODS:  # in turn, so that the load of the machine meets all alike
            runs[method].append(train_once(method, chosen.get(method, 0.0), seed, train, test, classes, args))
    accuracy = {m: [r.accuracy for r in found] for m, found in runs.items()}
    base_ms = statistics.median(r.step_seconds for r in runs["SGD"])
    print(f"\n{'method':<16}{'rho':>6}{'test %':>9}{'std':>7}{'passes':>9}{'ms/step':>9}{'x SGD':>7}")
    for method, found in runs.items():
        ms = statistics.median(r.step_seconds for r in found)
        spread = f"{100 * statistics.stdev(accuracy[method]):.2f}" if len(found) > 1 else "-"
        print(f"{method:<16}{chosen.get(method, 0.0):>6g}{100 * statistics.fmean(accuracy[method]):>9.2f}{spread:>7}"
              f"{statistics.fmean(r.passes for r in found):>9.2f}{1e3 * ms:>9.2f}{ms / base_ms:>7.2f}")
    pairs = {f"{a} minus {b}": difference(accuracy[a], accuracy[b])
             for b in ("SGD", "SAM") for a in METHODS if a != b and (a, b) != ("SGD", "SAM")}
    for name, found in pairs.items():
        print(f"{name:<30} {found.verdict()}")
    result = {
        "settings": {k: v for k, v in vars(args).items() if k != "json"}, "training_samples": len(train.targets),
        "test_samples": len(test.targets), "seeds": list(range(args.seeds)), "chosen_rho": chosen, "validation": table,
        "test_accuracy": accuracy, "passes_per_step": {m: statistics.fmean(r.passes for r in f) for m, f in runs.items()},
        "step_ms": {m: 1e3 * statistics.median(r.step_seconds for r in f) for m, f in runs.items()},
        "differences": {n: asdict(d) for n, d in pairs.items()}, "seconds": time.perf_counter() - begun,
        "load_average": os.getloadavg()[0], "versions": versions()}
    print(f"{result['seconds']:.0f} s, load {result['load_average']:.1f}, torch {torch.__version__}, seeds 0 to {args.seeds - 1}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
