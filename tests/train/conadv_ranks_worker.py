"""A launch with adversary ranks: MODE OUT.json [HOST]; see test_conadv_ranks.py.

MODE: "same" (as crafted inline), or "clean", "inline", "stop": the adversary is killed at step 4 and `on_failure` is this.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from conadv_worker import build
from record import equal_bits

import learning
from everbatch.distributed import attempt_store
from everbatch.experiment import guard
from everbatch.train import StepRecord
from everbatch.train.adversarial import ranks, serve, split_ranks
from learning import everything, stream


def kill_when_asked(ended: threading.Event) -> None:
    store, _, _ = attempt_store()
    while not store.check(["test/kill"]):
        if ended.wait(0.05):
            return
    for child in active_children():
        os.kill(child.pid, signal.SIGKILL)


def run(host: str, mode: str, **options: Any) -> Any:
    """A run; at step 4 it has the adversary killed, and waits until that is done."""
    t = build(host, tau=2, patience_s=20.0, **options)
    after = type(t).after_step

    def after_step(self: Any, record: StepRecord) -> None:
        after(self, record)
        if mode != "same" and record.step == 4:
            attempt_store()[0].set("test/kill", "1")
            time.sleep(1.0)

    t.after_step = after_step.__get__(t)
    t.fit(stream())
    t.close()
    return t


def main() -> None:
    mode, out, host = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    role = split_ranks(int(sys.argv[4]) if len(sys.argv) > 4 else 1, "cpu", timeout_s=60)
    if role.adversary:
        ended = threading.Event()
        killer = threading.Thread(target=kill_when_asked, args=(ended,))
        killer.start()
        serve(role, learning.net(), device="cpu")
        ended.set()
        killer.join()  # one that waits for the store while Python is torn down would take the process with it
        return
    with warnings.catch_warnings(record=True) as warned, guard("conadv_ranks_worker"):
        warnings.simplefilter("always")
        t = run(host, mode, placement="ranks", on_failure="stop" if mode == "same" else mode)
    found = {"steps": t.step, "world": t.world.size, **t.adversary_costs(),
             "warned": [str(w.message) for w in warned if "adversary" in str(w.message)]}
    if mode == "same":
        ranks._role = None  # the reference crafts in the step, in the same trainers
        mine, other = everything(t), everything(build_and_fit(host))
        found["odd"] = [n for n in other if not equal_bits(mine[n], other[n])]
    out.with_suffix(f".{role.rank}").write_text(json.dumps(found))


def build_and_fit(host: str) -> Any:
    t = build(host, tau=2)
    t.fit(stream())
    return t


if __name__ == "__main__":
    main()
