"""Concurrent adversarial learning: adversarial copies of batches, crafted some steps ahead so that training waits for nothing."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from everbatch.contract import parts_of
from everbatch.data import Batch, Task
from everbatch.errors import check, check_real, check_whole
from everbatch.nn import branch_parameters, convert_split_bn, split_branch
from everbatch.train.adversarial import Attack, Fifo, Pipeline, current_role
from everbatch.train.adversarial.attack import BRANCH
from everbatch.train.adversarial.craft import embedded
from everbatch.train.adversarial.inline import Inline, SideStream
from everbatch.train.mixin import TrainerMixin

__all__ = ["ConAdv"]

PART = "adversarial"
"""Name of the part of a batch that this mixin adds."""


class ConAdv(TrainerMixin):
    """Train on each batch and on an adversarial copy of it, crafted with the weights of `tau` steps before.

        loss_t = w_clean * mean CE(f_t(x); y) + w_adv * mean CE(f_t^adv(xhat); y)      xhat = x + an l-inf attack at theta_{t-tau}

    f^adv runs through the adversarial batch norms. In step t the batch of step t + tau is crafted with theta_t, so training on
    t and crafting for t + tau do not wait for each other. tau = 0 is AdvProp. The gradient is never stale, only the attack is,
    and xhat stays within its radius for any tau.

    Args (Config): see the fields. `placement` changes where crafting runs, not one bit of what it gives on the same device.

    Raises:
        ValueError: options out of range; a trainer that cannot look ahead (tau > 0 needs `peek`); a task of fewer than tau + 1
            steps; inputs that are not floating point without `embedding`.
        UnsupportedHost: placement "ranks" on DeepSpeed, whose engine takes every rank of the launch.
        RuntimeError: a loss that does not depend on the inputs; an adversary that is lost, with on_failure="stop".

    Cost: crafting 2/3 of a pass per attack step, the adversarial part one pass: 8/3 of the arithmetic of plain training with
    one attack step, whatever the placement. Memory: tau prepared batches, and tau crafted ones as int8 signs (one step from
    the clean input) or in full. Collectives: none of its own where ranks hold whole weights; on FSDP2 and ZeRO stage 3 the
    parameter gathers of its passes, or with "process" and "ranks" one gather of all weights.
    Order: left of Replay, so that only the stream is attacked.

    A trainer of your own offers the verbs below, `peek(k)` (the stream part, ready, that will be trained on k steps from now;
    None past the end) for tau > 0, optionally `bare(inputs)` (logits without reducing anything), and for `one_forward`
    `forward_parts(parts)` (what `forward` gives for each, in their order), through which its step runs its forwards.

    Source: Liu et al. 2022, arXiv 2106.00221, Algorithm 1. The released code keeps one old copy of the weights that nothing
    reads, averages the terms, clips inputs normalised by ImageNet's statistics to [-1, 1], and moves running statistics in the
    crafting pass as well; here the weights are 1 and 1 (`normalize` averages), radius and range are converted per channel, and
    crafting leaves no trace.
    """

    free = ("placement", "adversary_device", "adversaries", "on_failure", "patience_s", "adversary_threads")
    from_data = {"mean": "means", "std": "stds", "classes": ""}
    example = {"tau": 1, "radius": 16.0}
    off = {"weight_adversarial": 0.0}
    search = {"radius": (4.0, 2.0, 8.0), "tau": (1, 0, 2)}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        tau: int = 1
        """Steps between crafting a batch and training on it; >= 0, 0 is AdvProp."""
        radius: float = 4.0
        """Largest change of a pixel, in 1/255 of the raw range; with `embedding`, of an embedding's element. >= 0."""
        steps: int = 1
        """Gradient steps of the attack; >= 1."""
        step_size: float | None = None
        """Length of one, in the unit of radius; null: radius / steps. > 0."""
        mean: tuple[float, ...] = (0.0,)
        """Subtracted from raw pixels in [0, 1] to make model inputs, per channel or one for all."""
        std: tuple[float, ...] = (1.0,)
        """Divides them after that; > 0."""
        raw_low: float = 0.0
        """Least valid raw value."""
        raw_high: float = 1.0
        """Largest valid raw value; > raw_low."""
        targeted: bool = False
        """Towards a random wrong class (the released code), rather than away from the true one."""
        classes: int | None = None
        """Classes of the head, for targeted attacks where the trainer has no stream; >= 2."""
        random_start: float = 0.0
        """Probability that a batch's attack starts from uniform noise; in [0, 1]. The released code: 0.8."""
        first: Literal["clamp", "clean", "random"] = "clamp"
        """The first tau steps of a task: crafted with the first step's weights; no adversarial term; uniform noise."""
        weight_clean: float = 1.0
        """Weight of the clean term; >= 0."""
        weight_adversarial: float = 1.0
        """Weight of the adversarial term; >= 0, 0 switches the mixin off."""
        normalize: bool = False
        """Divide both by the sum of the weights in use; a clean part whose copy is missing or lost counts in full."""
        split_bn: bool = True
        """Give batch norms a second set of weights and statistics for the adversarial part."""
        one_forward: bool = False
        """Run both parts through the network as one batch: larger kernels, half the launches, half the gathers of sharded
        weights. For networks that treat each row for itself, but for split batch norms. Equal to two but for rounding and the
        noise of dropout."""
        embedding: str | None = None
        """Name of the embedding module to perturb, for inputs that are not floating point."""
        placement: Literal["inline", "stream", "process", "ranks"] = "inline"
        """Crafting inside the step (under DDP while gradients are reduced), on a CUDA stream, in a process beside each trainer,
        or on ranks of their own (`everbatch.train.adversarial.split_ranks`)."""
        adversary_device: str | None = None
        """placement="process": where it crafts; null: the trainer's device."""
        adversaries: int = 1
        """placement="ranks": how many of the last ranks craft; >= 1, at most half."""
        on_failure: Literal["clean", "inline", "stop"] = "stop"
        """When an adversary dies or is late: go on without its term, craft in the trainer, or end with an error."""
        patience_s: float = 60.0
        """Seconds without an answer until an adversary counts as lost; > 0."""
        adversary_threads: int = 1
        """placement="process": CPU threads of the adversary; >= 1."""

        def __post_init__(self) -> None:
            who = "ConAdv"
            for name, least in (("tau", 0), ("steps", 1), ("adversaries", 1), ("adversary_threads", 1)):
                value = getattr(self, name)
                check_whole(who, name, value, least)
            for name in ("radius", "weight_clean", "weight_adversarial"):
                check_real(who, name, getattr(self, name), 0.0)
            check_real(who, "random_start", self.random_start, 0.0, 1.0)
            check_real(who, "patience_s", self.patience_s, 0.0, open_low=True)
            if self.step_size is not None:
                check_real(who, "step_size", self.step_size, 0.0, open_low=True)
            for value in self.mean:
                check_real(who, "mean", value)
            for value in self.std:
                check_real(who, "std", value, 0.0, open_low=True)
            check(len(self.mean) == len(self.std) or 1 in (len(self.mean), len(self.std)), who,
                  f"mean={self.mean!r} and std={self.std!r}", "have as many channels")
            check_real(who, "raw_low", self.raw_low)
            check_real(who, "raw_high", self.raw_high)
            check(self.raw_low < self.raw_high, who, f"raw_low={self.raw_low!r}, raw_high={self.raw_high!r}", "ascend")
            check(self.weight_clean + self.weight_adversarial > 0, who, "weight_clean=0, weight_adversarial=0", "not both be 0")
            if self.classes is not None:
                check_whole(who, "classes", self.classes, 2)
            check(self.first != "random" or self.embedding is None, who, "first='random' with embedding",
                  "be clamp or clean")
            for name, allowed in (("first", ("clamp", "clean", "random")), ("on_failure", ("clean", "inline", "stop")),
                                  ("placement", ("inline", "stream", "process", "ranks"))):
                value = getattr(self, name)
                check(value in allowed, who, f"{name}={value!r}", f"be {', '.join(allowed[:-1])} or {allowed[-1]}")

    if TYPE_CHECKING:
        optimizer: Any
        peek: Any
        __pipeline: Pipeline | None
        __attack: Attack

    @dataclass
    class State:
        fifo: Fifo = field(default_factory=Fifo)
        begun: int = -1
        """Step at which the pipeline was filled last."""

    # ------------------------------------------------------------------------------------------------------- the verbs
    def configure_model(self, model: nn.Module) -> nn.Module:
        """Split the batch norms, and check what can be known before the engine is built."""
        model = super().configure_model(model)  # type: ignore[misc]
        config: ConAdv.Config = self.configs[ConAdv]
        check(config.tau == 0 or hasattr(self, "peek"), "ConAdv", f"tau={config.tau} in a trainer without peek(k)",
              "look ahead", "define peek(k), or set tau=0")
        self.__role = current_role()
        check((config.placement == "ranks") == (self.__role is not None), "ConAdv", f"placement={config.placement!r} "
              f"{'without' if self.__role is None else 'after'} split_ranks", "be 'ranks' just where ranks were split",
              "call everbatch.train.adversarial.split_ranks(adversaries) before the trainer is built, and set placement='ranks'")
        if config.embedding is not None:
            modules = dict(model.named_modules())
            check(config.embedding in modules, "ConAdv", f"embedding={config.embedding!r}", "name a module of the model",
                  f"its embeddings: {[n for n, m in modules.items() if isinstance(m, nn.Embedding)]}")
        check(not config.one_forward or hasattr(super(), "forward_parts"), "ConAdv", "one_forward=True in a trainer without "
              "forward_parts(parts)", "run its forwards through that verb", "define it, or set one_forward=False")
        check(not config.one_forward or config.split_bn or not any(isinstance(m, _BatchNorm) for m in model.modules()), "ConAdv",
              "one_forward=True and split_bn=False with batch norm", "not mix the parts' statistics",
              "split the batch norms, or set one_forward=False")
        split = convert_split_bn(model, (BRANCH,)) if config.split_bn and self.__active else 0
        if config.split_bn and not split:
            logging.getLogger("everbatch").info("ConAdv: the model has no batch norm, nothing to split")
        self.__live, self.__pipeline, self.__lost = model, None, False
        # Now, before an engine puts its hooks on it.
        self.__spare = copy.deepcopy(model) if config.placement in ("process", "ranks") and self.__active else None
        self.__branch = [name for name in branch_parameters(model, BRANCH)] if split else []
        self.states[ConAdv].fifo.world = self.world
        return model

    def on_task_start(self, task: Task) -> None:
        """Begin an empty pipeline."""
        super().on_task_start(task)  # type: ignore[misc]
        left, tau = getattr(self, "steps_left", math.inf), self.configs[ConAdv].tau
        check(left > tau, "ConAdv", f"tau={tau} and task {task.id} of {left} steps", "have at least tau + 1 steps",
              "lower tau, or the batch size")
        if self.__pipeline is not None:
            self.__pipeline.clear()
        self.states[ConAdv].fifo.waiting.clear()
        self.states[ConAdv].begun = self.step

    def augment_batch(self, parts: list[Batch]) -> list[Batch]:
        """Order the crafting of the batch of tau steps from now, and add the adversarial copy of this one."""
        parts = super().augment_batch(parts)  # type: ignore[misc]
        if not self.__active:
            return parts
        clean = next(p for p in parts if p.part == "stream")
        config: ConAdv.Config = self.configs[ConAdv]
        check(clean.inputs.is_floating_point() or config.embedding is not None, "ConAdv", f"inputs of dtype {clean.inputs.dtype}",
              "be floating point", "name the module that embeds them (embedding=)")
        self.__order(clean)
        self.__lost = False
        if self.__filling and config.first != "clamp":
            if self.__clean_alone:
                self.optimizer.hold(self.__branch)
                return parts
            noise = self.__attack.noise(clean.inputs, step=self.step, rank=self.world.rank)
            return [*parts, replace(clean, part=PART, inputs=noise)]
        assert self.__pipeline is not None
        payload = self.__pipeline.take(self.step, clean.ids)
        if payload is None:  # lost with its adversary: as many forwards as on other ranks, and no weight
            self.__lost = True
            return [*parts, replace(clean, part=PART, weight=torch.zeros(len(clean), device=clean.targets.device))]
        inputs, delta = self.__attack.finish(payload, clean.inputs)
        extras = clean.extras if delta is None else {**clean.extras, "delta": delta}
        return [*parts, replace(clean, part=PART, inputs=inputs, extras=extras)]

    def forward(self, batch: Batch) -> Tensor:
        """The adversarial part goes through the adversarial batch norms."""
        if batch.part != PART:
            return super().forward(batch)  # type: ignore[misc, no-any-return]
        delta, name = batch.extras.get("delta"), self.configs[ConAdv].embedding
        with split_branch(self.__live, BRANCH), embedded(self.__live.get_submodule(name or ""), delta):
            return super().forward(batch)  # type: ignore[misc, no-any-return]

    def forward_parts(self, parts: Sequence[Batch]) -> Iterable[Tensor]:
        """With `one_forward`, the stream and its adversarial copy go through the network as one batch."""
        config, pair = self.configs[ConAdv], {p.part: p for p in parts if p.part in ("stream", PART)}
        if not config.one_forward or len(pair) < 2:
            return super().forward_parts(parts)  # type: ignore[misc, no-any-return]
        clean, moved = pair["stream"], pair[PART]
        names = ("inputs", "targets", "ids", "position")
        rows = {name: torch.cat([getattr(clean, name), getattr(moved, name)]) for name in names}
        extras = {k: torch.cat([v, moved.extras[k]]) for k, v in clean.extras.items()}
        both = replace(clean, **rows, weight=None, extras=extras)  # type: ignore[arg-type]
        delta = moved.extras.get("delta")
        if delta is not None:
            delta = torch.cat([torch.zeros_like(delta), delta])
        with split_branch(self.__live, BRANCH, halves=True), embedded(self.__live.get_submodule(config.embedding or ""), delta):
            outputs = self.forward(both)
        logits = {"stream": outputs[: len(clean)], PART: outputs[len(clean) :]}
        rest = iter(super().forward_parts([p for p in parts if p.part not in logits]))  # type: ignore[misc]
        return [logits[p.part] if p.part in logits else next(rest) for p in parts]

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The stream's terms, weighted, for the clean part and for its adversarial copy."""
        if not self.__active or batch.part not in ("stream", PART):
            return super().loss_terms(outputs, batch)  # type: ignore[misc, no-any-return]
        config: ConAdv.Config = self.configs[ConAdv]
        weight = config.weight_adversarial if batch.part == PART else config.weight_clean
        if config.normalize:
            alone = self.__clean_alone or self.__lost
            weight /= (config.weight_clean + (0.0 if alone else config.weight_adversarial)) or 1.0
        terms = super().loss_terms(outputs, replace(batch, part="stream"))  # type: ignore[misc]
        prefix = "adversarial_" if batch.part == PART else ""
        terms = {prefix + name: term if weight == 1.0 else weight * term for name, term in terms.items()}
        if self.__clean_alone and self.__whole_branch:
            # DDP waits for the gradient of every parameter; the step leaves these as they are (`hold`).
            terms["nothing"] = 0.0 * torch.stack([p.sum() for p in self.__whole_branch]).sum()
        if batch.part == ("stream" if self.__clean_alone else PART):
            self.__watch(next(iter(terms.values())))
        return terms

    # -------------------------------------------------------------------------------------------------------- its parts
    def adversary_costs(self) -> dict[str, float]:
        """Figures of the run so far: bytes sent to this rank's adversary and back, batches lost with one."""
        pipeline = self.__pipeline
        return {"bytes_sent": float(pipeline.sent) if pipeline else 0.0, "lost": float(pipeline.lost) if pipeline else 0.0}

    def close(self) -> None:
        """End the adversary, where one was started. Also happens when the process ends."""
        if hasattr(super(), "close"):
            super().close()  # type: ignore[misc]
        if self.__pipeline is not None:
            self.__pipeline.close()

    def notes(self) -> str:
        """For describe(): what a step costs."""
        c: ConAdv.Config = self.configs[ConAdv]
        if not self.__active:
            return "off"
        where = {"inline": "in the step", "stream": "on a side stream", "process": "in a process beside each trainer",
                 "ranks": f"on {c.adversaries} rank(s) of their own"}[c.placement]
        kept = "int8 signs" if c.steps == 1 and c.random_start == 0 else "full tensors"
        gathers = "its passes" if c.placement in ("inline", "stream") else "one copy of the weights"
        return (f"batch t+{c.tau} crafted {where} with the weights of step t; forward and backward of both copies 6f, crafting "
                f"{2 * c.steps}f, plain training 3f: {(6 + 2 * c.steps) / 3:.2f}x the arithmetic; {c.tau} batch(es) ahead, as "
                f"{kept}; on FSDP2 and ZeRO stage 3 the parameter gathers of {gathers}, elsewhere no collective of its own")

    @property
    def __active(self) -> bool:
        return bool(self.configs[ConAdv].weight_adversarial > 0)

    @property
    def __filling(self) -> bool:
        """Whether this step's batch came before anything could be crafted for it."""
        return bool(self.step < self.states[ConAdv].begun + self.configs[ConAdv].tau)

    @property
    def __clean_alone(self) -> bool:
        """Whether this step has no adversarial part at all."""
        return self.__filling and bool(self.configs[ConAdv].first == "clean")

    def __order(self, clean: Batch) -> None:
        """Order this step's crafting; where a pipeline begins, policy "clamp" orders also what earlier steps would have."""
        if self.__pipeline is None:
            self.__begin(clean)
        assert self.__pipeline is not None
        tau, fresh = self.configs[ConAdv].tau, self.states[ConAdv].begun in (-1, self.step)
        if fresh:
            self.states[ConAdv].begun = self.step
        place = self.__pipeline.place
        if fresh and tau and self.configs[ConAdv].first == "clamp":
            early = [(self.step + k, clean if k == 0 else self.peek(k)) for k in range(tau)]
            self.__pipeline.order(self.step, [(s, b) for s, b in early if b is not None])
        ahead = clean if tau == 0 else self.peek(tau)
        if ahead is not None:
            if isinstance(place, Inline):
                place.defer = tau > 0 and self.__overlaps and not isinstance(place, SideStream)
            self.__pipeline.order(self.step, [(self.step + tau, ahead)])
            if isinstance(place, Inline):
                place.defer = False
            if isinstance(place, SideStream) and self.__moving:
                place.before_update()

    def __begin(self, clean: Batch) -> None:
        """Build the pipeline when the first batch shows shapes, device and engine."""
        c: ConAdv.Config = self.configs[ConAdv]
        classes = c.classes or getattr(getattr(self, "stream", None), "num_classes", None)
        check(not c.targeted or classes is not None, "ConAdv", "targeted=True", "know the number of classes", "set classes=")
        check(c.first != "clean" or not self.__branch or hasattr(getattr(self, "optimizer", None), "hold"), "ConAdv",
              "first='clean' with an optimizer that moves parameters without a gradient", "have an optimizer of everbatch.optim",
              "compose(base=...), or set first='clamp'")
        trainer = getattr(self, "config", None)
        self.__attack = Attack(
            radius=c.radius, step_size=c.step_size, steps=c.steps, mean=tuple(c.mean), std=tuple(c.std), raw_low=c.raw_low,
            raw_high=c.raw_high, targeted=c.targeted, random_start=c.random_start, embedding=c.embedding,
            classes=int(classes or 0), pieces=getattr(trainer, "accumulation", 1), seed=self.seed,
            autocast=getattr(trainer, "precision", "fp32") == "bf16")
        self.__pipeline = Pipeline(
            self.__attack, self.__live, self.states[ConAdv].fifo, tau=c.tau, placement=c.placement, split=bool(self.__branch),
            logits_of=getattr(self, "bare", None), spare=self.__spare, role=self.__role, on_failure=c.on_failure,
            patience_s=c.patience_s, threads=c.adversary_threads,
            device=torch.device(c.adversary_device) if c.adversary_device else clean.inputs.device)
        ddp = isinstance(getattr(getattr(self, "engine", None), "call", None), DistributedDataParallel)
        parts = parts_of(type(self.optimizer)) if hasattr(self, "optimizer") else ()
        self.__moving = any(getattr(part, "moves_first", False) for part in parts)
        self.__overlaps = ddp and not self.__moving
        live = dict(self.__live.named_parameters())
        self.__whole_branch = [live[n] for n in self.__branch] if ddp else []

    def __watch(self, term: Tensor) -> None:
        """Have deferred crafting run once the recorded pass has computed its last gradient: DDP's reduction is under way then,
        and the engine's callbacks run in the order in which they were queued, so ours comes before DDP's wait."""
        assert self.__pipeline is not None
        place, recording = self.__pipeline.place, getattr(getattr(self, "optimizer", None), "recording", True)
        if not recording or not isinstance(place, Inline) or not term.requires_grad:
            return
        after = place.before_update if isinstance(place, SideStream) else place.run_deferred

        def queue(_gradient: Tensor) -> None:
            Variable._execution_engine.queue_callback(after)

        if isinstance(place, SideStream) or self.__overlaps:
            term.register_hook(queue)  # type: ignore[no-untyped-call]
