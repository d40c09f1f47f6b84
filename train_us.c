/*
train_us.c: µnit Scaling (µS), the whole recipe, in one file of plain C.

µS trains a language model in FP8 without a single dynamic scale factor: every matrix starts as N(0,1), every
matmul carries a constant that keeps its output at unit variance, every residual sum preserves variance: each
tensor stays where an 8-bit float can represent it. This file is the readable reference; it runs on any CPU.

Part one is the method, in a straight line: number formats, the layers as forward and backward pairs, the
scheme, the tensors, the model, the optimizer, one training step. Part two is the program around it: the fast
matmul, statistics, random numbers, data, files, options, checkpoints, samples, the training loop. To learn
µS read part one; of what it calls in part two, the declarations at its head say what it does. In a first
reading skip fast_exp, attention_backward, and whatever begins with `#pragma omp`.

  [µS]   Narayan, Gupta, Paul, Blalock: µnit Scaling: Simple and Scalable FP8 LLM Training. arXiv 2502.05967
  [u-µP] Blake et al.: u-µP: The Unit-Scaled Maximal Update Parametrization. arXiv 2407.17465
  [US]   Blake, Orr, Luschi: Unit Scaling: Out-of-the-Box Low-Precision Training. arXiv 2303.11257
  [OCP]  Micikevicius et al.: FP8 Formats for Deep Learning. arXiv 2209.05433
Where a comment says OURS, the papers are silent and the decision is this project's.

Parameters are in the order outputs, inputs, sizes: B sequences, T positions, N = B*T rows, C width, H heads,
D = C/H, L blocks, V vocabulary, Vp: V padded to a multiple of 128. All arrays are float and row-major: where
a format is narrower, the float holds a value which that format has.

  make && ./train_us --input FILE           (any text file; --help lists the rest)
*/
#if defined(__FAST_MATH__) || __FINITE_MATH_ONLY__ + 0
#error "-ffast-math (-Ofast has it) lets NaN pass unseen: build without it"
#endif
#if __SIZEOF_LONG__ < 8 || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "this needs a 64-bit, little-endian machine: sizes are longs, and files hold numbers as memory does"
#endif
#undef _GNU_SOURCE  // g++ defines it already
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <glob.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
static int max_threads(void) { return omp_in_parallel() ? 1 : omp_get_max_threads(); }
#else
static int max_threads(void) { return 1; }
#endif
static int rank, ranks = 1;  // which of how many processes of one run, a GPU each: see train_us.cu

// What a GPU computes by the same formula is compiled for both.
#ifdef __CUDACC__
#define BOTH __host__ __device__
#else
#define BOTH
#endif

// ======== Part one: the method ==========================================================================

// ---- What part one uses of part two --------------------------------------------------------------------
// Prints one line that says what is wrong and what to do, then exits with status 1.
__attribute__((noreturn, format(printf, 1, 2))) static void die(const char* format, ...);
__attribute__((format(printf, 1, 2))) static char* form(const char* format, ...);  // a short-lived string
static void* alloc(double bytes);         // zeroed memory
// Work space of at least n floats, which stays for the next call: one of each kind per thread.
enum { SCRATCH_B, SCRATCH_A, SCRATCH_P, SCRATCH_DP, SCRATCH_SUMS, SCRATCH_TENSOR, SCRATCH_SLOTS };
static float* scratch(int slot, long n);
// x[i] = std * N(0,1): the numbers follow from seed, stream and i alone; stream_of: of a tensor's name.
static void fill_normal(float* x, long n, float std, uint64_t seed, uint64_t stream);
static uint64_t stream_of(const char* name);
static long min_l(long a, long b) { return a < b ? a : b; }
static long max_l(long a, long b) { return a > b ? a : b; }
static long div_up(long a, long b) { return (a + b - 1) / b; }
BOTH static inline uint32_t float_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
BOTH static inline float bits_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

// ---- Number formats ------------------------------------------------------------------------------------
// Masters, optimizer state and weight gradients are FP32; what flows between operations is BF16; the operands
// of the hidden matmuls are FP8: E4M3 for inputs and weights, E5M2 for output gradients ([µS] 3, fig. 1).
typedef enum { FP32, BF16, E4M3, E5M2 } Format;
typedef struct { const char* name; int mantissa_bits, min_exponent; float max; } FormatInfo;
static const FormatInfo FORMATS[] = {
    {"FP32", 23, -126, FLT_MAX},
    {"BF16",  7, -126, 3.38953139e38f},
    {"E4M3",  3,   -6, 448.0f},    // least subnormal 2^-9; 0x7F and 0xFF are NaN, there is no infinity [OCP]
    {"E5M2",  2,  -14, 57344.0f},  // least subnormal 2^-16; infinities and NaN as in IEEE 754 [OCP]
};

// To the nearest BF16 value, ties to even: add just under half a unit of the last kept bit, drop the rest.
BOTH static inline float round_bf16(float x) {
    uint32_t u = float_bits(x);
    uint32_t r = (u + 0x7FFFu + ((u >> 16) & 1u)) & 0xFFFF0000u;
    return bits_float((u & 0x7FFFFFFFu) > 0x7F800000u ? u | 0x00400000u : r);
}

// To the nearest FP8 value, ties to even, infinity too clipped to +-max; NaN stays: a diverged run must show
// it. Adding 1.0 * 2^(e+23-m) to |x| = 1.f * 2^e leaves exactly m mantissa bits, rounded by the FPU itself:
// of x = 1.3 in E4M3 (e = 0, m = 3), 2^20 + 1.3 is rounded to a multiple of 1/8, and less 2^20 it is 1.25.
// Below the least normal, e stays at min_exponent, which gives the subnormals their fixed step.
BOTH static inline float round_fp8(float x, Format format) {
    const int m = format == E4M3 ? 3 : 2;
    const uint32_t least = (uint32_t)((format == E4M3 ? -6 : -14) + 127) << 23;
    const uint32_t max = float_bits(format == E4M3 ? 448.0f : 57344.0f);
    uint32_t u = float_bits(x), a = u & 0x7FFFFFFFu, clipped = a > max ? max : a, e = clipped & 0x7F800000u;
    float big = bits_float((e < least ? least : e) + ((uint32_t)(23 - m) << 23));
    uint32_t r = float_bits((bits_float(clipped) + big) - big) | (u & 0x80000000u);
    return bits_float(a > 0x7F800000u ? u : r);
}

// Code to value and back, for E4M3 and E5M2. The CPU computes with values only; a GPU stores the codes: sign,
// exponent e + bias, m bits of mantissa. Subnormals have the least normal's exponent, and 0 for e + bias.
BOTH static inline float power_of_2(int k) { return bits_float((uint32_t)(127 + k) << 23); }
BOTH __attribute__((unused)) static inline float fp8_decode(uint8_t code, Format format) {
    const int m = format == E4M3 ? 3 : 2, bias = format == E4M3 ? 7 : 15, a = code & 0x7F, e = a >> m;
    const float mantissa = (float)(e ? a % (1 << m) + (1 << m) : a);
    const float size = mantissa * power_of_2((e ? e : 1) - bias - m), sign = code >> 7 ? -1.0f : 1.0f;
    return a >= (format == E4M3 ? 0x7F : 0x7D) ? NAN : sign * (format == E5M2 && a == 0x7C ? INFINITY : size);
}
BOTH __attribute__((unused)) static uint8_t fp8_encode(float x, Format format) {
    const int m = format == E4M3 ? 3 : 2, bias = format == E4M3 ? 7 : 15;
    if (isnan(x)) return 0x7F;
    const float a = fabsf(round_fp8(x, format));
    const int exponent = (int)(float_bits(a) >> 23) - 127, e = exponent < 1 - bias ? 1 - bias : exponent;
    return (uint8_t)(((e + bias - 1) << m) + (int)(a * power_of_2(m - e)) + (float_bits(x) >> 31 << 7));
}

// One value as `format` stores it. An FP8 value is always rounded from the BF16 value (OURS), so that it can
// be recomputed from what is kept, and fused and unfused code agree bit for bit.
static inline float round_to(float x, Format format) {
    return format == FP32 ? x : format == BF16 ? round_bf16(x) : round_fp8(round_bf16(x), format);
}

// Rounds n values in place. A loop per format, so that each one vectorizes.
static inline void round_all(float* x, long n, Format format) {
    if (format == BF16) for (long i = 0; i < n; i++) x[i] = round_bf16(x[i]);
    if (format == E4M3) for (long i = 0; i < n; i++) x[i] = round_to(x[i], E4M3);
    if (format == E5M2) for (long i = 0; i < n; i++) x[i] = round_to(x[i], E5M2);
}

// The precision modes: what flows between operations; input, weight, output gradient of a hidden matmul.
typedef struct { const char* name; Format stream, input, weight, gradient; } Precision;
static const Precision PRECISIONS[] = {{"fp32", FP32, FP32, FP32, FP32}, {"bf16", BF16, BF16, BF16, BF16},
                                       {"fp8", BF16, E4M3, E4M3, E5M2}};

// ---- Matmul --------------------------------------------------------------------------------------------
// Nearly all of the work is out(i,j) = alpha * sum over k of a(i,k) b(j,k), for i < M, j < N, k < K, added to
// what is there if `accumulate`. Operands are rounded to their formats as they are read, the sum is FP32, and
// the result is rounded to its own. out(i,j) is out[i*ld + j].
// A matrix as matmul sees it: element (i, k) is p[i*row + k*col], rounded to `format` when it is read.
typedef struct { const float* p; long row, col; Format format; } Operand;
static inline Operand view(const float* p, long row, long col, Format f) {
    Operand x = {p, row, col, f};
    return x;
}
__attribute__((unused)) static void matmul_plain(float* out, long ld, Operand a, Operand b, long M, long N,
                                                 long K, float alpha, int accumulate, Format format) {
    for (long i = 0; i < M; i++)
        for (long j = 0; j < N; j++) {
            float sum = 0, *o = &out[i * ld + j];
            for (long k = 0; k < K; k++)
                sum += round_to(a.p[i * a.row + k * a.col], a.format) *
                       round_to(b.p[j * b.row + k * b.col], b.format);
            *o = round_to((accumulate ? *o : 0.0f) + alpha * sum, format);
        }
}
// The same, but for the order of each sum, a hundred times as fast: part two has it.
static void matmul(float* out, long ld, Operand a, Operand b, long M, long N, long K, float alpha,
                   int accumulate, Format format);

// ---- Layers --------------------------------------------------------------------------------------------
// Each is a forward and a backward. Gradients named dX belong to X. A parameter's gradient is added to, but a
// matrix's only if `add`: a step's first batch writes it. Every other is written. `format` is the result's.

// Linear: Y = alpha X W^T, without biases. This constant is the method ([µS] table 1): where the entries of
// X and W have variance 1, a sum of I = fan_in products has variance I, which alpha = 1/sqrt(I) makes 1.
//   Forward alone decides alpha. dX = alpha dY W is a sum over the O outputs: its variance is O/I times dY's.
// Its RMS doubles through `up`, halves through `down`, and grows by sqrt(3) through `qkv`; E5M2 has thirty
// octaves. With a constant of its own, dX would not be the gradient of this Y. dW = alpha dY^T X could have
// any: Lion takes its sign, AdamW divides it by its own size.
static void linear_forward(float* y, const float* x, const float* w,    // (N,O), (N,I), (O,I)
                           float alpha, const Precision* p, long N, long I, long O) {
    matmul(y, O, view(x, I, 1, p->input), view(w, I, 1, p->weight), N, O, I, alpha, 0, p->stream);
}
static void linear_backward(float* dx, float* dw,                                    // (N,I), (O,I)
                            const float* dy, const float* x, const float* w,         // (N,O), (N,I), (O,I)
                            float alpha, const Precision* p, long N, long I, long O, int add) {
    matmul(dx, I, view(dy, O, 1, p->gradient), view(w, 1, I, p->weight), N, I, O, alpha, 0, p->stream);
    matmul(dw, I, view(dy, 1, O, p->gradient), view(x, 1, I, p->input), O, I, N, alpha, add, FP32);
}

// z = a x + b y: the residual sum where LayerNorm does not do it. z may be x.
static void weighted_sum(float* z, float a, const float* x, float b, const float* y, long n, Format format) {
    #pragma omp parallel for schedule(static)
    for (long i0 = 0; i0 < n; i0 += 4096) {
        long i1 = min_l(n, i0 + 4096);
        #pragma omp simd
        for (long i = i0; i < i1; i++) z[i] = a * x[i] + b * y[i];
        round_all(z + i0, i1 - i0, format);
    }
}

// out = a skip + b LN(x), LN(x) = (x - mean) rstd gain + bias: Res-Post-LayerNorm with its
// variance-preserving residual sum ([µS] eq. 11, fig. 4a), and with skip = NULL, b = 1 a plain LayerNorm.
static void layernorm_forward(float* out, float* mean, float* rstd,                        // (N,C), (N), (N)
                              const float* x, const float* gain, const float* bias,        // (N,C), (C), (C)
                              const float* skip, float a, float b, long N, long C, Format format) {
    #pragma omp parallel for schedule(static)
    for (long n = 0; n < N; n++) {
        const float *xn = x + n * C, *sn = skip ? skip + n * C : NULL;
        float *on = out + n * C, sum = 0.0f, square = 0.0f;
        #pragma omp simd reduction(+ : sum)
        for (long c = 0; c < C; c++) sum += xn[c];
        float mu = sum / (float)C;
        #pragma omp simd reduction(+ : square)
        for (long c = 0; c < C; c++) square += (xn[c] - mu) * (xn[c] - mu);
        float rs = 1.0f / sqrtf(square / (float)C + 1e-5f);
        for (long c = 0; c < C; c++)
            on[c] = b * ((xn[c] - mu) * rs * gain[c] + bias[c]) + (sn ? a * sn[c] : 0.0f);
        round_all(on, C, format);
        mean[n] = mu;
        rstd[n] = rs;
    }
}

// With d = b dout, the gradient at LN's output, xh = (x - mean) rstd and dh = d gain: dgain = sum of d xh,
// dbias = sum of d, and dx = rstd (dh - mean(dh) - xh mean(dh xh)). Where LayerNorm reads the stream (as in
// sp), its own gradient is added: dx = a dskip + that.
static void layernorm_backward(float* dx, float* dgain, float* dbias,                      // (N,C), (C), (C)
                               const float* dout, const float* x, const float* mean, const float* rstd,
                               const float* gain, const float* dskip, float a, float b, long N, long C,
                               Format format) {
    const long ROWS = 32, chunks = div_up(N, ROWS);  // gain and bias: sums by chunk, then of chunks in order
    float* sums = scratch(SCRATCH_SUMS, chunks * 2 * C);
    #pragma omp parallel for schedule(static)
    for (long chunk = 0; chunk < chunks; chunk++) {
        float *dg = sums + chunk * 2 * C, *db = dg + C;
        memset(dg, 0, sizeof(float) * 2 * (size_t)C);
        for (long n = chunk * ROWS; n < min_l(N, (chunk + 1) * ROWS); n++) {
            const float *xn = x + n * C, *don = dout + n * C, *skip = dskip ? dskip + n * C : NULL;
            float *dxn = dx + n * C, mu = mean[n], rs = rstd[n], s1 = 0.0f, s2 = 0.0f;
            #pragma omp simd reduction(+ : s1, s2)
            for (long c = 0; c < C; c++) {
                float d = b * don[c], dh = d * gain[c], xh = (xn[c] - mu) * rs;
                s1 += dh;
                s2 += dh * xh;
            }
            s1 /= (float)C;
            s2 /= (float)C;
            #pragma omp simd
            for (long c = 0; c < C; c++) {
                float d = b * don[c], xh = (xn[c] - mu) * rs;
                dg[c] += d * xh;
                db[c] += d;
                dxn[c] = rs * (d * gain[c] - s1 - xh * s2) + (skip ? a * skip[c] : 0.0f);
            }
            round_all(dxn, C, format);
        }
    }
    for (long chunk = 0; chunk < chunks; chunk++)
        for (long c = 0; c < C; c++) {
            dgain[c] += sums[chunk * 2 * C + c];
            dbias[c] += sums[chunk * 2 * C + C + c];
        }
}

// e^x to 2 units in the last place. A libm call would keep the loops over GELU and softmax from vectorizing.
// e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln(2)/2, e^r by its series; NaN passes through.
BOTH static inline float fast_exp(float x) {
#ifdef __CUDA_ARCH__
    return __expf(x);  // a GPU has an instruction for it, good to 2 + 1.2 |x| units
#endif
    x = x < -87.3f ? -87.3f : x > 88.3f ? 88.3f : x;
    float t = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are n
    float n = t - 12582912.0f, r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (0.00833333333f +
              r * 0.00138888889f)))));
    return p * bits_float((float_bits(t) << 23) + 0x3F800000u);
}
BOTH static inline float sigmoid(float x) {
#ifdef __CUDA_ARCH__
    return __fdividef(1.0f, 1.0f + fast_exp(-x));
#endif
    return 1.0f / (1.0f + fast_exp(-x));
}

// Activations ([µS] A.7). GELU in its tanh form is x sigmoid(2u): 0.5 (1 + tanh(u)) = sigmoid(2u).
typedef enum { GELU, RELU, SILU } Activation;
BOTH static inline float gelu_2u(float x) {
    return 1.5957691216f * (x + 0.044715f * x * x * x);  // 2 sqrt(2/pi)
}
BOTH static inline float activate(float x, Activation kind) {
    return kind == RELU ? (x < 0.0f ? 0.0f : x) : x * sigmoid(kind == GELU ? gelu_2u(x) : x);
}
BOTH static inline float activation_slope(float x, Activation kind) {
    if (kind == RELU) return x > 0.0f ? 1.0f : 0.0f;
    float s = sigmoid(kind == GELU ? gelu_2u(x) : x);
    float inner = kind == GELU ? 1.5957691216f * (1.0f + 0.134145f * x * x) : 1.0f;
    return s + x * s * (1.0f - s) * inner;
}
// g = out activation(in h); in µS both are 1. In chunks, with the kind known in each loop: all vectorize.
static void activation_forward(float* g, const float* h, Activation kind, float in, float out, long n,
                               Format format) {                                                      // (N,4C)
    #pragma omp parallel for schedule(static)
    for (long i0 = 0; i0 < n; i0 += 4096) {
        long i1 = min_l(n, i0 + 4096);
        if (kind == GELU) for (long i = i0; i < i1; i++) g[i] = out * activate(in * h[i], GELU);
        if (kind == RELU) for (long i = i0; i < i1; i++) g[i] = out * activate(in * h[i], RELU);
        if (kind == SILU) for (long i = i0; i < i1; i++) g[i] = out * activate(in * h[i], SILU);
        round_all(g + i0, i1 - i0, format);
    }
}
static void activation_backward(float* dh, const float* dg, const float* h, Activation kind,     // (N,4C)
                                float in, float out, long n, Format format) {
    #pragma omp parallel for schedule(static)
    for (long i0 = 0; i0 < n; i0 += 4096) {
        long i1 = min_l(n, i0 + 4096);
        float slope[4096];  // dh may be dg
        if (kind == GELU) for (long i = i0; i < i1; i++) slope[i - i0] = activation_slope(in * h[i], GELU);
        if (kind == RELU) for (long i = i0; i < i1; i++) slope[i - i0] = activation_slope(in * h[i], RELU);
        if (kind == SILU) for (long i = i0; i < i1; i++) slope[i - i0] = activation_slope(in * h[i], SILU);
        #pragma omp simd
        for (long i = i0; i < i1; i++) dh[i] = dg[i] * (out * in * slope[i - i0]);
        round_all(dh + i0, i1 - i0, format);
    }
}

