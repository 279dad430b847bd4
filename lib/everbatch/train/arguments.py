"""Arguments of the Trainer that would fail far from here, in another library's words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from everbatch.errors import check

__all__ = ["check_arguments"]

SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu")


def check_arguments(model: Any, config: Any, engine: Any, device: Any) -> None:
    """Refuse what is no module, configuration, engine or device. Raises `ValueError`."""
    kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    check(isinstance(model, nn.Module), "Trainer", f"model is {kind}", "be a module", "Trainer(model, functools.partial(Cls, "
          "lr=...)), the model built")
    given = dict(config) if isinstance(config, Mapping) else config
    check(config is None or hasattr(config, "batch_size"), "Trainer", f"config={given!r}", "be a Trainer.Config",
          "config=Trainer.Config(batch_size=..., epochs=...)")
    known = device is None or bool(re.fullmatch(r"cpu|cuda(:\d+)?", str(device)))
    check(known, "Trainer", f"device={device!r}", "be 'cuda', 'cuda:N' or 'cpu'")
    if isinstance(engine, Mapping):
        check(any(size in engine for size in SIZES), "Trainer", f"a DeepSpeed configuration without {' and '.join(SIZES)}",
              "be complete", "everbatch.config.layers.deepspeed_config(...) makes one")
