"""Methods by name: what each sets, what wins over it, and which words are refused."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from everbatch import cli, compose, config, methods
from everbatch.config.strict_yaml import load_file
from everbatch.errors import CompositionError
from everbatch.experiment import MIXINS, TRAINER_MIXINS, ClassIncremental, LargeBatch, named
from everbatch.optim import OptimizerMixin
from everbatch.train import Replay, Trainer

YAML = Path(__file__).parents[1] / "recipes" / "class_incremental.yaml"


BASE = config.build(ClassIncremental, load_file(YAML))


def chosen(*words: str) -> Any:
    return config.parse(ClassIncremental, list(words), default_yaml=YAML)


def used(options: Any) -> set[str]:
    """Paths of the parts that are on, of those that may be off."""
    mixins = {key for key, part in TRAINER_MIXINS.items() if part.asked(part.Config()) and getattr(options, key) is not None}
    return mixins | {f"optimizer.{key}" for key in options.optimizer.used()}


@pytest.mark.parametrize("name", named.names())
def test_a_name_stands_for_its_options_and_switches_other_memory_off(name: str) -> None:
    options: Any = config.build(ClassIncremental, {"method": name}, base=BASE)
    wanted = set()
    for path, value in named.names()[name].items():
        part = re.match(r"(optimizer\.)?\w+", path)
        assert part is not None
        wanted.add(part[0])
        found = functools.reduce(getattr, path.split("."), options)
        assert found is not None and value in ({}, found), path
    assert used(options) == {path for path in wanted if path.removeprefix("optimizer.") in methods.TABLE}


def test_every_method_that_options_can_name_has_a_name() -> None:
    without = {key: methods.load(key) for key in methods.TABLE if not named.made_by(key)}
    assert {"subspace_projection", "consolidate", "warm_start"} <= without.keys()
    called = {part.called_by for part in MIXINS.values()}
    silent = [key for key, part in without.items() if not (part.in_code or key in called or part.makes == {})]
    assert not silent, "no name, no part that they are called by, and they do not say that they make none"
    expected = "finetune er dark_er dark_er_pp er_ace ewc online_ewc si mas refresh"
    assert set(expected.split()) <= set(named.names())
    assert "der" not in named.names()


def test_options_win_wherever_they_stand(tmp_path: Path) -> None:
    for words in (("method=er", "replay.capacity=7"), ("replay.capacity=7", "method=er")):
        assert chosen(*words).replay == Replay.Config(method="er", capacity=7, alpha=0.3)
    file = tmp_path / "mine.yaml"
    file.write_text("method: ewc\noptimizer: {ewc: {strength: 3.0}, clip: {}}\n")
    options = chosen("--config", str(file))
    assert options.replay is None and options.optimizer.ewc.strength == 3.0 and options.optimizer.ewc.form == "separate"
    other = chosen("method=er", "--config", str(file))  # the file's memory is another method's; its clipping is nobody's
    assert other.optimizer.ewc is None and other.optimizer.clip is not None and other.replay.method == "er"
    config.dump(other, tmp_path / "config.yaml")
    assert config.resolved(chosen("--config", str(tmp_path / "config.yaml"))) == config.resolved(other)


def test_options_of_what_a_method_has_not_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("method: ewc\nreplay: {capacity: 10}\n")
    for words in (("method=ewc", "replay.capacity=10"), ("replay.capacity=10", "method=ewc"), ("--config", str(file))):
        with pytest.raises(SystemExit):
            chosen(*words)
        assert "replay.capacity beside method=ewc, which has no replay, must be left out; or join" in capsys.readouterr().err
    assert chosen("method=ewc", "replay=null").replay is None
    er, dumped = tmp_path / "er.yaml", tmp_path / "dumped.yaml"
    er.write_text("method: er\n")
    config.dump(chosen("method=ewc"), dumped)  # a dump says no method
    assert chosen("--config", str(er), "--config", str(dumped)).optimizer.ewc is not None
    assert chosen("method=ewc+er", "replay.capacity=10").replay.capacity == 10
    with pytest.raises(CompositionError, match="GDumb and Joint both own the samples that a task trains on"):
        compose(methods.load("gdumb"), methods.load("joint"), base=Trainer)


def test_methods_are_joined_and_called_what_others_call_them() -> None:
    options = chosen("method=der_pp+refresh+sam")
    assert used(options) == {"replay", "optimizer.refresh", "optimizer.sam"} and options.replay.method == "dark_er_pp"
    assert chosen("method=DER++") == chosen("method=dark-er-pp") == chosen("method=dark_er_pp")
    assert used(chosen("method=fine-tuning")) == set()


@pytest.mark.parametrize(("word", "text"), [
    ("der", "method: 'der', must be dark_er or dark_er_pp; DER names two methods"),
    ("er_aec", "method: 'er_aec', must be one that `everbatch methods` lists; did you mean 'er_ace'?"),
    ("er+dark_er", "method: 'er+dark_er', which asks for replay.method='er' and replay.method='dark_er', must join methods"),
    ("3", "method: '3', must be one that")])
def test_other_words_are_refused(word: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        chosen(f"method={word}")
    assert stop.value.code == 2 and text in capsys.readouterr().err
    with pytest.raises(config.ConfigError, match="unknown key 'method'"):
        config.build(LargeBatch, {"method": "er"})
    with pytest.raises(config.ConfigError, match=r"method=\['er'\], must be text"):
        config.build(ClassIncremental, {"method": ["er"]})


def test_help_and_the_command_list_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(config.help_text(ClassIncremental).split())
    assert all(name in text.split("--method METHOD")[1].split("(type:")[0] for name in named.names())
    cli.main(["methods", "--json"])
    rows = {row["key"]: row["makes"] for row in json.loads(capsys.readouterr().out)}
    assert [name for made in rows.values() for name in made] == [name for name in named.names() if name != named.NOTHING]
    cli.main(["methods"])
    assert " er dark_er dark_er_pp " in capsys.readouterr().out


def test_a_name_is_made_of_fields_and_by_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompositionError, match=r"Wrong: makes 'er' of 'metod', which is no field of its Config"):
        type("Wrong", (OptimizerMixin,), {"Config": Replay.Config, "makes": {"er": {"metod": "er"}}})
    named._names.cache_clear()
    monkeypatch.setattr(methods.load("sam"), "makes", {"er": {}})
    with pytest.raises(ValueError, match="two parts that make 'er', must make methods of different names"):
        named.names()
    monkeypatch.undo()
    named._names.cache_clear()
