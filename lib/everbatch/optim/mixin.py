"""The root of the optimizer mixins: the final step, and what a mixin may ask for."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from everbatch.contract import Contract, Cost, base_of, option_names, parts_of, reject_unknown
from everbatch.engines.host import Host
from everbatch.engines.local import LocalHost
from everbatch.engines.passes import Accumulation, Objective, backward
from everbatch.engines.shards import Vector
from everbatch.errors import CompositionError, UnsupportedHost, check
from everbatch.optim import state as persistence
from everbatch.optim.savable import check_savable
from everbatch.optim.sharpness.realised import realised, report
from everbatch.optim.step import take_step
from everbatch.problems import Problem

__all__ = ["OptimizerMixin"]

Opt = TypeVar("Opt", bound="OptimizerMixin")


class OptimizerMixin(Contract):
    """Root of the optimizer mixins; stands between the parts and a `torch.optim` class.

    Verbs, in the order the gradient travels: `move_parameters`, `estimate_gradient`, `add_penalty` (after every pass),
    `displacement`, `edit_gradient`, `update`, `edit_parameters`; and `predicted`, around every prediction of a trainer. Verbs
    that edit call `super()` first, so the leftmost part acts last; in `update`, `estimate_gradient` and `predicted` the leftmost
    is outermost.

    Cost of the bare step: one host sync (is the gradient finite?), and one scalar all-reduce where weights are sharded.
    """

    verbs: ClassVar[tuple[str, ...]] = ("move_parameters", "estimate_gradient", "add_penalty", "displacement",
                                        "edit_gradient", "update", "edit_parameters", "predicted")
    needs: ClassVar[tuple[str, ...]] = ()
    """Auxiliary objectives that `step` must be given: "output", "data", "per_sample"."""
    minimizes: ClassVar[bool] = True
    """Whether what it does is right only where the update goes down the gradient: a base with maximize=True is refused."""
    moves_first: ClassVar[bool] = False
    """Whether the recorded pass runs at weights that this part has moved; what reads weights in that pass must know."""
    final: ClassVar[tuple[str, ...]] = ("step", "backward", "zero_grad", "state_dict", "load_state_dict")
    _foundation: ClassVar[type[torch.optim.Optimizer] | None] = None
    """The class that parts stand on; None for a part."""
    host: Host
    param_groups: list[dict[str, Any]]
    state: Any
    metrics: dict[str, Tensor]
    """What mixins logged during the last step: 0-dim tensors, still on the device."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        base = base_of(cls)
        if base is not None and (not issubclass(base, torch.optim.Optimizer) or base is torch.optim.Optimizer):
            raise CompositionError(f"{cls.__name__}: its base {base.__name__} is no optimizer with a step of its own; end the "
                                   "class in one, such as torch.optim.SGD")
        cls._foundation = base

    def __init__(
        self, params: Any, *, seed: int = 0, scaler: Any | None = None, module: nn.Module | None = None,
        **options: Any,
    ) -> None:
        """Build over plain torch, DDP or FSDP2.

        Args:
            params: the module the closure calls (DDP-wrapped or fully sharded as it is), its named parameters, or parameter
                groups whose "params" are named.
            seed: root of all randomness of the mixins.
            scaler: a `torch.amp.GradScaler` for fp16; the step unscales, skips and updates it.
            module: the module the closure calls, where `params` are groups of its parameters.
            options: options of the mixins, and of the base optimizer.
        """
        module = params if isinstance(params, nn.Module) else module
        if callable(getattr(module, "zero_optimization_stage", None)):
            raise TypeError(f"{type(self).__name__}: got a DeepSpeed engine, whose weights only the engine can update; call "
                            f"{type(self).__name__}.on(engine, ...)")
        rest = self._start(options, seed)
        allowed = set(inspect.signature(base_of(type(self)).__init__).parameters) - {"self", "params"}  # type: ignore[misc]
        reject_unknown(type(self), rest, allowed | {"seed", "scaler", "module"})
        super().__init__(_named_groups(type(self).__name__, params), **rest)  # type: ignore[call-arg]
        self._attach(LocalHost(self, module, scaler), rest)

    @classmethod
    def on(cls: type[Opt], engine: Any, *, seed: int = 0, **options: Any) -> Opt:
        """Build over a DeepSpeed engine whose client optimizer is of this class's base.

        `param_groups` and `state` are live views of the engine's inner optimizer, so torch schedulers attach to the
        result; if the engine has a scheduler of its own, the engine steps it. Options of the base belong to the client
        optimizer and are refused here.

        Raises:
            UnsupportedHost: a mode of the engine in which a method would not be exact.
        """
        from everbatch.engines.taken import take
        from everbatch.engines.zero import ZeroHost

        self, base = cls.__new__(cls), base_of(cls)
        assert base is not None
        rest = self._start(options, seed)
        theirs = sorted(set(rest).intersection(inspect.signature(base.__init__).parameters))  # type: ignore[misc]
        if theirs:
            raise TypeError(f"{cls.__name__}.on: {theirs[0]} is an option of {base.__name__}; set it on the optimizer that "
                            "the engine was initialised with")
        reject_unknown(cls, rest, {"seed"})
        host = ZeroHost(engine, base)
        torch.optim.Optimizer.__setstate__(self, {"defaults": dict(host.inner.defaults)})  # type: ignore[arg-type]
        self._attach(host, host.inner.defaults)
        take(engine, cls.__name__)
        return self

    def _start(self, options: dict[str, Any], seed: int) -> dict[str, Any]:
        who, base = type(self).__name__, base_of(type(self))
        check(isinstance(seed, int), who, f"seed={seed!r}", "be an integer")
        closure = inspect.signature(base.step).parameters.get("closure")  # type: ignore[union-attr]
        check(closure is None or closure.default is not inspect.Parameter.empty, who, f"base {base.__name__}, which runs passes "  # type: ignore[union-attr]
              "of its own", "update once per step", "use a base whose step() needs no closure")
        self.seed, self.step_count, self.skipped_count, self.metrics = seed, 0, 0, {}
        self._on_apply: list[Callable[[], None]] = []
        self._on_skip: list[Callable[[], None]] = []
        self._replaced, self._warned = "", False
        self._held: frozenset[str] = frozenset()
        self._asked: tuple[list[Any], bool] | None = None
        """Options, and whether parts declared several passes with them."""
        self._acting = frozenset(v for v in self.verbs if getattr(type(self), v) is not getattr(OptimizerMixin, v))
        """Verbs that some part, or the class itself, overrides."""
        self._needed = {name: part.__name__ for part in parts_of(type(self)) for name in part.needs}  # type: ignore[attr-defined]
        """Auxiliary objectives that a step must be given, and who needs them."""
        self._objective: Objective | None = None
        self.last_applied, self.last_passes = True, 0
        self.last_nonfinite: str | None = None
        """Of the last skipped step: the first weight whose gradient was not finite in this rank's slices."""
        return self._configure(options)

    def _attach(self, host: Host, options: Mapping[str, Any]) -> None:
        self.host = host
        self._savable = check_savable(self, options)
        self._accumulation = Accumulation(type(self).__name__, host)
        self._check_groups(host.groups())
        for part in parts_of(type(self)):
            part.on_attach(self)  # type: ignore[attr-defined]

    def _check_groups(self, groups: Iterable[Mapping[str, Any]]) -> None:
        down = [p.__name__ for p in parts_of(type(self)) if p.minimizes]  # type: ignore[attr-defined]
        up = any(group.get("maximize") for group in groups)
        check(not (down and up), type(self).__name__, f"maximize=True with {', '.join(down)}", "minimise", "back-propagate the "
              "negative of the objective instead; a part of your own for which it makes no difference says minimizes = False")
        ours = option_names(type(self)) - self.defaults.keys()
        odd = sorted({name for group in groups for name in group if name in ours})
        check(not odd, type(self).__name__, f"{odd[:3]} in a parameter group", "be an option of the optimizer",
              "a mixin has the same options for all groups; pass it as a keyword")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters, as `torch.optim.Optimizer.add_param_group` does.

        Raises:
            UnsupportedHost: on DeepSpeed, whose engine has laid out its shards.
        """
        host = self.__dict__.get("host")  # none yet while the base is being built
        if host is not None and not isinstance(host, LocalHost):
            raise UnsupportedHost(f"{host.title}: a built engine takes no more parameters; initialise it with all of them")
        if host is None:
            super().add_param_group(param_group)  # type: ignore[misc]
            return
        self._check_groups([self.defaults | param_group])
        before = list(self.param_groups)
        super().add_param_group(param_group)  # type: ignore[misc]
        try:
            self.host = LocalHost(self, *host.recipe())
        except Exception:  # what is refused stays out
            self.param_groups[:] = before
            raise
        self._accumulation = Accumulation(type(self).__name__, self.host)
        self._accumulation.excused = True  # earlier passes may have reached the new ones

    defaults: dict[str, Any]

    if not TYPE_CHECKING:  # else every name were known

        def __getattr__(self, name: str) -> Any:
            """On DeepSpeed the engine's inner optimizer owns `param_groups` and `state`; elsewhere this instance has them."""
            inner = getattr(self.__dict__.get("host"), "inner", None) if name in ("param_groups", "state") else None
            if inner is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return getattr(inner, name)

    # --------------------------------------------------------------------------- the step, in a file of its own
    step = take_step
    backward = backward

    @property
    def recording(self) -> bool:
        """Inside a closure: whether this is the recorded pass, the one whose loss and outputs count."""
        return self._objective is None or self._objective.recording

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients. The step does so before every pass; a loop need not."""
        self.host.discard()
        self._accumulation.leave()

    def micro_batches(self, batches: Iterable[Any], *, average: bool = True) -> Iterator[Any]:
        """The micro-batches of one pass, one after the other, reducing gradients with the last only.

            return sum(opt.backward(loss_fn(model(x), y)) for x, y in opt.micro_batches(batches))

        Args:
            batches: equally many on every rank, at least one.
            average: divide every loss given to `backward` inside the loop by the number of micro-batches, before it is scaled
                and back-propagated. False leaves losses as they are: for weights of one's own, such as micro-batches of
                unequal size.

        A closure that divides its losses itself although average is True is warned of once, in its first step, where it can be
        seen: the last operation of every loss divides it by the number of micro-batches; or arithmetic made every loss, and
        the closure returns the sum of them instead of their mean.

        Raises:
            ValueError: no micro-batch; or a DeepSpeed engine whose gradient_accumulation_steps is neither 1 nor their number.
            RuntimeError: the loop is left early, holds another one, or passes no loss to `backward` although it averages.
        """
        return self._accumulation.over(batches, average)

    def base_step(self) -> None:
        """The base optimizer's own step, without torch's hook wrapper, so step hooks fire once per step of ours."""
        step: Any = self._foundation.step  # type: ignore[union-attr]
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)

    # -------------------------------------------------------------------------------------------- verbs, innermost
    def move_parameters(self, objective: Objective) -> None:
        """Move weights before the gradient is taken."""

    def estimate_gradient(self, objective: Objective) -> Any:
        """Leave the gradient to use in the shards; returns the recorded pass's result."""
        loss = objective()
        if self.host.unproven and objective.several and not objective.local:
            objective.prove()
        return loss

    def add_penalty(self) -> None:
        """After every pass: add the closed-form gradient of a term in the weights to the shards' gradients."""

    def displacement(self, vector: Vector) -> Vector:
        """Filter a displacement of the weights before it is applied."""
        return vector

    def edit_gradient(self) -> None:
        """Edit the final gradient in place; it is finite on every rank."""

    def update(self) -> None:
        """Update the weights with the base optimizer."""
        self.host.update()

    def edit_parameters(self) -> None:
        """Edit weights and moments after an applied step."""

    def predicted(self, run: Callable[[], Tensor]) -> Tensor:
        """What to predict, where `run()` gives the outputs at the weights as they are. Outside of steps; collective."""
        return run()

    # ------------------------------------------------------------------------------------------ what a mixin may ask
    @contextmanager
    def displaced(self, vector: Vector) -> Iterator[None]:
        """Weights moved by `displacement(vector)` inside the block; their saved bits are copied back after it, also when it
        raises (locally then: no collective on the exception path). Cost: one copy of the owned masters."""
        vector = self.displacement(vector)
        scratch = self.host.scratch
        saved = scratch.displace(vector)
        try:
            if self.step_count % 100 == 0 and vector.host is self.host:
                self._watch_precision(vector, saved)
            yield
        finally:
            scratch.restore(saved)

    def _watch_precision(self, vector: Vector, saved: Vector) -> None:
        """At every hundredth step, where weights compute in fewer bits than fp32: what is left of a displacement."""
        working = self.host.working_dtype
        if working.itemsize < 4:
            ratio, cosine = realised(vector, saved, working)
            self.metrics |= {"perturbation_norm_ratio": ratio, "perturbation_cosine": cosine}
            self._warned = self._warned or report(type(self).__name__, ratio, cosine, self.host.rank)

    def on_apply(self, commit: Callable[[], None]) -> None:
        """Run `commit` if this step is applied: how a part changes its state before it is known whether the step counts."""
        self._on_apply.append(commit)

    def on_skip(self, undo: Callable[[], None]) -> None:
        """Run `undo` if this step is skipped: how a part that moved weights before the gradient puts them back."""
        self._on_skip.append(undo)

    def hold(self, names: Iterable[str]) -> None:
        """Leave these parameters and their moments as they are in the next step's update: no term of its loss reaches them, and
        neither decay nor momentum shall move them. Adam's count of steps goes on. Called twice before a step, it holds both."""
        self._held |= frozenset(names)

    def replace_update(self, reason: str) -> None:
        """Apply the step without the base optimizer's update (a topology change, say)."""
        self._replaced = reason

    def on_attach(self) -> None:
        """Called of each part once its host is known: what it refuses, and sets up. No verb: parts do not call super()."""

    def cost(self) -> Cost:
        """Called of each part: what it adds to a step with these options."""
        return Cost()

    def extra_passes(self) -> float:
        """Passes per step beyond the recorded one, as the parts declare them."""
        return sum(cost.passes for cost in self.costs().values())

    def costs(self) -> dict[str, Cost]:
        """What each part adds to a step."""
        return {part.__name__: part.cost(self) for part in parts_of(type(self))}  # type: ignore[attr-defined]

    # ----------------------------------------------------------------------------------------------- persistence
    complete_state = False
    """Whether `state_dict()` holds the weights where they are the model's own as well; a Trainer sets it on its optimizer, whose
    state is all there is."""
    problem: Problem | None = None
    """Whose losses importance is estimated of; None: the cross-entropy of class indices. `Trainer` sets it."""
    task_samples = 0
    """Training samples of the present task, for parts that weigh by them; 0: not known. `Trainer` sets it."""

    def state_dict(self, *, weights: bool | None = None) -> dict[str, Any]:
        """What a resumed run needs beside `model.state_dict()`, by parameter name, whole where it is per parameter. Collective
        when sharded.

        Args:
            weights: hold the weights as well where they are the model's own (plain torch, DDP, FSDP2); by default only masters
                that are other tensors than those (DeepSpeed), so that nothing is saved twice.

        Raises:
            RuntimeError: asked by `torch.distributed.checkpoint.state_dict`, whose functions would leave the mixins' state out.

        Cost: a copy of moments, averages and masks.
        """
        persistence.refuse_stripping(type(self).__name__, sys._getframe(1))
        return persistence.state_dict(self, weights=weights)

    def load_state_dict(
        self, state_dict: dict[str, Any], *, weights: Mapping[str, Tensor] | None = None,
        grown: bool = False,
    ) -> None:
        """Restore what `state_dict` gave, at any world size and ZeRO stage. Collective when sharded.

        Args:
            weights: `model.state_dict()` of the saved model. Needed on DeepSpeed for a state saved elsewhere, which has no
                masters; elsewhere `model.load_state_dict` does it.
            grown: the model has parameters that the saved one had not, or is without some that it
                had. What both have is restored, equal in shape; the rest begins anew. A group goes
                on as the saved one that it has members of; a new one keeps its options.

        Raises:
            CheckpointMismatch: what does not fit, naming it; nothing is touched then. Where a group
                has one count of steps (ZeRO 1 to 3): new parameters in a group with known ones.
        """
        persistence.load_state_dict(self, state_dict, weights=weights, grown=grown)

    def __getstate__(self) -> dict[str, Any]:
        rebuilt = ("host", "step", "_accumulation")
        return {k: v for k, v in self.__dict__.items() if k not in rebuilt} | {"_rebuild": self.host.recipe()}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        rebuild = kept.pop("_rebuild", None)
        super().__setstate__(kept)  # type: ignore[misc]
        if rebuild is not None:
            self.host = LocalHost(self, *rebuild)
            self._accumulation = Accumulation(type(self).__name__, self.host)

    def describe(self) -> str:
        """The order of the parts, and what a step costs."""
        from everbatch.optim.describe import describe

        return describe(self)


def _named_groups(who: str, params: Any) -> list[dict[str, Any]]:
    """Parameter groups whose "params" are (name, parameter) pairs, from a module, pairs, or groups of pairs."""
    if isinstance(params, nn.Module):
        return [{"params": list(params.named_parameters())}]
    items = list(params)
    groups = items if items and isinstance(items[0], dict) else [{"params": items}]
    groups = [{**g, "params": list(g["params"])} for g in groups]
    for group in groups:
        for item in group["params"]:
            if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
                raise TypeError(f"{who}: got an unnamed {type(item).__name__}, expected (name, parameter) pairs, because state "
                                "is kept by name; pass the module, or module.named_parameters()")
    return groups
