"""Whether timm's pretrained weights are on this machine, where to load them from without asking the network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from everbatch.errors import check

__all__ = ["cached_weights", "check_cached"]

FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
"""What a repository of Hugging Face's hub calls a model's weights."""


def cached_weights(name: str) -> Path | None:
    """The file in the local caches of Hugging Face's hub and torch's that timm would load for a model, None where there is none.
    Nothing is asked of the network.

    Args:
        name: as timm has it, such as "vit_base_patch16_224.augreg_in21k".
    """
    import timm

    config: Any = timm.get_pretrained_cfg(name, allow_unregistered=True)
    found = None
    if config is not None and config.file:
        found = Path(config.file)
    elif config is not None and config.hf_hub_id:
        found = _of_hub(str(config.hf_hub_id), config.hf_hub_filename)
    if found is None and config is not None and config.url and not config.url.endswith(".npz"):
        found = Path(torch.hub.get_dir()) / "checkpoints" / Path(config.url).name
    return found if found is not None and found.is_file() else None


def _of_hub(repository: str, file: str | None) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    where, _, revision = repository.partition("@")
    for one in [file] if file else FILES:
        path = try_to_load_from_cache(where, one, revision=revision or None)
        if isinstance(path, str):
            return Path(path)
    return None


def check_cached(name: str, instead: str) -> None:
    """Raise unless the weights are in a local cache.

    Raises:
        ValueError: naming the model, where weights are looked for, and what to do `instead`.
    """
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    check(cached_weights(name) is not None, "model", f"pretrained=true, and the weights of {name!r} are not on this machine",
          f"be in the cache of Hugging Face's hub ({home}) or of torch ({torch.hub.get_dir()}); this recipe downloads nothing",
          f"bring them there, {instead}")
