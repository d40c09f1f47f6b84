#!/usr/bin/env bash
# What gpu.sh and cuda/bench.sh leave behind when something fails, hangs, or is killed: they run here with stand-ins for
# the card, the compiler and all programs, and every time limit is two seconds. Ends with "N passed, N failed".
# shellcheck disable=SC2016
cd "$(dirname "$0")" || exit 1
dir=$(mktemp -d) passed=0 failed=0
trap 'rm -rf "$dir"' EXIT
mkdir -p "$dir/dev/cuda" "$dir/bin" "$dir/out"
cp gpu.sh report.sh "$dir/dev/" && cp cuda/bench.sh "$dir/dev/cuda/"
stand_in() { # path, lines of a script
    printf '%s\n' "#!/bin/bash" "${@:2}" >"$dir/$1" && chmod +x "$dir/$1"
}
stand_in bin/nvidia-smi 'echo Stand-in'
stand_in bin/nvcc 'echo release 0.0'
stand_in bin/timeout "exec $(command -v timeout) -k 1 2 \"\${@:4}\""
stand_in train_us 'mkdir -p "${!#}"; for i in $(seq 0 200); do echo "$i,2.5,,,,,"; done >"${!#}/log.csv"'
all_well() {
    rm -rf "$dir/dev/results" "$dir/OUT"
    stand_in bin/make 'exit 0'
    cp "$dir/train_us" "$dir/train_us_cuda"
    for program in probe_gpu test_us_cuda bench_gpu dev/cuda/gelu dev/cuda/zeta; do stand_in $program "echo of $program"; done
    touch "$dir/dev/cuda/gelu.cu" "$dir/dev/cuda/zeta.cu"
}
visit() { # script, arguments
    (cd "$dir" && PATH="$dir/bin:$PATH" OUT="$dir/OUT" "$@" >"$dir/log" 2>&1)
    status=$?
}
check() { # what is shown, the exit status, then patterns that both copies of the report have (! before it: do not have)
    local what=$1 bad="" pattern report
    [ "$status" -eq "$2" ] || bad=" exit status $status;"
    for report in "$dir"/dev/results/*.md "$dir"/OUT/*.md; do
        for pattern in "${@:3}"; do
            case $pattern in
            '! '*) ! grep -q -e "${pattern#! }" "$report" || bad="$bad has '${pattern#! }';" ;;
            *) grep -q -e "$pattern" "$report" || bad="$bad lacks '$pattern';" ;;
            esac
        done
    done
    if [ -z "$bad" ]; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        echo "FAILED: $what:$bad"
        cat "$report"
    fi
}

all_well; visit dev/gpu.sh
check "all is well" 0 "nothing failed" "of probe_gpu" "of bench_gpu" "| 200 | 2.5 | 2.5 | 0.000 %" '! FAILED' '! UNFINISHED'
visit dev/gpu.sh
status=$(find "$dir/dev/results" "$dir/OUT" -name '*-2.md' | wc -l)
check "a second report on the same day has another name" 2
for part in probe test bench; do
    all_well; visit dev/gpu.sh $part
    check "$part alone" 0 "gpu_$part" "nothing failed"
done
all_well; stand_in bin/nvidia-smi 'echo GPU 0; echo GPU 1'
stand_in bin/mpirun 'printf "| fp8 | 1 x 8 | %d | 2 |\n| all-gather | 9 | 0.5 |\n| reduce-scatter | 9 | 1.5 |\n" $(($3 * 90 + 10))'
visit dev/gpu.sh ranks
check "several GPUs" 0 "| 1 GPUs | 100 | 100.0 % | 2.00 |" "| 2 GPUs | 190 | 95.0 % | 2.00 |" '! 4 GPUs' "nothing failed"
all_well; stand_in bin/mpirun 'exit 1'; visit dev/gpu.sh ranks
check "several GPUs, of which none runs" 1 "exit status 1"
stand_in bin/nvidia-smi 'echo Stand-in'
all_well; stand_in test_us_cuda 'echo "  FAILED: a check"; exit 1'; visit dev/gpu.sh
check "a test that fails" 1 "^\*\*FAILED\*\*: tests: arithmetic, tests: program. All" "  FAILED: a check" "tests: arithmetic: exit status 1" "of bench_gpu"
all_well; stand_in test_us_cuda 'echo so far; kill -SEGV $$'; visit dev/gpu.sh
check "a test that crashes" 1 "so far" "tests: arithmetic: exit status 139"
all_well; stand_in bench_gpu 'echo a row; exec sleep 60'; visit dev/gpu.sh
check "a command that hangs" 1 "a row" "speed: stopped after" "^\*\*FAILED\*\*: speed. All"
all_well; stand_in bench_gpu 'trap "" TERM; echo a row; while :; do sleep 1; done'; visit dev/gpu.sh
check "a command that hangs and ignores signals" 1 "a row" "speed: stopped after" "^\*\*FAILED\*\*: speed. All"
all_well; stand_in train_us_cuda 'mkdir -p "${!#}"; for i in $(seq 0 200); do echo "$i,2.6,,,,,"; done >"${!#}/log.csv"'; visit dev/gpu.sh
check "losses that differ" 1 "more than 1 % apart" "^\*\*FAILED\*\*: GPU and CPU side by side. All"
all_well; stand_in train_us_cuda 'exit 3'; visit dev/gpu.sh
check "a run that fails" 1 "training on_gpu: exit status 3" "or not all steps"
all_well; stand_in bin/make 'echo "train_us.cu: error"; exit 2'; visit dev/gpu.sh
check "a build that fails in part" 1 "train_us.cu: error" "^\*\*FAILED\*\*: build. All" "of probe_gpu"
all_well; rm "$dir/bench_gpu"; visit dev/gpu.sh
check "a program that is not there" 1 "^\*\*FAILED\*\*: speed. All" "of test_us_cuda"
all_well; stand_in bench_gpu 'echo a row; exec sleep 2'
visit setsid bash -c 'dev/gpu.sh & until grep -q "a row" OUT/*.md 2>/dev/null; do sleep 0.1; done; kill -9 $!; wait'
check "SIGKILL in the middle" 0 "\*\*UNFINISHED\*\*" "of probe_gpu" "a row"
all_well; visit dev/cuda/bench.sh
check "the lab, all is well" 0 "nothing failed" "of dev/cuda/gelu" "of dev/cuda/zeta"
all_well; stand_in dev/cuda/gelu 'exec sleep 60'; visit dev/cuda/bench.sh
check "the lab, a file that hangs" 1 "gelu: stopped after" "of dev/cuda/zeta" "^\*\*FAILED\*\*: gelu. All"
for card in 'echo NVIDIA-SMI has failed; exit 9' 'exit 0' ''; do
    if [ -n "$card" ]; then stand_in bin/nvidia-smi "$card"; else rm "$dir/bin/nvidia-smi"; fi
    visit dev/gpu.sh
    if [ "$status" -eq 1 ] && grep -q "no GPU is found here" "$dir/log"; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        echo "FAILED: without a GPU:" && cat "$dir/log"
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
