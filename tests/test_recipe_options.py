"""Every optimizer mixin is an option of the recipes: it parses, builds, explains itself and takes steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch

import everbatch.optim
from everbatch import config
from everbatch.config.strict_yaml import load_text
from everbatch.contract import parts_of
from everbatch.data import TensorSource, class_incremental
from everbatch.errors import CompositionError
from everbatch.experiment import MIXINS, TRAINER_MIXINS, Data, Engine, Factory, Model, Optimizer, Parts, learner, unused_together
from everbatch.experiment.job import recorded, restarted
from everbatch.optim import EWC, GRIP, OptimizerMixin, SubspaceProjection
from everbatch.train import Replay, Trainer, TrainerMixin
from rotation import When


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    replay: Replay.Config | None = None


FACTORY = Factory(model=Model(), shape=(1, 8, 8), num_classes=4)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """For these tests."""

    optimizer: Optimizer = field(default_factory=Optimizer)


def options(*words: str) -> Optimizer:
    return config.parse(Recipe, list(words)).optimizer


def memories(key: str) -> dict[type, Any]:
    """The trainer's part from which a method draws what it asks for, and would be refused without."""
    part: Any = MIXINS[key]
    caller: Any = TRAINER_MIXINS[part.called_by] if "reference" in part.wants(part.Config()) else None
    return {} if caller is None else {caller: caller.Config()}


def trainer(chosen: Optimizer, mixins: Mapping[type, Any] | None = None, **given: Any) -> Any:
    model = FACTORY.model.build(torch.empty(FACTORY.shape), FACTORY.num_classes, 0)
    return learner(mixins or {})(model, chosen.build(FACTORY), device="cpu", config=Trainer.Config(batch_size=16), **given)


def stream() -> Any:
    g = torch.Generator().manual_seed(0)
    sources = [TensorSource(torch.randn(n, 1, 8, 8, generator=g), torch.arange(n) % 4, name=str(n)) for n in (32, 8)]
    return class_incremental(*sources, tasks=1)


def test_no_mixin_is_left_out() -> None:
    found = {name: getattr(everbatch.optim, name) for name in everbatch.optim.__all__}
    every = {c for c in found.values() if isinstance(c, type) and issubclass(c, OptimizerMixin)}
    # A projection needs matrices, and GRIP samples, which no option can name.
    assert set(MIXINS.values()) == every - {OptimizerMixin, SubspaceProjection, GRIP}


@pytest.mark.parametrize("key", [When(place, 4).param(key) for place, key in enumerate(MIXINS)])
def test_each_takes_two_steps(key: str) -> None:
    base = ["optimizer.base=adamw"] if key == "lamb" else ["optimizer.momentum=0.9"]
    chosen = options(f"optimizer.{key}={{}}", "optimizer.weight_decay=0.01", *base)
    made = trainer(chosen, output_fn=(lambda logits, batch: logits.logsumexp(1).mean()) if key == "ignite" else None,
                   mixins=memories(key))
    made.fit(stream())
    assert parts_of(type(made.optimizer)) == (MIXINS[key],) and made.step == 2 and made.optimizer.step_count == 2


def test_many_together_stand_in_a_legal_order() -> None:
    made = trainer(options("optimizer.lars.trust_coeff=0.1", "optimizer.si={}", "optimizer.refresh.gamma=0.01",
                           "optimizer.clip={}", "optimizer.dynamic_sparsity.density=0.5", "optimizer.look_sam={}",
                           "optimizer.ema={}", "optimizer.weight_decay=0.01"))
    made.fit(stream())
    names = [p.__name__ for p in parts_of(type(made.optimizer))]
    assert names == ["ClipGradNorm", "EMA", "DynamicSparsity", "Refresh", "SI", "LookSAM", "LARS"] and made.step == 2


def test_options_reach_the_mixins() -> None:
    made = trainer(options("optimizer.ewc.strength=3", "optimizer.refresh.chunk=2", "optimizer.shrink_perturb.tensors=weights"))
    given = {part.__name__: c for part, c in made.optimizer.configs.items()}
    assert given["EWC"].strength == 3.0 and given["Refresh"].chunk == 2 and given["ShrinkPerturb"].tensors == "weights"
    assert all(given[name].factory is FACTORY for name in ("EWC", "Refresh", "ShrinkPerturb"))
    own = functools.partial(FACTORY)
    assert Optimizer(ewc=EWC.Config(factory=own)).build(FACTORY).keywords["ewc_factory"] is own


