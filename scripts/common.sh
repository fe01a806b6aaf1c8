# Sourced by the scripts beside it.
# shellcheck shell=bash

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
