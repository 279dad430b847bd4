#!/usr/bin/env bash
# Installs everything tests need and runs them side by side: first those of one process, then those of several ranks.
# Some take turns, each in one of two to twelve runs; EVERBATCH_ROUND=N repeats round N, and the run says which one it is.
#   --slow   the slow ones too, a sixteenth of the contract suite's wide matrix among them, and those of one process once more
#            with the vector instructions of lesser processors
#   --whole  everything, whosever turn it is
# Other arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
show_help "$@"
use_environment
need all
# Tests start a hundred interpreters: sources are compiled once, not in each, whatever the caller prefers.
unset PYTHONDONTWRITEBYTECODE
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
slow=false
arguments=()
for argument in "$@"; do
    case "$argument" in
        --slow) slow=true ;;
        --whole) slow=true; export EVERBATCH_ROUND=all ;;
        *) arguments+=("$argument") ;;
    esac
done
cd "$ROOT"
failed=0
found=false
export EVERBATCH_DURATIONS="$(mktemp)"

# The slowest of all parts, and how long it took.
summary() {
    echo "everbatch: the slowest ten of $((SECONDS / 60)) min $((SECONDS % 60)) s, in seconds"
    sort -rn "$EVERBATCH_DURATIONS" | sed -n 1,10p  # reads to the end: sort is not cut off
    rm -f "$EVERBATCH_DURATIONS"
}
trap summary EXIT

# part WORDS: run pytest; what it ends with counts, but for 5: none of the tests that were asked for is in this part.
part() {
    local code=0
    "$PYTHON" -m pytest "$@" ${arguments[@]+"${arguments[@]}"} || code=$?
    [ $code -eq 5 ] || found=true
    [ $code -eq 0 ] || [ $code -eq 5 ] || failed=$code
    case " ${arguments[*]:-} " in *" -x "*) [ "$failed" -eq 0 ] || exit "$failed" ;; esac
}
# The contract suite is all of several ranks, and has so many tests that every worker would take seconds to collect them.
beside() { part -n auto --maxprocesses 8 --dist worksteal --ignore tests/contract/test_contract.py "$@"; }

case " ${arguments[*]:-} " in *" -m "*) part; exit "$failed" ;; esac  # whoever names markers wants those, once
quick="not slow"
if $slow; then quick="(slow or not slow)"; fi
beside -m "$quick and not distributed"
# Ranks wait for each other a third of the time: two files beside each other fill it. What a file launches, its tests share.
# The longest files come first (tests/conftest.py), not those of most tests.
part -n 2 --dist loadfile --no-loadscope-reorder -m "$quick and distributed"
if $slow; then
    for capability in avx2 default; do  # torch takes the best the processor has: sums run in another order on others
        echo "everbatch: the tests of one process with ATEN_CPU_CAPABILITY=$capability"
        ATEN_CPU_CAPABILITY=$capability beside -m "not slow and not distributed"
    done
fi
$found || exit 5
exit "$failed"
