"""ConAdv and the accuracy that large batches lose."""

from __future__ import annotations

from benchmarks.ledger import Claim, Contrast, Paper
from benchmarks.protocols.large_batch import ARMS, Scale, arms, train


def shrinks(scale: Scale) -> tuple[Contrast, ...]:
    """How much smaller each method's gap to the smallest batch is than plain LARS's, batch by batch."""
    first, last = scale.batches[0], scale.batches[-1]
    return tuple(
        Contrast(says=f"{ARMS[arm]}: gap {first} to {batch} smaller than LARS's by",
                 decides=(arm, batch) == ("conadv", last),
                 weights={f"lars/{first}": 1, f"lars/{batch}": -1, f"{arm}/{first}": -1, f"{arm}/{batch}": 1})
        for arm in ARMS if arm != "lars" for batch in scale.batches[1:])


CLAIM = Claim(
    title="ConAdv shrinks the accuracy gap of large batches",
    methods=("ConAdv",),
    paper=Paper(authors="Liu et al.", year=2022, ref="arXiv 2106.00221", where="abstract (ResNet-50 at batch 96K)"),
    says="Adversarial training on copies crafted one step earlier keeps the accuracy that large batches lose.",
    protocol="ImageNet, ResNet-50, LARS, 90 epochs, batches to 96K; 75.3 % top-1 at 96K.",
    scaled="Digits at 16 pixels, or a share of CIFAR-10 (data=DIR); a residual net of 78 thousand weights; the largest batch is "
    "left with few updates. LARS with lr sqrt(B / smallest), one setting for all arms, nothing tuned by arm.",
    run=train, scale=Scale(), arms=arms, rule=shrinks, seeds=3, minutes=5)
