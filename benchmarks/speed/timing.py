"""Fair step times on a shared machine: all arms in one run, in alternating blocks, one thread per process."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["conv_net", "deepspeed_engine", "images", "measure", "paired", "ratios"]


def conv_net(seed: int = 0, width: int = 32, classes: int = 10) -> nn.Module:
    """A compute-bound net for 32x32 colour images: four convolutions with BatchNorm, about 0.25 M parameters at width 32."""
    torch.manual_seed(seed)

    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    return nn.Sequential(*block(3, width), *block(width, 2 * width), nn.MaxPool2d(2), *block(2 * width, 4 * width),
                         nn.MaxPool2d(2), *block(4 * width, 4 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4 * width, classes))


def images(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One batch of noise: time does not depend on what is in it."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 32, 32, generator=g), torch.randint(0, 10, (batch,), generator=g)


def deepspeed_engine(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int, micro: int) -> Any:
    """A ZeRO engine in fp32 with nothing of its own (no clipping, no printing)."""
    import deepspeed

    from everbatch.config import deepspeed_config

    config = deepspeed_config(micro_batch=micro, stage=stage, world_size=dist.get_world_size())
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def measure(arms: Mapping[str, Callable[[], Any]], *, blocks: int, steps: int, discard: int = 2) -> dict[str, list[float]]:
    """Seconds per step of each arm: `blocks` blocks of `steps` steps each, arms in turn, the first `discard` steps of every block
    not counted (cold caches make a fresh arm look slow)."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for block in range(blocks):
        order = list(arms) if block % 2 == 0 else list(arms)[::-1]
        for name in order:
            for _ in range(discard):
                arms[name]()
            if dist.is_initialized():
                dist.barrier()
            started = time.perf_counter()
            for _ in range(steps):
                arms[name]()
            times[name].append((time.perf_counter() - started) / steps)
    return times


def ratios(times: Mapping[str, list[float]], base: str) -> list[dict[str, Any]]:
    """Per arm: seconds (least, median, largest block), and the ratios of the least and of the medians to the base arm's."""
    least, middle = min(times[base]), statistics.median(times[base])
    load = os.getloadavg()[0]
    return [{"arm": name, "seconds_min": min(t), "seconds_median": statistics.median(t), "seconds_max": max(t),
             "ratio_of_minima": min(t) / least, "ratio_of_medians": statistics.median(t) / middle, "blocks": len(t),
             "load_average": load, "seconds": t} for name, t in times.items()]


def paired(times: Sequence[float], base: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median over the blocks of an arm's time to its base's of the same round, and a 95 % bootstrap interval of that median. A
    machine that others slow for seconds at a time slows both of a pair, but not half the blocks of either."""
    found = np.array(times) / np.array(base)
    drawn = np.random.default_rng(seed).choice(found, (2000, len(found)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(np.median(found)), float(low), float(high)