// Causal attention, one head at a time, QUERIES rows of the score matrix at a time: no T x T matrix is ever
// stored. Backward computes the same weights again with the same function. Weights and dS are rounded to
// `format` where a matmul reads them, as a GPU's tensor cores want it (OURS); sums are of those not rounded.
enum { QUERIES = 64 };

// P[i][j] = e^(s_ij - max_j s_ij), s_ij = scale q_i k_j, for j <= t0+i, zero for later j, and the sum of each
// row: softmax is P / sums. Rows i < n, columns j < t0+n.
static void attention_weights(float* P, float* sums, const float* q, const float* k, float scale, long row,
                              long t0, long n, long D, Format format) {
    const long keys = t0 + n;
    matmul(P, keys, view(q, row, 1, format), view(k, row, 1, format), n, keys, D, scale, 0, FP32);
    for (long i = 0; i < n; i++) {
        float *p = P + i * keys, max = p[0], sum = 0.0f;
        long seen = t0 + i + 1;
        #pragma omp simd reduction(max : max)
        for (long j = 0; j < seen; j++) max = p[j] > max ? p[j] : max;
        #pragma omp simd reduction(+ : sum)
        for (long j = 0; j < seen; j++) sum += p[j] = fast_exp(p[j] - max);
        memset(p + seen, 0, sizeof(float) * (size_t)(keys - seen));
        sums[i] = sum;
    }
}

// y = factor softmax(scale Q K^T) V, rows t0..T-1 (µS: scale 1/sqrt(D), factor 1). A qkv row: all Q, K, V.
static void attention_forward(float* y, const float* qkv, float scale, float factor,  // (B,T,C), (B,T,3C)
                              long B, long t0, long T, long C, long H, Format format) {
    const long D = C / H, row = 3 * C;
    #pragma omp parallel for schedule(dynamic, 1)
    for (long bh = 0; bh < B * H; bh++) {
        const float *q = qkv + bh / H * T * row + bh % H * D, *k = q + C, *v = k + C;
        float *P = scratch(SCRATCH_P, QUERIES * T), sums[QUERIES];
        for (long t = t0; t < T; t += QUERIES) {
            const long n = min_l(QUERIES, T - t);
            float* yt = y + (bh / H * T + t) * C + bh % H * D;
            attention_weights(P, sums, q + t * row, k, scale, row, t, n, D, format);
            matmul(yt, C, view(P, t + n, 1, format), view(v, 1, row, format), n, D, t + n, factor, 0, FP32);
            for (long i = 0; i < n; i++) {
                for (long d = 0; d < D; d++) yt[i * C + d] *= 1.0f / sums[i];
                round_all(yt + i * C, D, format);
            }
        }
    }
}

// dV = factor P^T dY; dP = factor dY V^T; dS = P (dP - rowsum(P dP)); dQ = scale dS K; dK = scale dS^T Q.
static void attention_backward(float* dqkv, const float* dy, const float* qkv,  // (B,T,3C), (B,T,C), (B,T,3C)
                               float scale, float factor, long B, long T, long C, long H, Format format) {
    const long D = C / H, row = 3 * C;
    #pragma omp parallel for schedule(dynamic, 1)
    for (long bh = 0; bh < B * H; bh++) {
        long first = bh / H * T * row + bh % H * D;
        const float *q = qkv + first, *k = q + C, *v = k + C;
        float *dq = dqkv + first, *dk = dq + C, *dv = dk + C, sums[QUERIES];
        float *P = scratch(SCRATCH_P, QUERIES * T), *dP = scratch(SCRATCH_DP, QUERIES * T), *dS = dP;
        for (long t = (T - 1) / QUERIES * QUERIES; t >= 0; t -= QUERIES) {
            const long n = min_l(QUERIES, T - t), keys = t + n;
            const float *qt = q + t * row, *dyt = dy + (bh / H * T + t) * C + bh % H * D;
            int add = keys < T;  // the last rows come first, see all keys and write; the others add
            attention_weights(P, sums, qt, k, scale, row, t, n, D, format);
            matmul(dP, keys, view(dyt, C, 1, format), view(v, row, 1, format), n, keys, D, factor, 0, FP32);
            for (long i = 0; i < n; i++) {
                float *p = P + i * keys, *dp = dP + i * keys, dot = 0.0f;
                for (long j = 0; j < keys; j++) p[j] *= 1.0f / sums[i];
                #pragma omp simd reduction(+ : dot)
                for (long j = 0; j < keys; j++) dot += p[j] * dp[j];
                for (long j = 0; j < keys; j++) dp[j] = p[j] * (dp[j] - dot);
            }
            matmul(dv, row, view(P, 1, keys, format), view(dyt, 1, C, format), keys, D, n, factor, add, FP32);
            matmul(dq + t * row, row, view(dS, keys, 1, format), view(k, 1, row, format), n, D, keys, scale,
                   0, FP32);
            matmul(dk, row, view(dS, 1, keys, format), view(qt, 1, row, format), keys, D, n, scale, add,
                   FP32);
        }
        for (long t = 0; t < T; t++)
            for (int part = 0; part < 3; part++) round_all(dq + t * row + part * C, D, format);
    }
}

// x = scale (wte[token] + wpe[position]); rows are rounded as they are read.
static void embedding_forward(float* x, const int* tokens,                     // (B,T,C), (B,T)
                              const float* wte, const float* wpe, float scale, // (Vp,C), (T,C)
                              long B, long t0, long T, long C, Format format) {
    #pragma omp parallel for schedule(static)
    for (long n = t0; n < B * T; n++) {
        const float *e = wte + tokens[n] * C, *p = wpe + n % T * C;
        for (long c = 0; c < C; c++)
            x[n * C + c] = round_to((round_to(e[c], format) + round_to(p[c], format)) * scale, format);
    }
}
static void embedding_backward(float* dwte, float* dwpe, const float* dx, const int* tokens, float scale,
                               long B, long T, long C) {
    #pragma omp parallel for schedule(static)
    for (long c0 = 0; c0 < C; c0 += 16)  // by columns: two rows may hold the same token
        for (long n = 0; n < B * T; n++)
            for (long c = c0; c < min_l(C, c0 + 16); c++) {
                dwte[tokens[n] * C + c] += scale * dx[n * C + c];
                dwpe[n % T * C + c] += scale * dx[n * C + c];
            }
}

// Cross-entropy of each row; with want_gradient, the logits become their gradient, scale (softmax - onehot),
// in place. Padded columns V..Vp-1 take no part.
//   Every gradient is S times the true one (OURS). Left out: 1/R here, R = N accum being the rows of a step
// (scale is 1), and the head's alpha, 1/C, in model_backward: S = R C, 131,072 for R = 1024, C = 128. The
// true gradients at the hidden linears nearly all lie under half of E5M2's least number, 2^-16: they would be
// flushed to zero, as --grad-scale 1 shows (scale is 1/S then). Only rates() and gradient_norm() know of S.
static void loss_forward_backward(float* losses, float* logits, const int* targets,     // (N), (N,Vp), (N)
                                  int want_gradient, float scale, long N, long V, long Vp, Format format) {
    #pragma omp parallel for schedule(static)
    for (long n = 0; n < N; n++) {
        float *z = logits + n * Vp, max = z[0], sum = 0.0f, target = z[targets[n]];
        #pragma omp simd reduction(max : max)
        for (long v = 0; v < V; v++) max = z[v] > max ? z[v] : max;
        #pragma omp simd reduction(+ : sum)
        for (long v = 0; v < V; v++) sum += fast_exp(z[v] - max);
        losses[n] = logf(sum) + max - target;
        if (!want_gradient) continue;
        for (long v = 0; v < V; v++) z[v] = scale * (fast_exp(z[v] - max) / sum);
        z[targets[n]] -= scale;
        round_all(z, V, format);
    }
}

// ---- The scheme ----------------------------------------------------------------------------------------
// A scheme is data: all that tells µS from other parametrizations. What a row does not name is 0.
typedef enum { SUM, TAU, MEAN, DEPTH, UNIT } ResidualRule;
typedef enum { ABSOLUTE, RATES_RELATIVE, ALL_RELATIVE } Relative;
typedef struct {
    const char* name;
    int norm_last;             // LayerNorm ends a branch (Res-Post-LayerNorm) or begins it (pre-LayerNorm)
    int norm_learns;           // or its gains stay 1 and its biases 0
    ResidualRule residual;     // how a branch joins the stream: see residual()
    float embedding_scale;     // x0 = embedding_scale (wte + wpe)
    float hidden_power;        // multiplier alpha of a hidden linear = fan_in^hidden_power
    float softmax_power;       // attention's scores are multiplied by D^softmax_power, D = C/H
    int unit_ops;              // outputs of attention and activation have factors: attention_factor()
    Relative relative;         // over a base shape: none of C, L, fan_in below; lr_power's fan_in; all
    float head_power;          // alpha of the head = alpha_out C^head_power
    float init_std;            // of every matrix and both embeddings; of hidden matrices times
    float init_power;          //   C^init_power, and of `out` and `down` also times
    float residual_power;      //   (2L)^residual_power (of the base shape if all is relative)
    float lr_power;            // hidden matrices learn at lr fan_in^lr_power
    float lr_depth_power;      //   L^lr_depth_power,
    float embedding_lr_power;  // embeddings at lr C^embedding_lr_power, head and LayerNorm at lr
    int true_epsilon;          // AdamW's epsilon stands against the true gradient, not the scaled one
    Format end_input, gradient;              // in fp8, of: inputs of `out` and `down`; output gradients
    float lr_bytes[2], lr_tokens[2], decay;  // what auto is, with Lion and AdamW (0: us's): tables in README
} Scheme;
static const Scheme SCHEMES[] = {
    {   // µS: [µS] table 2; eq. 11 and fig. 4a. OURS: 1/sqrt(2), as two rows of variance 1 add up to one of
        // 1; and epsilon: the true gradient of a rare token is smaller than 1e-8.
        .name = "us", .norm_last = 1, .norm_learns = 1, .residual = TAU, .embedding_scale = 0.70710678f,
        .hidden_power = -0.5f, .softmax_power = -0.5f, .relative = RATES_RELATIVE, .head_power = -1,
        .init_std = 1, .lr_power = -0.5f, .end_input = E4M3, .gradient = E5M2,
        .lr_bytes = {0.02f, 0.02f}, .lr_tokens = {0.08f, 0.16f}, .decay = 1e-3f},
    {   // The baseline: GPT-2's standard parametrization (Radford et al. 2019), untied, no biases in linears.
        // 0.02 in place of alpha is right at one width; 1/sqrt(2L), for 2L branches add up.
        .name = "sp", .norm_learns = 1, .residual = SUM, .embedding_scale = 1, .softmax_power = -0.5f,
        .init_std = 0.02f, .residual_power = -0.5f, .true_epsilon = 1, .end_input = E4M3, .gradient = E5M2,
        .lr_bytes = {3e-4f, 2e-3f}, .lr_tokens = {5e-4f, 2e-3f}, .decay = 1e-4f},
    {   // µP (Yang et al. 2022, arXiv 2203.03466) as in [u-µP] tables 1, 3: at a base shape it is sp, but
        // that LayerNorm does not learn ([u-µP] app. C); elsewhere its rules go by the ratio to that shape.
        .name = "mup", .residual = DEPTH, .embedding_scale = 1, .softmax_power = -0.5f,
        .relative = ALL_RELATIVE, .head_power = -1, .init_std = 0.02f, .init_power = -0.5f,
        .residual_power = -0.5f, .lr_power = -1, .lr_depth_power = -0.5f, .true_epsilon = 1,
        .end_input = E4M3, .gradient = E5M2,
        .lr_bytes = {3e-4f, 1e-3f}, .lr_tokens = {5e-4f, 1e-3f}, .decay = 1e-4f},
    {   // u-µP: [u-µP] tables 1, 3, app. B; formats as in its 4.3. No base shape.
        .name = "umup", .residual = UNIT, .embedding_scale = 0.70710678f, .hidden_power = -0.5f,
        .softmax_power = -1, .unit_ops = 1, .head_power = -1, .init_std = 1, .lr_power = -0.5f,
        .lr_depth_power = -0.5f, .embedding_lr_power = -0.5f, .end_input = E5M2, .gradient = E4M3,
        .lr_bytes = {0.5f, 0.5f}, .lr_tokens = {0.5f, 0.5f}, .decay = 1e-3f},
    // What [µS] fig. 4 and 9 compare us with: pre-LayerNorm; a stream that is the mean of all so far.
    {   .name = "us-pre", .norm_learns = 1, .residual = TAU, .embedding_scale = 0.70710678f,
        .hidden_power = -0.5f, .softmax_power = -0.5f, .relative = RATES_RELATIVE, .head_power = -1,
        .init_std = 1, .lr_power = -0.5f, .end_input = E4M3, .gradient = E5M2},
    {   .name = "us-mean", .norm_last = 1, .norm_learns = 1, .residual = MEAN, .embedding_scale = 0.70710678f,
        .hidden_power = -0.5f, .softmax_power = -0.5f, .relative = RATES_RELATIVE, .head_power = -1,
        .init_std = 1, .lr_power = -0.5f, .end_input = E4M3, .gradient = E5M2},
};

// tau, the share of a branch in the stream's variance, depends on depth only ([µS] 3.1, fig. 5, 9). The
// paper plots it; OURS is the curve through 0.4 at 4 blocks and about 0.1 at 100, where this is 0.1002.
static float default_tau(int layers) { return fminf(0.4f, 0.4f * powf(4.0f / (float)layers, 0.43f)); }

// All settings of a run. The command line fills it; a checkpoint stores it.
enum { LION, ADAMW };
typedef struct {
    const char *input, *val, *tokenizer, *hellaswag, *out, *load, *exported, *dump, *prompt;
    int scheme, layers, width, heads, seq, activation, batch, accum, steps, optimizer, warmup, base_width;
    int precision, recompute, eval_every, eval_tokens, stats_every, save_every, resume, new_data;
    int generate, evaluate, tokens, top_k, help;
    float tau, alpha_res, alpha_res_attn_ratio, alpha_attn, alpha_act, alpha_out;
    float lr, emb_lr, head_lr, norm_lr, decay, base_layers, grad_scale, temperature;
    uint64_t seed;
    int vocab;               // V: 256 for bytes, 50257 for GPT-2's tokens; the data tells
    uint64_t data;           // which data that is: see tokens_hash
} Config;

// ---- The tensors ---------------------------------------------------------------------------------------
typedef enum { DIM_1, DIM_C, DIM_3C, DIM_4C, DIM_T, DIM_VP } Dim;
static long dim_of(const Config* c, Dim d) {
    const long sizes[] = {1, c->width, 3L * c->width, 4L * c->width, c->seq, div_up(c->vocab, 128) * 128L};
    return sizes[d];
}

// The table of tensors. It alone drives allocation, init, optimizer, checkpoint and printing.
enum { QKV, OUT, UP, DOWN, LN1_GAIN, LN1_BIAS, LN2_GAIN, LN2_BIAS,  // in every block
       WTE, WPE, LNF_GAIN, LNF_BIAS, HEAD,                          // once
       TENSOR_KINDS, BLOCK_TENSORS = WTE };
typedef enum { BEGINS, ENDS, EMBEDS, LOGITS, GAIN, BIAS } Use;  // BEGINS, ENDS a branch: hidden matrices
typedef struct { const char* name; Dim rows, fan_in; Use use; } TensorKind;
static const TensorKind TENSORS[TENSOR_KINDS] = {
    {.name = "qkv", .rows = DIM_3C, .fan_in = DIM_C, .use = BEGINS},
    {.name = "out", .rows = DIM_C, .fan_in = DIM_C, .use = ENDS},
    {.name = "up", .rows = DIM_4C, .fan_in = DIM_C, .use = BEGINS},
    {.name = "down", .rows = DIM_C, .fan_in = DIM_4C, .use = ENDS},
    {.name = "ln1.gain", .rows = DIM_1, .fan_in = DIM_C, .use = GAIN},
    {.name = "ln1.bias", .rows = DIM_1, .fan_in = DIM_C, .use = BIAS},
    {.name = "ln2.gain", .rows = DIM_1, .fan_in = DIM_C, .use = GAIN},
    {.name = "ln2.bias", .rows = DIM_1, .fan_in = DIM_C, .use = BIAS},
    {.name = "wte", .rows = DIM_VP, .fan_in = DIM_C, .use = EMBEDS},
    {.name = "wpe", .rows = DIM_T, .fan_in = DIM_C, .use = EMBEDS},
    {.name = "lnf.gain", .rows = DIM_1, .fan_in = DIM_C, .use = GAIN},
    {.name = "lnf.bias", .rows = DIM_1, .fan_in = DIM_C, .use = BIAS},
    {.name = "head", .rows = DIM_VP, .fan_in = DIM_C, .use = LOGITS},
};
typedef struct {
    char name[32];            // as in a checkpoint: h.0.qkv
    Use use;
    long rows, cols, offset;  // a vector has 1 row; the offset in parameters, gradients, moments
    float std;                // it starts as N(0, std^2); gains as 1, biases as 0
    float alpha, lr_factor;   // multiplier of its matmul; its learning rate over --lr
    double grad_scale;        // its gradient is so many times the true one
    double norm_share;        // of its squares in the norm of S times the gradient; 0: it does not learn
    Precision precision;      // of its matmul
} Tensor;
static int is_hidden(const Tensor* t) { return t->use <= ENDS; }  // FP8, and the width's learning rate
static int decays(const Tensor* t) { return t->use <= LOGITS; }   // OURS: gains and biases do not
// In memory tensors lie by what their operations read: codes, BF16, FP32. Ranks share each part evenly.
enum { MATRICES, TABLES, VECTORS, PARTS };
static int part_of(const Tensor* t) { return is_hidden(t) ? MATRICES : decays(t) ? TABLES : VECTORS; }

// The table of buffers: what forward keeps for backward, then gradients, which all blocks use in turn.
enum { A_NORM1, A_QKV, A_Y, A_OUT, A_MEAN1, A_RSTD1, A_MID,   // in every block
       A_NORM2, A_UP, A_G, A_DOWN, A_MEAN2, A_RSTD2, A_X,
       A_X0, A_LNF, A_MEANF, A_RSTDF, A_LOGITS, A_LOSSES,     // once
       D_X, D_BRANCH, D_NARROW, D_WIDE,                       // gradients: see block_backward
       BUFFERS, BLOCK_BUFFERS = A_X0 };
static const struct { const char* name; Dim width; } BUFFER_KINDS[BUFFERS] = {
    {"norm1", DIM_C}, {"qkv", DIM_3C}, {"y", DIM_C}, {"out", DIM_C}, {"mean1", DIM_1}, {"rstd1", DIM_1},
    {"mid", DIM_C}, {"norm2", DIM_C}, {"up", DIM_4C}, {"g", DIM_4C}, {"down", DIM_C}, {"mean2", DIM_1},
    {"rstd2", DIM_1}, {"x", DIM_C},
    {"x0", DIM_C}, {"lnf", DIM_C}, {"meanf", DIM_1}, {"rstdf", DIM_1}, {"logits", DIM_VP}, {"losses", DIM_1},
    {"dx", DIM_C}, {"dbranch", DIM_C}, {"dnarrow", DIM_C}, {"dwide", DIM_4C},
};

// Is every tensor where its format can hold it? Measured where it is read, if m->stats_on: part two.
typedef struct { Format format; double rms, max, flushed, saturated; } Stat;
typedef struct { char name[32]; Stat stat[3]; } StatRow;  // a matmul's input, weight, output gradient

