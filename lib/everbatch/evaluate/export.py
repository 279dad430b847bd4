"""The trained model as one safetensors file that others load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from everbatch import checkpoint
from everbatch.contract import parts_of
from everbatch.data import Stream
from everbatch.distributed import World
from everbatch.engines.frozen import frozen_of
from everbatch.engines.host import plain_name
from everbatch.evaluate.evaluator import mean_buffers
from everbatch.evaluate.weights import built_as, differs, holds, metadata_texts, sizes_of
from everbatch.nn.adapters import adapters_of
from everbatch.nn.experts_attach import expert_layers, experts_made_of
from everbatch.nn.heads import PartsHead, joined
from everbatch.nn.norm_settings import norm_settings
from everbatch.nn.split_bn import SplitBatchNorm
from everbatch.optim.mixin import OptimizerMixin
from everbatch.rows import Rows
from everbatch.version import __version__

__all__ = ["export", "whole_state"]


class Exports(Protocol):
    """What an export needs of a trainer."""

    optimizer: OptimizerMixin
    module: nn.Module
    world: World
    step: int

    @property
    def stream(self) -> Stream | None: ...

    def inputs_of(self, raw: Rows) -> Rows: ...


@torch.no_grad()
def whole_state(trainer: Exports, *, parts: bool = False) -> dict[str, Tensor]:
    """The bare model's state dict on every rank: masters of trained parameters (fp32 also where the model computes in bf16),
    frozen parameters and persistent buffers (floating ones: their mean over ranks); what is tied under each of its names. Of
    layers that `convert_split_bn` split, the main branch, which is what predicts; a `PartsHead` as one linear layer, unless
    `parts` says that it stays.
    Collective: one all-reduce per sharded tensor."""
    host, module = trainer.optimizer.host, trainer.module
    state = dict(host.gather(list(host.weights()), host.names)) | frozen_of(module)
    first = {id(p): plain_name(name) for name, p in module.named_parameters()}
    for name, p in module.named_parameters(remove_duplicate=False):
        if plain_name(name) not in state:
            state[plain_name(name)] = state[first[id(p)]].clone()
    passing = {f"{path}.{name}".lstrip(".") for path, part in module.named_modules(remove_duplicate=False)
               for name in part._non_persistent_buffers_set}
    with mean_buffers(module, trainer.world):
        state |= {plain_name(name): b.clone() for name, b in module.named_buffers(remove_duplicate=False) if name not in passing}
    for path, part in _heads(module).items() if not parts else ():
        state |= joined(part, state, path)
    split = tuple(f"{plain_name(path)}.branches." if path else "branches." for path, part in module.named_modules()
                  if isinstance(part, SplitBatchNorm))
    return {name: value.detach().cpu() for name, value in state.items() if not name.startswith(split)}


def _heads(module: nn.Module) -> dict[str, PartsHead]:
    return {plain_name(path): part for path, part in module.named_modules() if isinstance(part, PartsHead)}


def export(
    trainer: Exports, path: str | Path, metadata: Mapping[str, Any] | None = None, *, parts: bool = False,
) -> Path:
    """Write `whole_state` to one safetensors file, atomically, from rank 0. The names are those of the bare model, so timm and
    `load_state_dict` take it as it is, and `everbatch.train.load_model` rebuilds the model from it. To write averaged weights:
    `with opt.averaged(): ...`.

    Args:
        metadata: what the file says of itself, over what the trainer knows: class names in the order of the outputs, input size,
            step, version, and name and options of a timm model. Texts as they are, all else as JSON. "mean", "std" and "scale"
            are `prepare`'s own, and only the caller knows them.
        parts: keep heads in parts under their own names, to go on growing from the file: "conversion" says what they are made
            of, and `load_model` puts them into the model. By default they are joined into one linear layer.

    Of batch norms that were converted (`convert_unmix_tns`, `adapt_batch_norm`) "normalisation" holds the settings, and whose
    components the file has: rank 0's, no mean over ranks. `load_model` converts them again.

    Of a network with adapters the file has the live ones under their names, and "adapters" says what they are made of; what a
    method keeps beside the network, such as the archive of `everbatch.train.MOS`, goes with it, and `load_model` predicts by it.

    Of layers with experts (`attach_experts`) "experts" holds what they are made of; `load_model` puts them in again.

    Of a model that has grown the file holds "growths". Where it has grown by more than a head, so that timm's model or
    `SmallConv` cannot hold it, "base" names that model in place of "model", and `load_model` needs `build`; so it does for a
    model that computes otherwise than that of its name, in an activation or a stride say, which "differs" tells.

    Raises:
        RuntimeError: the disk refused; an older file is untouched.

    Collective. Cost: `whole_state` and the file.
    """
    state = whole_state(trainer, parts=parts)
    if trainer.world.rank == 0:
        known, given = _known(trainer), dict(metadata or {})
        given["options"] = {**known.get("options", {}), **given.get("options", {})}
        told = {**known, **given}
        heads = _heads(trainer.module) if parts else {}
        told |= {"conversion": {name: head.made_of for name, head in heads.items()}} if heads else {}
        told |= _normalisation(trainer.module, trainer.world)
        adapters = list(adapters_of(trainer.module).values())
        told |= {"adapters": adapters[0].made_of} if adapters else {}
        beside: dict[str, Tensor] = {}
        for part in parts_of(type(trainer)):
            tensors, about = getattr(part, "exported", lambda _: ({}, {}))(trainer)
            beside, told = beside | tensors, told | about
        layers = {plain_name(name): experts_made_of(layer) for name, layer in expert_layers(trainer.module).items()}
        told |= {"experts": layers} if layers else {}
        if "growths" in told and "model" in told and not holds(told, state):
            told["base"] = told.pop("model")
        elif "model" in known and "model" not in given:
            told = _unless_unlike(told, trainer.module)
        checkpoint.export_weights(path, state | beside, metadata_texts(told))
    trainer.world.barrier()
    return Path(path)


def _unless_unlike(told: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """What is said of a model, with the options that give it again; of one that no name gives again, only what it is like."""
    why, sizes = differs(told, module), sizes_of(module)
    if not why:
        return told
    sized = told | {"options": {**told.get("options", {}), **sizes}}
    if sizes and not differs(sized, module):
        return sized
    rest = {key: value for key, value in told.items() if key != "model"}
    return rest | {"base": told["model"], "differs": why}


def _normalisation(module: nn.Module, world: World) -> dict[str, Any]:
    """How batch norms were converted, and whose components the file has."""
    layers = {plain_name(name): settings for name, settings in norm_settings(module).items()}
    shared = all(settings["synchronised"] for settings in layers.values())
    whose = "all ranks, which have the same" if shared and world.size > 1 else "rank 0"
    return {"normalisation": {"layers": layers, "components_of": whose}} if layers else {}


def _known(trainer: Exports) -> dict[str, Any]:
    """What the trainer can say of its model by itself."""
    known: dict[str, Any] = {"format": "pt", "everbatch_version": __version__, "step": trainer.step, **built_as(trainer.module)}
    growths = getattr(trainer, "growths", [])
    known |= {"growths": growths} if growths else {}
    if trainer.stream is not None:
        sample = trainer.inputs_of(trainer.stream.fetch(trainer.stream.tasks[0].test_ids[:1]))
        heads = [head.out_features for head in _heads(trainer.module).values()]
        known["classes"] = list(trainer.stream.classes)[: max(heads, default=None)]
        if isinstance(sample, Tensor):
            if "options" in known:
                known["options"].setdefault("in_chans", sample.shape[1])
            known["input_size"] = list(sample.shape[1:])
    return known
