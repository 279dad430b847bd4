"""A network trained on a part of the data first: once, kept whole, and put into a run's network."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from everbatch.data import Source, load
from everbatch.distributed import World
from everbatch.experiment import Data, Model, pretraining, pretraining_loop
from everbatch.experiment.pretraining import Pretraining, begin_pretrained, pretrained
from everbatch.experiment.pretraining_loop import jittered, turned
from everbatch.experiment.timm_cache import cached_weights, check_cached

VIT = Model(name="vit_tiny_patch16_224", options={"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2})
NAME = "vit_base_patch16_224.augreg_in21k"


@pytest.fixture(scope="module")
def digits() -> Source:
    return load("digits", train=True)


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run beside each other."""
    monkeypatch.setattr(pretraining_loop, "cores", lambda: 1)


def small(folder: Path, **options: object) -> Pretraining:
    return replace(Pretraining(cache=str(folder), epochs=2, samples=8, batch_size=20), **options)  # type: ignore[arg-type]


def test_what_was_trained_is_kept(digits: Source, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = small(tmp_path)
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    first = pretrained(options, VIT, digits, Data(), World())
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), random)
    assert first.seconds > 0 and first.state["head.weight"].shape == (20, 8)
    assert first.classes == options.labels(digits) and len(first.classes) == 5
    assert set(options.rest(digits)) == set(range(10)) - set(first.classes)
    again = pretrained(options, VIT, digits, Data(), World())
    assert again.seconds == 0 and again.path == first.path
    assert all(torch.equal(again.state[name], value) for name, value in first.state.items())
    files = sorted(path.name for path in first.path.parent.iterdir())
    assert files == sorted([first.path.name, first.path.with_suffix(".lock").name])

    net = VIT.build(digits.fetch(torch.tensor([0]))[0], 10, 0)
    head = net.get_parameter("head.weight").detach().clone()
    begin_pretrained(options, VIT, net, digits, Data(), World())
    assert torch.equal(net.get_parameter("blocks.0.mlp.fc1.weight"), first.state["blocks.0.mlp.fc1.weight"])
    assert torch.equal(net.get_parameter("head.weight"), head)
    assert f"trained on 5 of 10 classes of digits/train before: it is {first.path}" in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"'head.weight' has shape \(10, 8\) and shape \(20, 8\)"):
        begin_pretrained(options, VIT, net, digits, Data(), World(), head=True)

    first.path.write_bytes(b"cut")
    assert pretrained(options, VIT, digits, Data(), World()).seconds > 0


def test_its_name_follows_from_what_goes_in(digits: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = small(tmp_path)
    name = pretraining._hash(options, VIT, digits, Data())
    assert name == pretraining._hash(replace(options, cache="elsewhere", weights="w"), VIT, digits, Data())
    other = [
        pretraining._hash(replace(options, epochs=3), VIT, digits, Data()),
        pretraining._hash(options, replace(VIT, options={**(VIT.options or {}), "depth": 2}), digits, Data()),
        pretraining._hash(options, VIT, load("digits", train=False), Data()),
        pretraining._hash(options, VIT, digits, Data(mean=0.4))]
    monkeypatch.setattr(pretraining, "__version__", "0.0.0")
    other.append(pretraining._hash(options, VIT, digits, Data()))
    assert len({name, *other}) == 6
    monkeypatch.setenv("EVERBATCH_CACHE", str(tmp_path / "there"))
    assert Pretraining().folder == tmp_path / "there" / "pretrained"


def test_it_learns(digits: Source, tmp_path: Path) -> None:
    options = small(tmp_path, epochs=8, samples=30, classes=0.2, rotations=False, jitter=0.05)
    found = pretrained(options, Model(), digits, Data(), World())
    net = Model().build(digits.fetch(torch.tensor([0]))[0], 2, 1)
    found.put_into(net, head=True)
    test = load("digits", train=False)
    ids = torch.nonzero(torch.isin(test.targets, torch.tensor(found.classes))).flatten()
    rows = test.fetch(ids)
    assert isinstance(rows, Tensor)
    told = torch.tensor(found.classes)[net.eval()(Data().prepare(rows)).argmax(1)]
    assert (told == test.targets[ids]).float().mean() > 0.9


def test_weights_that_are_given_win(digits: Source, tmp_path: Path) -> None:
    sample = digits.fetch(torch.tensor([0]))[0]
    theirs, net = VIT.build(sample, 3, 5), VIT.build(sample, 10, 0)
    save_file({k: v.clone() for k, v in theirs.state_dict().items()}, tmp_path / "w.safetensors")
    options = Pretraining(weights=str(tmp_path / "w.safetensors"), cache=str(tmp_path / "none"))
    begin_pretrained(options, VIT, net, digits, Data(), World())
    assert torch.equal(net.get_parameter("norm.weight"), theirs.get_parameter("norm.weight"))
    assert torch.equal(net.get_parameter("pos_embed"), theirs.get_parameter("pos_embed"))
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="holds neither checkpoints nor weights"):
        begin_pretrained(replace(options, weights=str(tmp_path / "no")), VIT, net, digits, Data(), World())


@pytest.mark.rotated(2, 6)
def test_trying_how_many_cores_help_changes_nothing(digits: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining_loop, "cores", lambda: 2)
    options = small(tmp_path)
    network = Model(name="resnet10t")  # has running statistics
    training = pretraining_loop.Training(options, network, digits, Data(), options.labels(digits)[:1])
    before, random = {k: v.clone() for k, v in training.net.state_dict().items()}, torch.get_rng_state()
    assert training._fastest() in (1, 2)
    assert all(torch.equal(v, before[k]) for k, v in training.net.state_dict().items())
    assert all(p.grad is None for p in training.net.parameters()) and torch.equal(torch.get_rng_state(), random)


def test_quarters_and_jitter() -> None:
    torch.manual_seed(0)
    x = torch.arange(2 * 4 * 4.0).view(2, 1, 4, 4).repeat(16, 1, 1, 1)
    images, labels = turned(x, torch.arange(32) % 2, 2)
    assert set(labels.tolist()) == set(range(8))
    for image, label, original in zip(images, labels.tolist(), x, strict=True):
        assert torch.equal(image, torch.rot90(original, label // 2, (1, 2)))
    smooth = torch.linspace(0, 1, 8).expand(1, 1, 8, 8)
    moved = jittered(smooth, 0.1)
    assert moved.shape == smooth.shape and 0 < (moved - smooth).abs().max() < 0.35


def test_timm_weights_are_found_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert cached_weights(NAME) is None
    with pytest.raises(ValueError, match=f"'{NAME}' are not on this machine.*downloads nothing; bring them there, or"):
        check_cached(NAME, "or give pretraining.weights")
    repository = tmp_path / "hub" / "models--timm--vit_base_patch16_224.augreg_in21k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "model.safetensors").write_bytes(b"w")
    assert cached_weights(NAME) == Path(os.path.join(repository, "snapshots", "abc", "model.safetensors"))
    check_cached(NAME, "")


@pytest.mark.parametrize(("options", "told"), [
    ({"classes": 0.0}, "classes=0.0, must be in (0, 1]"), ({"epochs": 0}, "epochs=0, must be an integer >= 1"),
    ({"samples": 0}, "samples=0"), ({"lr": -1.0}, "lr=-1.0"), ({"jitter": 0.9}, "jitter=0.9")])
def test_options_out_of_range(options: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError) as error:
        Pretraining(**options)  # type: ignore[arg-type]
    assert told in str(error.value)
