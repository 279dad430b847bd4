"""A regression whose inputs are attacked on another rank: one trainer, one adversary. OUT.pt gets the trainer's weights."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import texts

from everbatch.experiment import guard
from everbatch.train.adversarial import serve, split_ranks


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    role = split_ranks(1, "cpu", timeout_s=60)
    if role.adversary:
        serve(role, texts.predictor(), device="cpu")
        return
    with guard("elsewhere_worker"):
        torch.save(texts.attacked("regression", placement="ranks"), sys.argv[1])


if __name__ == "__main__":
    main()
