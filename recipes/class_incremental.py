"""Class-incremental learning with rehearsal, on any number of ranks.

torchrun --nproc-per-node 2 recipes/class_incremental.py                         scikit-learn's digits, DER++, DeepSpeed ZeRO-1
torchrun --nproc-per-node 2 recipes/class_incremental.py replay=null             plain fine-tuning on the same stream
torchrun --nproc-per-node 8 recipes/class_incremental.py data.source=imagefolder:PATH model.name=resnet18 data.image_size=64
"""

from __future__ import annotations

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

from everbatch.experiment import ClassIncremental as Recipe
from everbatch.experiment import main

if __name__ == "__main__":
    main(Recipe, __file__)
