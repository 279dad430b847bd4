"""Concurrent adversarial learning: adversarial copies of batches, crafted some steps ahead so that training waits for nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from everbatch import problems
from everbatch.data import Batch, Task
from everbatch.errors import check
from everbatch.nn import split_branch
from everbatch.problems import Problem
from everbatch.rows import Rows, joined, one_tensor
from everbatch.train.adversarial import Fifo, Role, current_role
from everbatch.train.adversarial.attack import BRANCH
from everbatch.train.adversarial.craft import embedded
from everbatch.train.adversarial.options import AdversarialOptions
from everbatch.train.adversarial.wiring import Wiring, losses_of
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
    class Config(AdversarialOptions):
        """See `AdversarialOptions`."""

    if TYPE_CHECKING:
        optimizer: Any
        peek: Any
        _conadv: Wiring

    @dataclass
    class State:
        fifo: Fifo = field(default_factory=Fifo)
        begun: int = -1
        """Step at which the pipeline was filled last."""

    @classmethod
    def fixed(cls, config: AdversarialOptions) -> str:
        """Adversaries elsewhere have a replica of their own."""
        elsewhere = config.placement in ("process", "ranks")
        return f"placement={config.placement!r} keeps a replica that would not grow; use inline or stream" if elsewhere else ""

    @classmethod
    def needs_boundaries(cls, config: ConAdv.Config) -> str:
        """What is crafted ahead ends with a task."""
        return f"tau={config.tau} crafts ahead, and begins anew with each task; tau=0 does not" if config.tau else ""

    # ------------------------------------------------------------------------------------------------------- the verbs
    def configure_model(self, model: nn.Module) -> nn.Module:
        """Split the batch norms, and check what can be known before the engine is built."""
        model = super().configure_model(model)  # type: ignore[misc]
        config: ConAdv.Config = self.configs[ConAdv]
        role = current_role()
        check(config.tau == 0 or hasattr(self, "peek"), "ConAdv", f"tau={config.tau} in a trainer without peek(k)",
              "look ahead", "define peek(k), or set tau=0")
        check(not config.one_forward or hasattr(super(), "forward_parts"), "ConAdv", "one_forward=True in a trainer without "
              "forward_parts(parts)", "run its forwards through that verb", "define it, or set one_forward=False")
        _check(config, model, role)
        _check_problem(config, losses_of(self))
        self._conadv = Wiring.of(config, model, role)
        self.states[ConAdv].fifo.world = self.world
        return model

    def on_task_start(self, task: Task) -> None:
        """Begin an empty pipeline."""
        super().on_task_start(task)  # type: ignore[misc]
        left, tau = getattr(self, "steps_left", math.inf), self.configs[ConAdv].tau
        check(left > tau, "ConAdv", f"tau={tau} and task {task.id} of {left} steps", "have at least tau + 1 steps",
              "lower tau, or the batch size")
        if self._conadv.pipeline is not None:
            self._conadv.pipeline.clear()
        self.states[ConAdv].fifo.waiting.clear()
        self.states[ConAdv].begun = self.step

    def augment_batch(self, parts: list[Batch]) -> list[Batch]:
        """Order the crafting of the batch of tau steps from now, and add the adversarial copy of this one."""
        parts = super().augment_batch(parts)  # type: ignore[misc]
        if not self.__active:
            return parts
        clean = next(p for p in parts if p.part == "stream")
        config: ConAdv.Config = self.configs[ConAdv]
        self.__refuse(clean.inputs)
        self.__order(clean)
        wiring = self._conadv
        assert wiring.pipeline is not None and wiring.attack is not None
        wiring.lost = False

        # Nothing was crafted for the first steps of a task.
        if self.__filling and config.first != "clamp":
            if self.__clean_alone:
                self.optimizer.hold(wiring.branch)
                return parts
            noise = wiring.attack.noise(one_tensor("ConAdv", clean.inputs), step=self.step, rank=self.world.rank)
            return [*parts, replace(clean, part=PART, inputs=noise)]

        payload = wiring.pipeline.take(self.step, clean.ids)
        if payload is None:  # lost with its adversary: as many forwards as on other ranks, and no weight
            wiring.lost = True
            return [*parts, replace(clean, part=PART, weight=torch.zeros(len(clean), device=clean.targets.device))]
        inputs, delta = wiring.attack.finish(payload, clean.inputs)
        extras = clean.extras if delta is None else {**clean.extras, "delta": delta}
        return [*parts, replace(clean, part=PART, inputs=inputs, extras=extras)]

    def forward(self, batch: Batch) -> Tensor:
        """The adversarial part goes through the adversarial batch norms."""
        if batch.part != PART:
            return super().forward(batch)  # type: ignore[misc, no-any-return]
        delta, name = batch.extras.get("delta"), self.configs[ConAdv].embedding
        model = self._conadv.model
        with split_branch(model, BRANCH), embedded(model.get_submodule(name or ""), delta):
            return super().forward(batch)  # type: ignore[misc, no-any-return]

    def forward_parts(self, parts: Sequence[Batch]) -> Iterable[Tensor]:
        """With `one_forward`, the stream and its adversarial copy go through the network as one batch."""
        config, pair = self.configs[ConAdv], {p.part: p for p in parts if p.part in ("stream", PART)}
        if not config.one_forward or len(pair) < 2:
            return super().forward_parts(parts)  # type: ignore[misc, no-any-return]
        clean, moved = pair["stream"], pair[PART]
        names = ("inputs", "targets", "ids", "position")
        rows: dict[str, Any] = {name: joined([getattr(clean, name), getattr(moved, name)]) for name in names}
        extras = {k: joined([v, moved.extras[k]]) for k, v in clean.extras.items()}
        both = replace(clean, **rows, weight=None, extras=extras)
        delta = moved.extras.get("delta")
        if delta is not None:
            delta = torch.cat([torch.zeros_like(delta), delta])
        model = self._conadv.model
        with split_branch(model, BRANCH, halves=True), embedded(model.get_submodule(config.embedding or ""), delta):
            outputs = self.forward(both)
        logits = {"stream": outputs[: len(clean)], PART: outputs[len(clean) :]}
        rest = iter(super().forward_parts([p for p in parts if p.part not in logits]))  # type: ignore[misc]
        return [logits[p.part] if p.part in logits else next(rest) for p in parts]

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The stream's terms, weighted, for the clean part and for its adversarial copy."""
        if not self.__active or batch.part not in ("stream", PART):
            return super().loss_terms(outputs, batch)  # type: ignore[misc, no-any-return]
        config: ConAdv.Config = self.configs[ConAdv]
        wiring, alone = self._conadv, self.__clean_alone
        weight = config.weight_adversarial if batch.part == PART else config.weight_clean
        if config.normalize:
            other = 0.0 if alone or wiring.lost else config.weight_adversarial
            weight /= (config.weight_clean + other) or 1.0
        terms = super().loss_terms(outputs, replace(batch, part="stream"))  # type: ignore[misc]
        prefix = "adversarial_" if batch.part == PART else ""
        terms = {prefix + name: term if weight == 1.0 else weight * term for name, term in terms.items()}
        if alone and wiring.whole_branch:
            # DDP waits for the gradient of every parameter; the step leaves these as they are (`hold`).
            terms["nothing"] = 0.0 * torch.stack([p.sum() for p in wiring.whole_branch]).sum()
        last = "stream" if alone else PART
        if batch.part == last and getattr(getattr(self, "optimizer", None), "recording", True):
            wiring.watch(next(iter(terms.values())))
        return terms

    # -------------------------------------------------------------------------------------------------------- its parts
    def adversary_costs(self) -> dict[str, float]:
        """Figures of the run so far: bytes sent to this rank's adversary and back, batches lost with one."""
        pipeline = self._conadv.pipeline
        return {"bytes_sent": float(pipeline.sent) if pipeline else 0.0, "lost": float(pipeline.lost) if pipeline else 0.0}

    def close(self) -> None:
        """End the adversary, where one was started. Also happens when the process ends."""
        if hasattr(super(), "close"):
            super().close()  # type: ignore[misc]
        if self._conadv.pipeline is not None:
            self._conadv.pipeline.close()

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

    def __refuse(self, inputs: Rows) -> None:
        """What cannot be attacked, by name."""
        config: ConAdv.Config = self.configs[ConAdv]
        if config.embedding is not None and not (isinstance(inputs, dict) and config.placement in ("process", "ranks")):
            return
        if isinstance(inputs, dict):
            check(config.embedding is not None, "ConAdv", f"inputs by name, {', '.join(inputs)}", "be one floating tensor",
                  "name the module that embeds them (embedding=)")
            check(False, "ConAdv", f"inputs by name with placement={config.placement!r}", "be one tensor there",
                  "set placement='inline' or 'stream'")
        if isinstance(inputs, Tensor) and not inputs.is_floating_point():
            check(False, "ConAdv", f"inputs of dtype {inputs.dtype}", "be floating point",
                  "name the module that embeds them (embedding=)")

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
        config: ConAdv.Config = self.configs[ConAdv]
        state: ConAdv.State = self.states[ConAdv]
        wiring = self._conadv
        pipeline = wiring.pipeline or wiring.begin(config, self, state.fifo, clean)
        fresh = state.begun in (-1, self.step)
        if fresh:
            state.begun = self.step
        if fresh and config.tau and config.first == "clamp":
            early = [(self.step + k, clean if k == 0 else self.peek(k)) for k in range(config.tau)]
            pipeline.order(self.step, [(step, batch) for step, batch in early if batch is not None])
        ahead = clean if config.tau == 0 else self.peek(config.tau)
        if ahead is not None:
            wiring.order(self.step, self.step + config.tau, ahead)