def test_a_factory_follows_the_ambient_stream_and_has_a_lasting_text() -> None:
    torch.manual_seed(1)
    first, second = FACTORY(), FACTORY()
    torch.manual_seed(1)
    again = FACTORY()
    weights = [next(m.parameters()) for m in (first, second, again)]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])
    assert repr(FACTORY) == repr(Factory(model=Model(), shape=(1, 8, 8), num_classes=4)) and " at 0x" not in repr(FACTORY)


def test_what_cannot_work_says_why() -> None:
    for words, error, text in (
            (["optimizer.lars={}", "optimizer.base=adamw"], CompositionError, "LARS stands on AdamW, must stand on torch"),
            (["optimizer.lamb={}"], CompositionError, "LAMB stands on SGD, must stand on torch.optim.AdamW"),
            (["optimizer.ignite={}"], ValueError, "output_fn=None, must be given .* options cannot name a function"),
            (["optimizer.sam={}", "optimizer.esam={}"], CompositionError, "both own the perturbation")):
        with pytest.raises(error, match=text):
            trainer(options(*words))


@pytest.mark.parametrize("word", ["optimizer.ewc.factory=os.getcwd", "optimizer.look_sam.rhoo=1", "optimizer.ewc.strength=-1"])
def test_no_option_names_code_and_values_are_checked(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(word)
    assert word.split("=")[0] in capsys.readouterr().err


def test_the_written_configuration_repeats_itself(tmp_path: Path) -> None:
    words = [f"optimizer.{key}={{}}" for key in ("ewc", "shrink_perturb", "dynamic_sparsity", "lamb")]
    chosen = config.build(Recipe, *[load_text(f"optimizer: {{{w.split('.')[1].split('=')[0]}: {{}}}}") for w in words])
    config.dump(chosen, tmp_path / "config.yaml")
    assert config.resolved(config.parse(Recipe, ["--config", str(tmp_path / "config.yaml")])) == config.resolved(chosen)


def test_help_lists_every_option() -> None:
    text = config.help_text(Recipe)
    for key, part in MIXINS.items():
        assert f"optimizer.{key}:" in text
        for item in fields(part.Config):  # type: ignore[attr-defined]
            assert (f"--optimizer.{key}.{item.name}" in text) == (item.name != "factory"), (key, item.name)
    assert text.count("--optimizer.") > 100


@dataclass(frozen=True, kw_only=True)
class Whole(Parts):
    """A recipe with every mixin by key, and rehearsal on."""

    replay: Replay.Config | None = field(default_factory=lambda: Replay.Config(capacity=7))

    def unused(self) -> dict[str, str]:
        return unused_together(self)


def mixed(*words: str) -> dict[str, Any]:
    """The trainer mixins that a recipe composes, by name, and their options."""
    return {part.__name__: found for part, found in config.parse(Whole, list(words)).mixins().items()}


def test_a_recipe_takes_trainer_mixins_by_key() -> None:
    assert mixed() == {"Replay": Replay.Config(capacity=7)}
    assert mixed("replay=null") == {}
    found = mixed("conadv.radius=2", "replay.capacity=9", "optimizer.ewc={}", "consolidate.rows=3", "data.mean=0.25",
                  "optimizer.shrink_perturb={}")
    assert list(found) == ["ConAdv", "Replay", "Consolidate", "WarmStart"]
    assert found["ConAdv"].radius == 2.0 and found["ConAdv"].mean == (0.25,) and found["ConAdv"].classes is None
    assert found["Replay"].capacity == 9 and found["Consolidate"].rows == 3
    assert list(mixed("consolidate.isolate=true", "optimizer.dynamic_sparsity={}")) == ["Replay", "Consolidate"]
    made = learner(config.parse(Whole, ["optimizer.ewc={}"]).mixins())
    assert made.func.__mro__[1].__name__ == "Replay" and made.keywords["replay_capacity"] == 7
    assert made.keywords["consolidate_rows"] == 64 and issubclass(made.func, Trainer)


def test_a_trainer_mixin_that_builds_the_model_is_given_the_factory() -> None:
    class Teacher(TrainerMixin):
        @dataclass(frozen=True, kw_only=True)
        class Config:
            weight: float = 1.0
            factory: Callable[[], Any] | None = None

    made = learner({Teacher: Teacher.Config(weight=2.0), Replay: Replay.Config()}, factory=FACTORY)
    assert made.keywords["teacher_factory"] is FACTORY and made.keywords["teacher_weight"] == 2.0
    assert "replay_factory" not in made.keywords
    assert learner({Teacher: Teacher.Config(factory=dict)}, factory=FACTORY).keywords["teacher_factory"] is dict
    made = learner(config.parse(Whole, ["plasticity={}"]).mixins(), factory=FACTORY)
    assert made.keywords["plasticity_factory"] is FACTORY  # no file may name one, and the options know no such word


@pytest.mark.parametrize(("words", "text"), [
    (["consolidate.rows=3"], "consolidate.rows has no effect here, must be left out; it calls optimizer.refresh, optimizer.ewc"),
    (["warm_start.first=true"], "it calls optimizer.shrink_perturb, which is not given"),
    (["conadv.mean=0.5"], "conadv.mean, must be left out; it follows data.mean"),
    (["replay.method=er", "replay.alpha=1"], "replay.alpha has no effect here"),
    (["consolidate=null"], "consolidate")])
def test_options_of_trainer_mixins_without_effect_are_refused(
        words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config.parse(Whole, words)
    assert text in capsys.readouterr().err


def test_parts_that_act_between_tasks_are_known() -> None:
    words = [f"optimizer.{key}={{}}" for key in ("ewc", "si", "mas", "refresh", "shrink_perturb", "clip")]
    assert options(*words).between_tasks() == ["ewc", "si", "mas", "shrink_perturb"]


@pytest.mark.parametrize(("word", "method"), [
    ("derpp", "dark_er_pp"), ("DER++", "dark_er_pp"), ("der", "dark_er"), ("ER", "er"), ("dark-er", "dark_er"),
    ("Dark_ER_PP", "dark_er_pp")])
def test_replay_is_called_what_others_call_it(word: str, method: str) -> None:
    assert config.parse(Rehearsed, [f"replay.method={word}"]).replay == Replay.Config(method=method)  # type: ignore[arg-type]


def test_options_of_another_engine_are_refused() -> None:
    with pytest.raises(ValueError, match=r"engine: stage=3, precision='bf16' with kind=ddp, must be left out"):
        Engine(kind="ddp", precision="bf16", stage=3).build(64, 1, 2)


def test_a_refused_resume_leaves_the_written_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    for old, new, resume in ((None, 0.1, True), (0.1, 0.2, False)):
        assert (load_text(path.read_text())["lr"] if path.exists() else None) == old
        with recorded(Optimizer(lr=new), path, resume=resume, write=True):
            assert load_text(path.read_text())["lr"] == new
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    with pytest.raises(RuntimeError), recorded(Optimizer(lr=0.3), path, resume=True, write=True):
        raise RuntimeError("another configuration")
    assert load_text(path.read_text())["lr"] == 0.2
    with recorded(Optimizer(lr=0.4), path, resume=True, write=True):
        assert load_text(path.read_text())["lr"] == 0.2
    assert load_text(path.read_text())["lr"] == 0.4
    assert not restarted()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert restarted()


@pytest.mark.parametrize(("left", "kept"), [
    (None, 0.2), (".tmp-step-00000002", 0.2), ("previous", 0.2), ("step-00000002", 0.1), (".old-step-00000002", 0.1)])
def test_where_nothing_is_there_to_resume_the_configuration_is_the_new_one(tmp_path: Path, left: str | None, kept: float) -> None:
    """A run that ended before its first checkpoint, then one with another rate that is killed."""
    path = tmp_path / "config.yaml"
    config.dump(Optimizer(lr=0.1), path)
    if left is not None:
        (tmp_path / "checkpoints" / left).mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), recorded(Optimizer(lr=0.2), path, resume=True, write=True):
        raise KeyboardInterrupt
    assert load_text(path.read_text())["lr"] == kept


def test_every_default_of_deepspeed_is_written() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Run:
        engine: Engine = field(default_factory=Engine)

    written = config.resolved(Run(engine=Engine(deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}})))["engine"]
    assert written["stage"] == 1 and written["precision"] == "fp32" and written["deepspeed"]["gradient_clipping"] == 0.0
    assert written["deepspeed"]["zero_optimization"]["reduce_bucket_size"] == 1000
    assert not {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"} & written["deepspeed"].keys()
    again = Engine(**written)
    assert again.written() == again and again.build(8, 2, 2) == Engine(
        deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}}).build(8, 2, 2)
    assert config.resolved(Run(engine=Engine(kind="ddp")))["engine"]["deepspeed"] is None


