"""The modules that passes run: which there are, and their buffers kept from moving or copied for a rollback.

The module an optimizer was given is walked, without a hook. What a closure calls beside it is found in a step that *looks*: the
first one, the first of a task, and every one where something outside has buffers, or where the module is not known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from everbatch.nn.compiled import is_compiled
from everbatch.nn.statistics import every_module, hold_statistics, put_back

__all__ = ["Watch"]

Meet = Callable[[list[nn.Module]], None]


class Watch:
    """Watches the modules of one optimizer's passes.

    The recorded pass copies their buffers, for `rollback`. In other passes running statistics and DDP's buffer broadcast are
    held, and every other buffer is put back at the end.

    torch.compile takes a global hook into its graph, and a step without it then needs another graph. So where compiled parts are
    known or cannot be excluded, a step looks through `nn.Module.__call__` instead, which is torch's own inside of them.

    Cost: a walk over the modules per pass; a step that looks, one call of Python more per module and pass.
    """

    def __init__(self, root: nn.Module | None) -> None:
        self.root = root
        self._meet_all: Meet | None = None
        """What else wants to know of modules; held during a step only, for it may hold this."""
        self._look = True
        """Whether the next step looks for modules outside of the root."""
        self._outside = root is None
        """Whether every step must look."""
        self._compiled = root is None
        """Whether some part may be compiled."""
        self._found_compiled = False
        self.looking = False
        """Whether the step under way looks."""
        self._recorded = False
        """Whether the pass under way is the one that moves statistics."""
        self._seen: set[int] | None = None
        """Modules met in the pass under way; None outside of passes."""
        self.undo: list[Callable[[], None]] = []
        """What lets go of what the pass under way holds, last first."""
        self._wrappers: set[type] = set()
        """Classes of DDP's, of those met: asking each module costs as much as all else about it."""
        self.parts: list[nn.Module] = []
        """Modules of the root, as a pass of the step under way has found them; hosts empty it when a step begins."""
        self.buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self._stop: Callable[[], None] | None = None

    def look_again(self) -> None:
        """Have the next step look for modules outside of the root: closures may have changed."""
        self._look = True

    def end_step(self) -> None:
        """After the last pass of a step, or one that raised; needed where `looking` or `buffers` is true."""
        self._meet_all, self.buffers, self.parts, self.looking = None, [], [], False
        if self._stop is not None:
            self._stop()
            self._stop, self._look, self._compiled = None, False, self._found_compiled

    def open(self, meet: Meet, *, recorded: bool) -> None:
        """Before the closure of one pass. `meet` is called with all modules of every outermost one that is found."""
        if self._stop is None and (self._look or self._outside):
            self._begin_to_look(meet)
        self._recorded, self._seen, self.undo = recorded, set(), []
        if self.root is not None:
            self._take(self.root, inside=True)

    def close(self) -> None:
        """After the closure, also one that raised; needed where `looking` or `undo` is true."""
        self._seen = None
        for action in reversed(self.undo):
            action()
        self.undo = []

    def _begin_to_look(self, meet: Meet) -> None:
        """In the first pass of a step that looks."""
        self.looking, self._meet_all = True, meet
        if self._look and self.root is not None:
            self._compiled = any(map(is_compiled, every_module(self.root)))
        self._found_compiled = False
        self._stop = _through_calls(self) if self._compiled else _through_hook(self)

    def rollback(self) -> None:
        """Put every buffer the recorded pass may have moved back to where it was before the step."""
        for entry in self.buffers:
            put_back(*entry)

    @contextmanager
    def rolled_back(self) -> Iterator[None]:
        """Inside, buffers are as before the recorded pass; afterwards as it left them."""
        after = [(module, name, module._buffers.get(name)) for module, name, *_ in self.buffers]
        kept = [None if now is None else now.clone() for *_, now in after]
        self.rollback()
        try:
            yield
        finally:
            for (module, name, now), values in zip(after, kept, strict=True):
                if now is None or values is None:
                    module._buffers[name] = None
                else:
                    put_back(module, name, now, values)

    def meet(self, module: nn.Module) -> None:
        """A module is about to run."""
        if self._seen is not None and id(module) not in self._seen:
            self._take(module, inside=False)

    def _take(self, module: nn.Module, *, inside: bool) -> None:
        """Hold, or copy, what a module and those below it keep; whatever else is called of them is known then."""
        seen = self._seen
        assert seen is not None
        parts = self.parts if inside and not self.looking else []
        if not parts:
            parts = every_module(module)
        if inside:
            self.parts = parts
        if seen:
            parts = [m for m in parts if id(m) not in seen]
        if self.looking:
            seen.update(map(id, parts))
            self._wrappers |= {kind for kind in set(map(type, parts)) if issubclass(kind, DistributedDataParallel)}
            if self._meet_all is not None:
                self._meet_all(parts)
            self._found_compiled = self._found_compiled or any(map(is_compiled, parts))
        if not inside:
            self._outside = self._outside or any(p._buffers or type(p) in self._wrappers for p in parts)
        if self._recorded:
            found = [(m, n, b) for m in parts if m._buffers for n, b in m._buffers.items() if b is not None]
            self.buffers += [(*entry, kept) for entry, kept in zip(found, _copies([b for *_, b in found]), strict=True)]
            return
        for part in parts:
            if part._buffers or type(part) in self._wrappers:
                self.undo += hold_statistics(part)


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of each, in one operation per type and device: on a GPU each of the 159 buffers of a ResNet-50 would be a launch."""
    copies, alike = [], defaultdict[Any, tuple[list[Tensor], list[Tensor]]](lambda: ([], []))
    for t in tensors:
        plain = type(t) is Tensor and t.layout is torch.strided
        copies.append(torch.empty_like(t) if plain else t.clone())
        if plain:
            there, here = alike[t.dtype, t.device]
            there.append(copies[-1])
            here.append(t)
    for there, here in alike.values():
        torch._foreach_copy_(there, here)
    return copies


def _through_hook(watch: Watch) -> Callable[[], None]:
    """Look through torch's global forward pre-hook; returns what ends it."""
    return register_module_forward_pre_hook(lambda module, _inputs: watch.meet(module)).remove


def _through_calls(watch: Watch) -> Callable[[], None]:
    """Look through `nn.Module.__call__`, which torch.compile never sees: inside of compiled parts it is torch's own."""
    torchs: Any = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watch.meet(module)
        if nn.Module.__call__ is not call or not is_compiled(module):
            return torchs(module, *args, **kwargs)
        nn.Module.__call__ = torchs  # type: ignore[method-assign]
        try:
            return torchs(module, *args, **kwargs)
        finally:
            if watch.looking:
                nn.Module.__call__ = call  # type: ignore[method-assign]

    def stop() -> None:
        watch.looking = False
        nn.Module.__call__ = torchs  # type: ignore[method-assign]

    nn.Module.__call__ = call  # type: ignore[method-assign]
    return stop
