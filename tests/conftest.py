"""What all tests share: one process with everything imported, from which jobs of several ranks are forked, and the rotation."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from processes import Zygote
from rotation import Rotation

LONGEST = ("distributed/test_runs.py", "contract/test_contract.py", "tune/test_tune_deaths.py", "tune/test_two_nodes.py",
           "distributed/test_recipes_on_engines.py", "test_recipe.py", "train/test_conadv_hosts.py", "test_interrupt.py",
           "distributed/test_agreement.py", "distributed/test_growth.py", "tune/test_tune_search.py",
           "train/test_conadv_ranks.py", "contract/test_trainers.py", "optim/test_sparsity_hosts.py", "test_contributing.py",
           "test_large_batch.py")
"""Files that run first, the longest before all: two files beside each other then end together."""
torch.set_num_threads(1)  # small tensors: more threads only fight, with each other and with the ranks of jobs


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Weights that a test does not seed itself are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("jobs"))
    yield zygote
    zygote.close()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Rotation(config), "everbatch rotation")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """What was imported stays, and every full collection in a test would walk it: most of a second where timm is there."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add the time of every test to the file from which launch/test.sh tells the slowest of all its parts."""
    path = os.environ.get("EVERBATCH_DURATIONS")
    if path and "PYTEST_XDIST_WORKER" not in os.environ:  # the process that hears of all tests
        with open(path, "a") as file:
            file.write(f"{report.duration:.2f} {report.when} {report.nodeid}\n")
