"""Does adversarial training on stale copies (ConAdv) keep the accuracy that large batches lose? At equal epochs, on few images.

python benchmarks/claims/conadv.py --data imagefolder:/tmp/cifar10 --out /tmp/conadv          about 40 minutes on 2 cores
python benchmarks/claims/conadv.py --data imagefolder:/tmp/cifar10 --out /tmp/conadv --budget-minutes 8       a slice of it
python benchmarks/claims/conadv.py --data imagefolder:/tmp/cifar10 --out /tmp/conadv --tune 0.5 1 2 4

Arms: LARS; LARS + ConAdv (tau 1, radius 4/255); LARS + SAM; LARS + random crops and flips. A cell is (arm, batch, seed); cells
run in single-thread processes, each appends its result to OUT/cells.jsonl, and cells found there are not run again.

Scale: a subset of the images, shrunk, a residual net of 78 thousand weights, few epochs. The largest batch is left with few
updates. It shows a direction at this scale, not the paper's numbers (ResNet-50, ImageNet, batch 96K, 90 epochs).
Learning rate: lr(B) = lr * sqrt(B / smallest B) for all arms, warm-up and polynomial decay measured in epochs. `--tune` tries
base rates for plain LARS on training samples outside the subset, never on the test samples. Batch norm sees micro-batches of
the smallest batch at every batch size, as the ranks of a large job do.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from conadv_report import ARMS, analyse, plot, report

from everbatch import compose, seeds
from everbatch.data import Batch, TensorSource, iid, load, stratified_split
from everbatch.errors import check
from everbatch.optim import LARS, SAM, scaled_lr
from everbatch.report.recorder import versions
from everbatch.train import Schedule, Trainer, TrainerMixin


@dataclass(frozen=True)
class Settings:
    """What all cells share; a cell that ran under others is not reused."""

    data: str = "digits"
    image_size: int = 16
    samples: int = 16400
    """Training samples, a stratified share."""
    epochs: int = 20
    warmup_epochs: float = 3.0
    power: float = 2.0
    lr: float = 2.0
    """At the reference batch."""
    reference_batch: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    width: int = 8
    rho: float = 0.05
    radius: float = 4.0
    tau: int = 1
    validation: bool = False
    """Tuning: test on training samples that are outside the subset."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    arm: str
    batch: int
    seed: int


class CropFlip(TrainerMixin):
    """Random crops from images padded by an eighth, and random horizontal flips, a whole batch at once."""

    def augment_batch(self, parts: list[Batch]) -> list[Batch]:
        parts = super().augment_batch(parts)  # type: ignore[misc]
        g = seeds.generator(self.seed, "crop_flip", self.step)
        return [replace(part, inputs=crop_flip(part.inputs, g)) for part in parts]


