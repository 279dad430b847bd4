"""Projections of the suite's net, of every kind: one side, both, jointly, and a basis for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from everbatch.optim.subspace.transforms import Projection, damped, null_space, rows


def basis(width: int, rank: int) -> Tensor:
    """Orthonormal columns, the same everywhere."""
    g = torch.Generator().manual_seed(100 * width + rank)
    return torch.linalg.qr(torch.randn(width, rank, generator=g, dtype=torch.float64))[0].float().contiguous()


MAPS = {
    "0.weight": Projection(left=null_space(basis(31, 5)), right=damped(basis(20, 4), torch.linspace(2, 0.1, 4), 0.1)),
    "3.weight": Projection(right=null_space(rows([basis(31, 1 + j % 3) for j in range(17)]))),
    "5.weight": Projection(left=null_space(basis(5, 2)), right=null_space(basis(17, 4)), joint=True),
}
RIGHT = {"0.weight": Projection(right=null_space(basis(20, 6))), "3.weight": MAPS["3.weight"]}
