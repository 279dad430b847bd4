"""Experts in a frozen vision transformer learn one task after the other; SAME keeps routers and experts right for earlier ones.

torchrun --nproc-per-node 2 recipes/same.py                          digits: trained on four of them first, once, then three tasks
torchrun --nproc-per-node 2 recipes/same.py same.router=free same.curvature=false           experts without SAME's rules
torchrun --nproc-per-node 2 recipes/same.py data.source=imagefolder:PATH data.image_size=32 model.options.patch_size=4
torchrun --nproc-per-node 8 recipes/same.py --config recipes/same/vit_b16.yaml data.source=imagefolder:PATH       timm's weights

Needs no download: the network is trained here, on a part of the data, and kept; or it is timm's, from the local cache.
"""

from __future__ import annotations

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

from everbatch.experiment import Experts as Recipe
from everbatch.experiment import main

if __name__ == "__main__":
    main(Recipe, __file__)
