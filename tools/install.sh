# For run.sh: the virtual environment $venv with what stands in requirements.txt and tests/requirements.txt.

# A stamp of the requirements marks a finished installation: nothing is installed twice, nor left half done.
wanted=$(cat requirements.txt tests/requirements.txt)
is_installed() {
    [ "$(cat "$venv/installed.txt" 2>/dev/null)" = "$wanted" ] && "$python" -c '' 2>/dev/null && ! lacks_cuda
}

find_base() {
    local found
    base=${PYTHON:-python3} other="name another Python, PYTHON=/path/to/python3.11 ./run.sh"
    command -v "$base" >/dev/null || fail "no program $base, expected Python 3.11 or newer: $other"
    found=$("$base" -c 'import sys; print(sys.version.split()[0]); sys.exit(sys.version_info < (3, 11))') ||
        fail "$base: version ${found:-unknown}, expected Python 3.11 or newer: $other"
}

install() {
    local base other
    case "$(uname -s)" in
        Linux | Darwin) ;;
        *) fail "$(uname -s): expected Linux, macOS, or on Windows WSL 2" ;;
    esac
    find_base
    mkdir -p "$(dirname "$venv")"
    lock "$venv.lock" "$base"
    rm -f "$venv/installed.txt"
    "$python" -m pip --version >/dev/null 2>&1 || make_venv
    echo "run.sh: installing what requirements.txt names into $venv, which takes some minutes"
    choose_torch && pip_install -r requirements.txt -r tests/requirements.txt ||
        fail "not all of requirements.txt is in $venv, pip says above why: the first ./run.sh needs a network," \
            "disk space, and a Python and a machine for which there are wheels; start it again to go on"
    printf '%s' "$wanted" >"$venv/installed.txt"
}

# --clear, as one that was interrupted may lack anything; but nothing else is ever cleared.
make_venv() {
    [ ! -e "$venv" ] || [ -e "$venv/pyvenv.cfg" ] ||
        fail "VENV=$venv: it exists and has no pyvenv.cfg, expected a virtual environment or nothing"
    unreported "$base" -m venv --clear "$venv" >&2 ||
        fail "$base cannot make $venv, it says above why: on Debian install python3-venv, or $other"
}

pip_install() { unreported "$python" -m pip install --disable-pip-version-check --quiet "$@"; }

# PyPI's torch for Linux is the one for CUDA, gigabytes with its libraries. Without a GPU the pinned version is taken
# from the index for CPUs, if that has it and the user has named no index: its 2.13.0+cpu is a 2.13.0, so that pip
# lets it be when it installs the rest. The mark is for the day when there is a GPU.
cpu_index=https://download.pytorch.org/whl/cpu
mark=$venv/torch_is_for_cpus.txt
choose_torch() {
    local torch
    torch=$(grep '^torch==' requirements.txt)
    if lacks_cuda; then
        pip_install --no-deps --force-reinstall "$torch" && rm "$mark"
    elif [ "$(uname -s)" = Linux ] && ! has_gpu && ! has_own_index; then
        pip_install --no-deps --index-url "$cpu_index" --timeout 20 --retries 1 "$torch" 2>/dev/null || return 0
        ! is_for_cpus || echo "$cpu_index" >"$mark"
    fi
}

lacks_cuda() { [ -e "$mark" ] && has_gpu; }
is_for_cpus() { ls -d "$venv"/lib/python3*/site-packages/torch-*+cpu.dist-info >/dev/null 2>&1; }

# NVIDIA's, the last one under WSL 2
has_gpu() {
    local file
    for file in /dev/nvidia[0-9]* /dev/nvidiactl /usr/lib/wsl/lib/nvidia-smi; do
        [ ! -e "$file" ] || return 0
    done
    command -v nvidia-smi >/dev/null
}

# By PIP_... or a pip.conf: that decides which torch there is.
has_own_index() { "$python" -m pip config list 2>/dev/null | grep -E 'index|find-links' >/dev/null; }
