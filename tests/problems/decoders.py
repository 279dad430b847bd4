"""A decoder of Hugging Face on rows of unequal numbers of tokens, with each method, on any engine."""

from __future__ import annotations

from typing import Any

import texts
import torch

from everbatch.data import Loader, domain_incremental
from everbatch.evaluate.evaluator import scores
from everbatch.optim import EMA, EWC, SAM
from everbatch.problems import CausalLM
from everbatch.train import ConAdv, Replay

STEPS = 5
REPLAY = {"replay_capacity": 12, "replay_replay_batch": 6}
CASES: dict[str, tuple[tuple[type, ...], tuple[type, ...], dict[str, Any], dict[str, Any]]] = {
    "bare": ((), (), {}, {}), "lonely": ((), (), {}, {}), "sam": ((SAM, EMA), (), {}, {}),
    "er": ((SAM,), (Replay,), {}, {**REPLAY, "replay_method": "er"}), "der": ((SAM,), (Replay,), {}, REPLAY),
    "ewc": ((EWC,), (), {"ewc_strength": 0.05}, {}),
    "conadv": ((), (ConAdv,), {}, {"conadv_embedding": "model.embed_tokens", "conadv_radius": 0.01}),
}


class PerRank(CausalLM):
    """The trap: each rank takes the mean over its own tokens."""

    in_units = False

    def losses(self, outputs: Any, targets: Any) -> Any:
        return super().losses(outputs, targets) * len(targets) / self.units(targets).sum().clamp(min=1)


def llama() -> torch.nn.Module:
    """Two layers of Hugging Face's decoder, from a configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(  # type: ignore[no-any-return]
        vocab_size=texts.VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=texts.LENGTH, use_cache=False, attn_implementation="eager"))


def stream(case: str = "bare") -> Any:
    """Ranks get rows of very different lengths, some without a token that counts. lonely: of eight rows in each batch one alone
    has any, so that one of two ranks has none."""
    if case == "lonely":
        return domain_incremental([(texts.source(seed, 8, first=7), texts.source(9, 5)) for seed in range(5)])
    return domain_incremental([(texts.source(0, 40, first=5), texts.source(1, 11)), (texts.source(2, 40), texts.source(3, 7))])


def trained(host: str, case: str, *, steps: int, accumulation: int = 1, problem: Any = None) -> Any:
    parts, mixins, options, more = CASES[case]
    t = texts.trainer(host, parts, mixins, model=llama(), options=options, more=more, accumulation=accumulation, lr=0.1,
                      problem=problem)
    if steps > STEPS or case == "lonely":
        t.fit(stream(case))
        return t
    data = stream()
    t.run.stream = data
    t.run.loader = loader = Loader(data, data.tasks[0], 8, 1, 1, t.world)
    t.run.begin_task(loader)
    t.on_task_start(data.tasks[0])
    while t.step < steps and t.run.fetched(1):
        t.training_step(t.run.ahead.popleft())
        t.run.task_step += 1
    return t


def result(t: Any) -> dict[str, Any]:
    """Weights, and all scores of both tasks. Collective."""
    data = stream()
    found = scores(t, data, 1, list(data.tasks))
    assert found is not None
    return {"weights": texts.weights(t), "scores": found, "steps": t.step}


def steps_of(case: str) -> int:
    """Whole runs where something happens at a task's end or after a memory has filled; else five steps."""
    return 2 * STEPS if case in ("ewc", "der") else STEPS
