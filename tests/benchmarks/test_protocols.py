"""The ledger's protocols run, measure what they say they measure, and begin from what they say they begin from."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.claims import conadv_gap, offline_optimisation, rehearsal, sparse_isolation, stale_sam, warm_start
from benchmarks.ledger import Cell, Claim, Tuning
from benchmarks.ledger.cells import Store
from benchmarks.ledger.command import carry_out
from benchmarks.ledger.plan import Plan, Settings
from benchmarks.ledger.report import judge, markdown
from benchmarks.ledger.samples import opened, prepare, top
from benchmarks.ledger.work import record
from benchmarks.protocols import classify, growing, large_batch, offline, stream
from torch import nn
from torch.nn import functional

from everbatch.config.strict_yaml import load_file
from processes import ROOT


def cell(claim: Claim, arm: str, home: Path, **scale: Any) -> Cell:
    """The first seed's cell of an arm."""
    plan = Plan.of("x", claim, Settings.of(claim, scale, arms=[arm], seeds=1), Store(home))
    return (plan.compared() or plan.tuning())[0]


# ---------------------------------------------------------------------------------------------------------------- classify
def test_stale_sam_from_tuning_to_verdict(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    arms = tuple(stale_sam.CLAIM.arms_of(stale_sam.CLAIM.scale))
    tuning = Tuning(arms=arms[1:], option="rho", values=(0.02, 0.05), seeds=1)
    claim = replace(stale_sam.CLAIM, tuning=tuning, seeds=2)
    plan = Plan.of("stale_sam", claim, Settings.of(claim, {"epochs": 1, "batch": 128, "width": 4}), Store(tmp_path))
    for cells in (plan.tuning, plan.compared):  # here, for time: the cells' processes have tests of their own
        for each in cells() or []:
            plan.store.write(each, record(each, tmp_path, None))
    assert carry_out(plan, jobs=2).ran == 0 and len(list(plan.store.folder.glob("*.json"))) == 3 * 2 + 4 * 2
    judged, chosen, table = judge(plan), plan.chosen(), plan.table()
    assert arms == ("SGD", "SAM", "LookSAM k=5", "StaleSAM tau=1") and list(judged.records) == list(arms)
    assert all(0 <= (judged.values("accuracy", arm)[seed] or 0) <= 1 for arm in arms for seed in (0, 1))
    passes = [judged.estimate("passes", arm)[0] for arm in arms]
    assert [p.mean for p in passes if p] == [1.0, 2.0, 1.2, 1.0]  # 10 steps, two of them full
    assert all((judged.values("step_ms", arm)[seed] or 0) > 0 for arm in arms for seed in (0, 1))
    assert chosen is not None and table is not None and set(chosen) == set(table) == set(arms[1:])
    for arm, row in table.items():
        assert set(row) == {0.02, 0.05} and row[chosen[arm]["rho"]] == max(row.values())
    text = markdown(judged)
    assert "never on the test samples" in text and text.count(" minus ") == 5
    result = json.loads((tmp_path / "stale_sam" / "result.json").read_text())
    assert result["seeds"] == [0, 1] and result["cells"]["SAM"]["1"]["versions"]["torch"]
    learn, judge_by, _ = classify.parts(plan.tuning()[0], claim.scale, tmp_path)
    assert len(learn.targets) + len(judge_by.targets) == 1347  # cut from the training samples


def test_the_largest_eigenvalue_is_the_hessians() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double().float()
    part = classify.Part(torch.randn(20, 3), torch.randint(3, (20,)))
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)

    def loss(flat: torch.Tensor) -> torch.Tensor:
        pieces = flat.split([s.numel() for s in shapes])
        values = {n: v.view(s) for n, v, s in zip(names, pieces, shapes, strict=True)}
        return functional.cross_entropy(torch.func.functional_call(model, values, (part.inputs,)), part.targets)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    spectrum = torch.linalg.eigvalsh(hessian)
    assert classify.eigenvalue(model, part, 300) == pytest.approx(spectrum[spectrum.abs().argmax()].item(), rel=1e-3)


