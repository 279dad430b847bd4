"""A trainer goes on with a model that has grown: a new engine, and everything known carried over by name.

An engine takes no more parameters once it is built, so the model is built anew: the old engine is
let go, the bare model comes from the trainer's factory, and what both have goes over by name: weights,
moments, averages, what parts remember of a weight, buffers and modes. What is new begins, in a
parameter group of its own: DeepSpeed counts steps by group.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from everbatch import seeds
from everbatch.checkpoint.manifest import json_problem
from everbatch.engines.frozen import frozen_of
from everbatch.engines.host import plain_name
from everbatch.errors import check
from everbatch.optim.restart.fresh import digest
from everbatch.train.buffers import buffer_problem, carry_buffers, persistent, vacant

__all__ = ["relaunch", "replay"]


def relaunch(trainer: Any, grow: Any) -> None:
    """`Trainer.relaunch`."""
    growth = trainer.growth
    check(growth.build is not None, "Trainer", f"relaunch({grow!r}) without a factory", "have one",
          "pass Trainer(..., grown=f), where f(growths) makes the bare model after them")
    where = f"inside task {trainer.run.task_index}" if trainer.run.in_task else "inside a step"
    between = not trainer.run.in_task and trainer.optimizer._objective is None
    check(between, "Trainer", f"relaunch({grow!r}) {where}", "be called between tasks",
          "call it in on_task_start, in on_task_end or between two calls of fit")

    def made() -> nn.Module:
        told = json_problem(grow, "the growth")
        check(told is None, "Trainer", f"relaunch({grow!r})", "be given a plain value", str(told))
        model = _built(trainer, [*growth.done, grow])
        _refuse_changes(trainer.module, model)
        return model

    model = _together(trainer, made, repr(grow))
    born = growth.born_in(trainer.module, model)
    carried = _Carried.of(trainer)
    trainer.engine.close()
    trainer.engine = trainer.optimizer = trainer.module = None
    gc.collect()  # an engine is full of circles, and as large as the new one

    carried.put_weights(model)
    growth.done, growth.born = [*growth.done, grow], born
    trainer._launch(model)
    carried.put_rest(trainer)


def replay(trainer: Any, growths: Sequence[Any], born: Sequence[Sequence[str]]) -> None:
    """Build the trainer anew as it is after these growths, with fresh weights and state: a checkpoint
    that holds them fills all of it. Collective.

    Raises:
        ValueError: on every rank: no factory, or one that makes other parameters.
    """
    growth = trainer.growth

    def made() -> nn.Module:
        check(growth.build is not None, "Trainer", f"no factory, and {len(growths)} growths to repeat",
              "have one", "pass Trainer(..., grown=f), as the run had it that wrote the checkpoint")
        model = _built(trainer, growths)
        names = set(_parameters(model))
        odd = sorted(names ^ {name for names in born for name in names}) if growths else []
        check(not odd, "Trainer", f"the factory's model after {len(growths)} growths has other "
              f"parameters than the checkpoint: {odd[:5]}", "be the same", "repeat the factory")
        return model

    model = _together(trainer, made, repr(list(growths)))
    trainer.engine.close()
    trainer.engine = trainer.optimizer = trainer.module = None
    gc.collect()
    growth.done, growth.born = list(growths), [list(names) for names in born] or [list(_parameters(model))]
    trainer._launch(model)


def _built(trainer: Any, growths: Sequence[Any]) -> nn.Module:
    """The factory's model, as the trainer's parts want it. What parts remember stays theirs."""
    model = trainer.growth.model(growths, trainer.seed)
    _refuse_engine(trainer.module, model)
    states: dict[type, Any] = getattr(trainer, "states", {})
    kept = {part: dict(vars(state)) for part, state in states.items()}
    try:
        return trainer._configured(model)  # type: ignore[no-any-return]
    finally:
        for part, fields in kept.items():
            vars(states[part]).update(fields)


def _together(trainer: Any, made: Callable[[], nn.Module], asked: str) -> nn.Module:
    """What `made` gives, where it gives the same on every rank; else one error on all, and the
    trainer is as before. One gather."""
    before, model, problem = dict(vars(trainer)), None, ""
    facts: dict[str, str] = {}
    try:
        model = made()
        facts = {"growth": asked, **_facts(trainer.module, model)}
    except Exception as error:  # whatever the caller's factory thinks of
        kind = type(error).__name__
        problem = str(error) if isinstance(error, ValueError) else f"Trainer: the factory raised {kind}: {error}"
    found: list[Any] = trainer.world.gather((problem, facts))
    problems = [text for text, _ in found if text]
    ranks = [rank for rank, (text, _) in enumerate(found) if text]
    if problems and len(problems) < len(found):
        problems[0] += f" (on rank {ranks[0]} of {len(found)})"
    odd = [] if problems else [k for k in facts if len({theirs[k] for _, theirs in found}) > 1]
    if odd:
        problems = [f"Trainer: the {odd[0]} differs by rank: {sorted({theirs[odd[0]] for _, theirs in found})}, must be "
                    "the same on every rank; let the factory draw from torch's global generator alone"]
    if problems:
        vars(trainer).clear()
        vars(trainer).update(before)
        raise ValueError(problems[0])
    assert model is not None
    return model


def _facts(old: nn.Module, model: nn.Module) -> dict[str, str]:
    """What ranks must have alike of a new model, in words."""
    known, named = _parameters(old), _parameters(model)
    shapes = [(name, tuple(p.shape), p.requires_grad) for name, p in named.items()]
    new = {name: p for name, p in named.items() if name not in known}
    return {"layout of the grown model": f"{seeds.derive(repr(shapes)):x}", "bits of new weights": digest(new)}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by bare name."""
    return {plain_name(name): p for name, p in model.named_parameters()}


