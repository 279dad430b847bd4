"""Step time, arithmetic and traffic of ConAdv's placements on the trainer, against plain training and the same batch unattacked.

python benchmarks/speed/conadv.py --json conadv.json               every placement; launches torchrun itself for "ranks"
python benchmarks/speed/conadv.py --device cuda --json gpu.json    "stream" against "inline", ResNet-50, bf16 autocast

All arms of one launch alternate in blocks; a trainer has core 0 and one thread, its adversary core 1. FLOPs are counted per
operator below autograd, and bytes by ConAdv itself; both are compared with what theory says exactly. "split" arms cut the batch,
so that the trainer sees as many samples as plain training, and run both parts in one forward. Blocks are short and many, and an
arm is compared with its base in the same round (`timing.paired`). The script starts itself again with glibc keeping its memory
(see sharpness.py). A verdict is "undecided" where the limit lies within what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from conadv_arms import nets
from conadv_costs import fleet
from conadv_stream import stream_part
from conadv_timing import pinned, report, run_arms

from everbatch.report.recorder import versions
from everbatch.train.adversarial import serve, split_ranks

KEEP = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296", "OMP_NUM_THREADS": "1"}
LAUNCHES = {"beside": ("inline", "sequential", "vanilla", "process split", "mixed split", "mixed once", "mixed", "process"),
            "ranks": ("vanilla", "mixed", "ranks"), "ranks split": ("mixed split", "vanilla", "ranks split")}
"""Arms in the order of a round: next to what they are compared with."""


def launch(name: str, which: str, args: argparse.Namespace) -> dict[str, Any]:
    """One trainer and one adversary under torchrun. An adversary serves one shape of batch: split ones are another launch."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        options = [f"--net={name}", f"--launch={which}", f"--blocks={args.blocks}", f"--steps={args.steps}", f"--json={out}"]
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
                        f"--master-port={port}", __file__, *options, *["--tiny"] * args.tiny], check=True, timeout=600)
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def rank_main(args: argparse.Namespace) -> None:
    """A rank of `launch`."""
    role, net = split_ranks(1, "cpu"), nets(args.tiny)[args.net]
    if role.adversary:
        with pinned(1):
            serve(role, net.build(), device="cpu")
        return
    args.json.write_text(json.dumps(run_arms(LAUNCHES[args.launch], net, args.blocks, args.steps)))
    dist.destroy_process_group()


def main() -> None:
    """Measure, print, and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--steps", type=int, default=1, help="steps of a block; 5 times as many where latency-bound, 10 if short")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--net", help="only this one: compute-bound, latency-bound or short steps")
    parser.add_argument("--launch", choices=list(LAUNCHES), help="only this one")
    parser.add_argument("--arms", nargs="+", choices=LAUNCHES["beside"], metavar="ARM",
                        help="with 'beside', only these and 'vanilla': pairs lie closer together")
    parser.add_argument("--device", help="'stream' against 'inline' there, in place of the CPU placements")
    parser.add_argument("--tiny", action="store_true", help="a net that measures nothing, for tests")
    args = parser.parse_args()
    if args.net not in (None, *(known := nets(args.tiny))):
        parser.error(f"--net {args.net}: must be one of {', '.join(known)}")
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        return rank_main(args)
    beside = tuple(arm for arm in LAUNCHES["beside"] if arm in (args.arms or LAUNCHES["beside"]) or arm == "vanilla")
    result: dict[str, Any] = {"versions": versions(), "load_before": os.getloadavg()}
    if args.device is not None:
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            return print("no CUDA here: nothing was measured; --device cpu --tiny runs the same code")
        result["stream"] = stream_part(args.device, args.tiny, args.blocks, args.steps)
    else:
        for name, net in nets(args.tiny).items():
            for which in LAUNCHES if args.net in (None, name) else ():
                if args.launch not in (None, which):
                    continue
                done = run_arms(beside, net, args.blocks, args.steps) if which == "beside" else launch(name, which, args)
                report(f"{name}, {which}, batch {net.batch}", done)
                result[f"{name}, {which}"] = done
        result["fleet"] = fleet()
        print("\nResNet-50 in bf16, 1,024 trainers of 96 images, 342 adversaries; MB per step:")
        print("\n".join(f"  {what:<40}{size / 1e6:>10.1f}" for what, size in result["fleet"].items()))
    result["load_after"] = os.getloadavg()
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in KEEP.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **KEEP})
    main()
