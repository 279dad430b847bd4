"""A decoder of Hugging Face on two ranks of every engine takes the steps that one rank takes, whoever holds how many tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import result, steps_of, trained

from needs import needs
from processes import Zygote
from rotation import ROUND, When

needs("transformers")

JOBS = Path(__file__).parent / "problems_worker.py"
DUE = {"ddp/bare/1": When(), "ddp/trap/1": When(), "ddp/lonely/1": When(), "ddp/bare/2": When(0, 2), "ddp/bare/4": When(1, 2),
       "zero2/bare/1": When(), "zero3/bare/1": When(0, 2), "fsdp2/bare/1": When(1, 2),
       "zero2/sam/2": When(0, 4), "ddp/er/2": When(1, 4), "zero2/der/1": When(2, 4), "ddp/ewc/1": When(3, 4),
       "zero2/conadv/1": When(slow=True), "fsdp2/der/1": When(slow=True), "zero3/er/2": When(slow=True),
       "zero2/ewc/1": When(slow=True), "ddp/conadv/2": When(slow=True)}
"""Engine, case, micro-batches; those that are due in a round share one launch."""
RESUMED = {"ddp/resume/1": When(0, 3), "zero2/resume/1": When(1, 3), "fsdp2/resume/1": When(2, 3)}
ALL = DUE | RESUMED


@pytest.fixture(scope="module")
def found(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    results: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in results:
            wanted = [name] if ALL[name].slow else [key for key, when in ALL.items() if when.due(ROUND) and not when.slow]
            folder = tmp_path_factory.mktemp("problems")
            for case in {key.split("/")[1] for key in wanted} - {"trap", "resume"}:
                one = result(trained("plain", case, steps=steps_of(case)))
                torch.save(one, folder / f"{case}.pt")
            results.update(zygote.found(JOBS, folder / "found.json", str(folder), *wanted, ranks=2, limit=240))
        return results[name]

    return get


@pytest.mark.distributed
@pytest.mark.parametrize("name", [when.param(name) for name, when in DUE.items()])
def test_two_ranks_are_one(name: str, found: Callable[[str], Any]) -> None:
    got = found(name)
    assert isinstance(got, dict), got
    assert got["ranks"] == 2 and got["steps"][0] == got["steps"][1]
    assert got["names"] == ["token_accuracy", "token_loss", "perplexity"]
    if "/trap/" in name:
        assert got["far"] > 1e-4, "means by rank must be seen to be wrong"
    else:
        assert got["far"] <= 1e-6 and got["scores"] <= 1e-3, got


@pytest.mark.distributed
@pytest.mark.parametrize("name", [when.param(name) for name, when in RESUMED.items()])
def test_a_run_with_named_rows_in_its_memory_resumes_bit_for_bit(name: str, found: Callable[[str], Any]) -> None:
    got = found(name)
    assert got == {"same": [True, True], "names": ["rows/raw/input_ids", "rows/raw/mask"], "step": 10}, got
