"""Logits from what a network returns: a tensor, or the part of a tuple, dict or dataclass that an option names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from everbatch.errors import CompositionError, check
from everbatch.rows import Rows, shapes

__all__ = ["Pick", "check_output", "described", "picked", "told"]


class Pick:
    """A forward hook that makes a network return its logits, inside `with pick.on():` alone; in copies of the network, always.

    A hook, and the model's first: engines look for tensors in what a network returns, and do not find them in every class.
    With `strict=False` a network that returns a tensor is taken as it is.
    """

    travels = True
    """A replica of the network needs it too."""

    def __init__(self, output: str | int, *, strict: bool = True) -> None:
        self.output, self.strict, self.active = output, strict, 0

    def __call__(self, module: nn.Module, _inputs: Any, result: Any) -> Any:
        return picked(result, self.output, training=self.strict and module.training) if self.active else None

    def __getstate__(self) -> dict[str, Any]:
        return {"output": self.output, "strict": self.strict, "active": 1}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Have the hook act."""
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1


FOREIGN = (AssertionError, AttributeError, KeyError, IndexError, NotImplementedError, TypeError)
"""What models raise of inputs that they were not made for."""


def told(error: Exception, inputs: Rows) -> Exception:
    """What a model raised, saying of which inputs, where its own words are those of a programmer; else the error itself."""
    if isinstance(error, CompositionError):
        return error
    if isinstance(error, FOREIGN):
        said = (str(error).splitlines() or ["nothing"])[0]
        got = f"the model raised {type(error).__name__}: {said}, on inputs of {shapes(inputs)}"
        return ValueError(f"Trainer: {got}; give it inputs as it takes them: see prepare=, and the model's own options")
    if "mixed torch.Tensor and DTensor" in str(error):
        return RuntimeError("Trainer: on fsdp2 the model reads a weight of a block without calling the block, so only a slice "
                            "of it is there; call the block, or keep that weight outside of ModuleLists and Sequentials, or "
                            f"use engine='ddp' or ZeRO: {str(error).splitlines()[0]}")
    if "find_unused_parameters" in str(error):
        return RuntimeError("Trainer: the last step's passes did not reach every weight, and "
                            "ddp={'find_unused_parameters': False} says that they do; leave it out of ddp=, or freeze such "
                            f"weights before the trainer is built: {str(error).splitlines()[-1]}")
    return error


def check_output(output: Any) -> None:
    """Refuse what names no part of a result."""
    good = output is None or (isinstance(output, int | str) and not isinstance(output, bool) and output != "")
    check(good, "Trainer", f"output={output!r}", "be the name or the index of the logits in what the network returns, or None")


def picked(result: Any, output: str | int, *, training: bool) -> Tensor:
    """The part of `result` that `output` names. A network that returns a tensor in evaluation mode alone is taken as it is.

    Raises:
        ValueError: there is no such part, or it is no tensor; a tensor in training mode, of which nothing is to be named.
    """
    if isinstance(result, Tensor):
        if training:
            check(False, "Trainer", f"output={output!r} and a network that returns {described(result)}", "be left out")
        return result
    try:
        if isinstance(output, str):
            part = result[output] if isinstance(result, Mapping) else getattr(result, output)
        else:
            part = list(result.values() if isinstance(result, Mapping) else result)[output]
    except (KeyError, AttributeError, IndexError, TypeError):
        part = None
    if not isinstance(part, Tensor):
        check(False, "Trainer", f"output={output!r} and a network that returns {described(result)}",
              "name the tensor of logits in it")
    assert isinstance(part, Tensor)
    return part


def described(result: Any) -> str:
    """What a network returned, in a few words."""
    if isinstance(result, Tensor):
        return f"a tensor of shape {tuple(result.shape)}"
    kind = type(result).__name__
    if isinstance(result, Mapping):
        return f"{kind} with {', '.join(f'{k!r}: {_short(v)}' for k, v in result.items())}"
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        held = ", ".join(f"{f.name}: {_short(getattr(result, f.name))}" for f in dataclasses.fields(result))
        return f"{kind} with {held}"
    if isinstance(result, tuple | list):
        names = getattr(result, "_fields", range(len(result)))
        return f"{kind} of {', '.join(f'{n}: {_short(v)}' for n, v in zip(names, result, strict=True))}"
    return kind


def _short(value: Any) -> str:
    return f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
