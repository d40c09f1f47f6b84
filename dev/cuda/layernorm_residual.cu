/*
layernorm_residual.cu: LayerNorm at the end of a branch, with the residual sum of µnit Scaling; its backward.

  forward    out = a skip + b LN(x), LN(x) = (x - mean) rstd gain + bias    [µS] eq. 11, a^2 + b^2 = 1
             x, skip, out (N,C) BF16; out's E4M3 codes, (N,C) and (C,Np); mean, rstd (N) FP32
  backward   sum = a dskip + dout is the stream's gradient; h = b sum, g = h gain, xh = (x - mean) rstd:
             dx = rstd (g - average(g) - xh average(g xh)),  dgain += sum_n h xh,  dbias += sum_n h
             dskip, dout, x, sum (N,C) BF16; dx as E5M2 codes, (N,C) and (C,Np); dgain, dbias (C) FP32
  C is a multiple of 16, Np is N rounded up to 16; out and dx are rounded to BF16 before they become codes.

The floor. A value costs 8 bytes forward (4 in, 4 out), 10 backward (6 in, 4 out), and some 50 instructions.
At 3 TB/s an H100 moves 375 G or 300 G values/s and has 30,000 G instructions/s: memory limits, to 34 us and
42 us at 16384 x 768. The difficulties: a row is needed two or three times, transposed codes want neighbours
in a column, and dgain and dbias are sums down the columns.
*/
#include "steps.h"

enum { WARPS = THREADS / 32, BAND = 32 };
static const float A = 0.774596669f, B = 0.632455532f;  // sqrt(1 - tau), sqrt(tau) for tau = 0.4
static long N, C;
static Array *x, *skip, *gain, *bias, *out, *codes, *codes_t, *mean, *rstd;  // skip: dskip in backward
static Array *dout, *sum, *dgain, *dbias;
static float* partial;    // between kernels: sums down some rows of a column, (.,2,C);
static float4* averages;  // a row's mean, rstd, average(g), average(g xh)
typedef struct {          // what of all this a kernel may want, where it is now
    const bf16 *x, *skip, *dout; const float *gain, *bias;
    bf16 *out, *sum; fp8* q; float *mean, *rstd; long N, C;
} Data;
static Data data(void) {
    return {at<bf16>(x), at<bf16>(skip), at<bf16>(dout), at<float>(gain), at<float>(bias), at<bf16>(out),
            at<bf16>(sum), at<fp8>(codes), at<float>(mean), at<float>(rstd), N, C};
}

// ---- Forward 1. A thread a row; cast and transposition in kernels of their own ----------------------------
// 6 bytes a value, 3 and 2: 11. The first kernel moves more: neighbours read C values apart, a sector of 32
// bytes for each 2 unless the L1 cache holds it for 16 steps; and N threads are 4 warps a processor.
static __global__ void norm_row(Data d) {
    const long n = (long)blockIdx.x * blockDim.x + threadIdx.x, at = n * d.C;
    if (n >= d.N) return;
    const bf16 *x = d.x + at, *skip = d.skip + at;
    float sum = 0, square = 0;
    for (long c = 0; c < d.C; c++) sum += (float)x[c];
    const float mu = sum / (float)d.C;
    for (long c = 0; c < d.C; c++) square += ((float)x[c] - mu) * ((float)x[c] - mu);
    const float rs = 1.0f / sqrtf(square / (float)d.C + 1e-5f);
    for (long c = 0; c < d.C; c++)
        d.out[at + c] = (bf16)(B * (((float)x[c] - mu) * rs * d.gain[c] + d.bias[c]) + A * (float)skip[c]);
    d.mean[n] = mu, d.rstd[n] = rs;
}
static void forward1(void) {
    norm_row<<<blocks(N, 32), 32, 0, stream>>>(data());
    launched("norm");
    launch_cast_value(at<fp8>(codes), at<bf16>(out), E4M3, N * C);
    launch_transpose_value(at<fp8>(codes_t), at<fp8>(codes), N, C);
}

