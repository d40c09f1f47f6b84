#!/usr/bin/env bash
# Trains GPT-2's four sizes on FineWeb in FP8, in the way the method is meant: tune small, train large.
#
#     dev/gpt2.sh tune [SIZE]     finds the learning rate at width 256, with the layers of SIZE (124M)
#     dev/gpt2.sh SIZE [GPUS]     124M, 350M, 774M or 1558M at that rate; the same line again goes on
#     dev/gpt2.sh rehearse [GPUS] all of it in miniature, without GPU or network, to see that it works
#
# LAUNCH='mpirun -np GPUS' is how several are started; they tune on one. RATE=X trains without tuning.
# US=./train_us_cuda is the trainer (./train_us: the CPU's). DATA='GLOB' names
# other shards to train on; validation shards are called alike, with val for train. HELLASWAG=FILE: other
# questions. PRICE=X: dollars of a GPU hour. PYTHON=python3. OUT=out/gpt2: there each run gets a folder.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1

# What differs between tuning and training is the width (in heads of 64) and the number of steps (warm-up is
# the same share). Layers stay: tau follows from them, and what µS promises is a rate that holds over width
# (arXiv 2502.05967); over depth it moved here (dev/paper/README.md). The sweep goes by octaves, downhill from
# `first`. A step is `batch` sequences, 524,288 tokens: 10 billion in all. Each `every` steps it validates on
# `valid` tokens (0: all), at the end on all. After step `timed` it says when that will be, and the cost.
table='
#          training                        tuning                 both
# size     layers width heads steps warmup width heads steps first   seq batch every   valid sample timed
  124M         12   768    12 19073    700   256     4  2384 0.0625 1024   512   250 1048576    256    20
  350M         24  1024    16 19073    700   256     4  2384 0.0625 1024   512   250 1048576    256    20
  774M         36  1280    20 19073    700   256     4  2384 0.0625 1024   512   250 1048576    256    20
  1558M        48  1600    25 19073    700   256     4  2384 0.0625 1024   512   250 1048576    256    20
  rehearsal     2    64     2    24      3    32     1     8    0.5   64     8     8       0     16     4'
method=(--scheme us --precision fp8 --optimizer adamw --decay 0.001 --base-width 256 --seed 1)

say() { printf '%s\n' "$*"; }
die() { say "gpt2.sh: $*" >&2; exit 1; }
check() { "$@" && [ -z "$stopped" ] || exit 1; } # a command that says itself what is wrong
gpt2() { "$python" dev/gpt2.py "$@"; }
python=${PYTHON:-python3} us=${US:-./train_us_cuda} out=${OUT:-out/gpt2} gpus=1 questions="" stopped="" launch=()
trap 'stopped=1' INT # Ctrl-C reaches the trainer too, which saves (several GPUs: see train)

