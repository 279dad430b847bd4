"""torch.compile under the Trainer: what is compiled on which engine, and when it runs as it is.

    plain, DDP      the bare module, inside of DDP
    FSDP2           the forwards of the blocks that are sharded for themselves
    ZeRO 0 to 2     the engine's module, by `engine.compile()`
    ZeRO 3          refused: its hooks, which gather weights around every layer, break every graph

Compiled are training passes alone. Evaluation, predictions and the crafting of adversarial inputs run
the modules as they are: another mode, or batches of other sizes, would each be one more graph, and
adversaries elsewhere run them so. Nothing is wrapped, so that names, hooks, checkpoints and exports are
those of the bare module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from everbatch.errors import UnsupportedHost

__all__ = ["as_it_is", "compile_blocks", "compile_engine"]


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Have the forwards of these modules compiled, each for itself and without its hooks: FSDP2's, which
    gather weights, are not to be traced, and nothing would be compiled around them."""
    for block in blocks:
        block.forward = torch.compile(block.forward)


def compile_engine(engine: Any) -> None:
    """Have a DeepSpeed engine compile its module.

    Raises:
        UnsupportedHost: ZeRO stage 3.
    """
    stage = int(engine.zero_optimization_stage())
    if stage == 3:
        raise UnsupportedHost("DeepSpeed: compile=true on ZeRO stage 3, whose hooks gather weights around "
                              "every layer and break every graph; use ZeRO stage 0 to 2, engine='fsdp2' "
                              "or 'ddp', or set compile=false")
    engine.compile()


def as_it_is(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call without compiled graphs."""
    def eager(*inputs: Tensor, **named: Tensor) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return call(*inputs, **named)

    return eager
