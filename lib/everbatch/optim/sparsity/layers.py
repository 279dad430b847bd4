"""Which parameters of a model can be masked."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from everbatch.engines.host import plain_name
from everbatch.errors import check, nearest

__all__ = ["maskable", "weight_modules"]

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def weight_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The weight parameters of linear, convolution and attention projection layers: name in the bare model to its module.

    A weight tied to an embedding is left out, one shared by several layers comes once. Works on meta tensors.
    """
    name_of = {id(p): plain_name(n) for n, p in model.named_parameters()}
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        weights = [module.weight] if isinstance(module, KINDS) else []
        if isinstance(module, nn.MultiheadAttention):
            weights = [w for w in (getattr(module, n) for n in ATTENTION) if w is not None]
        for weight in weights:
            if id(weight) not in tied:
                found.setdefault(id(weight), module)
    return {name_of[key]: found[key] for key in name_of if key in found}


def maskable(
    shapes: Mapping[str, Sequence[int]], model: nn.Module | None, *, include: Iterable[str] = (), exclude: Iterable[str] = (),
) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters to mask, by name, in the model's order.

    By default the weights of linear and convolution layers, of two dimensions or more: no biases, normalisation, embeddings
    or tokens. `include` patterns (`fnmatch`) replace that rule, `exclude` patterns take away.

    Args:
        shapes: whole shape of every trained parameter.
        model: where the rule looks for layers; None needs `include`.

    Raises:
        ValueError: a pattern that fits nothing, a parameter of fewer than two dimensions, no layer left, no model.
    """
    include, exclude = tuple(include), tuple(exclude)
    check(model is not None or bool(include), "DynamicSparsity", "parameters without their module",
          "know which of them are weights of layers", "pass the module as the first argument, or include=(patterns,)")
    for pattern in (*include, *exclude):
        check(any(fnmatch.fnmatchcase(n, pattern) for n in shapes), "DynamicSparsity", f"pattern {pattern!r} fits no parameter",
              "fit a trained one", nearest(pattern, shapes))
    if include:
        names = [n for n in shapes if any(fnmatch.fnmatchcase(n, p) for p in include)]
    else:
        assert model is not None
        layers = weight_modules(model)
        names = [n for n in shapes if n in layers and len(shapes[n]) >= 2]
    names = [n for n in names if not any(fnmatch.fnmatchcase(n, p) for p in exclude)]
    flat = [n for n in names if len(shapes[n]) < 2]
    check(not flat, "DynamicSparsity", f"include names {flat[:5]}", "have two dimensions or more")
    check(bool(names), "DynamicSparsity", "no layer to mask", "leave at least one")
    return {n: tuple(shapes[n]) for n in names}