@pytest.mark.rotated(2, 3)
def test_every_optimizer_of_an_arm_learns(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    for method, lr in (("LARS", 10.0), ("LAMB", 0.03), ("AdamW", 0.002)):
        data = prepare("digits", None, tmp_path)
        scale = asdict(classify.Scale(epochs=4, width=4, warmup=0.5))
        scale.pop("data")
        values = classify.train(Cell(run="", scale=scale, options={"method": method, "lr": lr}, seed=0, data=data), tmp_path)
        assert (values["accuracy"] or 0) > 0.3, (method, values)


# --------------------------------------------------------------------------------------------------------- streams and rounds
@pytest.mark.rotated(0, 3)
def test_a_stream_is_the_recipes(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    small = {"tasks": 2, "epochs": 1, "samples": 400}
    plain, er = (stream.train(cell(rehearsal.CLAIM, arm, tmp_path, **small), tmp_path) for arm in ("fine-tuning", "ER"))
    assert 0 < (plain["accuracy"] or 0) <= 0.6 and plain["forgetting"] is not None and plain != er
    with pytest.warns(UserWarning, match="tasks share more from here on"):  # ERK makes small layers dense
        kept = stream.train(cell(sparse_isolation.CLAIM, "isolated, density 0.2", tmp_path, **small), tmp_path)
    assert kept["forgetting"] == 0.0


def test_no_protocol_tunes_on_test_samples(tmp_path: Path) -> None:
    whole, cut = (stream.Share(samples=400, held_out=held).stream().tasks for held in (False, True))
    trained, rest = (sum(len(task.train_ids) for task in tasks) for tasks in (whole, cut))
    assert rest + sum(len(task.test_ids) for task in cut) == trained < 450 == sum(len(task.test_ids) for task in whole)
    for module, protocol in ((growing, growing.train), (offline, offline.optimise), (large_batch, large_batch.train)):
        scale = module.Scale()
        with pytest.raises(ValueError, match="held_out"):
            protocol(Cell(run="p", scale=asdict(scale), options={}, seed=0, held_out=True), tmp_path)  # type: ignore[operator]


@pytest.mark.rotated(1, 3)
def test_warm_start_is_the_recipe(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    recipe = load_file(ROOT / "recipes" / "growing_data.yaml")
    told = {"pixel_noise": recipe["pixel_noise"], "width": recipe["width"], "epochs": recipe["trainer"]["epochs"],
            "batch": recipe["trainer"]["batch_size"], "lr": recipe["optimizer"]["lr"]}
    assert told.items() <= asdict(growing.Scale()).items() and recipe["optimizer"]["base"] == "adamw"
    small = {"epochs": 1, "width": 2}
    arms = ("start over", "warm start", "shrink and perturb")
    values = [growing.train(cell(warm_start.CLAIM, arm, tmp_path, **small), tmp_path) for arm in arms]
    assert all(0 < (v["accuracy"] or 0) <= 1 and v["epochs_to_fit"] is None for v in values)
    assert values[0]["first_accuracy"] == values[1]["first_accuracy"]  # the first round is the same


# -------------------------------------------------------------------------------------------------------------------- offline
def test_functions_have_the_maxima_they_say() -> None:
    ackley, branin = offline.FUNCTIONS["ackley-8"], offline.FUNCTIONS["branin-2"]
    assert ackley.value(torch.full((1, 8), 0.2, dtype=torch.float64)).item() == pytest.approx(ackley.best, abs=1e-9)
    for a, b in ((-np.pi, 12.275), (np.pi, 2.275), (9.42478, 2.475)):
        at = torch.tensor([[(a - 2.5) / 7.5, (b - 7.5) / 7.5]], dtype=torch.float64)
        assert branin.value(at).item() == pytest.approx(branin.best, abs=1e-6)
    for function in (ackley, branin):
        points = 2 * torch.rand(4000, function.dimension, generator=torch.Generator().manual_seed(0)) - 1
        assert (function.value(points) <= function.best + 1e-6).all()


def test_the_surrogate_sees_the_worse_half_alone() -> None:
    scale = offline.Scale(sample=200, noise=0.0)
    function = offline.FUNCTIONS["branin-2"]
    x, y, worst = offline.offline_data(function, scale, seed=3)
    everything = function.value(2 * torch.rand(200, 2, generator=offline.seeds.generator(3, "points")) - 1)
    assert len(x) == len(y) == 100 and torch.equal(y.sort().values, everything.sort().values[:100])
    assert worst == everything.min() and torch.equal(function.value(x), y)


def test_the_search_climbs_and_stays_inside() -> None:
    bowl = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Flatten(0))
    with torch.no_grad():
        bowl[0].weight.copy_(torch.tensor([[1.0, -2.0]]))
    found = offline.search(bowl, torch.zeros(3, 2), offline.Scale(ascent=200, ascent_lr=0.02))
    assert torch.equal(found, torch.tensor([[1.0, -1.0]]).expand(3, 2))


def test_offline_arms_differ_by_the_optimizer(tmp_path: Path) -> None:
    small = {"sample": 300, "epochs": 3, "ascent": 5}
    claim = offline_optimisation.CLAIM
    arms = [arm for arm in claim.arms_of(claim.scale) if arm.endswith("branin-2")]
    values = {arm.split(",")[0]: offline.optimise(cell(claim, arm, tmp_path, **small), tmp_path) for arm in arms}
    assert len({v["r2"] for v in values.values()}) >= 4 and len({v["start"] for v in values.values()}) == 1
    assert len({v["output_gradient"] for v in values.values()}) == len(arms) == 5
    assert (values["Ignite fixed 1"]["output_gradient"] or 0) < (values["Adam"]["output_gradient"] or 0)
    assert all((v["score"] or 2) <= 1 for v in values.values())


# ---------------------------------------------------------------------------------------------------------------- large batch
def test_crops_are_pieces_of_the_image() -> None:
    x = torch.arange(1, 2 * 3 * 64 + 1, dtype=torch.float32).view(2, 3, 8, 8)
    many = large_batch.crop_flip(x.repeat_interleave(64, 0), torch.Generator().manual_seed(0))
    wide = torch.nn.functional.pad(x, [1] * 4)
    allowed = {(i, f): {wide[i, :, a : a + 8, b : b + 8].flip([2] if f else []).flatten().numpy().tobytes()
                        for a in range(3) for b in range(3)} for i in range(2) for f in (False, True)}
    flips = set()
    for i, image in enumerate(many):
        key = image.flatten().numpy().tobytes()
        assert key in allowed[i // 64, False] | allowed[i // 64, True]
        flips.add(key in allowed[i // 64, True])
    assert flips == {False, True}


SHORT = {"image_size": 8, "samples": 200, "epochs": 2, "warmup_epochs": 1.0, "batches": [32, 64], "width": 8}


@pytest.mark.slow
@pytest.mark.rotated(1, 2)
def test_conadv_that_was_cut_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("sklearn", "timm", "matplotlib"):
        pytest.importorskip(package)
    claim, store = conadv_gap.CLAIM, Store(tmp_path)
    arms = ["lars/32", "conadv/32", "lars/64", "conadv/64"]
    plan = Plan.of("conadv_gap", claim, Settings.of(claim, SHORT, arms=arms, seeds=1), store)
    assert carry_out(plan, jobs=1).ran == 4
    told = capsys.readouterr().out
    assert "4 of 4 cells, 4 of them now" in told and "gap 32 to 64 smaller than LARS's by | " in told
    order = [line.split()[1] for line in told.splitlines() if line.startswith("conadv_gap  ")]
    assert order == arms
    # Cut off inside the last file: that cell runs again, to the same bit; finished ones do not run.
    cells = plan.compared() or []
    before = [(store.read(c) or {})["values"] for c in cells]
    store.path(cells[3]).write_text(store.path(cells[3]).read_text()[:40])
    assert carry_out(plan, jobs=2).ran == 1
    assert [(store.read(c) or {})["values"] for c in cells] == before
    two = Plan.of("conadv_gap", claim, Settings.of(claim, SHORT, arms=arms, seeds=2), store)
    assert carry_out(two, jobs=2, end=0.0).ran == 0 and "4 of 8 cells, 0 of them now" in capsys.readouterr().out
    result = json.loads((tmp_path / "conadv_gap" / "result.json").read_text())
    assert result["scale"]["batches"] == [32, 64] and (tmp_path / "conadv_gap" / "figure.png").stat().st_size > 0
    other = Plan.of("conadv_gap", claim, Settings.of(claim, {**SHORT, "lr": 3.0}, arms=arms, seeds=1), store)
    assert judge(other).done == 0  # other settings, other cells


@pytest.mark.slow
@pytest.mark.rotated(0, 2)
def test_every_arm_of_conadv_and_validation(tmp_path: Path) -> None:
    for package in ("sklearn", "timm"):
        pytest.importorskip(package)
    claim, store = conadv_gap.CLAIM, Store(tmp_path)
    plan = Plan.of("conadv_gap", claim, Settings.of(claim, SHORT, seeds=2), store)
    assert carry_out(plan, jobs=2).ran == 16
    judged = judge(plan)
    assert judged.done == judged.total == 16 and [p.estimate.count for p in judged.parts if p.estimate] == [2, 2, 2]
    held = Plan.of("conadv_gap", claim, Settings.of(claim, {**SHORT, "validation": True}, arms=["lars/32"], seeds=1), store)
    assert carry_out(held, jobs=1).ran == 1 and held.data == plan.data


def test_conadv_refuses_what_cannot_be_compared() -> None:
    for change, said in (({"batches": [64, 100]}, "be a multiple of 64"), ({"width": 4}, "be a multiple of 8")):
        with pytest.raises(ValueError, match=said):
            Settings.of(conadv_gap.CLAIM, change)


# -------------------------------------------------------------------------------------------------------------------- samples
def test_samples_are_known_by_their_bytes(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {f"{kind}_{part}": draw.integers(0, top_value, size, dtype=np.uint8) for part, n in (("train", 30), ("test", 10))
              for kind, top_value, size in (("x", 256, (n, 6, 6)), ("y", 3, (n,)))}
    arrays |= {f"y_{part}": np.arange(len(arrays[f"y_{part}"])) % 3 for part in ("train", "test")}
    one, same, other = (tmp_path / f"{name}.npz" for name in ("one", "same", "other"))
    np.savez(one, **arrays)
    np.savez(same, **arrays)
    np.savez(other, **{**arrays, "y_test": arrays["y_test"][::-1]})
    found = [prepare(str(path), None, tmp_path) for path in (one, same, other)]
    assert found[0] == found[1] != found[2]
    held = Cell(run="", scale={"image_size": None}, options={}, seed=0, data=found[0])
    train, test = opened(held, tmp_path)
    assert torch.equal(train.fetch(torch.arange(30))[:, 0], torch.from_numpy(arrays["x_train"])) and len(test) == 10
    assert top(held, train.fetch(torch.arange(1))) == 255.0
    one.unlink()
    np.savez(one, **{**arrays, "x_train": 255 - arrays["x_train"]})
    assert prepare(str(one), None, tmp_path) not in found[:2]  # a file that has changed
