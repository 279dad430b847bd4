"""A head that grows with the classes: in parts, so that what is known keeps its bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from everbatch.errors import check, check_whole

__all__ = ["PartsHead", "grow_head", "head_of", "joined"]


class PartsHead(nn.Module):
    """One linear layer for each growth, their logits side by side.

        logits(x) = [W_0 x + b_0, W_1 x + b_1, ...]

    Why not one layer with more rows: an optimizer counts steps per tensor, so that rows which are
    new would be taken for old ones in Adam's bias correction, on every engine. A part is a
    parameter of its own: it begins at step 0, and no bit of another part changes when it comes.

    Args:
        sizes: classes of each part; >= 1 each.
        in_features: of every part.
        bias: whether parts have one.

    Raises:
        ValueError: no part, or one without classes.

    Cost: one small product per part.
    """

    def __init__(self, in_features: int, sizes: Sequence[int], *, bias: bool = True) -> None:
        super().__init__()
        check(len(sizes) > 0, "PartsHead", "no part", "have at least one")
        for size in sizes:
            check_whole("PartsHead", "classes of a part", size, 1)
        self.parts = nn.ModuleList(nn.Linear(in_features, size, bias=bias) for size in sizes)

    @property
    def sizes(self) -> list[int]:
        """Classes of each part."""
        return [part.out_features for part in self._linear()]

    @property
    def in_features(self) -> int:
        """Features that each part takes."""
        return self._linear()[0].in_features

    @property
    def out_features(self) -> int:
        """Classes of all parts."""
        return sum(self.sizes)

    @property
    def made_of(self) -> dict[str, Any]:
        """Plain arguments that make a head like this one."""
        return {"in_features": self.in_features, "sizes": self.sizes, "bias": self._linear()[0].bias is not None}

    def _linear(self) -> list[nn.Linear]:
        return list(self.parts)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to logits (..., classes)."""
        return torch.cat([part(x) for part in self.parts], dim=-1)

    @classmethod
    def of(cls, layer: nn.Linear) -> PartsHead:
        """A head whose first part is this layer."""
        head = cls(layer.in_features, [layer.out_features], bias=layer.bias is not None)
        head.parts[0] = layer
        return head

    def add(self, classes: int) -> None:
        """One more part, freshly initialised from torch's global generator."""
        check_whole("PartsHead", "classes of a part", classes, 1)
        first = self._linear()[0]
        fresh = nn.Linear(first.in_features, classes, bias=first.bias is not None)
        self.parts.append(fresh.to(first.weight))


def head_of(model: nn.Module) -> str:
    """Name of the linear layer, or head in parts, that gives a model's logits: what timm's
    `get_classifier()` returns, else its module `head`, `fc` or `classifier`.

    Raises:
        ValueError: none of them is one.
    """
    told = getattr(model, "get_classifier", None)
    found: list[Any] = [told()] if callable(told) else [
        part for name in ("head", "fc", "classifier")
        if isinstance(part := getattr(model, name, None), nn.Linear | PartsHead)]
    names: dict[int, str] = {id(part): name for name, part in model.named_modules()}
    kind = type(found[0]).__name__ if found else "none"
    good = bool(found) and isinstance(found[0], nn.Linear | PartsHead) and id(found[0]) in names
    check(good, "head", f"the classifier of {type(model).__name__} is {kind}",
          "be one linear layer, to grow in parts", "choose another model")
    return names[id(found[0])]


def grow_head(model: nn.Module, sizes: Sequence[int]) -> nn.Module:
    """Put the model's linear head into parts, and add a part of each of these sizes. In place.

    The new parts follow torch's global generator. Where the model counts its classes
    (`num_classes`, as timm's do), it counts the new ones too.
    """
    path = head_of(model)
    head = model.get_submodule(path)
    if isinstance(head, nn.Linear):
        head = PartsHead.of(head)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, head)
    assert isinstance(head, PartsHead)
    for size in sizes:
        head.add(size)
    if isinstance(getattr(model, "num_classes", None), int):
        model.num_classes = sum(head.sizes)  # type: ignore[assignment]
    return model


def joined(parts: PartsHead, values: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The values of a head in parts as those of one linear layer: "PATH.weight" and "PATH.bias".

    Args:
        values: of a model's state by name; those of the head are taken out of it.
    """
    result = {}
    for kind in ("weight", "bias"):
        names = [f"{path}.parts.{k}.{kind}".lstrip(".") for k in range(len(parts.parts))]
        if names[0] in values:
            result[f"{path}.{kind}".lstrip(".")] = torch.cat([values.pop(name) for name in names])
    return result