def _refuse_engine(old: nn.Module, model: Any) -> None:
    """Refuse what is no bare module, or not a new one."""
    must, cure = "be a bare module", "build it as for Trainer(model, ...), on the CPU"
    kind = type(model).__name__
    check(isinstance(model, nn.Module), "Trainer", f"the factory gives a {kind}", must, cure)
    wrapped = [type(part).__name__ for part in model.modules()
               if isinstance(part, DistributedDataParallel | FSDPModule) or hasattr(part, "zero_optimization_stage")]
    check(not wrapped, "Trainer", f"the factory gives a model with {wrapped[:1]} in it", must, cure)
    sharded = [n for n, p in model.named_parameters() if isinstance(p, DTensor) or hasattr(p, "ds_id")]
    check(not sharded, "Trainer", f"the factory gives a model whose {sharded[:1]} are sharded", must, cure)
    used = {id(p) for p in old.parameters()}
    shared = [name for name, p in model.named_parameters() if id(p) in used]
    check(not shared, "Trainer", f"the factory gives the model in use, or parts of it: {shared[:3]}",
          "make a new one", "its weights are those of the old engine, which is let go")
    unreal = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    check(not unreal, "Trainer", f"the factory leaves {unreal[:3]} on the meta device", "have values", cure)


def _refuse_changes(old: nn.Module, model: nn.Module) -> None:
    """Refuse a model that has dropped or changed something known."""
    ours = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in _parameters(old).items()}
    theirs = {n: tuple(p.shape) for n, p in _parameters(model).items()}
    keep = "a growth adds parameters, and changes none; in parts, as everbatch.nn.PartsHead"
    lost = [name for name in ours if name not in theirs]
    check(not lost, "Trainer", f"the factory's model lacks {lost[:3]}", "have every parameter that is known", keep)
    odd = [name for name in ours if ours[name] != theirs[name]]
    shapes = f"{[theirs[n] for n in odd[:3]]}, they were {[ours[n] for n in odd[:3]]}"
    check(not odd, "Trainer", f"the factory's {odd[:3]} have shapes {shapes}", "keep their shapes", keep)
    problem = buffer_problem(persistent(old), model)
    check(not problem, "Trainer", f"the factory's model {problem}", "take every buffer that is known", keep)
    check(any(p.requires_grad for p in model.parameters()), "Trainer", "the factory's model has nothing to train",
          "train something", "freeze less")


@dataclass
class _Carried:
    """What goes over to the model that has grown, whole, on the CPU."""

    optimizer: dict[str, Any]
    weights: dict[str, Tensor]
    """Frozen ones too."""
    buffers: dict[str, Tensor]
    """This rank's own."""
    vacant: list[str]
    """Buffers that are None."""
    training: dict[str, bool]
    """Mode of each module."""

    @classmethod
    def of(cls, trainer: Any) -> _Carried:
        """Collective where weights are sharded."""
        module = trainer.module
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # after a forward the root stays gathered: in place of its parameters are copies
        saved = trainer.optimizer.state_dict(weights=True)["everbatch"]
        tensors = {key: value.cpu() for key, value in saved["tensors"].items()}
        trained = {key.removeprefix("master/"): value for key, value in tensors.items() if key.startswith("master/")}
        frozen = {name: value.cpu() for name, value in frozen_of(module).items()}
        return cls(
            {"everbatch": {**saved, "tensors": tensors}}, frozen | trained,
            {name: b.detach().cpu().clone() for name, b in persistent(module).items()}, vacant(module),
            {name: part.training for name, part in module.named_modules()})

    @torch.no_grad()
    def put_weights(self, model: nn.Module) -> None:
        """Before the launch: engines take the weights that they find."""
        for name, p in _parameters(model).items():
            if name in self.weights:
                p.copy_(self.weights[name])

    def put_rest(self, trainer: Any) -> None:
        """After it: DDP gives every rank the first one's buffers. Collective where weights are
        sharded."""
        trainer.optimizer.load_state_dict(self.optimizer, grown=True)
        carry_buffers(self.buffers, self.vacant, trainer.module)
        for name, part in trainer.module.named_modules():
            part.training = self.training.get(name, part.training)