def test_momentum_is_of_sgd() -> None:
    assert Optimizer(momentum=0.5).build().keywords["momentum"] == 0.5 and Optimizer().build().keywords["momentum"] == 0.0
    with pytest.raises(ValueError, match=r"momentum=0.5 with base=adamw, must be null; it is SGD's"):
        Optimizer(base="adamw", momentum=0.5)


@dataclass(frozen=True, kw_only=True)
class Picky:
    """Like a recipe, with an option that another leaves without effect, and one that it computes."""

    trainer: Trainer.Config = field(default_factory=lambda: Trainer.Config(batch_size=7), metadata={"idle": {
        "batch_size": "set size"}})
    replay: Replay.Config | None = None
    size: int = 7

    def unused(self) -> dict[str, str]:
        return unused_together(self)


@pytest.mark.parametrize(("words", "text"), [
    (["trainer.batch_size=7"], "trainer.batch_size, must be left out; set size"),
    (["trainer.batch-size=7"], "trainer.batch_size, must be left out"),
    (["trainer.schedule.power=2"], "trainer.schedule.power has no effect here, must be left out; it is of trainer.schedule.kind"),
    (["trainer.schedule.factor=0.1", "trainer.schedule.kind=cosine"], "trainer.schedule.factor has no effect here"),
    (["replay.method=er", "replay.alpha=0.1"], "replay.alpha has no effect here, must be left out; replay.method=er stores no"),
    (["replay.method=dark_er", "replay={beta: 1}"], "replay.beta has no effect here"),
    (["replay.capacity=0", "replay.memory=ring"], "replay.memory has no effect here")])
