"""Rows by sample id: any number of ranks asks for what one process holds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from everbatch.data import share
from everbatch.data.by_id import RowsById
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch

IDS = [40, 7, 99, 3, 12, 55, 8]


def values(ids: Any) -> Tensor:
    return torch.as_tensor(np.asarray(ids))[:, None] * torch.tensor([1.0, 0.5])


class Threads:
    """Ranks in threads, with an all-to-all among them."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.boxes = size, threading.Barrier(size, timeout=20), [()] * size

    def world(self, rank: int) -> Any:
        def exchange(rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
            self.boxes[rank] = rows.split(send)  # type: ignore[call-overload]
            self.barrier.wait()
            parts = [box[rank] for box in self.boxes]  # type: ignore[misc]
            assert [len(part) for part in parts] == receive
            self.barrier.wait()
            return torch.cat(parts)

        made: Any = type("Rank", (), {"rank": rank, "size": self.size, "exchange": staticmethod(exchange)})()
        return made

    def all(self, work: Callable[[Any], Any]) -> list[Any]:
        found: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            found[rank] = work(self.world(rank))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return found


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_any_number_of_ranks_fetches_the_same(size: int) -> None:
    wanted = [3, 99, 99, 40, 55, 8, 3, 7, 12]

    def work(world: Any) -> tuple[Tensor, dict[str, Any]]:
        held = RowsById(world)
        held.fill(values(held.begin(IDS)))
        assert len(held) == len(IDS)
        return held.fetch(wanted, share(len(wanted), size)), held.state_dict()

    found = Threads(size).all(work)
    assert torch.equal(torch.cat([rows for rows, _ in found]), values(wanted))

    # Saved by so many ranks, and taken over by one.
    whole = torch.cat([saved["rows"]["values"] for _, saved in found])
    one = RowsById(World())
    one.load_state_dict({"index": found[0][1]["index"], "start": 0, "rows": {"values": whole}})
    assert torch.equal(one.fetch(IDS, share(len(IDS), 1)), values(IDS))
    assert [saved["start"] for _, saved in found] == share(len(IDS), size)[:-1].tolist()


def test_what_is_not_there() -> None:
    held = RowsById(World())
    held.fill(values(held.begin(IDS)))
    with pytest.raises(ValueError, match=r"RowsById: sample \[4\], must be one of those that are held"):
        held.fetch([3, 4], share(2, 1))
    with pytest.raises(ValueError, match=r"RowsById: rows of \(2, 2\), must be \(n, k\) for this rank's 7 samples"):
        held.fill(values([1, 2]))
    with pytest.raises(CheckpointMismatch, match="RowsById: 2 rows for 3 samples"):
        held.load_state_dict({"index": {"slots": np.arange(3)}, "start": 0, "rows": {"values": values([1, 2])}})
    held.clear()
    assert len(held) == 0 and held.state_dict()["rows"] == {}
