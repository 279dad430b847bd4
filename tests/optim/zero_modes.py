"""Jobs that build real DeepSpeed engines on one rank (gloo, CPU) in many modes; see worker.py.

OUT.json: {name: "ok" or "ErrorClass: message"}.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from record import Job, Record
from torch import nn

from everbatch.optim import SAM, ClipGradNorm, ShrinkPerturb


class Sharp(ClipGradNorm, SAM, torch.optim.SGD):
    pass


class SharpAdam(SAM, torch.optim.AdamW):
    pass


class Lars(torch.optim.SGD):
    """Stands for any base whose update needs whole tensors."""


class SharpLars(SAM, Lars):
    pass


class SharpLBFGS(SAM, torch.optim.LBFGS):
    pass


class Bare(ShrinkPerturb, torch.optim.SGD):
    pass


def engine_of(
    config: dict[str, Any] | None = None, base: Any = torch.optim.SGD, stage: int = 1, model: nn.Module | None = None,
    **zero: Any,
) -> Any:
    """An engine over a small net."""
    import deepspeed

    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    full = {"train_micro_batch_size_per_gpu": 8, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9, "zero_optimization": {"stage": stage, **zero}}
    chosen = {k: v for k, v in (full | (config or {})).items() if v is not None}
    engine, *_ = deepspeed.initialize(model=model, optimizer=base(model.parameters(), lr=0.1), config=chosen)
    return engine


def closure_of(opt: Any, engine: Any, backwards: int = 1) -> Callable[[], torch.Tensor]:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))

    def closure() -> torch.Tensor:
        for _ in range(backwards):
            loss = engine.module(x).square().mean()
            opt.backward(loss)
        return loss

    return closure


def attribute(name: str, value: Any, of: str = "") -> Callable[[Any], None]:
    """Sets a mode that this machine cannot build."""
    def change(engine: Any) -> None:
        setattr(getattr(engine, of) if of else engine, name, value)

    return change


def expect(good: bool, what: str) -> None:
    if not good:
        raise AssertionError(what)


def with_change(change: Callable[[Any], None], **options: Any) -> None:
    engine = engine_of(**options)
    change(engine)
    Sharp.on(engine)


def pipeline() -> None:
    engine = engine_of()
    engine.__class__ = type("PipelineEngine", (type(engine),), {})
    Sharp.on(engine)


def complex_weights() -> None:
    import deepspeed

    model = nn.Linear(2, 2, dtype=torch.complex64)
    config = {"train_micro_batch_size_per_gpu": 8, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
    Sharp.on(deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config)[0])


def missing_internal() -> None:
    engine = engine_of(stage=2)
    del engine.optimizer.micro_step_id
    Sharp.on(engine)


def torch_scheduler() -> None:
    """A torch scheduler attaches to the optimizer, and moves the rate that the engine uses."""
    engine = engine_of()
    opt = Sharp.on(engine)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)  # type: ignore[arg-type]
    rates = []
    for _ in range(3):
        opt.step(closure_of(opt, engine))
        rates.append(engine.get_lr()[0])
        schedule.step()
    expect(rates == [0.1, 0.05, 0.025], f"rates {rates}")
    inner = engine.basic_optimizer
    expect(opt.param_groups is inner.param_groups and opt.state is inner.state, "not live views")


def engine_scheduler() -> None:
    """The engine steps a scheduler of its own, once per step whatever the passes."""
    warmup = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.1, "warmup_num_steps": 4, "warmup_type": "linear"}
    engine = engine_of({"scheduler": {"type": "WarmupLR", "params": warmup}})
    opt = Sharp.on(engine)
    for _ in range(3):
        opt.step(closure_of(opt, engine))
    expect(engine.lr_scheduler.last_batch_iteration == 2, f"scheduler at {engine.lr_scheduler.last_batch_iteration}")


def hooks() -> None:
    engine = engine_of()
    opt = Sharp.on(engine)
    calls: list[int] = []
    opt.register_step_post_hook(lambda *_: calls.append(1))  # type: ignore[attr-defined]
    opt.step(closure_of(opt, engine))
    expect(calls == [1], f"{len(calls)} calls")


def micro_batches_at_stage_2() -> None:
    """Two micro-batches, twice: what is reduced is their sum."""
    ends = []
    for parts in (1, 2):
        engine = engine_of({"gradient_accumulation_steps": parts, "train_micro_batch_size_per_gpu": 8 // parts}, stage=2)
        opt = Sharp.on(engine, rho=0.3)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))

        def closure(opt: Any = opt, engine: Any = engine, x: Any = x, parts: int = parts) -> None:
            for rows in opt.micro_batches(x.chunk(parts)):
                opt.backward(engine.module(rows).square().mean())

        for _ in range(2):
            opt.step(closure)
        ends.append(torch.cat([p.detach().flatten() for p in engine.module.parameters()]))
    expect(bool((ends[0] - ends[1]).abs().max() < 1e-6), f"differ by {(ends[0] - ends[1]).abs().max()}")


def saved_elsewhere() -> tuple[nn.Module, dict[str, Any]]:
    """A net and the state of its optimizer, one step on, of plain torch: the weights are the net's."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    opt = Sharp(model, lr=0.1)
    opt.step(lambda: opt.backward(model(torch.ones(2, 6)).square().sum()))
    return model, opt.state_dict()


