"""What the files beside `mixin` see of a composed optimizer: they serve it and do not know its class."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from everbatch.contract import Cost, base_of
from everbatch.engines.host import Host

__all__ = ["Composed", "stepping_class"]


class Composed(Protocol):
    """An optimizer with its parts; `OptimizerMixin` is one."""

    verbs: ClassVar[tuple[str, ...]]
    complete_state: bool
    configs: dict[type, Any]
    host: Host
    seed: int
    skipped_count: int
    states: dict[type, Any]
    step_count: int

    def costs(self) -> dict[str, Cost]:
        """What each part adds to a step."""

    def extra_passes(self) -> float:
        """Passes per step beyond the recorded one."""


def stepping_class(opt: Composed) -> type:
    """The class whose step updates the masters: that of the engine's own optimizer, or the base."""
    inner = getattr(opt.host, "inner", None)
    return type(inner) if inner is not None else base_of(type(opt)) or type(opt)
