"""A guard before `engine.backward` and `engine.step` of a DeepSpeed engine that an optimizer has taken."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["passage", "take"]

GUARDED = {"backward": "backward(loss)", "step": "step()"}


class _Guard:
    """Stands in an engine's attributes for one of its methods; only a host's own calls pass. Holds the engine weakly."""

    def __init__(self, engine: Any, name: str, who: str) -> None:
        self.engine, self.name, self.who = weakref.ref(engine), name, who
        self.replaced = vars(engine).get(name)
        """What someone else had set on the engine in place of its method."""
        self.open = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.open:
            raise RuntimeError(
                f"DeepSpeed: engine.{GUARDED[self.name]} on an engine that {self.who}.on(engine) has taken would leave out "
                "everything the class does; call opt.step(closure), whose closure runs forward and opt.backward(loss): it calls "
                "engine.backward and engine.step itself")
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        engine = self.engine()
        return getattr(type(engine), self.name)(engine, *args, **kwargs)


def take(engine: Any, who: str) -> None:
    """Refuse calls of the engine's `backward` and `step` from now on, but those within `passage`."""
    for name in GUARDED:
        guard = vars(engine).get(name)
        if isinstance(guard, _Guard):
            guard.who = who
        else:
            setattr(engine, name, _Guard(engine, name, who))


def passage(engine: Any, name: str) -> Callable[..., Any]:
    """The engine's own method behind its guard; what was set on the engine instead runs with every guard open."""
    mine = vars(engine).get(name)
    if isinstance(mine, _Guard) and mine.replaced is None:
        return functools.partial(getattr(type(engine), name), engine)
    method = mine.replaced if isinstance(mine, _Guard) else getattr(engine, name)
    guards = [g for other in GUARDED if isinstance(g := vars(engine).get(other), _Guard)]

    def call(*args: Any, **kwargs: Any) -> Any:
        for guard in guards:
            guard.open = True
        try:
            return method(*args, **kwargs)
        finally:
            for guard in guards:
                guard.open = False

    return call
