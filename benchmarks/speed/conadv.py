"""Step time, arithmetic and traffic of ConAdv's placements on the trainer, against plain training and the same batch unattacked.

python benchmarks/speed/conadv.py --json conadv.json               every placement; launches torchrun itself for "ranks"
python benchmarks/speed/conadv.py --device cuda --json gpu.json    "stream" against "inline", ResNet-50, bf16 autocast

All arms of one launch alternate in blocks; a trainer has core 0 and one thread, its adversary core 1. FLOPs are counted per
operator below autograd, and bytes by ConAdv itself; both are compared with what theory says exactly. "split" arms cut the batch,
so that the trainer sees as many samples as plain training, and run both parts in one forward. The script starts itself again
with glibc keeping its memory (see sharpness.py). A verdict is "undecided" where the least times and the medians disagree.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parent))
from timing import conv_net, measure, ratios

from everbatch import compose
from everbatch.data import Batch
from everbatch.distributed import World
from everbatch.logging import versions
from everbatch.nn import convert_split_bn, split_branch
from everbatch.train import ConAdv
from everbatch.train.adversary import serve, split_ranks

KEEP = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296", "OMP_NUM_THREADS": "1"}
CONADV: dict[str, dict[str, Any]] = {"sequential": {"tau": 0}, **{p: {"tau": 1, "placement": p} for p in (
    "inline", "stream", "process", "ranks")}}
LAUNCHES = {"beside": ("vanilla", "mixed", "sequential", "inline", "process", "mixed once", "mixed split",
                        "process split"),
            "ranks": ("vanilla", "mixed", "ranks"), "ranks split": ("vanilla", "mixed split", "ranks split")}
# arm: (the arm it is compared with, limit). The first three are expectations from the arithmetic, with 5 % for what is no FLOP.
LIMITS = {"mixed": ("vanilla", 2.0 * 1.05), "sequential": ("vanilla", 8 / 3 * 1.05), "inline": ("vanilla", 8 / 3 * 1.05),
          "process": ("mixed", 1.05), "ranks": ("mixed", 1.10), "process split": ("vanilla", 1.15),
          "ranks split": ("vanilla", 1.15)}


@dataclass(frozen=True)
class Net:
    """What is trained, on how much."""

    build: Callable[[], nn.Module]
    batch: int
    side: int = 32
    """Of the square images."""
    precision: str = "fp32"
    more: int = 1
    """Times as many steps per block."""


def nets(tiny: bool = False) -> dict[str, Net]:
    """The nets of the CPU part. Latency-bound: twice the samples cost a few percent ("mixed once" shows it). Short steps: they
    cost twice as much, but a step is so short that handing a batch over shows."""
    if tiny:
        return {"tiny": Net(lambda: conv_net(width=4), 4)}
    return {"compute-bound": Net(conv_net, 32), "latency-bound": Net(mixer, 4, more=5),
            "short steps": Net(lambda: conv_net(width=8), 4, more=10)}


def mixer() -> nn.Module:
    """Twelve thin blocks of an MLP-Mixer for 32x32 images: many small operators, 0.11 M parameters in 150 tensors."""
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(img_size=32, patch_size=8, embed_dim=32, num_blocks=12, num_classes=10)  # type: ignore[no-any-return]


class Loop:
    """Plain training: the verbs that ConAdv extends, over a ring of noise batches that never ends."""

    def __init__(self, model: nn.Module, ring: list[Batch], precision: str = "fp32") -> None:
        self.world, self.seed, self.step, self.ring = World.current(), 0, 0, ring
        self.config = SimpleNamespace(precision=precision, accumulation=1)
        self.model = self.configure_model(model).train()
        self.optimizer = compose(base=torch.optim.SGD)(self.model, lr=0.01, momentum=0.9)

    def configure_model(self, model: nn.Module) -> nn.Module:
        return model

    def on_task_start(self, task: Any) -> None:
        pass

    def augment_batch(self, parts: list[Batch]) -> list[Batch]:
        return parts

    def forward(self, batch: Batch) -> Tensor:
        with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.model(batch.inputs).float()  # type: ignore[no-any-return]

    def forward_parts(self, parts: list[Batch]) -> list[Tensor]:
        return [self.forward(part) for part in parts]

    def loss_terms(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"cross_entropy": functional.cross_entropy(outputs, batch.targets)}

    def peek(self, ahead: int) -> Batch:
        return self.ring[(self.step + ahead) % len(self.ring)]

    def training_step(self) -> None:
        parts = self.augment_batch([self.peek(0)])

        def closure() -> Tensor:
            made = zip(self.forward_parts(parts), parts, strict=True)
            loss = torch.stack([term for out, part in made for term in self.loss_terms(out, part).values()]).sum()
            self.optimizer.backward(loss)
            return loss

        self.optimizer.step(closure)
        self.step += 1


class Mixed(Loop):
    """The batch and a copy of it with noise made beforehand, through batch norms of its own: ConAdv's step with no attack."""

    def configure_model(self, model: nn.Module) -> nn.Module:
        convert_split_bn(model)
        noise = torch.Generator().manual_seed(1)
        self.moved = [b.inputs + 0.01 * torch.randn(b.inputs.shape, generator=noise).to(b.inputs) for b in self.ring]
        return model

    def augment_batch(self, parts: list[Batch]) -> list[Batch]:
        return [*parts, replace(parts[0], part="adversarial", inputs=self.moved[self.step % len(self.ring)])]

    def forward(self, batch: Batch) -> Tensor:
        with split_branch(self.model, "adversarial" if batch.part == "adversarial" else "main"):
            return super().forward(batch)