// ---- The model -----------------------------------------------------------------------------------------
typedef struct {
    Config c;
    const Scheme* scheme;
    const Precision* precision;
    Tensor* tensors;                     // of block 0, 1, ...; then those that are there once
    int num_tensors;
    long num_params, rows, vp;           // floats in all; N = B*T of one batch; padded vocabulary
    long part_end[PARTS];                // in the parameters
    float softmax_scale, attention_factor, act_in, act_out;  // see attention_forward, activation_forward
    double grad_scale;                   // S: what all gradients are scaled by (but see Tensor.grad_scale)
    float loss_scale;                    // 1; --grad-scale turns S off with it
    int training;                        // or else only to run forward
    float *params, *grads, *m, *v;       // (num_params) each, on the host; v with AdamW only
    float* buffers[BUFFERS];             // (L,N,width) or (N,width)
    int *inputs, *targets;               // (B,T)
    long step, sequence;                 // optimizer steps taken, training sequences consumed
    int stats_on;
    StatRow* stats;                      // 1 + 5 L + 1
} Model;

static Tensor* tensor(const Model* m, int l, int kind) {  // any l for what is there once
    return m->tensors + (kind < BLOCK_TENSORS ? l : m->c.layers - 1) * BLOCK_TENSORS + kind;
}
static float* param(const Model* m, int l, int kind) { return m->params + tensor(m, l, kind)->offset; }
static float* grad(const Model* m, int l, int kind) { return m->grads + tensor(m, l, kind)->offset; }
// Copies of a buffer: one per block, or one for all. --recompute keeps of each block only x; the others have
// one copy, which backward fills again with block_forward (the last block's is still there).
static int kept(const Model* m, int kind) {
    return kind >= BLOCK_BUFFERS || (m->c.recompute && kind != A_X) ? 1 : m->c.layers;
}
static float* buffer(const Model* m, int l, int kind, long row) {
    long at = kept(m, kind) == 1 ? row : l * m->rows + row;
    return m->buffers[kind] + at * dim_of(&m->c, BUFFER_KINDS[kind].width);
}
// Floats in a buffer. Without pre-LayerNorm a linear reads the stream itself.
static double buffer_size(const Model* m, int kind) {
    if (m->scheme->norm_last && (kind == A_NORM1 || kind == A_NORM2)) return 0;
    return (double)dim_of(&m->c, BUFFER_KINDS[kind].width) * (double)m->rows * kept(m, kind);
}

// Branch i = 0 .. 2L-1 (even: attention, odd: mlp) joins the stream as x = skip x + branch f: squares that
// add up to 1 keep variance 1, and tau is the branch's share of it.
typedef struct { float skip, branch; } Residual;
static Residual residual(const Model* m, int i) {
    const Config* c = &m->c;
    const ResidualRule rule = m->scheme->residual;
    const float L = (float)c->layers, ratio2 = powf(c->alpha_res_attn_ratio, 2);
    // [u-µP] eq. 3-9 give each mlp this weight, and each attention, against L of the embedding:
    const float mlp = 2 * powf(c->alpha_res, 2) / (ratio2 + 1), attention = ratio2 * mlp;
    const float own = i % 2 ? mlp : attention;
    const float before = L + (float)(i / 2) * (attention + mlp) + (float)(i % 2) * attention;
    const float tau = rule == TAU ? c->tau               // [µS] eq. 11
                    : rule == MEAN ? 1 / (float)(i + 2)  // [µS] fig. 9: all so far weigh the same
                    : own / (before + own);              // UNIT: where all alphas are 1, 1/(L + i + 1)
    const Residual sum = {1, rule == DEPTH ? sqrtf(c->base_layers / L) : 1};  // [u-µP] table 1; GPT-2
    const Residual shares = {sqrtf(1.0f - tau), sqrtf(tau)};
    return rule == SUM || rule == DEPTH ? sum : shares;
}
// u-µP's factors to unit scale ([u-µP] table 3, constants of its library): of attention, which takes a mean
// of T values, and of the activation, by its deviation for N(0,1); each between its limits in alpha.
static float between(float share, double first, double second) {
    return (float)exp(share * log(first) + (1 - share) * log(second));
}
static float attention_factor(float D, float T, float alpha) {
    return between(1 / (1 + 4 * D / (alpha * alpha)), 1, T > 1 ? sqrt(T / log(T)) : 1);
}
static float activation_factor(Activation kind, float alpha) {
    const double relu = sqrt(2 / (1 - 1 / 3.14159265358979));
    return kind == RELU ? (float)relu : between(1 / (1 + 0.25f / (alpha * alpha)), relu, 2);
}

// Lays out a model for the settings c, with nothing allocated but its table.
static void model_layout(Model* m, const Config* c) {
    const Scheme* s = &SCHEMES[c->scheme];
    const int relative = s->relative == ALL_RELATIVE, fp8 = PRECISIONS[c->precision].weight == E4M3;
    const float width = (float)c->width, D = width / (float)c->heads, r = width / (float)c->base_width;
    const float C = relative ? r : width, L = (float)c->layers / (relative ? c->base_layers : 1);
    memset(m, 0, sizeof *m);
    m->c = *c;
    m->scheme = s;
    m->precision = &PRECISIONS[c->precision];
    m->softmax_scale = c->alpha_attn / powf(D, -s->softmax_power);
    m->attention_factor = s->unit_ops ? attention_factor(D, (float)c->seq, c->alpha_attn) : 1;
    m->act_in = c->alpha_act;
    m->act_out = s->unit_ops ? activation_factor((Activation)c->activation, c->alpha_act) / c->alpha_act : 1;
    m->rows = (long)c->batch * c->seq;
    m->vp = dim_of(c, DIM_VP);
    // S, see loss_forward_backward: the mean over a step's rows and the head's alpha are left out.
    m->grad_scale = (double)m->rows * c->accum * ranks * pow((double)C, -s->head_power) / c->alpha_out;
    m->loss_scale = c->grad_scale > 0 ? (float)(c->grad_scale / m->grad_scale) : 1.0f;
    if (c->grad_scale > 0) m->grad_scale = c->grad_scale;
    m->num_tensors = c->layers * BLOCK_TENSORS + TENSOR_KINDS - BLOCK_TENSORS;
    m->tensors = (Tensor*)alloc(sizeof(Tensor) * (double)m->num_tensors);
    for (int i = 0; i < m->num_tensors; i++) {
        const int l = i / BLOCK_TENSORS, in_block = l < c->layers;
        const int kind = in_block ? i % BLOCK_TENSORS : i - (c->layers - 1) * BLOCK_TENSORS;
        const TensorKind* k = &TENSORS[kind];
        Tensor* t = &m->tensors[i];
        snprintf(t->name, sizeof t->name, "%s%s", in_block ? form("h.%d.", l) : "", k->name);
        t->use = k->use;
        t->rows = dim_of(c, k->rows);
        t->cols = dim_of(c, k->fan_in);
        t->std = s->init_std * (is_hidden(t) ? powf(C, s->init_power) : 1);
        if (t->use == ENDS) t->std *= powf(2 * (float)c->layers / (relative ? L : 1), s->residual_power);
        t->alpha = is_hidden(t) ? powf((float)t->cols, s->hidden_power)
                 : t->use == LOGITS ? c->alpha_out * powf(C, s->head_power) : 1;
        const float fan_in = s->relative ? r : (float)t->cols;  // that of `down` is 4C of 4 d_base
        t->lr_factor = is_hidden(t) ? powf(fan_in, s->lr_power) * powf(L, s->lr_depth_power)
                     : t->use == EMBEDS ? c->emb_lr * powf(C, s->embedding_lr_power)
                     : t->use == LOGITS ? c->head_lr : s->norm_learns ? c->norm_lr : 0;
        // Where LayerNorm begins a branch, the branch's coefficient is multiplied where its gradient joins
        // the stream's, and not where it leaves it: many blocks make it small ([u-µP] app. B).
        const float later = is_hidden(t) && !s->norm_last ? residual(m, 2 * l + (kind >= UP)).branch : 1;
        t->grad_scale = m->grad_scale / later;
        t->norm_share = t->lr_factor == 0 ? 0 : later * later;
        t->precision = PRECISIONS[is_hidden(t) ? c->precision : decays(t) ? min_l(c->precision, 1) : 0];
        if (is_hidden(t) && fp8) t->precision.gradient = s->gradient;
        if (t->use == ENDS && fp8) t->precision.input = s->end_input;
    }
    for (int part = 0; part < PARTS; part++) {  // each padded to equal shares of whole cache lines
        for (Tensor* t = m->tensors; t < m->tensors + m->num_tensors; t++) {
            if (part_of(t) != part) continue;
            t->offset = m->num_params;
            m->num_params += div_up(t->rows * t->cols, 256) * 256;  // every copy begins on a cache line
        }
        m->part_end[part] = m->num_params = div_up(m->num_params, 256 * ranks) * 256 * ranks;
    }
}

static void tensor_init(float* w, const Model* m, const Tensor* t) {
    if (decays(t)) fill_normal(w, t->rows * t->cols, t->std, m->c.seed, stream_of(t->name));
    else for (long k = 0; k < t->cols; k++) w[k] = t->use == GAIN ? 1.0f : 0.0f;
}

// ---- Forward -------------------------------------------------------------------------------------------
// t0 > 0 continues one sequence (B = 1) whose earlier rows are there: N rows from t0 on are computed.
static int stat_row(const Model* m, int l, int kind);
static void stat_record(Model* m, int row, const char* name, int operand, const float* x, long n, Format f);
// Told after each operation what it has written, n floats of a buffer: tests look, `make bench` times.
static void (*watch)(Model* m, int l, int kind, long n);
static void wrote(Model* m, int l, int kind, long n) { if (watch) watch(m, l, kind, n); }

// The operations of a block, each into buffer `to`, N rows from `row`, whose gradient buffers begin with D_.
// Block l's matrix `kind` times x, and statistics of what it reads.
static void linear(Model* m, int l, int kind, int to, const float* x, long row, long N) {
    const Tensor* t = tensor(m, l, kind);
    const float* w = param(m, l, kind);
    stat_record(m, stat_row(m, l, kind), t->name, 0, x, N * t->cols, t->precision.input);
    stat_record(m, stat_row(m, l, kind), t->name, 1, w, t->rows * t->cols, t->precision.weight);
    linear_forward(buffer(m, l, to, row), x, w, t->alpha, &t->precision, N, t->cols, t->rows);
    wrote(m, l, to, N * t->rows);
}
// sum.skip x + sum.branch f.
static void join(Model* m, int l, int to, Residual sum, const float* x, const float* f, long row, long N) {
    weighted_sum(buffer(m, l, to, row), sum.skip, x, sum.branch, f, N * m->c.width, m->precision->stream);
    wrote(m, l, to, N * m->c.width);
}
// A LayerNorm: its parameters, and where the mean and 1/deviation of its rows are kept.
typedef struct { int gain, bias, mean, rstd; } Norm;
static const Norm NORM1 = {.gain = LN1_GAIN, .bias = LN1_BIAS, .mean = A_MEAN1, .rstd = A_RSTD1},
                  NORM2 = {.gain = LN2_GAIN, .bias = LN2_BIAS, .mean = A_MEAN2, .rstd = A_RSTD2},
                  FINAL = {.gain = LNF_GAIN, .bias = LNF_BIAS, .mean = A_MEANF, .rstd = A_RSTDF};
static const Residual NO_SUM = {0, 1};
// LN(x), or the residual sum of skip and that.
static void norm(Model* m, int l, Norm k, int to, const float* x, const float* skip, Residual sum, long row,
                 long N) {
    layernorm_forward(buffer(m, l, to, row), buffer(m, l, k.mean, row), buffer(m, l, k.rstd, row), x,
                      param(m, l, k.gain), param(m, l, k.bias), skip, sum.skip, sum.branch, N, m->c.width,
                      m->precision->stream);
    wrote(m, l, to, N * m->c.width);
}

// What forward keeps of a block, in the table's order: (N,C), but qkv (N,3C), up, g (N,4C), means, rstds (N).
typedef struct {
    float *norm1, *qkv, *y, *out, *mean1, *rstd1, *mid, *norm2, *up, *g, *down, *mean2, *rstd2, *x;
} Block;
static Block block_of(const Model* m, int l, long row) {
    Block b;
    for (int k = 0; k < BLOCK_BUFFERS; k++)  // us has no norm1 and norm2
        ((float**)&b)[k] = buffer_size(m, k) > 0 ? buffer(m, l, k, row) : NULL;
    return b;
}
static const float* stream_before(const Model* m, int l, long row) {
    return l ? buffer(m, l - 1, A_X, row) : buffer(m, 0, A_X0, row);
}

// Block l. LayerNorm stands at the end of a branch, in one operation with the sum (post), or at its start.
static void block_forward(Model* m, int l, long B, long t0, long T) {
    const long C = m->c.width, N = B * T - t0;
    const Format f = m->precision->stream;
    const int post = m->scheme->norm_last;
    const Residual sum1 = residual(m, 2 * l), sum2 = residual(m, 2 * l + 1);
    const Block b = block_of(m, l, t0), all = block_of(m, l, 0);  // attention reads earlier rows
    const float* before = stream_before(m, l, t0);

    if (!post) norm(m, l, NORM1, A_NORM1, before, NULL, NO_SUM, t0, N);
    linear(m, l, QKV, A_QKV, post ? before : b.norm1, t0, N);
    attention_forward(all.y, all.qkv, m->softmax_scale, m->attention_factor, B, t0, T, C, m->c.heads, f);
    wrote(m, l, A_Y, N * C);
    linear(m, l, OUT, A_OUT, b.y, t0, N);
    if (post) norm(m, l, NORM1, A_MID, b.out, before, sum1, t0, N);
    else join(m, l, A_MID, sum1, before, b.out, t0, N);

    if (!post) norm(m, l, NORM2, A_NORM2, b.mid, NULL, NO_SUM, t0, N);
    linear(m, l, UP, A_UP, post ? b.mid : b.norm2, t0, N);
    activation_forward(b.g, b.up, (Activation)m->c.activation, m->act_in, m->act_out, N * 4 * C, f);
    wrote(m, l, A_G, N * 4 * C);
    linear(m, l, DOWN, A_DOWN, b.g, t0, N);
    if (post) norm(m, l, NORM2, A_X, b.down, b.mid, sum2, t0, N);
    else join(m, l, A_X, sum2, b.mid, b.down, t0, N);
    stat_record(m, 5 * (l + 1), form("h.%d.x", l), 0, b.x, N * C, f);
}

// m->inputs (B,T) -> A_LNF, the head's input, for rows t0 .. B*T-1.
static void model_forward(Model* m, long B, long t0, long T) {
    const long C = m->c.width, N = B * T - t0;
    embedding_forward(m->buffers[A_X0], m->inputs, param(m, 0, WTE), param(m, 0, WPE),
                      m->scheme->embedding_scale, B, t0, T, C, m->precision->stream);
    wrote(m, 0, A_X0, N * C);
    stat_record(m, 0, "x", 0, m->buffers[A_X0], N * C, m->precision->stream);
    for (int l = 0; l < m->c.layers; l++) block_forward(m, l, B, t0, T);
    norm(m, 0, FINAL, A_LNF, stream_before(m, m->c.layers, t0), NULL, NO_SUM, t0, N);
}

// logits = alpha LNf(x) W_head^T for N rows from `row`; alpha is 1/C ([µS] table 2). Not tied to wte.
static void model_logits(Model* m, long row, long N) {
    const Tensor* t = tensor(m, 0, HEAD);
    const long C = m->c.width, V = m->c.vocab;
    const Format f = t->precision.input;
    const float *x = buffer(m, 0, A_LNF, row), *w = param(m, 0, HEAD);
    stat_record(m, stat_row(m, 0, HEAD), t->name, 0, x, N * C, f);
    stat_record(m, stat_row(m, 0, HEAD), t->name, 1, w, V * C, f);
    matmul(buffer(m, 0, A_LOGITS, row), m->vp, view(x, C, 1, f), view(w, C, 1, f), N, V, C, t->alpha, 0,
           m->precision->stream);
}

// Mean loss of m->inputs against m->targets, (B,T). With want_gradient, A_LOGITS becomes its own gradient.
static double model_loss(Model* m, int want_gradient) {
    double sum = 0;
    model_forward(m, m->c.batch, 0, m->c.seq);
    model_logits(m, 0, m->rows);
    wrote(m, 0, A_LOGITS, m->rows * m->vp);
    loss_forward_backward(m->buffers[A_LOSSES], m->buffers[A_LOGITS], m->targets, want_gradient,
                          m->loss_scale, m->rows, m->c.vocab, m->vp, m->precision->stream);
    if (want_gradient) wrote(m, 0, A_LOGITS, m->rows * m->vp);
    for (long n = 0; n < m->rows; n++) sum += m->buffers[A_LOSSES][n];
    return sum / (double)m->rows;
}

// ---- Backward ------------------------------------------------------------------------------------------
static void linear_back(Model* m, int l, int kind, int to, const float* dy, const float* x, int add) {
    const Tensor* t = tensor(m, l, kind);
    stat_record(m, stat_row(m, l, kind), t->name, 2, dy, m->rows * t->rows, t->precision.gradient);
    linear_backward(m->buffers[to], grad(m, l, kind), dy, x, param(m, l, kind), t->alpha, &t->precision,
                    m->rows, t->cols, t->rows, add);
    wrote(m, l, to, m->rows * t->cols);
}
static void norm_back(Model* m, int l, Norm k, int to, const float* dout, const float* x, const float* dskip,
                      Residual sum) {
    layernorm_backward(m->buffers[to], grad(m, l, k.gain), grad(m, l, k.bias), dout, x,
                       buffer(m, l, k.mean, 0), buffer(m, l, k.rstd, 0), param(m, l, k.gain), dskip, sum.skip,
                       sum.branch, m->rows, m->c.width, m->precision->stream);
    wrote(m, l, to, m->rows * m->c.width);
}

// From the gradient after block l, in D_X, to that before it, also in D_X. In turn D_X has d x, d mid, d
// before; D_BRANCH d down, d out, where LayerNorm ends the branch (else D_X is that); D_WIDE d g, d up, d
// qkv; D_NARROW d mid's part through `up`, d y, d before's part through `qkv` (or d norm2, d y, d norm1).
//   Of a sum's coefficients the branch's is in LayerNorm's backward: a branch's first step here, or its last.
static void block_backward(Model* m, int l, long B, long T, int add) {
    const long C = m->c.width, N = B * T;
    const Format f = m->precision->stream;
    const int post = m->scheme->norm_last;
    const Residual sum1 = residual(m, 2 * l), sum2 = residual(m, 2 * l + 1);
    const Block b = block_of(m, l, 0);
    const float* before = stream_before(m, l, 0);
    float *dx = m->buffers[D_X], *dout = post ? m->buffers[D_BRANCH] : dx, *ddown = dout;
    float *dy = m->buffers[D_NARROW], *din = dy, *dg = m->buffers[D_WIDE], *dup = dg, *dqkv = dg;
    const Residual skip1 = {sum1.skip, 1}, skip2 = {sum2.skip, 1};

    if (post) norm_back(m, l, NORM2, D_BRANCH, dx, b.down, NULL, sum2);
    linear_back(m, l, DOWN, D_WIDE, ddown, b.g, add);
    activation_backward(dup, dg, b.up, (Activation)m->c.activation, m->act_in, m->act_out, N * 4 * C, f);
    wrote(m, l, D_WIDE, N * 4 * C);
    linear_back(m, l, UP, D_NARROW, dup, post ? b.mid : b.norm2, add);
    if (post) join(m, l, D_X, skip2, dx, din, 0, N);
    else norm_back(m, l, NORM2, D_X, din, b.mid, dx, sum2);

    if (post) norm_back(m, l, NORM1, D_BRANCH, dx, b.out, NULL, sum1);
    linear_back(m, l, OUT, D_NARROW, dout, b.y, add);
    attention_backward(dqkv, dy, b.qkv, m->softmax_scale, m->attention_factor, B, T, C, m->c.heads, f);
    wrote(m, l, D_WIDE, N * 3 * C);
    linear_back(m, l, QKV, D_NARROW, dqkv, post ? before : b.norm1, add);
    if (post) join(m, l, D_X, skip1, dx, din, 0, N);
    else norm_back(m, l, NORM1, D_X, din, before, dx, sum1);
}