read_table() { # size
    local row
    row=$(grep -E "^  ${1//[^0-9A-Za-z]/-} " <<<"$table")
    [ -n "$row" ] || die "SIZE is 124M, 350M, 774M or 1558M, not '$1'"
    read -r size layers width heads steps warmup tune_width tune_heads tune_steps first seq batch every \
        valid sample timed <<<"$row"
}
get_trainer() {
    local mpi=()
    command -v "$python" >/dev/null || die "there is no $python: name one with PYTHON="
    if [ "$gpus" != 1 ]; then
        [[ $gpus =~ ^[1-9][0-9]*$ ]] || die "GPUS is a number, not '$gpus'"
        [ $((batch % gpus)) -eq 0 ] || die "GPUS $gpus does not divide a step's $batch sequences"
        [ "${us##*/}" != train_us ] || die "GPUS $gpus: $us trains on the CPU"
        read -ra launch <<<"${LAUNCH:-mpirun -np $gpus}"
        command -v "${launch[0]}" >/dev/null || die "there is no ${launch[0]} to start $gpus GPUs with (LAUNCH=)"
        mpi=(MPI=1)
    fi
    [ ! -x "$us" ] || { [ "$gpus" != 1 ] && ! grep -q MPI_Init_thread "$us"; } || return 0
    [ "${us##*/}" != train_us_cuda ] || command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] ||
        die "there is no nvcc to build $us with: install the CUDA Toolkit, or train on the CPU, US=./train_us"
    make "${mpi[@]}" "${us##*/}" || die "$us could not be built: see above"
}
get_data() { # for so many steps, from shards of 100 million tokens
    local shards=$((($1 * batch * seq + 99999999) / 100000000))
    data=${DATA:-data/fineweb10B/fineweb_train_*.bin}
    val=${data%train*}val${data##*train}
    if [ -z "${DATA:-}" ] && [ "$(compgen -G "$data" | wc -l)" -lt "$shards" ]; then
        check "$python" data/fineweb.py --shards "$shards"
    fi
    compgen -G "$data" >/dev/null || die "no shard is called $data"
    compgen -G "$val" >/dev/null || die "no shard is called $val, to validate on"
}
get_questions() {
    questions=${HELLASWAG:-data/hellaswag/hellaswag_val.bin}
    [ -e "$questions" ] || [ -n "${HELLASWAG:-}" ] || "$python" data/hellaswag.py
    [ -e "$questions" ] || { say "without HellaSwag: there is no $questions" && questions=""; }
}
fit() { # flags of a run: prints the micro-batch, the largest power of two that the trainer has memory for
    local b=$((batch / gpus)) kept most recompute="" said
    until said=$("${launch[@]}" "$us" "$@" --batch "$b" --steps 1 --eval-every 0 --eval-tokens 1 --tokens 1 2>&1); do
        said=$(grep -m 1 "^train_us" <<<"$said" || grep -m 1 '[a-z]' <<<"$said") # the latter is mpirun's
        case $said in
        *"largest that fits is --batch "*) # --batch 37, or --batch 80 --recompute; or the latter alone
            most=${said##*--batch } kept=${said##*fits is --batch }
            most=${most%% *} kept=${kept%%[, ]*}
            if [[ $said != *", or "* ]] || [ "$kept" -lt 4 ]; then # HellaSwag's questions have 4 endings
                kept=$most recompute=--recompute
            fi
            while [ "$b" -gt "$kept" ]; do b=$((b / 2)); done
            break ;;
        *"GB of memory wanted"*) # the CPU's trainer says no more than that
            [ "$b" -gt 1 ] || die "$said"
            b=$((b / 2)) ;;
        *) die "$said" ;;
        esac
    done
    say --batch "$b" --accum $((batch / gpus / b)) $recompute
}
train() { # folder, width, heads, steps, warm-up, rate: fails if it diverged. STOP=N: stops it there
    local folder=$1 said before step
    local flags=(--input "$data" --val "$val" "${method[@]}" --layers "$layers" --width "$2" --heads "$3"
        --seq "$seq" --steps "$4" --warmup "$5" --lr "$6")
    check mkdir -p "$folder"
    [ ! -e "$folder/flags.txt" ] || [ "$(cat "$folder/flags.txt")" = "${flags[*]}" ] ||
        die "$folder was begun with other flags, those in flags.txt: move it away to begin anew"
    said=$(fit "${flags[@]}") && [ -z "$stopped" ] && read -ra micro <<<"$said" || exit 1
    say "${flags[@]}" >"$folder/flags.txt" || exit 1 # they work: from now on they stay
    say "== $folder: width $2, rate $6, $4 steps of $((batch * seq)) tokens, $said"
    [ -z "$questions" ] || [ "${micro[1]}" -ge 4 ] ||
        { say "without HellaSwag: it wants --batch 4, and there is memory for ${micro[1]}" && questions=""; }
    before=$(wc -l 2>/dev/null <"$folder/log.txt")
    # Of a Ctrl-C mpirun hears nothing, for it would kill its ranks: watch asks it to let them save.
    ${launch[0]:+setsid} "${launch[@]}" "$us" "${flags[@]}" "${micro[@]}" --eval-every "$every" \
        --eval-tokens "$valid" --tokens "$sample" ${questions:+--hellaswag "$questions"} --out "$folder" --resume 2>&1 |
        gpt2 watch "$folder/log.txt" $((batch * seq)) "$timed" "$gpus" "${PRICE:-0}" "${STOP:-0}" $$ "${launch[0]:-}"
    # What counts is the checkpoint: the last row of log.csv comes later, and fits where that does not.
    grep -Eq "(saved .*, step $4|nothing to do.*)\$" <(tail -n +$((before + 1)) "$folder/log.txt") && return 0
    ! tail -n 3 "$folder/log.txt" | grep -q 'is not finite' || return 1
    step=$(tail -n 1 "$folder/log.csv" 2>/dev/null | cut -d, -f 1) && [ -n "$step" ] || exit 1
    die "stopped after step ${step/step/0} of $4; the same line again goes on from the last that was saved"
}
tune() {
    local folder=$out/tune_${layers}_layers rate loss lr
    get_data "$tune_steps"
    while rate=$(gpt2 next "$folder" "$first") || exit 1 && [ -n "$rate" ]; do
        lr=$folder/lr_$rate loss=inf # of a run that diverges
        train "$lr" "$tune_width" "$tune_heads" "$tune_steps" $((warmup * tune_steps / steps)) "$rate" &&
            { loss=$(evaluate "$lr/checkpoint.safetensors" --eval-tokens "$valid") || exit 1; }
        say "${loss%%,*}" >"$lr/loss" || exit 1
    done
    gpt2 rates "$folder" "validation loss, width $tune_width, $layers layers, $tune_steps steps" |
        tee "$folder/rates.md" || exit 1
    say "$folder/rate: $(cat "$folder/rate"), for all that has $layers layers"
}
evaluate() { # file, flags: in the micro-batch of training
    "${launch[@]}" "$us" --load "$1" --evaluate "${micro[@]:0:2}" ${questions:+--hellaswag "$questions"} "${@:2}" |
        grep -E '^(validation loss|hellaswag: [0-9]+ of) '
}
run() {
    local folder=$out/$size model=$out/$size/model.safetensors rate trained exported
    rate=${RATE:-$(cat "$out/tune_${layers}_layers/rate" 2>/dev/null)}
    [ -n "$rate" ] || die "no rate is known for $layers layers: dev/gpt2.sh tune $size finds it (or RATE=X)"
    get_data "$steps"
    get_questions
    say "$size: $layers layers, $width wide, $heads heads. As embedding and head are two matrices here," \
        "and one in GPT-2, it has $(((2 * 50304 + seq + 12 * layers * width) * width / 1000000)) M parameters"
    train "$folder" "$width" "$heads" "$steps" "$warmup" "$rate" || die "it diverged: a lower RATE=X may help"
    check "$us" --load "$folder/checkpoint.safetensors" --export "$model"
    trained=$(evaluate "$folder/checkpoint.safetensors") && exported=$(evaluate "$model") || exit 1
    [ "$trained" = "$exported" ] || die "$model computes something else than what was trained: $exported"
    say "$exported" | tee "$folder/evaluate.txt"
    "$us" --load "$model" --generate --tokens "$sample" | tee "$folder/sample.txt" || exit 1
    check gpt2 result "$folder" "$size" "$val"
}

