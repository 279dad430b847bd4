"""What the files beside `mixin` see of a composed optimizer: they serve it and do not know its class."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from everbatch.contract import Cost
from everbatch.engines.host import Host

__all__ = ["Composed"]


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
