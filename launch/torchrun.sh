#!/usr/bin/env bash
# Starts a recipe on one node or several: bash launch/torchrun.sh recipes/class_incremental.py key=value ...
# One node: RANKS processes (default: one per GPU, 2 without any). Several: run this on every node with NNODES,
# NODE_RANK (0 to NNODES-1), MASTER_ADDR (a name of node 0 that all can reach) and, if 29500 is taken, MASTER_PORT.
# RESTARTS: how often torchrun starts all ranks anew after one died (default 0; recipes resume from their checkpoint).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
show_help "$@"
[ $# -gt 0 ] || die "usage: bash launch/torchrun.sh RECIPE [key=value ...]"
find_environment
use_devices
ranks="${RANKS:-$(ask "$PYTHON" 'import torch; print(torch.cuda.device_count() or 2)')}"
where=(--standalone)
if [ "${NNODES:-1}" -gt 1 ]; then
    [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER_ADDR:-}" ] || die "NNODES=$NNODES needs NODE_RANK and MASTER_ADDR"
    # Static rendezvous: node 0 holds the store, node_rank fixes the order of ranks.
    where=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
exec "$PYTHON" "$ROOT/launch/start.py" "${where[@]}" --nproc-per-node "$ranks" --max-restarts "${RESTARTS:-0}" "$@"
