/*
gelu.cu: the activation between `up` and `down`, and its backward; the codes that FP8 matmuls read.

  forward    g = GELU(h) in E4M3, and transposed        h (N,W) BF16;     g (N,W), (W,Np)
  backward   dh = dg GELU'(h) in E5M2, and transposed   h, dg (N,W) BF16; dh (N,W), (W,Np)

GELU(h) = h/2 (1 + tanh(u)), u = sqrt(2/pi) (h + 0.044715 h^3) (Hendrycks, Gimpel 2016, arXiv 1606.08415): as
h sigmoid(2u) in train_us.c. A value is rounded to BF16 before it becomes a code. Np is N rounded up to 16.

The floor. A value costs 2 bytes in and 2 out (backward 4 and 2) and some 20 instructions. At 3 TB/s an H100
moves 750 G values/s forward and has 30,000 G instructions/s for them: memory is what limits. The difficulty
is the transposed codes: a thread with a piece of a row has one value each of many columns.
*/
#include "steps.h"

static long N, W;
static Array *h, *dg, *codes, *codes_t;

// ---- 1. One thread a value; a kernel for each thing that is wanted ----------------------------------------
// The BF16 value goes through memory to a kernel that casts it, and to one that transposes the codes.
static bf16* value;  // (N,W) between the kernels
static __global__ void activation_value(bf16* out, const bf16* h, const bf16* dg, long n) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float x = (float)h[i];
    out[i] = (bf16)(dg ? (float)dg[i] * activation_slope(x, GELU) : activate(x, GELU));
}
static void run1(void) {
    const unsigned grid = blocks(N * W, THREADS);
    const Format format = dg ? E5M2 : E4M3;
    activation_value<<<grid, THREADS, 0, stream>>>(value, at<bf16>(h), at<bf16>(dg), N * W);
    launched("value");
    launch_cast_value(at<fp8>(codes), value, format, N * W);
    launch_transpose_value(at<fp8>(codes_t), at<fp8>(codes), N, W);
}

// ---- 2. Static scaling: the code is written where the value is made ---------------------------------------
// No scale has to be known first, so the cast needs no kernel: 4 bytes a value of traffic less. Transposition
// reads the codes back.
static __global__ void activation_codes(fp8* q, const bf16* h, const bf16* dg, Format format, long n) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float x = (float)h[i], y = dg ? (float)dg[i] * activation_slope(x, GELU) : activate(x, GELU);
    q[i] = (fp8)to_fp8x2(round_s<bf16>(y), 0.0f, format);
}
static void run2(void) {
    const unsigned grid = blocks(N * W, THREADS);
    const Format format = dg ? E5M2 : E4M3;
    activation_codes<<<grid, THREADS, 0, stream>>>(at<fp8>(codes), at<bf16>(h), at<bf16>(dg), format,
                                                     N * W);
    launched("codes");
    launch_transpose_value(at<fp8>(codes_t), at<fp8>(codes), N, W);
}

// ---- 3. Sixteen values a thread ---------------------------------------------------------------------------
// Loads and stores of 16 bytes: an eighth of the loads, a sixteenth of the stores. Transposition by tiles of
// 64 x 64 in shared memory, so that both sides move in runs of 16 bytes or more.
static __global__ void activation_codes16(fp8* q, const bf16* h, const bf16* dg, Format format, long n) {
    const long i = ((long)blockIdx.x * blockDim.x + threadIdx.x) * 16;
    if (i >= n) return;
    float x[16], d[16];
    load16(x, h + i);
    if (dg) load16(d, dg + i);
    #pragma unroll
    for (int k = 0; k < 16; k++)
        x[k] = round_s<bf16>(dg ? d[k] * activation_slope(x[k], GELU) : activate(x[k], GELU));
    store_fp8(q + i, x, format);
}
static void run3(void) {
    activation_codes16<<<blocks(N * W, 16 * THREADS), THREADS, 0, stream>>>(
        at<fp8>(codes), at<bf16>(h), at<bf16>(dg), dg ? E5M2 : E4M3, N * W);
    launched("codes");
    launch_transpose_tile(at<fp8>(codes_t), at<fp8>(codes), N, W);
}

// ---- 4. train_us.cu's: the tile is transposed before it leaves the chip -----------------------------------
// One kernel: each byte is read once and written once.
static void run4(void) {
    const Dest<bf16> to = dest(NULL, codes, codes_t, N, W, dg ? E5M2 : E4M3);
    launch_activation<bf16>(to, at<bf16>(h), at<bf16>(dg), GELU, 1, 1, N, W);
}

static void open_case(const long* shape, bool backward) {
    N = shape[0], W = shape[1];
    float* want = floats((double)(N * W));
    h = input("h", BF16, N * W, 1.0f);
    dg = backward ? input("dg", BF16, N * W, 1.0f) : NULL;
    if (backward) activation_backward(want, dg->value, h->value, GELU, 1, 1, N * W, BF16);
    else activation_forward(want, h->value, GELU, 1, 1, N * W, BF16);
    // exp is not the same to the last bit in every compiler: a BF16 value may be one off, and rarely its code
    output_codes(&codes, &codes_t, want, N, W, backward ? E5M2 : E4M3, 0.002);
    value = (bf16*)work_space(sizeof(bf16) * (size_t)(N * W));
    free(want);
}
static void open_forward(const long* shape) { open_case(shape, false); }
static void open_backward(const long* shape) { open_case(shape, true); }

static const Version VERSIONS[] = {
    {"a thread a value; value, cast, transposition apart", run1,
     "activation_value cast_value transpose_value"},
    {"the code is written where the value is made", run2, "activation_codes transpose_value"},
    {"16 values a thread; tiles transposed on chip", run3, "activation_codes16 transpose_tile"},
    {"one kernel writes both layouts", run4, "activation_kernel"},
    {}};
static const Kernel KERNELS[] = {
    {"gelu forward", "N W", open_forward, VERSIONS,
     {{1, 16}, {70, 80}, {64, 128}, {129, 336}}, {{16384, 3072}, {8192, 6400}}},
    {"gelu backward", "N W", open_backward, VERSIONS,
     {{1, 16}, {70, 80}, {64, 128}, {129, 336}}, {{16384, 3072}, {8192, 6400}}},
};
int main(int argc, char** argv) { return lab(argc, argv, "gelu", KERNELS); }
