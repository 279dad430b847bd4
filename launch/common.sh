# Shared by the scripts of this folder; sourced, not run. Sets ROOT and PYTHON, and defines the steps below.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# show_help "$@": for --help or -h as the first argument print the comment at the head of the script, do nothing else, and stop.
show_help() {
    case "${1:-}" in -h | --help) sed -n '2,/^set /{/^#!/d;/^#SBATCH/d;s/^# \{0,1\}//p;}' "$0"; exit 0 ;; esac
}

die() { echo "everbatch: $*" >&2; exit 1; }

trap 'exit 130' INT

# find_environment: for scripts that only start runs, and must make nothing. PYTHON becomes that of the active environment; else
# the first of ROOT/.venv, PYTHON3 and the python and python3 on PATH that has torch and everbatch.
find_environment() {
    local candidates=("$ROOT/.venv/bin/python" "${PYTHON3:-python}" python python3) candidate found
    if [ -n "${VIRTUAL_ENV:-}" ] || [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then candidates=(python); fi
    PYTHON=
    for candidate in "${candidates[@]}"; do
        found="$(command -v "$candidate")" || continue
        PYTHON="${PYTHON:-$found}"
        if ask "$found" 'import torch, everbatch' >/dev/null 2>&1; then PYTHON="$found"; return; fi
    done
    [ -n "$PYTHON" ] || die "no python found; install Python 3.10 or newer, or set PYTHON3"
    need_python "$PYTHON"
    found="$(ask "$PYTHON" 'import torch, everbatch' 2>&1 | tail -n 1)" || true
    die "$PYTHON cannot import torch and everbatch ($found); run $PYTHON -m pip install -e '$ROOT[vision,plot,deepspeed]'"
}

# ask PYTHON CODE: run a line; a Ctrl-C ends it without a traceback.
ask() { "$1" -c "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); $2"; }

# Use the active virtual environment, else make one in ROOT/.venv. PYTHON3 names the interpreter to make it with.
use_environment() {
    # The base environment of conda is no place to install into.
    if [ -n "${VIRTUAL_ENV:-}" ] || [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
        PYTHON="$(command -v python)" || die "the active environment has no python"
    else
        PYTHON="$ROOT/.venv/bin/python"
        if [ ! -x "$PYTHON" ]; then
            local base="${PYTHON3:-python3}"
            command -v "$base" >/dev/null || die "no $base found; install Python 3.10 or newer, or set PYTHON3"
            need_python "$base"
            echo "everbatch: making a virtual environment in $ROOT/.venv"
            "$base" -m venv "$ROOT/.venv" || die "$base -m venv failed (on Debian and Ubuntu: apt install python3-venv)"
        fi
        export VIRTUAL_ENV="$ROOT/.venv" PATH="$ROOT/.venv/bin:$PATH"
    fi
    need_python "$PYTHON"
}

need_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$1 is $("$1" --version 2>&1), must be Python 3.10 or newer; set PYTHON3 to a newer interpreter"
}

# need EXTRAS: install this checkout (editable) with the extras, unless it and all their requirements are there already.
need() {
    if "$PYTHON" "$ROOT/launch/installed.py" "$ROOT" "$1"; then return; fi
    echo "everbatch: installing .[$1] into $("$PYTHON" -c 'import sys; print(sys.prefix)')"
    "$PYTHON" -m pip install --disable-pip-version-check -e "$ROOT[$1]" || die "pip install -e .[$1] failed (see above)"
}

# Without a GPU: tell DeepSpeed so, and keep every rank to one thread, or the ranks fight over the cores.
use_devices() {
    if [ "$(ask "$PYTHON" 'import torch; print(torch.cuda.is_available())')" = False ]; then
        export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    fi
}
