"""SAME: what it sums up, who rests, what it promises, and what it refuses."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import learning
from everbatch import compose
from everbatch.data import RowSource, class_incremental
from everbatch.distributed import World
from everbatch.errors import CompositionError
from everbatch.nn import UnknownTarget
from everbatch.optim import EMA, SAM, ClipGradNorm, SubspaceProjection
from everbatch.optim.subspace.splits import NoFreeSubspace, NonFiniteStatistics
from everbatch.train import MOS, SAME, Trainer, load_model, model_info
from everbatch.train.same.freezing import resting
from everbatch.train.same.moments import TaskSums, draw_of, reduced
from everbatch.train.same.options import SAMEOptions
from everbatch.train.same.rules import sketched
from needs import needs
from processes import Zygote
from rotation import When

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "contract")]

import same_jobs  # noqa: E402
from same_jobs import Learner, learner, net  # noqa: E402


def sums_of(*batches: tuple[Tensor, Tensor | None], draw: Tensor | None = None) -> Any:
    """What one layer of 6 inputs and 2 experts has seen."""
    held = TaskSums(World())
    held.begin("a", 6, 2, probes=3, draw=draw, dtype=torch.float64, device=torch.device("cpu"))
    for x, mask in batches:
        held.add("a", x, mask)
        held.weigh("a", x, torch.stack([x.new_full(x.shape[:-1], 0.25), x.new_full(x.shape[:-1], 0.75)], -1), mask)
    return held


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_sums_leave_out_padding_and_what_is_not_finite() -> None:
    x, mask = drawn(2, 200, 6), torch.ones(2, 200)
    mask[0, 3:9] = 0
    x[0, 4], x[1, 7] = float("nan"), float("inf")
    good = x[(mask > 0) & x.isfinite().all(-1)]
    found = reduced(sums_of((x, mask)).layers["a"], World(), name="a", task=0)
    torch.testing.assert_close(found["second"], good.T @ good, rtol=1e-12, atol=1e-12)
    assert found["numbers"].tolist() == pytest.approx([393, float(good.square().sum()), 1, 393])
    torch.testing.assert_close(found["load"], 393 * torch.tensor([0.25, 0.75], dtype=torch.float64))
    torch.testing.assert_close(found["importance"], float(good.square().sum()) * torch.tensor([0.25, 0.75], dtype=torch.float64))
    x[1, :9] = float("nan")
    with pytest.raises(NonFiniteStatistics, match=r"SAME: layer 'a', task 2: 9 of 394 inputs are not finite"):
        reduced(sums_of((x, mask)).layers["a"], World(), name="a", task=2)
    with pytest.raises(ValueError, match=r"a mask of shape \(2, 199\)"):
        sums_of((x, mask[:, 1:]))


def test_sums_of_other_ranks_go_into_a_checkpoint_and_add_up_at_another_number_of_ranks() -> None:
    one, two = sums_of((drawn(5, 6), None)), sums_of((drawn(7, 6, seed=1), None))
    parts = [held.state_dict() for held in (one, two)]
    assert parts[0]["rows"].keys() == {f"a/{key}" for key in ("second", "numbers", "load", "importance", "inputs")}
    both = {"index": {"slots": [0, 1]}, "start": 0, "rows": {
        key: torch.cat([part["rows"][key] for part in parts]) for key in parts[0]["rows"]}}
    for rank, whole in enumerate((one, two)):
        again = TaskSums(World(rank, 2))
        again.load_state_dict(both)
        assert all(torch.equal(value, whole.layers["a"][key]) for key, value in again.layers["a"].items())
    alone, third = TaskSums(World()), TaskSums(World(2, 3))
    alone.load_state_dict(both)
    third.load_state_dict(both)
    torch.testing.assert_close(alone.layers["a"]["second"], one.layers["a"]["second"] + two.layers["a"]["second"])
    assert not third.layers["a"]["second"].any() and third.layers["a"]["numbers"].tolist() == [0, 0, 0, 0]


def test_a_sketch_is_exact_to_its_rank_and_knows_what_it_leaves_out() -> None:
    assert draw_of(1024, 128, "a", 0) is None
    draw = draw_of(1025, 128, "a", 0)
    assert draw is not None and draw.shape == (1025, 256)
    basis = torch.linalg.qr(drawn(40, 5)).Q
    x = drawn(300, 5, seed=1) * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]) @ basis.T
    c = x.T @ x / len(x)
    config = SAMEOptions(delta=1.0, wide_rank=5)
    split = sketched(c @ drawn(40, 10, seed=2), drawn(40, 10, seed=2), config, float(c.trace()))
    values, vectors = torch.linalg.eigh(c)
    torch.testing.assert_close(split.values, values[-5:].flip(0), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(split.basis @ split.basis.T, vectors[:, -5:] @ vectors[:, -5:].T, rtol=0.0, atol=1e-5)
    noisy = c + 0.05 * torch.eye(40, dtype=torch.float64)
    split = sketched(noisy @ drawn(40, 10, seed=2), drawn(40, 10, seed=2), config, float(noisy.trace()))
    exact = float(torch.linalg.eigvalsh(noisy)[-5:].sum() / noisy.trace())
    assert split.rank == 5 and exact - 0.03 < split.share <= exact < 0.98  # it keeps less, never more, than the best five


def test_who_rests() -> None:
    use, past = torch.tensor([[0.5, 0.1, 0.4], [0.3, 0.3, 0.4]]), torch.tensor([[9.0, 1.0, 5.0], [1.0, 2.0, 1.0]])
    # Scores: 1 - 1, 0 - 0, 0.75 - 0.5; 0 - 0, 0 - 1, 1 - 0.
    assert resting(use, past, 0.1, 1).tolist() == [[True, True, False], [True, True, False]]
    assert resting(use, past, -0.5, 1).tolist() == [[False, False, False], [False, True, False]]
    assert resting(use, past, 1.0, 2).sum(1).tolist() == [1, 1]
    assert resting(torch.full((1, 4), 0.25), torch.ones(1, 4), 0.1, 1).sum() == 3  # all alike: all but one


class Recomputed(nn.Module):
    """Its first part runs again in the backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = net(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        first: Any = checkpoint(self.net[:4], x.requires_grad_(), use_reentrant=self.reentrant)  # type: ignore[index]
        return self.net[4:](first)  # type: ignore[index, no-any-return]


WAYS: dict[str, Callable[[], tuple[nn.Module, tuple[type, ...], int]]] = {
    "plain": lambda: (net(), (), 1), "recomputed": lambda: (Recomputed(False), (), 1), "sam": lambda: (net(), (SAM,), 1),
    "reentrant": lambda: (Recomputed(True), (), 1), "micro": lambda: (net(), (), 2)}


@pytest.mark.parametrize("way", [When(place, len(WAYS)).param(way) for place, way in enumerate(WAYS)])
def test_tokens_count_once(way: str) -> None:
    """Under activation checkpointing, with a second pass in a step, in micro-batches, and beside evaluations."""
    model, parts, micros = WAYS[way]()
    start = "net." if isinstance(model, Recomputed) else ""
    made: Any = Learner(
        model, functools.partial(compose(*parts, base=torch.optim.SGD), lr=0.01), num_tasks=3, prepare=learning.scale,
        config=Trainer.Config(batch_size=8, accumulation=micros), device="cpu", layers=(f"{start}1",), trained=(f"{start}5.*",),
        statistics="float64")
    made.fit(learning.stream())
    history = made.states[SAME].history
    assert history[f"{start}1/numbers"].tolist()[0::2] == [96, 0]
    images = torch.cat([learning.stream().fetch(task.train_ids) for task in learning.stream().tasks])
    rows = learning.scale(images).flatten(1).double()
    torch.testing.assert_close(history[f"{start}1/second"], rows.T @ rows, rtol=1e-6, atol=1e-6)


class Tokens(nn.Module):
    """Means over the tokens that are no padding."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, classes)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        y = self.fc(x).tanh() * attention_mask[..., None]
        return self.head(y.sum(1) / attention_mask.sum(1, keepdim=True))  # type: ignore[no-any-return]


def test_padding_of_named_inputs_is_left_out() -> None:
    x, mask = drawn(16, 5, 6).float(), torch.ones(16, 5)
    mask[::2, 3:] = 0
    source = RowSource({"x": x, "attention_mask": mask}, labels=torch.arange(16) % 4)
    made: Any = Learner(Tokens(), functools.partial(compose(base=torch.optim.SGD), lr=0.01), layers=("fc",), device="cpu",
                        config=Trainer.Config(batch_size=8, epochs=1), statistics="float64", router="null", probes=40)
    made.fit(class_incremental(source, source, tasks=2))
    rows, history = x[mask > 0].double(), made.states[SAME].history
    assert history["fc/numbers"].tolist() == pytest.approx([64, float(rows.square().sum()), 0, 64])
    torch.testing.assert_close(history["fc/second"], rows.T @ rows)
    kept = torch.cat([made.states[SAME].probes[f"fc/{task}/inputs"] for task in (0, 1)])
    assert len(kept) == 64 and all(bool((rows == row).all(1).any()) for row in kept)


@pytest.mark.parametrize("blind", [False, True], ids=["first task", "no token"])
def test_that_nothing_is_protected_is_logged_once(caplog: pytest.LogCaptureFixture, blind: bool) -> None:
    """Before the first task ends, where it is as it must be; and a warning where the mask has left out every token."""
    x, mask = drawn(24, 5, 6).float(), torch.ones(24, 5)
    source = RowSource({"x": x, "attention_mask": mask}, labels=torch.arange(24) % 6)
    made: Any = Learner(Tokens(6), functools.partial(compose(base=torch.optim.SGD), lr=0.01), layers=("fc",), device="cpu",
                        config=Trainer.Config(batch_size=4, epochs=1), statistics="float64", router="null")
    made._same.watch._mask_of = (lambda _x: torch.zeros(4, 5)) if blind else made._same.watch._mask_of
    with caplog.at_level("INFO", logger="everbatch"):
        made.fit(class_incremental(source, source, tasks=3))
    said = [(r.levelname, r.getMessage()) for r in caplog.records if "SAME" in r.getMessage()]
    assert said[0] == ("INFO", "SAME: before task 0, no task has ended: the maps of 1 layers are the identity")
    assert [level for level, _ in said[1:]] == ["WARNING"] * blind
    assert not blind or "before task 1, no training token of an ended task has reached layers ['fc']" in said[1][1]
    assert bool(made.optimizer.projections) is not blind


@pytest.mark.parametrize("action", [When(place, 2).param(action) for place, action in enumerate(("grad", "mask"))])
def test_a_resting_expert_keeps_its_bits_for_the_task_and_all_learn_again(action: str) -> None:
    """Under AdamW with decay, whose momentum would move it."""
    made = learner("plain", tau=1.0, min_active=1, warmup_tokens=1, action=action, experts=3)
    steps: list[tuple[int, dict[str, Tensor], tuple[int, ...]]] = []

    def watched(batch: Any, inner: Any = made.training_step, made: Any = made, steps: Any = steps) -> Any:
        layer = made.module[1]
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        record = inner(batch)
        steps.append((made.task_index, before, layer.frozen))
        return record

    made.training_step = watched
    made.fit(learning.stream())
    first = [frozen for task, _, frozen in steps if task == 0]
    assert set(first) == {()} and made.module[1].frozen == () and not made.module[1].masked
    for task in (1, 2):
        inside = [(before, frozen) for index, before, frozen in steps if index == task]
        frozen = inside[1][1]
        assert len(frozen) == 2 and all(other == frozen for _, other in inside[1:])
        # Decided after the first step: from the second on nothing of them moves, and the third expert does.
        for i in range(3):
            same = torch.equal(inside[1][0][f"down_{i}"], inside[-1][0][f"down_{i}"])
            assert same == (i in frozen), (action, task, i)
    assert [sorted(row["resting"]) for row in made.states[SAME].log] == [[], ["1", "3"], ["1", "3"]]


@pytest.mark.rotated(1, 6)
def test_the_promise_of_each_rule() -> None:
    """null keeps old routing, soft moves it less than no rule does, and the printed rule does not protect it."""
    drift = {}
    for router in ("null", "soft", "paper", "free"):
        made = learner("plain", router=router, refresh=3, start_step=2)
        made.fit(learning.stream())
        drift[router] = made.states[SAME].log[1]["drift"]["0"]
        assert ("router" in str(made.describe())) and made.report() is not None
    assert drift["null"]["variation"] < 1e-6 and drift["soft"]["variation"] < 0.3 * drift["free"]["variation"]
    assert drift["paper"]["variation"] > 0.5 * drift["free"]["variation"]
    assert drift["null"]["overlap"] == 1.0


@pytest.mark.rotated(4, 6)
def test_the_released_code_leaves_one_expert_per_task(tmp_path: Path) -> None:
    """For comparison: routing by batch, masks that latch, and a run that goes on bit for bit inside a task."""
    options: dict[str, Any] = {"released": True, "space": "grad", "tau": 0.1, "experts": 3}
    made = learner("plain", tmp_path / "whole", **options)
    made.fit(learning.stream())
    state = made.states[SAME]
    assert made.module[1].routing == "batch" and "nothing is promised" in made.describe()
    assert [row["resting"]["1"] for row in state.log] == [[1, 2], [0, 2], [0, 1]]
    maps = made.optimizer.projections
    assert {f"1.down_{i}" for i in range(3)} | {"1.router"} <= set(maps)
    assert maps["1.down_0"].right.rest == pytest.approx(1 / 0.9) and 0.8 <= float(maps["1.router"].right.scale.min()) <= 1
    left = learner("plain", tmp_path / "left", same_jobs.PER_TASK + 7, **options)
    with pytest.raises(learning.Abandoned):
        left.fit(learning.stream())
    again = learner("plain", tmp_path / "left", **options)
    again.fit(learning.stream(), resume=True)
    for done in (made, again):
        done.recorder.close()
    one, other = learning.everything(again), learning.everything(made)
    assert one.keys() == other.keys() and all(torch.equal(one[name].nan_to_num(), other[name].nan_to_num()) for name in one)


def test_the_projection_is_put_where_it_belongs() -> None:
    config = SAMEOptions()
    from everbatch.train.same.setting import projecting

    given = functools.partial(compose(EMA, ClipGradNorm, base=torch.optim.AdamW), lr=0.1)
    made: Any = projecting(given, config.space)
    assert [part.__name__ for part in made.func.__bases__] == ["EMA", "ClipGradNorm", "SubspaceProjection", "AdamW"]
    assert made.keywords == {"lr": 0.1, "subspaceprojection_space": "update"}
    own = functools.partial(compose(SubspaceProjection, base=torch.optim.SGD), lr=0.1, space="update")
    assert projecting(own, "update") is own
    with pytest.raises(ValueError, match="space='grad' and SubspaceProjection in space='update', must be the same"):
        projecting(own, "grad")

    class Mine(SAM, torch.optim.SGD):
        def edit_gradient(self) -> None:
            super().edit_gradient()

    with pytest.raises(ValueError, match="Mine, which defines edit_gradient itself, must list SubspaceProjection"):
        projecting(functools.partial(Mine, lr=0.1), "update")


BAD: dict[str, dict[str, Any]] = {
    "rank=0": {"rank": 0}, "experts=0": {"experts": 0}, "delta=0.0": {"delta": 0.0}, "delta=1.5": {"delta": 1.5},
    "mu_rel=0.0": {"mu_rel": 0.0}, "tau=1.5": {"tau": 1.5}, "power=0": {"power": 0}, "top_k=9": {"top_k": 9},
    "router='strict'": {"router": "strict"}, "space='weights'": {"space": "weights"}, "action='drop'": {"action": "drop"},
    "routing='batch'": {"routing": "batch"}, "heads='two'": {"heads": "two"}, "min_active=5": {"min_active": 5},
    "statistics='bfloat16'": {"statistics": "bfloat16"}, "layers='x'": {"layers": "x"}, "warmup_tokens=0": {"warmup_tokens": 0},
    "released=True in space='update'": {"released": True}, "alpha=-1.0": {"alpha": -1.0}, "wide_rank=0": {"wide_rank": 0}}


@pytest.mark.parametrize("words", BAD)
def test_options_that_cannot_be(words: str) -> None:
    with pytest.raises(ValueError, match=rf"SAME: {words}") as told:
        SAME.Config(**BAD[words])
    assert "must be" in str(told.value)


def test_what_is_refused() -> None:
    refused: dict[str, Callable[[], Any]] = {
        r"layers=\['\*.mlp.fc1'\]: '\*.mlp.fc1' fits nothing": lambda: learner("plain", layers=("*.mlp.fc1",)),
        r"trained=\['6.\*'\]: '6.\*' fits no parameter": lambda: learner("plain", trained=("6.*",)),
        "rank=65 in '1', must be at most the width of its inputs, 64": lambda: learner("plain", rank=65)}
    for words, make in refused.items():
        with pytest.raises(ValueError, match=words) as told:
            make()
        assert isinstance(told.value, UnknownTarget) or "rank" in words
    with pytest.raises(ValueError, match="SAME: compile=True, must be false"):
        Learner(net(), functools.partial(compose(base=torch.optim.SGD), lr=0.1), config=Trainer.Config(compile=True),
                layers=("1",), trained=())
    with pytest.raises(ValueError, match="heads='by_task' on a stream of kind 'class', must be task-incremental"):
        learner("plain", heads="by_task").fit(learning.stream())
    with pytest.raises(NoFreeSubspace, match="SAME: layer '3', before task 2: free_split: delta=1.0 needs 160 of 160"):
        learner("plain", pinned=True, min_free=1, statistics="float32").fit(learning.stream())
    with pytest.raises(NonFiniteStatistics, match="SAME: layer '1', task 0: 3 of 96 inputs are not finite"):
        spoilt = learner("plain")
        spoilt.prepare = lambda raw: torch.where(raw[:, :1, 2:3, 2:3] > 14, float("nan"), learning.scale(raw))
        spoilt.fit(learning.stream())


def test_mos_does_not_stand_beside_it() -> None:
    with pytest.raises(CompositionError, match="MOS and SAME both own the adapters"):
        compose(MOS, SAME, base=Trainer)


def test_an_export_says_how_to_put_the_experts_in_again(tmp_path: Path) -> None:
    made = learner("plain")
    made.fit(learning.stream())
    path = made.export(tmp_path / "model.safetensors")
    made_of = {"num_experts": 4, "rank": 4, "alpha": 32.0, "top_k": None, "routing": "token"}
    assert model_info(path)["experts"] == {"1": made_of, "3": made_of}
    again = load_model(path, build=lambda info: net())
    x = learning.scale(learning.stream().fetch(torch.arange(5)))
    assert isinstance(again, nn.Module) and torch.equal(again(x), made.predict(x))


@pytest.mark.slow
def test_a_decoder_of_hugging_face_learns_two_texts() -> None:
    needs("transformers")
    sys.path.insert(0, str(Path(__file__).parent.parent / "problems"))
    import decoders
    import texts

    moved = {}
    for router in ("null", "free"):
        made = texts.trainer("plain", (), (SAME,), model=decoders.llama(), options={}, lr=0.5, more={
            "layers": ("*.mlp.up_proj", "*.mlp.gate_proj"), "trained": (), "router": router, "delta": 1.0, "min_free": 4})
        made.fit(decoders.stream())
        state = made.states[SAME]
        assert len(state.history) == 4 * 4 and state.history["model.layers.1.mlp.up_proj/numbers"][0] == 80 * texts.LENGTH
        assert sum(p.requires_grad for p in made.module.parameters()) == 4 * 9
        assert made.module.get_parameter("model.layers.0.mlp.up_proj.up_0").any()
        moved[router] = state.log[1]["drift"]["0"]["variation"]
    assert moved["null"] < 0.5 * moved["free"]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_promise_on_every_engine(zygote: Zygote, tmp_path: Path) -> None:
    """Old tokens' router logits stay, statistics are those of one process, a run goes on bit for bit inside of a task."""
    start, hosts = Path(same_jobs.__file__), ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
    found = zygote.found(start, tmp_path / "plain.json", str(tmp_path), "null:plain", ranks=1, limit=200)
    mixed = [f"moe:{host}" for host in hosts if host in ("zero2", "zero3")]
    found |= zygote.found(start, tmp_path / "out.json", str(tmp_path), *(f"null:{host}" for host in hosts), *mixed, limit=600)
    checks = [f"{check}/{host}" for host in ("plain", *hosts) for check in ("null", "moments", "gradients", "resume")]
    checks += [f"moe/{word.partition(':')[2]}" for word in mixed]
    for check in checks:
        assert found[check]["passed"], f"{check}: error {found[check]['error']:.3g}: {found[check]['problem']}"
