"""Whether calls of a module are compiled."""

from __future__ import annotations

from torch import nn

__all__ = ["is_compiled"]


def is_compiled(module: nn.Module) -> bool:
    """Whether the module is torch.compile's wrapper, was compiled in place, or has a compiled `forward` of its own."""
    if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
        return True
    return hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
