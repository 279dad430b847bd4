#!/usr/bin/env bash
# Installs everything tests need and runs them. --slow: the slow ones too, and those of one process once more with the vector
# instructions of lesser processors. Other arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
show_help "$@"
use_environment
need all
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
slow=false
arguments=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then slow=true; else arguments+=("$argument"); fi
done
run() { "$PYTHON" -m pytest "$@" ${arguments[@]+"${arguments[@]}"}; }
cd "$ROOT"
$slow || { run; exit; }
failed=0
run -m "slow or not slow" || failed=$?
for capability in avx2 default; do  # torch takes the best the processor has: sums run in another order on others
    echo "everbatch: the tests of one process with ATEN_CPU_CAPABILITY=$capability"
    # 5: none of the tests that were asked for is of one process
    ATEN_CPU_CAPABILITY=$capability run -m "not slow and not distributed" || { code=$?; [ $code -eq 5 ] || failed=$code; }
done
exit "$failed"
