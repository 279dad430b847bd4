"""The recipe with adapters: what it is on, what it begins with, and what it leaves behind."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everbatch import config
from everbatch.config.strict_yaml import load_file
from everbatch.data import load
from everbatch.distributed import World
from everbatch.experiment import AdaptedTasks, Data, Engine, Model, pretraining_loop, run
from everbatch.experiment.pretraining import Pretraining, pretrained
from everbatch.nn import Retriever
from everbatch.train import load_model
from needs import needs
from processes import ROOT

needs("timm", "sklearn")

DEFAULT = load_file(ROOT / "recipes" / "mos.yaml")
TINY = Model(name="vit_tiny_patch16_224", options={"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2})


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run beside each other."""
    monkeypatch.setattr(pretraining_loop, "cores", lambda: 1)


def short(folder: Path, **options: Any) -> AdaptedTasks:
    """The default recipe with a network, and a training, that take no time."""
    made = config.build(AdaptedTasks, DEFAULT, {
        "trainer": {"epochs": 1, "batch_size": 96, "checkpoint_every": 0},
        "mos": {"align_epochs": 1, "align_samples": 4, "rank": 2},
        "pretraining": {"epochs": 1, "samples": 16, "batch_size": 64, "cache": str(folder / "cache")}})
    return replace(made, model=TINY, engine=Engine(kind="plain"), output=str(folder / "run"), **options)


@pytest.mark.rotated(1, 8)
def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = short(tmp_path)
    begun: list[dict[str, torch.Tensor]] = []
    kept = AdaptedTasks.begun

    def watched(self: AdaptedTasks, model: nn.Module, *rest: Any) -> nn.Module:
        made = kept(self, model, *rest)
        begun.append({name: value.clone() for name, value in made.state_dict().items()})
        return made

    monkeypatch.setattr(AdaptedTasks, "begun", watched)
    digits = load("digits", train=True)
    before = pretrained(options.pretraining, TINY, digits, Data(), World())
    values = run(options).values
    assert len(values["accuracy_matrix"]) == values["adapters"] == 3
    known = {digits.classes[label] for label in before.classes}
    assert len(known) == 4 and set(values["classes"]) == set(digits.classes) - known
    rebuilt = load_model(tmp_path / "run" / "model.safetensors")
    assert isinstance(rebuilt, Retriever)
    for name, value in rebuilt.network.state_dict().items():  # frozen, from the training before
        if "adapter" not in name and not name.startswith("head."):
            assert torch.equal(value, before.state[name]) and torch.equal(value, begun[0][name]), name
    assert rebuilt(torch.zeros(2, 1, 8, 8)).shape == (2, 6)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["configuration"]["pretraining"]["classes"] == 0.4


def test_what_cannot_be_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = functools.partial(short, tmp_path)
    with pytest.raises(ValueError, match=r"scenario=domain, must divide classes"):
        made(scenario="domain")
    with pytest.raises(ValueError, match=r"init='runs/x', must be left out; set pretraining.weights"):
        made(init="runs/x")
    left = set(made().pretraining.rest(load("digits", train=True)))
    ordered = replace(made().split, class_order=(*sorted(left)[:5], min(set(range(10)) - left)))
    with pytest.raises(ValueError, match="split.class_order has .* be of classes that pretraining leaves"):
        made(split=ordered).stream()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    timms = Model(name="vit_base_patch16_224.augreg_in21k", pretrained=True)
    with pytest.raises(ValueError, match="weights of 'vit_base_patch16_224.augreg_in21k' are not on this machine"):
        run(replace(made(), model=timms))
    given = made(pretraining=Pretraining(weights="w.safetensors"))
    assert len(given.stream().classes) == 10 and "pretraining.epochs" in given.unused()
    assert "pretraining.epochs" not in made().unused()
