#!/usr/bin/env bash
# `make bench`: builds all files for this machine's GPU, checks and times every version, in under seven minutes, and
# writes ../results/CARD-DATE-kernels.md (and into the folder OUT, if that is set), to be committed as it is. Then
# `make table` takes its figures into README.md.
set -u
cd "$(dirname "$0")" || exit 1
# shellcheck source=dev/report.sh
source ../report.sh
need_gpu "make -C dev/cuda check runs all kernels on a CPU"
begin "Kernels" "make -C dev/cuda bench" -kernels 400
run "build" 150 make -s -j"$(nproc)" all || finish
for file in *.cu; do
    say ""
    run "${file%.cu}" 90 "./${file%.cu}"
done
if python3 -c 'import torch' 2>/dev/null; then run "PyTorch's attention" 60 python3 sdpa.py; fi
finish
