"""The host of a DeepSpeed engine at ZeRO stage 0 to 3, in fp32 or bf16, with CPU optimizer offload or without.

DeepSpeed has no public calls for what a second pass needs, so internals of the tested version are used; each is checked once,
at construction, and a first step with several passes proves on the user's own model that a discarded gradient leaves nothing
behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from everbatch.distributed import World
from everbatch.engines.arrivals import InOrder, Reach, add_local
from everbatch.engines.clocks import Clocks
from everbatch.engines.engine_modes import TESTED, check_internals, check_optimizer, clear_stale, in_leaf, places_of, refuse_modes
from everbatch.engines.host import Alone, Host, plain_name, refuse_complex, refuse_partly, refuse_sparse
from everbatch.engines.shards import Shard, Vector, count_bad
from everbatch.engines.taken import passage
from everbatch.engines.watch import Watch
from everbatch.errors import check

__all__ = ["ZeroHost"]


class ZeroHost(Host):
    """Masters are the engine's fp32 shards (stage 0 in fp32: the parameters themselves).

    Cost of one more pass: stage 0 one gradient all-reduce; stages 1 and 2 one gradient reduction and one all-gather of the
    weights; stage 3 one gradient reduction, the parameter gathers of a forward and backward, and one gather of each
    persistent parameter.

    Raises:
        UnsupportedHost: for a mode in which a method would not be exact, naming it.
    """

    def __init__(self, engine: Any, base: type) -> None:
        super().__init__()
        refuse_modes(engine)
        self.engine, self.zero, self.stage = engine, engine.optimizer, int(engine.zero_optimization_stage())
        self.kind = "torch" if self.zero is engine.basic_optimizer else type(self.zero).__name__
        self.inner: torch.optim.Optimizer = self.zero if self.kind == "torch" else self.zero.optimizer  # Adagrad's is its own
        check_optimizer(self.inner, base, self.stage, getattr(self.zero, "fp16_groups", ()))
        check_internals(engine, self.zero, self.kind)
        self.module = engine.module
        self.watch = Watch(engine)
        self.device = torch.device(engine.device)
        world = World.current()
        self.rank, self.world, self.sharded = world.rank, world.size, self.stage > 0 and world.size > 1
        self.replicas = 1 if self.stage else self.world
        self.flat = self.stage > 0
        self.agrees = self.world > 1
        self._named = [(plain_name(n), p) for n, p in engine.module.named_parameters() if p.requires_grad]
        refuse_complex("DeepSpeed", self._named)
        refuse_sparse("DeepSpeed", engine.module)
        self.bf16 = bool(engine.bfloat16_enabled())
        self.title = f"ZeRO stage {self.stage} ({'bf16' if self.bf16 else 'fp32'})"
        self.pass_cost = {0: "one gradient all-reduce", 3: "one gradient reduction, parameter gathers of a forward and backward, "
                          "one gather of each persistent parameter"}.get(self.stage, "one gradient reduction, one all-gather")
        self.unproven = (f"this engine ({self.title}, {self.kind}), or the closure is not repeatable; tested with deepspeed "
                         f"{TESTED}")
        self._backwards, self._open = 0, True
        self._own: dict[str, Tensor] = {}
        self._gradient_of: dict[str, Callable[[], Tensor | None]] = {}
        self._own_methods: dict[str, tuple[Callable[..., Any], Any]] = {}
        self._reach = Reach(self._named, self.device)
        self._clocks = Clocks(self.inner, self._every)
        self._in_order = None
        if self.kind == "DeepSpeedZeroOptimizer":
            self._in_order = InOrder(self.zero, engine.module.parameters())
        if self.kind == "FP16_UnfusedOptimizer" and not engine.global_steps:
            # The wrapper takes a step with zero gradients to allocate state: decay has moved the masters, moments count a step.
            self.inner.state.clear()
            for low, master in self._unfused_pairs():
                master.data.copy_(low.data)

    # ------------------------------------------------------------------------------------------------ the shards
    def _every(self) -> list[Shard]:
        """The slices of all that was trained when the engine was built."""
        if self._shards is None:
            self._shards = self._build_shards()
        return self._shards

    @property
    def shards(self) -> list[Shard]:
        every = self._every() if self._shards is None else self._shards
        frozen = set[str]() if self._frozen_too else {n for n, p in self._named if not p.requires_grad}
        return [s for s in every if s.name not in frozen] if frozen else every

    @property
    def names(self) -> list[str]:
        return [n for n, p in self._named if p.requires_grad or self._frozen_too]

    def master_layout(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        return {n: (p.dtype if self.kind == "torch" else torch.float32, torch.Size(getattr(p, "ds_shape", p.shape)))
                for n, p in self._named if p.requires_grad or self._frozen_too}

    def with_masters(self) -> AbstractContextManager[None]:
        return self.frozen_too()

    def state(self) -> dict[Any, Any]:
        return self.inner.state

    def groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def group_index(self) -> dict[str, int]:
        return places_of(self.zero, self.kind, self.stage, self.groups(), self._named)

    def _build_shards(self) -> list[Shard]:
        build = {0: self._whole_shard, 3: self._stage3_shard}.get(self.stage, self._fragment_shard)
        if self.stage == 0 and self.kind != "torch":
            self._master_of = {id(low): master for low, master in self._unfused_pairs()}
        index = self.group_index()
        shards = [build(n, p, index[n]) for n, p in self._named]
        return [s for s in shards if s is not None and s.numel]

    def _shard(self, name: str, p: Any, start: int, owner: Tensor, view: Any, grad: Any, index: int) -> Shard:
        def reached() -> Tensor | None:
            return None if name in self.unreached else grad()

        self._gradient_of[name] = reached
        return Shard(name, getattr(p, "ds_shape", p.shape), start, owner, view=view, grad=reached,
                     group=lambda: self.groups()[index], state=lambda: self._clocks.state_of(name))

    def _whole_shard(self, name: str, p: Any, index: int) -> Shard | None:
        owner = p if self.kind == "torch" else self._master_of[id(p)]
        return self._shard(name, p, 0, owner, lambda t: t.data, lambda: None if p.grad is None else p.grad.data, index)

    def _fragment_shard(self, name: str, p: Any, index: int) -> Shard | None:
        mapping = p._hp_mapping
        if mapping is None:  # this rank owns nothing of p
            return None
        flats = self.zero.fp32_groups_flat_partition if self.kind == "BF16_Optimizer" \
            else self.zero.single_partition_of_fp32_groups
        at, low = mapping.hp_fragment_address, mapping.lp_fragment_address

        def grad() -> Tensor | None:
            if self.kind == "BF16_Optimizer":  # its buffer holds the whole gradient on every rank
                whole = mapping.gradient_dict[mapping.param_group_index][p._index_in_param_group]
                return whole.view(-1).narrow(0, low.start, low.numel) if self._backwards else None
            kept = mapping.offload_gradient_dict if mapping.use_offload else mapping.gradient_dict
            if not self._backwards or kept.get(mapping.param_group_index) is None:
                return None
            return mapping.get_lp_grad_fragment(p._index_in_param_group).view(-1)  # type: ignore[no-any-return]

        return self._shard(name, p, low.start, flats[mapping.param_group_index],
                           lambda t: t.data.view(-1).narrow(0, at.start, at.numel), grad, index)

    def _stage3_shard(self, name: str, p: Any, index: int) -> Shard | None:
        sub, offset, _ = self.zero.grad_position[self.zero.get_param_id(p)]
        each = p.ds_tensor.ds_numel
        start = min(self.rank * each, p.ds_numel)
        count = min(start + each, p.ds_numel) - start  # what follows is padding, and holds garbage
        place = next(i for i, q in enumerate(self.zero.fp16_groups[sub]) if q is p)
        owner = self.zero.fp32_partitioned_groups_flat[sub]

        def grad() -> Tensor | None:
            if not self._backwards:
                return None
            if self.zero.offload_optimizer:
                return owner.grad.data.narrow(0, offset, count)  # type: ignore[no-any-return]
            kept = self.zero.averaged_gradients.get(sub)
            return None if kept is None else kept[place].view(-1).narrow(0, 0, count)

        return self._shard(name, p, start, owner, lambda t: t.data.narrow(0, offset, count), grad, index)

    def _unfused_pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [pair for lows, masters in zip(self.zero.fp16_groups, self.zero.fp32_groups, strict=True)
                for pair in zip(lows, masters, strict=True)]

    # ----------------------------------------------------------------------------------------------- the gradient
    def gradient(self) -> Vector:
        pairs = [(s, g) for s in self.shards if (g := self._gradient_of[s.name]()) is not None]
        return Vector(self, [s for s, _ in pairs], [g for _, g in pairs])

    def total(self, value: Tensor) -> Tensor:
        if self.sharded:
            dist.all_reduce(value)
        return value

    def publish(self) -> None:
        if self.stage in (1, 2):
            self.zero.update_lp_params()
        elif self.stage == 3:
            # Persistent parameters stay gathered and would hide the edit: partition them, write, gather them again.
            self.zero._partition_all_parameters()
            for sub in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(sub)
            if self.zero.persistent_parameters:
                self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)
        elif self.kind != "torch":
            for low, master in self._unfused_pairs():
                low.data.copy_(master.data)

    def discard(self) -> None:
        self.engine.zero_grad()  # first: stage 3's own trips over gradients of a backward past the engine
        self.zero.zero_grad()
        if self.kind == "BF16_Optimizer":
            self.zero.clear_lp_grads()
            self.zero.clear_hp_grads()
        for name in ("averaged_gradients", "all_grad_tensors"):
            kept: dict[Any, Any] = getattr(self.zero, name, None) or {}
            for key in list(kept) if self.stage < 3 else ():
                kept[key] = None
        if self.kind == "DeepSpeedZeroOptimizer":
            self.zero.micro_step_id = -1
            if self.zero.cpu_offload:  # it remembers an overflow until its own step, which a skipped one never reaches
                self.zero.reset_cpu_buffers()
        if self.stage:
            self._forget_buckets()
            self.zero.clear_backward_seen_flag()
        self._backwards, self._open = 0, True
        self._own.clear()
        self._reach.earlier |= self._reach.last
        self._reach.last.clear()
        self.unreached = frozenset()

    def begin_step(self) -> None:
        self.watch.parts = []
        self._reach.earlier.clear()
        self._reach.mixed = False

    def claim(self, shard: Shard) -> Tensor | None:
        self._reach.last.add(shard.name)
        return shard.grad

    def set_gradient(self, gradient: Vector) -> None:
        """As on other hosts, but nothing counts as reached for it: the zeros of what no pass reached are in these vectors."""
        self.mix_passes()
        for shard, value in gradient:
            assert shard.grad is not None
            shard.grad.copy_(value)

    def mix_passes(self) -> None:
        self._reach.mixed = True

    def reached(self) -> Tensor | None:
        flags = self._reach.flags().clone()
        if self.world > 1:
            dist.all_reduce(flags)
        trained = [i for i, (_, p) in enumerate(self._named) if p.requires_grad]
        return flags if len(trained) == len(flags) else flags[trained]

    def finite(self) -> Tensor:
        """Whether every gradient element is finite, and at the same time which parameters no rank has reached. One all-reduce of
        one number per parameter, and the host sync that whoever asks would make.

        Raises:
            RuntimeError: at stage 3, on every rank, when only some ranks reached a parameter: they gathered and reduced different
                parameters together.
        """
        gradient = self.gradient()
        bad_here = count_bad([*self.scratch.masters(self._every()), *gradient.tensors], self.device)
        reach = self._reach
        flags = reach.all if len(reach.last) == len(reach.names) else reach.flags()
        table = torch.cat([bad_here.view(1), flags])
        if self.world > 1:
            dist.all_reduce(table)
        bad, *ranks = table.tolist()
        self.unreached = frozenset(n for n, count in zip(self._reach.names, ranks, strict=True) if not count)
        if self.stage == 3:
            partly = {n for n, count in zip(self._reach.names, ranks, strict=True) if 0 < count < self.world}
            refuse_partly(self.title, [n for n, p in self._named if n in partly and not in_leaf(p)])
        return torch.tensor(bad == 0)

    def any_gradient(self) -> bool:
        return True  # end_pass tells

    def end_step(self, applied: bool | None) -> None:
        self.local = False

    def _clear_stale(self, *, boundary: bool) -> None:
        """At stage 3: zero what an earlier pass left in the gradients of parameters that this one has not reached."""
        if self.stage == 3:
            late = {n: p for n, p in self._named if n not in self._reach.last}
            clear_stale(self.zero, late, self._every() if boundary else [])

    def _forget_buckets(self) -> None:
        """Empty what a backward past the engine, or one that raised, has put aside for a reduction that never came."""
        stale = [bucket for bucket in getattr(self.zero, "ipg_buckets", {}).values() if bucket.params]
        for bucket in stale:
            bucket.clear_params() if self.stage == 3 else bucket.clear()
        reduced = self.zero.params_already_reduced if stale else []
        for key in list(reduced) if isinstance(reduced, dict) else range(len(reduced)):
            reduced[key] = False

    def left_over(self) -> str:
        for name, p in self._named:
            if p.grad is not None:
                return name
        # A backward of what engine(...) returned reduces into the shards; the engine notes it until its next forward.
        seen = getattr(getattr(self.zero, "_backward_hook_state", None), "backward_seen_this_step", False)
        reduced = getattr(self.zero, "averaged_gradients", None) or {} if self.stage < 3 else {}  # stage 3 writes over them
        return self._named[0][0] if self._backwards or seen or any(g is not None for g in reduced.values()) else ""

    def end_pass(self) -> None:
        if self._open:
            raise RuntimeError("DeepSpeed: no opt.backward(loss) followed the last forward, so there is no gradient to use; call "
                               "it in place of loss.backward() and engine.backward(loss), once per micro-batch")
        self._clear_stale(boundary=True)
        if hasattr(self.zero, "_wait_for_offload_copies"):  # of stages 1 and 2: into pinned memory, meanwhile
            self.zero._wait_for_offload_copies()

    def set_sync(self, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        if self._backwards:  # a parameter that a later micro-batch reaches first is added to what is there
            self._clear_stale(boundary=False)
        if self.stage and self.kind != "BF16_Optimizer":
            # The engine does this in its own forward, which a closure that calls engine.module does not enter.
            self.zero.clear_backward_seen_flag()
        elif self.kind == "BF16_Optimizer":
            self.zero.clear_lp_grads()
        self._open = True

    def check_micro_batches(self, count: int) -> None:
        steps = int(self.engine.gradient_accumulation_steps())
        if steps in (1, count):
            return
        check(False, "DeepSpeed", f"gradient_accumulation_steps={steps} in the engine and {count} micro-batch"
              f"{'es' * (count > 1)} in this step", "agree", f"loop over {steps} of them with opt.micro_batches(...) inside the "
              f"closure, or initialise the engine with {'1' if count == 1 else f'1 or {count}'}")

    def backward(self, loss: Tensor) -> None:
        if not self._open:
            raise RuntimeError("DeepSpeed: opt.backward was called twice for one forward boundary; sum the losses, or loop "
                               "over opt.micro_batches(...)")
        self._open = False
        if self.local:
            add_local(self._own, self._named, loss)
            return
        self._backwards += 1
        run = self._engines("backward")
        if self._in_order is not None:
            self._in_order.begin()
        run(loss, scale_wrt_gas=False)

    def _engines(self, name: str) -> Callable[..., Any]:
        """The engine's own method, behind the guard that keeps others from calling it."""
        known, guard = self._own_methods.get(name), vars(self.engine).get(name)
        if known is None or known[1] is not guard:  # the first time, or set anew since
            known = self._own_methods[name] = (passage(self.engine, name), guard)
        return known[0]

    @property
    def working_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def masters_apart(self) -> bool:
        return self.kind != "torch"

    @property
    def apart(self) -> bool:
        return self.stage < 3

    def working_shards(self) -> list[Shard]:
        return [Shard(n, p.shape, 0, p, view=lambda t: t.data, grad=lambda n=n: self._own.get(n),  # type: ignore[misc]
                      group=dict, state=dict) for n, p in self._named if p.requires_grad]

    def local_gradient(self) -> Vector:
        if self.stage == 3:
            return super().local_gradient()
        shards = [s for s in self.working_shards() if s.name in self._own]
        return Vector(Alone(self), shards, [self._own[s.name] for s in shards])

    def update(self) -> None:
        self.engine.set_gradient_accumulation_boundary(True)
        if self.kind == "torch":  # parameters one by one, as torch has them
            for name, p in self._named:
                p.grad = None if name in self.unreached else p.grad
        late = self.unreached if self.kind != "torch" else frozenset()
        if late or self._clocks.behind:
            with self._clocks.stepping(late):
                self._engines("step")()
        else:
            self._engines("step")()
        self._backwards = 0
        if not self.engine.was_step_applied():
            raise RuntimeError("DeepSpeed skipped an update whose gradient was finite on every rank; the engine's own overflow "
                               "check disagrees, and the step would be lost on it alone")

    def kept(self, shard: Shard) -> Mapping[str, Any]:
        return self._clocks.kept(shard)

    def restore_clocks(self, saved: Mapping[str, tuple[dict[str, Any], bool]]) -> None:
        self._clocks.restore(saved)

    def reset_moments(self) -> None:
        self._clocks.forget(self.shards)
        if hasattr(self.zero, "_hp_optimizer_states_linked"):
            self.zero._hp_optimizer_states_linked = False

    def recipe(self) -> tuple[Any, ...]:
        raise TypeError("an optimizer on a DeepSpeed engine cannot be copied or pickled; use state_dict()")
