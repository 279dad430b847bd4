"""What every node of a cluster must have before the first trial: this package, the storage, and the data."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everbatch.errors import check
from everbatch.version import __version__

__all__ = ["check_address", "check_nodes_see"]

LIMIT_S = 60.0
"""That a node may take to answer; a worker process has to start."""


def check_address(address: str, limit_s: float = 10.0) -> None:
    """Refuse an address where nothing listens; Ray itself would try for minutes.

    Args:
        address: HOST:PORT, ray://HOST:PORT, or a word of Ray's own ("auto", "local").
        limit_s: for the connection.

    Raises:
        ValueError: no HOST:PORT, or nobody there.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    check(bool(host) and port.isdecimal(), "tune", f"address={address!r}", "be HOST:PORT, as `ray start` prints it, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=limit_s).close()
    except OSError as error:
        check(False, "tune", f"address={address!r}, where nothing answers ({error.strerror or error})",
              "be that of a running head", "start one with `ray start --head --port=PORT`, or leave address out")


def check_nodes_see(ray: Any, folder: Path, files: Sequence[Path], limit_s: float = LIMIT_S) -> None:
    """Have every living node read what this process wrote to `folder`, write there itself, and look for `files`.

    Trials keep their units in `folder`, wherever they run: on a disk of a node's own the driver would not find them.

    Args:
        ray: the module, connected.
        folder: of the ledger; made when missing.
        files: that trials read. Their content is checked by each trial; here that they are there, of the same size.
        limit_s: for each answer.

    Raises:
        ValueError: a node without one of them, or with another version of this package; one line that names the node.
        RuntimeError: a node that does not answer.

    Cost: a task of no CPU on each node, about two seconds where its workers have to start.
    """
    token = secrets.token_hex(8)
    folder = folder.absolute()
    probe = folder / f".seen-{token}"
    sizes = {str(file.absolute()): file.stat().st_size for file in files}
    nodes = [node for node in ray.nodes() if node["Alive"]]
    folder.mkdir(parents=True, exist_ok=True)
    probe.write_text(token)
    try:
        asked = {node["NodeID"]: _ask(ray, node["NodeID"], str(probe), token, sizes) for node in nodes}
        for node in nodes:
            name, number = node.get("NodeManagerHostname") or node.get("NodeManagerAddress"), node["NodeID"]
            _judge(f"node {name} ({number[:8]})", _answer(ray, asked[number], f"node {name}", limit_s), folder, number, probe)
    finally:
        for left in folder.glob(f"{probe.name}*"):
            left.unlink(missing_ok=True)


def _ask(ray: Any, node: str, probe: str, token: str, sizes: dict[str, int]) -> Any:
    """A task on one node. Its function is carried by value: the node may lack this package."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def look() -> dict[str, Any]:
        import os

        found: dict[str, Any] = {"storage": "", "files": {}, "version": None}
        try:
            with open(probe) as file:
                found["storage"] = "" if file.read() == token else "another file is there"
            with open(f"{probe}-{node}", "w") as file:
                file.write(token)
        except OSError as error:
            found["storage"] = error.strerror or str(error)
        for path, size in sizes.items():
            there = os.path.getsize(path) if os.path.isfile(path) else None
            if there != size:
                found["files"][path] = "is not there" if there is None else f"has {there} bytes in place of {size}"
        try:
            from everbatch.version import __version__ as version

            found["version"] = version
        except ImportError as error:
            found["missing"] = str(error)
        return found

    pinned = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return ray.remote(look).options(num_cpus=0, max_retries=0, scheduling_strategy=pinned).remote()


def _answer(ray: Any, task: Any, node: str, limit_s: float) -> dict[str, Any]:
    try:
        found: dict[str, Any] = ray.get(task, timeout=limit_s)
    except ray.exceptions.GetTimeoutError as error:
        raise RuntimeError(f"tune: {node} did not answer within {limit_s:g} s, must be alive; see `ray status`") from error
    except ray.exceptions.RayError as error:
        line = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"tune: {node} could not run a task ({line}), must be alive and have the same Python; see `ray status`"
                           ) from error
    return found


def _judge(node: str, found: dict[str, Any], folder: Path, number: str, probe: Path) -> None:
    cure = "give output= a folder on a disk that all nodes share"
    check(not found["storage"], "tune", f"{node} does not see what is written to {str(folder)!r} ({found['storage']})",
          "be one folder for all nodes", cure)
    check(Path(f"{probe}-{number}").exists(), "tune", f"{node} writes to {str(folder)!r} and it does not appear here",
          "be one folder for all nodes", cure)
    for path, why in found["files"].items():
        check(False, "tune", f"{node}: {path!r} {why}", "be the same file on every node", "give data= a folder on a disk that "
              "all nodes share")
    check(found["version"] is not None, "tune", f"{node} cannot import everbatch ({found.get('missing')})", "have it installed",
          "install the same version on every node")
    check(found["version"] == __version__, "tune", f"{node} has everbatch {found['version']}", f"have {__version__}, as here")
