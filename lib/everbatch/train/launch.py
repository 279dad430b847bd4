"""Put a model and a composed optimizer on an engine: plain torch, DDP, FSDP2 or DeepSpeed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from everbatch.contract import base_of, option_names, route
from everbatch.distributed import World, init
from everbatch.engines.engine_modes import refuse_moe, refuse_scalars
from everbatch.engines.release import release
from everbatch.errors import UnsupportedHost, check, nearest
from everbatch.optim.groups import groups, grown_groups
from everbatch.optim.mixin import OptimizerMixin
from everbatch.train.blocks import blocks_of, shard_blocks
from everbatch.train.compiled import as_it_is, compile_blocks, compile_engine
from everbatch.train.ddp import wrap

__all__ = ["Engine", "check_optimizer", "launch", "shard_blocks"]


@dataclass(frozen=True)
class Engine:
    """A launched model."""

    optimizer: OptimizerMixin
    module: nn.Module
    """The bare module; with DeepSpeed's and FSDP2's hooks on it."""
    call: Callable[..., Any]
    """Runs a forward so that gradients of its result are reduced."""
    bare: Callable[..., Any]
    """Runs a forward of the bare module, for gradients of inputs: reduces nothing, whatever is differentiated."""

    def close(self) -> None:
        """Let go of gradients, and of what DeepSpeed keeps of an engine outside of it. Nothing here is
        of use afterwards. No collective."""
        for p in self.module.parameters():
            p.grad = None
        release(getattr(self.optimizer.host, "engine", None))


def launch(
    model: nn.Module, optimizer: functools.partial[Any], engine: str | Mapping[str, Any], *, world: World,
    device: torch.device, decay_vectors: bool, seed: int, ddp: Mapping[str, Any] | None = None, compiled: bool = False,
    born: Sequence[Sequence[str]] = (),
) -> Engine:
    """Build the optimizer over `model` on `engine`.

    Args:
        model: on any device; moved, and converted in place by FSDP2 and DeepSpeed.
        optimizer: `functools.partial(Cls, **options)`, options of the base and of the mixins together.
        engine: "plain", "ddp", "fsdp2", or a complete DeepSpeed configuration.
        ddp: options of DDP; see `everbatch.train.ddp`.
        compiled: have training passes compiled; see `everbatch.train.compiled`.
        decay_vectors: False puts parameters of fewer than two dimensions into a group with weight_decay 0.
        born: names of parameters by growth: each gets groups of its own. Empty, or one: as ever.
    """
    cls: Any = optimizer.func
    options = dict(optimizer.keywords)
    if isinstance(engine, Mapping):
        return _deepspeed(model, cls, options, engine, device, decay_vectors, seed, compiled, born)
    check(engine in ("plain", "ddp", "fsdp2"), "Trainer", f"engine={engine!r}",
          "be plain, ddp, fsdp2 or a DeepSpeed configuration", nearest(str(engine), ("plain", "ddp", "fsdp2")))
    check(engine != "plain" or world.size == 1, "Trainer", f"engine='plain' on {world.size} ranks", "run on one rank",
          "use engine='ddp', 'fsdp2' or a DeepSpeed configuration")
    model.to(device)
    call: nn.Module = model
    if compiled and engine != "fsdp2":
        model.compile()
    if engine == "ddp":
        call = wrap(model, ddp)
    elif engine == "fsdp2":
        if compiled:
            compile_blocks(blocks_of(model) or [model])
        shard_blocks(model, device.type)
    decay = None if decay_vectors else options.get("weight_decay", 0.0)
    if len(born) > 1:
        by_growth = grown_groups(call.named_parameters(), born, decay, ddp=engine == "ddp")
        return Engine(cls(by_growth, module=call, seed=seed, **options), model, call,
                      as_it_is(model) if compiled else model)
    target: Any = call if decay is None else groups(model, weight_decay=decay)
    made = cls(target, seed=seed, **options)
    # Given groups, it learns of modules in its first pass: too late for weights edited after an evaluation.
    made.host.meet(call.modules())
    return Engine(made, model, call, as_it_is(model) if compiled else model)


def check_optimizer(optimizer: Any) -> None:
    """Refuse, with the line that would work, what is no `functools.partial` of a composed optimizer class."""
    cure = "functools.partial(compose(base=torch.optim.SGD), lr=0.1)"
    if isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        check(False, "Trainer", f"optimizer={kind}(...), built already", "be a class and its options: the trainer builds it over "
              "the engine's parameters", f"pass {cure.replace('SGD', base_name(type(optimizer)))} with your mixins and options")
    if isinstance(optimizer, type):
        own = issubclass(optimizer, OptimizerMixin)
        made = optimizer.__name__ if own else cure.split("(", 1)[1].rsplit(",", 1)[0].replace("SGD", optimizer.__name__)
        check(False, "Trainer", f"optimizer={optimizer.__name__}, a class", "come with its options",
              f"pass functools.partial({made}, lr=0.1)")
    partial = isinstance(optimizer, functools.partial)
    check(partial, "Trainer", f"optimizer={optimizer!r}", "be functools.partial(Cls, option=value, ...) of a composed optimizer "
          "class", f"pass {cure}")
    cls = optimizer.func
    composed = isinstance(cls, type) and issubclass(cls, OptimizerMixin)
    name = getattr(cls, "__name__", repr(cls))
    check(composed, "Trainer", f"optimizer=functools.partial({name}, ...)", "be one of a composed optimizer class",
          f"pass functools.partial(compose(base={_path(cls)}), ...)" if isinstance(cls, type) else f"pass {cure}")
    check(not optimizer.args, "Trainer", f"optimizer=functools.partial({name}, {', '.join(map(_short, optimizer.args))})",
          "hold options by keyword alone", "leave out the parameters: the trainer passes its engine's")


def base_name(cls: type) -> str:
    """Name of the torch class below an optimizer's parts."""
    base = base_of(cls) if issubclass(cls, OptimizerMixin) else cls
    return (base or cls).__name__


