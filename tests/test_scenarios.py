"""Every kind of stream through the class-incremental recipe: dry, on the digits, on two ranks, cut and resumed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everbatch import config
from everbatch.data import (
    STREAMS,
    TensorSource,
    as_stream,
    class_incremental,
    domain_incremental,
    load,
    make_stream,
    task_incremental,
)
from everbatch.data.tasks import manner
from everbatch.experiment import ClassIncremental, Data, run
from everbatch.experiment.split import Split
from processes import ROOT, Zygote
from rotation import When
from scenario_worker import options, same_bits

WORKER = ROOT / "tests" / "scenario_worker.py"
RECIPE = ROOT / "recipes" / "class_incremental.yaml"
TASKS = {"blurry": 3, "online": 3, "iid": 1}


def parsed(*words: str) -> ClassIncremental:
    return config.parse(ClassIncremental, list(words), default_yaml=RECIPE)


@pytest.mark.parametrize("name", [When(i % 4, 4).param(name) for i, name in enumerate(STREAMS) if name not in TASKS])
def test_each_trains_on_the_digits(name: Any, tmp_path: Path) -> None:
    result = run(options(name, tmp_path))
    matrix = result.values["accuracy_matrix"]
    assert len(matrix) == 3 and result.values["configuration"]["scenario"] == name
    assert json.loads((tmp_path / "result.json").read_text())["stream"] == result.values["stream"]


@pytest.mark.parametrize("name", [When(i, 3).param(name) for i, name in enumerate(("blurry", "online", "task_free"))])
def test_cut_and_resumed_with_the_same_bits(name: Any, tmp_path: Path) -> None:
    result = same_bits(name, tmp_path)
    sizes = {"blurry": [5, 3, 2], "online": [4, 3, 3], "task_free": [4, 3, 3]}[name]
    tests = result.values["test_samples"]
    assert len(tests) == 3 and np.argsort(tests)[-1] == 0 and [round(n / 45) for n in tests] == sizes


@pytest.mark.distributed
@pytest.mark.parametrize("name", [When(i, 4).param(name) for i, name in enumerate(("blurry", "online", "task_free", "domain"))])
def test_on_two_ranks(name: Any, zygote: Zygote, tmp_path: Path) -> None:
    job = zygote.run(WORKER, str(tmp_path), name, ranks=2, limit=150)
    assert job.codes == [0, 0], job.err[-3000:]
    made = options(name, tmp_path).stream()
    assert job.out.count("done") == 2 and f"{name} {made.fingerprint()}" in job.out  # the same stream on any number of ranks


def test_names_of_streams_and_what_they_are() -> None:
    digits = load("digits", train=True), load("digits", train=False)
    found = {name: manner(make_stream(name, digits)) for name in STREAMS}
    assert found == {"class": "class", "task": "task", "domain": "domain", "growing": "growing", "iid": "iid",
                     "blurry": "class, blurry 0.1", "online": "class, online", "task_free": "class, task-free"}
    assert make_stream("class", digits, seed=3).fingerprint() == class_incremental(*digits, seed=3).fingerprint()
    assert make_stream("task", digits, tasks=2).fingerprint() == task_incremental(*digits, tasks=2).fingerprint()
    assert len(make_stream("domain", digits, domains="rotated", degrees=[0, 30, 90])) == 3
    assert manner(make_stream("domain", digits, blur=0.5, one_pass=True, hidden=True)) == "domain, blurry 0.5, online, task-free"


def test_a_stream_of_ones_own_list_of_pairs() -> None:
    digits = load("digits", train=True), load("digits", train=False)
    halves = [tuple((part.fetch(ids := torch.nonzero(part.targets // 5 == k).flatten()), part.targets[ids]) for part in digits)
              for k in range(2)]
    assert manner(make_stream("blurry", halves)) == "class, blurry 0.1" and len(make_stream("task", halves)) == 2
    assert make_stream("class", halves).fingerprint() == as_stream(halves).fingerprint()
    assert make_stream("domain", [digits, digits]).kind == "domain"
    x, y = torch.zeros(4, 1), torch.tensor([0, 1, 0, 1])
    named = [TensorSource(x, y, classes=names, name=names[0]) for names in (["cat", "dog"], ["gnu", "hen"], ["dog", "cat"])]
    assert make_stream("domain", [(named[0], named[0]), (named[2], named[2])]).classes == ("cat", "dog")
    for kind in ("make_stream", "domain_incremental"):
        make: Any = make_stream if kind == "make_stream" else lambda _, pairs: domain_incremental(pairs)
        with pytest.raises(ValueError, match=f"{kind}.*: 'gnu' has classes .*gnu.*hen.* that 'cat' has not, must be the"):
            make("domain", [(named[0], named[0]), (named[1], named[1])])
    for kind, given, text in (("class", {"tasks": 2}, "tasks with kind='class', must be left out; each pair is a task"),
                              ("domain", {"domains": "rotated"}, "domains with kind='domain', must be left out; each pair"),
                              ("growing", {}, "2 pairs with kind='growing'"), ("iid", {}, "kind='iid' and 2 pairs")):
        with pytest.raises(ValueError, match=text):
            make_stream(kind, halves, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split: increment=2 with 2 data sets, must be left out; each of them is a task"):
        Split(increment=2).make("class", halves, 5, 0)


@pytest.mark.parametrize(("kind", "given", "text"), [
    ("blury", {}, "kind='blury', must be one of class, .*did you mean 'blurry'"),
    ("domain", {"increments": [5, 5]}, "increments with kind='domain', must be left out"),
    ("class", {"domains": "rotated"}, "domains with kind='class', must be left out"),
    ("iid", {"tasks": 2}, "tasks with kind='iid'"), ("class", {"degrees": [1.0]}, "degrees with kind='class'"),
    ("domain", {"degrees": [1.0]}, "degrees with domains='permuted'"), ("domain", {"domains": "turned"}, "domains='turned'"),
    ("domain", {"degrees": [1.0], "tasks": 3, "domains": "rotated"}, "tasks=3 and 1 degrees"),
    ("task", {"blur": 0.1}, "kind 'task'"), ("class", {"increments": "B4-Inc"}, "increments='B4-Inc'")])
def test_options_of_another_kind_are_refused(kind: Any, given: dict[str, Any], text: str) -> None:
    digits = load("digits", train=True), load("digits", train=False)
    with pytest.raises(ValueError, match=text):
        make_stream(kind, digits, **given)


@pytest.mark.parametrize(("words", "text"), [
    (["scenario=online", "trainer.epochs=3"], "trainer.epochs has no effect.*an online stream is passed once"),
    (["scenario=iid", "tasks=3"], "tasks has no effect.*one task"),
    (["split.increment=3", "tasks=3"], "tasks has no effect"), (["split.first=4"], "first=4, must go with increment"),
    (["split.increment=3", "split.increments=[5,5]"], "increments and increment"),
    (["scenario=growing", "split.increment=2"], "scenario=growing does not divide classes"),
    (["split.domains=rotated"], "they are of scenario=domain"), (["split.blur=1"], r"blur=1.0, must be in \(0, 1\)"),
    (["scenario=task_free", "optimizer.ewc={}"], r"EWC on a task-free stream, must not have to know .*at_task_end\(\)"),
    (["scenario=task_free", "optimizer.si={}"], "SI on a task-free"),
    (["split.task_free=true", "model.head=growing"], "GrowingHead on a task-free stream"),
    (["scenario=task_free", "replay.memory=ring"], "Replay on a task-free stream.*memory='ring'"),
    (["scenario=task_free", "trainer.reset_optimizer=false"], "no task is seen to begin"),
    (["scenario=domain", "data.sources=[digits,digits]", "tasks=2"], "each of data.sources is a task"),
    (["data.sources=[digits,else]"], "be all digits or none")])
def test_options_that_cannot_be_are_refused_before_anything(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parsed(*words)
    assert re.search(text, capsys.readouterr().err)


@pytest.mark.parametrize(("given", "text"), [
    ({"scenario": "iid"}, "scenario=iid is one task"),
    ({"split": Split(increments=(5, 5))}, "split.increment, or increments, says the classes of each"),
    ({"scenario": "domain", "split": Split(domains="rotated", degrees=(0.0, 9.0))}, "split.degrees has one for each task"),
    ({"data": Data(sources=("digits", "digits"))}, "each of data.sources is a task")])
def test_a_number_of_tasks_that_would_be_ignored_is_refused_in_python_too(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"tasks has no effect here: 7 of a stream of [12], must be left out; {text}"):
        ClassIncremental(tasks=7, **given)
    assert ClassIncremental(**given).tasks == ClassIncremental.tasks


def test_options_make_the_streams_they_say(tmp_path: Path) -> None:
    def sizes(*words: str) -> list[int]:
        return [len(task.classes) for task in parsed(*words).stream().tasks]

    assert sizes() == [2] * 5 and sizes("tasks=3") == [4, 3, 3] and sizes("split.increments=[1,2,7]") == [1, 2, 7]
    assert sizes("split.first=4", "split.increment=4") == [4, 4, 2] and sizes("split.increment=3") == [3, 3, 3, 1]
    digits = load("digits", train=True), load("digits", train=False)
    plain = parsed("split.order_seed=1993", "trainer.seed=4").stream()
    assert plain.fingerprint() == class_incremental(*digits, tasks=5, seed=1993).fingerprint()
    legacy = np.random.RandomState(1993).permutation(10)  # as PILOT, PyCIL and GTEP draw it
    assert plain.classes == tuple(str(c) for c in legacy)
    assert parsed("split.class_order=[3,1,2]", "tasks=3").stream().classes == ("3", "1", "2")
    assert len(parsed("scenario=domain", "tasks=100").stream()) == 100
    assert len(parsed("scenario=domain", "data.sources=[digits,digits]").stream()) == 2
    settled = parsed("scenario=online").settled()
    assert settled.trainer.epochs == 1 and parsed().settled().trainer.epochs == 8
    written = tmp_path / "config.yaml"
    config.dump(settled, written)
    again = parsed("--config", str(written)).settled()
    assert (again.scenario, again.split, again.trainer) == ("online", settled.split, settled.trainer)
    assert Split().make("class", [digits], 5, 0).fingerprint() == class_incremental(*digits, tasks=5).fingerprint()


def test_a_dry_run_of_a_blurry_stream_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("scenario=blurry", "split.online=true", "engine.kind=plain", "dry_run=true", f"output={tmp_path / 'none'}")
    assert run(parsed(*words)).steps == 0 and not (tmp_path / "none").exists()
    said = capsys.readouterr()
    assert "scenario: blurry" in said.out and "epochs: 1\n" in said.out
    assert "class_incremental: trainer.epochs=8 is taken as 1; an online stream is passed once" in said.err
