"""Checkpoint store in real processes: `kill -9`, several ranks over gloo, a full disk, a read-only folder."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from everbatch import checkpoint
from everbatch.checkpoint import Piece
from everbatch.distributed import World

pytestmark = pytest.mark.distributed

# A server that imported torch once forks every child: 10 ms instead of 2 s, and this process's threads are not forked.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "pytest", "everbatch.checkpoint"])
LIMIT_S = 60.0


def launch(target: Callable[..., None], ranks: int, folder: Path, *args: object) -> None:
    """Run `target(rank, ranks, folder, *args)` in gloo ranks; a failure of any is raised here, and so is a hang."""
    context = mp.start_processes(
        _join, args=(target, ranks, folder, args), nprocs=ranks, join=False, start_method="forkserver"
    )
    assert context is not None
    deadline = time.monotonic() + LIMIT_S
    while not context.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{target.__name__} hung")


def _join(rank: int, target: Callable[..., None], ranks: int, folder: Path, args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=20)
    )
    target(rank, ranks, folder, *args)
    dist.destroy_process_group()


def in_child(target: Callable[..., str], *args: object) -> str:
    """The text that `target` returns in a process of its own."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=_answer, args=(theirs, target, args))
    process.start()
    theirs.close()
    try:
        assert ours.poll(LIMIT_S), f"{target.__name__} hung"
        return str(ours.recv())
    finally:
        process.kill()
        process.join()


def _answer(connection: Connection, target: Callable[..., str], args: tuple[object, ...]) -> None:
    connection.send(target(*args))


