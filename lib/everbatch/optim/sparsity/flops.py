"""What sparse training and inference would cost: floating-point operations and parameters, counted, not measured.

Unstructured masks make no dense kernel faster; these are the numbers papers report. Measure time separately.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from everbatch.errors import check
from everbatch.optim.sparsity.layers import weight_modules

__all__ = ["Account", "account", "layer_flops"]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Account:
    """Costs per sample. FLOPs are 2 * multiply-accumulates.

        dense = sum_l f_l + rest      sparse = sum_l d_l f_l + rest
    """

    layers: dict[str, float]
    """Dense forward FLOPs f_l of each layer that can be masked."""
    rest: float
    """Forward FLOPs that no mask touches (attention products, layers that are not masked)."""
    densities: dict[str, float]
    parameters: int
    """All parameters, buffers not among them."""
    active: int
    """Parameters that are left: round(d_l N_l) of each layer, and all others."""

    @property
    def dense(self) -> float:
        """Forward FLOPs of the dense model."""
        return sum(self.layers.values()) + self.rest

    @property
    def sparse(self) -> float:
        """Forward FLOPs of the masked model."""
        return sum(self.densities.get(n, 1.0) * f for n, f in self.layers.items()) + self.rest

    @property
    def inference_ratio(self) -> float:
        """sparse / dense."""
        return self.sparse / self.dense

    def training(self, method: str, interval: int = 100) -> float:
        """Training FLOPs per sample, a backward counted as two forwards.

            dense:        3 f_D
            static, set:  3 f_S
            snfs:         2 f_S + f_D                                           (dense gradient in every step)
            rigl:         (3 f_S interval + 2 f_S + f_D) / (interval + 1)       (dense gradient at updates)

        Source: Evci et al. 2020, arXiv 1911.11134, appendix on FLOPs.
        """
        dense, sparse = self.dense, self.sparse
        table = {"dense": 3 * dense, "static": 3 * sparse, "set": 3 * sparse, "snfs": 2 * sparse + dense,
                 "rigl": (3 * sparse * interval + 2 * sparse + dense) / (interval + 1)}
        check(method in table, "Account.training", f"method={method!r}", f"be one of {', '.join(table)}")
        check(interval >= 1, "Account.training", f"interval={interval!r}", "be >= 1")
        return table[method]

    def training_ratio(self, method: str, interval: int = 100) -> float:
        """training(method) / training("dense")."""
        return self.training(method, interval) / self.training("dense")


def account(
    model: nn.Module, inputs: Any, densities: Mapping[str, float], forward: Callable[[Any], Any] | None = None,
) -> Account:
    """Count one forward of `model` and what `densities` would leave of it.

    Args:
        model: any device; on "meta" nothing is computed and no weight is needed.
        inputs: one batch, on the model's device; figures are per sample (dimension 0).
        densities: by weight name, as `DynamicSparsity.densities()` or `layer_densities` give them; absent: dense.
        forward: how to run the model; default `model(inputs)`.

    Raises:
        ValueError: a density of a parameter that is no layer's weight.
    """
    layers, total, batch = _count(model, inputs, forward)
    known = weight_modules(model)
    odd = [n for n in densities if n not in known]
    check(not odd, "account", f"densities of {odd[:5]}", "be of weights of layers of this model")
    parameters = sum(p.numel() for p in model.parameters())
    size = {n: p.numel() for n, p in model.named_parameters()}
    dropped = sum(size[n] - round(d * size[n]) for n, d in densities.items())
    return Account({n: f / batch for n, f in layers.items()}, (total - sum(layers.values())) / batch, dict(densities),
                   parameters, parameters - dropped)


def layer_flops(model: nn.Module, inputs: Any, forward: Callable[[Any], Any] | None = None) -> dict[str, float]:
    """Forward FLOPs per sample of each linear and convolution layer, by the name of its weight."""
    layers, _, batch = _count(model, inputs, forward)
    return {n: f / batch for n, f in layers.items()}


@torch.no_grad()
def _count(model: nn.Module, inputs: Any, forward: Callable[[Any], Any] | None) -> tuple[dict[str, float], float, int]:
    """FLOPs of the layers, and of everything, for a whole batch."""
    layers: dict[str, float] = {}
    handles = []
    for name, module in weight_modules(model).items():
        if name.endswith("in_proj_weight") or not isinstance(getattr(module, "weight", None), Tensor):
            continue  # computed inside a fused attention; part of the rest

        def meet(module: nn.Module, given: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            if isinstance(module, nn.Linear):
                places = output.numel() / output.shape[-1]  # each applies the whole weight once
            elif isinstance(module, TRANSPOSED):
                places = given[0].numel() / given[0].shape[1]
            else:
                places = output.numel() / output.shape[1]
            layers[name] = layers.get(name, 0.0) + 2.0 * places * weight.numel()

        handles.append(module.register_forward_hook(meet))
    from torch.utils.flop_counter import FlopCounterMode  # here: it imports triton, and every recipe imports this file

    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with FlopCounterMode(display=False) as counter:
            (forward or model)(inputs)
    finally:
        for part, training in modes:
            part.training = training
        for handle in handles:
            handle.remove()
    first = inputs if isinstance(inputs, Tensor) else next(t for t in inputs if isinstance(t, Tensor))
    return layers, float(counter.get_total_flops()), first.shape[0]
