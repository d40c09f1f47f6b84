#!/bin/sh
# Breaks train_us.c or train_us.cu in named ways, one at a time, and runs the tests on each: every mutant must
# be caught.
#   make mutants            all of them         dev/mutants.sh WORD   those whose name contains WORD
# A line below is: name | sed command that breaks it; those named gpu break train_us.cu, those named lab a file of
# dev/cuda, and run on the emulator, with both orders of threads ("gpu, short sums": with FP8 sums of 13 bits, to which
# the tests' bounds adapt); those named amx are built with the model of Intel's matrix unit; those named ranks run on three emulated GPUs, with
# MPI ("ranks in C" break train_us.c). Mutants are built without OpenMP, JOBS (2) at a time. EVERY=n OFFSET=k takes each
# n-th line only, and the GPU's first seven.
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc} CXX=${CXX:-g++} JOBS=${JOBS:-2}
TESTS=${TESTS:-formats random matmul activ large gradients model_gradient table umup mup_is_sp data text oracle accum not_finite statistics generate window held dump printing archive validation ending served hellaswag lost checkpoints}
GPU_TESTS=${GPU_TESTS:-large step_by_step same_bits next kept_rows not_finite overlay}
MPI_FLAGS=$(mpicc -show 2>/dev/null | tr ' ' '\n' | grep '^-[ILl]')
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
here=$PWD

