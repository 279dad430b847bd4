"""Crafting adversarial inputs: closed forms, loops by hand, and that it leaves no trace."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from adversarial import ADV, BOX, FROZEN, batches, by_hand, learner, net
from everbatch.nn import convert_split_bn
from everbatch.train.adversarial.craft import apply_signs, craft, pixel_box, random_point, wrong_targets


@pytest.mark.parametrize("options", [{}, {"targeted": True, "classes": 2}, {"steps": 4}])
def test_linear_model_in_closed_form(options: dict[str, Any]) -> None:
    """Two classes: away from the true one is towards the only wrong one; training knows the true labels all the same."""
    model, data = nn.Linear(6, 2).double(), [(x.double(), y) for x, y in batches(classes=2)]
    t = learner(model, data, tau=2, radius=31.875, std=(1.0,), mean=(0.0,), raw_low=-9.0, raw_high=9.0, **options)
    before = [copy.deepcopy(model)]
    for step, (x, y) in enumerate(data):
        old, now = before[max(step - 2, 0)], copy.deepcopy(model)
        inputs, terms = t.training_step()
        w = (old.weight[1] - old.weight[0]).detach()
        assert torch.equal(inputs[ADV], x - 0.125 * (2 * y - 1)[:, None] * w.sign()) or options == {"steps": 4}
        torch.testing.assert_close(inputs[ADV], x - 0.125 * (2 * y - 1)[:, None] * w.sign(), rtol=0, atol=1e-15)
        assert terms["adversarial_cross_entropy"] == functional.cross_entropy(now(inputs[ADV]), y, reduction="none").mean()
        before.append(copy.deepcopy(model))


def test_wrong_targets_are_wrong_and_drawn_evenly() -> None:
    torch.manual_seed(0)
    y = torch.arange(4).repeat(3000)
    aim = wrong_targets(y, 4)
    counts = torch.bincount((aim - y) % 4, minlength=4)
    assert counts[0] == 0 and counts.sum() == 12000 and ((counts[1:] - 4000).abs() < 200).all()  # 4 standard deviations
    x, model = batches(rows=8)[0][0], nn.Linear(6, 3)
    goal = wrong_targets(torch.arange(8) % 3, 3)
    crafted = craft(model, x, goal, pixel_box(1.0, low=-9.0, high=9.0), targeted=True)
    loss = functools.partial(functional.cross_entropy, reduction="none")
    assert (loss(model(crafted), goal) < loss(model(x), goal)).all()


def test_several_steps_by_hand() -> None:
    model, (x, y), box = net(), batches()[0], pixel_box(6.0, 3.5, mean=(0.5,), std=(0.25,))
    convert_split_bn(model)
    torch.manual_seed(3)
    start = random_point(x, box)
    at, radius, step = start, 6.0 / 255 / 0.25, 3.5 / 255 / 0.25
    for _ in range(3):
        leaf = at.clone().requires_grad_()
        functional.cross_entropy(copy.deepcopy(model)(leaf), y).backward()
        at = (at + step * leaf.grad.sign()).clamp((x - radius).clamp(min=-2), (x + radius).clamp(max=2))  # type: ignore[union-attr]
    assert torch.equal(by_hand(model, x, y, box, steps=3, start=start), at) and not torch.equal(start, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_signs_say_all_of_one_step(dtype: torch.dtype) -> None:
    model, (x, y) = nn.Linear(6, 3).to(dtype), batches(rows=40)[0]
    x = x.to(dtype)
    signs = craft(model, x, y, BOX, signs_only=True)
    assert signs.dtype == torch.int8 and torch.equal(apply_signs(x, signs, BOX), craft(model, x, y, BOX))


def test_one_draw_decides_for_a_whole_batch() -> None:
    """On a linear model one step from the input ends on the box's surface everywhere, and one from noise does not."""
    wide = {"raw_low": -9.0, "raw_high": 9.0, "optimizer": FROZEN, "data": batches(40)}
    for probability, possible in ((0.0, {1.0}), (0.5, {0.0, 1.0}), (1.0, {0.0})):
        t, seen = learner(nn.Linear(6, 3), random_start=probability, **wide), list[float]()
        for x, _ in batches(40):
            surface = ((t.training_step()[0][ADV] - x).abs() - BOX.radius).abs() < 1e-6
            assert surface.all() or 0.2 < surface.float().mean() < 0.8
            seen.append(float(surface.all()))
        assert set(seen) == possible


