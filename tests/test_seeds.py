"""Stateless randomness: functions of their keys, whoever asks, and for whichever slice."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from everbatch import seeds


def test_derive_is_blake2b_of_typed_parts() -> None:
    digest = hashlib.blake2b(b"int:3\x1fstr:noise", digest_size=8).digest()
    assert seeds.derive(3, "noise") == int.from_bytes(digest, "little") >> 1
    assert 0 <= seeds.derive("x") < 2**63


def test_keys_do_not_run_into_each_other() -> None:
    keys = [(1, 23), (12, 3), ("1", 23), (1, "23"), ("123",), (123,), (1, 2, 3)]
    assert len({seeds.derive(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize("start", [0, 1, seeds.BLOCK - 3, seeds.BLOCK, 2 * seeds.BLOCK + 7])
@pytest.mark.parametrize("count", [0, 1, 5, seeds.BLOCK, seeds.BLOCK + 9])
def test_a_slice_of_the_normal_sequence_is_the_slice_of_the_whole(start: int, count: int) -> None:
    whole = seeds.normal((7, "w"), 0, 4 * seeds.BLOCK)
    part = seeds.normal((7, "w"), start, count)
    assert part.dtype == torch.float32 and torch.equal(part, whole[start : start + count])


def test_normal_is_standard_normal_and_its_blocks_differ() -> None:
    x = seeds.normal((0, "stats"), 0, 4 * seeds.BLOCK)
    n = len(x)
    assert abs(x.mean().item()) < 5 / n**0.5 and abs(x.var().item() - 1) < 5 * (2 / n) ** 0.5
    assert not torch.equal(x[: seeds.BLOCK], x[seeds.BLOCK : 2 * seeds.BLOCK])
    assert not torch.equal(x, seeds.normal((1, "stats"), 0, n))


def test_global_streams_are_not_touched() -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    kept, kept_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]  # noqa: NPY002
    seeds.normal((1,), 0, 10)
    seeds.generator(1).initial_seed()
    seeds.numpy_generator(1).random()
    seeds.uniform_keys(np.arange(3), 1)
    assert torch.equal(torch.get_rng_state(), kept)
    assert np.array_equal(np.random.get_state()[1], kept_numpy)  # type: ignore[index]  # noqa: NPY002


def test_generators_repeat() -> None:
    assert seeds.generator(1, "a").initial_seed() == seeds.derive(1, "a")
    assert np.array_equal(seeds.numpy_generator(1, "a").integers(0, 99, 5), seeds.numpy_generator(1, "a").integers(0, 99, 5))


def test_uniform_keys_depend_on_the_id_alone() -> None:
    ids = np.array([5, 0, 2**40, 17])
    keys = seeds.uniform_keys(ids, 3, "buffer")
    assert keys.dtype == np.float64 and ((keys > 0) & (keys < 1)).all() and len(set(keys)) == 4
    assert np.array_equal(seeds.uniform_keys(ids[::-1], 3, "buffer"), keys[::-1])
    assert not np.array_equal(seeds.uniform_keys(ids, 4, "buffer"), keys)
    many = seeds.uniform_keys(np.arange(100_000), 0)
    assert abs(many.mean() - 0.5) < 5 / (12 * 100_000) ** 0.5


def test_uniform_keys_are_splitmix64() -> None:
    def reference(value: int) -> float:
        mask = 2**64 - 1
        z = (value * 0x9E3779B97F4A7C15 + seeds.derive(9)) & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return (((z ^ (z >> 31)) >> 11) + 0.5) * 2.0**-53

    assert seeds.uniform_keys(np.array([0, 1, 12345]), 9).tolist() == [reference(v) for v in (0, 1, 12345)]


def test_seed_step_depends_on_seed_step_and_rank() -> None:
    def draw(*key: int) -> float:
        seeds.seed_step(*key)
        return torch.rand(()).item()

    first = draw(0, 1, 0)
    assert draw(0, 1, 0) == first
    assert len({first, draw(1, 1, 0), draw(0, 2, 0), draw(0, 1, 1)}) == 4


def test_seed_step_is_torchs_own_seeding() -> None:
    seeds.seed_step(3, 1, 0)
    fast = torch.get_rng_state()
    torch.manual_seed(seeds.derive(3, "step", 1, 0))
    assert torch.equal(fast, torch.get_rng_state())


def test_seeds_of_several_ids_are_those_of_each() -> None:
    ids = [0, -5, 2**40]
    assert seeds.derive_each(ids, 3, "augment", "stream", 7) == [seeds.derive(3, "augment", "stream", 7, i) for i in ids]
    assert seeds.derive_each(ids) == [seeds.derive(i) for i in ids]
    with pytest.raises(ValueError, match="unit separator"):
        seeds.derive_each(ids, "a\x1fb")
