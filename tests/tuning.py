"""Small pairs, searches without Ray, and what tries to reach evaluation data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everbatch.tune.ledger import Ledger
from everbatch.tune.pair import ScenarioPair, prepare
from everbatch.tune.plan import Plan, SearchOptions
from everbatch.tune.record import freeze
from everbatch.tune.seal import Seal
from everbatch.tune.search import body_of
from processes import ROOT

Score = Callable[[str, dict[str, Any], int], float | None]
"""(method, drawn values, order) to an accuracy; None is a failure."""


def images(seed: int, classes: int = 4, each: int = 12) -> tuple[NDArray[Any], NDArray[Any]]:
    """Grey 8 x 8 images, bright in a corner of each class's own."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    x = rng.integers(0, 60, (len(labels), 8, 8), dtype=np.uint8)
    for row, label in zip(x, labels, strict=True):
        top, left = divmod(int(label) * 2 + seed % 2, 4)
        row[2 * top:2 * top + 2, 2 * left:2 * left + 2] += 180
    return x, labels


def write(path: Path, seed: int, *, share: int = 0, of: int = 1) -> Path:
    """An .npz with a training and a test part; `share` of its training samples are those of seed `of`."""
    x, y = images(seed)
    x[:share] = images(of)[0][:share]
    tests = images(seed + 1000, each=6)
    names = np.array([f"{'ab'[seed % 2]}{label}" for label in range(4)])
    np.savez(path, x_train=x, y_train=y, x_test=tests[0], y_test=tests[1], classes=names)
    return path


def pair(folder: Path, **more: Any) -> ScenarioPair:
    """Two files with four classes each, two tasks, two orders to tune on and three to be judged on."""
    scenario = {"replay.capacity": 8, "trainer.epochs": 2, "trainer.batch_size": 8, "engine.kind": "plain", "data.mean": 0.2}
    sides = {"tuning": str(write(folder / "here.npz", 0)), "evaluation": str(write(folder / "there.npz", 1))}
    return ScenarioPair(**{**sides, "increments": (2, 2), "orders": 2, "evaluation_orders": 3, "scenario": scenario, **more})


def prepared(folder: Path, **more: Any) -> Path:
    """A prepared pair in `folder`/run."""
    prepare(pair(folder, **more), str(folder / "run"))
    return folder / "run"


def fill(trials: list[Any], score: Score) -> None:
    """Units of trials, with scores from a function."""
    for trial in trials:
        for order, key in trial.units:
            value = score(trial.method, trial.options[2], order)
            failed = {"failed": "diverged", "cause": "nan"}
            outcome = failed if value is None else {"avg_acc": value, "acc": value, "accuracies": [value]}
            about = {"key": key, "options": {}, "order": order, "seconds": 1.0, "cpu_seconds": 1.0}
            Ledger(trial.ledger).write({**about, **outcome})
            if value is None:
                break


def by_rate(method: str, values: dict[str, Any], order: int) -> float:
    """Best at the highest learning rate."""
    return round(0.5 + 4 * values.get("optimizer.lr", 0.0) + order / 1000, 6)


def recorded(run: Path, score: Score = by_rate, *, kind: str = "two-phase", **options: Any) -> Path:
    """A frozen record of a search without Ray, in which a stream's score is that of a function."""
    seal = Seal.read(run / "tuning" / "seal.json").body
    search = SearchOptions(**{"methods": ("er",), "trials": 5, **options})
    plan = Plan(search, seal["scenario"], seal["increments"], seal["orders"], str(run / "tuning" / "data.npz"),
                seal["data_sha256"], run / "search")
    plan.run(lambda trials: fill(trials, score))
    body = {**body_of(plan, kind), "commitment": seal["commitment"], "evaluation_orders": seal["evaluation_orders"], "flags": [],
            "frozen": 1.0}
    path = run / "search" / "record.json"
    freeze(body, path)
    return path


def command(*words: str, limit: float = 300.0, **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m everbatch.tune` on this checkout, without Ray's token in the home folder."""
    whole = {**os.environ, "PYTHONPATH": str(ROOT / "lib"), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, "-m", "everbatch.tune", *words], text=True, capture_output=True, timeout=limit,
                          env=whole, cwd=ROOT)


def reload(path: Path) -> dict[str, Any]:
    """A JSON file."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


ATTACKS = r"""
import json, os, pathlib, pickle, shutil, subprocess, sys
import numpy as np, torch
from PIL import Image
tuning, place, plain = sys.argv[1:4]
os.symlink(place, tuning + "/link")
os.link(place + "/data.sealed", tuning + "/hard")
shutil.copy(place + "/data.sealed", tuning + "/copy")
parent = os.open(os.path.dirname(place), os.O_RDONLY)
from everbatch.tune.seal import LeakageError, Seal, guard
from everbatch.tune.check import check_npz
guard(Seal.read(tuning + "/seal.json"))
os.chdir(tuning)
target, base = place + "/data.sealed", os.path.basename(place)
def torchvision():
    from torchvision.io import read_file
    return bytes(read_file(target).numpy())
tries = {
    "open": lambda: open(target, "rb").read(),
    "os.open": lambda: os.open(target, os.O_RDONLY),
    "pathlib": lambda: pathlib.Path(target).read_bytes(),
    "np.load": lambda: np.load(target),
    "np.memmap": lambda: np.memmap(target, mode="r"),
    "np.fromfile": lambda: np.fromfile(target, "u1"),
    "torch.load": lambda: torch.load(target),
    "PIL": lambda: Image.open(target),
    "listdir": lambda: os.listdir(place),
    "scandir": lambda: list(os.scandir(place)),
    "relative": lambda: open(f"../{base}/../{base}/data.sealed", "rb").read(),
    "chdir": lambda: os.chdir(place),
    "symlink": lambda: open("link/data.sealed", "rb").read(),
    "link now": lambda: os.link(target, "later"),
    "move": lambda: os.rename(target, "moved"),
    "nonce": lambda: open(place + "/nonce").read(),
    "original": lambda: np.load(plain),
    "torchvision": torchvision,
    "child": lambda: subprocess.check_output(["cat", target]),
    "dir_fd": lambda: os.read(os.open(base + "/data.sealed", os.O_RDONLY, dir_fd=parent), 10**7),
    "hard link": lambda: open("hard", "rb").read(),
    "copy": lambda: open("copy", "rb").read(),
}
found = {}
for name, act in tries.items():
    try:
        got = act()
        found[name] = "read " + got.hex() if isinstance(got, bytes) else "read"
    except LeakageError as error:
        found[name] = f"refused: {error}"
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""
"""A process of the tuning phase that knows where the evaluation data is, and tries to read it."""
