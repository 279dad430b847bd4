"""DDP as the Trainer builds it: options that a user may give, and weights that a pass does not reach."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from everbatch.errors import check, nearest

__all__ = ["ReachDDP", "check_ddp", "wrap"]

OPTIONS = ("bucket_cap_mb", "find_unused_parameters", "gradient_as_bucket_view", "init_sync", "static_graph",
           "skip_all_reduce_unused_params", "batched_grad_copy")
"""Those that are plain values, and that nothing else here decides."""


class ReachDDP(DistributedDataParallel):
    """DDP that learns from the loss, right before its backward, which weights the pass reached.

    torch's own search runs after every forward, from its outputs, and the last forward's stands: it fails where parts of a batch
    go through different weights. Here the optimizer's `backward` asks for the search, once, and weights that no rank reached
    keep a gradient of None. Cost per backward: one walk over the graph, and a small all-reduce that overlaps with it.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, find_unused_parameters=True, **options)
        self.find_unused_parameters = False  # of forwards; the reducer has the flag

    def before_backward(self, loss: Tensor) -> None:
        """Tell the reducer which weights this loss reaches."""
        self.reducer.prepare_for_backward([loss])


def check_ddp(options: Mapping[str, Any] | None, engine: Any) -> None:
    """Refuse options of DDP that are none, that are not values, or that no DDP would get."""
    if options is None:
        return
    check(isinstance(options, Mapping), "Trainer", f"ddp={options!r}", "be a dict of DDP's options")
    check(engine == "ddp", "Trainer", f"ddp={dict(options)!r} with engine={engine if isinstance(engine, str) else 'DeepSpeed'!r}",
          "be left out", "use engine='ddp'")
    known = [name for name in OPTIONS if name in inspect.signature(DistributedDataParallel.__init__).parameters]
    for name, value in options.items():
        check(name != "broadcast_buffers", "Trainer", "ddp={'broadcast_buffers': ...}", "be left out", "buffers stay each rank's "
              "own, and evaluation and checkpoints take their mean")
        check(name in known, "Trainer", f"ddp={{{name!r}: ...}}", f"hold {', '.join(known)}", nearest(str(name), known))
        if name == "bucket_cap_mb":
            good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
            check(good, "Trainer", f"ddp={{{name!r}: {value!r}}}", "be a finite number > 0")
        else:
            check(isinstance(value, bool), "Trainer", f"ddp={{{name!r}: {value!r}}}", "be True or False")
    check(not (options.get("static_graph") and options.get("find_unused_parameters")), "Trainer",
          "ddp with static_graph and find_unused_parameters", "have one of them", "a static graph finds unused weights itself")


def wrap(model: nn.Module, options: Mapping[str, Any] | None) -> DistributedDataParallel:
    """The model in DDP; weights that a pass does not reach are found, unless an option says otherwise."""
    rest = dict(options or {})
    found = rest.pop("find_unused_parameters", not rest.get("static_graph", False))
    made = ReachDDP(model, **rest) if found else DistributedDataParallel(model, **rest)
    # Buffers stay each rank's own, as on ZeRO; evaluation and other world sizes use their mean. Set here, because torch
    # renamed the argument.
    made.broadcast_buffers = False
    return made
