"""SAME on one engine: old tokens' routing stays in the space of updates, not in that of gradients; sums of two ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from record import Job, Record
from torch import Tensor, nn

import learning
from everbatch import compose
from everbatch.distributed import World
from everbatch.errors import UnsupportedHost
from everbatch.train import SAME, Trainer


class Learner(SAME, Trainer):
    """Experts."""


PER_TASK = 12
"""Steps: 96 rows that a layer of 160 inputs has seen when the second task begins."""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 160), nn.Tanh(), nn.Linear(160, 12), nn.Tanh(), nn.Linear(12, 6))


def learner(host: str, folder: Path | None = None, leave: int = -1, *, model: nn.Module | None = None, **options: Any) -> Any:
    """Two layers with experts, whose old inputs leave free directions; every direction of them is protected."""
    ranks = World.current().size if host != "plain" else 1
    optimizer = functools.partial(compose(base=torch.optim.AdamW), lr=0.01, weight_decay=0.1)
    chosen: dict[str, Any] = {"layers": ("1", "3"), "trained": ("5.*",), "router": "null", "delta": 1.0, "tau": -1.0,
                              "statistics": "float64", "min_free": 1, **options}
    config = Trainer.Config(batch_size=8, epochs=3, seed=3, checkpoint_every=5)
    return Learner(model or net(), optimizer, learning.engine(host, 8, 1, ranks), config=config, prepare=learning.scale,
                   device="cpu", folder=None if folder is None else folder / "checkpoints",
                   recorder=None if folder is None else learning.recorder(folder, leave), **chosen)


def moved(made: Any) -> float:
    """By how much router logits of the first task's tokens changed in the second task."""
    return float(made.states[SAME].log[1]["drift"]["0"]["logits"])


def held(made: Any) -> dict[str, Tensor]:
    """What it keeps of tasks that ended."""
    return {**made.states[SAME].history, **made.states[SAME].probes}


def null(record: Record, store: Path, host: str) -> None:
    """HOST: the promise, and that this check would see it broken; statistics; a run left in the second task and resumed."""
    folder = store / f"{host}-{World.current().size}"
    made = learner(host, folder / "whole")
    made.fit(learning.stream())
    made.recorder.close()
    with record.check(f"null/{host}", 1e-6) as found:
        found.measure(moved(made))
    with record.check(f"moments/{host}", 1e-6) as found:
        mine = {key: value for key, value in held(made).items() if key.endswith(("0/second", "1/second", "3/second"))}
        if host == "plain":
            torch.save(mine, store / "plain.pt")
        one = torch.load(store / "plain.pt", weights_only=True)
        found.require(one.keys() == mine.keys() and len(one) == 2, f"{sorted(one)}")
        apart = {key: float((value - mine[key]).norm() / value.norm()) for key, value in one.items()}
        found.measure(apart["1/second"])
        # The second layer's inputs follow from the first one's weights, which Adam moves by rounding.
        found.require(apart["3/second"] < 1e-5, f"the second layer's differ by {apart['3/second']:.3g}")
    with record.check(f"gradients/{host}") as found:
        other = learner(host, space="grad")
        other.fit(learning.stream())
        found.require(moved(other) > 0.05, f"only {moved(other):.3g} in the space of gradients")
    with record.check(f"resume/{host}") as found:
        left = learner(host, folder / "left", PER_TASK + 7)
        try:
            left.fit(learning.stream())
        except learning.Abandoned:
            pass
        again = learner(host, folder / "left")
        again.fit(learning.stream(), resume=True)
        again.recorder.close()
        found.require(again.step == made.step == 3 * PER_TASK, f"{again.step} steps")
        found.same_bits(learning.everything(again) | held(again), learning.everything(made) | held(made), "resumed")


def moe(record: Record, store: Path, host: str) -> None:
    """HOST: DeepSpeed's own mixture of experts is refused by name, with and without SAME."""
    from deepspeed.moe.layer import MoE

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 8)
            self.moe = MoE(hidden_size=8, expert=nn.Linear(8, 8), num_experts=2, ep_size=1)
            self.head = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.moe(self.fc(x.flatten(1)))[0])  # type: ignore[no-any-return]

    with record.check(f"moe/{host}") as found:
        for words, layers in (("SAME: 'moe', a MoE of DeepSpeed's", ("fc",)), ("DeepSpeed: 'moe', a MoE of DeepSpeed's", ())):
            try:
                learner(host, model=Mixed(), layers=layers, trained=())
                found.require(False, f"nothing was refused: {words}")
            except UnsupportedHost as error:
                found.require(words in str(error), str(error))


def jobs(record: Record, store: str, *names: str) -> Iterator[Job]:
    """STORE NAME:HOST ...: functions of this module."""
    for name in names:
        job, _, argument = name.partition(":")
        yield name, functools.partial(globals()[job], record, Path(store), argument)
