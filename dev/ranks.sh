#!/usr/bin/env bash
# Several GPUs, emulated: runs the trainer under mpirun with 1 to 4 ranks, as a user would, and looks at what it
# prints, writes and leaves; then the tests of arithmetic (test_ranks in test_us.c). Ends with "N passed, N failed".
#
#     dev/ranks.sh            needs an MPI (Debian: libopenmpi-dev openmpi-bin) and dev/emu's compiler
#     RANKS="" dev/ranks.sh   without the latter; "3": on so many ranks only
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
# shellcheck disable=SC2015
command -v mpirun >/dev/null && command -v mpicc >/dev/null ||
    { echo "ranks.sh: there is no mpirun or mpicc here (Debian: apt install libopenmpi-dev openmpi-bin)"; exit 1; }
make train_us test_us_emu train_us_emu MPI=1 >/dev/null || exit 1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1
out=$(mktemp -d) passed=0 failed=0
trap 'rm -rf "$out"' EXIT
launch() { # ranks, command
    if [ "$1" = 1 ]; then "${@:2}"; else timeout -k 5 120 mpirun --oversubscribe -np "$@"; fi
}
expect() { # what, command
    if "${@:2}"; then passed=$((passed + 1)); else failed=$((failed + 1)) && echo "  FAILED: $1"; fi
}
train="--input train_us.c --layers 2 --width 96 --heads 3 --seq 32 --batch 1 --warmup 4 --eval-every 10
    --eval-tokens 640 --tokens 1"
on() { # ranks, folder, flags: trains there with 6 batches a step, whatever the ranks; prints into folder.txt
    # shellcheck disable=SC2086
    launch "$1" ./train_us_emu $train --accum $((6 / $1)) --out "$out/$2" "${@:3}" >"$out/$2.txt" 2>"$out/$2.err"
}
losses() { awk -F, 'NR > 1 { print $2 }' "$out/$1/log.csv"; }
validated() { awk -F, 'NR == 11 { print substr($3, 1, 4) }' "$out/$1/log.csv"; }
near() { # two folders: every loss within 0.3 % (FP8), and there are 20
    paste <(losses "$1") <(losses "$2") |
        awk '{ x = $1 / $2 - 1; if (!(x < 0.003 && x > -0.003)) bad = 1 } END { exit bad || NR != 20 }'
}
same() { cmp -s <(losses "$1") <(losses "$2"); }
lines() { test "$(wc -l <"$out/$1")" -eq "$2"; }
said() { grep -q -e "$2" "$out/$1"; }
refused() { # the one line it has to say, ranks and more: within half a minute, a status that is not 0, one line
    local first
    timeout -k 5 30 mpirun --oversubscribe -np "${@:2}" >"$out/refused.txt" 2>"$out/refused.err"
    local status=$?
    first=$(grep '^train_us' "$out/refused.err")
    expect "refused with '$1', once: '$first', status $status" \
        test $status -ne 0 -a $status -ne 124 -a -z "${first##*"$1"*}" -a -n "$first" -a "$first" = "${first%%$'\n'*}"
}

# The same run on 1, 2 and 3 ranks; what 3 have saved goes on on 1, 2, 3 and the CPU.
for n in 1 2 3; do
    on $n of_$n --steps 20 --save-every 10
    expect "$n ranks train: $(tail -n 1 "$out/of_$n.err")" lines "of_$n.err" 0
    expect "$n ranks: as one" near of_$n of_1
    expect "$n ranks: the header once" test "$(grep -c '^us.c on GPU' "$out/of_$n.txt")" -eq 1
    expect "$n ranks: each step once" test "$(grep -c '^step' "$out/of_$n.txt")" -eq 20
    expect "$n ranks: 192 tokens a step" said of_$n.txt '; 192 tokens a step'
    expect "$n ranks: validation as one" test "$(validated of_$n)" = "$(validated of_1)"
done
expect "the header says what moves" said of_3.txt '^3 ranks, a GPU each; a step moves [0-9.]* MB of gradients'
expect "the memory plan is a rank's" said of_3.txt '^GPU memory of each rank: '
for n in 1 2 3; do
    mkdir "$out/on_$n" && cp "$out/of_3/log.csv" "$out/on_$n/"
    cp "$out/of_3/step_00000010.safetensors" "$out/on_$n/checkpoint.safetensors"
    on $n on_$n --resume --steps 20
    expect "saved by 3, resumed by $n" said on_$n.txt '^resumed from .*, step 10'
    expect "saved by 3, resumed by $n: the same losses" near on_$n of_3
done
expect "saved by 3, resumed by 3: the same bits" same on_3 of_3
expect "what they end with, too" cmp -s "$out/on_3/checkpoint.safetensors" "$out/of_3/checkpoint.safetensors"
mkdir "$out/on_cpu" && cp "$out/of_3/log.csv" "$out/on_cpu/"
cp "$out/of_3/step_00000010.safetensors" "$out/on_cpu/checkpoint.safetensors"
# shellcheck disable=SC2086
./train_us $train --accum 6 --steps 20 --out "$out/on_cpu" --resume >"$out/on_cpu.txt" 2>&1
expect "saved by 3, resumed on the CPU: the same losses" near on_cpu of_3

