# SPDX-License-Identifier: BSD-3-Clause
# Completion of tmemctl for bash: commands, their options, and the names of pools. Install it as
# /usr/share/bash-completion/completions/tmemctl, or source it.
# shellcheck shell=bash

_tmemctl() {
    local candidates
    if ((COMP_CWORD == 1)); then
        candidates=$(tmemctl --help | sed -nE 's/^    ([a-z-]+).*/\1/p')
    elif [[ $2 == -* ]]; then
        candidates=$(tmemctl "${COMP_WORDS[1]}" --help 2>/dev/null | grep -oE -- '--[a-z]+')
    else
        candidates=$(tmemctl list 2>/dev/null | awk 'NR > 1 { print $1 }')
    fi
    mapfile -t COMPREPLY < <(compgen -W "$candidates" -- "$2")
}

# Files too: what record writes, and simulate and check read.
complete -o default -F _tmemctl tmemctl
