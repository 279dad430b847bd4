#!/usr/bin/env bash
# The GPU check in one command, at most 7 minutes on one H100: contract cases on one rank (plain torch, FSDP2, ZeRO 1 to 3, fp32 and
# bf16), then step ratios, host syncs and peak memory of ResNet-50 and ViT-S. One JSON and one table in FOLDER.
#
#   bash benchmarks/gpu.sh [FOLDER [OPTION ...]]  default: runs/gpu; options of benchmarks/speed/gpu.py
#   EVERBATCH_DEVICE=cpu bash benchmarks/gpu.sh   small nets, to try the script where there is no GPU
#
# Needs torch, DeepSpeed and timm in the python that is found; this checkout is used as it lies here, installed or not.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"
show_help "$@"
export PYTHONPATH="$ROOT/lib${PYTHONPATH:+:$PYTHONPATH}" EVERBATCH_DEVICE="${EVERBATCH_DEVICE:-cuda}" OMP_NUM_THREADS=1
[ "$EVERBATCH_DEVICE" = cuda ] || export DS_ACCELERATOR=cpu
find_environment
if [ "$EVERBATCH_DEVICE" = cuda ] && ! ask "$PYTHON" 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    die "no GPU that torch can use; EVERBATCH_DEVICE=cpu tries the script without one"
fi
ask "$PYTHON" 'import deepspeed, timm' >/dev/null 2>&1 || die "$PYTHON has no deepspeed or timm; pip install deepspeed timm"
FOLDER="${1:-runs/gpu}"
mkdir -p "$FOLDER"
rm -rf "$FOLDER/contract.json" "$FOLDER/store"
code=0
# A contract launch that dies leaves what it has found; the table says how far it came.
timeout 220 "$PYTHON" -m torch.distributed.run --nproc-per-node 1 "$ROOT/tests/worker.py" "$ROOT/tests/contract/one_gpu.py" \
    "$FOLDER/contract.json" "$FOLDER/store" "${EVERBATCH_CONTRACT_SECONDS:-150}" >"$FOLDER/contract.log" 2>&1 || code=$?
[ "$code" -eq 0 ] || echo "everbatch: the contract launch ended with $code; see $FOLDER/contract.log" >&2
rm -rf "$FOLDER/store"
timeout 200 "$PYTHON" "$ROOT/benchmarks/speed/gpu.py" --device "$EVERBATCH_DEVICE" --contract "$FOLDER/contract.json" \
    --launch "$code" --json "$FOLDER/gpu.json" "${@:2}" | tee "$FOLDER/table.txt"
exit "$code"
