"""ConAdv's "stream" against its "inline" on one device: time, overlap of their kernels, and equal bits."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conadv_arms import Net, learner
from conadv_timing import report, run_arms
from timing import conv_net, paired
from torch import nn


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
                   "stream_to_inline": [by["stream"]["seconds_min"] / by["inline"]["seconds_min"],
                                        *paired(by["stream"]["seconds"], by["inline"]["seconds"])]}
        report(f"{batch} samples on {torch.cuda.get_device_name() if cuda else device}", result)
        seen = f"{result['overlap']} of crafting's kernel time overlaps training" if cuda else "no kernels to see without CUDA"
        print("stream / inline",
              "{:.3f} (least times), {:.3f} (pairs of blocks, {:.3f} to {:.3f});".format(*result["stream_to_inline"]),
              f"{seen}; {len(result['odd'])} tensors differ from inline")
        results[str(batch)] = result
    return results