class MixedOnce(Mixed):
    """The same in one forward."""

    def forward_parts(self, parts: list[Batch]) -> list[Tensor]:
        both = replace(parts[0], inputs=torch.cat([part.inputs for part in parts]))
        with split_branch(self.model, "adversarial", halves=True):
            return list(Loop.forward(self, both).chunk(2))


class Learner(ConAdv, Loop):
    """The method."""


def learner(arm: str, net: Net, device: str = "cpu", **options: Any) -> Any:
    """The trainer of one arm; every arm has a model of its own, from the same seed."""
    kind, batch = arm.removesuffix(" split"), net.batch // 2 if arm.endswith(" split") else net.batch
    torch.manual_seed(0)
    model, g, ring = net.build().to(device), torch.Generator().manual_seed(0), []
    for i in range(4):
        x = torch.rand(batch, 3, net.side, net.side, generator=g)
        y, ids = torch.randint(0, 10, (batch,), generator=g), torch.arange(batch) + i * batch
        ring.append(Batch(x, y, ids, ids).to(device))
    if kind in CONADV:
        return Learner(model, ring, net.precision, one_forward=arm != kind, **CONADV[kind], **options)
    return {"vanilla": Loop, "mixed": Mixed, "mixed once": MixedOnce, "mixed split": MixedOnce}[arm](model, ring, net.precision)


