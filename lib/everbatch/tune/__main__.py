"""`python -m everbatch.tune prepare|search|evaluate|conventional`."""

from __future__ import annotations

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

from everbatch.tune.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
