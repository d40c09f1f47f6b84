#!/usr/bin/env bash
# `make gpu`: everything a visit to a GPU is for, in under eight minutes. Builds for this card, runs all tests on it,
# trains on GPU and CPU side by side, measures; writes dev/results/CARD-DATE.md as it goes (and a copy to the folder
# OUT, if that is set), to be committed as it is.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
if ! command -v nvidia-smi >/dev/null || ! card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1); then
    echo "make gpu: no GPU is found here (nvidia-smi); make test_us_emu && ./test_us_emu tests the same source on a CPU"
    exit 1
fi
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
command -v nvcc >/dev/null || { echo "make gpu: nvcc is not on PATH (the CUDA Toolkit puts it into its bin/)"; exit 1; }
start=$SECONDS failed=0
to=dev/results/$(echo "$card" | tr -cs 'A-Za-z0-9\n' '-')-$(date -u +%Y-%m-%d).md
make -j4 train_us test_us_cuda train_us_cuda bench_gpu out/self.txt || exit 1
mkdir -p dev/results out
trap '[ -z "${OUT:-}" ] || cp "$to" "$OUT/"' EXIT
exec 3>"$to"
cat >&3 <<END
# $card, $(date -u +%Y-%m-%d)

Written by \`make gpu\`: commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), driver $(nvidia-smi \
--query-gpu=driver_version --format=csv,noheader | head -n 1), $(nvcc --version | sed -n 's/.*release \([0-9.]*\).*/CUDA \1/p').

## Tests

END
echo "tests on the GPU"
echo '```' >&3
timeout 200 ./test_us_cuda 2>&1 | tee /dev/stderr | grep -E 'FAILED|passed' >&3 || failed=1
[ "${PIPESTATUS[0]}" -eq 0 ] || { failed=1; echo "tests failed, or took longer than 200 s" >&3; }
echo '```' >&3

echo "GPU and CPU side by side"
flags="--input out/self.txt --steps 200 --eval-every 100 --tokens 1"
rm -rf out/on_gpu out/on_cpu
# shellcheck disable=SC2086
./train_us_cuda $flags --out out/on_gpu || failed=1
# shellcheck disable=SC2086
./train_us $flags --out out/on_cpu || failed=1
printf '\n## One run on both (`%s`)\n\n| step | loss, GPU | loss, CPU | apart |\n|---|---|---|---|\n' "$flags" >&3
paste -d, out/on_gpu/log.csv out/on_cpu/log.csv | awk -F, '
    NR > 1 { apart = 100 * ($2 / $9 - 1); if (!(apart < 1 && apart > -1)) bad = 1 }
    NR > 1 && ($1 == 1 || $1 % 20 == 0) { printf "| %d | %s | %s | %.3f %% |\n", $1, $2, $9, apart }
    END { if (NR != 201) bad = 1; if (bad) print "\nMore than 1 % apart, or not all steps were taken."; exit bad }' >&3 || failed=1

echo "speed"
echo >&3
timeout 280 ./bench_gpu | tee /dev/stderr >&3 || { failed=1; echo "bench_gpu failed, or took longer than 280 s" >&3; }
echo "
All of it took $((SECONDS - start)) s." >&3
echo "wrote $to"
exit $failed