class Flops(TorchDispatchMode):
    """Counts the FLOPs of every operator below autograd, crafting's included; adversaries elsewhere are not seen."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def flops(step: Callable[[], Any]) -> int:
    with Flops() as counted:
        step()
    return counted.total


def expected_flops(model: nn.Module, inputs: Tensor, arm: str, steps: int = 1) -> tuple[int, int]:
    """(the trainer's, its adversary's) per step, exactly.

        vanilla 3F - f1;   mixed 6F - 2 f1;   crafting 2F per attack step, in the trainer or elsewhere

    F: one forward; f1: the share of the first convolution, whose input gradient training has no use for.
    """
    twin, first = copy.deepcopy(model), [0]
    conv = next(m for m in twin.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        forward = flops(lambda: twin(inputs))
        conv.register_forward_hook(lambda m, x, _: first.append(flops(lambda: functional.conv2d(
            x[0], m.weight, None, m.stride, m.padding, m.dilation, m.groups))))
        twin(inputs)
    train, craft, kind = 3 * forward - first[-1], 2 * forward * steps, arm.split()[0]
    if kind in ("vanilla", "mixed"):
        return (1 if kind == "vanilla" else 2) * train, 0
    return (2 * train, craft) if kind in ("process", "ranks") else (2 * train + craft, 0)


def bytes_per_step(placement: str, weights: int, batch: int, elements: int, width: int) -> tuple[int, int]:
    """(to the adversary, back) of a trainer that sends its adversary the weights, by the docstrings of BesideProcess and
    RemoteRank. `weights`: their bytes; `elements` of a sample, `width` bytes each; int8 signs come back."""
    if placement == "process":
        return weights + batch * (elements * width + 8), batch * elements
    return 64 + weights + lines(batch * elements * width) + lines(batch * 8), 64 + lines(batch * elements)


def lines(size: int) -> int:
    """Bytes of a tensor in a message between ranks."""
    return -(-size // 64) * 64


def fleet(trainers: int = 1024, adversaries: int = 342, weights: int = 2 * 25_600_000, batch: int = 96,
          elements: int = 224 * 224 * 3) -> dict[str, int]:
    """Bytes per step of ResNet-50 in bf16 on many trainers, by the formula: in total, and over single ends."""
    out, back = bytes_per_step("ranks", weights, batch, elements, width=2)
    serves = -(-trainers // adversaries)
    return {"total": trainers * (out - weights + back) + adversaries * weights, "weights": adversaries * weights,
            "out of a trainer that sends weights": out, "out of another trainer": out - weights, "into a trainer": back,
            f"into an adversary of {serves} trainers": serves * (out - weights) + weights,
            f"out of an adversary of {serves} trainers": serves * back}


class Arm:
    """One arm as `measure` wants it, which also notes CPU time and page faults of a block's counted steps, and waits for a GPU
    where the clock is read."""

    def __init__(self, step: Callable[[], Any], steps: int, discard: int) -> None:
        self.step, self.steps, self.discard, self.calls = step, steps, discard, 0
        self.notes: list[list[float]] = []

    def __call__(self) -> None:
        self.step()
        at = self.calls % (self.discard + self.steps)
        self.calls += 1
        if at not in (self.discard - 1, self.discard + self.steps - 1):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = [time.thread_time(), time.process_time(), resource.getrusage(resource.RUSAGE_THREAD).ru_minflt]
        if at == self.discard - 1:
            self.began = now
        else:
            self.notes.append([(b - a) / self.steps for a, b in zip(self.began, now, strict=True)])


@contextlib.contextmanager
def pinned(place: int) -> Iterator[bool]:
    """This thread, and what it starts, on the place-th core that the process may use; gives whether that could be had."""
    before = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if place >= len(before):
        yield False
        return
    os.sched_setaffinity(0, {before[place]})
    try:
        yield True
    finally:
        os.sched_setaffinity(0, before)


def move_adversaries(cores: list[int]) -> bool:
    """Put the adversary processes beside this one on core 1; whether that could be had."""
    if len(cores) < 2:
        return False
    for child in multiprocessing.active_children():
        if child.name == "everbatch adversary":
            for task in os.listdir(f"/proc/{child.pid}/task"):
                os.sched_setaffinity(int(task), {cores[1]})
    return True


def run_arms(arms: tuple[str, ...], net: Net, blocks: int, steps: int, device: str = "cpu", discard: int = 2) -> dict[str, Any]:
    """Warm up until adversaries answer, count FLOPs and bytes, then time in alternating blocks."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    apart, steps = True, steps * net.more
    with pinned(0) as own:
        trainers = {arm: learner(arm, net, device) for arm in arms}
        try:
            counts: dict[str, Any] = {}
            for arm, t in trainers.items():
                for _ in range(3):  # the first answer of an adversary has come with the first step
                    t.training_step()
                if t.world.size == 1 and "process" in arm:
                    apart = move_adversaries(cores)
                counts[arm] = {"flops": flops(t.training_step), "expected": expected_flops(t.model, t.ring[0].inputs, arm)}
                t.before = (t.step, t.adversary_costs()["bytes_sent"]) if isinstance(t, ConAdv) else (t.step, 0)
            timed = {arm: Arm(t.training_step, steps, discard) for arm, t in trainers.items()}
            rows = ratios(measure(timed, blocks=blocks, steps=steps, discard=discard), "vanilla")
            for row in rows:
                t, arm = trainers[row["arm"]], row["arm"]
                row["thread_cpu"], row["process_cpu"], row["faults"] = (
                    statistics.median(column) for column in zip(*timed[arm].notes, strict=True))
                row |= counts[arm]
                row["samples"] = len(t.ring[0])
                if (kind := arm.removesuffix(" split")) in ("process", "ranks"):
                    row["bytes"] = (t.adversary_costs()["bytes_sent"] - t.before[1]) / (t.step - t.before[0])
                    whole = lines if kind == "ranks" else int
                    size, x = sum(whole(v.nbytes) for v in t.model.state_dict().values()), t.ring[0].inputs
                    row["bytes_expected"] = sum(bytes_per_step(kind, size, len(x), x[0].numel(), x.element_size()))
        finally:
            for t in trainers.values():
                if isinstance(t, ConAdv):
                    t.close()
    return {"rows": rows, "pinned": own and apart and len(cores) > 1, "verdicts": verdicts(rows)}


