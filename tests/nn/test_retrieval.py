"""Retrieval: all rows together as each alone, few passes, and ranks that need different numbers of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from everbatch.nn import AdapterLayout, AdapterTrunk, Retrieved, attach_adapters, flat_adapters, load_adapters, retrieve
from processes import Zygote
from rotation import When

Case = tuple[VisionTransformer, Tensor, Callable[[Tensor], Tensor], Tensor, Tensor]


def case(tasks: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Case:
    """A network, an archive of strong adapters, a random head and prototypes: samples go to and fro between them."""
    torch.manual_seed(seed)
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=12, depth=3, num_heads=2, num_classes=0).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that the class token tells images apart
            parameter.mul_(20.0 if parameter.ndim > 1 else 1.0)
    attach_adapters(model, 4, scale=1.0)
    archive = 0.4 * torch.randn(tasks, AdapterLayout.of(model).size, dtype=dtype)
    weight, bias = torch.randn(2 * tasks, 12, dtype=dtype), torch.zeros(2 * tasks, dtype=dtype)
    prototypes = torch.randn(2 * tasks, 12, dtype=dtype)
    return model, archive, lambda f: F.linear(f, weight, bias), prototypes, torch.arange(2 * tasks) // 2


def images(n: int = 24, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(4), dtype=dtype)


def features_of(model: VisionTransformer, vector: Tensor, x: Tensor) -> Tensor:
    """With the live parameters, by timm's own forward."""
    load_adapters(model, vector)
    found: Tensor = model.forward_head(model.forward_features(x), pre_logits=True)
    return found


@torch.no_grad()
def one_by_one(case: Case, x: Tensor) -> tuple[list[list[int]], Tensor, list[bool]]:
    """The rule as it is written, sample by sample: paths, logits, and whether the cap was met."""
    model, archive, head, prototypes, cls2task = case
    kept, paths, logits, capped = flat_adapters(model), [], [], []
    for row in x.split(1):
        cosines = F.cosine_similarity(features_of(model, archive[0], row), prototypes)
        task, path = int(cls2task[cosines.argmax()]), []
        while True:
            z = head(features_of(model, archive[task], row))[0]
            path.append(task)
            following = int(cls2task[z.argmax()])
            if following == task or len(path) == 4:
                break
            task = following
        paths.append(path)
        logits.append(z)
        capped.append(following != task)
    load_adapters(model, kept)
    return paths, torch.stack(logits), capped


