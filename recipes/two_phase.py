"""Two-phase tuning: hyper-parameters are searched on one scenario and judged, once, on another that the search could not see.

python recipes/two_phase.py                       digits 0-4 and 5-9; ER, DER++, fine-tuning: 156 streams, minutes on two cores
python recipes/two_phase.py faithful=true         30 configurations, 5 class orders, as published
python recipes/two_phase.py pair.tuning=A.npz pair.evaluation=B.npz pair.increments=[10,10] search.race=true
python recipes/two_phase.py search.address=HOST:PORT search.ranks=2 pair.scenario.engine.kind=ddp         on a Ray cluster

Each phase is a process of its own (python -m everbatch.tune prepare, search, evaluate, conventional). The same line resumes:
a stream that ended is never trained twice.
"""

from __future__ import annotations

if __name__ == "__main__":
    import everbatch.quiet  # noqa: F401  # a Ctrl-C during the imports below ends without a traceback

from everbatch.tune import main

if __name__ == "__main__":
    main(__file__)
