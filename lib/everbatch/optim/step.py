"""The final step: passes, agreement on finiteness, update. Nobody overrides it; parts override the verbs that it calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from everbatch.engines.nonfinite import nonfinite_gradients
from everbatch.engines.passes import Accumulation, Objective
from everbatch.optim.composed import Composed
from everbatch.optim.savable import check_held

__all__ = ["Stepped", "take_step"]


class Stepped(Composed, Protocol):
    """What the step needs of an optimizer: `OptimizerMixin` has it."""

    metrics: dict[str, Tensor]
    last_applied: bool
    last_passes: int
    last_nonfinite: str | None
    _accumulation: Accumulation
    _asked: tuple[list[Any], bool] | None
    _acting: frozenset[str]
    _held: frozenset[str]
    _needed: dict[str, str]
    _objective: Objective | None
    _on_apply: list[Callable[[], None]]
    _on_skip: list[Callable[[], None]]
    _replaced: str
    _savable: bool

    def move_parameters(self, objective: Objective) -> None: ...
    def estimate_gradient(self, objective: Objective) -> Any: ...
    def add_penalty(self) -> None: ...
    def edit_gradient(self) -> None: ...
    def update(self) -> None: ...
    def edit_parameters(self) -> None: ...


@torch.no_grad()
def take_step(opt: Stepped, closure: Callable[[], Any] | None = None, **auxiliary: Callable[..., Any]) -> Any:
    """Take one step: passes, agreement on finiteness, update.

    Args:
        closure: runs forward, calls `opt.backward(loss)` and returns the loss (over micro-batches their mean, which is the
            sum of what `opt.backward` returns). It must not zero gradients. Without it the gradients that are there are
            used, and a mixin that needs a pass raises `RuntimeError`.
        auxiliary: further objectives that a mixin needs, by name. `output=` and `data=` are closures like `closure`, of
            another scalar, `reference=` one of other samples; `per_sample=` maps row indices (None: all) to the losses (n,)
            of those rows, with a graph.

    Returns:
        What the closure returned in the recorded pass, detached.

    Raises:
        RuntimeError: a closure after which no parameter has a gradient. Before anything moves, if a backward outside of the
            closure has left a gradient, as a framework's accumulation does; where a host can tell: plain torch, DDP, FSDP2
            and DeepSpeed's own backward.
    """
    _require(opt, auxiliary)
    several = _several(opt)
    host, micro_batches = opt.host, opt._accumulation
    if host.replaced:
        raise RuntimeError(f"{type(opt).__name__}: step() inside a block where other weights stand in, such as averaged ones, "
                           "would be lost at its end; take it after the block")

    # With a closure, gradients that are there were made outside of it, and would be lost; without, they are used.
    if closure is None:
        micro_batches.complete()
    elif not micro_batches.excused:
        name = host.left_over()
        if name:
            raise _lost(type(opt).__name__, name)
    micro_batches.excused = closure is not None

    opt.metrics, opt._on_apply, opt._on_skip, opt._replaced = {}, [], [], ""
    host.begin_step()
    closures = {**auxiliary, "loss": closure} if closure is not None else auxiliary
    acting = opt._acting  # verbs that nobody overrides need no call
    penalty = opt.add_penalty if "add_penalty" in acting else None
    opt._objective = objective = Objective(micro_batches, closures, penalty, several, (opt.seed, opt.step_count))
    applied = None
    try:
        if "move_parameters" in acting:
            opt.move_parameters(objective)
        loss = opt.estimate_gradient(objective)
        if closure is not None and not host.any_gradient():
            who = type(opt).__name__
            raise RuntimeError(f"{who}: no parameter has a gradient after the closure; call opt.backward(loss) in it, on a "
                               f"loss of this model (of a DeepSpeed engine: {who}.on(engine))")
        applied = bool(host.finite())
        if applied:
            if "edit_gradient" in acting:
                opt.edit_gradient()
            for commit in opt._on_apply:
                commit()
            if not opt._replaced:
                _update(opt) if opt._held or "update" in acting else host.update()
                host.dirty = False
            if not opt._savable:
                check_held(opt)
                opt._savable = True
            opt.step_count += 1
            if "edit_parameters" in acting:
                opt.edit_parameters()
        else:
            opt.last_nonfinite = next(iter(nonfinite_gradients(host)), None)
            host.watch.rollback()
            for undo in reversed(opt._on_skip):
                undo()
            opt.skipped_count += 1
    except BaseException:
        applied = None
        raise
    finally:
        opt._on_apply, opt._on_skip, opt._objective, opt._held = [], [], None, frozenset()
        if host.watch.looking or host.watch.buffers:
            host.watch.end_step()
        host.end_step(applied)
    host.discard()
    if host.dirty:
        host.publish_if_dirty()
    torch.clear_autocast_cache()  # an autocast around the loop keeps weights as they were before it
    micro_batches.excused, micro_batches.loop = False, None
    opt.last_applied, opt.last_passes = applied, objective.passes
    return objective.loss if closure is not None else loss


def _lost(who: str, name: str) -> RuntimeError:
    """A gradient lies about that a pass would forget: what to say."""
    return RuntimeError(f"{who}: step(closure) found a gradient of a backward outside of the closure ({name}), which every pass "
                        "would forget; run all micro-batches inside the closure (opt.micro_batches), call opt.step() without a "
                        "closure to use the gradients that are there, or opt.zero_grad() before the step to forget them")


def _several(opt: Stepped) -> bool:
    """Whether steps have more passes than the recorded one: asked of the parts once, and again where options are other ones."""
    options = list(opt.configs.values())
    if opt._asked is None or any(a is not b for a, b in zip(opt._asked[0], options, strict=True)):
        opt._asked = options, opt.extra_passes() > 0
    return opt._asked[1]


def _require(opt: Stepped, given: Mapping[str, Any]) -> None:
    """Refuse a step that lacks an objective some part needs, or has one that no part knows."""
    for name, part in opt._needed.items():
        if name not in given:
            raise RuntimeError(f"{type(opt).__name__}: {part} needs opt.step(closure, {name}=...), and the step was given "
                               f"{sorted(given) or 'none'}")
    odd = sorted(set(given) - {"output", "data", "per_sample", "reference"})
    if odd:
        raise TypeError(f"{type(opt).__name__}: step() got {odd[0]}=; auxiliary objectives are output=, data=, per_sample=, "
                        "reference=")


def _update(opt: Stepped) -> None:
    """The update, after which what is held is put back, with its moments."""
    held = [s for s in opt.host.shards if s.name in opt._held]
    kept = [(s, s.data.clone(), {k: v.clone() for k, v in s.moments.items()}) for s in held]
    opt.update()
    for shard, data, moments in kept:
        shard.data.copy_(data)
        for name, value in shard.moments.items():
            value.copy_(moments[name]) if name in moments else value.zero_()
    if kept:
        opt.host.touch()
