"""Exit 0 if this checkout is installed editable with the given extras and their requirements are met; 1 otherwise.

Usage: installed.py ROOT EXTRA[,EXTRA...]. Standard library and pip only: it runs before anything is installed.
"""

import json
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse


def met(name: str, extras: list[str], seen: set[str]) -> bool:
    """Whether a distribution's own requirements, and those of its extras, are installed in fitting versions."""
    from pip._vendor.packaging.requirements import Requirement

    for text in metadata.requires(name) or []:
        need = Requirement(text)
        if need.marker is not None and not any(need.marker.evaluate({"extra": extra}) for extra in ["", *extras]):
            continue
        if not need.specifier.contains(metadata.version(need.name), prereleases=True):
            return False
        key = f"{need.name}{sorted(need.extras)}"
        if need.extras and key not in seen and not met(need.name, sorted(need.extras), seen | {key}):
            return False
    return True


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__.strip(), file=sys.stdout if sys.argv[1:] in (["-h"], ["--help"]) else sys.stderr)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    root, extras = Path(sys.argv[1]), sys.argv[2].split(",")
    try:
        url = json.loads(metadata.distribution("everbatch").read_text("direct_url.json") or "{}").get("url", "")
        same = Path(unquote(urlparse(url).path)).resolve() == root.resolve()
        return 0 if same and met("everbatch", extras, set()) else 1
    except (metadata.PackageNotFoundError, ImportError):
        return 1


sys.exit(main())
