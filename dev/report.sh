# shellcheck shell=bash
# Sourced by what runs on a GPU (gpu.sh, cuda/bench.sh). A report is written as it goes, into dev/results and into the
# folder OUT where that is set, so that it is there whatever ends the run; one of its first lines says how that went.
results=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/results

need_gpu() { # what can be done without
    if ! command -v nvidia-smi >/dev/null || ! card=$(nvidia-smi --query-gpu=name --format=csv,noheader) || [ -z "$card" ]; then
        echo "$0: no GPU is found here (nvidia-smi); $1"
        exit 1
    fi
    card=${card%%$'\n'*} # the first
    command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
    command -v nvcc >/dev/null || { echo "$0: nvcc is not on PATH (the CUDA Toolkit puts it into its bin/)"; exit 1; }
}
begin() { # title, what makes the report, the end of its name, the seconds that all of it may take
    local name number=""
    start=$SECONDS end=$((SECONDS + $4)) failed=""
    name=$(echo "$card" | tr -cs 'A-Za-z0-9\n' '-')-$(date -u +%Y-%m-%d)
    while [ -e "$results/$name$number$3.md" ]; do number=$((${number:--1} - 1)); done  # -2, -3: none is overwritten
    mkdir -p "$results"
    reports=("$results/$name$number$3.md")
    if [ -n "${OUT:-}" ]; then mkdir -p "$OUT" && reports+=("$OUT/$name$number$3.md"); fi
    say "# $1 on $card, $(date -u +%Y-%m-%d)" "" \
        "**UNFINISHED**: this report is being written, or something ended it: what follows is all there was time for." "" \
        "Written by \`$2\`: commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), driver $(nvidia-smi \
            --query-gpu=driver_version --format=csv,noheader | head -n 1), $(nvcc --version |
            sed -n 's/.*release \([0-9.]*\).*/CUDA \1/p')."
}
record() { tee -a "${reports[@]}"; }
say() { printf '%s\n' "$@" | record; }
run() { # name, seconds at most, command: its output is recorded, and whatever else but success
    local name=$1 limit=$2 left=$((end - SECONDS)) status
    shift 2
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 5 ]; then say "" "**NOT RUN**: $name: no time was left"; failed="$failed, $name"; return 1; fi
    timeout -k 5 "$limit" "$@" 2>&1 | record
    status=${PIPESTATUS[0]}
    case $status in
    0) return 0 ;;
    124 | 137) say "" "**FAILED**: $name: stopped after $limit s" ;;
    *) say "" "**FAILED**: $name: exit status $status" ;;
    esac
    failed="$failed, $name"
    return 1
}
finish() {
    local verdict="All of it took $((SECONDS - start)) s; nothing failed."
    [ -z "$failed" ] || verdict="**FAILED**: ${failed#, }. All of it took $((SECONDS - start)) s."
    sed -i "s|^\*\*UNFINISHED\*\*.*|$verdict|" "${reports[@]}"
    printf '\n%s\nwrote %s\n' "$verdict" "${reports[*]}"
    [ -z "$failed" ]
    exit
}
