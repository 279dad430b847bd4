"""Jobs of the launch of retrieval on ranks that need different numbers of rounds. See worker.py."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from test_retrieval import ask, case, images

from everbatch import compose
from everbatch.distributed import World
from everbatch.nn import AdapterTrunk
from everbatch.train import Trainer
from learning import engine


def rounds_of(path: torch.Tensor) -> torch.Tensor:
    """How many adapters beside the first each row has been under."""
    return torch.tensor([len({task for task in row if task > 0}) for row in path.tolist()])


def on(host: str) -> dict[str, Any]:
    """Each rank's samples need as many rounds as its number; all are as in one process without ranks."""
    world = World.current()
    made, x = case(7, torch.float32), images(64, torch.float32)
    model, archive = made[:2]
    whole = ask(made, x, AdapterTrunk(model, archive))
    mine = torch.nonzero(rounds_of(whole.path) == world.rank).flatten()[: 2 + world.rank]
    trainer: Any = Trainer(
        model, functools.partial(compose(base=torch.optim.SGD), lr=0.1), engine(host, world.size, 1, world.size),
        config=Trainer.Config(batch_size=world.size), device="cpu")
    trainer.module.eval()
    with torch.no_grad():
        before = trainer.module(x[:2])
    trunk = AdapterTrunk(trainer.module, archive)
    found = ask(made, x[mine], trunk, sharded=world)
    with torch.no_grad():
        after = trainer.module(x[:2])
    off = (found.logits - whole.logits[mine]).norm(dim=1) / whole.logits[mine].norm(dim=1)
    trainer.engine.close()
    told = {"rows": len(mine), "passes": trunk.passes, "rounds": found.rounds, "off": off.max().item(),
            "paths": torch.equal(found.path, whole.path[mine]), "as before": torch.equal(before, after)}
    return {key: world.gather(value) for key, value in told.items()}


def jobs(record: Any, *hosts: str) -> Iterator[Any]:
    for host in hosts:
        yield record.noted(host, on, host)
