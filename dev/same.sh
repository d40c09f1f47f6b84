#!/usr/bin/env bash
# Does this tree compute what another commit does?   dev/same.sh COMMIT
# Builds both, on CPU and emulator, trains every scheme, precision and optimizer for 50 steps, dumps a first step, and
# compares logs (but for their times), checkpoints and dumps byte for byte. Ends with "N passed, N failed".
cd "$(dirname "$0")/.." || exit 1
commit=$(git rev-parse --verify -q "${1:-}^{commit}") || { echo "usage: $0 COMMIT"; exit 1; }
new=$PWD dir=$(mktemp -d) passed=0 failed=0
trap 'git worktree remove -f "$dir/old"; rm -rf "$dir"' EXIT
git worktree add -q --detach "$dir/old" "$commit" || exit 1
for tree in "$dir/old" "$new"; do make -s -C "$tree" train_us train_us_emu || exit 1; done
model="--input $new/LICENSE --layers 2 --width 32 --heads 1 --seq 20 --batch 3 --accum 2 --steps 50 --eval-every 20 --eval-tokens 500 --tokens 20 --stats-every 25"
one() { # folder of the results, program, flags
    rm -rf "$1" && mkdir -p "$1" && cd "$1" || return 1
    # shellcheck disable=SC2086
    "${@:2}" $model --out run >out.txt 2>&1 && "${@:2}" $model --dump dump.safetensors >>out.txt 2>&1 || return 1
    cut -d, -f 1-5 run/log.csv >run/losses.csv && rm run/log.csv
    grep -v -e '/50 | loss' -e 'CPU\|GPU\|memory' out.txt >run/text.txt
    rm out.txt
}
export OMP_NUM_THREADS=1
for program in train_us train_us_emu; do
    for flags in "--scheme "{us,sp,mup,umup,us-pre,us-mean}" --precision "{fp32,bf16,fp8}" --optimizer "{adamw,lion} "--activation silu --recompute" "--scheme sp --activation relu --recompute"; do
        # shellcheck disable=SC2086
        if (one "$dir/a" "$dir/old/$program" $flags) & (one "$dir/b" "$new/$program" $flags) && wait $! &&
            diff -r "$dir/a" "$dir/b" && [ -s "$dir/a/dump.safetensors" ] && [ -s "$dir/a/run/checkpoint.safetensors" ]; then
            passed=$((passed + 1))
        else
            failed=$((failed + 1))
            echo "FAILED: $program $flags"
        fi
    done
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
