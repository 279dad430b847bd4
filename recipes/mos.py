"""MOS: an adapter for each task beside a frozen vision transformer, on any number of ranks.

torchrun --nproc-per-node 2 recipes/mos.py                              digits: trained on 4 classes, then 3 tasks of 2, ZeRO-1
torchrun --nproc-per-node 2 recipes/mos.py mos.alpha=0 output=runs/mos_unmerged
torchrun --nproc-per-node 2 recipes/mos.py data.source=OMNIGLOT data.leaf_classes=true data.channels=1 data.image_size=28
bash launch/torchrun.sh recipes/mos.py --config recipes/mos/cifar100_b0_inc5.yaml                         pretrained weights
"""

from __future__ import annotations

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

from everbatch.experiment import AdaptedTasks as Recipe
from everbatch.experiment import main

if __name__ == "__main__":
    main(Recipe, __file__)
