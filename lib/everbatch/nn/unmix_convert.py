"""Batch norms of a model made UnMix-TNS layers, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from everbatch import seeds
from everbatch.errors import check, check_real, check_whole
from everbatch.nn.batch_norms import batch_norms, put_back
from everbatch.nn.unmix import COMPONENTS, Mode, UnMixTNS, momentum_of

__all__ = ["convert_unmix_tns", "made_unmix", "restore_batch_norm", "unmix_layers", "unmix_mode"]

ADDED = ("original", "step", "temperature", "spread", "synchronised", "by_batch", "total_variance", "mode")


def convert_unmix_tns(
    model: nn.Module, num_components: int = 16, *, alpha: float = 0.5, temperature: float = 0.07, batch_size: int = 64,
    batch_size_max: int = 64, dynamic_momentum: bool = False, synchronised: bool = False, total_variance: bool = False,
    balanced: bool = False, exclude: Sequence[str] = (), seed: int = 0,
) -> list[str]:
    """Make every batch norm of `model` an `UnMixTNS` layer that adapts, in place; see there for the equations.

    Layers of torch (1d, 2d, 3d, synchronised) and timm's BatchNormAct change their class and keep their identity, hooks, names,
    weights and source statistics: optimisers that know the parameters go on, a state dict of the source loads (strict=False).
    `restore_batch_norm` undoes it. A layer that is one already is left as it is.

    Args:
        model: with running statistics, in its trained state.
        num_components: K >= 1; 16 for one domain after another, 128 where domains are mixed. One is instance normalisation.
        alpha: share of the source's variance that the first components' means are spread by, in [0, 1].
        temperature: of the softmax over cosines, > 0.
        batch_size: samples of a forward that are to be expected; of all ranks together where `synchronised`.
        batch_size_max: the batch size at which components move by the batch norm's own momentum.
        dynamic_momentum: take each forward's number of samples in place of `batch_size`.
        synchronised: move components by the samples of all ranks.
        total_variance: see `UnMixTNS`.
        balanced: centre and scale the noise of each channel, so that the first components have the source's mean and total
            variance, which independent draws, as published, have in expectation alone: sixteen of them leave every channel off by
            0.18 standard deviations, which a narrow network may not stand.
        exclude: patterns (`layer4.*`) of names to leave out.
        seed: of the noise that sets components apart; the same on every rank and for a layer's name.

    Returns:
        Names of the layers converted.

    Raises:
        NoNormalizationLayers: no batch norm to convert.
        NoSourceStatistics: one without running statistics.
        ValueError: options out of range; a batch norm without shape, split (`convert_split_bn`), made `BatchAdapted` or with a
            forward of its own. Nothing is changed then.

    Cost: 3KC numbers per layer. No collective.
    """
    who = "convert_unmix_tns"
    for name, value in (("num_components", num_components), ("batch_size", batch_size), ("batch_size_max", batch_size_max)):
        check_whole(who, name, value, 1)
    check_real(who, "alpha", alpha, 0.0, 1.0)
    check_real(who, "temperature", temperature, 0.0, open_low=True)
    check(not isinstance(exclude, str), who, f"exclude={exclude!r}", "be a sequence of patterns")
    layers = batch_norms(model, exclude, who)
    for name, layer in layers.items():
        momentum = 0.1 if layer.momentum is None else float(layer.momentum)
        shape = (num_components, layer.num_features)
        noise = torch.randn(shape, generator=seeds.generator(seed, "unmix", name), dtype=torch.float64)
        if balanced and num_components > 1:
            noise -= noise.mean(0)
            noise /= noise.std(0)
        made_unmix(layer, noise, {
            "temperature": temperature, "spread": alpha, "synchronised": synchronised,
            "step": momentum_of(momentum, batch_size, batch_size_max), "mode": "adapt",
            "by_batch": (momentum, batch_size_max) if dynamic_momentum else None, "total_variance": total_variance})
    return list(layers)


def made_unmix(layer: Any, noise: Tensor, settings: Mapping[str, Any]) -> None:
    """Make a batch norm an `UnMixTNS` layer with these settings, whose first components this noise (K, C) sets apart."""
    original = type(layer)
    layer.__class__ = UnMixTNS
    for key, setting in {"original": original, **settings}.items():
        setattr(layer, key, setting)
    device = layer.running_mean.device
    dtype = torch.promote_types(layer.running_mean.dtype, torch.float32)
    for name in ("component_means", "component_vars"):
        layer.register_buffer(name, torch.empty(noise.shape, dtype=dtype, device=device))
    layer.register_buffer("noise", noise.to(device, dtype))
    layer.register_buffer("skipped", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
    layer.reset()


def restore_batch_norm(model: nn.Module) -> list[str]:
    """Undo `convert_unmix_tns`, in place: the original classes, with weights as they are and the source's statistics.

    Returns:
        Names of the layers restored.
    """
    layers = unmix_layers(model)
    for layer in layers.values():
        for name in (*COMPONENTS, "skipped"):
            delattr(layer, name)
        layer._non_persistent_buffers_set.discard("skipped")
        put_back(layer, ADDED)
    return list(layers)


def unmix_layers(model: nn.Module) -> dict[str, UnMixTNS]:
    """The UnMix-TNS layers of a model by their first names."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, UnMixTNS)}


@contextmanager
def unmix_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Inside the block, UnMix-TNS layers of `model` are in this mode: adapt, frozen or source.

    Raises:
        ValueError: another word.
    """
    check(mode in ("adapt", "frozen", "source"), "unmix_mode", f"mode={mode!r}", "be adapt, frozen or source")
    before = [(layer, layer.mode) for layer in unmix_layers(model).values()]
    try:
        for layer, _ in before:
            layer.mode = mode
        yield
    finally:
        for layer, kept in before:
            layer.mode = kept
