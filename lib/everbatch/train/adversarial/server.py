"""The adversary's end of a launch with adversary ranks."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from everbatch.distributed import attempt_store
from everbatch.errors import check
from everbatch.nn import convert_split_bn
from everbatch.processes import end, follow_trainer
from everbatch.train.adversarial.attack import BRANCH
from everbatch.train.adversarial.placement import set_modes
from everbatch.train.adversarial.ranks import Role
from everbatch.train.adversarial.wire import (
    BACK,
    FOREVER,
    TO_ADVERSARY,
    answer_layout,
    dead_key,
    end_key,
    heard_attack,
    layout,
    link,
    linked_key,
    order_layout,
    ready_key,
    room,
    views,
)
from everbatch.train.signals import StopOnSignal

__all__ = ["serve"]


def serve(role: Role, model: nn.Module, *, device: str | None = None) -> None:
    """Craft for the trainers until they end. Call it on ranks where `role.adversary` holds, in place of training.

    Args:
        model: built as the trainers build theirs, before a trainer changes it.
        device: of the crafting; by default the GPU of this rank on its node, where there is one.

    The computing process is a child of this one; when it dies, this one says so and stays until the trainers have ended. Signals
    that ask for an end are the trainers' to hear: after one this rank waits until they have written their checkpoint, or until
    the connections to them have ended, however that came about. Another
    one five seconds later or more ends it at once.
    """
    asked: list[float] = []

    def ask(sign: int, _frame: object) -> None:
        if asked and time.monotonic() - asked[0] >= StopOnSignal.GRACE_S:
            end(128 + sign)
        asked.append(time.monotonic())

    main = threading.current_thread() is threading.main_thread()
    before = {sign: signal.signal(sign, ask) for sign in (*StopOnSignal.SIGNALS, signal.SIGINT) if main}
    try:
        _serve(role, model, device, asked)
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


def _serve(role: Role, model: nn.Module, device: str | None, asked: list[float]) -> None:
    context = multiprocessing.get_context("spawn")
    child = context.Process(name="everbatch adversary", daemon=True, target=_adversary, args=(role, model, device))
    child.start()
    store, _, _ = attempt_store(600.0)
    keys = [end_key(j) for j in role.serves]
    told = False
    while not _ended(store, keys):
        child.join(0.2)
        if asked and (child.exitcode is not None or not _ended(store, [linked_key(role.rank)])):
            break
        if child.exitcode not in (None, 0) and not told:
            print(f"ConAdv: the adversary on rank {role.rank} ended with exit code {child.exitcode}", file=sys.stderr, flush=True)
            store.set(dead_key(role.rank), str(child.exitcode))
            told = True
    child.join(1.0 if asked else 10.0)
    if child.is_alive():
        child.kill()


def _ended(store: Any, keys: list[str]) -> bool:
    """Whether the trainers have ended, or the process that holds the store, with which they end."""
    try:
        return bool(store.check(keys))
    except RuntimeError:
        return True


def _adversary(role: Role, model: nn.Module, device: str | None) -> None:
    follow_trainer()
    for sign in StopOnSignal.SIGNALS:
        signal.signal(sign, signal.SIG_IGN)
    try:
        _serve_all(role, model, device)
        os._exit(0)  # without freeing what gloo's threads may still hold
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def _serve_all(role: Role, model: nn.Module, device: str | None) -> None:
    store, _, _ = attempt_store(600.0)
    hellos = {j: json.loads(_read(store, f"conadv/hello/{j}")) for j in role.serves}
    told = hellos[role.serves[0]]
    attack = heard_attack(told["attack"])
    target = torch.device(device or (f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"))
    if told["split"]:
        convert_split_bn(model, (BRANCH,))
    model.to(target)
    modules = list(model.modules())
    check(len(modules) == told["modes"], "ConAdv", f"the adversary's model of {len(modules)} modules",
          f"have {told['modes']}, as the trainers'", "build both alike")
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    check(layout(named) == told["weights"] or [e[:2] for e in layout(named)] == [e[:2] for e in told["weights"]],
          "ConAdv", "the adversary's model", "have the trainers' parameters and buffers", "build both alike")
    for name, _, dtype in told["weights"]:
        named[name].data = named[name].data.to(getattr(torch, dtype))
    orders = {j: torch.zeros(room(order_layout(hello)), dtype=torch.uint8) for j, hello in hellos.items()}
    parts = {j: views(orders[j], order_layout(hello)) for j, hello in hellos.items()}
    sent = parts[role.serves[0]]
    if target.type == "cpu":  # compute with the weights where they arrive
        for name, value in named.items():
            value.data = sent[f"weights/{name}"]
    store.set(ready_key(role.rank), "1")
    links = {j: link(store, j, 1, FOREVER) for j in role.serves}
    store.set(linked_key(role.rank), "1")
    current = -1
    while links:
        for j in list(links):
            if not _arrived(links[j], orders[j]):
                parts[j]["head"].zero_()  # its trainer has ended, well or not: that is the trainer's to tell
            step, version, wanted = parts[j]["head"].tolist()
            if not wanted:
                del links[j]
                if hellos[j]["carries"]:
                    current = -1  # its last message has overwritten the weights
                continue
            if hellos[j]["carries"]:
                current = version
                if target.type != "cpu":
                    _take(named, sent)
            if version != current:
                raise RuntimeError(f"trainer {j} orders with the weights of step {version}, {role.serves[0]} has sent {current}")
            set_modes(modules, bytes(parts[j]["modes"].tolist()))
            inputs, targets = parts[j]["inputs"].to(target), parts[j]["targets"].to(target)
            back = torch.empty(room(answer_layout(hellos[j])), dtype=torch.uint8)
            answer = views(back, answer_layout(hellos[j]))
            answer["head"].copy_(torch.tensor([step, version]))
            answer["payload"].copy_(attack.run(model, inputs, targets, step=step, rank=j))
            try:
                links[j].send([back], 0, BACK).wait()
            except RuntimeError:  # its trainer has ended meanwhile
                del links[j]


def _arrived(link: Any, order: Tensor) -> bool:
    """Wait for an order; False when the connection ended."""
    try:
        link.recv([order], 0, TO_ADVERSARY).wait()
    except RuntimeError:  # what gloo raises then
        return False
    return True


def _take(named: dict[str, Tensor], sent: dict[str, Tensor]) -> None:
    """Copy the weights that came to where the model has its own."""
    with torch.no_grad():
        torch._foreach_copy_(list(named.values()), [sent[f"weights/{n}"].to(w.device) for n, w in named.items()])


def _read(store: Any, key: str) -> str:
    """Wait for a key as long as it takes: models load slowly."""
    while not store.check([key]):
        time.sleep(0.1)
    return str(store.get(key).decode())
