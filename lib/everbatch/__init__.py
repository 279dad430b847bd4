"""everbatch: train with very large batches, and on data that keeps arriving, with the same few mixins on every engine.

Names are imported when they are first used, so `import everbatch` costs next to nothing and needs none of the extras.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everbatch.compose import compose
    from everbatch.train import Trainer

__all__ = ["Trainer", "__version__", "compose"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Trainer":
        from everbatch.train import Trainer

        return Trainer
    raise AttributeError(f"module 'everbatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `everbatch.compose` the function: importing the submodule of that name would otherwise rebind it."""

    @property
    def compose(self) -> Any:
        from everbatch.compose import compose

        return compose

    @compose.setter
    def compose(self, submodule: ModuleType) -> None:
        """The import system binds every submodule to its package after loading it; this name is taken."""


sys.modules[__name__].__class__ = _Package
