"""Adapting to a stream without labels: against loops written out, bit for bit without any label."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import learning
from everbatch import compose, seeds
from everbatch.data import TensorSource, domain_incremental, ordered, task_free
from everbatch.errors import CheckpointMismatch, NoNormalizationLayers
from everbatch.nn import BatchAdapted, adapt_batch_norm, convert_unmix_tns, unmix_layers, unmix_mode
from everbatch.optim import EWC, MeanTeacher
from everbatch.train import BNAdapt, CoTTA, Replay, Tent, Trainer, load_model, model_info

ADAM = functools.partial(compose(base=torch.optim.Adam), lr=0.01)
TEACHER = functools.partial(compose(MeanTeacher, base=torch.optim.Adam), lr=0.01, decay=0.9, restore=0.2)
BATCH = 5


def net(unmix: bool) -> nn.Module:
    torch.manual_seed(1)
    made = nn.Sequential(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3))
    made(torch.randn(20, 2, 3, 3))
    made.zero_grad()
    if unmix:
        convert_unmix_tns(made, 3)
    return made


@functools.cache
def pixels(domain: int) -> Tensor:
    return torch.randn(12, 2, 3, 3, generator=torch.Generator().manual_seed(domain)) * (1 + domain) + domain


@functools.cache
def labels(domain: int) -> Tensor:
    return torch.arange(12) * 7 % 3


def stream(shift: int = 0) -> Any:
    """Two domains of twelve samples, of which two batches of five are shown; labels turned by `shift`."""
    pairs = [TensorSource(pixels(d), (labels(d) + shift) % 3, name=f"domain {d}") for d in (0, 1)]
    return ordered(domain_incremental([(pair, pair) for pair in pairs]))


def made(method: type, optimizer: Any = ADAM, *, unmix: bool = True, model: nn.Module | None = None,
         augment: Any = None, base: type = Trainer, **options: Any) -> Any:
    cls = type("Learner", (method, base), {})
    config = Trainer.Config(batch_size=BATCH, seed=3, reset_optimizer=False)
    return cls(net(unmix) if model is None else model, optimizer, config=config, device="cpu", augment=augment, **options)


def batches() -> list[tuple[int, Tensor, Tensor]]:
    return [(d, pixels(d)[at : at + BATCH], labels(d)[at : at + BATCH]) for d in (0, 1) for at in (0, BATCH)]


def jitter(image: Tensor) -> Tensor:
    return image + 0.3 * torch.randn(image.shape)


def like_tent(model: nn.Module) -> tuple[list[Tensor], nn.Module]:
    """The authors' loop: predictions of before each step."""
    model.eval()
    norm = model[1]  # type: ignore[index]
    optimizer, seen = torch.optim.Adam([norm.weight, norm.bias], lr=0.01), []
    for _, x, _ in batches():
        logits = model(x)
        seen.append(logits.detach())
        loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return seen, model


