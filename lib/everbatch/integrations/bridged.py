"""What every bridge asks of the optimizer and the strategy that it is given."""

from __future__ import annotations

from typing import Any

from everbatch.contract import parts_of
from everbatch.errors import UnsupportedHost, check
from everbatch.optim import OptimizerMixin

__all__ = ["composed"]


def composed(who: str, optimizer: Any, cure: str, plain: bool, strategy: str) -> Any:
    """The optimizer, if a framework's loop can step it.

    Args:
        plain: whether backward and update are torch's own: not so with DeepSpeed, FSDP, or the loss scaling of fp16.
        strategy: what is there instead, for the message.

    Raises:
        ValueError: it is not composed.
        UnsupportedHost: not plain; or a part needs a further objective, and the loop knows one loss.
    """
    if not plain:
        raise UnsupportedHost(f"{who}: got {strategy}; supported: one device or DDP, one process each, fp32, bf16; on DeepSpeed "
                              "call Opt.on(engine, ...) and opt.step(closure) in a loop of your own")
    check(isinstance(optimizer, OptimizerMixin), who, f"optimizer {type(optimizer).__name__}", "be composed of mixins", cure)
    for part in parts_of(type(optimizer)):
        for name in part.needs:  # type: ignore[attr-defined]
            raise UnsupportedHost(f"{who}: {part.__name__} needs opt.step(closure, {name}=...), and this loop knows one loss; "
                                  "leave it out, or call opt.step in a loop of your own")
    return optimizer
