/*
linear_fp8.cu: the three products of a linear, in BF16 and in FP8, as the trainer calls cuBLASLt for them.

  forward    Y   = alpha X W^T      X (N,I), W (O,I) E4M3; Y (N,O) BF16
  dX         dX  = alpha dY W       dY (N,O) E5M2; W E4M3, transposed (I,O); dX (N,I) BF16
  dW         dW += alpha dY^T X     dY, X transposed (O,Np), (I,Np); dW (O,I) FP32

alpha = 1/sqrt(I) is a number on the host and the only scale: no operand has a factor of its own that someone
must find first ([µS] 3). Np is N rounded up to 16. FP8 tensor cores sum along contiguous k in both operands,
so that each array is there twice, row by row and transposed; BF16 reads one array both ways.

The floor. 2 N I O operations each, in FP8 at twice the rate of BF16, and half the bytes of the operands; the
outputs stay BF16 and FP32. Forward of N 16384, I 768, O 3072 is 77 GFLOP for 116 MB in FP8 and 131 MB in
BF16. At 3 TB/s the bytes take 39 and 44 us; the operations take an H100, by its datasheet's 1,979 and 989
TFLOP/s, 39 and 78 us. So where the summed dimension is small FP8 comes near the time of its bytes, most of
which are the output's, and gains less than 2 x. The table at the end measures where the gain begins.

Fast accumulation. With it Hopper's tensor cores add up a whole sum themselves, in about 14 bits. Without it
the sum moves to FP32 registers at intervals (every 128 products in DeepSeek-V3, arXiv 2412.19437, 3.3.2),
which takes instructions. The trainer has it on forward, where BF16 with its 8 bits follows, and off for
gradients: dW is summed over all N.
*/
#include "bench.h"

static long N, I, O;
static Array *x16, *w16, *dy16, *x, *w, *dy, *xt, *wt, *dyt, *y, *dx, *dw;
static void multiply(const Array* out, Side a, Side b, long m, long n, long k, int fast) {
    const int add = out->format == FP32;
    const cudaDataType_t type = add ? CUDA_R_32F : CUDA_R_16BF;
    gemm("linear", at<void>(out), type, n, a, b, m, n, k, 1 / sqrtf((float)I), add, fast);
}
static Side of(const Array* a, long ld, int k_contiguous) {
    return side(at<void>(a), ld, k_contiguous, a->format == BF16   ? CUDA_R_16BF
                                               : a->format == E4M3 ? CUDA_R_8F_E4M3
                                                                   : CUDA_R_8F_E5M2);
}

// ---- 1. BF16 ----------------------------------------------------------------------------------------------
// Either operand may have k in its rows or in its columns: one copy of each array serves all three products.
static void forward1(void) { multiply(y, of(x16, I, 1), of(w16, I, 1), N, O, I, 0); }
static void dx1(void) { multiply(dx, of(dy16, O, 1), of(w16, I, 0), N, I, O, 0); }
static void dw1(void) { multiply(dw, of(dy16, O, 0), of(x16, I, 0), O, I, N, 0); }

// ---- 2. FP8 as the trainer does not do it: forward with sums in FP32, gradients with fast accumulation ----
static void forward2(void) { multiply(y, of(x, I, 1), of(w, I, 1), N, O, I, 0); }
static void dx2(void) { multiply(dx, of(dy, O, 1), of(wt, O, 1), N, I, O, 1); }
static void dw2(void) { multiply(dw, of(dyt, padded(N), 1), of(xt, padded(N), 1), O, I, padded(N), 1); }

// ---- 3. FP8: train_us.cu's --------------------------------------------------------------------------------
static float factor(void) { return 1 / sqrtf((float)I); }
static void forward3(void) {
    launch_linear_forward(at<void>(y), CUDA_R_16BF, of(x, I, 1), of(w, I, 1), N, I, O, factor());
}
static void dx3(void) {
    launch_linear_dx(at<void>(dx), CUDA_R_16BF, of(dy, O, 1), of(wt, O, 1), N, I, O, factor());
}
static void dw3(void) {
    const long Np = padded(N);
    launch_linear_dw(at<float>(dw), of(dyt, Np, 1), of(xt, Np, 1), Np, I, O, factor());
}

