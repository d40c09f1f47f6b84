#!/usr/bin/env bash
# `make table`: README.md's table anew. Names and ideas come from the programs, registers and spills from ptxas for
# sm_90, times from the newest file of ../results (a dash where it has none): of the first large shape.
set -eu -o pipefail
cd "$(dirname "$0")"
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
command -v nvcc >/dev/null || { echo "make table: nvcc is not on PATH (the CUDA Toolkit puts it into its bin/)"; exit 1; }
results=$(find ../results -name '*-kernels.md' 2>/dev/null | sed -E 's/(.*)([0-9]{4}-[0-9]{2}-[0-9]{2}(-[0-9]+)?)(-kernels.md)/\2 &/' |
    sort -V | tail -n 1 | cut -d ' ' -f 2)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for file in *.cu; do
    name=${file%.cu}
    echo "$name"
    make -B "$name" ARCH=sm_90 NVCC='nvcc -Xptxas -v' 2>&1 | tee "$work/log" | c++filt >"$work/$name.ptxas" ||
        { cat "$work/log"; exit 1; }
    "./$name" list >>"$work/list"
done
# function -> registers (+ bytes of spills); a shape's rows of a result file -> columns; then a row for each version
awk -F'\t' -v results="$results" '
    function registers(functions,   n, f, i, out) {
        n = split(functions, f, " ")
        if (n == 0) return "cuBLASLt"
        for (i = 1; i <= n; i++) out = out (i > 1 ? ", " : "") (f[i] in used ? used[f[i]] : "–")
        return out
    }
    FILENAME ~ /ptxas$/ && /Compiling entry function/ {
        name = $0
        sub(/.*function .(void )?/, "", name)
        sub(/\(.*/, "", name)
        gsub(/<__nv_bfloat16>|\(int\)/, "", name)
        spill = 0
    }
    FILENAME ~ /ptxas$/ && /spill stores/ { split($0, part, ","); spill = part[2] + 0 }
    FILENAME ~ /ptxas$/ && /Used [0-9]+ registers/ {
        match($0, /Used [0-9]+/)
        used[name] = substr($0, RSTART + 5, RLENGTH - 5) (spill ? " (" spill " bytes spilled)" : "")
    }
    FILENAME == results && /^### / { kernel = $0; sub(/^### /, "", kernel); sub(/:.*/, "", kernel); seen[kernel]++ }
    FILENAME == results && /^\| [0-9]+ \|/ && seen[kernel] == 1 {
        split($0, c, / *\| */)
        times[kernel, c[2]] = c[4] " | " c[5] " | " c[6] " | " c[7]
    }
    FILENAME ~ /list$/ {
        if ($2 != last) print (last ? "" : "") "| **" $2 "** (`" $1 ".cu`) | | | | | |"
        last = $2
        row = ($2, $3) in times ? times[$2, $3] : "– | – | – | –"
        print "| " $3 ". " $4 " | " registers($5) " | " row " |"
    }
' "$work"/*.ptxas ${results:+"$results"} "$work/list" >"$work/rows"
{
    sed '/^<!-- table -->$/q' README.md
    if [ -n "$results" ]; then echo "Times: $(sed -n '1s/^# Kernels on //p' "$results"), the first large shape of \`$results\`."
    else cat <<'END'
**Nothing here has been timed on a GPU yet.** All versions are checked on the emulator and compiled by nvcc for sm_90
and sm_80; which of two versions is faster, whether a candidate replaces what ships, and how far each is from its
floor are open until `make bench` has run.

END
    fi
    echo "Registers: of each function, in order, for sm_90 by $(nvcc --version | sed -n 's/.*release \([0-9.]*\).*/CUDA \1/p')."
    printf '\n| kernel and version | registers | us | GB/s or TFLOP/s | of the floor | speed |\n|---|---|---|---|---|---|\n'
    cat "$work/rows"
    sed -n '/^<!-- end of table -->$/,$p' README.md
} >"$work/README.md"
cp "$work/README.md" README.md
echo "README.md has the table of $(wc -l <"$work/list") versions"
