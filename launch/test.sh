#!/usr/bin/env bash
# Installs everything tests need and runs them. --slow: the slow ones too. Other arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
show_help "$@"
use_environment
need all
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
arguments=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then arguments+=(-m "slow or not slow"); else arguments+=("$argument"); fi
done
cd "$ROOT"
exec "$PYTHON" -m pytest ${arguments[@]+"${arguments[@]}"}