def verdicts(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every limit that these rows can be held against, by the ratio of the least times and of the medians."""
    found, by = {}, {row["arm"]: row for row in rows}
    for arm, (base, limit) in LIMITS.items():
        if arm in by and base in by:
            least, middle = (by[arm][k] / by[base][k] for k in ("seconds_min", "seconds_median"))
            met = {2: "met", 0: "MISSED"}.get((least <= limit) + (middle <= limit), "undecided")
            found[arm] = {"verdict": met, "base": base, "limit": limit, "minima": least, "medians": middle}
    return found


def report(title: str, result: Mapping[str, Any]) -> None:
    """Print one launch. FLOPs: the trainer's as counted, its adversary's as expected; the ratio of their sum to plain training's
    with the trainer's as counted, as expected exactly, and by the model (6 + 2n) / 3."""
    rows = result["rows"]
    plain = rows[0]
    print(f"\n{title}: {plain['blocks']} blocks, load {plain['load_average']:.1f}, trainer and adversary "
          f"{'on a core each' if result['pinned'] else 'NOT pinned: not possible here'}")
    heads = ("ms (min)", "median", "max", "ratio min", "median", "thread CPU", "process", "faults", "MFLOP", "adversary", "ratio",
             "exact", "model")
    print(f"{'arm':<15}" + "".join(f"{head:>11}" for head in heads))
    for row in rows:
        mine, other = row["expected"]
        model = {"vanilla": 3, "mixed": 6}.get(row["arm"].split()[0], 8) / 3 * row["samples"] / plain["samples"]
        ratio, exact = (row["flops"] + other) / plain["flops"], (mine + other) / sum(plain["expected"])
        values = [*(1e3 * row[f"seconds_{k}"] for k in ("min", "median", "max")), row["ratio_of_minima"], row["ratio_of_medians"],
                  1e3 * row["thread_cpu"], 1e3 * row["process_cpu"], row["faults"], row["flops"] / 1e6, other / 1e6, ratio, exact,
                  model]
        print(f"{row['arm']:<15}" + "".join(f"{value:>11.3f}" for value in values))
        if row["flops"] != mine or abs(ratio / model - 1) > 0.01:
            same = "exactly" if row["flops"] == mine else "NOT"
            print(f"{'':<15}FLOPs {same} as expected, {ratio / model - 1:+.2%} off the model")
        if "bytes" in row:
            equal = "equal" if row["bytes"] == row["bytes_expected"] else "NOT EQUAL"
            print(f"{'':<15}bytes per step {row['bytes']:.0f}, by the formula {row['bytes_expected']:.0f}: {equal}")
    for arm, v in result["verdicts"].items():
        print(f"{arm:<15}{v['verdict']}: {v['minima']:.3f} (least times) and {v['medians']:.3f} (medians) of {v['base']}, limit "
              f"{v['limit']:.3f}")


def overlap(kernels: list[tuple[int, float, float]]) -> float | None:
    """Share of the crafting kernels' time during which a training kernel ran too. kernels: (stream, begin, end); the stream with
    the most time trains, all others craft. None where nothing crafts on a stream of its own."""
    busy: dict[int, float] = {}
    for stream, begin, end in kernels:
        busy[stream] = busy.get(stream, 0.0) + end - begin
    if len(busy) < 2:
        return None
    main = max(busy, key=lambda s: busy[s])
    train = sorted((b, e) for s, b, e in kernels if s == main)  # one stream runs its kernels one after the other
    both = sum(max(0.0, min(e, f) - max(b, a)) for s, b, e in kernels if s != main for a, f in train if a < e and f > b)
    return both / sum(t for s, t in busy.items() if s != main)


def profiled(step: Callable[[], Any], cuda: bool) -> float | None:
    """`overlap` of three steps, as torch.profiler saw them; None without CUDA, but the profiler runs."""
    for _ in range(3):
        step()
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds) as seen:
        for _ in range(3):
            step()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        seen.export_chrome_trace(path := f"{folder}/trace.json")
        events = json.loads(Path(path).read_text())["traceEvents"]
    return overlap([(e["args"]["stream"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel"])


def odd_tensors(net: Net, device: str, steps: int = 4) -> list[str]:
    """Names of the weights and statistics in which "stream" differs from "inline" after a few steps, in any bit."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    ended = []
    for arm in ("inline", "stream"):
        t = learner(arm, net, device)
        for _ in range(steps):
            t.training_step()
        ended.append(t.model.state_dict())
    torch.backends.cudnn.deterministic = before
    return [name for name, value in ended[0].items() if not torch.equal(value, ended[1][name])]


def stream_part(device: str, tiny: bool, blocks: int, steps: int) -> dict[str, Any]:
    """ "stream" against "inline" on one device, at a batch that does not fill it and at one that does."""
    def resnet() -> nn.Module:
        import timm

        return timm.create_model("resnet50", num_classes=1000)  # type: ignore[no-any-return]

    results, cuda = {}, device.startswith("cuda")
    for batch in (2, 4) if tiny else (8, 64):
        net = Net(lambda: conv_net(width=4), batch) if tiny else Net(resnet, batch, 224, "bf16")
        result = run_arms(("vanilla", "mixed", "inline", "stream"), net, blocks, steps, device)
        by = {row["arm"]: row for row in result["rows"]}
        result |= {"odd": odd_tensors(net, device), "overlap": profiled(learner("stream", net, device).training_step, cuda),
                   "stream_to_inline": [by["stream"][k] / by["inline"][k] for k in ("seconds_min", "seconds_median")]}
        report(f"{batch} samples on {torch.cuda.get_device_name() if cuda else device}", result)
        seen = f"{result['overlap']} of crafting's kernel time overlaps training" if cuda else "no kernels to see without CUDA"
        print("stream / inline {:.3f} (least times), {:.3f} (medians);".format(*result["stream_to_inline"]),
              f"{seen}; {len(result['odd'])} tensors differ from inline")
        results[str(batch)] = result
    return results


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
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="steps per block; 5 times as many where latency-bound, 10 if short")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--net", help="only this one: compute-bound, latency-bound or short steps")
    parser.add_argument("--launch", choices=list(LAUNCHES), help="only this one")
    parser.add_argument("--device", help="'stream' against 'inline' there, in place of the CPU placements")
    parser.add_argument("--tiny", action="store_true", help="a net that measures nothing, for tests")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        return rank_main(args)
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
                done = run_arms(LAUNCHES[which], net, args.blocks, args.steps) if which == "beside" else launch(name, which, args)
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