def weights_from_elsewhere() -> None:
    model, state = saved_elsewhere()
    opt = Sharp.on(engine_of())
    opt.load_state_dict(state, weights=model.state_dict())
    saved = opt.state_dict()["everbatch"]["tensors"]
    expect(all(torch.equal(saved[f"master/{n}"], p) for n, p in model.named_parameters()), "other weights")
    expect(all(torch.equal(p, q) for p, q in zip(opt.host.module.parameters(), model.parameters(), strict=True)), "not published")
    again = Sharp.on(engine_of())
    again.load_state_dict(opt.state_dict())
    expect(all(torch.equal(p, q) for p, q in zip(again.host.module.parameters(), model.parameters(), strict=True)), "not kept")


def as_the_engine_accumulates() -> None:
    """Four losses through opt.micro_batches move the weights as four calls of engine.backward and engine.step do."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    for stage, through in [(stage, through) for stage in range(4) for through in ("module", "engine")]:
        ends = []
        for ours in (False, True):
            engine = engine_of({"gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": 2}, stage=stage)
            forward = engine if through == "engine" or not ours else engine.module
            opt = Sharp.on(engine, rho=0.0, max_norm=math.inf) if ours else None

            def closure(opt: Any = opt, forward: Any = forward) -> Any:
                return sum(opt.backward(forward(rows).square().mean()) for rows in opt.micro_batches(x.chunk(4)))

            for _ in range(2):
                if opt is not None:
                    opt.step(closure)
                for rows in x.chunk(4) if opt is None else ():
                    engine.backward(engine(rows).square().mean())
                    engine.step()
            ends.append(weights_of(engine))
        expect(bool((ends[0] - ends[1]).abs().max() < 1e-6), f"stage {stage}: differ by {(ends[0] - ends[1]).abs().max()}")


def weights_of(engine: Any) -> torch.Tensor:
    """Every weight of an engine of one rank."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return torch.cat([p.detach().flatten() for p in engine.module.parameters()]).clone()


def wrong_number_of_micro_batches(steps: int, count: int) -> None:
    """Refused before any forward, nothing moves, and a step with the right number goes on."""
    engine = engine_of({"gradient_accumulation_steps": steps, "train_micro_batch_size_per_gpu": 2})
    opt = Sharp.on(engine)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))

    def closure(count: int) -> Any:
        return sum(opt.backward(engine.module(rows).square().mean()) for rows in opt.micro_batches(x.chunk(count)))

    before = weights_of(engine)
    try:
        opt.step((lambda: closure(count)) if count > 1 else closure_of(opt, engine))
    finally:
        expect(torch.equal(before, weights_of(engine)), "weights moved")
        opt.step(lambda: closure(steps))
        expect(not torch.equal(before, weights_of(engine)), "weights did not move")


MODES: tuple[dict[str, Any], ...] = (
    *({"stage": stage} for stage in range(4)), *({"stage": stage, "config": {"bf16": {"enabled": True}}} for stage in range(4)),
    {"stage": 1, "config": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}},
    {"stage": 2, "offload_optimizer": {"device": "cpu"}}, {"stage": 3, "offload_optimizer": {"device": "cpu"}})


