#!/usr/bin/env bash
# ./run.sh        set up, get data, train, quantize, pack, score, verify, write submission.json
# ./run.sh check  set up, get data, then forecast from a few steps whether the run would end well here, and when
# ./run.sh test   set up, then run the tests on all cores; ./run.sh test slow: the long form of tests/gpuless
#
# Every hyperparameter is an environment variable (MAX_WALLCLOCK_SECONDS=60 ./run.sh); SYSTEM names a file
# of systems/ to run instead of the record. Without a GPU the preset is `demo`, on text that needs no network.
# DATA_PATH, if set, is taken as it is; NPROC overrides the number of processes.
set -euo pipefail
cd "$(dirname "$0")"

# a stamp of the requirements marks a finished installation: nothing is installed twice, nor left half done
venv=${VENV:-.venv}
wanted=$(cat requirements.txt tests/requirements.txt)
if [ "$(cat "$venv/installed.txt" 2>/dev/null)" != "$wanted" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet -r requirements.txt -r tests/requirements.txt
    printf '%s' "$wanted" >"$venv/installed.txt"
fi
python=$venv/bin/python

if [ "${1:-}" = test ]; then
    # slow: the CUDA path with all layouts and all configurations of kernels, and its tables
    [ "${2:-}" != slow ] || { export GPULESS=full; set -- test tests/gpuless "${@:3}"; }
    "$python" -m ruff check .
    "$python" -m ruff format --check --quiet . || { "$python" -m ruff format --diff --quiet .; exit 1; }
    # a worker a core, each with one thread (tests/conftest.py); a file's tests stay with what they share
    exec "$python" -m pytest -n auto --maxprocesses 16 --dist loadfile "${@:2}"
elif [ $# -gt 0 ] && [ "$*" != check ]; then
    echo "usage: ./run.sh [check | test [slow] [pytest arguments]]; settings are environment variables" >&2
    exit 2
fi

script=train_gpt.py
[ -z "${SYSTEM:-}" ] || script=systems/$SYSTEM.py
if [ ! -f "$script" ]; then
    echo "SYSTEM=$SYSTEM: no file $script, expected one of" systems/*.py >&2
    exit 2
fi
gpus=$("$python" -c 'import sys, torch
usable = torch.cuda.is_available()
if torch.cuda.device_count() and not usable and sys.argv[1:] != ["check"]:
    sys.exit("torch cannot use the GPUs that are here: ./run.sh check says why")
print(torch.cuda.device_count() if usable else 0)' "$@")
if [ "$gpus" = 0 ]; then
    export PRESET=${PRESET:-demo}
    # keep freed memory (5 % faster steps); wait briefly, then sleep, for threads that another process holds up (without
    # it a busy core costs most of the speed). For glibc and GNU OpenMP, ignored elsewhere.
    export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-100000000000}
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
fi
export RUN_ID=${RUN_ID:-$("$python" -c 'import uuid; print(uuid.uuid4())')}
{ read -r dataset; read -r tokenizer; read -r artifact; } < <("$python" -c '
import os, sys
sys.path.insert(0, "systems")
hp = __import__(os.environ.get("SYSTEM") or "train_gpt").Hyperparameters.from_env(os.environ)
print(hp.data_path, hp.tokenizer_path, hp.artifact, sep="\n")')
if [ -z "${DATA_PATH:-}" ]; then
    source="--variant ${dataset##*_}"
    [ "${PRESET:-record}" = demo ] && source=--demo
    # stats.json is written last: a folder without it is not complete, and prepare.py goes on where it stopped
    [ -e "$dataset/stats.json" ] || "$python" data/prepare.py $source
fi
nproc=1  # 8, 4 or 2 processes share the batch evenly; the demo's is too small to share
for n in 2 4 8; do [ "$gpus" -ge $n ] && [ "${PRESET:-record}" != demo ] && nproc=$n; done
nproc=${NPROC:-$nproc}
[ "$nproc" = 8 ] || export EVAL_SECONDS=${EVAL_SECONDS:-0}  # the limit is for 8xH100

run=("$python" -m torch.distributed.run --standalone "--nproc_per_node=$nproc" "$script")
if [ "${1:-}" = check ]; then
    rm -f logs/check.env
    "${run[@]/%"$script"/tools/check.py}"
    . logs/check.env  # its verdict, and settings with which the run would fit
    exit "$check_failed"
fi
[ "${EVAL_ONLY:-0}" = 0 ] || exec "${run[@]}"
[ ! -f logs/check.env ] || . logs/check.env
rm -f submission.json  # an earlier run's must not pass for this one's
"${run[@]}"
log=logs/$RUN_ID
"$python" tools/verify.py "$artifact" --data "$dataset" --tokenizer "$tokenizer" \
    --train-script "$script" --log "$log.txt" | tee "$log.verify.txt"
"$python" tools/record.py "$log.txt" --verified "$log.verify.txt"
