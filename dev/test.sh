#!/bin/sh
# What `make test` runs: the tests of the C, also with a model of Intel's matrix unit, of the CUDA source on the
# emulator in three ways, and on a GPU where there is one. Ends with one total over all parts; a part that crashes
# counts as one failure.
cd "$(dirname "$0")/.." || exit 1
out=$(mktemp) || exit 1
trap 'rm -f "$out"' EXIT
passed=0 failed=0
part() {
    echo "--- $*"
    { env "$@"; echo "exit $?"; } | tee "$out" | grep -v '^exit [0-9]*$'
    last=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$out" | tail -n 1)
    p=${last%% passed*} f=${last#*, } f=${f%% failed*}
    if ! grep -q '^exit 0$' "$out" && [ "${f:-0}" -eq 0 ]; then f=1; echo "this part ended with $(tail -n 1 "$out")"; fi
    passed=$((passed + ${p:-0})) failed=$((failed + ${f:-0}))
}
part ./test_us
part OMP_NUM_THREADS=2 ./test_us_amx matmul gradients oracle generate
part AMX_REFUSED=1 ./test_us_amx matmul oracle dump
part OMP_NUM_THREADS=1 ./test_us_emu
part OMP_NUM_THREADS=1 EMU_SEED=1 ./test_us_emu step_by_step
part OMP_NUM_THREADS=1 EMU_FP8_SUMS=13,256 ./test_us_emu oracle step_by_step
part OMP_NUM_THREADS=1 EMU_FP8_SUMS=12,0 ./test_us_emu oracle step_by_step
part OMP_NUM_THREADS=1 EMU_SPLIT_K=1 ./test_us_emu oracle step_by_step head_in_pieces next validation
if command -v nvidia-smi >/dev/null && nvidia-smi -L | grep -q GPU; then make test_us_cuda; part ./test_us_cuda
else echo "no GPU here: the CUDA source was tested on the emulator only"; fi
echo "total: $passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
