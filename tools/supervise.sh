# For run.sh: one line for what is wrong, signals, and a lock. Bash 3.2 or newer.

fail() { fail_with 1 "$@"; }
fail_with() { echo "run.sh: ${*:2}" >&2 || true; exit "$1"; }  # a terminal that is gone takes no line

# A hang-up, ctrl-C or SIGTERM ends what runs, once and as SIGTERM, whether it was sent to run.sh or to all of
# its processes. Under nohup a hang-up is ignored, which no trap changes: the run goes on.
child='' stopped='' left=''
stop() {
    [ -z "$stopped" ] || return 0
    stopped=$1
    [ -n "$child" ] || fail_stopped  # a short command, which has ended
    [ "$child" = starting ] || end_child
}
end_child() {
    echo "run.sh: SIG$stopped: waiting until process group $child has saved and ended" >&2 || true
    kill -TERM -- "-$child" 2>/dev/null || true
}
fail_stopped() { fail_with $((128 + $(kill -l "$stopped"))) "stopped by SIG$stopped$left"; }
for signal in HUP INT QUIT TERM; do trap "stop $signal" "$signal"; done

# In a subshell: runs a command that a signal may end, without a line of bash's own about that ("Terminated"), which
# it writes to its stderr; the command has it as descriptor 3 meanwhile.
unreported() {
    trap 'exit 143' TERM
    "$@" 2>&3 3>&-
} 3>&2 2>/dev/null

# Runs a command or function in a process group of its own (set -m), where no signal of the terminal arrives, and
# which ignores hang-ups: torchrun would end by one and leave its workers. `left`: what is there if it is stopped.
supervise() {
    local status=0
    child=starting
    set -m
    (trap '' HUP; unreported "$@") </dev/null &
    child=$!
    set +m
    [ -z "$stopped" ] || end_child  # the signal came before the process had a number
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do  # a signal has ended `wait`, not the process
        status=0
        wait "$child" || status=$?
    done
    child=
    [ -z "$stopped" ] || fail_stopped
    return "$status"
}

# lock FILE PYTHON: until this script and all that it starts are gone.
lock() {
    { exec 9>>"$1"; } 2>/dev/null || fail "$1: cannot be written: run in a copy that belongs to you"
    "$2" tools/lock.py "$1"
}
