#!/usr/bin/env bash
# `make gpu`: everything a visit to a GPU is for, in under nine minutes (several GPUs: twenty); `make gpu_probe`,
# `gpu_test` and `gpu_bench` are its parts, and `gpu_ranks`: several GPUs, with NCCL and an MPI. Builds for this card, asks
# cuBLASLt for every product, runs all tests, trains on GPU and CPU side by side, measures. The report is
# dev/results/CARD-DATE.md (and in the folder OUT, if that is set), to be committed.
set -u
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=dev/report.sh
source dev/report.sh
part=${1:-all}
case $part in
all) begin=("make gpu" "") ;;
probe | test | bench | ranks) begin=("make gpu_$part" "-$part") ;;
*) echo "$0: probe, test, bench, ranks, or nothing for all" && exit 1 ;;
esac
need_gpu "make test_us_emu && ./test_us_emu tests the same source on a CPU"
gpus=$(nvidia-smi -L | grep -c GPU)
begin "us.c" "${begin[@]}" $((gpus > 1 ? 1100 : 520))

build() { run "build" 150 make -s -k -j"$(nproc)" "$@"; } # what is built is run, whatever is not
probe() {
    say "" "## What cuBLASLt proposes for each product" ""
    run "products" 60 ./probe_gpu
}
tests() { # group, seconds at most
    say "" "## Tests: $1" "" '```'
    run "tests: $1" "$2" ./test_us_cuda "$1"
    say '```'
}
train() { # program, where to; its own lines are of no interest unless it fails
    run "training $2" 90 sh -c "$1 $flags --out out/$2 >out/$2.txt 2>&1 || { s=\$?; tail -n 3 out/$2.txt; exit \$s; }"
}
both() {
    local flags="--input out/self.txt --steps 200 --eval-every 100 --tokens 1"
    say "" "## One run on both (\`$flags\`)" ""
    rm -rf out/on_gpu out/on_cpu
    train ./train_us_cuda on_gpu
    train ./train_us on_cpu
    say "| step | loss, GPU | loss, CPU | apart |" "|---|---|---|---|"
    paste -d, out/on_gpu/log.csv out/on_cpu/log.csv | awk -F, '
        NR > 1 { apart = 100 * ($2 / $9 - 1); if (!(apart < 1 && apart > -1)) bad = 1 }
        NR > 1 && ($1 == 1 || $1 % 20 == 0) { printf "| %d | %s | %s | %.3f %% |\n", $1, $2, $9, apart }
        END { exit bad || NR != 201 }' | record
    if [ "${PIPESTATUS[1]}" -ne 0 ]; then
        say "" "**FAILED**: losses are more than 1 % apart, or not all steps were taken"
        failed="$failed, GPU and CPU side by side"
    fi
}
bench() {
    say ""
    run "speed" 230 ./bench_gpu 200
}
ranks() { # where there are several GPUs: 1, 2, 4 and 8 of them, two models
    local n model rate first
    say "" "## Several GPUs" ""
    if [ "$gpus" -lt 2 ]; then say "There is one GPU here."; return 0; fi
    build -B bench_gpu MPI=1 || return 1
    rm -f out/ranks_*
    for model in 124M 1.5B; do
        for n in 1 2 4 8; do
            [ "$n" -le "$gpus" ] || continue
            run "$model on $n GPUs" 120 sh -c "mpirun --allow-run-as-root -np $n ./bench_gpu $model >out/ranks_${model}_$n.md"
        done
        say "" "| $model, fp8 | tokens/s | of perfect scaling | ms in collectives, a step |" "|---|---|---|---|"
        first=$(awk -F'|' '/^\| fp8 / { print $4 }' "out/ranks_${model}_1.md")
        for n in 1 2 4 8; do
            grep -q '^| fp8' "out/ranks_${model}_$n.md" 2>/dev/null || continue
            rate=$(awk -F'|' '/^\| fp8 / { print $4 }' "out/ranks_${model}_$n.md")
            awk -F'|' -v n="$n" -v rate="$rate" -v first="$first" '
                / (reduce-scatter|all-gather|result) / { ms += $4 }
                END { printf "| %d GPUs | %d | %.1f %% | %.2f |\n", n, rate, 100 * rate / first / n, ms }
                ' "out/ranks_${model}_$n.md" | record
        done
    done
}
case $part in
ranks)
    ranks
    ;;
probe)
    build probe_gpu
    probe
    ;;
test)
    build train_us test_us_cuda train_us_cuda out/self.txt
    tests arithmetic 150
    both
    tests program 300
    ;;
bench)
    build bench_gpu
    bench
    ;;
all) # the program's tests start hundreds of processes: last
    build train_us test_us_cuda train_us_cuda bench_gpu probe_gpu out/self.txt
    probe
    tests arithmetic 150
    both
    bench
    tests program 300
    ranks
    ;;
esac
finish
