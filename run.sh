#!/usr/bin/env bash
# ./run.sh        set up, get data, train, quantize, pack, score, verify, write submission.json, draw plots/, sum up
# ./run.sh check  set up, get data, then forecast from a few steps whether the run would end well here, and when
# ./run.sh test   set up, then run the tests on all cores; ./run.sh test slow: the long form of tests/gpuless
# HELP=1 ./run.sh prints every setting with its default
#
# Every hyperparameter is an environment variable (MAX_WALLCLOCK_SECONDS=60 ./run.sh); SYSTEM names a file
# of systems/ to run instead of the record. Without a GPU the preset is `demo`, on text that needs no network.
# DATA_PATH, if set, is taken as it is; NPROC overrides the number of processes.
# PYTHON makes the virtual environment VENV (.venv); CHECKPOINT_EVERY and RESUME: see tools/resumable.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # as in `sh run.sh`
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"
case "$*" in
    '' | check | test | 'test '*) ;;
    *)
        echo "usage: ./run.sh [check | test [slow] [pytest arguments]]; settings are environment variables:" \
            "HELP=1 ./run.sh lists them" >&2
        exit 2
        ;;
esac

. tools/supervise.sh  # fail, supervise, lock

# what belongs to another installation, to a launcher around this one, or lets pip install elsewhere
unset PYTHONHOME PYTHONPATH PYTHONSAFEPATH PYTHON_EXEC PIP_TARGET PIP_PREFIX PIP_USER
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE TORCHELASTIC_RUN_ID ${!PET_@}
# compiled kernels, and matplotlib's list of fonts, are kept in HOME, or here where it cannot be written
[ -w "${HOME:-}" ] || export TRITON_HOME=${TRITON_HOME:-$PWD} MPLCONFIGDIR=${MPLCONFIGDIR:-$PWD/.triton/matplotlib}

venv=${VENV:-.venv}
python=$venv/bin/python
. tools/install.sh
if [ "${HELP:-0}" != 0 ]; then  # needs nothing but a Python
    "$python" -c '' 2>/dev/null || { find_base; python=$base; }
    exec "$python" tools/help.py
fi

[ "${1:-}" = test ] || for folder in . logs; do
    mkdir -p "$folder" 2>/dev/null && [ -w "$folder" ] ||
        fail "$PWD/$folder: no folder that can be written: run in a copy that belongs to you"
done

is_installed || { left="; the next start goes on with $venv"; supervise install; left=; }

if [ "${1:-}" = test ]; then
    # slow: the CUDA path with all layouts and all configurations of kernels, and its tables
    [ "${2:-}" != slow ] || { export GPULESS=full; set -- test tests/gpuless "${@:3}"; }
    export RUFF_NO_CACHE=true  # of no use here, and a folder that cannot be written has none
    "$python" -m ruff check .
    "$python" -m ruff format --check --quiet . || { "$python" -m ruff format --diff --quiet .; exit 1; }
    # a worker a core, each with one thread (tests/conftest.py); a file's tests stay with what they share
    exec "$python" -m pytest -n auto --maxprocesses 16 --dist loadfile "${@:2}"
fi

[ "${1:-}" = check ] || lock logs/run.lock "$python"
settings=$("$python" tools/settings.py "$@")
eval "$settings"  # PRESET RUN_ID script gpus nproc threads dataset tokenizer artifact source text
if [ "$gpus" = 0 ]; then
    # keep freed memory (5 % faster steps); wait briefly, then sleep, for threads that another process holds up (without
    # it a busy core costs most of the speed). For glibc and GNU OpenMP, ignored elsewhere.
    export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-100000000000}
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
fi
# stats.json is written last: a folder without it is not complete, and prepare.py goes on where it stopped.
# The demo's says of which text it is made: of an earlier version's it is made again.
[ -n "${DATA_PATH:-}" ] || grep -qs -- "$text" "$dataset/stats.json" ||
    supervise "$python" data/prepare.py "$source"
[ "$nproc" = 8 ] || export EVAL_SECONDS=${EVAL_SECONDS:-0}  # the limit is for 8xH100

launch=("$python")
[ "$nproc" = 1 ] ||
    launch=(env "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}" "$python" tools/ranks.py "$nproc")
if [ "${1:-}" = check ]; then
    rm -f logs/check.env
    supervise "${launch[@]}" tools/check.py || [ -e logs/check.env ]
    . logs/check.env  # its verdict, and settings with which the run would fit
    exit "$check_failed"
fi
supervise "$python" tools/dataset.py "$dataset" "$tokenizer"
to_the_end() { trap '' HUP INT TERM; exec "$@"; }  # behind a pipe: it ends with what it reads
screen() { to_the_end "$python" tools/screen.py; }
shown() { unreported "$@" | screen; }
[ "${EVAL_ONLY:-0}" = 0 ] || { supervise shown "${launch[@]}" "$script"; exit; }
[ ! -f logs/check.env ] || . logs/check.env
if [ -e submission.json ]; then
    mv -f submission.json submission.json.old  # it must not pass for this run's
    echo "run.sh: an earlier submission.json is now submission.json.old"
fi
# so that it can be stopped and resumed; the record's run, 8 ranks, is the script itself unless asked
start=(tools/resumable.py "$script")
[ "$nproc${CHECKPOINT_EVERY:-}${RESUME:-}" != 8 ] || start=("$script")
began=$SECONDS
supervise shown "${launch[@]}" "${start[@]}"
ran=$((SECONDS - began))

log=logs/$RUN_ID
left="; $artifact and $log.txt are complete, but not verified and recorded"
verify() {
    unreported "$python" tools/verify.py "$artifact" --data "$dataset" --tokenizer "$tokenizer" \
        --train-script "$script" --log "$log.txt" | to_the_end tee "$log.verify.txt" | screen
}
supervise verify
verified=$((SECONDS - began - ran))
supervise "$python" tools/record.py "$log.txt" --verified "$log.verify.txt"
left='; the run is complete, but not all pictures of it are drawn'
supervise shown "$python" tools/plot.py "$log.txt" ||
    echo "run.sh: the run is complete, but no pictures of it were drawn" >&2
left="; the run is complete, but not summed up"
sum_up() { echo; "$python" tools/summary.py "$log.txt" --program-took "$ran" --verifier-took "$verified"; }
supervise sum_up || echo "run.sh: the run is complete, but not summed up" >&2