static void zero(float* x, long n) {
    #pragma omp parallel for schedule(static) if (n > 65536)
    for (long i = 0; i < n; i += 4096) memset(x + i, 0, sizeof(float) * (size_t)min_l(4096, n - i));
}
// Gradients of the last model_loss(m, 1), each times its tensor's grad_scale, to m->grads: added if `add`.
static void model_backward(Model* m, int add) {
    const long B = m->c.batch, T = m->c.seq, C = m->c.width, V = m->c.vocab, N = m->rows;
    const Format f = tensor(m, 0, HEAD)->precision.gradient;
    const float *dlogits = m->buffers[A_LOGITS], *lnf = m->buffers[A_LNF], *w = param(m, 0, HEAD);
    float *dx = m->buffers[D_X], *dlnf = m->buffers[D_BRANCH];
    for (const Tensor* t = m->tensors; !add && t < m->tensors + m->num_tensors; t++)  // matmuls write theirs
        if (!is_hidden(t) && t->use != LOGITS) zero(m->grads + t->offset, t->rows * t->cols);
    if (!add) zero(grad(m, 0, HEAD) + V * C, (m->vp - V) * C);
    // alpha is 1 here, not the head's: the factor C in S, see loss_forward_backward.
    stat_record(m, stat_row(m, 0, HEAD), "head", 2, dlogits, N * m->vp, f);
    matmul(grad(m, 0, HEAD), C, view(dlogits, 1, m->vp, f), view(lnf, 1, C, f), V, C, N, 1.0f, add, FP32);
    matmul(dlnf, C, view(dlogits, m->vp, 1, f), view(w, 1, C, f), N, C, V, 1.0f, 0, m->precision->stream);
    wrote(m, 0, D_BRANCH, N * C);
    norm_back(m, 0, FINAL, D_X, dlnf, stream_before(m, m->c.layers, 0), NULL, NO_SUM);
    for (int l = m->c.layers - 1; l >= 0; l--) {
        if (m->c.recompute && l < m->c.layers - 1) block_forward(m, l, B, 0, T);  // the last's are there
        block_backward(m, l, B, T, add);
    }
    embedding_backward(grad(m, 0, WTE), grad(m, 0, WPE), dx, m->inputs, m->scheme->embedding_scale, B, T, C);
}

// ---- Optimizers and schedule ---------------------------------------------------------------------------
// Both see a scaled gradient: Lion takes its sign, AdamW divides it by its own size. It is not clipped:
// the size of a step does not follow the size of the gradient in either.

// Learning rate of step s = 1, 2, ...: linear warm-up, then a cosine to 10 % of the peak at the last step.
static double learning_rate(const Config* c, long s) {
    if (s <= c->warmup) return (double)c->lr * (double)s / c->warmup;
    double progress = (double)(s - c->warmup) / (double)(c->steps - c->warmup);
    return (double)c->lr * (0.1 + 0.45 * (1.0 + cos(3.14159265358979 * fmin(progress, 1.0))));
}

// What a tensor's step at rate lr takes from the schedule. The decay follows it and not the peak rate: lambda
// lr_t / lr_max, the same at every width. In µS hidden matrices learn at lr sqrt(d_base / C) ([µS] table 2,
// 3.2): at the default width of 128 that is 1.41 --lr, for the paper names its rates for d_base = 256.
typedef struct { float lr, decay, eps, c1, c2; } Rates;  // c1, c2: AdamW's bias corrections
static Rates rates(const Model* m, const Tensor* t, double lr) {
    Rates r = {(float)lr * t->lr_factor, decays(t) ? m->c.decay * (float)(lr / m->c.lr) : 0,
               m->scheme->true_epsilon ? (float)(1e-8 * t->grad_scale) : 1e-8f,
               (float)(1.0 - pow(0.9, (double)m->step + 1)), (float)(1.0 - pow(0.95, (double)m->step + 1))};
    return r;
}
// Lion (Chen et al. 2023, arXiv 2302.06675) with fully decoupled weight decay: W -= lr u + decay W.
BOTH static inline float lion(float w, float* m, float g, Rates r) {
    const float b1 = 0.9f, b2 = 0.99f;
    float u = b1 * *m + (1.0f - b1) * g;
    u = u > 0.0f ? 1.0f : u < 0.0f ? -1.0f : 0.0f;
    *m = b2 * *m + (1.0f - b2) * g;
    return w - (r.lr * u + r.decay * w);
}
// AdamW (Loshchilov, Hutter 2019), bias-corrected. 0.95 is usual for language models (Brown et al. 2020).
BOTH static inline float adamw(float w, float* m, float* v, float g, Rates r) {
    const float b1 = 0.9f, b2 = 0.95f;
    *m = b1 * *m + (1.0f - b1) * g;
    *v = b2 * *v + (1.0f - b2) * g * g;
    return w - (r.lr * (*m / r.c1) / (sqrtf(*v / r.c2) + r.eps) + r.decay * w);
}
// Within a parallel region; a thread goes on to the next tensor without waiting for the others.
static void lion_update(float* w, float* m, const float* g, long n, Rates r) {
    #pragma omp for simd schedule(static) nowait
    for (long i = 0; i < n; i++) w[i] = lion(w[i], &m[i], g[i], r);
}
static void adamw_update(float* w, float* m, float* v, const float* g, long n, Rates r) {
    #pragma omp for simd schedule(static) nowait
    for (long i = 0; i < n; i++) w[i] = adamw(w[i], &m[i], &v[i], g[i], r);
}

static void model_update(Model* m, double lr) {
    #pragma omp parallel
    for (const Tensor* t = m->tensors; t < m->tensors + m->num_tensors; t++) {
        const Rates r = rates(m, t, lr);
        const long n = t->rows * t->cols;
        float *w = m->params + t->offset, *g = m->grads + t->offset, *m1 = m->m + t->offset;
        if (m->v) adamw_update(w, m1, m->v + t->offset, g, n, r);
        else lion_update(w, m1, g, n, r);
    }
}
// Norm of the true gradient; *bad is the first tensor with a value that is not finite, or NULL.
static double gradient_norm(const Model* m, const Tensor** bad) {
    enum { CHUNK = 65536 };  // fixed: the same bits for any number of threads
    float* sums = scratch(SCRATCH_SUMS, m->num_params / CHUNK + m->num_tensors);
    double total = 0;
    #pragma omp parallel
    for (long i = 0, at = 0; i < m->num_tensors; i++) {
        const Tensor* t = &m->tensors[i];
        const long n = t->rows * t->cols, chunks = div_up(n, CHUNK);
        const float* g = m->grads + t->offset;
        #pragma omp for schedule(static) nowait
        for (long chunk = 0; chunk < chunks; chunk++) {
            double sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (long k = chunk * CHUNK; k < min_l(n, (chunk + 1) * CHUNK); k++) sum += (double)g[k] * g[k];
            sums[at + chunk] = (float)sum;
        }
        at += chunks;
    }
    *bad = NULL;
    for (int i = 0; i < m->num_tensors; i++) {
        double sum = 0;
        for (long k = div_up(m->tensors[i].rows * m->tensors[i].cols, CHUNK); k > 0; k--) sum += *sums++;
        if (!isfinite(sum) && !*bad) *bad = &m->tensors[i];
        total += sum * m->tensors[i].norm_share;
    }
    return sqrt(total) / m->grad_scale;
}

// ---- One training step ---------------------------------------------------------------------------------
typedef struct Split Split;                            // a range of tokens
static void next_batch(Model* m, const Split* train);  // m->inputs, m->targets: the next ones in random order
typedef struct { double loss, norm; const Tensor* bad; } StepResult;  // bad: its gradient is not finite
// The loss so far is in r; the step is not taken if something is not finite.
static StepResult cpu_finish(Model* m, StepResult r, double lr) {
    r.norm = gradient_norm(m, &r.bad);
    if (isfinite(r.loss) && !r.bad) model_update(m, lr), m->step++;
    return r;
}
static StepResult cpu_step(Model* m, const Split* train, double lr) {
    StepResult r = {0, 0, NULL};
    const long sequence = m->sequence, step = m->step;
    for (int i = 0; i < m->c.accum; i++) {
        next_batch(m, train);
        r.loss += model_loss(m, 1) / m->c.accum;
        model_backward(m, i > 0);
        m->stats_on = 0;  // statistics are of the first batch
    }
    r = cpu_finish(m, r, lr);
    if (m->step == step) m->sequence = sequence;  // not taken: its sequences do not count as consumed
    return r;
}
// ======== Part two: the program =========================================================================

// ---- Small tools ---------------------------------------------------------------------------------------
// Length of the UTF-8 character at s, of which n bytes are there; 0: the rest is missing; -1: it is none, or
// is a control character, which could steer a terminal.
static int character(const uint8_t* s, long n) {
    const int length = *s < 0x80 ? 1 : *s >> 5 == 6 ? 2 : *s >> 4 == 14 ? 3 : *s >> 3 == 30 ? 4 : -1;
    if (length < 0) return -1;
    uint32_t code = length == 1 ? *s : *s & (0x7F >> length);
    for (int i = 1; i < length; i++) {
        if (i >= n) return 0;
        if (s[i] >> 6 != 2) return -1;
        code = code << 6 | (s[i] & 0x3F);
    }
    if (length == 1) return (code >= 32 && code != 127) || code == '\n' || code == '\t' ? 1 : -1;
    if (length == 3) return code >= 0x800 && code >> 11 != 27 ? 3 : -1;  // 0xD800 to 0xDFFF are surrogates
    return (length == 2 && code >= 0xA0) || (length == 4 && code - 0x10000 < 0x100000) ? length : -1;
}
// Puts '?' for all else. Returns how many bytes to print: none of a character cut off, if more follows.
static long make_safe(char* text, long n, int rest_follows) {
    for (long i = 0, length; i < n; i += length > 0 ? length : 1) {
        length = character((const uint8_t*)text + i, n - i);
        if (length == 0 && rest_follows) return i;
        if (length < 1) text[i] = '?';
    }
    return n;
}

