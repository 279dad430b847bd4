"""Small language models and regressions for tests: uneven rows, padding, batches and rows without a token that counts."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from everbatch import compose
from everbatch.config.deepspeed import deepspeed_config
from everbatch.data import RowSource, Stream, domain_incremental, iid
from everbatch.distributed import World
from everbatch.problems import CausalLM, Regression
from everbatch.train import ConAdv, Trainer

VOCABULARY, LENGTH = 37, 12
LR = 0.5


class Speaker(nn.Module):
    """Ids (n, L) to logits (n, L, V) from a running mean of embeddings: causal, no dropout; `mask` and `as_dict` on request."""

    def __init__(self, width: int = 8, *, as_dict: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.as_dict = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY), as_dict
        self.layers = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Any:
        said = self.embed(input_ids)
        if mask is not None:
            said = said * mask[..., None]
        seen = said.cumsum(1) / torch.arange(1, said.shape[1] + 1)[:, None]
        logits = self.head(self.layers(seen))
        return {"logits": logits, "aux": seen} if self.as_dict else logits


def padded(seed: int, count: int, *, first: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and targets of `first` rows without a token that counts and others of 2 to L tokens, in an order far from even."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (count, LENGTH), generator=g)
    lengths = torch.randint(2, LENGTH + 1, (count,), generator=g)
    lengths[:first] = 1
    gone = torch.arange(LENGTH)[None] >= lengths[:, None]
    return ids.masked_fill(gone, 0), ids.masked_fill(gone, -100)


def source(seed: int, count: int, *, named: bool = False, first: int = 0) -> RowSource:
    ids, targets = padded(seed, count, first=first)
    mask = (ids > 0).float()
    return RowSource({"input_ids": ids, "mask": mask} if named else ids, targets, name=f"rows {seed}")


def stream(*, named: bool = False) -> Stream:
    """Two domains of five steps of eight rows."""
    parts = [source(seed, count, named=named) for seed, count in ((0, 40), (1, 11), (2, 40), (3, 7))]
    return domain_incremental([(parts[0], parts[1]), (parts[2], parts[3])])


def numbers(seed: int, count: int, outputs: int = 1) -> RowSource:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=g)
    y = x @ torch.linspace(-1, 1, 5 * outputs).view(5, outputs) + 0.1 * torch.randn(count, outputs, generator=g) + 0.37
    return RowSource(x, y.squeeze(1) if outputs == 1 else y, name=f"numbers {seed}")


def regression_stream(outputs: int = 1) -> Stream:
    return iid(numbers(0, 64, outputs), numbers(1, 20, outputs))


def engine(host: str, batch: int, accumulation: int, world: int) -> Any:
    if not host.startswith("zero"):
        return host
    return deepspeed_config(None, micro_batch=batch // world // accumulation, accumulation=accumulation, world_size=world,
                            stage=int(host[4]))


def trainer(host: str = "plain", parts: tuple[type, ...] = (), mixins: tuple[type, ...] = (), *, model: nn.Module | None = None,
            problem: Any = None, options: dict[str, Any] | None = None, more: dict[str, Any] | None = None, cls: type = Trainer,
            accumulation: int = 1, epochs: int = 1, momentum: float = 0.9, lr: float = LR, checkpoint_every: int = 0) -> Any:
    """A trainer of the language model, or of what is given."""
    world = World.current() if host != "plain" else World()
    made: Any = compose(*mixins, base=cls) if mixins else cls
    optimizer = functools.partial(compose(*parts, base=torch.optim.SGD), lr=lr, momentum=momentum, **(options or {}))
    return made(model or Speaker(), optimizer, engine(host, 8, accumulation, world.size), device="cpu",
                config=Trainer.Config(batch_size=8, epochs=epochs, accumulation=accumulation, seed=1,
                                      checkpoint_every=checkpoint_every),
                problem=problem or CausalLM(), **(more or {}))


def predictor(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, outputs))


def regressor(parts: tuple[type, ...] = (), mixins: tuple[type, ...] = (), *, outputs: int = 1, problem: Any = None,
              lr: float = 0.05, **given: Any) -> Any:
    return trainer(parts=parts, mixins=mixins, model=predictor(outputs), problem=problem or Regression(), lr=lr, **given)


def attacked(what: str, **attack: Any) -> dict[str, Tensor]:
    """Weights after a run whose batches were attacked two steps ahead."""
    given = {"tau": 2, "patience_s": 60.0, **attack}
    if what == "language":
        given |= {"embedding": "embed", "radius": 0.02}
        t = trainer(mixins=(ConAdv,), more={f"conadv_{name}": value for name, value in given.items()})
    else:
        given |= {"radius": 25.5, "raw_low": -9.0, "raw_high": 9.0}
        t = regressor(mixins=(ConAdv,), more={f"conadv_{name}": value for name, value in given.items()})
    try:
        t.fit(stream() if what == "language" else regression_stream())
        return weights(t)
    finally:
        t.close()


def weights(t: Any) -> dict[str, Tensor]:
    """Masters by name, whole. Collective."""
    host = t.optimizer.host
    return {name: value.clone() for name, value in host.gather(list(host.weights()), host.names).items()}


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((value - other[name]).abs().max()) for name, value in one.items())
