"""Models as people have them, on DDP and FSDP2: tied weights, weights read by others, layers that are not used, odd outputs."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everbatch.composition import compose
from everbatch.config.deepspeed import deepspeed_config
from everbatch.data import TensorSource
from everbatch.errors import UnsupportedHost
from everbatch.optim import EWC, SAM
from everbatch.train import Trainer
from processes import ENVIRONMENT, Zygote

WORKER = Path(__file__).parent / "shapes_worker.py"
BLOCKS = {"Net": 3, "Tied": 1, "TiedToRoot": 2, "Twice": 1, "Read": 0, "Helped": 0, "Nested": 7, "Unused": 3, "Dressed": 3}


@pytest.mark.distributed
def test_every_shape_trains_alike_on_ddp_and_fsdp2(zygote: Zygote, tmp_path: Path) -> None:
    found = zygote.found(WORKER, tmp_path / "found.json", ranks=2, limit=240)
    assert {name: f["blocks"] for name, f in found.items()} == BLOCKS
    for name, f in found.items():
        assert f["same"] and f["off"] < 1e-5 and f["logits"] < 1e-5, (name, f)
    still = {name: f["still"] for name, f in found.items() if f["still"]}  # neither decay nor momentum moved them
    assert still == {"Unused": ["spare.weight", "spare.bias"], "Helped": ["layers.0.bias", "layers.2.weight"]}


# ------------------------------------------------------------------------------------------------------- one process
class Returning(nn.Module):
    def __init__(self, dress: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.noise, self.dress = nn.Linear(6, 4), nn.Dropout(0.5), dress
        self.counting = False
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Any:
        if self.counting:
            self.calls += 1
        return self.dress(self.layer(self.noise(x)))


Pair = namedtuple("Pair", ["aux", "logits"])
DRESSES: dict[str, tuple[Any, Any]] = {
    "tuple": (lambda y: (y, y * 0), 0), "list": (lambda y: [y * 0, y], -1), "dict": (lambda y: {"logits": y}, "logits"),
    "dict by index": (lambda y: OrderedDict(loss=None, logits=y), 1), "named": (lambda y: Pair(y * 0, y), "logits")}


def data() -> tuple[TensorSource, TensorSource]:
    g = torch.Generator().manual_seed(0)
    train, test = (TensorSource(torch.randn(n, 6, generator=g), torch.arange(n) % 4, name=str(n)) for n in (64, 32))
    return train, test


def learner(model: nn.Module, parts: Any = (SAM,), options: Any = None, **more: Any) -> Trainer:
    partial = functools.partial(compose(*parts, base=torch.optim.SGD), lr=0.1, **(options or {}))
    return Trainer(model, partial, config=Trainer.Config(batch_size=8), device="cpu", **more)


@pytest.mark.parametrize("dress", DRESSES)
def test_networks_train_on_the_logits_that_are_named(dress: str) -> None:
    function, output = DRESSES[dress]
    plain, dressed = Returning(lambda y: y), Returning(function)
    for parts, options in (((SAM,), {"rho": 0.05}), ((EWC,), {"strength": 1.0})):
        one = learner(plain, parts, options).fit([data()])
        other = learner(dressed, parts, options, output=output).fit([data()])
        assert one == other and torch.equal(plain.layer.weight, dressed.layer.weight)
    assert type(dressed(torch.zeros(1, 6))) is type(function(torch.zeros(1)))  # the network is as it was


@pytest.mark.parametrize(("dress", "output", "why"), [
    ("tuple", None, r"returns tuple of 0: \(8, 4\), 1: \(8, 4\), must return logits; name them: Trainer\(\.\.\., output="),
    ("dict", "logit", r"output='logit' and a network that returns dict with 'logits': \(8, 4\), must name the tensor"),
    ("dict", 3, "output=3 and a network that returns dict"),
    ("tuple", "logits", "output='logits' and a network that returns tuple"),
    (None, 0, r"output=0 and a network that returns a tensor of shape \(8, 4\), must be left out"),
    (None, 1.5, "output=1.5, must be the name or the index"), (None, True, "output=True, must be")])
def test_other_outputs_are_refused_by_what_they_are(dress: str | None, output: Any, why: str) -> None:
    model = Returning(DRESSES[dress][0] if dress else lambda y: y)
    with pytest.raises(ValueError, match=f"Trainer: .*{why}"):
        learner(model, output=output).fit([data()])


def test_a_tensor_is_predicted_without_a_trace() -> None:
    model = Returning(lambda y: y)
    trainer = learner(model)
    trainer.fit(data())
    x, calls, noise = torch.randn(5, 6), model.calls.clone(), torch.get_rng_state()
    model.counting = True
    modes = [m.training for m in model.modules()]
    logits = trainer.predict(x)
    assert not logits.requires_grad and torch.equal(logits, model.layer(x)) and torch.equal(model.calls, calls)
    assert torch.equal(torch.get_rng_state(), noise) and model.training
    assert [m.training for m in model.modules()] == modes


PARTIAL = functools.partial
SAMSGD = compose(SAM, base=torch.optim.SGD)


@pytest.mark.parametrize(("optimizer", "why"), [
    (torch.optim.SGD([torch.zeros(1)], lr=0.1), r"SGD\(\.\.\.\), built already, .* pass functools.partial\(compose\(base="),
    (SAMSGD(nn.Linear(2, 2), lr=0.1), r"SAMSGD\(\.\.\.\), built already"),
    (PARTIAL(torch.optim.SGD, lr=0.1), r"functools.partial\(SGD, \.\.\.\), .* functools.partial\(compose\(base="),
    (torch.optim.AdamW, r"AdamW, a class, .* functools.partial\(compose\(base=torch.optim.AdamW\), lr=0.1\)"),
    (SAMSGD, r"SAMSGD, a class, .* pass functools.partial\(SAMSGD, lr=0.1\)"),
    (PARTIAL(SAMSGD, [torch.zeros(1)]), r"SAMSGD, list\(\.\.\.\)\), must hold options by keyword alone"),
    ("sgd", "'sgd', must be functools.partial"), (lambda p: p, "must be functools.partial")])
def test_what_is_no_optimizer_for_a_trainer_is_told_what_is(optimizer: Any, why: str) -> None:
    with pytest.raises(ValueError, match=f"Trainer: optimizer=.*{why}") as told:
        Trainer(nn.Linear(6, 4), optimizer, device="cpu")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("options", "engine", "why"), [
    ({"bucket_cap_mb": 1}, "plain", r"with engine='plain', must be left out; use engine='ddp'"), ([1], "ddp", "must be a dict"),
    ({"bucket_cap": 1}, "ddp", "did you mean 'bucket_cap_mb'"),
    ({"bucket_cap_mb": float("inf")}, "ddp", "be a finite number > 0"),
    ({"static_graph": 1}, "ddp", "must be True or False"), ({"broadcast_buffers": True}, "ddp", "must be left out"),
    ({"static_graph": True, "find_unused_parameters": True}, "ddp", "must have one of them")])
def test_options_of_ddp_are_checked_before_anything_is_built(options: Any, engine: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"Trainer: ddp.*{why}"):
        learner(nn.Linear(6, 4), engine=engine, ddp=options)


def test_what_a_model_raises_of_its_inputs_is_told_with_them() -> None:
    class Picky(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            assert input.shape[-1] == 7, "width"
            return super().forward(input)

    with pytest.raises(ValueError, match=r"raised AssertionError: width, on inputs of shape \(8, 6\) and torch.float32"):
        learner(Picky(6, 4)).fit([data()])
    with pytest.raises(ValueError, match=r"logits of \(8, 3\), 4 classes, must be \(n, classes\)"):
        learner(nn.Linear(6, 3)).fit([data()])
    with pytest.raises(ValueError, match=r"logits of \(16, 4\) for 8 samples, must be one row for each"):
        learner(nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Flatten(0, 1), nn.Linear(3, 4))).fit([data()])


@pytest.mark.parametrize("stage", [0, 3])
def test_parameters_without_dimensions_are_named_before_deepspeed_meets_them(stage: int) -> None:
    model = nn.Linear(6, 4)
    model.register_parameter("temperature", nn.Parameter(torch.tensor(2.0)))
    with pytest.raises(UnsupportedHost, match="DeepSpeed: parameter 'temperature' has no dimension"):
        learner(model, engine=deepspeed_config(stage=stage, micro_batch=8, world_size=1))


@pytest.mark.parametrize("layer", [nn.Embedding(9, 4, sparse=True), nn.EmbeddingBag(9, 4, sparse=True, mode="sum")])
def test_sparse_gradients_are_refused_before_anything_moves(layer: nn.Module) -> None:
    model = nn.Sequential(layer, nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"SAMSGD: sparse gradients of \['0'\], must be dense.*sparse=False"):
        SAMSGD(model, lr=0.1)
    opt, before = SAMSGD(model.named_parameters(), lr=0.1), [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        loss: Tensor = model(torch.tensor([[1, 2], [3, 4]])).square().mean()
        opt.backward(loss)
        return loss

    with pytest.raises(ValueError, match=r"SAMSGD: a sparse gradient of \['0.weight'\], must be dense; build the layer"):
        opt.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_every_engine_runs_as_one_rank_without_a_launcher(tmp_path: Path) -> None:
    script = tmp_path / "alone.py"
    script.write_text("""
import sys
sys.path.insert(0, sys.argv[1])
from shapes_worker import Net, trained
for engine in ("ddp", "fsdp2"):
    trained(Net, engine)
print("trained")
""")
    bare = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}
    done = subprocess.run([sys.executable, str(script), str(WORKER.parent)], capture_output=True, text=True, timeout=120,
                          env=bare | ENVIRONMENT)
    assert done.returncode == 0 and "trained" in done.stdout, done.stderr[-3000:]
