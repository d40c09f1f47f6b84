#!/usr/bin/env bash
# `make gpu`: everything a visit to a GPU is for, in under eight minutes. Tests there, GPU and CPU side by side on
# real text, speed; written to dev/results/CARD-DATE.md as it is to be committed.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
command -v nvidia-smi >/dev/null || { echo "make gpu: no nvidia-smi: this machine has no GPU"; exit 1; }
card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1) || exit 1
to=dev/results/$(echo "$card" | tr -c 'A-Za-z0-9\n' '-')-$(date -u +%Y-%m-%d).md
make all test_us_cuda train_us_cuda bench_gpu out/self.txt || exit 1
mkdir -p dev/results out
{
    echo "# $card, $(date -u +%Y-%m-%d)"
    echo
    echo "Written by \`make gpu\`: commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), driver" \
         "$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)," \
         "$(nvcc --version | sed -n 's/.*release \([0-9.]*\).*/CUDA \1/p')."
} >out/gpu.md
start=$SECONDS
echo "tests on the GPU"
./test_us_cuda 2>&1 | tee out/gpu_tests.txt
failed=$?
{
    echo; echo "## Tests"; echo; echo '```'
    grep -E 'FAILED|passed' out/gpu_tests.txt
    echo '```'
} >>out/gpu.md
echo "GPU and CPU side by side"
flags="--input out/self.txt --steps 200 --eval-every 100 --tokens 1"
rm -rf out/on_gpu out/on_cpu
# shellcheck disable=SC2086
./train_us_cuda $flags --out out/on_gpu >out/on_gpu.txt 2>&1 || { cat out/on_gpu.txt; failed=1; }
# shellcheck disable=SC2086
./train_us $flags --out out/on_cpu >out/on_cpu.txt 2>&1 || { cat out/on_cpu.txt; failed=1; }
{
    echo; echo "## One run on both (\`$flags\`)"; echo
    echo "| step | loss, GPU | loss, CPU | apart |"; echo "|---|---|---|---|"
    paste -d, out/on_gpu/log.csv out/on_cpu/log.csv | awk -F, \
        'NR > 1 && ($1 == 1 || $1 % 20 == 0) { printf "| %d | %s | %s | %.3f %% |\n", $1, $2, $9, 100 * ($2 / $9 - 1) }'
    echo
} >>out/gpu.md
echo "speed"
./bench_gpu | tee out/gpu_bench.md
[ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
cat out/gpu_bench.md >>out/gpu.md
echo "all of it took $((SECONDS - start)) s" | tee -a /dev/null
cp out/gpu.md "$to"
[ -z "${OUT:-}" ] || cp out/gpu.md "$OUT/"
echo "wrote $to"
exit $failed
