#!/bin/sh
# The tests of nccl.h on one to four ranks; then each mistake that must end the program, on three ranks, by
# the words that it must leave. The last line is the total.
cd "$(dirname "$0")/../.." || exit 1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1
ranks() {
    n=$1
    shift
    timeout -k 2 60 mpirun --oversubscribe -np "$n" "$@" >out/test_nccl.txt 2>&1 </dev/null
}
passed=0 failed=0
for n in 1 2 3 4; do
    ranks $n out/test_nccl
    code=$?
    last=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' out/test_nccl.txt)
    p=${last%% passed*} f=${last#*, } f=${f%% failed*}
    if [ $code -ne 0 ]; then
        grep FAIL out/test_nccl.txt || cat out/test_nccl.txt
        [ "${f:-0}" -gt 0 ] || f=1
    fi
    echo "on $n: ${last:-ended with $code}"
    passed=$((passed + ${p:-0})) failed=$((failed + ${f:-0}))
done
out/test_nccl bugs >out/test_nccl_bugs.txt
while IFS='|' read -r name words; do
    if EMU_NCCL_SECONDS=2 ranks 3 out/test_nccl "$name"; then code=0; else code=$?; fi
    if [ $code -ne 0 ] && [ $code -ne 124 ] && grep -qF "$words" out/test_nccl.txt; then
        passed=$((passed + 1)) verdict=caught
    else
        failed=$((failed + 1)) verdict="NOT CAUGHT (ended with $code)"
        cat out/test_nccl.txt
    fi
    echo "bug $name is $verdict"
    grep -m 1 'emu: ' out/test_nccl.txt | sed 's/^/    /'
done <out/test_nccl_bugs.txt
echo "$passed passed, $failed failed"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