build() { # in the mutant's directory
    # shellcheck disable=SC2086
    case $1 in
    gpu*) sed -E -f "$here/dev/emu/cuda.sed" train_us.cu >cuda.cpp &&
          $CXX -std=gnu++17 -O1 -march=native -w -I"$here/dev/emu" -I. '-DUS_SOURCE="cuda.cpp"' -x c++ test_us.c \
              -x none "$dir/emu.o" -fopenmp -o test_us ;;
    lab*) sed -E -f "$here/dev/emu/cuda.sed" train_us.cu >cuda.cpp && for f in dev/cuda/*; do
              sed -E -f "$here/dev/emu/cuda.sed" "$f" >"${f##*/}"; done &&
          $CXX -std=gnu++17 -O1 -march=native -w -I"$here/dev/emu" -I. '-DUS_SOURCE="cuda.cpp"' -DUS_KERNELS_ONLY -x c++ \
              "${file##*/}" -x none "$dir/emu.o" -fopenmp -o test_us ;;
    ranks*) sed -E -f "$here/dev/emu/cuda.sed" train_us.cu >cuda.cpp &&
          $CXX -std=gnu++17 -O1 -march=native -w -I"$here/dev/emu" -I. '-DUS_SOURCE="cuda.cpp"' -DUS_MPI -x c++ test_us.c \
              -x none "$dir/emu.o" -fopenmp -o test_us $MPI_FLAGS ;;
    amx*) $CC -std=gnu11 -O1 -w -include "$here/dev/cpu/amx_model.h" test_us.c -o test_us -lm ;;
    *) $CC -std=gnu11 -O1 -w test_us.c -o test_us -lm ;;
    esac
}
run() {
    # shellcheck disable=SC2086
    case $1 in
    gpu,*) EMU_FP8_SUMS=12,0 OMP_NUM_THREADS=1 timeout 240 ./test_us -x step_by_step ;;
    gpu*) OMP_NUM_THREADS=1 timeout 120 ./test_us -x $GPU_TESTS && EMU_SEED=1 OMP_NUM_THREADS=1 timeout 120 ./test_us -x $GPU_TESTS ;;
    ranks*) OMP_NUM_THREADS=1 EMU_NCCL_SECONDS=20 timeout -k 5 240 mpirun --oversubscribe -np 3 ./test_us -x ranks_agree ranks_follow ;;
    lab*) OMP_NUM_THREADS=1 timeout 120 ./test_us check && EMU_SEED=1 OMP_NUM_THREADS=1 timeout 120 ./test_us check ;;
    *) timeout 120 ./test_us -x $TESTS ;;
    esac
}
mutant() { # name, sed command (none: the trainer as it is, which must survive)
    file=train_us.c
    case $1 in
    gpu*) file=train_us.cu ;;
    ranks_in_C*) ;;
    ranks*) file=train_us.cu ;;
    lab*) file=dev/cuda/${1#lab_} file=${file%%:*}.cu ;;
    esac
    mkdir -p "$dir/$1/dev/cuda"
    case $1 in lab*) cp dev/cuda/*.h "$dir/$1/dev/cuda/" ;; esac
    cp train_us.c train_us.cu test_us.c README.md "$dir/$1/" && cp dev/debug_state.safetensors "$dir/$1/dev/"
    sed -e "$2" $file >"$dir/$1/$file"
    if [ -n "$2" ] && cmp -s $file "$dir/$1/$file"; then
        echo "STALE     $1: its sed command changes nothing"; return; fi
    if ! (cd "$dir/$1" && build "$1" 2>build.txt); then
        echo "NO BUILD  $1: $(head -1 "$dir/$1/build.txt")"; return; fi
    if (cd "$dir/$1" && TMPDIR=$dir run "$1" >log.txt 2>&1); then echo "SURVIVED  $1"
    else
        first=$(grep -m1 -E 'FAILED|emu:|cuBLAS' "$dir/$1/log.txt" | cut -c 1-90)
        echo "caught    $1 ($(grep -c FAILED "$dir/$1/log.txt") checks: ${first:-it crashes})"
    fi
    rm -f "$dir/$1/test_us"
}

if [ "$1" = --one ]; then dir=$2; trap - EXIT; mutant "$3" "$4"; exit; fi
some() { # of the lines, as EVERY and OFFSET say
    awk -v n="${EVERY:-1}" -v k="${OFFSET:-0}" 'NR % n == k % n || (/^gpu/ && ++gpu <= 7)'
}
grep -v '^#' <<'MUTANTS' | grep -e "${1:-}" | some >"$dir/list"
formats: FP8 is not clipped | s/clipped = a > max ? max : a,/clipped = a,/
formats: NaN is lost in FP8 | s/return bits_float(a > 0x7F800000u ? u : r);/return bits_float(r);/
formats: FP8 subnormals are flushed | s/(e < least ? least : e)/(e < least ? 0 : e)/
formats: BF16 ties go away from zero | s/(u + 0x7FFFu + ((u >> 16) \& 1u))/(u + 0x8000u)/
formats: FP8 is not rounded from BF16 | s/round_fp8(round_bf16(x), format)/round_fp8(x, format)/
formats: gradients in E4M3 | s/end_input = E4M3, .gradient = E5M2/end_input = E4M3, .gradient = E4M3/
formats: weights and inputs in E5M2 | s/{"fp8", BF16, E4M3, E4M3, E5M2}/{"fp8", BF16, E5M2, E5M2, E5M2}/
formats: logits are not rounded | s/decays(t) ? min_l(c->precision, 1) : 0/0/
matmul: alpha is dropped | s/before\[l\] + alpha \* s\[l\]/before[l] + s[l]/
matmul: accumulate is ignored | s/accumulate || k > 0/k > 0/
matmul: the next stretch of K is not added | s/accumulate || k > 0/accumulate/
matmul: what is beyond the last row is read | s/i0 + i < i1 \&\& k0 + k < k1 ? from/k0 + k < k1 ? from/
matmul: a block is turned by half | s/n < 2 \&\& along == across/n < 1 \&\& along == across/
matmul: the rows of the next panel in this one | s/(i + r) \/ R \* R \* words + k/i \/ R * R * words + k/
matmul: panels end where K does | s/words = div_up(k1 - k, WK \* depth) \* WK/words = (k1 - k) \/ depth/
matmul: the sum is rounded after each stretch | s/k1 == K ? format : FP32/format/
checkpoints: a log alone is no run | s/(there || access(form("%s\/log.csv", c.out), F_OK) == 0)/there/
amx: an operand in FP32 is cut to BF16 | s/a.format != FP32 \&\& b.format/a.format != FP32 || b.format/
amx: both of a pair are its second | s/float_bits(low) >> 16/float_bits(high) >> 16/
amx: pairs of rows are not neighbours | s/k \/ 2 + k % 2 \* WK/k/
amx: the lower rows are the upper | s/_tile_loadd(5, a + 16 \* WK/_tile_loadd(5, a/
amx: a register is not cleared | s/^    _tile_zero(3);//
amx: half a stretch | s/k0 + (pairs ? 2 \* k : k)/k0 + k/
a step's first batch adds, too | s/model_backward(m, i > 0)/model_backward(m, 1)/
a step's second batch writes | s/model_backward(m, i > 0)/model_backward(m, 0)/
gains are not zeroed | s/is_hidden(t) \&\& t->use != LOGITS) zero/is_hidden(t) \&\& t->use == EMBEDS) zero/
the head's padding is not zeroed | s/if (!add) zero(grad/if (add) zero(grad/
attention: weights are not rounded | s/view(P, t + n, 1, format)/view(P, t + n, 1, FP32)/
attention: in backward not either | s/view(P, 1, keys, format)/view(P, 1, keys, FP32)/
attention: dS is not rounded for dQ | s/view(dS, keys, 1, format)/view(dS, keys, 1, FP32)/
attention: the sum is of rounded weights | s/sum += p\[j\] = fast_exp(p\[j\] - max)/p[j] = round_to(fast_exp(p[j] - max), format), sum += p[j]/
linear: dW without its factor | s/O, I, N, alpha, add, FP32/O, I, N, 1.0f, add, FP32/
linear: dX without its factor | s/N, I, O, alpha, 0, p->stream/N, I, O, 1.0f, 0, p->stream/
linear: dW from unrounded inputs | s/view(x, 1, I, p->input)/view(x, 1, I, FP32)/
layernorm: another epsilon | s/(float)C + 1e-5f/(float)C + 1e-4f/
layernorm: the branch's coefficient is missing in backward | s/float d = b \* don\[c\], xh/float d = don[c], xh/
attention: scores are divided by D | s/c->alpha_attn \/ powf(D, -s->softmax_power)/c->alpha_attn \/ D/
attention: a row does not see itself | s/seen = t0 + i + 1;/seen = t0 + i + (t0 + i == 0);/
attention: dK and dV keep only the first rows | s/int add = keys < T;/int add = 0;/
gelu: another constant | s/0.044715f \* x \* x \* x/0.0447f * x * x * x/
loss: the largest logit is not subtracted | s/max = z\[v\] > max ? z\[v\] : max;/max = 0;/
embedding: sum of two rows is not scaled | s/0.70710678f/1.0f/
scheme: tau and 1-tau swapped | s/{sqrtf(1.0f - tau), sqrtf(tau)}/{sqrtf(tau), sqrtf(1.0f - tau)}/
scheme: head scaled by the root of C | s/head_power = -1,/head_power = -0.5f,/
scheme: out and down of sp start as wide as the others | s/residual_power = -0.5f, .true/residual_power = 0, .true/
scheme: umup's attention and mlp change weights | s/own = i % 2 ? mlp : attention/own = i % 2 ? attention : mlp/
scheme: umup's earlier branches count twice | s/L + (float)(i \/ 2) \*/L + (float)i */
scheme: mup's branches by depth, not its root | s/rule == DEPTH ? sqrtf(c->base_layers \/ L)/rule == DEPTH ? c->base_layers \/ L/
scheme: umup's rates follow the base width | s/s->relative ? r : (float)t->cols;/r;/
scheme: inputs of out and down of umup in E4M3 | s/.end_input = E5M2/.end_input = E4M3/
scheme: all gradients are S times the true ones | s/t->grad_scale = m->grad_scale \/ later/t->grad_scale = m->grad_scale/
scheme: attention's factor is missing in dV | s/keys, D, n, factor, add/keys, D, n, 1.0f, add/
scheme: the activation's inner factor is missing in backward | s/(out \* in \* slope/(out * slope/
scheme: what does not learn is in the norm | s/t->lr_factor == 0 ? 0 : later/later/
block: the mlp reads what attention read | s/UP, A_UP, post ? b.mid/UP, A_UP, post ? before/
backward: the stream's gradient without sqrt(1-tau) | s/skip2 = {sum2.skip, 1}/skip2 = {1, 1}/
backward: S without the accumulated batches | s/(double)m->rows \* c->accum \* ranks/(double)m->rows * ranks/
accumulation: each batch starts the gradient anew | s/        r.loss += model_loss/        memset(m->grads, 0, sizeof(float) * (size_t)m->num_params), r.loss += model_loss/
accumulation: losses are added, not averaged | s/model_loss(m, 1) \/ m->c.accum/model_loss(m, 1)/
dump: parameters for gradients | s/"grad.", m->grads/"grad.", m->params/
text: the window keeps its old half | s/window + T - T \/ 2/window/
text: temperature is ignored | s/ \/ fmaxf(c->temperature, 1e-6f)//
loss: padded columns take part | s/for (long v = 0; v < V; v++) sum +=/for (long v = 0; v < Vp; v++) sum +=/
optimizer: b1 and b2 of Lion swapped | s/b1 = 0.9f, b2 = 0.99f/b1 = 0.99f, b2 = 0.9f/
optimizer: b1 and b2 of AdamW swapped | s/b1 = 0.9f, b2 = 0.95f/b1 = 0.95f, b2 = 0.9f/
optimizer: AdamW's epsilon without S in sp | s/.true_epsilon = 1/.true_epsilon = 0/
optimizer: AdamW's epsilon times S in us | s/m->scheme->true_epsilon ? /1 ? /
optimizer: AdamW's bias correction one step late | s/(double)m->step + 1)/(double)m->step + 2)/g
optimizer: width rule with C, not its root | s/lr_power = -0.5f/lr_power = -1.0f/
optimizer: decay follows the learning rate | s/(float)(lr \/ m->c.lr)/(float)lr/
optimizer: gains decay | s/return t->use <= LOGITS; }/return t->use <= GAIN; }/
schedule: falls to zero | s/0.1 + 0.45 \*/0.0 + 0.5 */
data: a target is its own input | s/targets\[i - 1\] = token/if (i < T) targets[i] = token/
data: validation text is trained on | s/train->count = val->start = tokens.count - val->count/val->start = tokens.count - val->count, train->count = tokens.count/
resume: the data starts again | s/m->sequence = checkpoint_number(a, "sequence", 1e15)/m->sequence = 0/
resume: the optimizer's state is forgotten | s/memcpy((float\*)cpu_get/if (what == PARAMS) memcpy((float*)cpu_get/
saves: all that is saved is parameters | s/device->get(m, (Lasting)(i \/ m->num_tensors)/device->get(m, PARAMS/
text: top-k is ignored | s/c->top_k ? (int)min_l(c->top_k, V) : V/V/
validation: the last batch counts as a whole one | s/for (long n = 0; n < part.rows; n++) sum += losses/for (long n = 0; n < m->rows; n++) sum += losses/
validation: windows are counted from the end | s/(double)(val->count - T - 1) \* place/(double)(val->count - T - 1) * (1 - place)/
saves: nothing is saved after an error | s/^    if (last_words) last_words();//
saves: a second signal at once is fatal | s/ \&\& seconds() - stopped_at > 1)/)/
saves: a dropped terminal is fatal | s/SIGHUP, SIGPIPE, SIGUSR1}/SIGPIPE, SIGPIPE, SIGUSR1}/
saves: a copy does not give way | s/|| rename(new_one, to)/|| link(new_one, to)/
resume: other data is accepted | s/checkpoint_number(&checkpoint, "data", 0x1p53) != (long)c.data/0/
print: control characters of two bytes pass | s/length == 2 \&\& code >= 0xA0/length == 2 \&\& code >= 0x80/
files: a quote goes into the header | s/(p = strpbrk(p, "\\"\\\\")); ) \*p = '?';.*/0; ) {}/
export: masters are written | s/as_read ? t->precision.weight : FP32/FP32/
export: FP8 is not rounded by way of BF16 | s/const float v = round_bf16(x\[i\]);/const float v = x[i];/
export: embeddings are in FP32 | s/as_read ? t->precision.weight : FP32/as_read \&\& is_hidden(t) ? t->precision.weight : FP32/
load: BF16 in the wrong half | s/f.dtype == BF16 ? u << 16 : u/f.dtype == BF16 ? u << 15 : u/
load: E4M3 is read as E5M2 | s/fp8_decode((uint8_t)u, E4M3)/fp8_decode((uint8_t)u, E5M2)/
load: the step goes on | s/if (!uses && !resumes) m.step = m.sequence = 0;//
load: the optimizer cannot change | s/"lion|adamw", INT, OF_RUN, /"lion|adamw", INT, FIXED, /
load: a run that is there begins again | s/resumes = trains && c.resume && there;/resumes = trains \&\& c.resume \&\& there \&\& !*c.load;/
evaluate: only what training looks at | s/if (c->evaluate && all) c->eval_tokens = 0;//
evaluate: --eval-tokens does not count | s/if (c->evaluate && all)/if (c->evaluate)/
evaluate: the training text is needed | s/if (c->evaluate && \*c->val) c->input = c->val;.*//
hellaswag: sums in place of means | s/losses\[k \* T + t\] \/ (double)(to\[k\] - from\[k\])/losses[k * T + t]/
hellaswag: the context counts | s/from\[k\] = max_l(0, before - 1 - first)/from[k] = 0/
hellaswag: the first token of an ending does not count | s/from\[k\] = max_l(0, before - 1 - first)/from[k] = max_l(0, before - first)/
hellaswag: the last token of an ending does not count | s/to\[k\] = all - 1 - first;/to[k] = all - 2 - first;/
hellaswag: the first T tokens of a long one | s/const long j = first + t;/const long j = t;/
hellaswag: the window is too short | s/div_up(q->longest, 64) \* 64/16/
questions: any token is accepted | s/good = w\[at + i\] < GPT2_VOCAB;/good = 1;/
questions: a context may be empty | s/good = length > 0 && at + length < end;/good = at + length < end;/
sampling: of equals the last is among the likeliest | s/if (n == k && !(logits\[v\] > logits\[list\[k - 1\]\])) continue;/if (n == k \&\& !(logits[v] >= logits[list[k - 1]])) continue;/
sampling: the likeliest are not in order | s/k < V && i > 0 && logits\[v\] > logits\[list\[i - 1\]\]/0/
text: it goes on behind its end | s/if (token == text->end && text->vocab != BYTES_VOCAB) break;//
recompute: a block is not computed again | s/if (m->c.recompute \&\& l < m->c.layers - 1)/if (0)/
gpu: barrier missing before a tile is written | /^activation_kernel/,/^}/s/^    __syncthreads();//
gpu: barrier missing before a tile is filled again | /^norm_forward_kernel/,/^}/{/^        __syncthreads();$/{N;s/__syncthreads();\n    }/\n    }/}}
gpu: barriers missing in attention | /attention_forward_mma/,/^}/s/__syncthreads();//
gpu: row off by one | s/const long at = (row0 + r) \* d.W/const long at = (row0 + r + 1) * d.W/
gpu: a tile is not transposed | s/tile\[(r + i) \* stride + c\]/tile[c * stride + r + i]/
gpu: a scale pointer | s/^    p->b = s->k_b ? layout/    static float one = 1; static const float* scale = \&one; LT(cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, \&scale, sizeof scale));\n&/
gpu: NN layout in FP8 | s/w = side(gpu.wt + t->offset, O, 1/w = side(weight_gpu(m, l, kind), I, 0/
gpu: E5M2 by E5M2 | s/x_columns = side(xt, Np, 1, type_of(t->precision.input))/x_columns = side(xt, Np, 1, CUDA_R_8F_E5M2)/
gpu: gradients in E4M3 | s/d.format = t->precision.gradient;/d.format = E4M3;/
gpu: padded rows are not zero | s/if (Np > N) {/if (0) {/
gpu: dW without its factor | s/O, I, N, alpha, 1, 0);/O, I, N, 1.0f, 1, 0);/
gpu: dW does not accumulate | s/const float beta = (float)add;/const float beta = 0;/
gpu: the skip is not weighted | s/v\[i\] += a \* g\[i\];/v[i] += g[i];/
gpu: gain and bias gradients swapped | s/bias ? d\[i\] : d\[i\] \* v\[i\]/bias ? d[i] * v[i] : d[i]/
gpu: half a row's sum | s/return x + __shfl_xor_sync(~0u, x, 2);/return x;/
gpu: the largest logit is not subtracted | s/most = fmaxf(most, x\[i\]);/most = 0;/
gpu: padded logits have gradients | s/if (v + P > V)/if (0)/
gpu: a step that is not finite is taken | s/if (rates \&\& result->stop) return;//
gpu: a block is not entered again | s/^            enter_block<S>(m, l, N);//
gpu: weights are not cast after the step | s/launch_update<S>(copy, w, first/launch_update<S>(Dest<S>(), w, first/
gpu: weights are not cast at the start | s/if (what == PARAMS)$/if (0)/
gpu: moments begin as they lie there | s/{gpu.params, gpu.m, gpu.v};  \/\/ the gaps/{gpu.params, NULL, NULL};  \/\/ the gaps/
gpu: gaps between tensors are not cleared | s/{gpu.params, gpu.m, gpu.v};  \/\/ the gaps/{NULL, gpu.m, gpu.v};  \/\/ the gaps/
gpu: rows of an FP8 product are not padded | s/gpu.is_fp8 ? padded(N) : N, I, O,/N, I, O,/
gpu: no room for padded rows | s/ : gpu.is_fp8 ? Np : N;/ : N;/
gpu, short sums: dX is 5 % too large | s/dy_rows, w, Np, I, O, t->alpha/dy_rows, w, Np, I, O, 1.05f * t->alpha/
gpu, short sums: Y is 5 % too large | s/: N, I, O, t->alpha);/: N, I, O, 1.05f * t->alpha);/
gpu, short sums: gradients in E4M3 | s/d.format = t->precision.gradient;/d.format = E4M3;/
gpu: attention's factor is missing in dP | s/(factor \* ds\[n\]\[i\]/(ds[n][i]/
gpu: the skip of another branch | s/r2 = {above.skip/r2 = {sum2.skip/
gpu: the activation's inner factor is missing | s/activate(a \* v\[i\], kind)/activate(v[i], kind)/
gpu: one tensor's rates for all | s/gpu.rates + (t - m->tensors)/gpu.rates/
gpu: attention sees the next token | s/rows_are_keys ? ahead < 0 : ahead > 0/rows_are_keys ? ahead < -1 : ahead > 1/
gpu next: the tile's first rows are left out | s/t0 \/ ROWS \* ROWS;  \/\/ with/t0;  \/\/ with/
gpu next: positions begin with the tile | s/weight_gpu(m, 0, WPE) + t0 \* C,/weight_gpu(m, 0, WPE),/
gpu next: keys and values are put at the window's begin | s/b.qkv + t0 \* 3 \* C, post/b.qkv, post/
lab gelu: codes of values that are not BF16 | s/fp8x2(round_s<bf16>(y)/fp8x2((y)/
lab gelu: one value of sixteen is not rounded | s/for (int k = 0; k < 16; k++)$/for (int k = 1; k < 16; k++)/
lab cast_transpose: the next maximum is of scaled values | s/fabsf(v\[k\])), v\[k\] \*= scale_for(most);/fabsf(v[k] *= scale_for(most)));/
lab cast_transpose: barrier missing before the tile is read | s/^    __syncthreads();//
lab embedding: a part is added twice | s/long k = blockIdx.x + 1; k \* RUN/long k = blockIdx.x + 0; k * RUN/
lab embedding: a token's last row is left out | s/min(starts\[token + 1\], last);/min(starts[token + 1] - 1, last);\n        if (i == end) { i++; continue; }/
lab optimizer: the weight is cast before its step | s/    for (int k = 0; k < 16; k++) wt\[k\] = stepped(wt\[k\]/    float old[16]; memcpy(old, wt, 64);\n    for (int k = 0; k < 16; k++) wt[k] = stepped(wt[k]/;s/wt\[k\] = round_s<bf16>(wt\[k\])/wt[k] = round_s<bf16>(old[k])/
lab layernorm_residual: the row's sum by half a warp | s/for (int i = 16; i; i \/= 2) v += /for (int i = 8; i; i \/= 2) v += /
lab layernorm_residual: a band is read before it is there | s/^    copy_wait();//
lab layernorm_residual: barrier missing before dx takes the place of sum | /^static __global__ void __launch_bounds__(512) backward_band/,/^}/{/averages + r, row0/{n;s/__syncthreads();//}}
lab classifier: the target's logit is read after it was written | /^loss_online/,/^}/s/^    __syncthreads();//
lab classifier: the largest logit is not subtracted | /^loss_block/,/^}/s/max = block_max(max, shared);/max = 0;/
lab classifier: padded columns take part | s/shared\[v + i\] = (bf16)-INFINITY/shared[v + i] = (bf16)0.0f/
lab linear_fp8: dW without its padding | s/of(dyt, Np, 1), of(xt, Np, 1), Np, I, O/of(dyt, Np, 1), of(xt, Np, 1), N \& -16, I, O/
lab linear_fp8: codes of E5M2 read as E4M3 | s/a->format == E4M3 ? CUDA_R_8F_E4M3/a->size == 1 ? CUDA_R_8F_E4M3/
lab matmul_fp8: fragments of b swapped | s/y\[j \/ 2\]\[j % 2 \* 2\], y\[j \/ 2\]\[j % 2 \* 2 + 1\]/y[j \/ 2][j % 2 * 2 + 1], y[j \/ 2][j % 2 * 2]/
lab matmul_fp8: a stage is read before it is there | s/cp_async_wait(STAGES - 2)/cp_async_wait(STAGES - 1)/
lab attention_forward: the second 64 queries see later keys | s/if (j >= first + f) hide/if (j >= first + 1) hide/
lab attention_forward: the next tiles overwrite those in use | s/at = (j + 1) % 2 \* SIZE/at = j % 2 * SIZE/
lab attention_forward: a row of V is swapped with its neighbour | s/b\[0\] | (uint32_t)b\[D\] << 16/b[D] | (uint32_t)b[0] << 16/
lab attention_backward: dS is used before all of it is there | s/^    __syncthreads();  \/\/ all keys are there.*//
lab attention_backward: dK of a pair of tiles from one | s/ds\[f\]\[n\]\[i\] = p\[f\]\[n\]\[i\]/ds[f][n][i] = p[0][n][i]/
lab global_norm: a tensor too few | s/i < tensors; i++) {/i < tensors - 1; i++) {/
ranks: one skips its share | s/else if (p.n > 0)$/else if (p.n > 0 \&\& rank != 1)/
ranks: codes are not gathered | s/^        all_gather(gpu.copy/        if (k) all_gather(gpu.copy/
ranks: vectors are not gathered | s/^        all_gather(gpu.copy/        if (k != VECTORS) all_gather(gpu.copy/
ranks: the gradient is divided by their number | s/ncclSum, communicator/ncclAvg, communicator/
ranks: some codes are not transposed | s/if (is_hidden(t)) launch_transpose/if (t->use == BEGINS) launch_transpose/
ranks: the norm is that of one share | s/sum.norm2 += all\[i\].norm2/sum.norm2 = all[i].norm2/
ranks: the loss is that of one | s/sum.loss += all\[i\].loss/sum.loss = n * all[i].loss/
ranks: what is not finite is our own only | s/sum.stop |= all\[i\].stop/sum.stop = r->stop/
ranks: the first to be bad is not the first | s/sum.bad = min(sum.bad, all\[i\].bad)/sum.bad = all[i].bad/
ranks: a share's last values stay | s/begin + share);$/begin + share - 256);/
ranks: a share begins in the first one's memory | s/{first, before + first - begin,/{first, first - begin,/
ranks: what is put in is its beginning | s/(share, w + (p.first - t->offset),/(share, w,/
ranks: all ask the first for the whole | s/gpu_lasting(what) + p.at, p.n, r)/gpu_lasting(what) + p.at, p.n, 0)/
ranks: statistics are of a share | s/return gpu.whole;/return gpu_lasting(what);/
ranks: embeddings are not summed | s/k < PARTS; k++) reduce_scatter/k < PARTS; k += 2) reduce_scatter/
ranks: codes are not those of BF16 | s/wt\[k\] = round_s<S>(wt\[k\])/wt[k] = wt[k]/
ranks in C: N is that of one | s/c->accum \* ranks \* pow/c->accum * pow/
ranks in C: all have the same sequences | s/m->sequence + rank \* B/m->sequence/
ranks in C: one's sequences are counted | s/m->sequence += ranks \* B/m->sequence += B/
ranks in C: validation is of the first one's windows | s/device->sum(stopping(m) ? NAN : sum)/(stopping(m) ? NAN : sum)/
ranks in C: each validates on all windows | s/long i = rank \* (long)m->c.batch/long i = 0/
ranks in C: a signal to one is not one to all | s/if (told \&\& !stop_signal) stop_signal = told;//
MUTANTS
[ -n "$MPI_FLAGS" ] || { grep -v '^ranks' "$dir/list" >"$dir/without" && mv "$dir/without" "$dir/list"; echo "no mpicc: without ranks"; }
cp out/emu.o "$dir/" || { echo "make out/emu.o first (make mutants does)"; exit 1; }
for name in unbroken gpu_unbroken lab_gelu:_unbroken ${MPI_FLAGS:+ranks_unbroken}; do
    case $(mutant $name "") in SURVIVED*) ;; *)
        echo "the unbroken trainer fails its tests:"; cat "$dir/$name/build.txt"; grep -E 'FAILED|emu:' "$dir/$name/log.txt"
        echo "0 passed, 1 failed"; exit 1 ;;
    esac
done
while IFS= read -r line; do
    name=$(printf %s "${line%% | *}" | tr " /'" ___) && printf '%s\0%s\0' "$name" "${line#* | }"
done <"$dir/list" | xargs -r -0 -n 2 -P "$JOBS" "$0" --one "$dir" | tee "$dir/results"
caught=$(grep -c '^caught' "$dir/results") n=$(wc -l <"$dir/list")
grep -v '^caught' "$dir/results"
echo "$caught passed, $((n - caught)) failed"
[ "$caught" -eq "$n" ] && [ "$n" -gt 0 ]