# The rehearsal runs this script as a user would, and looks at what it leaves.
expect() { # what, command
    "${@:2}" || die "rehearsal: not so: $1"
    expected=$((expected + 1))
}
refuses() { # a part of the one line that it has to say, command
    local said
    said=$("${@:2}" 2>&1) && die "rehearsal: this should have failed: ${*:2}"
    expect "one line with '$1' ($said)" test -z "${said##*"$1"*}" -a "$said" = "${said%%$'\n'*}"
}
column() { awk -F, -v n="$1" 'NR > 1 && $n != "" { print $n }' "$folder/log.csv"; }
within() { awk -v x="$1" -v low="$2" -v high="$3" 'BEGIN { exit !(x + 0 >= low + 0 && x + 0 <= high + 0) }'; }
rehearse() {
    local folder rate loss last fits="--batch 8 --accum 1" begin=$SECONDS expected=0 n=$gpus
    local text=data/tinyshakespeare.txt
    export PYTHON=$python US=$us OUT=$out/rehearsal_${us##*/} EMU_MEM_MIB=$((184 + 256 * n)) # of an emulated card
    [ "${us##*/}" != train_us_emu ] || fits="--batch 4 --accum $((2 / n))"
    [ -e "$text" ] || text=train_us.c
    folder=$OUT/rehearsal rate=$OUT/tune_${layers}_layers/rate
    rm -rf "$OUT"
    check mkdir -p "$OUT/data" && check gpt2 tiny "$OUT/data" "$text" "$seq"
    export DATA="$OUT/data/tiny_train_*.bin" HELLASWAG=$OUT/data/questions.bin
    refuses "SIZE is 124M, 350M" dev/gpt2.sh 1.5B
    refuses "3 does not divide" dev/gpt2.sh rehearsal 3
    refuses "tune rehearsal finds it" dev/gpt2.sh rehearsal "$n"
    refuses "no shard is called no_train.bin" env RATE=1 DATA=no_train.bin dev/gpt2.sh rehearsal "$n"
    check dev/gpt2.sh tune rehearsal
    say "== interrupted after 17 steps"
    ! STOP=17 dev/gpt2.sh rehearsal "$n" || die "rehearsal: an interrupted run should fail"
    expect "interrupted" within "$(column 1 | tail -n 1)" 17 $((steps - 1))
    expect "a full disk" grep -q "after step $steps of" <(ulimit -f 10000 && dev/gpt2.sh rehearsal "$n" 2>&1)
    check dev/gpt2.sh rehearsal "$n" | tee "$OUT/printed.txt" || exit 1
    loss=$(sed -n 's/^validation loss \([0-9.]*\).*/\1/p' "$folder/evaluate.txt") last=$(column 3 | tail -n 1)
    expect "the rate is the tuned one" grep -q -e "--lr $(cat "$rate")\$" "$folder/flags.txt"
    expect "the micro-batch is $fits" grep -q -e "tokens, $fits" "$OUT/printed.txt"
    expect "it said what it will cost" grep -q 'tokens/s: the .* GPU hours' "$OUT/printed.txt"
    expect "it resumed" grep -q 'resumed from .*checkpoint' "$folder/log.txt"
    expect "every step is in the log once" test "$(column 1)" = "$(seq "$steps")"
    expect "HellaSwag is in the log" test "$(column 8 | wc -l)" -eq $((steps / every))
    expect "it learnt" within "$loss" 0 "$(column 2 | awk 'NR == 1 { print $1 - 1 }')"
    expect "the log's last loss is evaluate's" within "$(awk "BEGIN { print $last - $loss }")" -0.001 0.001
    expect "what is exported is smaller" within "$(wc -c <"$folder/model.safetensors")" 1e6 \
        "$(wc -c <"$folder/checkpoint.safetensors")"
    expect "a sample" test -s "$folder/sample.txt"
    # Killed before the last rows of the logs:
    last=${rate%rate}lr_$(cat "$rate") && rm "$last/loss" && sed -i.bak '$d' "$last/log.csv" "$folder/log.csv"
    expect "the same rate" grep -q "^$rate: $(cat "$rate")," <(dev/gpt2.sh tune rehearsal)
    expect "the same loss" grep -q "^validation loss $loss," <(dev/gpt2.sh rehearsal "$n")
    ! "$python" -c 'import matplotlib' 2>/dev/null ||
        expect "pictures" test -s "$folder/loss.png" -a -s "${rate}s.png"
    say "rehearsed with $us in $((SECONDS - begin)) s: tuned at width $tune_width, trained at $width," \
        "interrupted, resumed, evaluated, exported, evaluated again, sampled: $expected things as expected"
}

case ${1:-} in
"" | -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' dev/gpt2.sh ;;
tune) read_table "${2:-124M}" && get_trainer && tune ;;
rehearse) us=${US:-./train_us} gpus=${2:-1} && read_table rehearsal && get_trainer && rehearse ;;
*)
    read_table "$1"
    gpus=${2:-1}
    get_trainer && run ;;
esac
