#!/usr/bin/env bash
# tools/evidence.sh [TARGET...]    make the logs that README.md and docs/ quote anew, then write their figures there
# tools/evidence.sh --list         what each target makes, and how long it took
#
# Without a target all of them, one behind the other. Each runs on the CPUs, in a fresh copy of the source and with no
# settings of this shell; only what came to its end replaces the logs that are here. What needs text that is not in the
# repository, or an older source, is not made: logs/README.md says by what it was.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
root=$PWD
targets=(demo attention size delta fit graphs floor kernels faults tests)
declare -A makes=(
    [demo]="demo.check.txt demo.txt demo.verify.txt"
    [attention]=attention.txt
    [size]=bench_cpu.txt
    [delta]=bench_delta.txt
    [fit]=fit.txt
    [graphs]=gpuless_graphs.txt
    [floor]=floor.txt
    [kernels]=gpuless_kernels.txt
    [faults]=faults.txt
    [tests]=tests.txt
)

fail() { echo "evidence.sh: $*" >&2; exit 1; }

list() {
    local target log took
    for target in "${targets[@]}"; do
        for log in ${makes[$target]}; do
            took=$(awk -F '\t' -v name="$log" '$1 == name && $4 != "-" { print $4 " s" }' logs/made.tsv)
            printf '%-9s logs/%-20s %s\n' "$target" "$log" "${took:-not timed}"
        done
    done
    echo "demo also makes submission.json and docs/pictures/; tests come last, as they read the others"
}

usage() {
    echo "usage: tools/evidence.sh [--list | TARGET...], a TARGET: ${targets[*]}" >&2
    exit 2
}

# --------------------------------------------------------------------------------------------------
# In the copy

# note LOG SECONDS COMMAND: logs/LOG is done
note() { printf '%s\t%s\t`%s`\t%s\t%s\t%s\n' "$1" "$target" "$3" "$2" "$(date -u +%F)" "$source" >>rows.tsv; }

# printed LOG COMMAND...: what it prints is logs/LOG
printed() {
    local log=$1 start=$SECONDS shown
    shift
    shown=$*
    "$@" >"logs/$log"
    note "$log" $((SECONDS - start)) "${shown//"$python"/python}"
}

make_demo() {
    printed demo.check.txt ./run.sh check
    sed -i "s|$copy/||g" logs/demo.check.txt
    local start=$SECONDS
    RUN_ID=demo ./run.sh
    note demo.txt $((SECONDS - start)) "RUN_ID=demo ./run.sh"
    note demo.verify.txt - "tools/verify.py, by ./run.sh"
}
make_attention() {
    local start=$SECONDS
    RUN_ID=attention LAYOUT=S6 ./run.sh
    note attention.txt $((SECONDS - start)) "RUN_ID=attention LAYOUT=S6 ./run.sh"
}
make_size() { printed bench_cpu.txt "$python" tools/bench.py --size; }
make_delta() { printed bench_delta.txt "$python" tools/bench.py --delta; }
make_fit() {  # with freed memory kept, as ./run.sh does
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 OMP_NUM_THREADS=1 \
        printed fit.txt "$python" tools/bench.py --fit
}
make_graphs() { printed gpuless_graphs.txt "$python" tests/gpuless/graphs.py --full; }
make_floor() { printed floor.txt "$python" tools/floor.py --fast; }
make_kernels() {
    local start=$SECONDS
    GPULESS=full "$python" -m pytest -n auto tests/gpuless/test_compiled_kernels.py >all.txt || { cat all.txt; exit 1; }
    grep -E '^(sm_[0-9]+ |[a-z_]+ (train|stream) |    [0-9]+ x )' all.txt >logs/gpuless_kernels.txt
    note gpuless_kernels.txt $((SECONDS - start)) "GPULESS=full pytest tests/gpuless/test_compiled_kernels.py"
}
make_faults() { printed faults.txt "$python" tools/faults.py; }
make_tests() {
    local start=$SECONDS
    ./run.sh test >all.txt || { cat all.txt; exit 1; }
    grep -E ' passed.* in ' all.txt | tail -n 1 >logs/tests.txt
    note tests.txt $((SECONDS - start)) "./run.sh test"
}

# --------------------------------------------------------------------------------------------------
# From here to there and back

# what git tracks, and what is new and not ignored
copy_source() {
    git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
        [ ! -e "$file" ] || printf '%s\0' "$file"
    done | xargs -0 cp -p --parents -t "$1"
}

# replace FROM TO: whole or not at all
replace() { mkdir -p "$(dirname "$2")"; cp "$1" "$2.tmp"; mv -f "$2.tmp" "$2"; }

take_back() {
    local log picture
    for log in ${makes[$target]}; do
        replace "$copy/logs/$log" "logs/$log"
        { grep -v "^$log	" logs/made.tsv; grep "^$log	" "$copy/rows.tsv"; } >"$copy/made.tsv"
        replace "$copy/made.tsv" logs/made.tsv
    done
    [ "$target" = demo ] || return 0
    replace "$copy/submission.json" submission.json
    for picture in stages artifact; do
        replace "$copy/plots/demo.$picture.png" "docs/pictures/demo.$picture.png"
    done
}

# clean COMMAND...: with the variables that say where things are, and how busy the cores, and no others
clean() {
    local name kept=()
    for name in HOME PATH TMPDIR LANG OMP_NUM_THREADS GOMP_SPINCOUNT "${!PIP_@}"; do
        [ -z "${!name:-}" ] || kept+=("$name=${!name}")
    done
    env -i "${kept[@]}" VENV="$venv" PYTHON="${PYTHON:-python3}" CUDA_VISIBLE_DEVICES= "$@"
}

make() {
    copy=$(mktemp -d "${TMPDIR:-/tmp}/evidence.XXXXXX")
    chmod 755 "$copy"  # some tests are another user
    trap 'rm -rf "$copy"' EXIT
    copy_source "$copy"
    # tests need all logs that are quoted, their own too
    [ "$target" = tests ] || (cd "$copy/logs" && rm -f ${makes[$target]})
    echo "evidence.sh: $target, in $copy" >&2
    clean "$copy/tools/evidence.sh" --in-copy "$target" || fail "$target failed: logs/ are as they were"
    take_back
    rm -rf "$copy"
    "$python" tools/evidence.py
}

venv=$(realpath -m "${VENV:-.venv}")
python=$venv/bin/python
case "${1:-}" in
    --list) list; exit ;;
    --in-copy)  # this script calls itself so
        target=$2 copy=$root source=$(sha256sum train_gpt.py | cut -c 1-12)
        "make_$target"
        exit
        ;;
esac
for target in "$@"; do
    [[ " ${targets[*]} " == *" $target "* ]] || usage
done
git rev-parse --is-inside-work-tree >/dev/null 2>&1 || fail "$root: no git checkout, so nothing says what the source is"
[ -x "$python" ] || fail "$python: not there: ./run.sh test sets it up, or name another with VENV"
[ $# -gt 0 ] || set -- "${targets[@]}"
for target in "$@"; do make; done
