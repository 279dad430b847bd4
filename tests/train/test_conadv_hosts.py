"""ConAdv on every host, with real ranks: same bits wherever crafting runs, same steps on every engine, resumed bitwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from processes import torchrun

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1500)]
WORKER = Path(__file__).parent / "conadv_worker.py"
COMPARED = ("tau 1", "tau 0", "two steps", "clean", "one forward", "accumulation", "Replay", "LARS", "SAM",
            "StaleSAM", "DynamicSparsity", "ClipGradNorm+SAM")
DEFAULT, REST = ("ddp", "zero3"), ("fsdp2", "zero0", "zero1", "zero2")
FEW = ("tau 1", "clean", "one forward", "SAM")
"""What the default launch compares; --wide compares all."""
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Results]:
    """Results of the launch that has a host in it."""
    folder, known = tmp_path_factory.mktemp("conadv"), dict[str, Results]()

    def launch(name: str, ranks: int, *arguments: str) -> Results:
        if name not in known:
            out = folder / f"{name}.json"
            job = torchrun(ranks, WORKER, str(out), str(folder / "store"), *arguments, limit=1200.0)
            assert job.codes == [0], job.err[-3000:]
            known[name] = json.loads(out.read_text())
        return known[name]

    def get(host: str) -> Results:
        wide = host not in ("plain", *DEFAULT)
        launch("plain", 1, "plain")
        return launch("wide", 2, *DEFAULT, *REST, "--wide") if wide else \
            launch("plain", 1, "plain") if host == "plain" else launch("default", 2, *DEFAULT)

    return get


def passes(results: Results, key: str) -> None:
    assert results[key]["passed"], f"{key}: error {results[key]['error']:.3g}: {results[key]['problem']}"


@pytest.mark.parametrize("host", ["plain", *DEFAULT, *(pytest.param(h, marks=pytest.mark.slow) for h in REST)])
def test_every_placement_gives_the_same_bits(found: Callable[[str], Results], host: str) -> None:
    passes(found(host), f"placements/{host}")


@pytest.mark.parametrize("host", ["plain", *DEFAULT, *(pytest.param(h, marks=pytest.mark.slow) for h in REST)])
def test_resumed_with_a_full_queue(found: Callable[[str], Results], host: str) -> None:
    passes(found(host), f"resume inline/{host}")
    if host in DEFAULT:
        passes(found(host), f"resume process/{host}")


@pytest.mark.parametrize("host", ["plain", *DEFAULT, *(pytest.param(h, marks=pytest.mark.slow) for h in REST)])
def test_absent_at_weight_zero(found: Callable[[str], Results], host: str) -> None:
    passes(found(host), f"off/{host}")


@pytest.mark.parametrize("host", ["plain", *DEFAULT, *(pytest.param(h, marks=pytest.mark.slow) for h in REST)])
def test_batch_norms_in_one_forward_are_those_of_two(found: Callable[[str], Results], host: str) -> None:
    passes(found(host), f"batch norm in one forward/{host}")


@pytest.mark.parametrize(("host", "name"), [(h, n) for h in DEFAULT for n in FEW])
def test_steps_of_one_process(found: Callable[[str], Results], host: str, name: str) -> None:
    passes(found(host), f"parity {name}/{host}")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("host", [*DEFAULT, *REST])
def test_steps_of_one_process_in_every_mix(found: Callable[[str], Results], host: str, name: str) -> None:
    passes(found("fsdp2"), f"parity {name}/{host}")