def _path(cls: type) -> str:
    return f"torch.optim.{cls.__name__}" if cls.__module__.startswith("torch.optim") else cls.__name__


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, int | float | str) else f"{type(value).__name__}(...)"


def _deepspeed(model: nn.Module, cls: type[OptimizerMixin], options: dict[str, Any], config: Mapping[str, Any],
               device: torch.device, decay_vectors: bool, seed: int, compiled: bool,
               born: Sequence[Sequence[str]]) -> Engine:
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError("engine: DeepSpeed is not installed; pip install everbatch[deepspeed]") from error
    refuse_moe("DeepSpeed", model)
    refuse_scalars("DeepSpeed", model)
    chosen, rest = route(cls, options)
    base = base_of(cls)
    assert base is not None
    decay = None if decay_vectors else rest.get("weight_decay", 0.0)
    target: Any = list(model.parameters())
    if len(born) > 1 or decay is not None:
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        named = grown_groups(trained, born, decay) if len(born) > 1 else groups(model, weight_decay=decay or 0.0)
        target = [{**g, "params": [p for _, p in g["params"]]} for g in named]
    try:
        client = base(target, **rest)
    except TypeError as error:
        raise TypeError(f"{cls.__name__}: {error}; options of the mixins: {', '.join(sorted(option_names(cls)))}") from None
    init(device.type, lone=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=client, config=dict(config))
    half = bool(engine.bfloat16_enabled())
    mixed = [n for n, m in engine.module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
             and m.running_mean is not None and m.running_mean.dtype != torch.bfloat16]
    if half and mixed:
        raise UnsupportedHost(f"DeepSpeed: {mixed[0]} keeps its running statistics in fp32 beside bf16 weights, which torch's "
                              "batch norm refuses; use precision fp32, engine ddp or fsdp2 with trainer.precision=bf16, "
                              "or data_types.buffer_dtype: bf16 in the DeepSpeed configuration")
    flat = {f"{part.__name__.lower()}_{name}": value for part, values in chosen.items() for name, value in values.items()}

    def cast(value: Tensor) -> Tensor:
        return value.bfloat16() if half and value.is_floating_point() else value

    def call(*inputs: Tensor, **named: Tensor) -> Any:
        return engine.module(*map(cast, inputs), **{name: cast(value) for name, value in named.items()})

    if compiled:
        compile_engine(engine)
    return Engine(cls.on(engine, seed=seed, **flat), engine.module, call, as_it_is(call) if compiled else call)
