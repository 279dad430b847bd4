"""Which parts of a model FSDP2 may shard for themselves: blocks whose weights are used by calling the block, and nowhere else.

FSDP2 gathers a block's weights when the block is called, and frees them after it. A weight that is read without that call is a
slice then, and torch raises an error; a weight that two blocks hold belongs to neither. Such blocks are left to the root, whose
weights stay gathered from the first call to the end of the backward: the same numbers, at the memory of that block.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

__all__ = ["blocks_of", "shard_blocks"]

CONTAINERS = (nn.ModuleList, nn.ModuleDict)
WALKS = frozenset({"parameters", "named_parameters", "state_dict", "get_parameter", "_parameters", "forward"})
"""What gets at a module's weights without their names, or runs it without its hooks."""


def shard_blocks(model: nn.Module, device: str | None = None) -> nn.Module:
    """`fully_shard` the blocks of the outermost ModuleLists, ModuleDicts and Sequentials, then the root; in place.

    Args:
        device: type of the device that weights stay on; by default a GPU where there is one, as torch has it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = None if device is None else init_device_mesh(device, (dist.get_world_size(),))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that may be sharded for themselves, in the order of the model.

    Left out are blocks without weights of their own, blocks that share a weight or a module with anything outside of them, and
    blocks of which some code outside, as far as its bytecode tells, reads weights or calls parts.
    """
    found: dict[nn.Module, None] = {}
    _collect(model, found)
    users = _users(model, found)
    held: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                held[id(p)] = held.get(id(p), 0) + 1
    places: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        places[id(module)] = places.get(id(module), 0) + 1
    return [block for block in found if _alone(block, held, places) and not _reached_into(block, users)]


def _collect(module: nn.Module, found: dict[nn.Module, None]) -> None:
    """The blocks of the outermost containers below `module`; a container in a container, or what has no forward, is opened."""
    for child in module.children():
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) and _callable(child):
            if any(True for _ in child.parameters()):
                found[child] = None
        else:
            _collect(child, found)


def _callable(module: nn.Module) -> bool:
    kind: Any = type(module)
    return kind.forward is not nn.Module.forward and not isinstance(module, CONTAINERS)


def _alone(block: nn.Module, held: dict[int, int], places: dict[int, int]) -> bool:
    """Whether the block's weights and modules lie in it alone, and its modules each at one place."""
    own: dict[int, int] = {}
    for module in block.modules():
        for p in module._parameters.values():
            if p is not None:
                own[id(p)] = own.get(id(p), 0) + 1
    inside: dict[int, int] = {}
    for _, module in block.named_modules(remove_duplicate=False):
        inside[id(module)] = inside.get(id(module), 0) + 1
    return all(held[key] == count for key, count in own.items()) and all(places[key] == n for key, n in inside.items())


def _reached_into(block: nn.Module, users: dict[nn.Module, frozenset[str]]) -> bool:
    """Whether code that can get at the block reads a name of its weights or parts, or walks over them."""
    inside = set(block.modules())
    names = {name for part in inside for kept in (part._parameters, part._modules) for name in kept}
    return any(not read.isdisjoint(names | WALKS) for user, read in users.items() if user not in inside)


def _users(model: nn.Module, blocks: Iterable[nn.Module]) -> dict[nn.Module, frozenset[str]]:
    """For each module outside of all blocks that has code of its own: names that it reads from other objects than itself."""
    inside = {part for block in blocks for part in block.modules()}
    found, known = {}, dict[type, frozenset[str]]()
    for module in model.modules():
        kind = type(module)
        if module in inside or kind.__module__.startswith("torch."):  # torch's layers use their own parts alone
            continue
        if kind not in known:
            known[kind] = frozenset(_names(kind))
        found[module] = known[kind]
    return found


def _names(kind: type) -> Iterator[str]:
    """Attributes that a class's forward, and the Python functions it calls, read from anything but self and modules of code."""
    seen: set[types.CodeType] = set()
    waiting: list[tuple[types.CodeType, dict[str, Any], str]] = []

    def add(function: Any, *, method: bool) -> None:
        plain = inspect.unwrap(function) if callable(function) else None
        if isinstance(plain, types.FunctionType) and not plain.__module__.startswith("torch"):
            code = plain.__code__
            waiting.append((code, plain.__globals__, code.co_varnames[0] if method and code.co_varnames else ""))

    add(kind.forward, method=True)  # type: ignore[attr-defined]
    while waiting:
        code, scope, self_name = waiting.pop()
        if code in seen:
            continue
        seen.add(code)
        waiting += [(inner, scope, self_name) for inner in code.co_consts if isinstance(inner, types.CodeType)]
        base = ""
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                if base == "self":
                    add(getattr(kind, step.argval, None), method=True)
                elif base == "other":
                    yield step.argval
                base = "global" if base == "global" else "other"
            elif step.opname == "LOAD_GLOBAL":
                value = scope.get(step.argval)
                add(value, method=False)
                if step.argval == "getattr":
                    yield from (text for text in code.co_consts if isinstance(text, str))
                base = "global"
            elif step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")):
                name = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
                base = "self" if self_name and name == self_name else "other"
            elif step.opname not in ("CACHE", "EXTENDED_ARG", "NOP", "RESUME"):
                base = "other"
