"""The test-time recipe: arms over one corrupted stream, resumed, exported, refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from everbatch import config
from everbatch.experiment import CorruptedStream, run
from everbatch.experiment.served import corrupted
from everbatch.train import load_model, model_info
from rotation import When

SMALL = ("engine.kind=plain", "families=[gaussian_noise,contrast]", "pretraining.epochs=1", "pretraining.samples=20",
         "data.image_size=16", "data.augment=crop", "model.name=test_resnet", "cotta.views=1", "optimizer.base=adamw",
         "optimizer.lr=1e-4")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERBATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def options(output: Path, *words: str) -> CorruptedStream:
    return config.parse(CorruptedStream, [*SMALL, f"output={output}", *words])


@pytest.mark.rotated(3, 12)
def test_the_stream_is_ordered_and_the_same_for_every_arm(tmp_path: Path) -> None:
    stream = corrupted(options(tmp_path))
    assert stream.ordered and stream.boundaries and [len(t.train_ids) for t in stream.tasks] == [430, 430]
    labels = stream.targets(stream.tasks[0].train_ids)
    runs = int((labels.diff() != 0).sum())
    assert runs < 100 < int((stream.targets(corrupted(options(tmp_path, "order=iid")).tasks[0].train_ids).diff() != 0).sum())
    first, second = (stream.fetch(torch.tensor([t.train_ids.min()])) for t in stream.tasks)
    assert isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
    assert first.dtype == second.dtype and not torch.equal(first, second) and float(first.max()) <= 16
    assert not corrupted(options(tmp_path, "reset=false")).boundaries


@pytest.mark.rotated(0, 12)
def test_arms_are_compared_and_kept(tmp_path: Path) -> None:
    found = run(options(tmp_path, "arms=[source,unmix,cotta]"))
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept["online"].keys() == {"source", "unmix", "cotta"} and kept["steps"] == found.steps == 3 * 2 * 6
    assert kept["left_out"] == 2 * (430 - 6 * 64)
    assert all(0 < arm["by_family"]["contrast"] <= 1 for arm in kept["online"].values())
    again = run(options(tmp_path, "arms=[source,unmix,cotta]", "resume=true"))
    for arm, values in again.values["online"].items():
        assert values["by_family"] == kept["online"][arm]["by_family"]
    told = model_info(tmp_path / "model-unmix.safetensors")
    assert told["normalisation"]["components_of"] == "rank 0"
    model = load_model(tmp_path / "model-unmix.safetensors")
    assert load_file(tmp_path / "model-unmix.safetensors").keys() == model.state_dict().keys()
    assert sum(name.endswith("component_means") for name in model.state_dict()) == len(told["normalisation"]["layers"]) > 5
    assert (tmp_path / "figures" / "online_accuracy.png").exists()


REFUSED = (
    (("arms=[]",), "arms=\\(\\), must name at least one"), (("families=[fogg]",), "did you mean 'fog'"),
    (("trainer.epochs=2",), "trainer.epochs=2, must be 1"), (("severity=6",), "severity=6"),
    (("arms=[cotta]", "norms=batch", "unmix.num_components=4"), "unmix.*no arm has UnMix-TNS layers"),
    (("unmix.num_components=0",), "num_components=0"), (("bn_adapt.active=false",), "bn_adapt.active=false, must be left out"))


@pytest.mark.parametrize(("words", "says"), [When(i, len(REFUSED)).param(*row) for i, row in enumerate(REFUSED)])
def test_refused(words: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(tmp_path, *words)
    assert re.search(says, capsys.readouterr().err)