def ask(case: Case, x: Tensor, trunk: AdapterTrunk, **options: object) -> Retrieved:
    _, archive, head, prototypes, cls2task = case
    return retrieve(trunk, x, head, prototypes, cls2task, len(archive), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "far"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_features_are_those_of_each_adapter_alone(dtype: torch.dtype, far: float) -> None:
    model, archive, *_ = case(5, dtype)
    trunk, x = AdapterTrunk(model, archive), images(10, dtype)
    first, start = trunk.first(x)
    tasks = torch.tensor([0, 1, 2, 3, 4, 4, 3, 2, 1, 1])
    together = trunk.again(start, tasks)
    for row, task in enumerate(tasks.tolist()):
        alone = features_of(model, archive[task], x[row:row + 1])
        assert (together[row] - alone[0]).norm() <= far * alone.norm()
    alone = features_of(model, archive[0], x)
    assert (first - alone).norm() <= far * alone.norm()
    assert (trunk.passes, trunk.rows) == (2, 20)


@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_a_batch_goes_the_ways_of_its_samples(tasks: int) -> None:
    made, x = case(tasks), images()
    model, archive = made[:2]
    live, stored = flat_adapters(model), archive.clone()
    trunk = AdapterTrunk(model, archive)
    found = ask(made, x, trunk)
    paths, logits, capped = one_by_one(made, x)
    assert [[task for task in path if task >= 0] for path in found.path.tolist()] == paths
    torch.testing.assert_close(found.logits, logits, rtol=1e-11, atol=1e-11)
    scores = found.logits.softmax(1) + (tasks * found.cosines).softmax(1)
    torch.testing.assert_close(found.scores, scores, rtol=1e-12, atol=1e-12)
    assert tasks < 7 or (any(capped) and not all(capped))
    assert trunk.passes == 1 + found.rounds <= 1 + min(4, tasks - 1)
    # A sample is under an adapter once, and under the first one in any case.
    assert trunk.rows == sum(len({0, *path}) for path in paths)
    again = ask(made, x.flip(0), AdapterTrunk(model, archive), ensemble=False)
    torch.testing.assert_close(again.scores.flip(0), logits, rtol=1e-11, atol=1e-11)
    assert torch.equal(flat_adapters(model), live) and torch.equal(archive, stored)


def test_the_surest_of_those_that_never_agree() -> None:
    made, x = case(7), images()
    paths, _, capped = one_by_one(made, x)
    model, archive, head, *_ = made
    found = ask(made, x, AdapterTrunk(model, archive), on_cycle="max_confidence", ensemble=False)
    plain = ask(made, x, AdapterTrunk(model, archive), ensemble=False)
    changed = 0
    for row, (path, cycles) in enumerate(zip(paths, capped, strict=True)):
        tried = torch.cat([head(features_of(model, archive[task], x[row:row + 1])).detach() for task in path])
        best = tried[tried.softmax(1).amax(1).argmax()] if cycles else tried[-1]
        torch.testing.assert_close(found.scores[row], best, rtol=1e-11, atol=1e-11)
        changed += not torch.allclose(best, plain.scores[row])
    assert 0 < changed <= sum(capped)


def test_equal_adapters_are_asked_once_or_twice() -> None:
    model, archive, head, prototypes, cls2task = case(4)
    same = archive[:1].expand(4, -1).contiguous()
    found = retrieve(AdapterTrunk(model, same), images(), head, prototypes, cls2task, 4)
    assert int((found.path >= 0).sum(1).max()) <= 2
    torch.testing.assert_close(found.logits, head(features_of(model, same[0], images())).detach(), rtol=1e-11, atol=1e-11)


class Lockstep:
    """Stands for the ranks: bits of this one are met by those of another, round by round."""

    def __init__(self, others: list[bool]) -> None:
        self.others, self.asked = others, 0

    def all(self, idle: bool, device: object) -> bool:
        other = self.others[self.asked] if self.asked < len(self.others) else True
        self.asked += 1
        return idle and other


def test_an_idle_rank_goes_along() -> None:
    made, x = case(5), images(6)
    model, archive = made[:2]
    alone = ask(made, x, AdapterTrunk(model, archive))
    trunk = AdapterTrunk(model, archive)
    found = ask(made, x, trunk, sharded=Lockstep([False] * 4))
    assert found.rounds == 4 == trunk.passes - 1 and trunk.rows < 6 * 5
    assert torch.equal(found.path, alone.path)
    torch.testing.assert_close(found.scores, alone.scores, rtol=1e-12, atol=1e-12)
    one = case(1)
    trunk = AdapterTrunk(*one[:2])
    assert ask(one, x, trunk, sharded=Lockstep([False, False])).rounds == 2 and trunk.rows == 6 + 2


def test_refusals() -> None:
    model, archive, head, prototypes, cls2task = case(2)
    trunk = AdapterTrunk(model, archive)
    with pytest.raises(ValueError, match="on_cycle='stop', must be cap or max_confidence"):
        ask((model, archive, head, prototypes, cls2task), images(), trunk, on_cycle="stop")
    with pytest.raises(ValueError, match="a class of task 1 and 1 adapters"):
        retrieve(trunk, images(), head, prototypes, cls2task, 1)
    with pytest.raises(ValueError, match=r"an archive of shape \(2, 3\)"):
        AdapterTrunk(model, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="a Sequential, must be a vision transformer of timm itself"):
        AdapterTrunk(nn.Sequential(model), archive)
    with pytest.raises(ValueError, match="in training mode"):
        AdapterTrunk(model.train(), archive).first(images())


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "hosts"), [
    When(0, 6).param(2, ("fsdp2",)), When(3, 6).param(2, ("zero3",)),
    pytest.param(3, ("zero3", "fsdp2", "ddp"), marks=pytest.mark.slow)])
def test_ranks_that_need_different_numbers_of_rounds(
    zygote: Zygote, tmp_path: Path, ranks: int, hosts: tuple[str, ...],
) -> None:
    """All run as many passes as the one that needs most; each has what one process has."""
    jobs = Path(__file__).with_name("retrieval_ranks.py")
    found = zygote.found(jobs, tmp_path / "found.json", *hosts, ranks=ranks, limit=240)
    assert list(found) == list(hosts)
    for told in found.values():
        assert told["rows"] == [2 + rank for rank in range(ranks)]
        assert told["rounds"] == [ranks - 1] * ranks and told["passes"] == [ranks] * ranks
        assert all(told["paths"]) and all(told["as before"]) and max(told["off"]) < 1e-5
