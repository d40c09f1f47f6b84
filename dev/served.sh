#!/bin/sh
# What W8A8 costs a model: weights and activations of the hidden matmuls in E4M3, no scale anywhere, nothing calibrated.
#
#   dev/served.sh data/tinyshakespeare.txt [SEEDS]     three models of the default shape for each seed (1), a table
#
# Each is trained, validated as it was trained, exported in FP8, and the exported file is validated: over all of the
# validation data. What is there in out/served, by the text's name and checksum, is not trained again.
cd "$(dirname "$0")/.." || exit 1
die() { echo "served.sh: $*" >&2; exit 1; }
[ $# -ge 1 ] && [ -f "$1" ] || die "give a text, as data/tinyshakespeare.txt (sh data/tinyshakespeare.sh fetches it)"
make -s train_us || die "./train_us is not there, and make cannot build it"
text=$1 name=$(basename "$1" .txt)_$(cksum <"$1" | cut -d ' ' -f 1)
loss() { ./train_us --load "$1" --input "$text" --evaluate | sed -n 's/^validation loss \([0-9.]*\),.*/\1/p'; }
echo "| trained | seed | as trained | exported, W8A8 | W8A8 is higher by |"
echo "|---|---|---|---|---|"
for how in "us fp8" "us bf16" "sp bf16"; do
    scheme=${how% *} precision=${how#* } seed=1
    while [ "$seed" -le "${2:-1}" ]; do
        dir=out/served/$name/${scheme}_${precision}_$seed
        trained=$dir/checkpoint.safetensors model=$dir/model.safetensors
        mkdir -p "$dir"
        ./train_us --input "$1" --scheme "$scheme" --precision "$precision" --seed "$seed" --out "$dir" --resume \
            >"$dir/log.txt" 2>&1 || die "training failed: $dir/log.txt says why"
        ./train_us --load "$trained" --precision fp8 --export "$model" >/dev/null || exit 1
        before=$(loss "$trained") after=$(loss "$model")
        [ -n "$before" ] && [ -n "$after" ] || die "no validation loss of $trained, or of its export"
        awk -v how="$scheme, $precision" -v seed="$seed" -v a="$before" -v b="$after" \
            'BEGIN { printf "| %s | %s | %s | %s | %.4f |\n", how, seed, a, b, b - a }'
        seed=$((seed + 1))
    done
done
