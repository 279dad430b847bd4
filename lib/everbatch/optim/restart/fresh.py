"""Fresh initialisations of a model that is in use: from a factory, or from every module's own `reset_parameters`."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everbatch import seeds
from everbatch.engines.host import plain_name

__all__ = ["digest", "fresh_model", "normalisers", "private_stream", "redraw", "without_initialiser"]

SLOTS = frozenset(vars(nn.Module()))
"""What torch keeps in every module."""
NORMALISERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@contextmanager
def private_stream(*key: int | str) -> Iterator[None]:
    """The global CPU streams of torch, numpy and Python seeded with `key` inside the block, and as they were after it.

    New tensors are made on the CPU inside the block. Generators of devices are not touched.
    """
    seed = seeds.derive(*key)
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002  # a factory may use the legacy stream
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds devices as well
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])  # noqa: NPY002


def fresh_model(factory: Callable[[], nn.Module], *key: int | str) -> nn.Module:
    """A model from `factory` under random streams seeded with `key`; the global streams are left as they were."""
    with private_stream(*key):
        return factory()


def redraw(module: nn.Module, layout: Mapping[str, tuple[torch.dtype, torch.Size]], *key: int | str) -> dict[str, Tensor]:
    """New draws of the parameters in `layout` by their modules' own `reset_parameters`, whole, on the CPU, by bare name.

    Each module is copied with its children, given empty parameters of the whole shape, and reset: the live module, which an
    engine may have sharded, is only looked at. What it does to its children is dropped, since they are asked themselves.
    Modules go in the model's order under one stream seeded with `key`, so a model whose constructor does nothing else draws as
    a new one does. Modules without `reset_parameters` are left out.

    Cost: one whole copy of a module's parameters at a time, its children's included, plus those returned.
    """
    known = _names(module)
    draws: dict[str, Tensor] = {}
    with private_stream(*key), torch.no_grad():
        for part in module.modules():
            own = {n: known[id(p)] for n, p in part._parameters.items() if p is not None}
            if not _resettable(part) or not any(name in layout for name in own.values()):
                continue
            twin = _twin(part, known, layout, {})
            twin.reset_parameters()  # type: ignore[operator]
            draws.update({name: twin._parameters[n].detach() for n, name in own.items() if name in layout})  # type: ignore[union-attr]
    return draws


def _twin(part: nn.Module, known: Mapping[int, str], layout: Mapping[str, tuple[torch.dtype, torch.Size]],
          twins: dict[int, Any]) -> nn.Module:
    """A copy with parameters and buffers of its own, and so are its children, which `reset_parameters` may reset as well, also
    where it finds them through a list or another plain attribute."""
    twin = twins[id(part)] = object.__new__(type(part))  # FSDP2's classes build a new module in their own __new__
    own: dict[str, nn.Parameter | None] = {}
    for n, p in part._parameters.items():
        if p is not None and id(p) not in twins:
            dtype, shape = layout.get(known[id(p)], (torch.float32, getattr(p, "ds_shape", p.shape)))
            twins[id(p)] = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        own[n] = None if p is None else twins[id(p)]
    buffers = {n: None if b is None else b.clone() for n, b in part._buffers.items()}
    for child in part._modules.values():
        if child is not None and id(child) not in twins:
            _twin(child, known, layout, twins)
    children = {n: None if m is None else twins[id(m)] for n, m in part._modules.items()}
    twin.__dict__.update({n: value if n in SLOTS else _replaced(value, twins) for n, value in part.__dict__.items()},
                         _parameters=own, _buffers=buffers, _modules=children)
    return twin


def _replaced(value: Any, twins: Mapping[int, Any]) -> Any:
    """A plain attribute with modules and parameters exchanged for their twins."""
    if type(value) is dict:
        return {k: _replaced(v, twins) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_replaced(v, twins) for v in value)
    return twins.get(id(value), value)


def without_initialiser(module: nn.Module) -> dict[str, list[str]]:
    """Trained parameters whose module has no `reset_parameters`: bare names by "path (type)" of the module."""
    known, result = _names(module), dict[str, list[str]]()
    for path, part in module.named_modules():
        names = [known[id(p)] for p in part._parameters.values() if p is not None and p.requires_grad]
        if names and not _resettable(part):
            result[f"{path or 'the model itself'} ({type(part).__name__})"] = names
    return result


def normalisers(module: nn.Module) -> dict[str, str]:
    """Parameters of normalisation layers: bare name to the name inside the layer ("weight", "bias").

    Normalisation layers are torch's, those whose class name says "norm", and those that keep running statistics.
    """
    known = _names(module)
    return {known[id(p)]: n for part in module.modules() for n, p in part._parameters.items()
            if p is not None and (isinstance(part, NORMALISERS) or "norm" in type(part).__name__.lower()
                                  or hasattr(part, "reset_running_stats"))}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names and bits, the same wherever they are the same."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return state.hexdigest()


def _names(module: nn.Module) -> dict[int, str]:
    return {id(p): plain_name(n) for n, p in module.named_parameters()}  # a tied parameter once, by its first name


def _resettable(part: nn.Module) -> bool:
    return callable(getattr(part, "reset_parameters", None))