def _check(config: AdversarialOptions, model: nn.Module, role: Role | None) -> None:
    """Refuse what cannot be with this model, or in this launch."""
    split = "without" if role is None else "after"
    check((config.placement == "ranks") == (role is not None), "ConAdv",
          f"placement={config.placement!r} {split} split_ranks", "be 'ranks' just where ranks were split",
          "call everbatch.train.adversarial.split_ranks(adversaries) before the trainer is built, and set placement='ranks'")
    if config.embedding is not None:
        modules = dict(model.named_modules())
        check(config.embedding in modules, "ConAdv", f"embedding={config.embedding!r}", "name a module of the model",
              f"its embeddings: {[n for n, m in modules.items() if isinstance(m, nn.Embedding)]}")
    mixes = config.one_forward and not config.split_bn and any(isinstance(m, _BatchNorm) for m in model.modules())
    check(not mixes, "ConAdv", "one_forward=True and split_bn=False with batch norm", "not mix the parts' statistics",
          "split the batch norms, or set one_forward=False")


def _check_problem(config: AdversarialOptions, problem: Problem | None) -> None:
    """Refuse what has no meaning for a problem other than cross-entropy of labels."""
    if problem is None:
        return
    name = type(problem).__name__
    check(not config.targeted or problem.labels, "ConAdv", f"targeted=True with problem={name}", "be False",
          "there is no wrong class to go towards")
    check(problem.floats or config.embedding is not None, "ConAdv", f"problem={name}, whose inputs are ids", "be attacked behind "
          "an embedding", "name the module that embeds them (embedding=)")
    known = config.placement != "ranks" or getattr(problems, name, None) is type(problem)
    check(known, "ConAdv", f"placement='ranks' with problem={name}", "be one of everbatch.problems there, which both ends have",
          "set placement='inline', 'stream' or 'process'")
