"""What stands between the tuning phase and the evaluation data: refused, or useless, or seen by its content."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from everbatch import config
from everbatch.data import load
from everbatch.data.load import _KINDS as KINDS
from everbatch.tune.check import check_npz
from everbatch.tune.commands import Prepare
from everbatch.tune.hashes import Known, row_hashes
from everbatch.tune.pair import EvaluationData, ScenarioPair, prepare
from everbatch.tune.pair import _places as places
from everbatch.tune.seal import LeakageError, Seal, ciphered, scrub
from everbatch.tune.search import Search
from processes import ROOT
from tuning import ATTACKS, images, pair, prepared, write

REFUSED = ("open", "os.open", "pathlib", "np.load", "np.memmap", "np.fromfile", "torch.load", "PIL", "listdir", "scandir",
           "relative", "chdir", "symlink", "link now", "move", "nonce", "original")
USELESS = ("torchvision", "child", "dir_fd", "hard link", "copy")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("leaks"))


@pytest.fixture(scope="module")
def attacked(run: Path) -> dict[str, str]:
    """What each attempt of a tuning process gave."""
    where = [str(run / "tuning"), str(run / "evaluation"), str(run.parent / "there.npz")]
    ended = subprocess.run([sys.executable, "-c", ATTACKS, *where], text=True, capture_output=True, timeout=120,
                           env={**os.environ, "PYTHONPATH": str(ROOT / "lib")})
    assert ended.returncode == 0, ended.stderr
    found: dict[str, str] = json.loads(ended.stdout.splitlines()[-1])
    assert {*found} == {*REFUSED, *USELESS}
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_the_hook_refuses_what_python_opens(name: str, attacked: dict[str, str]) -> None:
    assert attacked[name].startswith("refused: tune: "), attacked[name]


@pytest.mark.parametrize("name", USELESS)
def test_what_no_hook_sees_reads_sealed_bytes_alone(name: str, attacked: dict[str, str], run: Path) -> None:
    got = bytes.fromhex(attacked[name].removeprefix("read "))
    assert got == (run / "evaluation" / "data.sealed").read_bytes()
    opened = ciphered(EvaluationData(run / "evaluation").nonce(), got)
    rows = images(1)[0]
    assert opened.count(rows[0].tobytes()) == 1  # the samples are in there, one after the other,
    assert not any(row.tobytes()[:16] in got for row in rows)  # and no part of one can be read
    assert b"x_train" in opened and b"x_train" not in got


def test_the_original_is_sealed_wherever_a_text_says_that_it_lies() -> None:
    there = {"npz": "npz:/a/b.npz", "imagefolder": "imagefolder:/a/b", "huggingface": "huggingface:/a/b",
             "torchvision": "torchvision:MNIST:/a/b", "path": "/a/b"}
    assert {*there} - {"path"} == {*KINDS} - {"digits"}
    for text in there.values():
        assert [str(place).removesuffix(".npz") for place in places(text)] == ["/a/b"], text
    assert places("digits")[0].is_file()


def test_the_nonce_can_lie_elsewhere(tmp_path: Path) -> None:
    prepare(pair(tmp_path), str(tmp_path / "run"), str(tmp_path / "safe" / "nonce"))
    assert {path.name for path in (tmp_path / "run" / "evaluation").iterdir()} == {"data.sealed", "plan.json"}
    with pytest.raises(ValueError, match="no nonce at .*; say nonce=PATH"):
        EvaluationData(tmp_path / "run" / "evaluation").open()
    (tmp_path / "wrong").write_text("00" * 32)
    with pytest.raises(ValueError, match="opens to something else, must be what `prepare` sealed"):
        EvaluationData(tmp_path / "run" / "evaluation", str(tmp_path / "wrong")).open()
    path = EvaluationData(tmp_path / "run" / "evaluation", str(tmp_path / "safe" / "nonce")).open()
    assert np.array_equal(load(path, train=True).targets, images(1)[1])
    assert (tmp_path / "safe" / "nonce").stat().st_mode & 0o077 == 0


def test_samples_of_the_other_side_are_found_by_content(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuning"
    shutil.copytree(run / "tuning", folder, symlinks=True)
    seal, body = str(folder / "seal.json"), Seal.read(folder / "seal.json").body
    Seal.read(seal).check_samples(images(0)[0])
    with np.load(folder / "data.npz") as arrays:
        mine = dict(arrays)
    mine["x_train"][7] = images(1)[0][3][None]  # one among all
    np.savez(folder / "data.npz", **mine)  # type: ignore[arg-type]
    script = ("import sys; from pathlib import Path; from everbatch.tune.check import check_npz; "
              "check_npz(Path(sys.argv[1]), *sys.argv[2:])")
    ended = subprocess.run([sys.executable, "-c", script, str(folder / "data.npz"), body["data_sha256"], seal], text=True,
                           capture_output=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT / "lib")})
    assert "LeakageError: tune: 1 of 48 samples are evaluation data, must be none" in ended.stderr


def test_other_tuning_data_than_was_prepared_is_refused(run: Path, tmp_path: Path) -> None:
    write(tmp_path / "data.npz", 4)
    with pytest.raises(ValueError, match="with SHA-256 .*, as prepared"):
        check_npz(tmp_path / "data.npz", Seal.read(run / "tuning" / "seal.json").body["data_sha256"], None)


def test_a_handle_of_the_evaluation_data_cannot_be_pickled(run: Path) -> None:
    with pytest.raises(LeakageError, match="was pickled"):
        pickle.dumps(EvaluationData(run / "evaluation"))


def test_a_search_has_one_data_argument_and_no_name_for_the_other_side() -> None:
    text = config.help_text(Search, prog="search")
    options = [line.split()[0] for line in text.splitlines() if line.strip().startswith("--")]
    assert not [name for name in options if "eval" in name or "nonce" in name]
    assert [name for name in options if "data" in name] == ["--data"]


def test_the_environment_of_a_search_names_nothing_of_the_other_side(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seal = Seal.read(run / "tuning" / "seal.json")
    there = str(run / "evaluation")
    mine = {"PATH": "/usr/bin", "MY_DATA": "/elsewhere", "PYTHONPATH": f"/usr/lib:{there}/x", "OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(os, "environ", mine)
    assert scrub(seal) == ["MY_DATA", "PYTHONPATH"]  # one that is not known to be needed; one that is, and names it
    assert mine == {"PATH": "/usr/bin", "OMP_NUM_THREADS": "1"}


def test_the_tuning_folder_holds_nothing_but_hashes_of_the_other_side(run: Path) -> None:
    names = {path.name for path in (run / "tuning").iterdir()} - {"link", "hard", "copy"}  # what the attacks left
    assert names == {"data.npz", "seal.json"}
    text = (run / "tuning" / "seal.json").read_text()
    assert "evaluation/" not in text and "there" not in text and "b1" not in json.loads(text)["body"]["classes"]


# ------------------------------------------------------------------------------------------------------------ preparation
def test_one_shared_sample_is_found_at_prepare(tmp_path: Path) -> None:
    one = pair(tmp_path, evaluation=str(write(tmp_path / "mixed.npz", 1, share=1, of=0)))
    with pytest.raises(ValueError, match=r"1 of 48 samples in x_train to tune on, the first is sample \[0\]"):
        prepare(one, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def standardised(x: NDArray[Any]) -> NDArray[Any]:
    return (x.astype(np.float32) / 255 - np.float32(0.4914)) / np.float32(0.2023)


ENCODED: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "0 to 1": lambda x: x.astype(np.float32) / 255,
    "64 bits": lambda x: x[:, None] / 255,
    "standardised": standardised,
    "colour": lambda x: np.repeat(x[:, None], 3, axis=1),
    "standardised colour": lambda x: standardised(np.repeat(x[:, None], 3, axis=1)),
}


@pytest.mark.parametrize("name", ENCODED)
def test_one_shared_image_in_another_encoding_is_found(name: str, run: Path, tmp_path: Path) -> None:
    with np.load(write(tmp_path / "mixed.npz", 1, share=1, of=0)) as arrays:
        found = dict(arrays)
    found |= {part: ENCODED[name](found[part]) for part in ("x_train", "x_test")}
    np.savez(tmp_path / "mixed.npz", **found)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"1 of 48 samples .* sample \[0\], in the evaluation data too \(1 of them in another"):
        prepare(pair(tmp_path, evaluation=str(tmp_path / "mixed.npz")), str(tmp_path / "run"))
    seal = Seal.read(run / "tuning" / "seal.json")  # and by what a search opens
    with pytest.raises(LeakageError, match="2 of 2 samples are evaluation data"):
        seal.check_samples(ENCODED[name](images(1)[0][:2]))


def met(kept: NDArray[Any], asked: NDArray[Any]) -> list[bool]:
    """Whether each sample of one side is found among all of the other."""
    there = {one for row in row_hashes(b"salt", kept) for one in row}
    return [not there.isdisjoint(row) for row in row_hashes(b"salt", asked, asking=True)]


def test_digits_are_found_in_every_range_and_never_taken_for_others() -> None:
    x = load("digits", train=True).fetch(torch.arange(300)).numpy()
    as_bytes = np.round(x.astype(np.float32) * (255 / 16)).astype(np.uint8)
    for other in (as_bytes, x / 16, (x.astype(np.float32) - 4.9) / 6, standardised(as_bytes), (x / 16).astype(np.float16)):
        assert all(met(x, other)) and all(met(other, x))
        assert not any(met(x[:150], other[150:])) and not any(met(other[:150], x[150:]))
    every = [one for row in row_hashes(b"salt", x) for one in row]
    assert len({*every}) == len(every) == 3 * len(x)  # numbers, image, levels


def dots(low: float, high: float, seed: int) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    bright = rng.uniform(low, high, (300, 1, 1))
    return (np.eye(64)[rng.integers(0, 64, 300)].reshape(300, 8, 8) * bright).astype(np.float32)


def test_images_that_are_told_apart_by_their_range_are_no_copies_of_each_other() -> None:
    dim, bright = dots(0.1, 0.5, 0), dots(0.5, 1.0, 1)
    assert all(met(bright[:3], dim[(dim > 0).reshape(300, -1).argmax(1) == (bright[0] > 0).argmax()]))  # the same but for range
    known = Known.of(b"salt", [bright], [dim])
    assert known.recurring > 30
    assert not any(not known.hashes.isdisjoint(row) for row in row_hashes(b"salt", dim, asking=True))
    assert all(not known.hashes.isdisjoint(row) for row in row_hashes(b"salt", bright.astype(np.float64), asking=True))
    # One image of many that is there in two ranges is no image of the other side; all others are known in any.
    x = load("digits", train=True).fetch(torch.arange(1300)).numpy().astype(np.float32)
    twice = np.concatenate([x, x[:1] / 2])
    known = Known.of(b"salt", [twice], [x[:2] * 3])
    assert known.recurring == 0
    assert [not known.hashes.isdisjoint(row) for row in row_hashes(b"salt", x[:2] * 3, asking=True)] == [False, True]


def test_no_value_lies_on_a_step_of_either_image_hash() -> None:
    """All contrasts that bytes can have, and all that few levels have before and after they are rounded to bytes."""
    for high in range(1, 256):
        x = np.arange(high + 1, dtype=np.uint8)
        image = np.resize(x, (1, 1, 16, 16))
        assert all(met(image, standardised(image)) + met(standardised(image), image)), high
    for levels in range(1, 17):
        for low in range(levels):
            for high in range(low + 1, levels + 1):
                raw = np.resize(np.arange(low, high + 1), (1, 1, 8, 8)).astype(np.uint8)
                assert all(met(raw, np.round(raw * np.float32(255 / levels)).astype(np.uint8))), (levels, low, high)


def test_arrays_that_are_no_images_are_known_by_their_numbers_in_every_type() -> None:
    rng = np.random.default_rng(0)
    counts, real = rng.integers(-9, 2**20, (20, 6)), rng.normal(size=(20, 6))
    assert all(met(counts, counts.astype(float)) + met(counts.astype(np.float32), counts))
    assert all(met(real, real.astype(np.float32)) + met(real.astype(np.float32), real))
    assert met(np.zeros((1, 6)), np.full((1, 6), -0.0)) == [True]
    assert not any(met(real, 2 * real) + met(real, real * (1 + 1e-12)) + met(counts, counts + 1))
    seconds = 1.6e9 + np.arange(50.0)[:, None]  # all the same number in 32 bits
    assert not any(met(seconds[::2], seconds[1::2])) and all(met(seconds, seconds))
    large = 2**60 + np.arange(20)[:, None]
    assert not any(met(large[::2], large[1::2])) and all(met(large, large))
    grey = np.full((1, 1, 8, 8), 7, np.uint8)  # constant: known by its number alone
    assert met(grey, grey.astype(float)) == [True] and met(grey, grey + 1) == [False]
    odd = np.array([[np.nan, 1, np.inf]])
    assert met(odd, odd.astype(np.float32)) == [True]


def test_a_seal_of_an_earlier_version_is_refused(run: Path, tmp_path: Path) -> None:
    earlier = {**json.loads((run / "tuning" / "seal.json").read_text()), "format": 1}
    (tmp_path / "seal.json").write_text(json.dumps(earlier))
    with pytest.raises(ValueError, match="of format 1, from another version .*, must be of format 2; prepare again with another"):
        Seal.read(tmp_path / "seal.json")


def test_both_sides_from_one_file_are_refused_unless_their_classes_differ(tmp_path: Path) -> None:
    path = str(write(tmp_path / "all.npz", 0))
    done = prepare(ScenarioPair(tuning=path, evaluation=path, increments=(1, 1)), str(tmp_path / "halves"))
    assert done["classes"] == ["a0", "a1"]
    assert load(EvaluationData(tmp_path / "halves" / "evaluation").open(), train=False).classes == ("a2", "a3")
    with pytest.raises(ValueError, match=r"classes \['a1'\] on both sides"):
        chosen = {"tuning_classes": ("a0", "a1"), "evaluation_classes": ("a1", "a2")}
        ScenarioPair(tuning=path, evaluation=path, increments=(1, 1), **chosen)
    shutil.copy(path, tmp_path / "again.npz")
    with pytest.raises(ValueError, match="classes .* on both sides"):
        prepare(ScenarioPair(tuning=path, evaluation=str(tmp_path / "again.npz"), increments=(2, 2)), str(tmp_path / "same"))


BAD = [
    ({"increments": (2, 3)}, "sum to the number of classes"),
    ({"increments": ()}, "name the classes of each task"),
    ({"tuning_classes": ("a0", "a9"), "increments": (1, 1)}, "class 'a9' in tuning_classes"),
    ({"orders": 0}, "must be an integer >= 1"),
    ({"scenario": {"trainer.epoch": 2}}, "did you mean 'trainer.epochs'?"),
    ({"scenario": {"trainer.seed": 2}}, "the protocol sets it"),
    ({"scenario": {"data.sources": ["there.npz"]}}, "the protocol sets it"),
    ({"scenario": {"data": "there.yaml"}}, "the protocol sets it"),
    ({"scenario": {"split": {"blur": 0.2}}}, "the protocol sets it"),
    ({"scenario": {"seeds": 3}}, "the protocol sets it"),
    ({"scenario": {"optimizer": "mine.yaml"}}, "be the options themselves"),
    ({"scenario": {"trainer.epochs": len}}, "be a plain value"),
    ({"evaluation": "missing.npz"}, "missing.npz"),
    ({"scenario": {"optimizer.ewc.strength": 5}}, "optimizer.ewc.strength=5 in the scenario, must be left out; optimizer.e"),
    ({"scenario": {"optimizer": {"ewc": {}}}}, "optimizer.ewc={} in the scenario, must be left out"),
    ({"scenario": {"optimizer.ewc": None}}, "optimizer.ewc=None in the scenario, must be left out"),
    ({"scenario": {"lwf": {"strength": 1.0}}}, "lwf is a method's"),
    ({"scenario": {"replay.method": "er"}}, "replay is a method's, but for replay.capacity"),
    ({"scenario": {"replay": None}}, "replay=None in the scenario, must be left out"),
    ({"scenario": {"method": "er"}}, "method='er' in the scenario, must be left out; `search` names the methods"),
]


@pytest.mark.parametrize(("options", "said"), BAD)
def test_a_pair_that_cannot_be_is_refused(options: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        prepare(pair(tmp_path, **options), str(tmp_path / "run"))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_scenario_says_how_all_methods_are_trained_remembered_and_measured() -> None:
    given = {"optimizer.weight_decay": 1e-4, "optimizer.lr": 0.1, "replay.capacity": 5, "episodic.capacity": 7, "plasticity": {}}
    assert ScenarioPair(scenario=given).whole_scenario.items() >= given.items()


def test_classes_that_are_digits_need_no_quotes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def parsed(*words: str) -> Prepare:
        return config.parse(Prepare, list(words), prog="prepare")

    plain = parsed("tuning_classes=[0,1]", 'evaluation_classes=["2",3]', "increments=[2]").pair
    quoted = parsed('tuning_classes=["0","1"]', 'evaluation_classes=["2","3"]', "increments=[2]").pair
    assert plain == quoted == ScenarioPair(tuning_classes=(0, "1"), evaluation_classes=(2, 3), increments=(2,))
    assert plain.tuning_classes == ("0", "1")
    assert prepare(plain, str(tmp_path / "run"))["classes"] == ["0", "1"]
    assert prepare(quoted, str(tmp_path / "run"))["written"] is False
    for wrong in ("[0,0.5]", "[true]", '[0,"0"]'):
        with pytest.raises(SystemExit):
            parsed(f"tuning_classes={wrong}")
        said = capsys.readouterr().err
        assert "tuning_classes" in said and ("each text or a whole number" in said or "name every class once" in said), said


def test_the_same_pair_is_prepared_once_and_another_one_elsewhere(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert prepare(pair(tmp_path), str(run))["written"] is False
    with pytest.raises(ValueError, match="orders=3 in .*, prepared with 2, must be the same; name another output"):
        prepare(pair(tmp_path, orders=3), str(run))
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_an_output_inside_the_data_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for name in ("cat", "dog", "owl", "yak"):
        (folder / name).mkdir(parents=True)
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "owl", "yak"):
        for number in range(5):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")
    halves = ScenarioPair(tuning=str(folder), evaluation=str(folder), increments=(1, 1), image_size=8)
    with pytest.raises(ValueError, match="must lie outside of all data"):
        prepare(halves, str(folder / "runs"))
    assert prepare(halves, str(tmp_path / "run"))["classes"] == ["cat", "dog"]  # folders are a pair too
