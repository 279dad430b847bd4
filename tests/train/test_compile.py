"""compile=true: how many graphs a run compiles, and that nothing else of it changes."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import learning
from everbatch import compose
from everbatch.evaluate.export import whole_state
from everbatch.optim import EMA, SAM, ClipGradNorm, DynamicSparsity
from everbatch.train import ConAdv, Trainer
from learning import Abandoned, stream
from processes import Zygote

BARE = functools.partial(compose(ClipGradNorm, EMA, base=torch.optim.SGD), lr=0.1, max_norm=1.0)
SAMS = functools.partial(compose(SAM, base=torch.optim.SGD), lr=0.1, rho=0.05)
MASKS = functools.partial(compose(DynamicSparsity, base=torch.optim.SGD), lr=0.1, density=0.5, update_every=3)
BLOCKS = 2
"""Blocks of `net` with weights."""


def net() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(64, 15), nn.BatchNorm1d(15), nn.ReLU())
    return nn.Sequential(nn.Flatten(), first, nn.Linear(15, 6))


@contextmanager
def counted() -> Iterator[list[Any]]:
    """The graphs that are compiled inside, by a backend that runs them as they are."""
    graphs: list[Any] = []
    torchs = torch.compile

    def keep(module: Any, _inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    def compile_(model: Any = None, **options: Any) -> Any:
        return torchs(model, **{**options, "backend": keep})

    torch._dynamo.reset()
    torch.compile = compile_  # type: ignore[assignment]
    try:
        yield graphs
    finally:
        torch.compile = torchs
        torch._dynamo.reset()


def difference(one: Any, other: Any) -> float:
    """Largest between the weights of two runs."""
    a, b = whole_state(one), whole_state(other)
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.parametrize(("optimizer", "cls", "decay_vectors", "most"), [
    (BARE, Trainer, True, 1), (BARE, Trainer, False, 1), (SAMS, Trainer, True, 2), (MASKS, Trainer, True, 1),
    (SAMS, learning.Learner, True, 4)])
def test_graphs_of_a_run(optimizer: Any, cls: type, decay_vectors: bool, most: int) -> None:
    """Three tasks, with evaluations: one graph, one more for passes that hold statistics, and as many for a memory's parts, whose
    batches have another size."""
    runs = []
    with counted() as graphs:
        for compiled in (True, False):
            t = learning.trainer("plain", model=net(), cls=cls, optimizer=optimizer, compile=compiled,
                                 decay_vectors=decay_vectors)
            t.fit(stream())
            runs.append(t)
            assert len(graphs) == most
    assert difference(*runs) <= 1e-6
    assert [row[:2] for row in runs[0].matrix[1:]] == [row[:2] for row in runs[1].matrix[1:]]


@pytest.mark.parametrize(("one_forward", "most"), [(False, 2), (True, 1)])
def test_crafting_runs_as_it_is(one_forward: bool, most: int) -> None:
    """A graph for each branch of the batch norms, or one for both; none for attacks, which elsewhere have none either."""
    learner: Any = type("Learner", (ConAdv, Trainer), {})
    runs = []
    with counted() as graphs:
        for compiled in (True, False):
            config = Trainer.Config(batch_size=8, compile=compiled)
            t = learner(net(), BARE, config=config, prepare=learning.scale, device="cpu", radius=8.0, one_forward=one_forward)
            t.fit(stream())
            runs.append(t)
            assert len(graphs) == most
    assert difference(*runs) <= 1e-6


def test_a_run_goes_on_with_and_without(tmp_path: Path) -> None:
    whole = learning.trainer("plain", model=net(), optimizer=SAMS)
    whole.fit(stream())
    for first in (True, False):
        folder = tmp_path / str(first)
        with counted() as graphs:
            cut = learning.trainer("plain", model=net(), optimizer=SAMS, folder=folder, compile=first,
                                   recorder=learning.recorder(folder, 11))
            with pytest.raises(Abandoned):
                cut.fit(stream())
            assert bool(graphs) == first
            again = learning.trainer("plain", model=net(), optimizer=SAMS, folder=folder, compile=not first)
            again.fit(stream(), resume=True)
            assert graphs and again.changes == [] and again.step == whole.step
        assert difference(whole, again) <= 1e-6


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, which it hides where it is not an error
def test_logits_are_picked_inside_the_graph() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x), "other": x}

    with counted() as graphs:
        config = Trainer.Config(batch_size=8, compile=True)
        t = Trainer(Two(), BARE, config=config, prepare=learning.scale, device="cpu", output="logits")
        t.fit(stream())
        assert len(graphs) == 1
        assert t.predict(torch.rand(3, 1, 8, 8)).shape == (3, 6) and len(graphs) == 1


def test_what_is_no_switch() -> None:
    with pytest.raises(ValueError, match="Trainer: compile='yes', must be true or false"):
        Trainer.Config(compile="yes")  # type: ignore[arg-type]


@pytest.mark.rotated(0, 2)
@pytest.mark.distributed
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_graphs_on_engines(tmp_path: Path, zygote: Zygote) -> None:
    """Two ranks: DDP and ZeRO 2 as on one; FSDP2 a graph for each block, and one more for a block that holds statistics."""
    out = tmp_path / "found.json"
    hosts = ("ddp", "fsdp2", "zero2", "zero3")
    found = zygote.found(Path(__file__).parent / "compile_worker.py", out, *hosts, ranks=2, limit=150.0)
    assert found.pop("zero3").startswith("UnsupportedHost: DeepSpeed: compile=true on ZeRO stage 3")
    for host, run in found.items():
        bare = BLOCKS if host == "fsdp2" else 1
        assert (run["bare/True"], run["sam/True"]) == (bare, bare + 1), found
        assert (run["bare/False"], run["sam/False"]) == (bare, bare + 1), found
        assert run["bare/difference"] <= 1e-6 and run["sam/difference"] <= 1e-6, found