def value_pieces(value: int, numel: int) -> list[Piece]:
    tensors = {"a": torch.full((numel,), float(value)), "b": torch.full((numel // 7,), value), "c": torch.tensor(value)}
    return [Piece(name, tuple(tensor.shape), 0, tensor) for name, tensor in tensors.items()]


def saved_value(found: checkpoint.Checkpoint | None) -> int:
    assert found is not None
    values = {found.meta["value"], *(v for n in found.names() for v in found.whole(n).unique().tolist())}
    assert len(values) == 1, f"mixed checkpoint {found}: {values}"
    return int(values.pop())


def save_forever(connection: Connection, root: Path) -> None:
    """Save every step twice, one value higher each time; tell each value whose save has returned."""
    torch.set_num_threads(1)
    found = checkpoint.latest(root, world=World())
    value = 0 if found is None else saved_value(found)
    while True:
        value += 1
        checkpoint.save(root, value // 2, value_pieces(value, 100_000), {"value": value}, world=World())
        connection.send(value)


def test_kill_9_while_saving(tmp_path: Path) -> None:
    """After each of 16 kills the newest checkpoint is whole, without a warning, no older than the last confirmed."""
    rng, confirmed, kills_inside = random.Random(3), 0, 0
    for kill in range(16):
        ours, theirs = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=save_forever, args=(theirs, tmp_path))
        process.start()
        theirs.close()
        assert ours.poll(LIMIT_S)
        time.sleep(rng.uniform(0, 0.06))
        process.kill()
        process.join()
        while ours.poll():
            try:
                confirmed = ours.recv()
            except EOFError:
                break
        kills_inside += any(name.startswith(".") for name in os.listdir(tmp_path))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            value = saved_value(checkpoint.latest(tmp_path, world=World()))
        assert value in (confirmed, confirmed + 1), f"kill {kill}: found {value}, {confirmed} was confirmed"
    assert kills_inside >= 4  # otherwise the kills missed what they are for


def cuts(numel: int, ranks: int) -> Iterator[tuple[int, int]]:
    """Uneven slices of `numel` elements: the last rank gets most, ranks may get none."""
    edges = [numel * rank**2 // ranks**2 for rank in range(ranks + 1)]
    yield from zip(edges, edges[1:], strict=False)


TENSORS = {
    "w": torch.arange(77, dtype=torch.float32).view(7, 11), "b": torch.arange(5).bfloat16(), "one": torch.tensor([3]),
    "mask": torch.arange(10) % 3 == 0,
}


def sharded(rank: int, ranks: int) -> list[Piece]:
    pieces = []
    for name, tensor in TENSORS.items():
        low, high = list(cuts(tensor.numel(), ranks))[rank]
        pieces.append(Piece(name, tuple(tensor.shape), low, tensor.flatten()[low:high]))
    return pieces + ([Piece("replicated", (4,), 0, torch.full((4,), float("nan")))] if rank == 0 else [])


def three_ranks(rank: int, ranks: int, folder: Path) -> None:
    world, root = World.current(), folder / "root"
    assert checkpoint.latest(root, world=world) is None
    for step in (1, 2):
        path = checkpoint.save(root, step, sharded(rank, ranks), {"step": step, "rank": rank}, world=world)
        assert path == root / f"step-{step:08d}"
    found = checkpoint.latest(root, world=world)
    assert found is not None and found.step == 2 and found.meta == {"step": 2, "rank": 0}
    world.barrier()
    if rank == 1:  # damage in a file that another rank hashes
        os.truncate(root / "step-00000002" / "rank-00000.safetensors", 50)
    world.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = checkpoint.latest(root, world=world)
    assert found is not None and found.step == 1
    texts = [str(one.message) for one in caught if "damaged checkpoint" in str(one.message)]
    assert len(texts) == (1 if rank == 0 else 0)
    assert all("rank-00000.safetensors: has 50 bytes" in text and "step-00000001 is used" in text for text in texts)
    try:
        checkpoint.open(root / "step-00000002", world=world)
    except RuntimeError as error:
        assert "rank-00000.safetensors: has 50 bytes" in str(error)
    else:
        raise AssertionError("a damaged checkpoint was opened")
    for step, pieces, text in (
        (3 + rank, sharded(rank, ranks), r"ranks save different steps [3, 4, 5]"),
        (3, sharded(0, ranks), "were given twice"),
        (3, [Piece("x", (2,), 0, torch.ones(3))] if rank == 2 else [], "rank 2: ValueError: x: elements 0 to 3"),
    ):
        try:
            checkpoint.save(root, step, pieces, {}, world=world)
        except RuntimeError as error:
            assert text in str(error), error
        else:
            raise AssertionError(f"saved although {text}")
        world.barrier()
        assert sorted(os.listdir(root)) == ["step-00000001", "step-00000002"]
        world.barrier()


def test_three_ranks_save_and_any_world_reads(tmp_path: Path) -> None:
    launch(three_ranks, 3, tmp_path)
    found = checkpoint.open(tmp_path / "root" / "step-00000001")
    assert found.world_size == 3 and found.names() == ("b", "mask", "one", "replicated", "w")
    for name, tensor in TENSORS.items():
        assert torch.equal(found.whole(name), tensor) and found.dtype(name) == tensor.dtype
        for ranks in (1, 2, 4, 5):
            parts = [found.read(name, low, high - low) for low, high in cuts(tensor.numel(), ranks)]
            assert torch.equal(torch.cat(parts), tensor.flatten())
    assert found.whole("replicated").isnan().all()


def one_rank_full(rank: int, ranks: int, folder: Path) -> None:
    world, root = World.current(), folder / "root"
    big = [Piece("x", (200_000,), 100_000 * rank, torch.full((100_000,), 1.0))]
    checkpoint.save(root, 1, big, {}, world=world)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    for step in (1, 2):
        begin = time.monotonic()
        try:
            checkpoint.save(root, step, big, {}, world=world)
        except RuntimeError as error:
            assert "rank 1: OSError: [Errno 27] File too large" in str(error) and "rank 0" not in str(error), error
            assert "rank-00001.safetensors" in str(error) and "earlier checkpoints are untouched" in str(error)
        else:
            raise AssertionError("the disk of rank 1 was full")
        assert time.monotonic() - begin < 10
        world.barrier()
        assert os.listdir(root) == ["step-00000001"]
        world.barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoint.save(root, 2, big, {}, world=world)  # the job may go on and try again
    found = checkpoint.latest(root, world=world)
    assert found is not None and found.step == 2 and bool((found.whole("x") == 1).all())


def test_an_error_on_one_rank_is_raised_on_both(tmp_path: Path) -> None:
    launch(one_rank_full, 2, tmp_path)


def save_on_full_disk(root: Path, limit: int) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    pieces = value_pieces(2, 1000)
    try:
        checkpoint.save(root, 2, pieces, {"value": 2, "pad": "x" * 6000}, world=World())
    except RuntimeError as error:
        assert all(bool((piece.data == 2).all()) for piece in pieces)  # what is being trained is not touched
        return str(error)
    return "saved"


@pytest.mark.parametrize(("limit", "file"), [(600, "rank-00000.safetensors"), (5700, "manifest.json")])
def test_full_disk(tmp_path: Path, limit: int, file: str) -> None:
    meta = {"value": 1, "pad": "x" * 6000}
    checkpoint.save(tmp_path, 1, value_pieces(1, 1000), meta, world=World())
    text = in_child(save_on_full_disk, tmp_path, limit)
    assert file in text and "File too large" in text and "step 2 was not saved" in text
    assert os.listdir(tmp_path) == ["step-00000001"]
    found = checkpoint.latest(tmp_path, world=World())
    assert found is not None and found.meta == meta


def save_as_nobody(root: Path) -> str:
    if os.getuid() == 0:
        os.setuid(65534)  # root may write anywhere
    texts = []
    for path in (root, root / "step-00000001" / "deeper"):
        try:
            checkpoint.save(path, 2, value_pieces(2, 10), {"value": 2}, world=World())
        except RuntimeError as error:
            texts.append(str(error))
    try:
        checkpoint.export_weights(root / "model.safetensors", {"x": torch.ones(2)})
    except RuntimeError as error:
        texts.append(str(error))
    found = checkpoint.latest(root, world=World())  # needs no right to write
    return f"{saved_value(found)}: {' | '.join(texts)}"


def test_read_only_folder() -> None:
    folder = Path(tempfile.mkdtemp())  # the folders that pytest gives are closed to other users
    try:
        root = folder / "root"
        checkpoint.save(root, 1, value_pieces(1, 10), {"value": 1}, world=World())
        folder.chmod(0o755)
        root.chmod(0o555)
        (root / "step-00000001").chmod(0o555)
        text = in_child(save_as_nobody, root)
        assert text.startswith("1: checkpoint") and text.count("Permission denied") == 3, text
        assert os.listdir(root) == ["step-00000001"]
    finally:
        root.chmod(0o755)
        (root / "step-00000001").chmod(0o755)
        shutil.rmtree(folder)
