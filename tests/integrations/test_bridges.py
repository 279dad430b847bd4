"""SAM + ClipGradNorm + EMA in other trainers on two ranks: the weights of a loop of our own, and of a run that was never cut."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from processes import ROOT, Zygote

MISSING = [name for name in ("deepspeed", "transformers", "lightning") if importlib.util.find_spec(name) is None]
# Not importorskip: every process that collects tests would import them, and with them a window toolkit.
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300), pytest.mark.skipif(bool(MISSING), reason=f"no {MISSING}")]
SAME = ("update/transformers", "resume/transformers", "update/lightning", "resume/lightning", "update/fabric",
        "update/accelerate")
REFUSED = {
    "transformers, no mixins": "optimizer SGD, must be composed of mixins",
    "transformers, no optimizer": "optimizer NoneType, must be composed of mixins; optimizers=(Opt(model, ...), None)",
    "transformers, clips as well": "ClosureTrainer: max_grad_norm=1.0, must be 0; clip with ClipGradNorm",
    "transformers, second objective": "Ignite needs opt.step(closure, output=...)",
    "lightning, no mixins": "SGD, must be composed of mixins; return one Opt(self, ...) from configure_optimizers",
    "lightning, plateau": "scheduler ReduceLROnPlateau, must be one that needs no metric",
    "lightning, automatic": "run all micro-batches inside the closure (opt.micro_batches)",
}


@pytest.fixture(scope="module")
def found(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one launch on two ranks measured."""
    folder = tmp_path_factory.mktemp("bridges")
    return zygote.found(Path(__file__).parent / "bridges.py", folder / "out.json", str(folder), limit=240.0)


@pytest.mark.parametrize("key", SAME)
def test_the_same_bits(found: dict[str, Any], key: str) -> None:
    assert found[key] == 0.0


def test_on_an_engine_that_accelerate_prepared(found: dict[str, Any]) -> None:
    """Partitioned sums run in another order."""
    assert found["update/accelerate on ZeRO-2"] <= 1e-6


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_work_says_so(found: dict[str, Any], key: str) -> None:
    assert REFUSED[key] in found[f"refused/{key}"]


@pytest.mark.parametrize("name", ["transformers", "lightning"])
def test_a_bridge_is_short(name: str) -> None:
    lines = (ROOT / "lib" / "everbatch" / "integrations" / f"{name}.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) < 60
