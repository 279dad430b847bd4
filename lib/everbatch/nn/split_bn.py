"""Batch normalisation with several sets of weights and statistics, for inputs of several distributions."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from everbatch.errors import check
from everbatch.nn.batch_norms import Converted

__all__ = ["SplitBatchNorm", "branch_parameters", "convert_split_bn", "split_branch", "strip_split_bn"]

MAIN = "main"


class SplitBatchNorm(_BatchNorm):
    """A batch-norm layer that is its own main branch and has further ones in `branches`; made by `convert_split_bn`.

        y = gamma_b (x - mean(x)) / sqrt(var(x) + eps) + beta_b     training; mean_b and var_b move towards the batch's
        y = gamma (x - mean_main) / sqrt(var_main + eps) + beta     evaluation: main, whatever the branch

    with b the branch that `split_branch` names, main outside of it; with `halves`, main for the first half of the rows and b for
    the second, each with statistics of its own. Shapes and errors are those of the original class, of which
    a split layer is an instance too; names in its state are unchanged, those of a branch follow `branches.<name>.`. A state
    dict that has nothing of a branch fills it with the main values. Pickles and deep-copies, always outside of any block.

    Cost: per branch one layer's state; time of one layer. Source: Xie et al., arXiv 1911.09665 (auxiliary batch norm).
    """

    original: ClassVar[type[_BatchNorm]]
    branches: nn.ModuleDict
    _active: str | None = None
    _halves: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """As the original layer, by the branch in use: same shape as the input."""
        if not self.training:
            return super().forward(input)
        if self._active is None:
            inside = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
            check(not inside, type(self).__name__, "a forward inside a backward (activation "
                  "checkpointing)", "not be repeated outside of split_branch, where it would take main for every branch",
                  "turn checkpointing off, or leave batch norms out of what is checkpointed")
            return super().forward(input)
        branch = self.branches[self._active]
        if not self._halves:
            return branch(input)  # type: ignore[no-any-return]
        check(len(input) % 2 == 0, type(self).__name__, f"{len(input)} rows in halves", "be as many of either branch",
              "keep samples along the first dimension, or use one forward per branch")
        first, second = input.chunk(2)
        return torch.cat([super().forward(first), branch(second)])

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class was made on the fly, so no import finds it: name the original one and make it again.
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        for name in ("_active", "_halves"):
            state.pop(name, None)
        return _rebuild, (self.original,), state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # After the original's loading, which brings old versions up to date in `state_dict`, and before the children's.
        super()._load_from_state_dict(state_dict, prefix, *rest)
        inside = f"{prefix}branches."
        main = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix) and not k.startswith(inside)}
        for name in self.branches:
            if not any(key.startswith(f"{inside}{name}.") for key in state_dict):
                # Copies: load_state_dict(assign=True) would make both branches the same tensors.
                state_dict.update({f"{inside}{name}.{k}": copy.deepcopy(v) for k, v in main.items()})


def convert_split_bn(model: nn.Module, branches: Sequence[str] = ("adversarial",)) -> int:
    """Give every batch-norm layer of `model` further branches, in place: copies of its weights and statistics as they are now.

    Layers of any `_BatchNorm` class (1d, 2d, 3d, synchronised, timm's with an activation) change their class, and keep their
    identity, hooks and names: optimisers that know the parameters go on, new ones need the branches too. Hooks of a layer are
    not copied: they fire once per call of the layer. Branches a layer has are left as they are, so a second call changes nothing.

    Args:
        model: may be a batch-norm layer itself. Synchronise it (`convert_sync_batchnorm`) before, not after: torch makes new
            layers there, without branches.
        branches: their names, at least one.

    Returns:
        How many layers are split afterwards; 0 for a model without batch norm, which is unchanged and needs no split.

    Raises:
        ValueError: no names, "main", one that is no identifier or taken by `nn.ModuleDict`, a lazy layer that has run no forward,
            a batch norm that normalises in another way now. Nothing is changed then.

    Cost: a walk over the modules, and per branch a copy of the layers' state. No collective: ranks that agree still do.
    Source: section 3 of arXiv 1911.09665; three branches as in the released code of ConAdv (arXiv 2106.00221).
    """
    who = "convert_split_bn"
    check(not isinstance(branches, str) and len(branches) > 0, who, f"branches={branches!r}", "be a sequence of names, not empty")
    for name in branches:
        good = isinstance(name, str) and name.isidentifier() and name != MAIN and not hasattr(nn.ModuleDict(), name)
        check(good, who, f"branch {name!r}", "be an identifier other than 'main' and the attributes of nn.ModuleDict")
    other = [type(m).__name__ for m in model.modules() if isinstance(m, Converted)]
    check(not other, who, f"a model with {other[:1]} in place of batch norms", "have batch norms to split",
          "undo it first: restore_batch_norm, restore_adapted")
    held = {id(b) for m in model.modules() if isinstance(m, SplitBatchNorm) for b in m.branches.values()}
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and id(m) not in held]
    for layer in layers:
        lazy = isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params()
        check(not lazy, who, f"a {type(layer).__name__} without shape", "be initialised", "run one forward before")
    for layer in layers:
        if not isinstance(layer, SplitBatchNorm):
            layer.__class__ = _split_class(type(layer))
            layer.add_module("branches", nn.ModuleDict())
        assert isinstance(layer, SplitBatchNorm)
        layer.branches.update({name: _twin(layer) for name in dict.fromkeys(branches) if name not in layer.branches})
    _LAYERS.clear()
    return len(layers)


@contextmanager
def split_branch(model: nn.Module, name: str, *, halves: bool = False) -> Iterator[None]:
    """Inside the block, split layers of `model` that are in training mode use branch `name`; "main" is the layer itself.

    With `halves`, only for the second half of the rows; the first is main's. One forward of two concatenated batches then does
    for two, with larger kernels, half the launches and, where weights are sharded, half the gathers; the rest of the model must
    treat each row for itself. Equal to two forwards but for rounding and the noise of dropout.

    Layers in evaluation mode use main all the same. Blocks nest; the branch before comes back, also when the block raises.
    Forwards count, not backwards: a backward may come later. One that repeats forwards (activation checkpointing) is refused by
    the layers, since it cannot tell which branch it repeats.

    Raises:
        ValueError: a branch that not every split layer has. A model without split layers accepts any name. With `halves`, in the
            forward: an odd number of rows.

    Cost: two attributes per split layer, and with `halves` a copy of its output and of its input's gradient; the walk that finds
    the layers is made once per model, and again after a conversion. A split layer moved into a model by hand after its first
    block is found at the next conversion only.
    """
    layers = _known(model, name, "split_branch")
    before = [(layer._active, layer._halves) for layer in layers]
    try:
        for layer in layers:
            # Past nn.Module's __setattr__, which looks for parameters: a block costs two of these per layer, twice.
            object.__setattr__(layer, "_active", None if name == MAIN else name)
            object.__setattr__(layer, "_halves", halves)
        yield
    finally:
        for layer, (active, half) in zip(layers, before, strict=True):
            if isinstance(layer, SplitBatchNorm):  # not stripped meanwhile
                object.__setattr__(layer, "_active", active)
                object.__setattr__(layer, "_halves", half)


def strip_split_bn(model: nn.Module) -> int:
    """Undo `convert_split_bn`, in place: drop all branches, keep the main weights and statistics, restore the classes.

    Returns:
        How many layers were split.

    Cost: a walk over the modules. Optimisers that hold parameters of branches go on holding them.
    """
    layers = [m for m in model.modules() if isinstance(m, SplitBatchNorm)]
    for layer in layers:
        del layer.branches
        for name in ("_active", "_halves"):
            layer.__dict__.pop(name, None)
        layer.__class__ = layer.original  # type: ignore[assignment]
    _LAYERS.clear()
    return len(layers)


def branch_parameters(model: nn.Module, name: str = "adversarial") -> dict[str, nn.Parameter]:
    """The parameters of one branch of all split layers, by their names in `model`; "main": the layers' own.

    For groups without weight decay and trust ratio. Empty when no layer is split, or none is affine. Cost: a walk.

    Raises:
        ValueError: a branch that not every split layer has.
    """
    layers = _known(model, name, "branch_parameters")
    if name == MAIN:
        other = {id(p) for layer in layers for p in layer.branches.parameters()}
        wanted = {id(p) for layer in layers for p in layer.parameters()} - other
    else:
        wanted = {id(p) for layer in layers for p in layer.branches[name].parameters()}
    return {n: p for n, p in model.named_parameters() if id(p) in wanted}


_LAYERS: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[SplitBatchNorm]]] = weakref.WeakKeyDictionary()
"""Split layers by model. Weak on both sides: a layer can be its own model."""


def _known(model: nn.Module, name: str, who: str) -> list[SplitBatchNorm]:
    """The split layers, all of which have branch `name`."""
    if model not in _LAYERS:
        _LAYERS[model] = [weakref.ref(m) for m in model.modules() if isinstance(m, SplitBatchNorm)]
    layers = [layer for layer in (ref() for ref in _LAYERS[model]) if layer is not None]
    if not all(name == MAIN or name in layer.branches for layer in layers):
        shared = set.intersection(*(set(layer.branches) for layer in layers))
        raise ValueError(f"{who}: branch {name!r}, must be one that every split layer has; known: "
                         f"{', '.join([MAIN, *sorted(shared)])}")
    return layers


_CLASSES: dict[type[_BatchNorm], type[SplitBatchNorm]] = {}


def _split_class(original: type[_BatchNorm]) -> type[SplitBatchNorm]:
    """The split class of an original one, always the same."""
    if original not in _CLASSES:
        names = {"original": original, "__module__": __name__}
        _CLASSES[original] = type(f"Split{original.__name__}", (SplitBatchNorm, original), names)
    return _CLASSES[original]


def _rebuild(original: type[_BatchNorm]) -> SplitBatchNorm:
    """An empty split layer, for pickle and copy to fill."""
    _LAYERS.clear()  # it may be on its way into a model that was walked
    cls = _split_class(original)
    return cls.__new__(cls)


def _twin(layer: SplitBatchNorm) -> _BatchNorm:
    """A layer of the original class with copies of the layer's own state, without its hooks and branches."""
    twin = layer.original.__new__(layer.original)
    nn.Module.__init__(twin)
    whole = layer.__getstate__()  # type: ignore[no-untyped-call]
    state = {k: v for k, v in whole.items() if "hook" not in k and k not in ("_active", "_halves")}
    state["_modules"] = {k: v for k, v in state["_modules"].items() if k != "branches"}
    group = state.get("process_group")
    twin.__dict__.update(copy.deepcopy(state, {id(group): group}))  # a communicator is shared; it cannot be copied
    return twin
