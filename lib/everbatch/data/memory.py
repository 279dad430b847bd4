"""What fits into this machine's memory, asked before it is allocated."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from everbatch.errors import check

__all__ = ["check_memory", "total_memory"]

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container's limit is written."""


@functools.lru_cache(maxsize=1)
def total_memory() -> int:
    """Bytes of memory that this machine, or the container, has in all; 2^63 where it does not say."""
    found = 2**63
    if hasattr(os, "sysconf") and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in _LIMITS:
        path = Path(name)
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            found = min(found, int(text))
    return found


def check_memory(who: str, got: str, needed: int, cure: str) -> None:
    """Raise `ValueError` where `needed` bytes are more than there is in all."""
    check(needed <= total_memory(), who, f"{got} takes {needed / 2**30:.3g} GiB",
          f"fit into the {total_memory() / 2**30:.3g} GiB of memory", cure)
