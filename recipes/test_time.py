"""A network in use: corrupted images, labels in runs, no label to learn from; five ways to go on.

torchrun --nproc-per-node 2 recipes/test_time.py            digits: source, batch statistics, UnMix-TNS, Tent, CoTTA; ZeRO-1
torchrun --nproc-per-node 2 recipes/test_time.py arms=[source,unmix] order=iid trainer.batch_size=4
torchrun --nproc-per-node 2 recipes/test_time.py data.source=imagefolder:PATH data.image_size=32 reset=false
"""

from __future__ import annotations

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

from everbatch.experiment import CorruptedStream as Recipe
from everbatch.experiment import main

if __name__ == "__main__":
    main(Recipe, __file__)
