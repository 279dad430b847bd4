"""Modules that passes run beside the one an optimizer was given: found in steps that look, and watched from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torchs
from torch.utils._python_dispatch import TorchDispatchMode

from everbatch import compose
from everbatch.engines.watch import Watch
from everbatch.optim import EMA, SAM, ClipGradNorm, DynamicSparsity
from rotation import When

Sharp: Any = compose(SAM, base=torch.optim.SGD)
X, Y = torch.rand(8, 6), torch.arange(8) % 3


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def closure_of(opt: Any, forward: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = functional.cross_entropy(forward(X), Y)
        opt.backward(loss)
        return loss

    return closure


def counted(norm: nn.BatchNorm1d) -> int:
    assert norm.num_batches_tracked is not None
    return int(norm.num_batches_tracked)


@pytest.mark.parametrize("given", ["module", "compiled", "compiled in place", "parameters"])
def test_a_batch_norm_outside_of_the_module_counts_one_batch_per_step(given: str) -> None:
    inside, outside = net(), nn.BatchNorm1d(6, affine=False)  # torch.compile warns of inputs with a graph
    forward: Any = torch.compile(inside, backend="eager") if given == "compiled" else inside
    if given == "compiled in place":
        inside.compile(backend="eager")
    opt = Sharp(inside.named_parameters() if given == "parameters" else forward, lr=0.1, rho=0.05)
    for step in range(1, 5):
        opt.step(closure_of(opt, lambda x: forward(outside(x))))
        assert (counted(outside), counted(inside[1])) == (step, step)  # type: ignore[index]


def test_buffers_are_copied_in_one_operation_for_each_type() -> None:
    called: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    watch = Watch(nn.Sequential(*(nn.BatchNorm1d(6) for _ in range(5))))
    with Calls():
        watch.open(lambda modules: None, recorded=True)
    assert len(watch.buffers) == 15 and called.count("_foreach_copy_") == 2  # float32 and int64
    assert not {"clone", "copy_"} & set(called)
    for _, _, buffer, _ in watch.buffers:
        buffer.add_(1)
    watch.close()
    watch.rollback()
    assert all(torch.equal(getattr(m, n), kept) and int(m.num_batches_tracked) == 0 for m, n, _, kept in watch.buffers)
    watch.end_step()


def test_one_that_comes_with_a_task_is_found_at_its_start() -> None:
    model, late = net(), nn.BatchNorm1d(6)
    opt = Sharp(model, lr=0.1, rho=0.05)
    for _ in range(2):
        opt.step(closure_of(opt, model))
    opt.host.watch.look_again()
    for step in range(1, 4):
        opt.step(closure_of(opt, lambda x: model(late(x))))
        assert counted(late) == step


def test_a_module_that_the_given_one_gains_later_is_walked() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    opt = Sharp(model, lr=0.1, rho=0.05)
    for _ in range(3):
        opt.step(closure_of(opt, model))
    late = model[1] = nn.BatchNorm1d(5, affine=False)
    for step in range(1, 4):
        opt.step(closure_of(opt, model))
        assert counted(late) == step


class Counts(nn.Identity):
    """Counts its forwards in a buffer, once it has one."""

    def forward(self, x: Tensor) -> Tensor:
        for seen in self.buffers():
            seen += 1
        return x


@pytest.mark.parametrize("how", ["buffer", "child of a leaf"])
def test_what_a_module_gains_between_steps_is_put_back(how: str) -> None:
    """Where nothing had a buffer before, and where the number of children of the root stays."""
    leaf = Counts()
    model = nn.Sequential(nn.Linear(6, 5), leaf, nn.Linear(5, 3))
    opt = Sharp(model, lr=0.1, rho=0.05)
    for _ in range(3):
        opt.step(closure_of(opt, model))
    owner: nn.Module = leaf
    if how == "child of a leaf":
        owner = leaf.late = nn.Identity()
    owner.register_buffer("seen", torch.zeros(()))
    opt.step(closure_of(opt, model))
    assert float(owner.seen) == 1.0  # type: ignore[arg-type]
    opt.step(closure_of(opt, lambda x: model(x) * torch.nan))
    assert float(owner.seen) == 1.0 and opt.skipped_count == 1  # type: ignore[arg-type]


def test_a_layer_that_comes_after_others_were_moved_counts_one_batch_per_step() -> None:
    """`pop` of a container replaces the dict of its children."""
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Sequential(nn.Linear(5, 3)))
    opt = Sharp(model, lr=0.1, rho=0.05)
    opt.step(closure_of(opt, model))
    first, second = model
    second.insert(0, first.pop(-1))  # type: ignore[operator]
    opt.step(closure_of(opt, model))
    late = nn.BatchNorm1d(5, affine=False)
    first.append(late)  # type: ignore[operator]
    for step in range(1, 4):
        opt.step(closure_of(opt, model))
        assert counted(late) == step


def test_a_skipped_step_puts_back_what_is_outside() -> None:
    model, outside = net(), nn.BatchNorm1d(6)
    opt = Sharp(model, lr=0.1, rho=0.05)
    opt.step(closure_of(opt, lambda x: model(outside(x))))
    before = [b.clone() for b in (*outside.buffers(), *model.buffers())]
    opt.step(closure_of(opt, lambda x: model(outside(x)) * torch.nan))
    assert opt.skipped_count == 1
    assert all(map(torch.equal, before, (*outside.buffers(), *model.buffers())))


@pytest.mark.parametrize("outside, looking", [(nn.Identity(), [True, False, False]), (nn.BatchNorm1d(6), [True, True, True])])
def test_steps_look_no_longer_than_they_must(outside: nn.Module, looking: list[bool]) -> None:
    model, seen = net(), []

    def forward(x: Tensor) -> Tensor:
        seen.append(bool(torchs._global_forward_pre_hooks))
        return model(outside(x))  # type: ignore[no-any-return]

    opt = Sharp(model, lr=0.1, rho=0.05)
    for _ in range(3):
        opt.step(closure_of(opt, forward))
    assert seen[::2] == seen[1::2] == looking
    assert not torchs._global_forward_pre_hooks


def test_a_closure_that_raises_leaves_no_trace() -> None:
    before, call = net(), nn.Module.__call__
    for model in (before, torch.compile(before, backend="eager")):
        opt = Sharp(model, lr=0.1, rho=0.05)
        with pytest.raises(ZeroDivisionError):
            opt.step(closure_of(opt, lambda x, model=model: model(x) / (1 // 0)))  # type: ignore[misc]
        assert nn.Module.__call__ is call and not torchs._global_forward_pre_hooks


SPARSE = {"density": 0.5, "update_every": 10, "include": ("0.weight", "3.weight")}
MIXES: dict[str, tuple[tuple[type, ...], dict[str, Any], int]] = {
    "bare": ((), {}, 1), "clipping": ((ClipGradNorm,), {}, 1), "EMA": ((EMA,), {}, 1),
    "masks": ((DynamicSparsity,), SPARSE, 1), "SAM": ((SAM,), {"rho": 0.05}, 2),
    "all": ((ClipGradNorm, SAM, EMA, DynamicSparsity), {"rho": 0.05, **SPARSE}, 2),
}
HOW = [(mix, "wrapped") for mix in MIXES] + [("all", "in place"), ("all", "parameters")]


@pytest.mark.parametrize("mix, how", [When(place, 2).param(*one) for place, one in enumerate(HOW)])
def test_a_compiled_module_stays_compiled(mix: str, how: str) -> None:
    """As many graphs as the method has kinds of passes, over 100 steps and a task that begins in between, and no break."""
    mixins, options, most = MIXES[mix]
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            runs[0] += 1
            return graph.forward(*arguments)

        graphs.append(1)
        return run

    runs = [0]
    torch._dynamo.reset()
    model = net()
    forward: Any = model
    if how == "wrapped":
        forward = torch.compile(model, backend=backend, fullgraph=True)
    else:
        model.compile(backend=backend, fullgraph=True)
    given = model.named_parameters() if how == "parameters" else forward
    opt = compose(*mixins, base=torch.optim.SGD)(given, lr=0.1, momentum=0.9, **options)
    for step in range(100):
        if step == 50:
            opt.host.watch.look_again()
            if hasattr(opt, "begin_task"):
                opt.begin_task(1)
        opt.step(closure_of(opt, forward))
    assert len(graphs) == most
    assert runs[0] == 100 * (1 + ("rho" in options)), "some passes ran outside of the compiled graphs"
