"""One model, one data set, a large batch: LARS with warm-up and decay, concurrent adversarial learning, accumulation.

torchrun --nproc-per-node 2 recipes/large_batch.py                       digits, a small ResNet, batch 512 on DeepSpeed ZeRO-1
torchrun --nproc-per-node 2 recipes/large_batch.py conadv=null           the same without the adversarial part
torchrun --nproc-per-node 2 recipes/large_batch.py global_batch=256 lr_rule=linear base_batch=512
bash launch/torchrun.sh recipes/large_batch.py --config recipes/large_batch/resnet50_32k.yaml data.source=imagefolder:PATH

`global_batch` is what one update sees, `micro_batch` what one rank holds at a time; micro-batches are accumulated in between.
"""

from __future__ import annotations

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

from everbatch.experiment import LargeBatch as Recipe
from everbatch.experiment import main

if __name__ == "__main__":
    main(Recipe, __file__)
