"""What a cluster must have before the first trial, and what is said where it does not."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from everbatch.tune.nodes import _judge, check_address
from everbatch.version import __version__
from processes import ROOT

LAUNCH = ROOT / "launch" / "ray"


def test_an_address_where_nobody_is_is_refused_at_once() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        begin = time.monotonic()
        with pytest.raises(ValueError, match=r"tune: address='127.0.0.1:\d+', where nothing answers \(Connection refused\)"):
            check_address(f"127.0.0.1:{closed.getsockname()[1]}")
        assert time.monotonic() - begin < 10
        closed.listen()
        check_address(f"127.0.0.1:{closed.getsockname()[1]}")
        check_address(f"ray://127.0.0.1:{closed.getsockname()[1]}")
    for wrong in ("head", "head:", ":6379", "head:port"):
        with pytest.raises(ValueError, match="must be HOST:PORT"):
            check_address(wrong)


@pytest.mark.parametrize(("found", "said"), [
    ({"storage": "No such file or directory"}, "does not see what is written to .* must be one folder for all nodes"),
    ({"files": {"/data/x.npz": "is not there"}}, "'/data/x.npz' is not there, must be the same file on every node"),
    ({"version": None, "missing": "No module named 'everbatch'"}, "cannot import everbatch .*must have it installed"),
    ({"version": "0.0.1"}, f"has everbatch 0.0.1, must have {__version__}"),
])
def test_what_a_node_lacks_is_one_line_that_names_it(tmp_path: Path, found: dict[str, Any], said: str) -> None:
    probe, whole = tmp_path / ".seen-1", {"storage": "", "files": {}, "version": __version__}
    with pytest.raises(ValueError, match="node a writes to .* and it does not appear here"):
        _judge("node a", whole, tmp_path, "77", probe)
    Path(f"{probe}-77").write_text("")
    _judge("node a", whole, tmp_path, "77", probe)
    with pytest.raises(ValueError, match=f"tune: node a.*{said}") as error:
        _judge("node a", {**whole, **found}, tmp_path, "77", probe)
    assert "\n" not in str(error.value)


def test_the_cluster_file_is_one_that_ray_takes() -> None:
    """As `ray up` prepares and checks it; and nothing that is run here or on a cluster stops others' Ray."""
    pytest.importorskip("jsonschema")
    util = pytest.importorskip("ray.autoscaler._private.util")
    cluster = yaml.safe_load((LAUNCH / "cluster.yaml").read_text())
    util.validate_config(util.prepare_config(cluster))
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    assert len(commands) == 2 and all("ray start" in each and "ray stop" not in each for each in commands)
    assert cluster["provider"]["type"] == "local" and cluster["max_workers"] == len(cluster["provider"]["worker_ips"])
    with pytest.raises(Exception, match="is not of type"):
        util.validate_config({**util.prepare_config(cluster), "head_start_ray_commands": "ray start"})
    assert subprocess.run(["bash", "-n", LAUNCH / "slurm.sbatch"], timeout=20).returncode == 0


def test_the_page_names_what_there_is() -> None:
    page = (LAUNCH / "README.md").read_text()
    for name in ("cluster.yaml", "slurm.sbatch"):
        assert f"`{name}`" in page and (LAUNCH / name).exists()
