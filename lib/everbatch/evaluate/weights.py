"""Weights taken home: what a model.safetensors says of itself, and the model rebuilt from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from everbatch.errors import CheckpointMismatch
from everbatch.evaluate.likeness import unlike
from everbatch.nn import PartsHead, Retriever, SmallConv, attach_adapters, attach_experts
from everbatch.nn.norm_settings import converted_again

__all__ = ["built_as", "differs", "holds", "load_model", "metadata_texts", "model_info",
           "sizes_of"]

BESIDE = "retrieval."
"""What the names of tensors begin with that are of a `Retriever`, and not of its network."""
JSON_KEYS = ("classes", "options", "input_size", "mean", "std", "scale", "step", "growths", "conversion", "normalisation",
             "adapters", "retrieval", "experts")


def metadata_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as a safetensors file holds it: texts as they are, everything else as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def built_as(model: nn.Module) -> dict[str, Any]:
    """Name and options that build a model like this one: of timm, or `SmallConv`; empty for any other."""
    if isinstance(model, SmallConv):
        first: Any = model.features[0]
        sides = model.features[6].in_features // first.out_channels // 2
        return {"model": "small_conv", "options": {
            "in_chans": first.in_channels, "num_classes": model.head.out_features, "image_size": 2 * round(sides**0.5),
            "width": first.out_channels}}
    config: Any = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    if not name:
        return {}
    classifier: Any = getattr(model, "get_classifier", None)
    head = classifier() if callable(classifier) else None  # which a user may have put there
    classes = head.out_features if isinstance(head, nn.Linear) else getattr(model, "num_classes", None)
    options = {"num_classes": classes, "in_chans": getattr(model, "in_chans", None)}
    options["img_size"] = _listed(getattr(getattr(model, "patch_embed", None), "img_size", None))
    return {"model": name, "options": {key: value for key, value in options.items() if value is not None}}


def sizes_of(model: nn.Module) -> dict[str, Any]:
    """Sizes of a vision transformer that its name does not say where they were given."""
    embed, blocks = getattr(model, "patch_embed", None), getattr(model, "blocks", None)
    if embed is None or not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
        return {}
    found = {"patch_size": _listed(getattr(embed, "patch_size", None)), "depth": len(blocks),
             "embed_dim": getattr(model, "embed_dim", None),
             "num_heads": getattr(getattr(blocks[0], "attn", None), "num_heads", None),
             "dynamic_img_size": getattr(model, "dynamic_img_size", None) or None,
             "dynamic_img_pad": getattr(embed, "dynamic_img_pad", None) or None}
    return {key: value for key, value in found.items() if value is not None}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def model_info(path: str | Path) -> dict[str, Any]:
    """The metadata of a weights file that `Trainer.export` or a recipe wrote, as far as it says them: classes in the order of the
    outputs, model, options, input_size (C, H, W), mean, std, scale (what raw pixels are divided by first), everbatch_version.

    Raises:
        CheckpointMismatch: not a safetensors file, or entries that are not JSON.
    """
    try:
        with safe_open(path, framework="pt") as file:
            texts = dict(file.metadata() or {})
        return {key: json.loads(text) if key in JSON_KEYS else text for key, text in texts.items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointMismatch(f"{path}: is not a weights file that can be read: {error}") from error


def load_model(path: str | Path, *, build: Callable[[dict[str, Any]], nn.Module] | None = None) -> nn.Module:
    """The model in a weights file, rebuilt with its head and every weight and buffer, in evaluation mode, on the CPU. Batch norms
    that were converted are so again: UnMix-TNS layers go on from the components in the file, and with every forward.
    With its adapters; of a run of `everbatch.train.MOS` with all of them, a `everbatch.nn.Retriever`, which predicts as the
    trainer did.

    Args:
        path: model.safetensors of a recipe, or what `Trainer.export` wrote.
        build: makes the bare model from `model_info(path)`; by default timm does, or `SmallConv`, from name and options.

    Raises:
        CheckpointMismatch: a file that says no model, or whose weights do not fit it.
        ImportError: the model is timm's and timm is not installed.
    """
    info = model_info(path)
    try:
        model = _rebuilt(path, info, build)
        state = load_file(path)
        beside = {name.removeprefix(BESIDE): state.pop(name) for name in list(state) if name.startswith(BESIDE)}
        model.load_state_dict(state)
        if "retrieval" in info:
            settings: dict[str, Any] = info["retrieval"]
            model = Retriever(model, beside["archive"], beside["prototypes"], **settings)
    except (RuntimeError, TypeError, AttributeError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointMismatch):
            raise
        what = f"{info.get('model')} with options {info.get('options')}"
        raise CheckpointMismatch(f"{path}: its weights do not fit {what}: {' '.join(str(error).split())}") from error
    return model.eval()


def differs(info: Mapping[str, Any], model: nn.Module) -> str:
    """What shows that the model of the metadata is not like this one, in words; "" where nothing does. Cost: its skeleton."""
    bare = _skeleton(info)
    return "it cannot be built by its name" if bare is None else unlike(model, bare)


def holds(info: Mapping[str, Any], state: Mapping[str, Tensor]) -> bool:
    """Whether the model that the metadata name has weights of these names and shapes. Cost: its skeleton, and no memory where
    it can be built on the meta device."""
    model = _skeleton(info)
    own = {} if model is None else {name: value.shape for name, value in model.state_dict().items()}
    return own == {name: value.shape for name, value in state.items()}


def _skeleton(info: Mapping[str, Any]) -> nn.Module | None:
    """The model that the metadata name, without memory where that can be; None: it cannot be built."""
    told = dict(info)
    wrong = (ImportError, RuntimeError, TypeError, AttributeError, ValueError)  # NotImplementedError is a RuntimeError
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return _rebuilt("this export", told)
        except wrong:  # it looks at a value while it is built, or cannot be built
            try:
                return _rebuilt("this export", told)
            except wrong:
                return None


def _rebuilt(path: str | Path, info: dict[str, Any], build: Callable[[dict[str, Any]], nn.Module] | None = None) -> nn.Module:
    """The model that the metadata name, with heads in parts where they say so."""
    model = _build(path, info) if build is None else build(info)
    for name, made_of in info.get("conversion", {}).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, PartsHead(**made_of))
    for name, made_of in info.get("experts", {}).items():
        attach_experts(model, (name,), **made_of)
    converted_again(model, info.get("normalisation", {}).get("layers", {}))
    if "adapters" in info:
        attach_adapters(model, **info["adapters"])
    return model


def _build(path: str | Path, info: dict[str, Any]) -> nn.Module:
    name, options = info.get("model"), info.get("options", {})
    if name is None and info.get("growths"):
        raise CheckpointMismatch(f"{path}: is of a model that has grown, by {info['growths']}; pass "
                                 "build=lambda info: grown(info['growths']), with the factory that the trainer had")
    if name is None and "base" in info:
        raise CheckpointMismatch(f"{path}: is of a model like {info['base']}, but {info.get('differs')}; pass build=lambda info: "
                                 "your_model(), or export with metadata={'model': name, 'options': {...}}")
    if name is None:
        raise CheckpointMismatch(f"{path}: does not say what model it is of; pass build=, or export with "
                                 "metadata={'model': name, 'options': {...}}")
    if name == "small_conv":
        return SmallConv(**options)
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{path}: timm, whose {name} it is, is not installed; pip install everbatch[vision]") from error
    if not timm.is_model(name):
        raise CheckpointMismatch(f"{path}: says it is of {name!r}, which this timm does not know; pass build=")
    fixed = getattr(timm.get_pretrained_cfg(name, allow_unregistered=True), "fixed_input_size", False)
    size = {"img_size": info["input_size"][-1]} if fixed and "img_size" not in options and "input_size" in info else {}
    try:
        return timm.create_model(name, pretrained=False, **options, **size)
    except TypeError as error:  # a size that it has and does not take
        if not size or "'img_size'" not in str(error):
            raise
    return timm.create_model(name, pretrained=False, **options)
