#!/usr/bin/env bash
# tools/seeds.sh "42 0 1234" [OPTION...]    a run of each seed by ./run.sh, then the record's folder of them, checked
#
# Settings are environment variables, as for ./run.sh; OPTIONs are those of `tools/record.py folder`, such as --title.
# A seed whose logs/train_seedN.txt is verified is not run again: after a stop the same command goes on.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
python=${VENV:-.venv}/bin/python seeds=${1:-} logs=()
[[ "$seeds" =~ ^[0-9]+(\ [0-9]+)*$ ]] || {
    echo "usage: tools/seeds.sh 'SEED SEED ...' [option of tools/record.py folder]...; found seeds '$seeds'" >&2
    exit 2
}
shift
for seed in $seeds; do
    name=train_seed$seed
    grep -qs '^verify: all [0-9]* passed$' "logs/$name.verify.txt" ||
        SEED=$seed RUN_ID=$name ARTIFACT=$name.int6.ptz ./run.sh
    logs+=("logs/$name.txt")
done
folder=$("$python" tools/record.py folder "${logs[@]}" "$@")
echo "seeds.sh: $folder"
"$python" tools/record.py check "$folder" || echo "seeds.sh: $folder is complete; above is what would be asked of it"