static char* form(const char* format, ...) {  // printf into a string that lasts until 15 more are made
    static char ring[16][9000];
    static int next;
    char* to = ring[next++ % 16];
    va_list args;
    va_start(args, format);
    vsnprintf(to, sizeof ring[0], format, args);
    va_end(args);
    return to;
}
static const char* shown(const char* s) {  // a path or text of the user's, safe to print in one line
    char* copy = form("%s", s);
    make_safe(copy, (long)strlen(copy), 0);
    for (char* p = copy; *p; p++) if (*p == '\n' || *p == '\t') *p = '?';
    return copy;
}
static const char* program = "train_us";
static void (*last_words)(void);  // set: what has to be saved before the end
static void die(const char* format, ...) {
    char text[9000];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    fflush(stdout);
    fprintf(stderr, "%s: %s\n", program, shown(text));
    if (last_words) last_words();
    exit(1);
}
static void* alloc(double bytes) {  // zeroed, on a cache line; in double no product of sizes wraps around
    void* p = NULL;
    double physical = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    if (!(bytes < physical) || posix_memalign(&p, 64, (size_t)bytes + 64) != 0)
        die("%.1f GB of memory wanted, this machine has %.1f: lower --batch, --seq, --width or --layers",
            bytes * 1e-9, physical * 1e-9);
    return memset(p, 0, (size_t)bytes + 64);
}
static char* copied(const char* s) { return strcpy((char*)alloc((double)strlen(s) + 1), s); }
static float* scratch(int slot, long n) {
    static __thread struct { float* p; long n; } slots[SCRATCH_SLOTS];
    if (slots[slot].n < n) {
        free(slots[slot].p);
        slots[slot].p = (float*)alloc(sizeof(float) * (double)n);
        slots[slot].n = n;
    }
    return slots[slot].p;
}
static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// A thread that waits spins for a while before it sleeps. Where other programs use the cores, it spins in the
// place of the very thread it waits for: a step took ten times as long. libgomp (gcc) spins 300,000 times and
// reads its setting before main: set it and begin again. Threads differ by 2,000 turns (0.1 ms) if idle.
static void wait_briefly(char** argv) {
#if defined(_OPENMP) && !defined(KMP_VERSION_MAJOR)
    char self[PATH_MAX];
    if (max_threads() == 1 || getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
    if (getenv("OMP_PROC_BIND")) return;  // this thread is bound to one core, and its threads would be, too
    if (!realpath("/proc/self/exe", self) || strstr(self, "/ld-")) return;  // ld.so, given this program
    setenv("GOMP_SPINCOUNT", "2000", 1);
    execv(self, argv);  // if that fails, all is as it was
#endif
    (void)argv;
}

// ---- The fast matmul -----------------------------------------------------------------------------------
// Nearly all of the time goes here, so it is the one part written for speed, after BLIS (Van Zee, van de
// Geijn 2015). Each thread makes a block of `out` by itself: it copies what it needs of both operands into
// panels, rounded on the way, so FP8 costs no memory; a tile reads two panels from begin to end, and keeps
// its MR x NR sums in vector registers, whose number it follows: sums, a row of b, a broadcast of a must fit.
//   Panels consist of words: of a value each, or of a pair of BF16 values that follow in K, where the machine
// multiplies pairs; an FP8 value is exact in BF16, and so are products in FP32. For each WK words of K a
// panel of a has its rows, of WK words each, and a panel of b WK rows of NR words. A panel of b is KC words
// long (32 KB), to stay in L1 while it meets all panels of a: at most A_ROWS rows, A_WORDS words (2 MB: L2).
#if defined(__AMX_BF16__) || defined(__AMXBF16__)  // (clang before 16 spells it so)
enum { LANES = 16, MR = 12, NV = 2, PAIR_ROWS = 32,  // 8 registers of 16 x 16, see tile_pairs; and those of:
#elif defined(__AVX512F__)
enum { LANES = 16, MR = 12, NV = 2, PAIR_ROWS = MR,  // 32 registers of 16 floats
#elif defined(__AVX__)
enum { LANES = 8, MR = 6, NV = 2, PAIR_ROWS = MR,    // 16 registers of 8 floats
#elif defined(__aarch64__)
enum { LANES = 4, MR = 6, NV = 4, PAIR_ROWS = MR,    // 32 registers of 4 floats
#else
enum { LANES = 4, MR = 2, NV = 4, PAIR_ROWS = MR,    // 16 registers of 4 floats
#endif
       NR = NV * LANES, WK = 16, KC = 256, PAIR_KC = 384, A_ROWS = 1056, A_WORDS = 1 << 19 };
typedef float Vec __attribute__((vector_size(4 * LANES), may_alias));
// sums (MR,NR) = a b, all in registers, of values or of pairs.
__attribute__((always_inline)) static inline void vector_tile(float* sums, const float* a, const float* b,
                                                              long words, __attribute__((unused)) int pairs) {
    Vec c[MR][NV];
    memset(c, 0, sizeof c);
    for (long k = 0; k < words; k += WK, a += MR * WK)
        for (int p = 0; p < WK; p++, b += NR) {
            if (p < MR) __builtin_prefetch(a + MR * WK + p * WK);
            for (int i = 0; i < MR; i++)
                for (int j = 0; j < NV; j++)
#ifdef __AVX512BF16__
                    if (pairs) c[i][j] = (Vec)_mm512_dpbf16_ps((__m512)c[i][j],
                                                               (__m512bh)_mm512_set1_ps(a[i * WK + p]),
                                                               (__m512bh)((const Vec*)b)[j]);
                    else
#endif
                        c[i][j] += a[i * WK + p] * ((const Vec*)b)[j];
        }
    memcpy(sums, c, sizeof c);
}
__attribute__((noinline)) static void tile(float* sums, const float* a, const float* b, long words) {
    vector_tile(sums, a, b, words, 0);
}
// sums (PAIR_ROWS,NR) of pairs, where the machine has an instruction for it.
#if defined(__AMX_BF16__) || defined(__AMXBF16__)
static const char* const PAIRS_BY = "AMX";
static int multiplies_pairs(void) {  // Linux wants to be asked once: ARCH_REQ_XCOMP_PERM, XTILEDATA
    static int answer = -1;
    if (answer < 0) answer = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return answer;
}
__attribute__((noinline)) static void tile_pairs(float* sums, const float* a, const float* b, long words) {
    static __thread int ready;
    static const struct { uint8_t palette, zeros[15]; uint16_t bytes[16]; uint8_t rows[16]; } shapes = {
        1, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    if (!ready) _tile_loadconfig(&shapes), ready = 1;  // eight registers of 16 rows of 64 bytes
    __asm__ volatile("" ::: "memory");  // gcc's tile loads do not say that they read memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long k = 0; k < words; k += WK, a += PAIR_ROWS * WK, b += WK * NR) {
        _tile_loadd(4, a, 4 * WK);
        _tile_loadd(6, b, 4 * NR);
        _tile_loadd(7, b + 16, 4 * NR);
        _tile_loadd(5, a + 16 * WK, 4 * WK);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 4 * NR);
    _tile_stored(1, sums + 16, 4 * NR);
    _tile_stored(2, sums + 16 * NR, 4 * NR);
    _tile_stored(3, sums + 16 * NR + 16, 4 * NR);
}
#elif defined(__AVX512BF16__)
static const char* const PAIRS_BY = "AVX512_BF16";
static int multiplies_pairs(void) { return 1; }
__attribute__((noinline)) static void tile_pairs(float* sums, const float* a, const float* b, long words) {
    vector_tile(sums, a, b, words, 1);
}
#else
static const char* const PAIRS_BY = "";
static int multiplies_pairs(void) { return 0; }
static void tile_pairs(float* sums, const float* a, const float* b, long words) { tile(sums, a, b, words); }
#endif
static inline float pair_of(float low, float high) {
    return bits_float(float_bits(low) >> 16 | (float_bits(high) & 0xFFFF0000u));
}
// Of an operand WK rows from i0 on and WK words of K from k0 on, rounded: block[row][word], or
// block[word][row] if `across`, in one of two buffers. Zeros from row i1 and value k1 on.
__attribute__((always_inline)) static inline float* read_block(float v[2 * WK * WK], float w[WK * WK],
        const Operand* x, long i0, long i1, long k0, long k1, int pairs, int across) {
    const int depth = pairs ? 2 * WK : WK, whole = i1 - i0 >= WK && k1 - k0 >= depth;
    const int along = x->col == 1, half = WK * WK / 2;  // along: neighbours in memory are so in K
    const float* from = x->p + i0 * x->row + k0 * x->col;
    if (whole && along) for (int i = 0; i < WK; i++, from += x->row) {
        __builtin_prefetch(from + 2 * WK), __builtin_prefetch(from + 3 * WK);
        for (int k = 0; k < depth; k++) v[i * depth + k] = from[k];
    }
    else for (int k = 0; k < depth; k++, from += x->col) {
        float* to = v + (pairs ? k / 2 + k % 2 * WK : k) * WK;  // a pair's firsts, then its seconds
        __builtin_prefetch(from + 2 * WK);
        if (whole && x->row == 1) for (int i = 0; i < WK; i++) to[i] = from[i];
        else for (int i = 0; i < WK; i++) {
            const float value = i0 + i < i1 && k0 + k < k1 ? from[i * x->row] : 0;
            if (along) v[i * depth + k] = value;
            else to[i] = value;
        }
    }
    round_all(v, WK * depth, x->format);
    if (pairs && along) for (int t = 0; t < WK * WK; t++) w[t] = pair_of(v[2 * t], v[2 * t + 1]);
    else if (pairs) for (int t = 0; t < WK * WK; t++) w[t] = pair_of(v[t], v[t + WK * WK]);
    float *block = pairs ? w : v, *other = pairs ? v : w;
    // A riffle moves the top bit of every place to the bottom: four exchange row and column.
    for (int n = 0; n < 2 && along == across; n++) {
        for (int t = 0; t < half; t++) other[2 * t] = block[t], other[2 * t + 1] = block[t + half];
        for (int t = 0; t < half; t++) block[2 * t] = other[t], block[2 * t + 1] = other[t + half];
    }
    return block;
}
// Rows i0 .. i1-1 and values k0 .. k1-1 of K in panels, of b if `across`; zeros up to multiples of WK.
__attribute__((always_inline)) static inline void pack(float* to, const Operand* x, long i0, long i1, long k0,
                                                       long k1, long words, int pairs, int across) {
    const int R = across ? NR : pairs ? PAIR_ROWS : MR;  // rows of a panel
    float v[2 * WK * WK] __attribute__((aligned(64))), w[WK * WK] __attribute__((aligned(64)));
    for (long i = 0; i < i1 - i0; i += WK)
        for (long k = 0; k < words; k += WK) {
            const float* block = read_block(v, w, x, i0 + i, i1, k0 + (pairs ? 2 * k : k), k1, pairs, across);
            for (int r = 0; r < WK; r++, block += WK)
                memcpy(to + (across ? (k + r) * R + i : (i + r) / R * R * words + k * R + (i + r) % R * WK),
                       block, sizeof(float) * WK);
        }
}
// A tile's sums to memory, rounded.
static void store(float* out, long ld, float* sums, float alpha, long rows, long n, int add, Format format) {
    for (long r = 0; r < rows; r++) {
        Vec* s = (Vec*)(sums + r * NR);
        Vec before[NV] = {{0}};
        if (add && n == NR) memcpy(before, out + r * ld, sizeof before);
        else if (add) for (int j = 0; j < n; j++) ((float*)before)[j] = out[r * ld + j];
        for (int l = 0; l < NV; l++) s[l] = before[l] + alpha * s[l];
    }
    round_all(sums, rows * NR, format);
    for (long r = 0; r < rows; r++, sums += NR, out += ld) {
        if (n == NR) memcpy(out, sums, sizeof(float) * NR);
        else for (int j = 0; j < n; j++) out[j] = sums[j];
    }
}
// Rows m0 .. m1-1 and columns n0 .. n1-1 of out.
static void matmul_block(float* out, long ld, const Operand* a, const Operand* b, long m0, long m1, long n0,
                         long n1, long K, float alpha, int accumulate, Format format, int pairs) {
    const long R = pairs ? PAIR_ROWS : MR, depth = pairs ? 2 : 1;  // rows of a tile, values in a word
    const long stretch = depth * (pairs ? PAIR_KC : KC), tall = (div_up(m1 - m0, R) + div_up(WK, R)) * R;
    const long chunk = max_l(1, min_l(div_up(K, stretch), A_WORDS * depth / (tall * stretch))) * stretch;
    float* panels = scratch(SCRATCH_A, tall * chunk / depth);
    float* panel = scratch(SCRATCH_B, NR * stretch / depth);
    for (long c = 0; c < K; c += chunk) {
        const long end = min_l(K, c + chunk);
        for (long k = c; k < end; k += stretch) {
            const long k1 = min_l(end, k + stretch), words = div_up(k1 - k, WK * depth) * WK;
            float* to = panels + (k - c) / depth * tall;
            if (pairs) pack(to, a, m0, m1, k, k1, words, 1, 0);
            else pack(to, a, m0, m1, k, k1, words, 0, 0);
        }
        for (long j = n0; j < n1; j += NR)
            for (long k = c; k < end; k += stretch) {
                const long k1 = min_l(end, k + stretch), words = div_up(k1 - k, WK * depth) * WK;
                const float* from = panels + (k - c) / depth * tall;
                if (pairs) pack(panel, b, j, min_l(n1, j + NR), k, k1, words, 1, 1);
                else pack(panel, b, j, min_l(n1, j + NR), k, k1, words, 0, 1);
                for (long i = m0; i < m1; i += R, from += R * words) {
                    float sums[PAIR_ROWS * NR] __attribute__((aligned(64))), *o = out + i * ld + j;
                    const long rows = min_l(R, m1 - i);
                    for (long r = 0; r < rows; r++)
                        for (int l = 0; l < NR; l += 16) __builtin_prefetch(o + r * ld + l, 1);
                    (pairs ? tile_pairs : tile)(sums, from, panel, words);
                    store(o, ld, sums, alpha, rows, min_l(NR, n1 - j), accumulate || k > 0,
                          k1 == K ? format : FP32);
                }
            }
    }
}
// The order of every sum depends on K alone, so the result is the same bits for any number of threads.
static void matmul(float* out, long ld, Operand a, Operand b, long M, long N, long K, float alpha,
                   int accumulate, Format format) {
    const int threads = (double)M * (double)N * (double)K < 1e6 ? 1 : max_threads();  // else not worth a wait
    const int pairs = a.format != FP32 && b.format != FP32 && multiplies_pairs(), R = pairs ? PAIR_ROWS : MR;
    long down = 1;  // blocks, and threads / down beside each other: so that the least has to be packed
    for (long d = 1; d <= threads; d++)
        if (threads % d == 0 && d * N + threads / d * M < down * N + threads / down * M) down = d;
    const long height = div_up(div_up(M, down), R) * R, width = div_up(div_up(N, threads / down), NR) * NR;
    #pragma omp parallel for schedule(static) if (threads > 1)
    for (long block = 0; block < threads; block++) {
        const long end = min_l(M, block % down * height + height), n0 = block / down * width;
        for (long m0 = block % down * height; m0 < end; m0 += A_ROWS)
            matmul_block(out, ld, &a, &b, m0, min_l(end, m0 + A_ROWS), n0, min_l(N, n0 + width), K, alpha,
                         accumulate, format, pairs);
    }
}

// ---- A model's memory ----------------------------------------------------------------------------------
static float* floats(double n) { return (float*)alloc(4.0 * n); }
static void model_alloc_params(Model* m, int training) {
    m->training = training;
    m->params = floats((double)m->num_params);
    if (training) m->grads = floats((double)m->num_params), m->m = floats((double)m->num_params);
    if (training && m->c.optimizer == ADAMW) m->v = floats((double)m->num_params);
}
static void model_alloc_batch(Model* m) {
    m->inputs = (int*)floats((double)m->rows);
    m->targets = (int*)floats((double)m->rows);
    m->stats = (StatRow*)alloc(sizeof(StatRow) * (2.0 + 5.0 * m->c.layers));
}
static void model_alloc_buffers(Model* m) {
    for (int k = 0; k < BUFFERS; k++) m->buffers[k] = floats(buffer_size(m, k));
    model_alloc_batch(m);
}
static void model_free(Model* m) {
    void* const all[] = {m->params, m->grads, m->m, m->v, m->inputs, m->targets, m->tensors, m->stats};
    for (int i = 0; i < 8; i++) free(all[i]);
    for (int k = 0; k < BUFFERS; k++) free(m->buffers[k]);
    memset(m, 0, sizeof *m);
}

// ---- Unit-scale statistics -----------------------------------------------------------------------------
typedef struct { float square, nonzero, flushed, saturated, max; } StatSums;  // of a part of a tensor
static void stat_finish(Model* m, int row, const char* name, int operand, const StatSums* sums, long parts,
                        double n, Format format) {
    double square = 0, nonzero = 0, flushed = 0, saturated = 0, max = 0;
    for (long k = 0; k < parts; k++) {
        square += sums[k].square, nonzero += sums[k].nonzero, flushed += sums[k].flushed;
        saturated += sums[k].saturated, max = fmax(max, sums[k].max);
    }
    const Stat stat = {format, sqrt(square / n), max, flushed / fmax(nonzero, 1), saturated / n};
    snprintf(m->stats[row].name, sizeof m->stats[row].name, "%s", name);
    m->stats[row].stat[operand] = stat;
}
// Rows: 0 the embeddings' sum; for each block qkv, out, up, down and the stream after it; last the head.
static int stat_row(const Model* m, int l, int kind) {
    return kind == HEAD ? 1 + 5 * m->c.layers : 1 + 5 * l + kind;
}
// RMS and maximum before the cast, the share of non-zero values that it flushes to zero, and of its clipping.
static void stat_record(Model* m, int row, const char* name, int operand, const float* x, long n, Format f) {
    enum { CHUNK = 16384 };  // fixed, so that the sums do not depend on the number of threads
    if (!m->stats_on) return;
    const long chunks = div_up(n, CHUNK);
    StatSums* sums = (StatSums*)scratch(SCRATCH_SUMS, chunks * 5);
    #pragma omp parallel for schedule(static)
    for (long k = 0; k < chunks; k++) {
        float square = 0, max = 0, nonzero = 0, flushed = 0, saturated = 0;
        #pragma omp simd reduction(+ : square, nonzero, flushed, saturated) reduction(max : max)
        for (long i = k * CHUNK; i < min_l(n, (k + 1) * CHUNK); i++) {
            float v = f == FP32 ? x[i] : round_bf16(x[i]), a = fabsf(v);
            float cast = fabsf(f == E4M3 ? round_fp8(v, E4M3) : f == E5M2 ? round_fp8(v, E5M2) : v);
            square += v * v;
            max = a > max ? a : max;
            nonzero += a != 0.0f ? 1.0f : 0.0f;
            flushed += a != 0.0f && cast == 0.0f ? 1.0f : 0.0f;
            saturated += a > FORMATS[f].max ? 1.0f : 0.0f;
        }
        const StatSums chunk = {square, nonzero, flushed, saturated, max};
        sums[k] = chunk;
    }
    stat_finish(m, row, name, operand, sums, chunks, (double)n, f);
}

// ---- Random numbers ------------------------------------------------------------------------------------
// Counter-based: any thread, rank or device draws the same. The mixer: SplitMix64 (Steele, Lea, Flood 2014).
static inline uint64_t mix64(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}
static inline uint64_t random_u64(uint64_t seed, uint64_t stream, uint64_t index) {
    const uint64_t golden = 0x9E3779B97F4A7C15ull;
    return mix64(mix64(seed * golden + mix64(stream + 1)) + (index + 1) * golden);
}
static inline double random_uniform(uint64_t seed, uint64_t stream, uint64_t index) {  // in (0, 1)
    return ((double)(random_u64(seed, stream, index) >> 11) + 0.5) * 0x1p-53;
}
static uint64_t stream_of(const char* name) {  // FNV-1a: a tensor's numbers follow its name, not its place
    uint64_t h = 0xCBF29CE484222325ull;
    for (; *name; name++) h = (h ^ (uint8_t)*name) * 0x100000001B3ull;
    return h;
}

// x[i] = std * N(0,1) by Box-Muller, in double so that the last bit of a libm does not show.
static void fill_normal(float* x, long n, float std, uint64_t seed, uint64_t stream) {
    #pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i += 2) {
        double r = sqrt(-2.0 * log(random_uniform(seed, stream, (uint64_t)i)));
        double angle = 6.283185307179586 * random_uniform(seed, stream, (uint64_t)i + 1);
        x[i] = (float)(std * (float)(r * cos(angle)));
        if (i + 1 < n) x[i + 1] = (float)(std * (float)(r * sin(angle)));
    }
}

// ---- Data ----------------------------------------------------------------------------------------------
// Any file's bytes, or llm.c's shards of GPT-2 tokens: int32[256] (magic, version, count), uint16 tokens.
enum { SHARD_MAGIC = 20240520, TOKENIZER_MAGIC = 20240328, QUESTIONS_MAGIC = 20240522,
       BYTES_VOCAB = 256, GPT2_VOCAB = 50257 };

static const uint8_t* map_file(const char* path, const char* what, long* size) {
    struct stat st;
    int fd = open(path, O_RDONLY | O_NONBLOCK);  // a FIFO is refused at once, without waiting for its writer
    if (fd < 0 || fstat(fd, &st) != 0) die("cannot open %s %s: %s", what, path, strerror(errno));
    if (!S_ISREG(st.st_mode)) die("%s %s is not a regular file", what, path);
    if (st.st_size == 0) die("%s %s is empty", what, path);
    void* p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED) die("cannot read %s %s: %s", what, path, strerror(errno));
    close(fd);
    *size = (long)st.st_size;
    return (const uint8_t*)p;
}
static uint32_t read_u32(const uint8_t* p) { uint32_t u; memcpy(&u, p, 4); return u; }

typedef struct { const uint8_t* p; long count; const char* path; } Shard;
typedef struct { Shard* shards; int num_shards, bytes_per_token; long count; } Tokens;
struct Split { const Tokens* tokens; long start, count; };  // a range of them
static void on_bus_error(int number) {  // what reads behind the cut of a mapped file gets this signal
    signal(number, SIG_DFL);
    die("a file was cut off while it was read (--input, --val or a checkpoint)");
}
static void tokens_open(Tokens* t, const char* pattern) {  // a text, a .bin shard, or all that a glob names
    glob_t found;
    const int is_pattern = access(pattern, F_OK) != 0;  // a file's own name may have brackets in it
    memset(t, 0, sizeof *t);
    if (is_pattern && glob(pattern, 0, NULL, &found) != 0) die("no file matches %s", pattern);
    t->num_shards = is_pattern ? (int)found.gl_pathc : 1;
    t->shards = (Shard*)alloc(sizeof(Shard) * (double)t->num_shards);
    for (int i = 0; i < t->num_shards; i++) {
        long size;
        const char* path = t->shards[i].path = copied(is_pattern ? found.gl_pathv[i] : pattern);
        const char* dot = strrchr(path, '.');
        const uint8_t* p = map_file(path, "data file", &size);
        int width = size >= 4 && read_u32(p) == SHARD_MAGIC ? 2 : 1;
        if (width == 1 && dot && strcmp(dot, ".bin") == 0)
            die("%s is not a token shard of llm.c's format", path);
        if (width == 2 && (size < 1024 || read_u32(p + 4) != 1 || size != 1024 + 2L * read_u32(p + 8)))
            die("token shard %s is damaged: version or token count do not fit its %ld bytes", path, size);
        if (i > 0 && width != t->bytes_per_token) die("%s mixes token shards and other files", pattern);
        t->bytes_per_token = width;
        t->shards[i].p = width == 2 ? p + 1024 : p;
        t->count += t->shards[i].count = width == 2 ? (size - 1024) / 2 : size;
    }
    if (is_pattern) globfree(&found);
}
// Which data this is, and that before it: each file's size, and its first MB.
static uint64_t tokens_hash(const Tokens* t, uint64_t h) {
    for (int i = 0; i < t->num_shards; i++) {
        const long size = t->shards[i].count * t->bytes_per_token;
        h = mix64(h + (uint64_t)size + 1);
        for (long k = 0; k < min_l(size, 1 << 20); k++) h = (h ^ t->shards[i].p[k]) * 0x100000001B3ull;
    }
    return h >> 11;  // a double holds it
}
static int tokens_vocab(const Tokens* t) { return t->bytes_per_token == 1 ? BYTES_VOCAB : GPT2_VOCAB; }

// Copies tokens start .. start+T-1 of a split to inputs, and the token after each to targets.
static void tokens_read(const Split* s, long start, long T, int* inputs, int* targets) {
    const Shard* shard = s->tokens->shards;
    long at = s->start + start;
    for (long i = 0; i <= T; i++, at++) {
        while (at >= shard->count) at -= shard++->count;
        const uint8_t* p = shard->p + at * s->tokens->bytes_per_token;
        int token = s->tokens->bytes_per_token == 1 ? *p : p[0] | p[1] << 8;
        if (token >= GPT2_VOCAB)
            die("%s holds token %d at %ld: GPT-2's end at 50256", shard->path, token, at);
        if (i < T) inputs[i] = token;
        if (i > 0) targets[i - 1] = token;
    }
}

// Where training sequence number `sequence` starts. An epoch cuts the text into n windows of T from a random
// offset and visits them in a random order. A shuffle would have to be stored to go on in its middle; a
// four-round Feistel permutation of an even number of bits, repeated until it lands below n, need not.
static long window_start(uint64_t seed, long sequence, long count, long T) {
    long n = count < 2 * T ? 1 : (count - T) / T, epoch = sequence / n;
    uint64_t stream = stream_of("epoch") + (uint64_t)epoch, x = (uint64_t)(sequence % n);
    int half = 1;
    while (1L << 2 * half < n) half++;
    uint64_t mask = (1ull << half) - 1;
    do {
        for (uint64_t round = 1; round <= 4; round++) {
            uint64_t right = x & mask, key = random_u64(seed, stream, round << 40 | right) & mask;
            x = right << half | ((x >> half) ^ key);
        }
    } while (x >= (uint64_t)n);
    return (long)(random_u64(seed, stream, 0) % (uint64_t)(count - n * T)) + (long)x * T;
}
static void next_batch(Model* m, const Split* train) {  // each rank has its own, so that none overlap
    const long B = m->c.batch, T = m->c.seq, first = m->sequence + rank * B;
    for (long b = 0; b < B; b++)
        tokens_read(train, window_start(m->c.seed, first + b, train->count, T), T, m->inputs + b * T,
                    m->targets + b * T);
    m->sequence += ranks * B;
}

// ---- safetensors ---------------------------------------------------------------------------------------
// github.com/huggingface/safetensors: 8-byte little-endian length of a JSON header, the header, raw tensors.
// The header is not parsed but searched, as archive_write and the safetensors library write it: no spaces, no
// escapes in what is looked for. Nothing in it is trusted.
static const struct { const char* name; int bytes; } DTYPES[] = {  // begins as FORMATS does
    {"F32", 4}, {"BF16", 2}, {"F8_E4M3", 1}, {"I32", 4}};
enum { I32 = 3, NUM_DTYPES };
typedef struct { const char *path, *header; const uint8_t *file, *data; long size; } Archive;
typedef struct { int dtype; char shape[64]; long values; const uint8_t* data; } Found;
static void archive_read(Archive* a, const char* path) {
    const uint8_t* file = a->file = map_file(path, "safetensors file", &a->size);
    const uint64_t length = a->size < 8 ? 0 : read_u32(file) | (uint64_t)read_u32(file + 4) << 32;
    if (length < 2 || length > 100000000 || (long)length > a->size - 8 || file[8] != '{')
        die("%s is not a safetensors file, or its header is cut off", path);
    a->path = copied(path);
    a->header = (char*)memcpy(alloc((double)length + 1), file + 8, length);
    a->data = file + 8 + length;
    a->size -= 8 + (long)length;
}
static const char* archive_at(const Archive* a, const char* name, const char* next) {  // behind "name":next
    const char *entry = form("\"%s\":%s", name, next), *at = strstr(a->header, entry);
    return at ? at + strlen(entry) : NULL;
}
static const char* archive_get(const Archive* a, const char* key) {  // of the metadata, or NULL; as form's
    const char* value = archive_at(a, key, "\"");
    return value ? form("%.*s", (int)strcspn(value, "\""), value) : NULL;
}
static Found archive_tensor(const Archive* a, const char* name) {  // or the program ends
    const char* at = archive_at(a, name, "{\"dtype\":\"");
    char dtype[16];
    long begin, end;
    Found f = {0, "", 0, NULL};
    if (!at) die("%s has no tensor %s", a->path, name);
    if (sscanf(at, "%15[^\"]\",\"shape\":[%63[0-9,]],\"data_offsets\":[%ld,%ld]", dtype, f.shape, &begin,
               &end) != 4)
        die("%s: the header's entry for %s is damaged", a->path, name);
    while (f.dtype < NUM_DTYPES && strcmp(DTYPES[f.dtype].name, dtype) != 0) f.dtype++;
    if (f.dtype == NUM_DTYPES) die("%s: %s is %s, not F32, BF16, F8_E4M3 or I32", a->path, name, dtype);
    if (begin < 0 || end < begin || end > a->size)
        die("%s: %s lies outside the file (is it cut off?)", a->path, name);
    f.values = (end - begin) / DTYPES[f.dtype].bytes;
    f.data = a->data + begin;
    return f;
}
// Of rows x cols or as many in one row, as floats, which are finite; valid until the next.
static const float* archive_find(const Archive* a, const char* name, long rows, long cols) {
    const Found f = archive_tensor(a, name);
    const long n = rows * cols, bytes = DTYPES[f.dtype].bytes;
    float* x = scratch(SCRATCH_TENSOR, n);
    if (strcmp(f.shape, form("%ld,%ld", rows, cols)) != 0 && strcmp(f.shape, form("%ld", n)) != 0)
        die("%s: %s is not %ld x %ld but [%s]", a->path, name, rows, cols, f.shape);
    if (f.values != n || f.dtype == I32) die("%s: %s is not so many floats as it says", a->path, name);
    for (long i = 0; i < n; i++) {
        uint32_t u = 0;
        memcpy(&u, f.data + bytes * i, (size_t)bytes);
        x[i] = f.dtype == E4M3 ? fp8_decode((uint8_t)u, E4M3) : bits_float(f.dtype == BF16 ? u << 16 : u);
        if (!isfinite(x[i])) die("%s holds values that are not finite, in %s", a->path, name);
    }
    return x;
}

// One that is being made: its header so far, and where its tensors' values are; NULL: on the device.
typedef struct { const float* data; int dtype; long values; } Entry;
typedef struct { FILE* header; char* text; size_t length; Entry* entries; int count; long bytes; } Writer;
static void archive_begin(Writer* w, const char* key, const char* value) {
    memset(w, 0, sizeof *w);
    w->header = open_memstream(&w->text, &w->length);
    fprintf(w->header, "{\"__metadata__\":{\"%s\":\"%s\"", key, value);
}
static void archive_meta(Writer* w, const char* key, const char* value) {  // before the first tensor
    char* copy = (char*)shown(value);
    for (char* p = copy; (p = strpbrk(p, "\"\\")); ) *p = '?';  // what would need an escape
    fprintf(w->header, ",\"%s\":\"%s\"", key, copy);
}
static void archive_add(Writer* w, const char* name, int dtype, const void* data, long d0, long d1, long d2) {
    const char *shape = form(d2 ? "%ld,%ld,%ld" : d1 ? "%ld,%ld" : "%ld", d0, d1, d2);  // without those of 0
    const Entry e = {(const float*)data, dtype, d0 * (d1 ? d1 : 1) * (d2 ? d2 : 1)};
    const long begin = w->bytes, end = w->bytes += DTYPES[dtype].bytes * e.values;
    fprintf(w->header, "%s,\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%ld,%ld]}",
            w->count ? "" : "}", name, DTYPES[dtype].name, shape, begin, end);
    w->entries = (Entry*)realloc(w->entries, sizeof(Entry) * (size_t)(w->count + 1));
    if (!w->entries) die("out of memory");
    w->entries[w->count++] = e;
}

// ---- Text ----------------------------------------------------------------------------------------------
// A byte is its own token; what GPT-2's spell is in llm.c's tokenizer file, which data/tokenize.py writes.
typedef struct { int vocab, end; const uint8_t* bytes[65536]; int length[65536]; } Text;  // end: of a text
static void text_open(Text* t, const char* path) {
    long size, at = 1024;
    const uint8_t* p = map_file(path, "tokenizer", &size);
    if (size < 1024 || read_u32(p) != TOKENIZER_MAGIC || read_u32(p + 4) != 2 || read_u32(p + 8) > 65536 ||
        read_u32(p + 12) >= read_u32(p + 8))
        die("%s is not a tokenizer file of llm.c's format, version 2", path);
    t->vocab = (int)read_u32(p + 8);
    t->end = (int)read_u32(p + 12);
    for (int i = 0; i < t->vocab; at += 1 + t->length[i++]) {
        if (at >= size || at + 1 + p[at] > size) die("tokenizer %s is cut off at token %d", path, i);
        t->bytes[i] = p + at + 1;
        t->length[i] = p[at];
    }
    t->length[t->end] = 0;  // it is no text
}

// Prints a token, or its number without a table. The beginning of a character that is cut waits for the rest.
static void text_print(const Text* t, int token) {  // -1 ends the text
    static char held[300];
    static long n;
    if (token >= 0 && !t->bytes[token]) printf(" %d", token);
    for (int i = 0; token >= 0 && i < t->length[token]; i++) held[n++] = (char)t->bytes[token][i];
    const long done = make_safe(held, n, token >= 0);
    fwrite(held, 1, (size_t)done, stdout);
    memmove(held, held + done, (size_t)(n -= done));
}
// The tokens of a prompt: its bytes; or, as there is no tokenizer here, GPT-2's as numbers.
static int text_tokens(const Text* t, const char* s, int* tokens) {  // room for every byte; how many
    int n = 0;
    while (*s && t->vocab == BYTES_VOCAB) tokens[n++] = (uint8_t)*s++;
    for (char* rest; *(s += strspn(s, " ")); s = rest) {
        const long token = strtol(s, &rest, 10);
        if (rest == s || token < 0 || token >= t->vocab)
            die("--prompt wants numbers of tokens here: `python data/tokenize.py --encode TEXT` prints them");
        tokens[n++] = (int)token;
    }
    return n;
}

// ---- Command line --------------------------------------------------------------------------------------
// One table parses, prints the help, and says what a checkpoint stores and resumes from.
typedef enum { HEADING, INT, UINT64, FLOAT, TEXT, FLAG } OptionType;  // FLOAT: -1 is auto
// In a checkpoint: no; yes, but a flag may change it; yes, for a run that goes on; yes, also for --load.
typedef enum { NO, KEPT, OF_RUN, FIXED } Stored;
typedef struct {
    const char *name, *value;  // the default
    const char* choices;       // "a|b": an INT is its place among these; a FLOAT is of these schemes only
    OptionType type;
    Stored stored;
    size_t offset;
    double low, high;
    const char* help;
} Option;
#define AT(field) offsetof(Config, field)
static const Option OPTIONS[] = {
    {NULL, "", 0, HEADING, NO, 0, 0, 0, "Data"},
    {"input", "", 0, TEXT, KEPT, AT(input), 0, 0, "a text file, read as bytes; or token shards: 'GLOB'"},
    {"val", "", 0, TEXT, KEPT, AT(val), 0, 0, "the same, to validate on (default: the last 10 % of --input)"},
    {"tokenizer", "", 0, TEXT, KEPT, AT(tokenizer), 0, 0, "default: gpt2_tokenizer.bin beside the shards"},
    {"hellaswag", "", 0, TEXT, KEPT, AT(hellaswag), 0, 0, "questions to answer where it validates: README"},
    {NULL, "", 0, HEADING, NO, 0, 0, 0, "Model"},
    {"scheme", "us", "us|sp|mup|umup|us-pre|us-mean", INT, FIXED, AT(scheme), 0, 0, "us is µS"},
    {"layers", "4", 0, INT, FIXED, AT(layers), 1, 1000, "blocks"},
    {"width", "128", 0, INT, FIXED, AT(width), 1, 65536, "of the stream"},
    {"heads", "4", 0, INT, FIXED, AT(heads), 1, 1024, "of attention"},
    {"seq", "128", 0, INT, FIXED, AT(seq), 1, 1 << 20, "positions of a sequence"},
    {"activation", "gelu", "gelu|relu|silu", INT, FIXED, AT(activation), 0, 0, "of the mlp"},
    {"tau", "auto", 0, FLOAT, FIXED, AT(tau), 0, 1, "share of a branch in the stream's variance"},
    {NULL, "", 0, HEADING, NO, 0, 0, 0, "Training"},
    {"batch", "8", 0, INT, KEPT, AT(batch), 1, 65536, "sequences at a time (of each GPU)"},
    {"accum", "1", 0, INT, KEPT, AT(accum), 1, 65536, "batches in one step"},
    {"steps", "1500", 0, INT, KEPT, AT(steps), 1, 1e9, "of the optimizer"},
    {"optimizer", "adamw", "lion|adamw", INT, OF_RUN, AT(optimizer), 0, 0, "a small batch likes adamw"},
    {"lr", "auto", 0, FLOAT, KEPT, AT(lr), 1e-12, 1e3, "peak learning rate, at base width"},
    {"warmup", "50", 0, INT, KEPT, AT(warmup), 0, 1e9, "steps of linear warm-up; then a cosine to 10 %"},
    {"decay", "auto", 0, FLOAT, KEPT, AT(decay), 0, 1, "weight decay of a step at peak rate"},
    {"base-width", "256", 0, INT, KEPT, AT(base_width), 1, 65536, "hidden matrices learn at --lr there"},
    {"precision", "fp8", "fp32|bf16|fp8", INT, KEPT, AT(precision), 0, 0, "of the matmuls' operands"},
    {"recompute", "", 0, FLAG, NO, AT(recompute), 0, 1, "less memory for more time (--resume forgets it)"},
    {"seed", "1", 0, UINT64, KEPT, AT(seed), 0, 0x1p53 - 1, "of weights, batches and samples"},
    {NULL, "", 0, HEADING, NO, 0, 0, 0, "Experiments: multipliers of some schemes, of rates, of gradients"},
    {"alpha-res", "1", "umup", FLOAT, KEPT, AT(alpha_res), 1e-6, 1e6, "of branches"},
    {"alpha-res-attn-ratio", "1", "umup", FLOAT, KEPT, AT(alpha_res_attn_ratio), 1e-6, 1e6, "their ratio"},
    {"alpha-attn", "1", "mup|umup", FLOAT, KEPT, AT(alpha_attn), 1e-6, 1e6, "of attention's scores"},
    {"alpha-act", "1", "umup", FLOAT, KEPT, AT(alpha_act), 1e-6, 1e6, "of the activation's input"},
    {"alpha-out", "1", "mup|umup", FLOAT, KEPT, AT(alpha_out), 1e-6, 1e6, "of the logits"},
    {"base-layers", "4", "mup", FLOAT, KEPT, AT(base_layers), 1, 1000, "depth of the base shape"},
    {"emb-lr", "1", "mup", FLOAT, KEPT, AT(emb_lr), 0, 1e6, "rate of the embeddings"},
    {"head-lr", "1", 0, FLOAT, KEPT, AT(head_lr), 0, 1e6, "rate of the head"},
    {"norm-lr", "1", 0, FLOAT, KEPT, AT(norm_lr), 0, 1e6, "rate of LayerNorm's parameters (0: frozen)"},
    {"grad-scale", "auto", 0, FLOAT, KEPT, AT(grad_scale), 1e-9, 1e12, "S (1: FP8 loses most gradients)"},
    {NULL, "", 0, HEADING, NO, 0, 0, 0, "Reports, every N steps (0: never)"},
    {"eval-every", "100", 0, INT, KEPT, AT(eval_every), 0, 1e9, "validation loss"},
    {"eval-tokens", "65536", 0, INT, KEPT, AT(eval_tokens), 0, 1e9, "to validate on, spread evenly (0: all)"},
    {"stats-every", "0", 0, INT, KEPT, AT(stats_every), 0, 1e9, "unit-scale statistics of every tensor"},
    {NULL, "", 0, HEADING, NO, 0, 0, 0, "Files"},
    {"out", "", 0, TEXT, NO, AT(out), 0, 0, "directory for logs and checkpoint (default: nothing is saved)"},
    {"save-every", "0", 0, INT, KEPT, AT(save_every), 0, 1e9, "keep a copy of the checkpoint every N steps"},
    {"resume", "", 0, FLAG, NO, AT(resume), 0, 1, "go on from the checkpoint in --out, if there is one"},
    {"new-data", "", 0, FLAG, NO, AT(new_data), 0, 1, "with --resume: even if the data is not what it was"},
    {NULL, "", 0, HEADING, NO, 0, 0, 0, "A trained model"},
    {"load", "", 0, TEXT, NO, AT(load), 0, 0, "begin with a checkpoint's or an exported model's parameters"},
    {"evaluate", "", 0, FLAG, NO, AT(evaluate), 0, 1, "validate on all of --val, or --eval-tokens, and stop"},
    {"export", "", 0, TEXT, NO, AT(exported), 0, 0, "write the model to this file as matmuls read it: FP8"},
    {"dump", "", 0, TEXT, NO, AT(dump), 0, 0, "write every tensor of the first step to this file, and stop"},
    {"generate", "", 0, FLAG, NO, AT(generate), 0, 1, "write text"},
    {"prompt", "", 0, TEXT, NO, AT(prompt), 0, 0, "how the text begins (numbers of GPT-2's tokens: README)"},
    {"tokens", "256", 0, INT, NO, AT(tokens), 1, 1e9, "to write"},
    {"temperature", "0.8", 0, FLOAT, NO, AT(temperature), 0, 100, "0: always the likeliest token"},
    {"top-k", "0", 0, INT, NO, AT(top_k), 0, 65536, "choose among the likeliest, a few (0: among all)"},
    {"help", "", 0, FLAG, NO, AT(help), 0, 1, "this page"},
};
static const Option* const OPTIONS_END = OPTIONS + sizeof OPTIONS / sizeof *OPTIONS;
static const char* choice(const char* choices, int i) {  // the i-th of "a|b|c", or ""
    for (; i > 0; i--) choices += strcspn(choices, "|") + !!strchr(choices, '|');
    return form("%.*s", (int)strcspn(choices, "|"), choices);
}
static int find_choice(const char* choices, const char* value) {  // its number, or -1
    const char* name;
    for (int i = 0; *(name = choice(choices, i)); i++) if (strcmp(name, value) == 0) return i;
    return -1;
}
static void option_set(Config* c, const Option* o, const char* value, const char* where) {
    char *end = NULL, *field = (char*)c + o->offset;
    if (o->type == TEXT) *(const char**)field = value;
    else if (o->type == INT && o->choices) {
        *(int*)field = find_choice(o->choices, value);
        if (*(int*)field < 0) die("%s--%s is one of %s, not '%s'", where, o->name, o->choices, value);
    } else if (strcmp(value, "auto") == 0 && strcmp(o->value, "auto") == 0) *(float*)field = -1;
    else {
        const double x = strtod(value, &end);
        if (end == value || *end || !(x >= o->low && x <= o->high) || (o->type != FLOAT && x != floor(x)))
            die("%s--%s is a %s from %g to %.9g, not '%s'", where, o->name,
                o->type == FLOAT ? "number" : "whole number", o->low, o->high, value);
        if (o->type == FLOAT) *(float*)field = (float)x;
        else if (o->type == UINT64) *(uint64_t*)field = (uint64_t)x;
        else *(int*)field = (int)x;
    }
}
static const char* option_get(const Config* c, const Option* o) {  // option_set reads back the same bits
    const char* field = (const char*)c + o->offset;
    if (o->type == INT && o->choices) return choice(o->choices, *(const int*)field);
    if (o->type == TEXT) return *(char* const*)field;
    if (o->type == UINT64) return form("%llu", (unsigned long long)*(const uint64_t*)field);
    if (o->type != FLOAT) return form("%d", *(const int*)field);
    const float x = *(const float*)field;
    const char* brief = x < 0 ? "auto" : form("%g", (double)x);  // short where that reads back the same
    return x < 0 || strtof(brief, NULL) == x ? brief : form("%.9g", (double)x);
}

static void print_help(void) {
    printf("train_us: trains a GPT-like model in FP8 by unit scaling (µS), and writes text with it\n"
           "./train_us --input FILE [options]      ./train_us --load FILE --generate [--prompt TEXT]\n");
    for (const Option* o = OPTIONS; o < OPTIONS_END; o++) {
        const char* kind = o->type == TEXT ? "TEXT" : o->type == FLAG ? "" : o->type == FLOAT ? "X" : "N";
        const char* value = o->type == INT && o->choices ? o->choices : kind;
        const char* flag = o->name ? form("  %-30s ", form("--%s %s", o->name, value)) : "";
        const char* only = o->type == FLOAT && o->choices ? form("%s: ", o->choices) : "";
        printf("%s%s%s%s\n", flag, only, o->help, *o->value ? form(" [%s]", o->value) : "");
    }
    printf("auto: --tau 0.4 up to 4 layers, then 0.4 (4/layers)^0.43; --lr, --decay: see README\n");
}

// Fills c from the defaults, then from a checkpoint's metadata if there is one, then from the flags given.
static void config_parse(Config* c, int argc, char** argv, const Archive* from, int resumes) {
    int all = 1;  // of --val, if --eval-tokens does not say less
    memset(c, 0, sizeof *c);
    for (const Option* o = OPTIONS; o < OPTIONS_END; o++) {
        if (!o->name || o->type == FLAG) continue;
        option_set(c, o, o->value, "");
        const char* value = from && o->stored ? archive_get(from, o->name) : NULL;
        if (value && o->type == TEXT) value = copied(value);
        if (value) option_set(c, o, value, form("checkpoint %s: ", from->path));
        else if (from && o->stored && o->type != TEXT) die("%s does not say its --%s", from->path, o->name);
    }
    const char* val = c->val;
    for (int i = 1; i < argc; i++) {
        const Option* o = OPTIONS;
        while (o < OPTIONS_END && (!o->name || strcmp(form("--%s", o->name), argv[i]) != 0)) o++;
        if (o == OPTIONS_END) die("there is no option %s (see --help; quote patterns of names)", argv[i]);
        const char *was = option_get(c, o), *value = o->type == FLAG ? "1" : argv[++i];
        if (i == argc || (o->type == TEXT && !o->stored && !*value)) die("--%s wants a value", o->name);
        option_set(c, o, from && (resumes || o->stored == FIXED) && !strcmp(value, "auto") ? was : value, "");
        if (!resumes && o->offset == AT(input) && c->val == val) c->val = "";  // another text brings its own
        all &= o->offset != AT(eval_tokens);
        if (from && o->stored >= (resumes ? OF_RUN : FIXED) && strcmp(was, option_get(c, o)) != 0)
            die("--%s %s does not fit checkpoint %s, which has %s", o->name, value, from->path, was);
    }
    if (c->evaluate && all) c->eval_tokens = 0;
}
static int option_applies(const Config* c, const Option* o) {
    return o->type != FLOAT || !o->choices || find_choice(o->choices, SCHEMES[c->scheme].name) >= 0;
}
// What auto stands for, once the data has told the vocabulary; and do the settings fit each other?
static void config_defaults(Config* c) {
    const Scheme *s = &SCHEMES[c->scheme], *rated = s->decay > 0 ? s : SCHEMES;
    if (c->tau < 0) c->tau = default_tau(c->layers);
    if (c->lr < 0) c->lr = (c->vocab == BYTES_VOCAB ? rated->lr_bytes : rated->lr_tokens)[c->optimizer];
    if (c->decay < 0) c->decay = rated->decay;
    if (c->width % c->heads) die("--width %d is not a multiple of --heads %d", c->width, c->heads);
    for (const Option* o = OPTIONS; o < OPTIONS_END; o++)
        if (!option_applies(c, o) && strcmp(option_get(c, o), o->value) != 0)
            die("--%s is of --scheme %s, not of %s", o->name, o->choices, s->name);
}

// ---- Device --------------------------------------------------------------------------------------------
// Does the arithmetic of a run. train_us.cu has another, which keeps the model: tensors come and go singly.
typedef enum { PARAMS, FIRST_MOMENT, SECOND_MOMENT } Lasting;  // what a checkpoint has of each tensor
typedef struct {
    const char* name;
    int on_host;                                              // the model is in the host's memory
    void (*open)(Model* m);                                   // takes memory; the moments are 0
    void (*close)(Model* m);                                  // gives back what open took
    void (*describe)(const Model* m);                         // a line for the header: what it is
    StepResult (*step)(Model* m, const Split* s, double lr);  // an optimizer step; none if not all is finite
    const float* (*losses)(Model* m);                         // of m->inputs and m->targets: (rows)
    double (*trace)(Model* m);                                // their mean; all buffers, grads too, filled in
    const float* (*next)(Model* m, long t0, long length);     // logits at its end; rows before t0 are known
    void (*fetch)(Model* m);                                  // all arrays that the host has are brought up
    const float* (*get)(Model* m, Lasting what, const Tensor* t);              // valid until the next get
    void (*put)(Model* m, Lasting what, const Tensor* t, const void* values);  // floats, however aligned
    const char* (*utilisation)(const Model* m, double rate);  // of the device, at so many tokens/s: " | ..."
    double (*sum)(double x);                                  // over all ranks, which all have to ask
} Device;
static const float* cpu_losses(Model* m) { return model_loss(m, 0), m->buffers[A_LOSSES]; }
static double cpu_trace(Model* m) {
    double loss = model_loss(m, 1);
    model_backward(m, 0);
    model_logits(m, 0, m->rows);  // again, as their gradient took their place
    return loss;
}
static const float* cpu_next(Model* m, long t0, long length) {
    model_forward(m, 1, m->c.recompute ? 0 : t0, length);  // with one block's buffers nothing is known
    model_logits(m, length - 1, 1);
    return buffer(m, 0, A_LOGITS, length - 1);
}
// Numbers below 2^-126 cost an x86 a hundred times what others do; a softmax that saturates makes many.
static void cpu_open(Model* m) {
#ifdef __SSE2__
    #pragma omp parallel
    _mm_setcsr(_mm_getcsr() | 0x8040);  // they are 0, as results and as operands
#endif
    model_alloc_buffers(m);
}
static void cpu_describe(const Model* m) {
    const char* how = multiplies_pairs() ? "; BF16 and FP8 by " : *PAIRS_BY ? "; the kernel refuses " : "";
    (void)m;
    printf("matmul: vectors of %d floats%s%s\n", LANES, how, PAIRS_BY);
}
static void cpu_nothing(Model* m) { (void)m; }
static double cpu_sum(double x) { return x; }
static const float* cpu_get(Model* m, Lasting what, const Tensor* t) {
    return (what == PARAMS ? m->params : what == FIRST_MOMENT ? m->m : m->v) + t->offset;
}
static void cpu_put(Model* m, Lasting what, const Tensor* t, const void* values) {
    memcpy((float*)cpu_get(m, what, t), values, sizeof(float) * (size_t)(t->rows * t->cols));
}
__attribute__((unused)) static const Device CPU = {
    "CPU", 1, cpu_open, cpu_nothing, cpu_describe, cpu_step, cpu_losses, cpu_trace, cpu_next, cpu_nothing,
    cpu_get, cpu_put, NULL, cpu_sum};
static void model_init(Model* m, const Device* device) {  // as it begins, once the device is open
    for (const Tensor* t = m->tensors; t < m->tensors + m->num_tensors; t++) {
        float* w = scratch(SCRATCH_TENSOR, t->rows * t->cols);
        tensor_init(w, m, t);
        device->put(m, PARAMS, t, w);
    }
}

// ---- Checkpoints ---------------------------------------------------------------------------------------
static void archive_config(Writer* w, const Model* m) {
    const char* const keys[] = {"step", "sequence", "grad_scale", "data", "ranks"};
    const double step = (double)m->step, sequence = (double)m->sequence, data = (double)m->c.data;
    const double numbers[] = {step, sequence, m->grad_scale, data, (double)ranks};
    archive_begin(w, "vocab", form("%d", m->c.vocab));
    for (const Option* o = OPTIONS; o < OPTIONS_END; o++)
        if (o->stored) archive_meta(w, o->name, option_get(&m->c, o));
    for (int i = 0; i < 5; i++) archive_meta(w, keys[i], form("%.17g", numbers[i]));
}
// In FP32, or as_read: in the format that a tensor's operation reads.
static void archive_tensors(Writer* w, const Model* m, const char* prefix, const float* data, int as_read) {
    for (const Tensor* t = m->tensors; t < m->tensors + m->num_tensors; t++) {
        const int vector = t->use >= GAIN;
        archive_add(w, form("%s%s", prefix, t->name), as_read ? t->precision.weight : FP32,
                    data ? data + t->offset : NULL, vector ? t->cols : t->rows, vector ? 0 : t->cols, 0);
    }
}
static const char* checkpoint_path(const char* dir) { return form("%s/checkpoint.safetensors", dir); }
static int lasting(const Model* m) { return !m->training ? 1 : m->c.optimizer == ADAMW ? 3 : 2; }
static const char* const PREFIXES[2][3] = {{"", "lion.m.", ""}, {"", "adam.m.", "adam.v."}};
static const void* encoded(const float* x, long n, int dtype) {  // in BF16, or E4M3
    const long bytes = DTYPES[dtype].bytes;
    uint8_t* to = (uint8_t*)scratch(SCRATCH_P, n * bytes / 4 + 1);
    for (long i = 0; i < n; i++) {
        const float v = round_bf16(x[i]);
        const uint32_t u = dtype == BF16 ? float_bits(v) >> 16 : fp8_encode(v, E4M3);
        memcpy(to + bytes * i, &u, (size_t)bytes);
    }
    return to;
}
// Into a temporary file, synced, then renamed: a crash or a full disk never costs the file that was there.
// Returns 0, or errno where it cannot be written.
static int archive_write(Writer* w, const char* path, Model* m, const Device* device) {
    char *temporary = form("%s.tmp", path), *slash;
    FILE* f = rank ? NULL : fopen(temporary, "wb");  // the first rank writes, all have to get
    int error = f || rank ? 0 : errno;
    fputc('}', w->header);
    while ((ftell(w->header) + 8) % 64) fputc(' ', w->header);  // the data begins on a cache line
    fclose(w->header);
    if (f) fwrite(&w->length, sizeof w->length, 1, f), fwrite(w->text, 1, w->length, f);
    for (int i = 0; i < w->count; i++) {
        const Entry* e = &w->entries[i];
        const void* data = e->data;
        if (!data) data = device->get(m, (Lasting)(i / m->num_tensors), &m->tensors[i % m->num_tensors]);
        if (!f || ferror(f)) continue;
        if (e->dtype == BF16 || e->dtype == E4M3) data = encoded((const float*)data, e->values, e->dtype);
        const size_t n = (size_t)e->values;
        if (fwrite(data, (size_t)DTYPES[e->dtype].bytes, n, f) < n) error = errno;
    }
    if (f && !error && (fflush(f) != 0 || ferror(f) || fsync(fileno(f)) != 0)) error = errno ? errno : EIO;
    if (f && fclose(f) != 0 && !error) error = errno;
    if (f && !error && rename(temporary, path) != 0) error = errno;
    if (f && error) unlink(temporary);
    if ((slash = strrchr(temporary, '/'))) *slash = 0;
    int dir = open(slash ? temporary : ".", O_RDONLY);  // the new name itself is kept in the directory
    if (dir >= 0) fsync(dir), close(dir);
    free(w->text), free(w->entries);
    return error;
}
// A checkpoint of training, or else a model for inference.
static int checkpoint_save(Model* m, const Device* device, const char* path) {
    Writer w;
    archive_config(&w, m);
    for (int i = PARAMS; i < lasting(m); i++)
        archive_tensors(&w, m, PREFIXES[m->c.optimizer][i], NULL, !m->training);
    return archive_write(&w, path, m, device);
}

static long checkpoint_number(const Archive* a, const char* key, double high) {
    const char* value = archive_get(a, key);
    double x;
    char rest;
    if (!value || sscanf(value, "%lf%c", &x, &rest) != 1 || !(x >= 0 && x <= high))
        die("%s has no good %s in its metadata", a->path, key);
    return (long)x;
}
// The first `parts` of what lasts: to go on all of it, or else only the parameters.
static void checkpoint_load(Model* m, const Device* device, const Archive* a, int parts) {
    for (int i = PARAMS; i < parts; i++)
        for (const Tensor* t = m->tensors; t < m->tensors + m->num_tensors; t++) {
            const char* name = form("%s%s", PREFIXES[m->c.optimizer][i], t->name);
            device->put(m, (Lasting)i, t, archive_find(a, name, t->rows, t->cols));
        }
    m->step = checkpoint_number(a, "step", 1e15);
    m->sequence = checkpoint_number(a, "sequence", 1e15);
}
static int every(int n, long step) { return n && step % n == 0; }

// ---- Memory --------------------------------------------------------------------------------------------
static double file_number(const char* path, const char* key) {  // infinite where there is none ("max")
    char line[256];
    double number = INFINITY;
    FILE* f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, key, strlen(key)) == 0 && sscanf(line + strlen(key), "%lf", &number) >= 0) break;
    if (f) fclose(f);
    return number;
}
static double memory_available(void) {  // bytes that the machine and a container leave
    const double most = file_number("/sys/fs/cgroup/memory.max", "");
    const double cache = file_number("/sys/fs/cgroup/memory.stat", "inactive_file ");  // given back on demand
    const double left = most - (file_number("/sys/fs/cgroup/memory.current", "") - cache);  // NaN: no group
    return fmin(1024 * file_number("/proc/meminfo", "MemAvailable:"), left);
}
// Says how much of the host's memory a model takes before any is taken, and ends the program if that is not
// there. on_host: all of it, with one tensor apart while it is made; or else that one alone.
static void check_memory(const Model* m, int on_host) {
    const double available = memory_available();
    const double params = on_host ? 4.0 * (double)m->num_params * (lasting(m) + m->training) : 0;
    const double one = 4.0 * m->c.width * fmax(fmax((double)m->vp, m->c.seq), 4.0 * m->c.width);
    double kept = 0;
    for (int k = 0; k < BUFFERS && on_host; k++) kept += 4 * buffer_size(m, k);
    if (m->training && on_host)
        printf("memory: %.0f MB parameters, gradients and optimizer state, %.0f MB activations\n",
               params * 1e-6, kept * 1e-6);
    else if (m->training) printf("memory: %.0f MB on the host\n", one * 1e-6);
    if (!(params + kept + one <= available))
        die("%.1f GB of memory wanted, %.1f are available: lower --batch, --seq, --width or --layers",
            (params + kept + one) * 1e-9, available * 1e-9);
}

static int dump(Model* m, const Device* device, const Split* train) {  // every tensor, for dev/reference.py
    Writer w;
    const long B = m->c.batch, T = m->c.seq;
    next_batch(m, train);
    device->fetch(m);
    const float loss = (float)device->trace(m);
    archive_config(&w, m);
    archive_meta(&w, "device", device->name);
    archive_add(&w, "tokens", I32, m->inputs, B, T, 0);
    archive_add(&w, "targets", I32, m->targets, B, T, 0);
    archive_add(&w, "loss", FP32, &loss, 1, 0, 0);
    archive_tensors(&w, m, "param.", m->params, 0);
    archive_tensors(&w, m, "grad.", m->grads, 0);
    for (int k = 0; k <= A_LOGITS; k++) {
        const Dim width = BUFFER_KINDS[k].width;
        if (width == DIM_1 || buffer_size(m, k) == 0) continue;
        for (int l = 0; l < (k < BLOCK_BUFFERS ? m->c.layers : 1); l++) {
            const char* block = k < BLOCK_BUFFERS ? form("h.%d.", l) : "";
            const char* name = form("act.%s%s", block, BUFFER_KINDS[k].name);
            archive_add(&w, name, FP32, buffer(m, l, k, 0), B, T, dim_of(&m->c, width));
        }
    }
    return archive_write(&w, m->c.dump, m, device);
}

// ---- Signals -------------------------------------------------------------------------------------------
// A signal lets the step end, and the run is saved. `timeout`, terminals and shutdowns send several; only a
// second Ctrl-C, a second later, ends the program at once, and not while it saves.
static volatile sig_atomic_t stop_signal, saving;
static double stopped_at;
static void on_signal(int sig) {
    if (!stop_signal) stop_signal = sig, stopped_at = seconds();
    else if (sig == SIGINT && !saving && seconds() - stopped_at > 1) signal(sig, SIG_DFL), raise(sig);
}

// ---- Writing text --------------------------------------------------------------------------------------
// One of the k likeliest tokens, equals in order; k small, or all: then they need no order.
static int sample_token(const float* logits, const Config* c, long position) {
    const int V = c->vocab, k = c->temperature == 0.0f ? 1 : c->top_k ? (int)min_l(c->top_k, V) : V;
    int n = 0, *list = (int*)scratch(SCRATCH_P, 2L * V);
    float max = logits[0], *share = (float*)list + V;
    double sum = 0, u = random_uniform(c->seed, stream_of("sample"), (uint64_t)position);
    for (int v = 0; v < V; v++) {
        if (n == k && !(logits[v] > logits[list[k - 1]])) continue;
        int i = n < k ? n++ : k - 1;
        for (; k < V && i > 0 && logits[v] > logits[list[i - 1]]; i--) list[i] = list[i - 1];
        list[i] = v;
        max = fmaxf(max, logits[v]);
    }
    for (int i = 0; i < k; i++)  // from logits to probabilities, up to their sum
        sum += share[i] = expf((logits[list[i]] - max) / fmaxf(c->temperature, 1e-6f));
    double rest = u * sum;
    for (int i = 0; i < k - 1; i++) if ((rest -= share[i]) < 0) return list[i];
    return list[k - 1];
}

static void generate(Model* m, const Device* device, const Text* text, int count) {
    const long T = m->c.seq;
    long length = 0, known = 0;  // of the window: its tokens, and those whose keys and values are kept
    int *window = m->inputs, *start = (int*)scratch(SCRATCH_TENSOR, (long)strlen(m->c.prompt) + 1);
    int n = text_tokens(text, m->c.prompt, start);
    if (n == 0) start[n++] = text->end;
    for (int i = 0; i < n; i++) {
        if (*m->c.prompt) text_print(text, start[i]);
        if (i >= n - T) window[length++] = start[i];  // the end of a prompt that is too long
    }
    for (int i = 0; i < count && !stop_signal; i++) {
        const int token = sample_token(device->next(m, known, length), &m->c, i);
        known = length < T ? length : 0;  // when the window moves on, nothing
        if (token == text->end && text->vocab != BYTES_VOCAB) break;
        text_print(text, token);
        fflush(stdout);
        if (length == T) {  // a full window goes on from its second half
            memmove(window, window + T - T / 2, sizeof(int) * (size_t)(T / 2));
            length = T / 2;
        }
        window[length++] = token;
    }
    text_print(text, -1);
    printf("\n");
}

// ---- Training ------------------------------------------------------------------------------------------
static const char* unit_of(const Model* m) { return m->c.vocab == BYTES_VOCAB ? "bytes" : "tokens"; }
static void print_header(const Model* m, const Device* device, const Split* train, const Split* val) {
    int column = printf("us.c on %s, threads %d,", device->name, max_threads());
    for (const Option* o = OPTIONS; o < OPTIONS_END; o++) {
        if (!o->name || !o->stored || o->type == TEXT || !option_applies(&m->c, o)) continue;
        if (column > 85) column = printf("\n ") - 1;
        column += printf(" %s %s", o->name, option_get(&m->c, o));
    }
    printf("\n  tensor          shape         input W grad    multiplier  learning rate  decays\n");
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor* t = &m->tensors[i];
        if (i >= BLOCK_TENSORS && i < m->c.layers * BLOCK_TENSORS) continue;  // the blocks are alike
        const char* name = i < BLOCK_TENSORS ? form("h.*.%s", TENSORS[i].name) : t->name;
        const char* rows = t->use >= GAIN ? "" : form("%ld x ", t->rows);
        const char *x = FORMATS[t->precision.input].name, *w = FORMATS[t->precision.weight].name;
        const char* all = is_hidden(t) ? form("%s %s %s", x, w, FORMATS[t->precision.gradient].name) : w;
        printf("  %-14s  %-13s %-15s %-11.4g %-14.4g %s\n", name, form("%s%ld", rows, t->cols), all,
               (double)t->alpha, (double)(m->c.lr * t->lr_factor), decays(t) ? "yes" : "no");
    }
    if (!*m->c.out && !*m->c.dump) printf("nothing will be saved: that takes --out DIR\n");
    const char* unit = unit_of(m);
    printf("input: %s, %ld %s\n", shown(m->c.input), train->tokens->count, unit);
    if (val->tokens != train->tokens) printf("val: %s, %ld %s\n", shown(m->c.val), val->tokens->count, unit);
    printf("%ld %s to train on, %ld to validate on; %ld tokens a step\n%.2f M parameters; ", train->count,
           unit, val->count, m->rows * m->c.accum * ranks, (double)m->num_params * 1e-6);
}