# Two runs in one folder, mistakes, and a rank that ends.
refused "holds a run already" 2 ./train_us_emu --input train_us.c --out "$out/of_3"
refused "there is no option --no" 3 ./train_us_emu --input train_us.c --no
EMU_GPUS=2 refused "there is no GPU: the machine has 2" 3 ./train_us_emu --input train_us.c
refused "rank 1: no file matches $out/none" 1 ./train_us_emu --input train_us.c : -np 1 ./train_us_emu \
    --input "$out/none"
refused "is not finite" 2 ./train_us_emu --input train_us.c --layers 1 --width 32 --heads 1 --seq 32 --scheme sp \
    --lr 1000 --warmup 0 --steps 20 --precision fp32 --out "$out/nan"
refused "differ in flags" 1 ./train_us_emu --input train_us.c --lr 0.5 : -np 1 ./train_us_emu --input train_us.c
mkdir "$out/half" "$out/other" && cp "$out/of_3/checkpoint.safetensors" "$out/half/"
# shellcheck disable=SC2086
refused "differ in flags" 1 ./train_us_emu $train --out "$out/half" --steps 30 --resume : -np 1 ./train_us_emu $train \
    --out "$out/other" --steps 30 --resume
expect "not finite: what was before it is saved" test -s "$out/nan/checkpoint.safetensors"
refused "looks at one GPU" 2 ./train_us_emu --input train_us.c --dump "$out/dump"
head -c 1500 train_us.c >"$out/short"
launch 4 ./train_us_emu --input "$out/short" --layers 1 --width 32 --heads 1 --seq 96 --steps 3 --eval-every 0 \
    --tokens 1 >"$out/short.txt" 2>&1
expect "more ranks' batches than a text has windows" test $? -eq 0

# A signal to mpirun: the run is saved once, and goes on.
on 3 stopped --steps 100000 &
for _ in $(seq 200); do ! said stopped.txt '^step 5/' 2>/dev/null || break; sleep 0.2; done
began=$SECONDS
pkill -USR1 -f "^mpirun.*$out/stopped"
wait
expect "a signal ends it at once" test $((SECONDS - began)) -lt 20
expect "a signal: $(tail -n 1 "$out/stopped.txt")" said stopped.txt '^stopped by a signal after step'
expect "saved once" test "$(grep -c '^saved ' "$out/stopped.txt")" -eq 1
last=$(sed -n 's/^saved .*, step //p' "$out/stopped.txt")
on 2 stopped --resume --steps $((last + 2))
expect "it goes on from step $last" said stopped.txt "^resumed from .*, step $last"
expect "every step is in the log once" test "$(losses stopped | wc -l)" -eq $((last + 2))

# A full disk at the first save: one line, no rank waits for ever, and the next save succeeds. Saves that are due by the
# clock: the first rank's. A trained model's uses.
mkdir "$out/full" && ln -s /dev/full "$out/full/checkpoint.safetensors.tmp"
on 3 full --steps 4 --save-every 2
expect "a full disk costs one save" said full.txt '^saved .*, step 4'
expect "and is said once" test "$(grep -c 'cannot write' "$out/full.err")" -eq 1
# shellcheck disable=SC2086
timeout -k 5 60 mpirun --oversubscribe \
    -x TEST_SAVE_SECONDS=0 -np 1 ./test_us_emu -- $train --steps 3 --out "$out/clock" : \
    -x TEST_SAVE_SECONDS=1000 -np 1 ./test_us_emu -- $train --steps 3 --out "$out/clock" >"$out/clock.txt" 2>&1
expect "the first rank's clock says when to save" test $? -eq 0
# shellcheck disable=SC2086
timeout -s KILL 90 mpirun --oversubscribe -x TEST_SAVE_SECONDS=0 -np 2 ./test_us_emu -- $train --steps 100000 \
    --out "$out/killed" >"$out/killed.txt" 2>&1 &
disown
for _ in $(seq 400); do [ ! -s "$out/killed/checkpoint.safetensors" ] || break; sleep 0.2; done
expect "and it is saved by the clock" test -s "$out/killed/checkpoint.safetensors"
pkill -KILL -f "(mpirun|test_us_emu) .*$out/killed"
model=$out/of_3/checkpoint.safetensors
for n in 1 3; do
    launch $n ./train_us_emu --load "$model" --evaluate --eval-tokens 640 2>&1 | tail -n 1 >"$out/evaluate_$n.txt"
    launch $n ./train_us_emu --load "$model" --generate --tokens 8 >"$out/generate_$n.txt" 2>&1
done
expect "they write alike" cmp -s "$out/generate_1.txt" "$out/generate_3.txt"
expect "they evaluate alike" cmp -s "$out/evaluate_1.txt" "$out/evaluate_3.txt"
expect "and there is something to evaluate" said evaluate_3.txt '^validation loss [0-9]'
on 2 again --steps 3 --recompute --stats-every 3
on 2 plain --steps 3
expect "--recompute and statistics change nothing" same again plain
echo "as a user would: $passed passed, $failed failed"

for n in ${RANKS-2 3 4 5}; do
    some=() && [ "$n" -lt "${SOME:-5}" ] || some=(ranks_agree ranks_follow) # from so many ranks on
    timeout -k 5 600 mpirun --oversubscribe -np "$n" ./test_us_emu "${some[@]}" >"$out/tests.txt" 2>&1
    expect "tests, $n ranks" test $? -eq 0
    grep -v '^ranks_' "$out/tests.txt" | tail -n 30 | sed "s/^/$n ranks: /"
    p=$(sed -n 's/^\([0-9]*\) passed.*/\1/p' "$out/tests.txt") && passed=$((passed + ${p:-0}))
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