def test_options_without_effect_are_refused(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config.parse(Picky, words)
    assert text in capsys.readouterr().err


def test_files_hold_options_without_effect_at_their_defaults_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = config.parse(Picky, ["replay.method=er", "size=3"])
    assert chosen.trainer.batch_size == 7 and "batch_size" not in config.resolved(chosen)["trainer"]
    config.dump(chosen, tmp_path / "c.yaml")
    assert config.parse(Picky, ["--config", str(tmp_path / "c.yaml")]) == chosen
    (tmp_path / "d.yaml").write_text("replay: {method: er, alpha: 0.7}")
    with pytest.raises(SystemExit):
        config.parse(Picky, ["--config", str(tmp_path / "d.yaml")])
    assert "replay.alpha has no effect here" in capsys.readouterr().err
    # What a recipe's own file says does not stand in the way of another choice.
    assert config.parse(Picky, ["replay.method=er"], default_yaml=tmp_path / "e.yaml" if (tmp_path / "e.yaml").write_text(
        "replay: {alpha: 0.3}") else None).replay == Replay.Config(method="er", alpha=0.3)


def test_options_of_ddp_are_for_ddp() -> None:
    assert Engine(kind="ddp", ddp={"bucket_cap_mb": 1}).build(8, 1, 2) == "ddp"
    for kind in ("plain", "fsdp2", "deepspeed"):
        with pytest.raises(ValueError, match=rf"engine: ddp={{'bucket_cap_mb': 1}} with kind={kind}, must be left out"):
            Engine(kind=kind, ddp={"bucket_cap_mb": 1}).build(8, 1, 2)  # type: ignore[arg-type]


def test_means_fit_the_channels() -> None:
    batch = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    assert Data(mean=0.5).prepare(batch).shape == batch.shape
    with pytest.raises(ValueError, match=r"data: mean=\(0.1, 0.2\) and std=0.5 for images of 1 channels, must be one number"):
        Data(mean=(0.1, 0.2)).prepare(batch)