// ---- Arrays and what is expected --------------------------------------------------------------------------
// An array of values, the same in a wider format, or transposed, with zeros as padding, which the trainer's
// linear_backward_gpu puts there.
static Array* wide(const Array* q) {
    Array* a = new_array("in BF16", INPUT, BF16, q->n);
    a->value = floats((double)q->n);
    memcpy(a->value, q->value, sizeof(float) * (size_t)q->n);
    encode(a);
    return a;
}
static Array* transposed(const Array* q, long rows, long cols) {
    const long ld = padded(rows);
    Array* a = new_array("transposed", INPUT, q->format, cols * ld);
    a->value = floats((double)(cols * ld));
    #pragma omp parallel for
    for (long c = 0; c < cols; c++)
        for (long r = 0; r < rows; r++) a->value[c * ld + r] = q->value[r * cols + c];
    encode(a);
    return a;
}
enum { FORWARD, DX, DW };
static void open_case(const long* shape, int product) {
    N = shape[0], I = shape[1], O = shape[2];
    const float alpha = 1 / sqrtf((float)I);
    const Precision* fp8_run = &PRECISIONS[2];
    x16 = w16 = dy16 = x = w = dy = xt = wt = dyt = y = dx = dw = NULL;
    x = input("x", E4M3, N * I, 1.0f), w = input("w", E4M3, O * I, 1.0f);
    if (product != FORWARD) dy = input("dy", E5M2, N * O, 1.0f);
    const Array* sides[] = {x, product == DW ? dy : w};
    if (product == FORWARD) {
        y = output("y", BF16, N * O, 1, 0);
        linear_forward(y->want, x->value, w->value, alpha, fp8_run, N, I, O);
    } else {
        float* rest = floats((double)(product == DX ? O * I : N * I));  // the product that is not looked at
        if (product == DX) dx = output("dx", BF16, N * I, 1, 0);
        else dw = updated("dw", FP32, O * I, 1.0f, 1, 0);
        linear_backward(dx ? dx->want : rest, dw ? dw->want : rest, dy->value, x->value, w->value, alpha,
                        fp8_run, N, I, O, dw != NULL);
        free(rest);
    }
    if (product == FORWARD) x16 = wide(x), w16 = wide(w);
    if (product == DX) dy16 = wide(dy), w16 = wide(w), wt = transposed(w, O, I), sides[0] = dy;
    if (product == DW) dy16 = wide(dy), x16 = wide(x), dyt = transposed(dy, N, O), xt = transposed(x, N, I);
    floor_bytes = (double)(sides[0]->n + sides[1]->n) + (dw ? 8.0 : 2.0) * (double)(dw ? dw : dx ? dx : y)->n;
    floor_flops = 2.0 * (double)N * (double)I * (double)O, floor_format = E4M3;
}
static void open_forward(const long* shape) { open_case(shape, FORWARD); }
static void open_dx(const long* shape) { open_case(shape, DX); }
static void open_dw(const long* shape) { open_case(shape, DW); }

// Products of BF16 values are exact and sums in FP32 nearly: the same BF16 value or its neighbour; in FP32 an
// error that grows as sqrt(K). FP8 sums of 14 bits are, in the emulator's model (EMU_FP8_SUMS=1) and in the
// worst of millions of outputs, where a sum cancels, off by 19 units of BF16 without fast accumulation, for
// any K; with it by 45 at K = 768 and 65 at 3072. 7 % and sqrt(K) / 240 of the values differ. A unit of BF16
// is 2^16 of FP32.
static void expect_of(Array* out, int fp8, int fast, long K) {
    const double root = sqrt((double)K);
    const int is_fp32 = out->format == FP32;
    out->units = fp8 ? (fast ? 16 + 2 * root : 32) * (is_fp32 ? 65536 : 1) : is_fp32 ? 256 * root : 1;
    out->share = is_fp32 ? 1 : !fp8 ? 0.05 : fast ? 0.02 + root / 128 : 0.2;
}
static void expect_forward(int version) { expect_of(y, version > 1, version == 3, I); }
static void expect_dx(int version) { expect_of(dx, version > 1, version == 2, O); }
static void expect_dw(int version) { expect_of(dw, version > 1, version == 2, N); }

static const Version FORWARDS[] = {{"BF16", forward1, ""},
                                   {"FP8, sums in FP32", forward2, "", 89},
                                   {"FP8, fast accumulation", forward3, "", 89},
                                   {}};
static const Version DXS[] = {{"BF16", dx1, ""},
                              {"FP8, fast accumulation", dx2, "", 89},
                              {"FP8, sums in FP32", dx3, "", 89},
                              {}};
static const Version DWS[] = {{"BF16", dw1, ""},
                              {"FP8, fast accumulation", dw2, "", 89},
                              {"FP8, sums in FP32", dw3, "", 89},
                              {}};
static const Kernel KERNELS[] = {
    {"linear forward", "N I O", open_forward, FORWARDS, {{80, 48, 80}, {32, 160, 32}, {16, 16, 16}},
     {{16384, 768, 3072}, {16384, 3072, 768}, {8192, 1600, 6400}}, 0, expect_forward},
    {"linear dX", "N I O", open_dx, DXS, {{80, 48, 80}, {32, 32, 160}, {16, 16, 16}},
     {{16384, 768, 3072}, {16384, 3072, 768}, {8192, 1600, 6400}}, 0, expect_dx},
    {"linear dW", "N I O", open_dw, DWS, {{70, 48, 80}, {161, 32, 16}, {1, 16, 16}},
     {{16384, 768, 3072}, {16384, 3072, 768}, {8192, 1600, 6400}}, 0, expect_dw},
};

