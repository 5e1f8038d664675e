# For run.sh: the virtual environment $venv with what stands in requirements.txt and tests/requirements.txt.

# A stamp of the requirements marks a finished installation: nothing is installed twice, nor left half done.
wanted=$(cat requirements.txt tests/requirements.txt)
is_installed() { [ "$(cat "$venv/installed.txt" 2>/dev/null)" = "$wanted" ] && "$python" -c '' 2>/dev/null; }

install() {
    local base=${PYTHON:-python3} found
    local other="name another Python, PYTHON=/path/to/python3.11 ./run.sh"
    command -v "$base" >/dev/null || fail "no program $base, expected Python 3.11 or newer: $other"
    found=$("$base" -c 'import sys; print(sys.version.split()[0]); sys.exit(sys.version_info < (3, 11))') ||
        fail "$base: version ${found:-unknown}, expected Python 3.11 or newer: $other"
    mkdir -p "$(dirname "$venv")"
    lock "$venv.lock" "$base"
    rm -f "$venv/installed.txt"
    "$python" -m pip --version >/dev/null 2>&1 || make_venv
    "$python" -m pip install --disable-pip-version-check --quiet -r requirements.txt -r tests/requirements.txt ||
        fail "not all of requirements.txt is in $venv, pip says above why: the first ./run.sh needs a network and" \
            "disk space; start it again to go on"
    printf '%s' "$wanted" >"$venv/installed.txt"
}

# --clear, as one that was interrupted may lack anything; but nothing else is ever cleared.
make_venv() {
    [ ! -e "$venv" ] || [ -e "$venv/pyvenv.cfg" ] ||
        fail "VENV=$venv: it exists and has no pyvenv.cfg, expected a virtual environment or nothing"
    "$base" -m venv --clear "$venv" >&2 ||
        fail "$base cannot make $venv, it says above why: on Debian install python3-venv, or $other"
}