def the_old_loop() -> None:
    """engine.backward and engine.step are errors beside the step and inside its closure; engine(...) alone is not."""
    kept = []
    for stage in range(4):
        engine = engine_of(stage=stage)
        opt = Sharp.on(engine)
        opt.step(closure_of(opt, engine))
        before = weights_of(engine)
        x = torch.ones(8, 6)

        def inside(opt: Any = opt, engine: Any = engine, x: Any = x) -> None:
            engine.backward(engine(x).square().mean())

        for call in (lambda e=engine, x=x: e.backward(e(x).square().mean()), engine.step, lambda o=opt, f=inside: o.step(f)):
            try:
                call()
                expect(False, f"stage {stage}: accepted")
            except RuntimeError as error:
                expect("that Sharp.on(engine) has taken" in str(error) and "call opt.step(closure)" in str(error), str(error))
        with torch.no_grad():
            engine(x)
        expect(torch.equal(before, weights_of(engine)), "weights moved")
        opt.step(closure_of(opt, engine))
        again = Sharp.on(engine, rho=0.1)
        again.step(closure_of(again, engine))
        expect(not torch.equal(before, weights_of(engine)), "weights did not move")
        kept.append([g for name in ("backward", "step") if (g := vars(engine)[name]).engine() is not engine])
    expect(not any(kept), "a guard of another engine")


def left_alone(how: str) -> None:
    """A gradient that a backward outside of the closure left is found in every mode, and zero_grad cures it."""
    for mode in MODES:
        ends = []
        for left in (False, True):
            engine = engine_of(**mode)
            opt = Sharp.on(engine)
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(next(engine.module.parameters()).dtype)

            def closure(opt: Any = opt, engine: Any = engine, x: Any = x) -> torch.Tensor:
                loss = engine.module(x).float().square().mean()
                opt.backward(loss)
                return loss

            for i in range(2):
                if left and (how == "opt.backward" or mode["stage"] or how == "module"):
                    loss = (engine if how == "engine" else engine.module)(x).float().square().mean()
                    opt.backward(loss) if how == "opt.backward" else loss.backward()
                    try:
                        opt.step(closure)
                        expect(False, f"{mode}, step {i}: a gradient was forgotten without a word")
                    except RuntimeError as error:
                        expect("of a backward outside of the closure" in str(error), str(error))
                    opt.zero_grad()
                opt.step(closure)
            ends.append(weights_of(engine))
        expect(torch.equal(*ends), f"{mode}: differ by {(ends[0] - ends[1]).abs().max()}")


def past_us(within: str) -> None:
    """A closure whose loss goes past opt.backward gives no gradient that a mixin could see."""
    engine = engine_of(stage=2)
    opt = Sharp.on(engine)
    if within == "closure":
        opt.step(lambda: engine.module(torch.ones(8, 6)).square().mean().backward())
    opt.step()


def two_backwards() -> None:
    engine = engine_of()
    opt = Sharp.on(engine)
    opt.step(closure_of(opt, engine, backwards=2))


def mended_self_check() -> None:
    """A first step whose loss is NaN proves nothing: the check is made in the next one."""
    engine = engine_of()
    opt = Sharp.on(engine)

    def closure() -> None:
        opt.backward(engine.module(torch.full((8, 6), float("nan"))).square().mean())

    opt.step(closure)
    expect(opt.skipped_count == 1 and opt.host.unproven, "a NaN passed for a proof")  # type: ignore[attr-defined]
    opt.step(closure_of(opt, engine))
    expect(not opt.host.unproven, "not verified")  # type: ignore[attr-defined]