// ---- More measurements, on numbers made on the card: nothing is checked here ------------------------------
static __global__ void fill_kernel(void* to, Format format, long n) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t u = (uint32_t)i * 2654435761u;  // a hash; its upper bits are as good as random
    u = (u ^ u >> 15) * 2246822519u, u ^= u >> 13;
    const float value = (float)(u >> 8) * 0x1p-24f * 3.46f - 1.73f;  // variance 1
    if (i >= n) return;
    if (format == BF16) ((bf16*)to)[i] = (bf16)value;
    else ((fp8*)to)[i] = (fp8)to_fp8x2(value, 0.0f, format);
}
static Array* room(Format format, long n) { return new_array("", OUTPUT, format, n); }
static void open_room(long n, long i, long o) {
    N = n, I = i, O = o;
    x16 = room(BF16, N * I), w16 = room(BF16, O * I), dy16 = room(BF16, N * O);
    x = room(E4M3, N * I), w = room(E4M3, O * I), dy = room(E5M2, N * O);
    xt = room(E4M3, I * padded(N)), wt = room(E4M3, O * I), dyt = room(E5M2, O * padded(N));
    const Array* end = &arrays[num_arrays];
    y = room(BF16, N * O), dx = room(BF16, N * I), dw = room(FP32, O * I);
    arrays_upload(1);
    for (const Array* a = arrays; a < end; a++)
        for (copy = 0; copy < copies; copy++) {
            const unsigned grid = blocks(a->n, THREADS);
            fill_kernel<<<grid, THREADS, 0, stream>>>(at<void>(a), a->format, a->n);
            launched("fill");
        }
    CUDA(cudaMemsetAsync(dw->device, 0, (size_t)(dw->stride * copies), stream));
    copy = 0;
}

// The trainer takes the heuristic's first proposal. The first eight, for the last version of each product.
static void time_proposals(int tiny) {
    enum { MOST = 8 };
    cublasLtMatmulHeuristicResult_t found[MOST];
    const int last = this_card.sm < 89 ? 0 : 2;
    printf("\n### Proposals of cuBLASLt for the trainer's version\n\n"
           "| product | first, us | best, us | best is number | time of each over the first |\n"
           "|---|---|---|---|---|\n");
    for (const Kernel* k = KERNELS; k < KERNELS + 3; k++)
        for (const long* s = tiny ? k->small[0] : k->large[0]; s[0]; s += 4) {
            char shape[128], times[128] = "";
            double first = 0, best = INFINITY;
            int best_at = 0;
            shape_text(shape, k, s);
            open_room(s[0], s[1], s[2]);
            k->versions[last].run();
            Product* p = &lt.products[lt.last];
            int n;
            LT(proposals(p, found, MOST, &n));
            for (int i = 0; i < n; i++) {
                if (found[i].state != CUBLAS_STATUS_SUCCESS) continue;
                p->algo = found[i].algo;
                const double time = median_time(k->versions[last].run);
                if (i == 0) first = time;
                if (time < best) best = time, best_at = i;
                snprintf(times + strlen(times), sizeof times - strlen(times), " %.3f", time / first);
            }
            p->algo = found[0].algo;
            printf("| %s,%s | %.1f | %.1f | %d of %d |%s |\n", k->name, shape, first * 1e6, best * 1e6,
                   best_at + 1, n, times);
            fflush(stdout);
            arrays_free();
        }
}

// The linears of the models: where does FP8 gain?
static void table_of_shapes(int tiny) {
    static const struct { const char* name; int i, o; } LINEARS[] = {
        {"qkv", 1, 3}, {"out", 1, 1}, {"up", 1, 4}, {"down", 4, 1}};
    static const struct { const char* name; long C; } MODELS[] = {
        {"124M", 768}, {"350M", 1024}, {"774M", 1280}, {"1.5B", 1600}, {"C 4096", 4096}};
    void (*const runs[])(void) = {forward1, forward3, dx1, dx3, dw1, dw3};
    printf("\n### FP8 over BF16 by shape: us in BF16 / in FP8 = speed, N %d\n\n"
           "| model | linear | I | O | forward | dX | dW | all three |\n|---|---|---|---|---|---|---|---|\n",
           tiny ? 64 : 16384);
    for (int m = 0; m < (tiny ? 1 : 5) && this_card.sm >= 89; m++)
        for (int l = 0; l < 4; l++) {
            const long C = tiny ? 32 : MODELS[m].C;
            double time[6], all[2] = {};
            open_room(tiny ? 64 : 16384, LINEARS[l].i * C, LINEARS[l].o * C);
            for (int i = 0; i < 6; i++) all[i % 2] += time[i] = 1e6 * median_time(runs[i]);
            printf("| %s | %s | %ld | %ld |", MODELS[m].name, LINEARS[l].name, I, O);
            for (int i = 0; i < 6; i += 2)
                printf(" %.1f / %.1f = %.2f |", time[i], time[i + 1], time[i] / time[i + 1]);
            printf(" %.1f / %.1f = %.2f |\n", all[0], all[1], all[0] / all[1]);
            fflush(stdout);
            arrays_free();
        }
}
static void more(int tiny) {
    time_proposals(tiny);
    table_of_shapes(tiny);
}
int main(int argc, char** argv) {
    after = more;
    return lab(argc, argv, "linear_fp8", KERNELS);
}
