"""Jobs with compile=true: HOST ...; see worker.py and test_compile.py."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from record import Job, Record
from test_compile import BARE, SAMS, counted, difference, net

import learning


def found(host: str) -> dict[str, Any]:
    """Graphs of a bare optimizer's run and of SAM's, and how far weights are from those of a run without graphs."""
    result: dict[str, Any] = {}
    for name, optimizer in (("bare", BARE), ("sam", SAMS)):
        runs = []
        with counted() as graphs:
            for compiled in (True, False):
                t = learning.trainer(host, model=net(), cls=learning.Trainer, optimizer=optimizer, compile=compiled)
                t.fit(learning.stream())
                runs.append(t)
                result[f"{name}/{compiled}"] = len(graphs)
        result[f"{name}/difference"] = difference(*runs)
    return result


def refused(host: str) -> str:
    try:
        learning.trainer(host, model=net(), cls=learning.Trainer, optimizer=BARE, compile=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def jobs(record: Record, *hosts: str) -> Iterator[Job]:
    warnings.simplefilter("ignore")  # of DeepSpeed's
    for host in hosts:
        yield record.noted(host, refused if host == "zero3" else found, host)