// ---- Forward 2. A warp a row, and all that a row makes ----------------------------------------------------
// It reads 512 values side by side, and x three times; but the rows under way on a processor, 1.5 KB each at
// C = 768, are in its L1 cache. The codes are made there too, as no scale has to be known first: 7 bytes, and
// 2 for a transposition by tiles: 9.
__device__ static inline float warp_sum(float v) {
    for (int i = 16; i; i /= 2) v += __shfl_xor_sync(~0u, v, i);
    return v;
}
// Row n by a warp. x: the row, wherever it is. keep: shared memory (store16 is for global) for the result.
__device__ static inline void norm_of(Data d, long n, const bf16* x, bf16* keep) {
    const int C = (int)d.C, first = (int)threadIdx.x % 32 * 16;
    float v[16], g[16], h[16], s[16], sum = 0, square = 0;
    for (int c = first; c < C; c += 512) {
        load16(v, x + c);
        for (int i = 0; i < 16; i++) sum += v[i];
    }
    const float mu = warp_sum(sum) / (float)C;
    for (int c = first; c < C; c += 512) {
        load16(v, x + c);
        for (int i = 0; i < 16; i++) square += (v[i] - mu) * (v[i] - mu);
    }
    const float rs = 1.0f / sqrtf(warp_sum(square) / (float)C + 1e-5f);
    if (first == 0) d.mean[n] = mu, d.rstd[n] = rs;
    for (int c = first; c < C; c += 512) {
        load16(v, x + c), load16(g, d.gain + c), load16(h, d.bias + c), load16(s, d.skip + n * C + c);
        for (int i = 0; i < 16; i++)
            v[i] = round_s<bf16>(B * ((v[i] - mu) * rs * g[i] + h[i]) + A * s[i]);
        store16(d.out + n * C + c, v), store_fp8(d.q + n * C + c, v, E4M3);
        if (keep) for (int i = 0; i < 16; i += 2) *(uint32_t*)(keep + c + i) = pack_bf16(v[i], v[i + 1]);
    }
}
static __global__ void __launch_bounds__(THREADS) norm_warp(Data d) {
    const long n = (long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (n < d.N) norm_of(d, n, d.x + n * d.C, NULL);
}
static void forward2(void) {
    norm_warp<<<blocks(N, WARPS), THREADS, 0, stream>>>(data());
    launched("norm");
    launch_transpose_tile(at<fp8>(codes_t), at<fp8>(codes), N, C);
}

// ---- Forward 3. A band of 32 rows stays in shared memory --------------------------------------------------
// x arrives there by asynchronous copies, all requested before any is used; the result takes its place, and
// the transposed codes are read from it down the columns, in runs of 32 bytes, a whole sector: 8 bytes, the
// floor. C = 768: 50 KB, four blocks a processor, all 512 bands of N = 16384 at once; C = 1600: 103 KB, two.
// What decides is whether so few blocks, that each load, compute and store in turn, keep memory busy.
__device__ static inline void copy_band(bf16* to, const bf16* from, int rows, int C) {
    for (int p = (int)threadIdx.x * 8; p < rows * C; p += (int)blockDim.x * 8)
        copy_async<16>(to + p / C * (C + 8) + p % C, from + p, true);
}
static __global__ void __launch_bounds__(THREADS) norm_band(Data d, Dest<bf16> to) {
    extern __shared__ __align__(16) bf16 shared[];
    const long row0 = (long)blockIdx.x * BAND;
    const int rows = (int)min(d.N - row0, (long)BAND), C = (int)d.C, stride = C + 8;
    copy_band(shared, d.x + row0 * C, rows, C);
    copy_wait();
    __syncthreads();
    for (int r = (int)threadIdx.x / 32; r < rows; r += WARPS)
        norm_of(d, row0 + r, shared + r * stride, shared + r * stride);
    __syncthreads();
    put_tile(to, shared, stride, row0, 0, rows, C);
}
static long bytes_of_band(void) { return BAND * (C + 8) * (long)sizeof(bf16); }
static void forward3(void) {
    const int bytes = (int)bytes_of_band();
    CUDA(cudaFuncSetAttribute(norm_band, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    norm_band<<<blocks(N, BAND), THREADS, bytes, stream>>>(data(), dest(NULL, NULL, codes_t, N, C, E4M3));
    launched("norm");
}

// ---- Forward 4. train_us.cu's: 64 rows a block, by tiles of 64 columns ------------------------------------
// Any C, 8 KB of shared memory. N = 16384 rows are 256 blocks of 8 warps, all on the card at once; x is read
// three times, and 25 MB of it (C = 768) can stay in the L2 cache: 8 bytes of DRAM, 4 more of the cache.
static void forward4(void) {
    const Data d = data();
    launch_norm_forward<bf16>(dest(out, codes, codes_t, N, C, E4M3), d.mean, d.rstd, (bf16*)NULL, d.x,
                              (bf16*)NULL, d.skip, d.gain, d.bias, A, B, N, C);
}

// ---- Backward 1. A warp a row, then a thread a column -----------------------------------------------------
// The averages are of rows: a warp makes them, and sum (8 bytes). dgain and dbias are of columns: a thread
// walks down one and makes dx on its way (5 bytes). These are C threads, 24 warps on the whole card at 768.
// Transposition 2: 15.
__device__ static void sum_of(Data d, float4* of, long n, const bf16* dout, const bf16* x, bf16* keep) {
    const int C = (int)d.C, first = (int)threadIdx.x % 32 * 16;
    const float mu = d.mean[n], rs = d.rstd[n];
    float s[16], v[16], g[16], s1 = 0, s2 = 0;
    for (int c = first; c < C; c += 512) {
        load16(s, dout + c), load16(v, d.skip + n * C + c), load16(g, d.gain + c);
        for (int i = 0; i < 16; i++) s[i] = round_s<bf16>(A * v[i] + s[i]);
        store16(d.sum + n * C + c, s);
        if (keep) for (int i = 0; i < 16; i += 2) *(uint32_t*)(keep + c + i) = pack_bf16(s[i], s[i + 1]);
        load16(v, x + c);
        for (int i = 0; i < 16; i++) s1 += B * s[i] * g[i], s2 += B * s[i] * g[i] * (v[i] - mu) * rs;
    }
    s1 = warp_sum(s1) / (float)C, s2 = warp_sum(s2) / (float)C;
    if (first == 0) *of = make_float4(mu, rs, s1, s2);
}
__device__ static inline float dx_of(bf16 sum, bf16 x, float4 of, float gain, float* sums) {
    const float h = B * (float)sum, xh = ((float)x - of.x) * of.y;
    sums[0] += h * xh, sums[1] += h;  // to dgain and dbias
    return of.y * (h * gain - of.z - xh * of.w);
}
static __global__ void __launch_bounds__(THREADS, 3) backward_rows(Data d, float4* averages) {
    const long n = (long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (n < d.N) sum_of(d, averages + n, n, d.dout + n * d.C, d.x + n * d.C, NULL);
}
static __global__ void __launch_bounds__(THREADS)
backward_columns(Data d, float* partial, const float4* of, long rows) {
    const long c = (long)blockIdx.x * THREADS + threadIdx.x, n0 = blockIdx.y * rows;
    if (c >= d.C) return;
    float sums[2] = {0};
    for (long n = n0, i = n0 * d.C + c; n < min(d.N, n0 + rows); n++, i += d.C)
        d.q[i] = (fp8)to_fp8x2(round_s<bf16>(dx_of(d.sum[i], d.x[i], of[n], d.gain[c], sums)), 0, E5M2);
    partial[2 * blockIdx.y * d.C + c] = sums[0], partial[(2 * blockIdx.y + 1) * d.C + c] = sums[1];
}
static void add_partial(long rows) {  // in an order that does not change: the same bits in every run
    norm_parameters_kernel<<<blocks(2 * C, 32), THREADS, 0, stream>>>(at<float>(dgain), at<float>(dbias),
                                                                      partial, rows, C);
    launched("parameters");
}
static void backward_apart(long rows) {
    const dim3 grid(blocks(C, THREADS), blocks(N, rows));
    backward_rows<<<blocks(N, WARPS), THREADS, 0, stream>>>(data(), averages);
    launched("rows");
    backward_columns<<<grid, THREADS, 0, stream>>>(data(), partial, averages, rows);
    launched("columns");
    add_partial(div_up(N, rows));
    launch_transpose_tile(at<fp8>(codes_t), at<fp8>(codes), N, C);
}
static void backward1(void) { backward_apart(N); }

// ---- Backward 2. A thread 64 rows of a column -------------------------------------------------------------
// N / 64 times the threads. What each adds up is 1/8 byte a value, written and read where all is added.
static void backward2(void) { backward_apart(64); }

// ---- Backward 3. A band of rows stays in shared memory ----------------------------------------------------
// Both steps in one kernel; dx takes the place of sum, and its codes leave by rows and by columns. 10 bytes,
// the floor, and 1 for what threads of 16 rows add up. Version 4 reads sum and x twice: its blocks are all on
// the card at once, and at 16384 x 768 these are 50 MB, the whole L2 cache. What decides is how much of that
// comes from DRAM, against bands of 99 KB (C > 1024: of 16 rows), of which a processor holds two.
static __global__ void __launch_bounds__(512) backward_band(Data d, float* partial, int band, Dest<bf16> to) {
    extern __shared__ __align__(16) bf16 shared[];
    __shared__ float4 averages[BAND];
    const long row0 = (long)blockIdx.x * band;
    const int rows = (int)min(d.N - row0, (long)band), C = (int)d.C, stride = C + 8;
    bf16 *sum = shared, *x = shared + band * stride;
    copy_band(sum, d.dout + row0 * C, rows, C);
    copy_band(x, d.x + row0 * C, rows, C);
    copy_wait();
    __syncthreads();
    for (int r = (int)threadIdx.x / 32; r < rows; r += 16)
        sum_of(d, averages + r, row0 + r, sum + r * stride, x + r * stride, sum + r * stride);
    __syncthreads();
    for (int p = (int)threadIdx.x; p < C * (band / 16); p += 512) {
        const int c = p % C, part = p / C;
        float sums[2] = {0}, *parts = partial + ((long)blockIdx.x * (band / 16) + part) * 2 * C;
        for (int r = 16 * part, i = r * stride + c; r < min(rows, 16 * part + 16); r++, i += stride)
            sum[i] = (bf16)dx_of(sum[i], x[i], averages[r], d.gain[c], sums);
        parts[c] = sums[0], parts[C + c] = sums[1];
    }
    __syncthreads();
    put_tile(to, sum, stride, row0, 0, rows, C);
}
static int band_of(void) { return C > 1024 ? 16 : BAND; }
static long bytes_of_bands(void) { return 2 * band_of() * (C + 8) * (long)sizeof(bf16); }
static void backward3(void) {
    const int band = band_of(), bytes = (int)bytes_of_bands();
    const Dest<bf16> to = dest(NULL, codes, codes_t, N, C, E5M2);
    CUDA(cudaFuncSetAttribute(backward_band, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    backward_band<<<blocks(N, band), 512, bytes, stream>>>(data(), partial, band, to);
    launched("norm");
    add_partial(div_up(N, band) * (band / 16));
}

// ---- Backward 4. train_us.cu's: 64 rows a block, by tiles of 64 columns -----------------------------------
// Columns are added up from the tile that is transposed: 10 bytes, 4 more of sum and x from the cache or from
// DRAM, and 1 for the sums of 16 rows.
static void backward4(void) {
    const Dest<bf16> to = dest(NULL, codes, codes_t, N, C, E5M2);
    const Data d = data();
    launch_norm_backward<bf16>(to, d.sum, at<float>(dgain), at<float>(dbias), partial, d.dout, d.skip, d.x,
                               d.mean, d.rstd, d.gain, A, B, 1, N, C);
}

static void open_inputs(const long* shape, const char* name_of_skip) {
    N = shape[0], C = shape[1];
    out = bias = dout = sum = dgain = dbias = NULL;
    x = input("x", BF16, N * C, 1.0f), gain = input("gain", FP32, C, 0.1f);
    for (long i = 0; i < N * C; i++) x->value[i] += 0.5f;  // around 0 a mean would be what rounding left
    for (long i = 0; i < C; i++) gain->value[i] += 1.0f;
    encode(x), encode(gain), skip = input(name_of_skip, BF16, N * C, 1.0f);
}
static void open_forward(const long* shape) {
    open_inputs(shape, "skip");
    const double units =
        4 * sqrt((double)C);  // sums of C values in another order: 76 units were seen at 1600
    bias = input("bias", FP32, C, 0.1f), out = output("out", BF16, N * C, 1, 0.001);
    mean = output("mean", FP32, N, units, 1), rstd = output("rstd", FP32, N, units, 1);
    layernorm_forward(out->want, mean->want, rstd->want, x->value, gain->value, bias->value, skip->value,
                      A, B, N, C, BF16);
    output_codes(&codes, &codes_t, out->want, N, C, E4M3, 0.001);
}
static void open_backward(const long* shape) {
    open_inputs(shape, "dskip");
    float *dx = floats((double)(N * C)), *g = gain->value;
    const double units = 64 * sqrt((double)N);  // of N; a small one in units of 1/64 of a usual one
    mean = input("mean", FP32, N, 1.0f), rstd = input("rstd", FP32, N, 1.0f);
    layernorm_forward(dx, mean->value, rstd->value, x->value, g, g, NULL, A, B, N, C, FP32);
    encode(mean), encode(rstd);
    dout = input("dout", BF16, N * C, 1.0f), sum = output("sum", BF16, N * C, 1, 0.001);
    weighted_sum(sum->want, A, skip->value, 1.0f, dout->value, N * C, BF16);
    dgain = updated("dgain", FP32, C, 1.0f, units, 1), dbias = updated("dbias", FP32, C, 1.0f, units, 1);
    layernorm_backward(dx, dgain->want, dbias->want, sum->want, x->value, mean->value, rstd->value,
                       g, NULL, A, B, N, C, BF16);
    output_codes(&codes, &codes_t, dx, N, C, E5M2, 0.001);
    partial = (float*)work_space((size_t)(32 * C * div_up(N, 64)));
    averages = (float4*)work_space(sizeof(float4) * (size_t)N);
    free(dx);
}

static const Version FORWARD[] = {
    {"a thread a row; cast and transposition apart", forward1, "norm_row cast_value transpose_value"},
    {"a warp a row makes all that a row makes", forward2, "norm_warp transpose_tile"},
    {"candidate: 32 rows stay in shared memory", forward3, "norm_band", 0, bytes_of_band},
    {"one kernel, by tiles", forward4, "norm_forward_kernel"},
    {}};
static const char* const APART = "backward_rows backward_columns norm_parameters_kernel transpose_tile";
static const Version BACKWARD[] = {
    {"a warp a row, then a thread a column", backward1, APART},
    {"a thread 64 rows of a column", backward2, APART},
    {"candidate: rows stay on chip", backward3, "backward_band norm_parameters_kernel", 0, bytes_of_bands},
    {"rows and columns in one kernel, by tiles", backward4, "norm_backward_kernel norm_parameters_kernel"},
    {}};
static const Kernel KERNELS[] = {
    {"layernorm forward", "N C", open_forward, FORWARD,
     {{1, 16}, {37, 48}, {64, 128}, {129, 592}}, {{16384, 768}, {8192, 1600}}},
    {"layernorm backward", "N C", open_backward, BACKWARD,
     {{1, 16}, {37, 48}, {64, 128}, {129, 592}, {33, 1040}}, {{16384, 768}, {8192, 1600}}},
};
int main(int argc, char** argv) { return lab(argc, argv, "layernorm_residual", KERNELS); }
