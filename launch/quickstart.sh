#!/usr/bin/env bash
# From a fresh clone to a trained network: installs what the main job needs, then runs it on two ranks.
# Arguments go to the recipe: bash launch/quickstart.sh replay=null   (plain fine-tuning on the same stream)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
show_help "$@"
use_environment
need vision,plot,deepspeed # not .[all]: the main job needs neither Ray nor the test tools
use_devices
exec "$PYTHON" "$ROOT/launch/start.py" --standalone --nproc-per-node "${RANKS:-2}" \
    "$ROOT/recipes/class_incremental.py" "$@"