// One screen for four blocks: for each linear its three operands; for each block the stream after it.
static void print_stats(const Model* m, FILE* csv) {
    static const char* const operands[] = {"input", "weight", "grad"};
    const char* columns = "|   rms   max flush%  sat% ";
    printf("step %-12ld| input                   | weight                  | output gradient\n"
           "tensor           %s%s%s\n", m->step, columns, columns, columns);
    for (int i = 0; i < 2 + 5 * m->c.layers; i++) {
        const StatRow* row = &m->stats[i];
        const int stream = i % 5 == 0 && i < 1 + 5 * m->c.layers;
        printf("%-11s %-5s", row->name, FORMATS[row->stat[0].format].name);
        for (int k = 0; k < (stream ? 1 : 3); k++) {
            const Stat* s = &row->stat[k];
            printf("| %5.3g %5.3g %6.2f %5.2f ", s->rms, s->max, 100 * s->flushed, 100 * s->saturated);
            const char* operand = stream ? "stream" : operands[k];
            if (csv) fprintf(csv, "%ld,%s,%s,%s,%.6g,%.6g,%.6g,%.6g\n", m->step, row->name, operand,
                             FORMATS[s->format].name, s->rms, s->max, s->flushed, s->saturated);
        }
        printf("\n");
    }
}

