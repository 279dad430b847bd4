"""How many weights each layer keeps: densities by layer, exact counts, and the first masks. Pure functions, no collectives."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from everbatch import seeds
from everbatch.errors import check, check_real, nearest

__all__ = ["Shapes", "draw_mask", "erdos_renyi", "exact_counts", "layer_densities", "uniform"]

Shapes = Mapping[str, Sequence[int]]
"""Shape (out, in, *kernel) of every layer's weight by name, in the model's order."""


def uniform(shapes: Shapes, density: float, *, first_dense: bool = False) -> dict[str, float]:
    """The same density for every layer; with `first_dense` the first layer is dense, unless it is the only one.

    Source: Evci et al. 2020, arXiv 1911.11134, "uniform" (first layer dense); ITOP and CL-DST keep the first layer sparse.
    """
    _check_density(density)
    names = list(shapes)
    dense = names[:1] if first_dense and len(names) > 1 else []
    return {name: 1.0 if name in dense else density for name in names}


def erdos_renyi(
    shapes: Shapes, density: float, *, kernel: bool = True, power: float = 1.0, whole_zeros: bool = False,
) -> dict[str, float]:
    """Erdos-Renyi densities with the dense-layer fix point.

        raw_l = (sum of all dimensions / product of all dimensions)^power            kernel=True  (ERK)
        raw_l = ((in + out) / (in * out))^power                                      kernel=False (ER)
        D = {};  repeat  eps = [sum_{l not in D} ones_l - sum_{l in D} zeros_l] / sum_{l not in D} raw_l N_l
                 add to D every layer that attains max raw_l while eps * max raw_l > 1
        d_l = 1 in D, eps * raw_l elsewhere;  ones_l = d N_l, zeros_l = (1 - d) N_l

    Then sum d_l N_l = d * sum N_l. Swapping dimensions of a layer changes nothing. At most one round per layer.

    Args:
        shapes: (out, in, *kernel) by layer.
        density: d, in (0, 1]; 1 gives all ones.
        power: exponent of the raw value; > 0.
        whole_zeros: zeros_l = floor((1 - d) N_l), as Google's code counts.

    Raises:
        ValueError: a density or power out of range, or no layer would be left sparse.

    Source: Mocanu et al. 2018 (ER); Evci et al. 2020, arXiv 1911.11134 (ERK), and its code.
    """
    _check_density(density)
    check_real("erdos_renyi", "power", power, 0.0, open_low=True)
    if density == 1.0 or not shapes:
        return dict.fromkeys(shapes, 1.0)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    zeros = {name: math.floor((1.0 - density) * n) if whole_zeros else (1.0 - density) * n for name, n in size.items()}
    ones = {name: n - zeros[name] if whole_zeros else density * n for name, n in size.items()}
    raw = {name: _raw(shape, kernel) ** power for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        sparse = [name for name in shapes if name not in dense]
        check(bool(sparse), "erdos_renyi", f"density={density!r} makes every layer dense",
              "leave at least one layer sparse", "pass density=1, or a smaller density")
        budget = sum(ones[name] for name in sparse) - sum(zeros[name] for name in dense)
        scale = budget / sum(raw[name] * size[name] for name in sparse)
        peak = max(raw[name] for name in sparse)
        if scale * peak <= 1.0:
            return {name: 1.0 if name in dense else scale * raw[name] for name in shapes}
        dense.update(name for name in sparse if raw[name] == peak)


def layer_densities(
    shapes: Shapes, density: float, *, distribution: str = "erk", power: float = 1.0, first_dense: bool = False,
    own: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Density of every layer: `own` ones where a pattern of it fits the name, the distribution at `density` for the rest.

    Args:
        distribution: "erk", "er" or "uniform"; `first_dense` is of "uniform", `power` of the other two.
        own: density by name or pattern (`fnmatch`: "*", "?"); the first pattern that fits counts.

    Raises:
        ValueError: a density outside (0, 1], or a pattern that fits no layer.
    """
    check(distribution in ("erk", "er", "uniform"), "layer_densities", f"distribution={distribution!r}",
          "be 'erk', 'er' or 'uniform'")
    given: dict[str, float] = {}
    for pattern, value in (own or {}).items():
        check_real("densities", pattern, value, 0.0, 1.0, open_low=True)
        hit = [name for name in shapes if fnmatch.fnmatchcase(name, pattern)]
        check(bool(hit), "densities", f"{pattern!r} fits no layer", "fit the name of a layer", nearest(pattern, shapes))
        given = {**dict.fromkeys(hit, value), **given}
    rest = {name: shape for name, shape in shapes.items() if name not in given}
    spread = uniform(rest, density, first_dense=first_dense and list(shapes)[:1] == list(rest)[:1]) \
        if distribution == "uniform" else erdos_renyi(rest, density, kernel=distribution == "erk", power=power)
    return {name: given[name] if name in given else spread[name] for name in shapes}


def exact_counts(shapes: Shapes, densities: Mapping[str, float], *, min_fan_in: bool = False) -> dict[str, int]:
    """Active entries of each layer: n_l = d_l N_l rounded so that the total is right (largest remainder).

    The total is round(sum d_l N_l). Every layer keeps at least 1 entry, or with `min_fan_in` one per output row, which may
    raise the total. Equal remainders go to the earlier layer.
    """
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    least = {name: min(size[name], shape[0] if min_fan_in else 1) for name, shape in shapes.items()}
    wanted = {name: densities[name] * size[name] for name in shapes}
    counts = {name: min(max(math.floor(wanted[name]), least[name]), size[name]) for name in shapes}
    total = min(max(round(math.fsum(wanted.values())), sum(least.values())), sum(size.values()))
    while sum(counts.values()) != total:
        up = sum(counts.values()) < total
        free = [n for n in shapes if (counts[n] < size[n] if up else counts[n] > least[n])]
        # A layer that is above its share gives first, one that is below it takes first.
        ordered = sorted(free, key=lambda n: counts[n] - wanted[n], reverse=not up)
        for name in ordered[: abs(total - sum(counts.values()))]:
            counts[name] += 1 if up else -1
    return counts


def draw_mask(
    shape: Sequence[int], count: int, key: tuple[int | str, ...], *, density: float | None = None, min_fan_in: bool = False,
) -> Tensor:
    """A random mask of exactly `count` active entries, a function of `key` alone: bool, CPU, `shape`.

    Every entry has a stateless uniform key; the `count` smallest are active. With `min_fan_in` each output row has its
    smallest key active first (`count` >= rows). With `density` each entry is active with that probability instead,
    independently, as the ITOP and CL-DST code does: the count then varies.

    Cost: 8 bytes per entry of this one layer, for a moment; no communication, so each rank slices the same mask.
    """
    size = math.prod(shape)
    keys = seeds.uniform_keys(np.arange(size, dtype=np.int64), *key)
    if density is not None:
        return torch.from_numpy(keys < density).view(*shape)
    mask = np.zeros(size, dtype=bool)
    if min_fan_in:
        row = size // shape[0]
        mask[np.arange(shape[0]) * row + keys.reshape(shape[0], row).argmin(1)] = True
        keys[mask] = 2.0
        count -= shape[0]
    if count:
        mask[np.argpartition(keys, count - 1)[:count]] = True
    return torch.from_numpy(mask).view(*shape)


def _raw(shape: Sequence[int], kernel: bool) -> float:
    dims = tuple(shape) if kernel else tuple(shape[:2])
    return sum(dims) / math.prod(dims)


def _check_density(density: float) -> None:
    check_real("densities", "density", density, 0.0, 1.0, open_low=True, cure="pass density=1 to switch sparsity off")
