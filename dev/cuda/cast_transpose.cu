/*
cast_transpose.cu: a BF16 tensor becomes E4M3 in both layouts, for three ways to choose the scale.

  q = E4M3(s x), and transposed        x (N,W) BF16; q (N,W), (W,Np)

  dynamic   s = 448 / max |x| of this tensor: nothing can be cast before all of it was seen. Two passes.
  delayed   s from the maximum of an earlier step; this step's is taken on the way, for the next. One pass,
            and a history to keep; a value beyond the old maximum is clipped (Micikevicius et al. 2022, arXiv
            2209.05433; TransformerEngine's recipe).
  static    s = 1, because the model keeps its tensors near 1 ([µS] 3). One pass, and nothing to keep. It is
            seldom run: the kernel that makes x knows all that is needed, and writes the codes itself
            (gelu.cu, layernorm_residual.cu).

Bytes for each value, with the floor of 4 (2 in, 2 out):

  version                                    absmax  cast  transpose  all
  1 dynamic, a kernel for each step             2      3       2       7
  2 dynamic, cast and transposition in one      2      4               6
  3 delayed                                            4               4
  4 static, in a kernel of its own                     4               4
    static, by the kernel that makes x                 2               2

So static scaling saves 5 bytes of 7 against the first and, because it needs no kernel, 2 of 4 against the
third; at 3 TB/s and 16384 x 3072 values that is 84 us and 34 us for each tensor of each layer.
*/
#include "steps.h"

static long N, W;
static Array *x, *codes, *codes_t, *history, *most;

// ---- 1. Dynamic: maximum, cast, transposition -------------------------------------------------------------
// The bits of floats that are not negative are in the order of the floats, so a maximum is an atomicMax of
// integers: the order in which blocks come changes nothing.
static __global__ void __launch_bounds__(THREADS) absmax_kernel(float* most, const bf16* x, long n) {
    __shared__ float shared[32];
    float a = 0;
    for (long i = ((long)blockIdx.x * THREADS + threadIdx.x) * 16; i < n;
         i += (long)gridDim.x * THREADS * 16) {
        float v[16];
        load16(v, x + i);
        for (int k = 0; k < 16; k++) a = fmaxf(a, fabsf(v[k]));
    }
    a = block_max(a, shared);
    if (threadIdx.x == 0) atomicMax((int*)most, __float_as_int(a));
}
__device__ static inline float scale_for(const float* most) { return *most > 0 ? 448.0f / *most : 1.0f; }
static __global__ void cast_kernel(fp8* q, const bf16* x, const float* most, long n) {
    const long i = ((long)blockIdx.x * THREADS + threadIdx.x) * 16;
    float v[16];
    if (i >= n) return;
    load16(v, x + i);
    for (int k = 0; k < 16; k++) v[k] *= scale_for(most);
    store_fp8(q + i, v, E4M3);
}
static void find_most(void) {
    CUDA(cudaMemsetAsync(at<float>(most), 0, sizeof(float), stream));
    absmax_kernel<<<1056, THREADS, 0, stream>>>(at<float>(most), at<bf16>(x), N * W);  // all that fit an H100
    launched("absmax");
}
static void run1(void) {
    find_most();
    cast_kernel<<<blocks(N * W, 16 * THREADS), THREADS, 0, stream>>>(at<fp8>(codes), at<bf16>(x),
                                                                              at<float>(most), N * W);
    launched("cast");
    launch_transpose_tile(at<fp8>(codes_t), at<fp8>(codes), N, W);
}

// ---- 2. Dynamic: the cast transposes on chip --------------------------------------------------------------
// A byte less: the codes are not read again. The maximum's pass stays: that is what dynamic scaling costs.
// With `next`, the maximum of this tensor is found on the way.
static __global__ void __launch_bounds__(THREADS)
cast_transpose_kernel(Dest<float> out, const bf16* x, const float* most, float* next, long N, long W) {
    __shared__ float tile[TILE * STRIDE];
    __shared__ float shared[32];
    const long row0 = (long)blockIdx.y * TILE, col0 = (long)blockIdx.x * TILE;
    const long n = row0 + tile_row(), w = col0 + tile_col();
    float v[16], a = 0;
    if (n < N && w < W) {
        load16(v, x + n * W + w);
        for (int k = 0; k < 16; k++) a = fmaxf(a, fabsf(v[k])), v[k] *= scale_for(most);
        fill_tile(tile, v);
    }
    if (next) a = block_max(a, shared);
    if (next && threadIdx.x == 0) atomicMax((int*)next, __float_as_int(a));
    __syncthreads();
    put_tile(out, tile, row0, col0, N);
}
static void cast_transpose(const float* scale_from, float* next) {
    const Dest<float> to = {NULL, at<fp8>(codes), at<fp8>(codes_t), W, padded(N), E4M3};
    cast_transpose_kernel<<<tiles(N, W), THREADS, 0, stream>>>(to, at<bf16>(x), scale_from, next, N, W);
    launched("cast and transpose");
}
static void run2(void) {
    find_most();
    cast_transpose(at<float>(most), NULL);
}

// ---- 3. Delayed: an earlier step's scale ------------------------------------------------------------------
// No pass before the cast. The maximum for the next step costs a reduction in each block and an atomic.
static void run3(void) {
    CUDA(cudaMemsetAsync(at<float>(most), 0, sizeof(float), stream));
    cast_transpose(at<float>(history), at<float>(most));
}

// ---- 4. Static: train_us.cu's kernel ----------------------------------------------------------------------
// There it gives a recomputed block's input its codes again (--recompute); in all other places no cast is
// run.
static void run4(void) {
    launch_weighted_sum<bf16>(dest(NULL, codes, codes_t, N, W, E4M3), 1.0f, at<bf16>(x), 0.0f, NULL, N, W);
}

static void expect(int version) {
    float max = 0, s = 1;
    for (long i = 0; i < N * W; i++) max = fmaxf(max, fabsf(x->value[i]));
    if (version <= 2) s = 448.0f / max;
    if (version == 3) s = 448.0f / history->value[0];
    #pragma omp parallel for
    for (long n = 0; n < N; n++)
        for (long w = 0; w < W; w++) {
            const float code = round_fp8(s * x->value[n * W + w], E4M3);
            codes->want[n * W + w] = codes_t->want[w * padded(N) + n] = code;
        }
    most->want[0] = version <= 3 ? max : NAN;
}
static void open_case(const long* shape) {
    N = shape[0], W = shape[1];
    x = input("x", BF16, N * W, 1.0f);
    history = input("maximum of an earlier step", FP32, 1, 0.0f);
    history->value[0] = 3.0f;  // values beyond 3 are clipped
    encode(history);
    output_codes(&codes, &codes_t, x->value, N, W, E4M3, 0);  // one product and one rounding: all are equal
    most = output("maximum", FP32, 1, 0, 0);
}

static const Version VERSIONS[] = {
    {"dynamic scale: maximum, cast, transposition", run1, "absmax_kernel cast_kernel transpose_tile"},
    {"dynamic scale: cast and transposition in one", run2, "absmax_kernel cast_transpose_kernel"},
    {"delayed scale: one pass, the maximum on the way", run3, "cast_transpose_kernel"},
    {"static: one pass, no scale", run4, "weighted_sum_kernel"},
    {}};
static const Kernel KERNELS[] = {
    {"cast and transpose", "N W", open_case, VERSIONS,
     {{1, 16}, {70, 80}, {129, 336}}, {{16384, 3072}, {8192, 6400}, {16384, 768}}, 0, expect},
};
int main(int argc, char** argv) { return lab(argc, argv, "cast_transpose", KERNELS); }