static FILE* open_log(const Model* m, const char* name, const char* header) {
    const char *path = form("%s/%s", m->c.out, name), *temporary = form("%s.tmp", path);
    char line[1024];
    FILE *old = m->step > 0 ? fopen(path, "r") : NULL, *f = fopen(temporary, "w");
    if (!f) die("cannot write %s: %s", temporary, strerror(errno));
    fprintf(f, "%s\n", header);
    while (old && fgets(line, sizeof line, old))  // rows up to this step, without one that a crash cut off
        if (strchr(line, '\n') && atol(line) > 0 && atol(line) <= m->step) fputs(line, f);
    if (old) fclose(old);
    if (fflush(f) != 0 || rename(temporary, path) != 0) die("cannot write %s: %s", path, strerror(errno));
    return f;
}

// ---- Validation ----------------------------------------------------------------------------------------
static int on_terminal(void) { return ranks == 1 && isatty(STDOUT_FILENO); }  // mpirun's is no user's
static void progress(const char* what, long done, long all, double begin) {
    static double last;
    const double now = seconds(), left = (now - begin) * (double)(all - done) / (double)done;
    const int terminal = on_terminal();
    if (now - fmax(last, begin) < (terminal ? 0.5 : 30)) return;
    printf("%s: %ld %%, %.0f s left%s", what, 100 * done / all, left, terminal ? "\033[K\r" : "\n");
    fflush(stdout);
    last = now;
}
// A fixed set of windows, spread evenly over the split: the same for any batch and device. Returns how many.
static long val_windows(const Config* c, const Split* val) {
    const long all = (val->count - 1) / c->seq;
    return c->eval_tokens ? min_l(all, div_up(c->eval_tokens, c->seq)) : all;
}
static void val_read(const Model* m, const Split* val, long first, long n) {
    const long T = m->c.seq, last = val_windows(&m->c, val) - 1;
    for (long i = 0; i < n; i++) {
        const double place = (double)(first + i) / (double)(last > 0 ? last : 1);
        const long start = (long)((double)(val->count - T - 1) * place);
        tokens_read(val, start, T, m->inputs + i * T, m->targets + i * T);
    }
}
static int stopping(const Model* m) { return stop_signal && m->step < m->c.steps; }
static int told_to_stop(const Device* device) {  // a signal to any rank is one to all
    const int told = (int)device->sum(stop_signal);
    if (told && !stop_signal) stop_signal = told;
    return told;
}
static double validate(const Model* m, const Device* device, const Split* val) {
    const long windows = val_windows(&m->c, val);
    Model part = *m;  // in the same buffers, a batch that is smaller at the end
    double sum = 0, begin = seconds();
    for (long i = rank * (long)m->c.batch; i < windows && !stopping(m); i += ranks * (long)m->c.batch) {
        part.c.batch = (int)min_l(m->c.batch, windows - i);
        part.rows = (long)part.c.batch * m->c.seq;
        val_read(m, val, i, part.c.batch);
        const float* losses = device->losses(&part);
        for (long n = 0; n < part.rows; n++) sum += losses[n];
        if (m->c.evaluate) progress("validation", i + part.c.batch, windows, begin);
    }
    return device->sum(stopping(m) ? NAN : sum) / (double)(windows * m->c.seq);
}

