# SPDX-License-Identifier: BSD-3-Clause
# Sourced by the scripts beside it.
# shellcheck shell=bash

# By which detach knows the swap areas that attach made.
# shellcheck disable=SC2034 # it is theirs
SWAP_LABEL=tmemd

# Print the caller's header comment, from its Usage line on, as its help.
usage() {
    sed -nE '/^# Usage:/,/^[^#]/s/^# ?//p' "$0"
}

die() {
    echo "${0##*/}: $*" >&2
    exit 1
}

bad_usage() {
    echo "${0##*/}: $*" >&2
    usage >&2
    exit 2
}

# For an option that takes a value: wants_value "$@"
wants_value() {
    [[ ${2-} ]] || bad_usage "$1 wants a value"
}

require_root() {
    ((EUID == 0)) || die "needs root"
}

swapped_on() {
    awk -v device="$1" '$1 == device { found = 1 } END { exit !found }' /proc/swaps
}

require_commands() {
    local command
    for command; do
        command -v "$command" >/dev/null || die "no $command on this machine; install it (on Debian: scripts/setup)"
    done
}

# Whether this shell started the process and it has not ended; the number of one that has may be a stranger's.
is_running() {
    jobs -pr | grep -qx "$1"
}

# End those of the processes that are ours and still run, the last one first.
stop_processes() {
    local i
    for ((i = $#; i > 0; i--)); do
        is_running "${!i}" || continue
        kill "${!i}" 2>/dev/null || continue
        timeout 10 tail --pid="${!i}" --follow /dev/null || ! is_running "${!i}" || kill -KILL "${!i}"
    done
}

# Wait until the file is there, or the process that is to make it is not: await_file FILE PID
await_file() {
    local tries
    for ((tries = 0; tries < 300; tries++)); do
        [[ ! -e $1 ]] || return 0
        kill -0 "$2" 2>/dev/null || return 1
        sleep 0.1
    done
    return 1
}
