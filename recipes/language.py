"""A language model that learns one kind of text after the other, with and without rehearsal: manual, docstrings, licences.

python recipes/language.py                                        two layers of Hugging Face's decoder, bytes as tokens; a minute
python recipes/language.py --methods er dark_er_pp --epochs 3
torchrun --nproc-per-node 2 recipes/language.py --engine zero3    plain, ddp, fsdp2, zero0 to zero3: the same numbers

Needs the extra `text`. The texts ship with Python and with what everbatch itself needs, so their wording follows your versions.
"""

from __future__ import annotations

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

import argparse
import functools
import importlib.metadata
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from everbatch import compose
from everbatch.config.deepspeed import deepspeed_config
from everbatch.data import RowSource, Stream, domain_incremental
from everbatch.distributed import init
from everbatch.ends import guard
from everbatch.problems import CausalLM
from everbatch.train import Replay, Schedule, Trainer

LENGTH, BATCH = 96, 16


def texts() -> dict[str, str]:
    """Three kinds of text."""
    files = [Path(str(file.locate())) for name in ("torch", "numpy") for file in importlib.metadata.files(name) or ()
             if "licenses" in str(file)]
    docs = [value.__doc__ for _, value in sorted(vars(torch).items()) if callable(value) and isinstance(value.__doc__, str)]
    return {"manual": "\n\n".join(pydoc_data.topics.topics.values()), "docstrings": "\n\n".join(docs),
            "licences": "\n\n".join(dict.fromkeys(file.read_text("utf-8", "replace") for file in files))}


def rows(name: str, text: str, count: int) -> tuple[RowSource, RowSource]:
    """Paragraphs of the text, one after the other, as rows of up to LENGTH bytes; every ninth is for testing."""
    lines = [" ".join(part.split()).encode()[:LENGTH] for part in text.split("\n\n")]
    lines = [line for line in dict.fromkeys(lines) if len(line) > 20][:count]  # licences repeat each other
    ids = torch.stack([torch.tensor(list(line) + [0] * (LENGTH - len(line))) for line in lines])
    targets = ids.masked_fill(ids == 0, -100)  # what only fills a row up does not count
    test = torch.arange(len(ids)) % 9 == 8
    return (RowSource(ids[~test], targets=targets[~test], name=name), RowSource(ids[test], targets=targets[test], name=name))


def decoder() -> nn.Module:
    """Two layers, from a configuration: nothing is downloaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made: nn.Module = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, use_cache=False))
    return made


def trained(method: str, stream: Stream, options: argparse.Namespace, ranks: int) -> Trainer:
    """A trainer at the end of the stream."""
    engine: Any = options.engine
    if engine.startswith("zero"):
        engine = deepspeed_config(None, micro_batch=BATCH // ranks, world_size=ranks, stage=int(engine[4:]))
    optimizer = functools.partial(compose(base=torch.optim.AdamW), lr=3e-3, weight_decay=0.0)
    config = Trainer.Config(batch_size=BATCH, epochs=options.epochs, schedule=Schedule(kind="cosine"))
    if method == "none":
        trainer = Trainer(decoder(), optimizer, engine, config=config, problem=CausalLM())
    else:
        memory = Replay.Config(method=method, capacity=200, replay_batch=BATCH)  # type: ignore[arg-type]
        learner: Any = compose(Replay, base=Trainer)
        trainer = learner(decoder(), optimizer, engine, config=config, problem=CausalLM(), **vars(memory))
    trainer.fit(stream)
    return trainer


def main() -> None:
    """Train with each method from the same weights, and print what each then makes of every text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["none", "er"], choices=["none", "er", "dark_er", "dark_er_pp"])
    parser.add_argument("--engine", default="plain")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1000, help="of each text")
    options = parser.parse_args()
    world = init()
    stream = domain_incremental([rows(name, text, options.rows) for name, text in texts().items()])
    for method in options.methods:
        found = trained(method, stream, options, world.size).scores
        for k, after in enumerate(found if world.rank == 0 else ()):
            shown = "   ".join(f"{stream.tasks[j].name} {scores['perplexity']:.4f}" for j, scores in enumerate(after))
            print(f"{method:<10} after {stream.tasks[k].name:<10} perplexity   {shown}", flush=True)


if __name__ == "__main__":
    with guard("language"):
        main()