// HellaSwag (Zellers et al. 2019): which of four endings follows? llm.c's file: int32[256] (magic, version,
// count), then uint16s, of each question: 65535, its bytes, its number, which ending is right, 4; then the
// context and the endings, each its length and its tokens.
typedef struct { const uint16_t* words; long count, longest; } Questions;  // longest: context and ending
static void questions_open(Questions* q, const char* path) {
    long bytes, at = 0;
    const uint8_t* file = map_file(path, "questions", &bytes);
    if (bytes < 1024 || read_u32(file) != QUESTIONS_MAGIC || read_u32(file + 4) != 1)
        die("%s is not a file of questions: `python data/hellaswag.py` writes one", path);
    const uint16_t* w = q->words = (const uint16_t*)(file + 1024);
    for (const long end = (bytes - 1024) / 2; at < end; q->count++) {
        const long begin = at;
        int good = end - begin > 5 && w[begin] == 65535 && w[begin + 3] < 4 && w[begin + 4] == 4;
        at += 5;
        for (int part = 0; part < 5 && good; part++) {
            const long length = at < end ? w[at] : 0;
            good = length > 0 && at + length < end;
            for (long i = 1; i <= length && good; i++) good = w[at + i] < GPT2_VOCAB;
            if (part) q->longest = max_l(q->longest, w[begin + 5] + length);
            at += 1 + length;
        }
        if (!good || w[begin + 1] != 2 * (at - begin)) die("%s is damaged in question %ld", path, q->count);
    }
    if (q->count != (long)read_u32(file + 8) || q->count == 0 || bytes % 2)
        die("%s is damaged: %ld questions, %u by its header", path, q->count, read_u32(file + 8));
}
// The share of questions whose right ending has the lowest mean loss of the four, as llm.c has it.
static double hellaswag(const Model* m, const Device* device, const Questions* q) {
    const long T = min_l(m->c.seq, div_up(q->longest, 64) * 64);
    const uint16_t* w = q->words;
    const double begin = seconds();
    long right = 0;
    Model part = *m;
    part.c.seq = (int)T, part.c.batch = 4, part.rows = 4 * T;
    for (long i = 0; i < q->count && !stopping(m); i++, w += w[1] / 2) {
        if (i % ranks != rank) continue;
        const long before = w[5];
        const uint16_t *context = w + 6, *ending = context + before;
        long from[4], to[4], choice = 0;
        double least = INFINITY;
        for (int k = 0; k < 4; ending += 1 + *ending, k++) {  // the last T + 1 tokens of both
            const long all = before + *ending, first = max_l(0, all - T - 1);
            from[k] = max_l(0, before - 1 - first), to[k] = all - 1 - first;
            for (long t = 0; t <= T; t++) {
                const long j = first + t;
                const int token = j < before ? context[j] : j < all ? ending[1 + j - before] : 0;
                if (t < T) part.inputs[k * T + t] = token;
                if (t > 0) part.targets[k * T + t - 1] = token;
            }
        }
        const float* losses = device->losses(&part);
        for (int k = 0; k < 4; k++) {
            double mean = 0;
            for (long t = from[k]; t < to[k]; t++) mean += losses[k * T + t] / (double)(to[k] - from[k]);
            if (mean < least) least = mean, choice = k;
        }
        right += choice == w[3];
        if (m->c.evaluate) progress("questions", i + 1, q->count, begin);
    }
    return device->sum(stopping(m) ? NAN : (double)right) / (double)q->count;
}

static void evaluate(const Model* m, const Device* device, const Split* val, const Questions* q,
                     const Text* text) {
    const long T = m->c.seq, windows = val_windows(&m->c, val), tokens = windows * T;
    double bytes = 0, loss = validate(m, device, val);
    for (long i = 0; i < windows; i++) {
        val_read(m, val, i, 1);
        for (long t = 0; t < T; t++) bytes += text->length[m->targets[t]];
    }
    printf("validation loss %.4f", loss);
    if (bytes > 0) printf(", %.4f bits per byte", loss * (double)tokens / bytes / log(2));
    const char* path = *m->c.val ? m->c.val : m->c.input;
    printf(", perplexity %.2f, of %ld %s of %s\n", exp(loss), tokens, unit_of(m), shown(path));
    if (!q->count) return;
    const double share = hellaswag(m, device, q);
    printf("hellaswag: %.0f of %ld right, %.4f\n", share * (double)q->count, q->count, share);
}

// ---- The run -------------------------------------------------------------------------------------------
// The run under way. Whatever ends it (its last step, a signal, an error) calls save_at_end.
static struct {
    Model* m;
    const Device* device;
    const char* path;  // of the checkpoint
    long first, sequence, saved;
    double saved_at;
} current;
static double save_seconds = 600;  // what a run may lose by a power cut
static int save(void) {
    Model* m = current.m;
    saving = 1;
    current.device->fetch(m);
    int error = (int)current.device->sum(checkpoint_save(m, current.device, current.path));
    if (!error) current.saved = m->step;
    if (!error && !rank && every(m->c.save_every, m->step)) {  // a second name: the next one takes the first
        const char *to = form("%s/step_%08ld.safetensors", m->c.out, m->step), *new_one = form("%s.new", to);
        unlink(new_one);
        error = link(current.path, new_one) || rename(new_one, to) ? errno : 0;
    }
    if (error && !rank)
        fprintf(stderr, "%s: cannot write %s: %s (what was written before is untouched)\n", program,
                shown(current.path), strerror(error));
    current.saved_at = seconds();
    saving = 0;
    return !error;
}
static void save_at_end(void) {
    last_words = NULL;
    current.m->sequence = current.sequence;  // an error may come in the middle of reading a batch
    if (current.m->step > current.saved && !save()) exit(1);
    if (current.saved > current.first) printf("saved %s, step %ld\n", shown(current.path), current.saved);
}

static void train(Model* m, const Device* device, const Split* train, const Split* val, const Questions* q,
                  const Text* text) {
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE, SIGUSR1};
    const Config* c = &m->c;
    FILE *log = NULL, *stats = NULL;
    double val_loss = NAN, begin = seconds();
    const int terminal = on_terminal(), saves = *c->out != 0;
    for (long i = 0; i < val_windows(c, val); i++) val_read(m, val, i, 1);  // a bad token ends the run here
    current.m = m, current.device = device, current.path = copied(checkpoint_path(c->out));
    current.saved = current.first = m->step, current.sequence = m->sequence, current.saved_at = begin;
    if (saves && rank == 0) {
        if (mkdir(c->out, 0777) && errno != EEXIST) die("cannot make --out %s: %s", c->out, strerror(errno));
        if (flock(open(c->out, O_RDONLY), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
            die("another process trains into --out %s", c->out);
        log = open_log(m, "log.csv", "step,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s,hellaswag");
        if (c->stats_every)
            stats = open_log(m, "stats.csv", "step,tensor,operand,format,rms,max,flushed,saturated");
    }
    if (saves && ranks == 1) last_words = save_at_end;  // which all ranks would have to come to
    for (int i = 0; i < 5; i++)  // what was ignored, as by nohup, stays so
        if (signal(signals[i], on_signal) == SIG_IGN) signal(signals[i], SIG_IGN);
    fflush(stdout);
    while (m->step < c->steps && !told_to_stop(device)) {
        const long s = m->step + 1;
        const int last = s == c->steps, want_val = last || every(c->eval_every, s);
        const int want_stats = c->stats_every && (s == 1 || last || every(c->stats_every, s));
        double lr = learning_rate(c, s), start = seconds();
        m->stats_on = want_stats;
        StepResult r = device->step(m, train, lr);
        double ms = 1e3 * (seconds() - start), rate = 1e3 * (double)(m->rows * c->accum * ranks) / ms;
        if (saves && (!isfinite(r.loss) || r.bad)) last_words = save_at_end;  // all ranks are here
        if (!isfinite(r.loss) || r.bad)
            die("step %ld: the %s is not finite; the parameters are as they were before it. A lower --lr may "
                "help", s, r.bad ? form("gradient of %s", r.bad->name) : "loss");
        current.sequence = m->sequence;
        if (saves && last) save();  // first of all: what follows takes time, and no signal cuts it short
        val_loss = want_val ? validate(m, device, val) : NAN;
        const double share = want_val && q->count ? hellaswag(m, device, q) : NAN;
        long left = (long)((seconds() - begin) / (double)(s - current.first) * (double)(c->steps - s));
        printf("%sstep %ld/%d | loss %.4f", terminal ? "\r\033[K" : "", s, c->steps, r.loss);
        if (isfinite(val_loss)) printf(" | val %.4f", val_loss);
        if (isfinite(share)) printf(" | hellaswag %.4f", share);
        printf(" | lr %.5f | norm %.3g | %.0f ms | %.0f tokens/s%s | %ld:%02ld left", lr, r.norm, ms, rate,
               device->utilisation ? device->utilisation(m, rate) : "", left / 60, left % 60);
        if (!terminal || want_val || want_stats) printf("\n");
        if (want_stats) print_stats(m, stats);
        if (log) {
            const char* val_text = isfinite(val_loss) ? form("%.6f", val_loss) : "";
            const char* share_text = isfinite(share) ? form("%.6f", share) : "";
            fprintf(log, "%ld,%.6f,%s,%.6g,%.6g,%.3f,%.1f,%s\n", s, r.loss, val_text, lr, r.norm, ms, rate,
                    share_text);
        }
        fflush(NULL);  // the logs too; a full disk costs rows of them, and not the run
        const double overdue = device->sum(!rank && seconds() - current.saved_at >= save_seconds);
        if (saves && !last && (overdue || every(c->save_every, s))) save();
    }
    if (stopping(m)) printf("\nstopped by a signal after step %ld\n", m->step);
    if (saves) save_at_end();
    if (log && (ferror(log) || (stats && ferror(stats))))
        fprintf(stderr, "%s: rows of the logs in %s could not be written\n", program, shown(c->out));
    if (stopping(m)) return;
    printf("validation loss %.4f", val_loss);
    if (c->vocab == BYTES_VOCAB) printf(", %.4f bits per byte", val_loss / 0.693147180559945);
    printf("; a sample:\n");
    generate(m, device, text, (int)min_l(c->tokens, 256));
}

// What to train on, and to validate on: --input without its last 10 %, and these; or with --val all of each.
static void splits_open(Config* c, Split* train, Split* val) {
    static Tokens tokens, other;
    if (c->evaluate && *c->val) c->input = c->val;  // what it was trained on need not be here
    if (!*c->input) die("--input FILE is missing: any text file will do (--help lists the options)");
    tokens_open(&tokens, c->input);
    if (c->vocab && c->vocab != tokens_vocab(&tokens))
        die("the model was not trained on the kind of tokens in %s", c->input);
    c->vocab = tokens_vocab(&tokens);
    c->data = tokens_hash(&tokens, 0);
    train->tokens = val->tokens = &tokens;
    val->count = *c->val ? 0 : tokens.count / 10;
    train->count = val->start = tokens.count - val->count;
    if (*c->val) {
        tokens_open(&other, c->val);
        if (other.bytes_per_token != tokens.bytes_per_token) die("--input and --val are not of one kind");
        val->tokens = &other, val->start = 0, val->count = other.count;
        c->data = tokens_hash(&other, c->data);
    }
    if (train->count <= c->seq || val->count <= c->seq)
        die("%ld tokens to train on and %ld to validate on are too few for --seq %d: "
            "use more text or a smaller --seq", train->count, val->count, c->seq);
}

// Of bytes; or --tokenizer, or gpt2_tokenizer.bin beside the shards: without one tokens are numbers.
static void table_open(Text* t, const Config* c) {
    static uint8_t bytes[BYTES_VOCAB];
    const char* slash = strrchr(c->input, '/');
    const char* beside = form("%.*sgpt2_tokenizer.bin", slash ? (int)(slash - c->input + 1) : 0, c->input);
    const char* path = *c->tokenizer ? c->tokenizer : access(beside, R_OK) == 0 ? beside : "";
    t->vocab = c->vocab, t->end = c->vocab == BYTES_VOCAB ? '\n' : GPT2_VOCAB - 1;
    if (c->vocab == BYTES_VOCAB)
        for (int i = 0; i < BYTES_VOCAB; i++)
            bytes[i] = (uint8_t)i, t->bytes[i] = bytes + i, t->length[i] = 1;
    else if (*path) text_open(t, path);
    else printf("no gpt2_tokenizer.bin beside the data, so text is token numbers: "
                "`python data/tokenize.py --out DIR --tokenizer-only` writes it\n");
    if (t->vocab != c->vocab) die("tokenizer %s has %d tokens, the model %d", path, t->vocab, c->vocab);
}
__attribute__((unused)) static int run(int argc, char** argv, const Device* device) {
    static Config c;
    static Model m;
    static Text text;
    static Split training, validation;
    static Questions questions;
    static Archive checkpoint;
    wait_briefly(argv);
    signal(SIGBUS, on_bus_error);
    signal(SIGXFSZ, SIG_IGN);  // more than ulimit -f is an error like a full disk
    config_parse(&c, argc, argv, NULL, 0);
    if (c.help || argc < 2) { print_help(); return c.help ? 0 : 1; }
    const int uses = c.generate + c.evaluate + !!*c.exported, trains = !uses && !*c.dump;
    if (uses + !!*c.dump > 1) die("--generate, --evaluate, --export and --dump exclude each other");
    const char* to = *c.dump ? c.dump : c.exported;
    if (strstr(to, "checkpoint.safetensors")) die("%s is the name of a run's checkpoint: choose another", to);
    if (uses && !*c.load) die("--generate, --evaluate and --export want a model: --load FILE");
    if (c.resume && !*c.out) die("--resume needs the --out directory of the run to continue");
    const int there = access(checkpoint_path(c.out), F_OK) == 0, resumes = trains && c.resume && there;
    const int loads = resumes || *c.load;
    if (trains && *c.out && !c.resume && (there || access(form("%s/log.csv", c.out), F_OK) == 0))
        die("%s holds a run already: --resume it, or name another --out", c.out);
    if (loads) {
        archive_read(&checkpoint, resumes ? checkpoint_path(c.out) : c.load);
        config_parse(&c, argc, argv, &checkpoint, resumes);
        c.vocab = (int)checkpoint_number(&checkpoint, "vocab", 65536);
        if (c.vocab != BYTES_VOCAB && c.vocab != GPT2_VOCAB)
            die("%s was not trained on the kind of tokens known here: it has %d", checkpoint.path, c.vocab);
        if (resumes && checkpoint_number(&checkpoint, "step", 1e15) >= c.steps) {
            printf("nothing to do: %s has all steps; a larger --steps goes on\n", shown(checkpoint.path));
            return 0;
        }
    }
    if (!resumes && c.warmup >= c.steps) c.warmup = c.steps / 10;  // as the header says
    if (c.generate) c.batch = 1;
    if (c.evaluate || !uses) splits_open(&c, &training, &validation);
    config_defaults(&c);
    if (!*c.exported) table_open(&text, &c);
    if (*c.hellaswag && (trains || c.evaluate)) {
        if (c.vocab == BYTES_VOCAB) die("--hellaswag asks in GPT-2's tokens, but this is a model of bytes");
        if (c.batch < 4) die("--hellaswag wants --batch 4 or more: a question has four endings");
        questions_open(&questions, c.hellaswag);
    }
    if (!trains) c.recompute = !*c.dump && !c.generate;  // which want every block's buffers
    model_layout(&m, &c);
    if (!uses) print_header(&m, device, &training, &validation);
    const int on_host = device->on_host || *c.dump;  // a dump wants every array
    m.training = !uses;
    check_memory(&m, on_host);
    if (on_host) model_alloc_params(&m, m.training);
    device->open(&m);
    if (loads) checkpoint_load(&m, device, &checkpoint, resumes ? lasting(&m) : 1);
    else model_init(&m, device);
    if (resumes && !c.new_data && checkpoint_number(&checkpoint, "data", 0x1p53) != (long)c.data)
        die("%s was trained on other data: size or content differ; --new-data goes on", checkpoint.path);
    if (loads) munmap((void*)checkpoint.file, (size_t)(checkpoint.data + checkpoint.size - checkpoint.file));
    const char* by = resumes ? archive_get(&checkpoint, "ranks") : NULL;
    const char* now = by && atoi(by) != ranks ? form(" (saved by %s ranks, now %d)", by, ranks) : "";
    if (loads && !c.generate) printf("%s %s, step %ld%s\n", resumes ? "resumed from" : "loaded",
                                     shown(checkpoint.path), m.step, now);
    uint64_t alike = (uint64_t)m.step ^ c.data;  // what ranks must have
    for (const Option* o = OPTIONS; o < OPTIONS_END; o++)
        if (o->name) alike = mix64(alike ^ stream_of(option_get(&m.c, o)));
    if (device->sum((double)(alike >> 32)) != (double)(alike >> 32) * ranks)
        die("ranks differ in flags, data or checkpoint: all want the same, and --out on a shared disk");
    if (!uses && !resumes) m.step = m.sequence = 0;
    if (!uses && device->describe) device->describe(&m);
    if (c.generate) generate(&m, device, &text, c.tokens);
    else if (c.evaluate) evaluate(&m, device, &validation, &questions, &text);
    else if (trains) train(&m, device, &training, &validation, &questions, &text);
    else if ((errno = *c.dump ? dump(&m, device, &training) : checkpoint_save(&m, device, to)))
        die("cannot write %s: %s", to, strerror(errno));
    else printf("wrote %s\n", shown(to));
    device->close(&m);
    model_free(&m);
    if ((fflush(stdout) != 0 || ferror(stdout)) && stop_signal != SIGPIPE)
        die("not all of the output could be written: %s", strerror(errno));
    return 0;
}

#ifndef US_NO_MAIN  // who includes this file brings another main
int main(int argc, char** argv) { return run(argc, argv, &CPU); }
#endif
