#!/usr/bin/env bash
# `make bench`: builds all files for this machine's GPU, checks and times every version, in under six minutes, and
# writes ../results/CARD-DATE-kernels.md (and a copy to the folder OUT, if that is set), to be committed as it is. Then `make table` takes its figures into README.md.
set -u -o pipefail
cd "$(dirname "$0")" || exit 1
if ! command -v nvidia-smi >/dev/null || ! card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1); then
    echo "make bench: no GPU is found here (nvidia-smi); make -C dev/cuda check runs all kernels on a CPU"
    exit 1
fi
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
command -v nvcc >/dev/null || { echo "make bench: nvcc is not on PATH (the CUDA Toolkit puts it into its bin/)"; exit 1; }
start=$SECONDS failed=0 files=$(ls ./*.cu | sed 's/.cu$//')
to=../results/$(echo "$card" | tr -cs 'A-Za-z0-9\n' '-')-$(date -u +%Y-%m-%d)-kernels.md
make -j8 all || exit 1
mkdir -p ../results
trap '[ -z "${OUT:-}" ] || cp "$to" "$OUT/"' EXIT
cat >"$to" <<END
# Kernels on $card, $(date -u +%Y-%m-%d)

Written by \`make -C dev/cuda bench\`: commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), driver $(nvidia-smi \
--query-gpu=driver_version --format=csv,noheader | head -n 1), $(nvcc --version | sed -n 's/.*release \([0-9.]*\).*/CUDA \1/p').

END
for file in $files; do
    left=$((330 - SECONDS + start))
    timeout $((left < 1 ? 1 : left < 90 ? left : 90)) "$file" 2>&1 | tee -a "$to" ||
        { failed=1; echo "$file failed, or took longer than the time there is" | tee -a "$to"; }
    echo >>"$to"
done
left=$((345 - SECONDS + start))
if [ $left -gt 5 ] && python3 -c 'import torch' 2>/dev/null; then timeout $left python3 sdpa.py 2>&1 | tee -a "$to" || failed=1; fi
echo "
All of it took $((SECONDS - start)) s." >>"$to"
echo "wrote $to"
exit $failed