def like_cotta(model: nn.Module, views: int, threshold: float) -> tuple[list[Tensor], nn.Module]:
    """The authors' loop, over copies of the network; components are the student's."""
    model.eval()
    for p in model.parameters():
        p.requires_grad_(True)
    teacher, source = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, seen, asked = torch.optim.Adam(model.parameters(), lr=0.01), [], 0
    for step, (_, x, _) in enumerate(batches()):
        for other in (teacher, source):
            for layer, own in zip(unmix_layers(other).values(), unmix_layers(model).values(), strict=True):
                layer.component_means.copy_(own.component_means)
                layer.component_vars.copy_(own.component_vars)
        with torch.no_grad(), unmix_mode(teacher, "frozen"), unmix_mode(source, "frozen"):
            if views and source(x).softmax(1).amax(1).mean() < threshold:
                asked += 1
                ids = range((step // 2) * 12 + (step % 2) * BATCH, (step // 2) * 12 + (step % 2) * BATCH + BATCH)
                made = []
                for number in range(views):
                    rows = []
                    for row, key in zip(x, seeds.derive_each(ids, 3, "augment", f"view {number}", step), strict=True):
                        torch.manual_seed(key)
                        rows.append(jitter(row))
                    made.append(teacher(torch.stack(rows)))
                taught = torch.stack(made).mean(0)
            else:
                taught = teacher(x)
        seen.append(taught)
        loss = -(taught.softmax(1) * model(x).log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for (name, p), t, s in zip(model.named_parameters(), teacher.parameters(), source.parameters(), strict=True):
                t.lerp_(p, 0.1)
                back = seeds.uniform((3, "mean teacher", step + 1, name), 0, p.numel()).view(p.shape) < 0.2
                p.copy_(torch.where(back, s, p))
    assert asked == 4 * bool(views and threshold)
    return seen, model


def online(seen: list[Tensor]) -> list[float]:
    """Accuracy by domain, of ten predictions each."""
    right = [(logits.argmax(1) == y).sum().item() for logits, (_, _, y) in zip(seen, batches(), strict=True)]
    return [(right[0] + right[1]) / 10, (right[2] + right[3]) / 10]


def close(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("unmix", [True, False])
def test_tent_is_the_published_loop(unmix: bool) -> None:
    expected = net(unmix)
    if not unmix:
        adapt_batch_norm(expected)
    seen, expected = like_tent(expected)
    before, trainer = net(unmix).state_dict(), made(Tent, unmix=unmix)
    trainer.fit(stream())
    close(trainer.module, expected)
    assert trainer.online == online(seen)
    assert trainer.report().values["by_task"] == trainer.online
    moved = {n for n, p in trainer.module.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"1.weight", "1.bias"} == set(trainer.optimizer.host.names)
    assert "L = E_stream H(softmax(logits))" in trainer.describe()


@pytest.mark.parametrize(("views", "threshold"), [(0, 0.92), (2, 1.0), (2, 0.0)])
def test_cotta_is_the_published_loop(views: int, threshold: float) -> None:
    seen, expected = like_cotta(net(unmix=True), views, threshold)
    trainer = made(CoTTA, TEACHER, views=views, threshold=threshold, augment=jitter)
    trainer.fit(stream())
    close(trainer.module, expected)
    assert trainer.online == online(seen)
    with trainer.optimizer.taught_by("teacher"):
        teacher = {n: p.clone() for n, p in trainer.module.named_parameters()}
    assert any(not torch.equal(p, teacher[n]) for n, p in trainer.module.named_parameters())


@pytest.mark.parametrize(("options", "unmix"), [({"alpha": 0.5}, False), ({"prior": 5}, False), ({"alpha": 0.0}, True)])
def test_bn_adapt_trains_nothing(options: dict[str, Any], unmix: bool) -> None:
    trainer, model = made(BNAdapt, unmix=unmix, **options), net(unmix).eval()
    if not unmix:
        adapt_batch_norm(model, 0.5)
    with torch.no_grad():
        seen = [model(x) for _, x, _ in batches()]
    trainer.fit(stream())
    assert trainer.online == online(seen) and trainer.optimizer.step_count == 0
    close(trainer.module, model)


METHODS: dict[str, Callable[..., Any]] = {
    "tent": functools.partial(made, Tent), "bn_adapt": functools.partial(made, BNAdapt),
    "cotta": functools.partial(made, CoTTA, TEACHER, views=2, threshold=1.0, augment=jitter)}


@pytest.mark.parametrize("key", METHODS)
def test_no_label_reaches_the_loss(key: str) -> None:
    """Other labels, and none at all, leave every bit."""
    labelled, turned, bare = METHODS[key](), METHODS[key](), METHODS[key]()
    labelled.fit(stream())
    turned.fit(stream(shift=1))
    seen = [bare.serve(x) for _, x, _ in batches()]
    for other in (turned, bare):
        assert other.step == labelled.step == 4
        if other is bare and key == "cotta":  # what is served has no id, by which views are drawn
            continue
        for name, value in labelled.module.state_dict().items():
            assert torch.equal(value, other.module.state_dict()[name]), name
    if key != "cotta":
        assert online(seen) == labelled.online
    assert turned.online != labelled.online and math.isnan(bare.online[0])


@pytest.mark.parametrize(("method", "optimizer", "options"), [
    (Tent, ADAM, {}), (CoTTA, functools.partial(TEACHER.func, lr=0.01, decay=0.9, restore=0.0), {"views": 0})])
def test_begin_anew(method: type, optimizer: Any, options: dict[str, Any]) -> None:
    """With `reset` the second domain is adapted to as if it were the first; without, it is not."""
    both, ended = stream(), {}
    second = ordered(domain_incremental([(both.train.sources[1], both.train.sources[1])]))
    for name, reset, shown in (("long", True, both), ("short", True, second), ("kept", False, both)):
        ended[name] = made(method, optimizer, reset=reset, **options)
        ended[name].config = replace(ended[name].config, reset_optimizer=True)
        ended[name].fit(shown)
    close(ended["long"].module, ended["short"].module)
    assert ended["long"].online[1] == ended["short"].online[0]
    assert not torch.equal(ended["long"].module[1].weight, ended["kept"].module[1].weight)
    with pytest.raises(ValueError, match=r"on a task-free stream, must not have to know .* begins each task anew"):
        made(method, optimizer, reset=True, **options).fit(task_free(both))
    made(method, optimizer, **options).fit(task_free(both))


@pytest.mark.parametrize(("build", "error", "says"), [
    (lambda: made(Tent, model=nn.Linear(3, 3)), NoNormalizationLayers, "Tent: a Linear without scales and shifts"),
    (lambda: made(BNAdapt, model=nn.Linear(3, 3)), NoNormalizationLayers, "a Linear without batch norms"),
    (lambda: made(Tent, augment=jitter), ValueError, "Tent: augment="),
    (lambda: made(CoTTA, TEACHER), ValueError, "CoTTA: views=32 without augment="),
    (lambda: made(Tent, base=type("Other", (Replay, Trainer), {})), ValueError, "Tent: Replay beside it, must stand alone"),
    (lambda: made(CoTTA, views=0).fit(stream()), ValueError, "CoTTA: optimizer .*, must hold MeanTeacher"),
    (lambda: made(Tent, functools.partial(compose(EWC, base=torch.optim.SGD), lr=0.1)).fit(stream()), ValueError,
     "Tent: optimizer with EWC, must not look at labels"),
    (lambda: Tent.Config(statistics="mean"), ValueError, "statistics='mean'"),
    (lambda: BNAdapt.Config(alpha=2.0), ValueError, "alpha=2.0"),
    (lambda: MeanTeacher.Config(restore=1.5), ValueError, "restore=1.5")])
def test_refused(build: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build()


@pytest.mark.parametrize("unmix", [True, False])
def test_export_holds_components_and_one_call_rebuilds(unmix: bool, tmp_path: Path) -> None:
    trainer = made(Tent, unmix=unmix)
    trainer.fit(stream())
    path = trainer.export(tmp_path / "model.safetensors")
    info = model_info(path)["normalisation"]
    assert info["components_of"] == "rank 0" and list(info["layers"]) == ["1"]
    again = load_model(path, build=lambda _: net(unmix=False))
    close(again, trainer.module)
    x = pixels(1)[:BATCH]
    with torch.no_grad():
        torch.testing.assert_close([again(x), again(x)], [trainer.module(x), trainer.module(x)])
    with pytest.raises(CheckpointMismatch, match=r"'1', a Identity, to become"):
        load_model(path, build=lambda _: nn.Sequential(nn.Conv2d(2, 4, 2), nn.Identity()))


def test_layers_of_a_batch_norm_net_are_of_the_batch() -> None:
    trainer = made(Tent, unmix=False)
    assert isinstance(trainer.module[1], BatchAdapted) and not any(m.training for m in trainer.module.modules())
    assert learning.whole(trainer).keys() == {"master/1.weight", "master/1.bias"}
