"""everbatch: train with very large batches, and on data that keeps arriving, with the same few mixins on every engine.

Names are imported when they are first used, so `import everbatch` costs next to nothing and needs none of the extras.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from everbatch import moved
from everbatch.version import __version__

if TYPE_CHECKING:
    from everbatch.composition import compose
    from everbatch.train import Trainer

__all__ = ["Trainer", "__version__", "compose"]


def __getattr__(name: str) -> Any:
    if name == "Trainer":
        from everbatch.train import Trainer

        return Trainer
    if name == "compose":
        from everbatch.composition import compose

        return compose
    raise AttributeError(f"module 'everbatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


moved.install()
