"""Forward time of UnMix-TNS against batch statistics and against the released form, in one run.

python benchmarks/speed/unmix.py [--rounds 50] [--json FILE]

Layers of three sizes and timm's resnet18 at 32 and 224 pixels, without gradients, in evaluation as a served model runs.
Limits: resnet18 at most 1.2x batch statistics at 224 pixels and 1.5x at 32; a layer of 64 x 32 x 32 at most 1.1x; at least
1.3x faster than the released form, which holds a tensor of samples x components x channels, everywhere. Medians of the
ratios within a round, with 95 % bootstrap intervals. One thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from timing import measure, paired

from everbatch.nn import UnMixTNS, convert_unmix_tns
from everbatch.report.recorder import versions

CASES = {
    "layer 64 x 32 x 32, 16 samples": ((16, 64, 32, 32), 1.1),
    "layer 256 x 8 x 8, 16 samples": ((16, 256, 8, 8), None),
    "resnet18, 32 pixels, 16 samples": ((16, 3, 32, 32), 1.5),
    "resnet18, 32 pixels, 64 samples": ((64, 3, 32, 32), 1.5),
    "resnet18, 224 pixels, 1 sample": ((1, 3, 224, 224), 1.2),
    "resnet18, 224 pixels, 16 samples": ((16, 3, 224, 224), 1.2),
}
"""Shape of the input, and the limit against batch statistics."""


class Released(UnMixTNS):
    """The published form of the same layer."""

    def _unmixed(self, input: Tensor) -> Tensor:
        var, mean = torch.var_mean(input, dim=(2, 3), unbiased=False)
        mu, s = self.component_means, self.component_vars
        with torch.no_grad():
            p = self.assignments(mean)[..., None]
        mixed = (1 - p) * mu + p * mean[:, None]
        spread = (1 - p) * s + p * var[:, None]
        middle = mixed.mean(1)
        total = spread.mean(1) + mixed.square().mean(1) - middle.square()
        y = (input - middle[..., None, None]) / (total[..., None, None] + self.eps).sqrt()
        with torch.no_grad():
            self.component_means.add_(self.step * (p * (mean[:, None] - mu)).mean(0))
            self.component_vars.add_(self.step * (p * (var[:, None] - s)).mean(0))
        assert self.weight is not None and self.bias is not None
        return y * self.weight[:, None, None] + self.bias[:, None, None]


def arms(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """One forward of each form, on the same input and weights."""
    torch.manual_seed(0)
    whole = shape[1] == 3
    source: nn.Module = timm.create_model("resnet18", num_classes=10) if whole else nn.Sequential(nn.BatchNorm2d(shape[1]))
    x = torch.randn(shape)
    ours = copy.deepcopy(source).eval()
    convert_unmix_tns(ours)
    theirs = copy.deepcopy(ours)
    for layer in theirs.modules():
        if isinstance(layer, UnMixTNS):
            layer.__class__ = Released
    batch = source.train()  # batch statistics
    return {"batch statistics": lambda: batch(x), "UnMix-TNS": lambda: ours(x), "released form": lambda: theirs(x)}


@torch.no_grad()
def measured(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Times of one case."""
    found = arms(shape)
    if shape[1] == 3:
        difference = (found["UnMix-TNS"]() - found["released form"]()).abs().max().item()
        assert difference < 1e-2, f"the two forms differ by {difference}"
    times = measure(found, blocks=rounds, steps=2, discard=1)
    return {"seconds": {name: sorted(t)[len(t) // 2] for name, t in times.items()},
            "of_batch_statistics": paired(times["UnMix-TNS"], times["batch statistics"]),
            "released_of_ours": paired(times["released form"], times["UnMix-TNS"])}


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (shape, limit) in CASES.items():
        row = {"case": name, "limit": limit, "load": os.getloadavg()[0], **measured(shape, args.rounds)}
        rows.append(row)
        (middle, low, high), (gain, least, most) = row["of_batch_statistics"], row["released_of_ours"]
        told = "" if limit is None else f" (limit {limit}: {'met' if middle <= limit else 'NOT met'})"
        print(f"{name:<34} {middle:5.2f} [{low:.2f}, {high:.2f}] of batch statistics{told}; released form {gain:.2f} "
              f"[{least:.2f}, {most:.2f}] of ours (limit 1.3: {'met' if gain >= 1.3 else 'NOT met'}); "
              f"{1e3 * row['seconds']['UnMix-TNS']:.2f} ms, load {row['load']:.1f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"rounds": args.rounds, "rows": rows, "versions": versions()}, indent=1))


if __name__ == "__main__":
    main()