class Centred(nn.Module):
    """What it gives depends on a buffer that it moves, as with spectral norm; a branch waits for its turn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.other = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: torch.Tensor, branch: bool) -> torch.Tensor:
        x = self.first(x)
        self.mean.lerp_(x.detach().mean(0), 0.5)  # type: ignore[operator]
        return (self.other if branch else self.head)((x - self.mean).relu())  # type: ignore[no-any-return, operator]


def as_plain_torch(base: Any, **options: Any) -> None:
    """To rounding, whatever rate a schedule sets and whichever branch a step takes."""
    for stage in (1, 2, 3):
        ends = []
        for engine in (None, engine_of(base=functools.partial(base, **options), stage=stage, model=Centred())):
            cls: Any = type("Centring", (SAM, base), {})
            plain = Centred()
            opt = cls.on(engine, rho=0.2) if engine else cls(plain, lr=0.1, rho=0.2, **options)
            model = engine.module if engine else plain
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
            for step, branch in enumerate((False, False, True, False, True)):
                opt.param_groups[0]["lr"] = 0.1 / (step + 1)
                opt.step(lambda opt=opt, model=model, x=x, branch=branch: opt.backward(model(x, branch).square().mean()))
            kept = opt.state_dict(weights=True)["everbatch"]["tensors"]
            kept = {name: value for name, value in kept.items() if name.startswith(("master/", "moment"))}
            ends.append(kept | {"mean": model.mean.clone()})
        expect(ends[0].keys() == ends[1].keys(), f"stage {stage}: {ends[0].keys() ^ ends[1].keys()}")
        for name, value in ends[0].items():
            apart = float((value - ends[1][name]).abs().max())
            expect(apart < 1e-6, f"stage {stage}: {name} is {apart:.2g} away")


CASES: dict[str, Callable[[], Any]] = {
    "buffers that move": lambda: as_plain_torch(torch.optim.SGD),
    "a base that ZeRO makes anew": lambda: as_plain_torch(torch.optim.Adagrad, weight_decay=0.1, lr_decay=0.1),
    **{f"stage {s}": (lambda s=s: Sharp.on(engine_of(stage=s))) for s in range(4)},
    "default clipping": lambda: Sharp.on(engine_of({"gradient_clipping": None})),
    "clipping 0.5": lambda: Sharp.on(engine_of({"gradient_clipping": 0.5})),
    "fp16": lambda: with_change(attribute("fp16_enabled", lambda: True)),
    "parameter offload": lambda: Sharp.on(engine_of(stage=3, offload_param={"device": "cpu"})),
    "NVMe": lambda: with_change(lambda e: setattr(e._config.zero_config.offload_optimizer, "device", "nvme"), stage=1,
                                offload_optimizer={"device": "cpu"}),
    "hpZ": lambda: with_change(lambda e: setattr(e._config.zero_config, "zero_hpz_partition_size", 2), stage=3),
    "quantized gradients": lambda: with_change(lambda e: setattr(e._config.zero_config, "zero_quantized_gradients", True)),
    "MoE": lambda: with_change(attribute("has_moe_layers", True)),
    "round robin": lambda: Sharp.on(engine_of(stage=2, round_robin_gradients=True)),
    "unmanaged": lambda: with_change(attribute("managed_gradient_accumulation", lambda: False)),
    "torch autocast": lambda: Sharp.on(engine_of({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}})),
    # DeepSpeed refuses this one by itself, without saying what to do.
    "stage 0 fp32 accumulation": lambda: with_change(lambda e: setattr(e._config, "grad_accum_dtype", "fp32"), stage=0,
                                                     config={"bf16": {"enabled": True}}),
    "pipeline": pipeline,
    "other base": lambda: SharpAdam.on(engine_of()),
    "passes of its own": lambda: SharpLBFGS.on(engine_of(base=torch.optim.LBFGS, stage=0)),
    "complex weights": complex_weights,
    "per tensor at stage 1": lambda: SharpLars.on(engine_of(base=Lars)),
    "per tensor at stage 0": lambda: SharpLars.on(engine_of(base=Lars, stage=0)),
    "missing internal": missing_internal,
    "option of the base": lambda: Sharp.on(engine_of(), lr=0.1),
    "unknown option": lambda: Sharp.on(engine_of(), roh=0.1),
    "state without weights": lambda: Sharp.on(engine_of()).load_state_dict(saved_elsewhere()[1]),
    "weights from elsewhere": weights_from_elsewhere,
    "copy": lambda: copy.deepcopy(Sharp.on(engine_of())),
    "added group": lambda: Sharp.on(engine_of()).add_param_group({"params": []}),
    "two backwards": two_backwards,
    "torch scheduler": torch_scheduler,
    "engine scheduler": engine_scheduler,
    "hooks": hooks,
    "micro batches": micro_batches_at_stage_2,
    "as the engine accumulates": as_the_engine_accumulates,
    "4 configured, one given": lambda: wrong_number_of_micro_batches(4, 1),
    "4 configured, 2 given": lambda: wrong_number_of_micro_batches(4, 2),
    "2 configured, 4 given": lambda: wrong_number_of_micro_batches(2, 4),
    "the old loop": the_old_loop,
    **{f"left over by {how}": (lambda how=how: left_alone(how)) for how in ("module", "engine", "opt.backward")},
    "loss.backward in the closure": lambda: past_us("closure"),
    "no backward at all": lambda: past_us(""),
    "self-check after NaN": mended_self_check,
    "factory": lambda: Bare.on(engine_of(stage=3), factory=lambda: nn.Linear(1, 1)).shrink_perturb(),
}


def ended(case: Callable[[], Any]) -> str:
    case()
    return "ok"


def jobs(record: Record) -> Iterator[Job]:
    for name, case in CASES.items():
        yield record.noted(name, ended, case)
