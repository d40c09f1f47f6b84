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
static Array *x, *codes, *codes_t, *scale, *history, *most;
static float* parts;         // each block's maximum
enum { PARTS = 264 };        // blocks of a maximum: two for each of an H100's processors

__device__ static float scale_for(float most) { return most > 0 ? 448.0f / most : 1.0f; }

// ---- 1. Dynamic: maximum, cast, transposition -------------------------------------------------------------
static __global__ void absmax_kernel(float* parts, const bf16* x, long n) {
    __shared__ float shared[32];
    float most = 0;
    for (long i = ((long)blockIdx.x * THREADS + threadIdx.x) * 16; i < n;
         i += (long)gridDim.x * THREADS * 16) {
        float v[16];
        load16(v, x + i);
        for (int k = 0; k < 16; k++) most = fmaxf(most, fabsf(v[k]));
    }
    most = block_max(most, shared);
    if (threadIdx.x == 0) parts[blockIdx.x] = most;
}
static __global__ void scale_kernel(float* scale, float* most, const float* parts, int n) {
    __shared__ float shared[32];
    float v = 0;
    for (int i = (int)threadIdx.x; i < n; i += THREADS) v = fmaxf(v, parts[i]);
    v = block_max(v, shared);
    if (threadIdx.x) return;
    if (scale) *scale = scale_for(v);
    if (most) *most = v;
}
static __global__ void cast_kernel(fp8* q, const bf16* x, const float* scale, long n) {
    const long i = ((long)blockIdx.x * THREADS + threadIdx.x) * 16;
    float v[16];
    if (i >= n) return;
    load16(v, x + i);
    for (int k = 0; k < 16; k++) v[k] *= *scale;
    store_fp8(q + i, v, E4M3);
}
static void find_scale() {
    absmax_kernel<<<PARTS, THREADS, 0, stream>>>(parts, at<bf16>(x), N * W);
    launched("absmax");
    scale_kernel<<<1, THREADS, 0, stream>>>(at<float>(scale), NULL, parts, PARTS);
    launched("scale");
}
static void run1(void) {
    find_scale();
    cast_kernel<<<(unsigned)div_up(N * W, 16 * THREADS), THREADS, 0, stream>>>(at<fp8>(codes), at<bf16>(x),
                                                                              at<float>(scale), N * W);
    launched("cast");
    launch_transpose_tile(at<fp8>(codes_t), at<fp8>(codes), N, W);
}

// ---- 2. Dynamic: the cast transposes on chip --------------------------------------------------------------
// A byte less each way. The maximum's pass stays: that is what dynamic scaling costs. With `next`, the
// block's own maximum is kept too.
static __global__ void __launch_bounds__(THREADS)
cast_transpose_kernel(Dest<float> out, const bf16* x, const float* scale, float* next, long N, long W) {
    __shared__ float tile[TILE * STRIDE];
    __shared__ float shared[32];
    const long row0 = (long)blockIdx.y * TILE, col0 = (long)blockIdx.x * TILE;
    const long n = row0 + tile_row(), w = col0 + tile_col();
    float v[16], most = 0;
    if (n < N && w < W) {
        load16(v, x + n * W + w);
        for (int k = 0; k < 16; k++) most = fmaxf(most, fabsf(v[k])), v[k] *= *scale;
        fill_tile(tile, v);
    }
    if (next) most = block_max(most, shared);
    if (next && threadIdx.x == 0) next[(long)blockIdx.y * gridDim.x + blockIdx.x] = most;
    __syncthreads();
    put_tile(out, tile, row0, col0, N);
}
static Dest<float> both_codes(void) {
    const Dest<float> d = {NULL, at<fp8>(codes), at<fp8>(codes_t), W, padded(N), E4M3};
    return d;
}
static void run2(void) {
    find_scale();
    cast_transpose_kernel<<<tiles(N, W), THREADS, 0, stream>>>(both_codes(), at<bf16>(x), at<float>(scale),
                                                               NULL, N, W);
    launched("cast and transpose");
}

// ---- 3. Delayed: an earlier step's scale ------------------------------------------------------------------
// No pass before the cast. The maximum for the next step costs a reduction in each block and a small kernel.
static void run3(void) {
    const dim3 grid = tiles(N, W);
    cast_transpose_kernel<<<grid, THREADS, 0, stream>>>(both_codes(), at<bf16>(x), at<float>(history), parts,
                                                        N, W);
    launched("cast and transpose");
    scale_kernel<<<1, THREADS, 0, stream>>>(NULL, at<float>(most), parts, (int)(grid.x * grid.y));
    launched("maximum");
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
    if (version == 3) s = history->value[0];
    #pragma omp parallel for
    for (long n = 0; n < N; n++)
        for (long w = 0; w < W; w++)
            codes->want[n * W + w] = codes_t->want[w * padded(N) + n] =
                round_fp8(s * x->value[n * W + w], E4M3);
    scale->want[0] = version <= 2 ? s : NAN;
    most->want[0] = version == 3 ? max : NAN;
}
static void open_case(const long* shape) {
    N = shape[0], W = shape[1];
    x = input("x", BF16, N * W, 1.0f);
    history = input("scale of an earlier step", FP32, 1, 0.0f);
    history->value[0] = 150.0f;  // 448 / 3: values beyond 3 are clipped
    encode(history);
    output_codes(&codes, &codes_t, x->value, N, W, E4M3,
                 0);  // nothing is computed but one product: all are equal
    scale = output("scale", FP32, 1, 0, 0);
    most = output("maximum", FP32, 1, 0, 0);
    parts = (float*)work_space(sizeof(float) * (size_t)(PARTS + tiles(N, W).x * tiles(N, W).y));
}

static const Version VERSIONS[] = {
    {"dynamic scale: maximum, cast, transposition", run1,
     "absmax_kernel scale_kernel cast_kernel transpose_tile"},
    {"dynamic scale: cast and transposition in one", run2,
     "absmax_kernel scale_kernel cast_transpose_kernel"},
    {"delayed scale: one pass, the maximum on the way", run3, "cast_transpose_kernel scale_kernel"},
    {"static: one pass, no scale", run4, "weighted_sum_kernel"},
    {}};
static const Kernel KERNELS[] = {
    {"cast and transpose", "N W", open_case, VERSIONS,
     {{1, 16}, {70, 80}, {129, 336}}, {{16384, 768}, {16384, 3072}, {8192, 6400}}, 0, expect},
};
int main(int argc, char** argv) { return lab(argc, argv, "cast_transpose", KERNELS); }
