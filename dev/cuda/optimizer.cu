/*
optimizer.cu: a step of Lion or AdamW for one hidden matrix, and the codes of its new weights.

  Lion    c = b1 m + (1-b1) g;  m = b2 m + (1-b2) g;  w -= lr sign(c)              (Chen et al. 2023, arXiv
          2302.06675)
  AdamW   m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  w -= lr m' / (sqrt(v') + eps)  (Loshchilov, Hutter
          2019)
  both    w -= decay w first;  then E4M3 of w, (O,I) and transposed (I,O), for the next step's matmuls

w, m, v and g are FP32 (O,I). With FP8 weights beside their masters every tensor core operand is ready when
the step ends: forward reads w's codes, dX the transposed ones.

The floor. Bytes for each weight: Lion reads w, m, g and writes w, m: 20; AdamW also reads and writes v: 28;
the codes are 2 more. 124 M weights are 2.7 GB and 3.7 GB. Arithmetic does not count: 10 to 20 operations.
*/
#include "steps.h"

static long O, I;
static Array *w, *m, *v, *g, *codes, *codes_t, *rates_array, *result;

__device__ static float stepped(float w, float* m, float* v, float g, const Rates& r) {
    return v ? adamw(w, m, v, g, r) : lion(w, m, g, r);
}

// ---- 1. A thread a weight; cast and transposition apart ---------------------------------------------------
// The cast reads the masters again, the transposition the codes: 5 bytes more.
static __global__ void step_value(float* w, float* m, float* v, const float* g, const Rates* rates, long n) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) w[i] = stepped(w[i], &m[i], v ? &v[i] : NULL, g[i], *rates);
}
static __global__ void cast_weight(fp8* q, const float* w, long n) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) q[i] = (fp8)to_fp8x2(round_s<bf16>(w[i]), 0.0f, E4M3);
}
static void run1(void) {
    const unsigned grid = blocks(O * I, THREADS);
    step_value<<<grid, THREADS, 0, stream>>>(at<float>(w), at<float>(m), at<float>(v), at<float>(g),
                                               at<Rates>(rates_array), O * I);
    launched("step");
    cast_weight<<<grid, THREADS, 0, stream>>>(at<fp8>(codes), at<float>(w), O * I);
    launched("cast");
    launch_transpose_value(at<fp8>(codes_t), at<fp8>(codes), O, I);
}

// ---- 2. Sixteen weights a thread, and their codes ---------------------------------------------------------
// The new weight is cast where it is made. What is left beyond the floor is that the transposition reads the
// codes.
static __global__ void step_codes(fp8* q, float* w, float* m, float* v, const float* g, const Rates* rates,
                                  long n) {
    const long i = ((long)blockIdx.x * blockDim.x + threadIdx.x) * 16;
    float wt[16], mt[16], vt[16], gt[16];
    if (i >= n) return;
    load16(wt, w + i);
    load16(mt, m + i);
    load16(gt, g + i);
    if (v) load16(vt, v + i);
    #pragma unroll
    for (int k = 0; k < 16; k++) wt[k] = stepped(wt[k], &mt[k], v ? &vt[k] : NULL, gt[k], *rates);
    store16(w + i, wt);
    store16(m + i, mt);
    if (v) store16(v + i, vt);
    #pragma unroll
    for (int k = 0; k < 16; k++) wt[k] = round_s<bf16>(wt[k]);
    store_fp8(q + i, wt, E4M3);
}
static void run2(void) {
    step_codes<<<blocks(O * I, 16 * THREADS), THREADS, 0, stream>>>(
        at<fp8>(codes), at<float>(w), at<float>(m), at<float>(v), at<float>(g), at<Rates>(rates_array),
        O * I);
    launched("step");
    launch_transpose_tile(at<fp8>(codes_t), at<fp8>(codes), O, I);
}

// ---- 3. train_us.cu's: both layouts from the tile ---------------------------------------------------------
// One kernel, each byte once. It also looks whether all gradients were finite: if not, nothing changes.
static void run3(void) {
    launch_update<bf16>(dest(NULL, codes, codes_t, O, I, E4M3), at<float>(w), at<float>(m), at<float>(v),
                        at<float>(g), at<Rates>(rates_array), at<Result>(result), O, I);
}

static void open_case(const long* shape, bool with_v) {
    O = shape[0], I = shape[1];
    const long n = O * I;
    const Rates rates = {0.01f, 0.001f, 1e-8f, 0.1f, 0.05f};  // as early in training
    const Result all_finite = {};
    rates_array = input_bytes("rates", &rates, sizeof rates);
    result = input_bytes("result", &all_finite, sizeof all_finite);
    g = input("g", FP32, n, 1.0f);
    // A sum of two terms is off by a unit of the larger one, which is 64 units of the smallest that count
    w = updated("w", FP32, n, 1.0f, 128, 1);
    m = updated("m", FP32, n, 0.3f, 128, 1);
    v = NULL;
    for (long i = 0; i < n; i++)  // away from where the sign of Lion's c hangs on the last bit
        if (fabsf(0.9f * m->value[i] + 0.1f * g->value[i]) < 1e-3f) m->want[i] = m->value[i] += 1.0f;
    encode(m);
    if (with_v) {
        v = updated("v", FP32, n, 1.0f, 128, 1);
        for (long i = 0; i < n; i++) v->want[i] = v->value[i] = fabsf(v->value[i]);
        encode(v);
        adamw_update(w->want, m->want, v->want, g->value, n, rates);
    } else lion_update(w->want, m->want, g->value, n, rates);
    output_codes(&codes, &codes_t, w->want, O, I, E4M3, 1e-4);
    if (padded(O) != O) die("rows of a matrix come in multiples of 16");
}
static void open_lion(const long* shape) { open_case(shape, false); }
static void open_adamw(const long* shape) { open_case(shape, true); }

static const Version VERSIONS[] = {
    {"a thread a weight; cast and transposition apart", run1, "step_value cast_weight transpose_value"},
    {"16 weights a thread, cast where they are made", run2, "step_codes transpose_tile"},
    {"one kernel writes weights and both layouts", run3, "update_kernel"},
    {}};
static const Kernel KERNELS[] = {
    {"Lion", "O I", open_lion, VERSIONS, {{16, 16}, {80, 208}, {128, 64}}, {{12288, 4096}, {6400, 1600}}},
    {"AdamW", "O I", open_adamw, VERSIONS, {{16, 16}, {80, 208}, {128, 64}}, {{12288, 4096}, {6400, 1600}}},
};
int main(int argc, char** argv) { return lab(argc, argv, "optimizer", KERNELS); }