@pytest.mark.parametrize("radius", [4, 9])
def test_pixels_of_imagenet(radius: int) -> None:
    box = pixel_box(radius, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    expected = {4: (0.06849901532665468, 0.0700280112044818, 0.06971677559912855),
                9: (0.15412278448497303, 0.15756302521008403, 0.1568627450980392)}[radius]
    ends = {"low": (-2.1179039301310043, -2.0357142857142856, -1.8044444444444445),
            "high": (2.2489082969432315, 2.428571428571429, 2.64)}
    for found, value in ((box.radius, expected), (box.step, expected), (box.low, ends["low"]), (box.high, ends["high"])):
        assert found.shape == (3, 1, 1)
        torch.testing.assert_close(found.flatten(), torch.tensor(value, dtype=torch.float64), rtol=1e-14, atol=0)
    white = ((torch.ones(1, 3, 2, 2) - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
             / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
    assert torch.equal(box.clip(white + 9.0, white), white)  # pixels beyond 1 stay where they are
    assert torch.equal(pixel_box(radius, mean=(0.5,), std=(0.5, 0.25), channels_last=True).radius, torch.tensor(
        [radius / 255 / 0.5, radius / 255 / 0.25], dtype=torch.float64))


def test_tokens_are_perturbed_behind_their_embedding() -> None:
    torch.manual_seed(0)
    embed, head = nn.Embedding(20, 5), nn.Linear(5, 3)
    model = nn.Sequential(embed, nn.AdaptiveAvgPool2d((1, None)), nn.Flatten(), head)
    data = [(torch.randint(0, 20, (4, 7)), torch.randint(0, 3, (4,))) for _ in range(3)]
    t = learner(model, data, tau=0, radius=0.1, embedding="0", optimizer=FROZEN)
    part = t.augment_batch([t.batch(0)])[1]
    leaf = embed(data[0][0]).detach().requires_grad_()
    functional.cross_entropy(head(leaf.mean(1)), data[0][1]).backward()
    assert torch.equal(part.extras["delta"], 0.1 * leaf.grad.sign())  # type: ignore[union-attr]
    model.zero_grad()  # those of the comparison are none of the step's
    terms = learner(model, data, tau=0, radius=0.1, embedding="0", optimizer=FROZEN).training_step()[1]
    expected = functional.cross_entropy(head((leaf + part.extras["delta"]).mean(1)), data[0][1])
    torch.testing.assert_close(terms["adversarial_cross_entropy"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [
    {}, {"steps": 2, "random_start": 1.0}, {"targeted": True, "classes": 3}, {"first": "random"}])
def test_crafting_leaves_no_trace(options: dict[str, Any]) -> None:
    t = learner(net(nn.Dropout(0.5)), tau=2, **options)
    t.training_step()
    for parameter in t.model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    t.model[3].eval()
    flags, state = [m.training for m in t.model.modules()], copy.deepcopy(t.model.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(9)
    torch.manual_seed(5)
    assert len(t.augment_batch([t.batch(1)])) == 2
    assert torch.equal(torch.rand(9), expected) and [m.training for m in t.model.modules()] == flags
    assert all(torch.equal(v, state[n]) for n, v in t.model.state_dict().items())
    assert all((p.grad == 3.0).all() and p.requires_grad for p in t.model.parameters())
