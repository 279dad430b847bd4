"""An engine let go: what DeepSpeed keeps of one outside of it."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["release"]

ZERO = "deepspeed.runtime.zero"
PLAN = "_PartitionedParameterCoordinator__params_to_release"


def release(engine: Any) -> None:
    """Take a DeepSpeed engine's hooks off its module, and both off what ZeRO-3 keeps by class (DeepSpeed 0.19.8): they would
    live as long as the process. The engine, its module and an optimizer on it are of no use afterwards. Anything else is left
    alone. No collective."""
    if not callable(getattr(engine, "zero_optimization_stage", None)):
        return
    stage = engine.zero_optimization_stage()
    engine.destroy()
    if stage != 3:
        return
    running = sys.modules[f"{ZERO}.parameter_offload"].FWD_MODULE_STACK  # every engine's module stays there
    running[:] = [module for module in running if module is not engine.module]
    coordinator = sys.modules[f"{ZERO}.partitioned_param_coordinator"].PartitionedParameterCoordinator
    for cell in getattr(coordinator, PLAN).__closure__ or ():
        if hasattr(cell.cell_contents, "cache_clear"):  # by coordinator and module; another engine's is made anew
            cell.cell_contents.cache_clear()