def crop_flip(x: Tensor, g: torch.Generator) -> Tensor:
    """Each image (n, C, H, H) cut at a random place from itself padded with zeros (the mean colour), half of them mirrored."""
    n, side = len(x), x.shape[-1]
    pad, at = max(1, side // 8), torch.arange(side)
    top, left = torch.randint(2 * pad + 1, (2, n, 1), generator=g)
    columns = torch.where(torch.rand(n, 1, generator=g) < 0.5, at.flip(0), at) + left
    wide = nn.functional.pad(x, [pad] * 4)
    return wide[torch.arange(n)[:, None, None], :, (top + at)[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def network(classes: int, channels: int, width: int, seed: int) -> nn.Module:
    """timm's residual net with one basic block per stage, stem and widths for small images."""
    from timm.models.resnet import BasicBlock, ResNet

    class SmallResNet(ResNet):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.contiguous(memory_format=torch.channels_last))  # 1.5 times as fast on CPU

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "model"))
        net = SmallResNet(BasicBlock, (1, 1, 1, 1), num_classes=classes, channels=tuple(width * 2**i for i in range(4)),
                          stem_type="deep", stem_width=width // 2)
        net.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return net.to(memory_format=torch.channels_last)


def in_memory(settings: Settings, folder: Path) -> Path:
    """Decode the images once into a file of bytes; later starts find it."""
    name = "".join(c if c.isalnum() else "_" for c in settings.data)[-40:]
    path = folder / f"images_{name}_{settings.image_size}_{settings.samples}.pt"
    if not path.exists():
        kept: dict[str, Any] = {}
        for train in (True, False):
            source = load(settings.data, train=train, image_size=settings.image_size)
            ids = torch.arange(len(source))
            if train and settings.samples < len(source):
                rest, ids = stratified_split(source.targets, settings.samples / len(source), seed=0)
                rest = rest[torch.randperm(len(rest), generator=seeds.generator(0, "validation"))[:5000]]
                kept["validation"] = (source.fetch(rest), source.targets[rest])
            kept["train" if train else "test"] = (source.fetch(ids), source.targets[ids])
            kept["classes"] = source.classes
        torch.save(kept, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return path


def run_cell(cell: Cell, settings: Settings, images: Path) -> dict[str, Any]:
    """Train one cell and test it after the last step; runs in a process of the pool."""
    torch.set_num_threads(1)
    kept = torch.load(images, mmap=True)
    check(not settings.validation or "validation" in kept, "conadv", "--tune on all training samples",
          "leave some for validation", "lower --samples")
    train, test = (TensorSource(*kept[part], name=part, classes=kept["classes"])
                   for part in ("train", "validation" if settings.validation else "test"))
    top = 16.0 if settings.data == "digits" else 255.0
    sample = kept["train"][0][:2000].float() / top
    mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3))
    optimizer = functools.partial(
        compose(*((SAM,) if cell.arm == "sam" else ()), LARS, base=torch.optim.SGD), momentum=settings.momentum,
        lr=scaled_lr(settings.lr, batch=cell.batch, reference_batch=settings.reference_batch, rule="sqrt"),
        weight_decay=settings.weight_decay, **({"rho": settings.rho} if cell.arm == "sam" else {}))
    learner, options = learner_of(cell.arm, settings, mean, std)
    trainer = learner(
        network(len(kept["classes"]), len(mean), settings.width, cell.seed), optimizer, device="cpu",
        config=Trainer.Config(
            batch_size=cell.batch, epochs=settings.epochs, seed=cell.seed, decay_vectors=False, max_bad_steps=3,
            accumulation=max(1, cell.batch // settings.reference_batch), eval_batch=500,
            schedule=Schedule(kind="polynomial", warmup_epochs=settings.warmup_epochs, power=settings.power)),
        prepare=lambda x: (x.float() / top - mean[:, None, None]) / std[:, None, None], **options)
    begun, cpu = time.perf_counter(), time.process_time()
    try:
        accuracy: float | None = trainer.fit(iid(train, test))[0][0]
    except RuntimeError as error:
        if "not finite" not in str(error):
            raise
        accuracy = None  # diverged
    return {**asdict(cell), "accuracy": accuracy, "steps": trainer.step, "seconds": time.perf_counter() - begun,
            "cpu_seconds": time.process_time() - cpu, "load_average": os.getloadavg()[0], "settings": asdict(settings)}


def learner_of(arm: str, settings: Settings, mean: Tensor, std: Tensor) -> tuple[type, dict[str, Any]]:
    """Trainer class of an arm, and the options it takes."""
    if arm == "augment":
        return type("Learner", (CropFlip, Trainer), {}), {}
    if arm != "conadv":
        return Trainer, {}
    from everbatch.train import ConAdv

    return type("Learner", (ConAdv, Trainer), {}), {
        "tau": settings.tau, "radius": settings.radius, "mean": tuple(mean.tolist()), "std": tuple(std.tolist()),
        "placement": "inline", "split_bn": True}


def read_cells(path: Path, settings: Settings) -> dict[Cell, dict[str, Any]]:
    """Finished cells of these settings; a last line that was cut off is passed over."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["settings"] == asdict(settings):
            found[Cell(row["arm"], row["batch"], row["seed"])] = row
    return found


def run_all(cells: Sequence[Cell], settings: Settings, path: Path, images: Path, *, workers: int, minutes: float) -> int:
    """Run what is not there yet, in order; returns how many cells ran. Starts none after `minutes`."""
    done = read_cells(path, settings)
    left, running, ran = [c for c in cells if c not in done], set[Future[dict[str, Any]]](), 0
    end = time.monotonic() + 60 * minutes
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers load torch
    if path.exists() and not path.read_text().endswith("\n"):
        path.write_text(path.read_text() + "\n")
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        while left or running:
            while left and len(running) < workers and time.monotonic() < end:
                running.add(pool.submit(run_cell, left.pop(0), settings, images))
            if not running:
                break
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                row, ran = future.result(), ran + 1
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                shown = "diverged" if row["accuracy"] is None else f"{100 * row['accuracy']:6.2f} %"
                print(f"{ARMS[row['arm']]:<18} batch {row['batch']:>5}  seed {row['seed']}  {shown}  {row['seconds']:.0f} s",
                      flush=True)
    return ran


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run or resume, then report what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="imagefolder:PATH, or any source of everbatch.data.load")
    parser.add_argument("--out", type=Path, required=True, help="folder for cells.jsonl, result.json, conadv.png, decoded images")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--budget-minutes", type=float, default=math.inf, help="start no cell after so long")
    parser.add_argument("--tune", type=float, nargs="+", help="base rates to try for plain LARS on a validation split, and stop")
    for name in ("image_size", "samples", "epochs", "warmup_epochs", "power", "lr", "weight_decay", "width", "rho", "radius"):
        default = getattr(Settings, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args(arguments)
    shared = {k: v for k, v in vars(args).items() if k in Settings.__dataclass_fields__}
    args.out.mkdir(parents=True, exist_ok=True)
    base = Settings(**shared, reference_batch=min(args.batches))
    for batch in args.batches:
        check(batch % base.reference_batch == 0, "conadv", f"batch {batch}", f"be a multiple of {base.reference_batch}")
    # At width 4, oneDNN's backward of a strided 1x1 convolution over channels-last images writes where it may not on CPUs with
    # AVX2 alone (torch 2.14.1): glibc ends the process for it, or nobody does.
    check(base.width % 8 == 0, "conadv", f"width {base.width}", "be a multiple of 8")
    images, path = in_memory(base, args.out), args.out / "cells.jsonl"
    options = {"workers": args.workers, "minutes": args.budget_minutes}
    if args.tune:
        return tune(args, base, path, images, options)
    begun = time.perf_counter()
    cells = [Cell(arm, batch, seed) for seed in range(args.seeds) for batch in args.batches for arm in args.arms]
    ran = run_all(cells, base, path, images, **options)
    done = {c: r for c, r in read_cells(path, base).items() if c in set(cells)}
    if not done:
        print("no cell is finished")
        return {}
    found = analyse(done.values())
    kept = torch.load(images, mmap=True)
    scale = (f"{args.data}: {len(kept['train'][1])} training and {len(kept['test'][1])} test images of {args.image_size} pixels, "
             f"{args.epochs} epochs, width {args.width}")
    rule = (f"lr {args.lr:g} * sqrt(B / {base.reference_batch}), {args.warmup_epochs:g} epochs of warm-up, polynomial decay with "
            f"power {args.power:g}; rho {args.rho:g}, radius {args.radius:g}/255, tau {base.tau}: one setting, not tuned by arm")
    updates = ", ".join(f"{b}: {args.epochs * (len(kept['train'][1]) // b)}" for b in args.batches)
    print("\n".join(["", scale, rule, f"updates by batch: {updates}; {len(done)} of {len(cells)} cells, {ran} of them now",
                     *report(found)]))
    result = {**found, "settings": asdict(base), "cells": len(done), "of": len(cells), "seconds": time.perf_counter() - begun,
              "cell_seconds": sum(r["seconds"] for r in done.values()), "versions": versions()}
    (args.out / "result.json").write_text(json.dumps(result, indent=1))
    plot(found, args.out / "conadv.png", f"{len(kept['train'][1])} images, {args.epochs} epochs, {len(done)}/{len(cells)} cells")
    print(f"{result['seconds']:.0f} s, torch {torch.__version__}; see {args.out}/result.json and {args.out}/conadv.png")
    return result


def tune(args: argparse.Namespace, base: Settings, path: Path, images: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Plain LARS at every batch and base rate, one seed of its own, validation accuracy."""
    table: dict[str, Any] = {}
    for lr in args.tune:
        settings = Settings(**{**asdict(base), "lr": lr, "validation": True})
        cells = [Cell("lars", batch, 1000) for batch in args.batches]
        run_all(cells, settings, path, images, **options)
        table[str(lr)] = {c.batch: r["accuracy"] for c, r in read_cells(path, settings).items()}
    print("validation accuracy of plain LARS by base rate (rows) and batch\n" + json.dumps(table, indent=1))
    return table


if __name__ == "__main__":
    main()
