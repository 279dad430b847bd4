"""Hooks on layers with experts: what they are given, and how they weigh it, in the passes that count."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from everbatch.nn.experts import MoELoRALinear

__all__ = ["Watch"]

Given = Callable[[str, Tensor, Tensor | None], None]
Weighed = Callable[[str, Tensor, Tensor, Tensor | None], None]


class Watch:
    """Hooks that are silent but in `counting`. A backward that computes a forward anew, as activation checkpointing has it, is
    outside of it, so that no token counts twice; so are evaluation and the other passes of a step."""

    def __init__(self, layers: dict[str, MoELoRALinear]) -> None:
        self.layers = layers
        self.on = False
        self.mask: Tensor | None = None
        self.given: Given | None = None
        self.weighed: Weighed | None = None
        for name, layer in layers.items():
            layer.register_forward_pre_hook(functools.partial(self._before, name))
            layer.register_forward_hook(functools.partial(self._after, name))

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        """A copy of the network is not watched."""
        copied = Watch({})
        memo[id(self)] = copied
        return copied

    @contextmanager
    def counting(self, given: Given, weighed: Weighed, mask: Tensor | None) -> Iterator[None]:
        """Inside the block every forward of a layer is told."""
        self.given, self.weighed, self.mask, self.on = given, weighed, mask, True
        for layer in self.layers.values():
            layer.keep = True
        try:
            yield
        finally:
            self.given, self.weighed, self.mask, self.on = None, None, None, False
            for layer in self.layers.values():
                layer.keep, layer.last = False, None

    @torch.no_grad()
    def _before(self, name: str, _layer: MoELoRALinear, inputs: tuple[Any, ...]) -> None:
        if self.on and self.given is not None:
            self.given(name, inputs[0], self._mask_of(inputs[0]))

    @torch.no_grad()
    def _after(self, name: str, layer: MoELoRALinear, inputs: tuple[Any, ...], _output: Any) -> None:
        if self.on and self.weighed is not None and layer.last is not None:
            self.weighed(name, inputs[0], layer.last, self._mask_of(inputs[0]))

    def _mask_of(self, x: Tensor) -> Tensor | None:
        """The mask of tokens, where these are tokens: a layer behind the pooling has a row for each sample."""
        return self.mask if self.mask is not None and x.ndim > self.mask.ndim else None
