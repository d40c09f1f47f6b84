/*
attention_backward.cu: the gradient of causal attention, and what it costs that every run gives the same bits.

With P = softmax(Q K^T / sqrt(D)) over the keys up to the query, head by head, D = C/H:
  dV = P^T dY,  dP = dY V^T,  dS = P (dP - delta) / sqrt(D),  dQ = dS K,  dK = dS^T Q
  delta = rowsum(P dP) = rowsum(dY Y);  P = 2^(log2(e) Q K^T / sqrt(D) - lse), with the lse that forward saved
  dy, y (B,T,C), qkv (B,T,3C) BF16, lse (B,H,T) FP32;  dqkv (B,T,3C) in BF16, in E5M2, and transposed (3C,Np)

All versions are for D = 64; from the second on they are FlashAttention-2 (Dao 2023, arXiv 2307.08691).

The floor. Five products, of which the mask leaves half: 5 B T^2 C operations. Each array once is 22 bytes for
each of B T C values: T/4.4 operations a byte, 233 at T = 1024, where an H100 (750 TFLOP/s on a large product,
3 TB/s) does 250 in the time of a byte. At T = 1024 bytes and products bound alike, beyond it products.

The difficulty: dK and dV are sums over queries, dQ is one over keys. Whoever keeps the first on chip has only
parts of dQ, for others to add.
*/
#include "steps.h"

enum { D = 64, SIZE = ROWS * D };  // ROWS = 64 and MMA_THREADS = 128: train_us.cu's tile and block
static long B, T, C, H;
static Array *dy, *qkv, *y, *lse, *dqkv, *codes, *codes_t;
static float* delta;  // (B,H,T)
static Dest<bf16> to_dqkv(void) { return dest(dqkv, codes, codes_t, B * T, 3 * C, E5M2); }
static const cudaFuncAttribute MOST_SHARED = cudaFuncAttributeMaxDynamicSharedMemorySize;
static const float SCALE = 0.125f;  // 1 / sqrt(D)
static dim3 grid(long rows) { return dim3((unsigned)div_up(T, rows), (unsigned)H, (unsigned)B); }
static void dots(void) {
    attention_dot<bf16><<<blocks(32 * B * T * H, THREADS), THREADS, 0, stream>>>(delta, at<bf16>(dy),
                                                                                 at<bf16>(y), B, T, H, D);
    launched("delta");
}

// ---- 1. P and dS in memory --------------------------------------------------------------------------------
// A thread for each pair of query and key, then for each output, which adds up to T products and reads 6
// bytes for each. A query has 512 bytes of Q, dQ, Y, dY in a head, and 8 T of P and dS, half of them hidden.
static float *P, *dS;  // (B,H,T,T)
static __global__ void pair_each(float* P, float* dS, const bf16* dy, const bf16* qkv, const float* lse,
                                 const float* delta, long B, long T, long H) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x, j = i % T, row = i / T, t = row % T;
    if (row >= B * H * T || j > t) return;
    const long b = row / T / H, h = row / T % H, stride = 3 * H * D;
    const bf16 *q = qkv + (b * T + t) * stride + h * D, *k = q + (j - t) * stride + H * D, *v = k + H * D;
    float s = 0, dp = 0;
    dy += ((b * T + t) * H + h) * D;
    for (int d = 0; d < D; d++) s += (float)q[d] * (float)k[d], dp += (float)dy[d] * (float)v[d];
    P[i] = exp2f(s * SCALE * LOG2E - lse[row]);
    dS[i] = P[i] * (dp - delta[row]) * SCALE;
}
static __global__ void gradient_each(Dest<bf16> to, const float* P, const float* dS, const bf16* dy,
                                     const bf16* qkv, long B, long T, long C) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x, n = i / (3 * C), part = i / C % 3, c = i % C;
    if (n >= B * T) return;
    const long b = n / T, t = n % T, head = (b * (C / D) + c / D) * T;
    float sum = 0;
    dy += b * T * C + c, qkv += b * T * 3 * C + c;
    if (part == 0) for (long j = 0; j <= t; j++) sum += dS[(head + t) * T + j] * (float)qkv[j * 3 * C + C];
    if (part == 1) for (long j = t; j < T; j++) sum += dS[(head + j) * T + t] * (float)qkv[j * 3 * C];
    if (part == 2) for (long j = t; j < T; j++) sum += P[(head + j) * T + t] * (float)dy[j * C];
    to.out[i] = (bf16)sum;
    to.q[i] = to.qt[i % (3 * C) * to.Np + n] = (fp8)to_fp8x2(round_s<bf16>(sum), 0.0f, to.format);
}
static void run1(void) {
    dots();
    pair_each<<<blocks(B * H * T * T, THREADS), THREADS, 0, stream>>>(P, dS, at<bf16>(dy), at<bf16>(qkv),
                                                                 at<float>(lse), delta, B, T, H);
    launched("pairs");
    gradient_each<<<blocks(B * T * 3 * C, THREADS), THREADS, 0, stream>>>(to_dqkv(), P, dS, at<bf16>(dy),
                                                                     at<bf16>(qkv), B, T, C);
    launched("gradients");
}

// ---- 2. P again where it is needed: nothing is stored -----------------------------------------------------
// train_us.cu's for other head sizes and FP32: a warp a position makes P and dP of its keys for dQ, then
// those of its queries for dK and dV. A pair costs four dot products, not two, but no memory.
static void run2(void) {
    dots();
    attention_backward_plain<bf16><<<dim3((unsigned)T, (unsigned)H, (unsigned)B), 32, 0, stream>>>(
        to_dqkv(), at<bf16>(dy), at<bf16>(qkv), at<float>(lse), delta, T, D, SCALE, 1.0f);
    launched("attention backward");
}

// ---- 3. Tensor cores, one pass; dQ by atomicAdd -----------------------------------------------------------
// A block owns 64 keys and walks over their queries, 64 at a time: dK and dV stay in registers, P^T and dS^T
// are left operands where they are. dS, for dQ, goes through shared memory, 8 KB written and as much read
// transposed, and 4096 atomic additions follow the 2.6 million operations of a step. Up to T/64 blocks add to
// a value of dQ, in any order: two runs differ in their bits. The sums are cleared before and read after.
struct Head { const bf16 *q, *k, *v, *dy; const float *lse, *delta; };
static __device__ Head head_of(const bf16* dy, const bf16* qkv, const float* lse, const float* delta,
                               long T, long C) {
    const long b = blockIdx.z, h = blockIdx.y, row = (b * gridDim.y + h) * T;
    const bf16* q = qkv + b * T * 3 * C + h * D;
    return {q, q + C, q + 2 * C, dy + b * T * C + h * D, lse + row, delta + row};
}
// N queries from q0 on, if there are any: Q, then dY; lse, then delta.
template <int N> static __device__ void load_queries(bf16* to, float* L, Head a, int q0, int T, long C) {
    const int i = threadIdx.x, t = q0 + i;
    if (q0 >= T) return;
    load_tile<D, N>(to, a.q + q0 * 3 * C, 3 * C, T - q0);
    load_tile<D, N>(to + N * D, a.dy + q0 * C, C, T - q0);
    if (i < N) copy_async<4>(L + i, a.lse + t, t < T), copy_async<4>(L + N + i, a.delta + t, t < T);
}
// train_us.cu's products with F fragments on the left: 16 rows a warp of each of F tiles of 64 rows.
template <int F, int N>
static __device__ void products_transposed(float (&s)[F][N / 8][4], const bf16* left, const bf16* tile) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
    memset(s, 0, sizeof s);
    for (int k = 0; k < D / 16; k++) {
        uint32_t a[F][4], b[4];
        for (int f = 0; f < F; f++) ldmatrix<false>(a[f], left + f * SIZE + chunk<D>(row, 2 * k + lane / 16));
        for (int j = 0; j < N / 8; j += 2) {
            ldmatrix<false>(b, tile + chunk<D>(8 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            for (int f = 0; f < F; f++) mma(s[f][j], a[f], b[0], b[1]), mma(s[f][j + 1], a[f], b[2], b[3]);
        }
    }
}
// A step's part of dQ. A warp has dS for 16 keys and all queries, and needs it the other way round.
static __device__ void add_dq(float* dq, bf16* S, const bf16* K, const float (&ds)[ROWS / 8][4], int left,
                              long C) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16, g = row + lane / 4, col = lane % 4 * 2;
    float sum[D / 8][4] = {};
    for (int n = 0; n < ROWS / 8; n++)
        for (int i = 0; i < 4; i += 2)
            *(uint32_t*)(S + chunk<D>(g + 4 * i, n) + col) = pack_bf16(ds[n][i], ds[n][i + 1]);
    __syncthreads();  // all keys are there; this warp has the queries `row` and on
    for (int m = 0; m < ROWS; m += 16) {
        uint32_t a[4], b[4];
        ldmatrix<true>(a, S + chunk<D>(m + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2));
        for (int n = 0; n < D / 8; n += 2) {
            ldmatrix<true>(b, K + chunk<D>(m + lane % 16, n + lane / 16));
            mma(sum[n], a, b[0], b[1]), mma(sum[n + 1], a, b[2], b[3]);
        }
    }
    for (int i = 0; i < 4; i++)
        for (int n = 0, t = g + i / 2 * 8; n < D / 8 && t < left; n++)
            atomicAdd(dq + t * C + 8 * n + col + i % 2, sum[n][i]);
}
// A block's 64 F keys, over N queries at a time.
template <int F, int N, bool ADD_DQ>
static __device__ void over_queries(Dest<bf16> dqkv, float* dq, Head a, int T, long C) {
    extern __shared__ __align__(16) bf16 shared[];
    bf16 *K = shared, *V = K + F * SIZE, *steps = V + F * SIZE, *S = steps + 4 * N * D;  // steps: two buffers
    float *L = (float*)(S + (ADD_DQ ? SIZE : 0)), scale = SCALE * LOG2E;
    const int k0 = blockIdx.x * F * ROWS, col = threadIdx.x % 4 * 2;
    const long n0 = (long)blockIdx.z * T, col0 = (long)blockIdx.y * D;
    float dk[F][D / 8][4] = {}, dv[F][D / 8][4] = {};
    load_tile<D, F * ROWS>(K, a.k + k0 * 3 * C, 3 * C, T - k0);
    load_tile<D, F * ROWS>(V, a.v + k0 * 3 * C, 3 * C, T - k0);
    load_queries<N>(steps, L, a, k0, T, C);
    for (int q0 = k0, j = 0; q0 < T; q0 += N, j ^= 1) {
        copy_wait();
        __syncthreads();  // this step is there, and nobody uses the one before any more
        load_queries<N>(steps + (j ^ 1) * 2 * N * D, L + (j ^ 1) * 2 * N, a, q0 + N, T, C);
        const bf16 *Q = steps + j * 2 * N * D, *dY = Q + N * D;
        const float *l = L + j * 2 * N + col, *e = l + N;  // lse and delta of a lane's queries
        float p[F][N / 8][4], ds[F][N / 8][4];
        products_transposed<F, N>(p, K, Q);
        #pragma unroll
        for (int f = 0; f < F; f++)
            if (q0 < k0 + (f + 1) * ROWS) hide<N>(p[f], k0 + f * ROWS, q0, true);
        for (int f = 0; f < F; f++)
            for (int n = 0; n < N / 8; n++)
                for (int i = 0; i < 4; i++) p[f][n][i] = exp2_fast(p[f][n][i] * scale - l[8 * n + i % 2]);
        add_products<D, F, N>(dv, p, dY);
        products_transposed<F, N>(ds, V, dY);
        for (int f = 0; f < F; f++)
            for (int n = 0; n < N / 8; n++)
                for (int i = 0; i < 4; i++) ds[f][n][i] = p[f][n][i] * (ds[f][n][i] - e[8 * n + i % 2]);
        add_products<D, F, N>(dk, ds, Q);
        if constexpr (ADD_DQ) add_dq(dq + (n0 + q0) * C + col0, S, K, ds[0], T - q0, C);
    }
    #pragma unroll
    for (int f = 0, t = k0; f < F && t < T; f++, t += ROWS) {
        put_rows<D>(dqkv, shared, dk[f], SCALE, SCALE, n0 + t, C + col0, T - t);
        put_rows<D>(dqkv, shared, dv[f], 1.0f, 1.0f, n0 + t, 2 * C + col0, T - t);
    }
}
static __global__ void __launch_bounds__(MMA_THREADS, 2)
attention_backward_atomic(Dest<bf16> dqkv, float* dq, const bf16* dy, const bf16* qkv, const float* lse,
                          const float* delta, int T, long C) {
    over_queries<1, 64, true>(dqkv, dq, head_of(dy, qkv, lse, delta, T, C), T, C);
}
static __global__ void __launch_bounds__(THREADS) put_dq(Dest<bf16> dqkv, const float* dq, long N, long C) {
    __shared__ bf16 tile[TILE * STRIDE];
    const long n0 = (long)blockIdx.y * TILE, c0 = (long)blockIdx.x * TILE;
    float v[16];
    if (n0 + tile_row() < N) {
        load16(v, dq + (n0 + tile_row()) * C + c0 + tile_col());
        for (int i = 0; i < 16; i++) v[i] *= SCALE;
        fill_tile(tile, v);
    }
    __syncthreads();
    put_tile(dqkv, tile, n0, c0, N);
}
static float* dq_sum;  // (B,T,C)
static void run3(void) {
    const int bytes = 7 * SIZE * sizeof(bf16) + 4 * ROWS * sizeof(float);
    dots();
    CUDA(cudaMemsetAsync(dq_sum, 0, sizeof(float) * (size_t)(B * T * C), stream));
    CUDA(cudaFuncSetAttribute(attention_backward_atomic, MOST_SHARED, bytes));
    attention_backward_atomic<<<grid(ROWS), MMA_THREADS, bytes, stream>>>(
        to_dqkv(), dq_sum, at<bf16>(dy), at<bf16>(qkv), at<float>(lse), delta, (int)T, C);
    launched("attention backward");
    put_dq<<<tiles(B * T, C), THREADS, 0, stream>>>(to_dqkv(), dq_sum, B * T, C);
    launched("dQ");
}

// ---- 4. candidate: no atomics, and 32 keys a warp for dK and dV -------------------------------------------
// Version 5, but in its first pass an ldmatrix of the queries' side feeds four mma: 48 ldmatrix for 128 mma,
// not 72, and 128 keys a block halve the copies of Q and dY. What decides: an ldmatrix takes 4 cycles, two
// mma take 4 on an A100 and at best 2 on an H100, so these reads may be what limits; but dK and dV of 32 keys
// are 128 registers, so that steps have 32 queries only and an SM has 8 warps, not 12 (and 8 bytes are
// spilled).
static __global__ void __launch_bounds__(MMA_THREADS, 2)
attention_backward_kv_32(Dest<bf16> dqkv, const bf16* dy, const bf16* qkv, const float* lse,
                         const float* delta, int T, long C) {
    over_queries<2, 32, false>(dqkv, NULL, head_of(dy, qkv, lse, delta, T, C), T, C);
}
static void run4(void) {
    const int bytes = (4 * SIZE + 4 * 32 * D) * sizeof(bf16) + 4 * 32 * sizeof(float);
    dots();
    CUDA(cudaFuncSetAttribute(attention_backward_kv_32, MOST_SHARED, bytes));
    attention_backward_kv_32<<<grid(2 * ROWS), MMA_THREADS, bytes, stream>>>(
        to_dqkv(), at<bf16>(dy), at<bf16>(qkv), at<float>(lse), delta, (int)T, C);
    launched("attention backward, dK and dV");
    CUDA(cudaFuncSetAttribute(attention_backward_q_mma<D>, MOST_SHARED, Backward<D>::BYTES));
    attention_backward_q_mma<D><<<grid(ROWS), MMA_THREADS, Backward<D>::BYTES, stream>>>(
        to_dqkv(), at<bf16>(dy), at<bf16>(qkv), at<float>(lse), delta, (int)T, C, SCALE, 1.0f);
    launched("attention backward, dQ");
}

// ---- 5. train_us.cu's: two passes, no atomics -------------------------------------------------------------
// Version 3 without its last product, and a second pass whose blocks own queries and walk over keys, for dQ:
// Q K^T and dY V^T are made twice, seven products, not five, but dS never leaves the registers. Each sum has
// one owner and one order: the same bits in every run.
static void run5(void) {
    attention_backward_gpu<bf16>(to_dqkv(), delta, at<bf16>(dy), at<bf16>(y), at<bf16>(qkv), at<float>(lse),
                                 SCALE, 1.0f, B, T, C, H, stream);
}

// rowsum(P dP) is taken from the rounded y, so dS is off by up to 2^-9 of its row's size, a sum by such a
// part: many units of a value near zero (74 were seen), of most values one or none. So dY grows with the root
// of the position, for rows of one size, and is small: then a code near zero, in steps of 2^-16, is at most
// one off.
static float* space(long n) { return (float*)work_space(sizeof(float) * (size_t)n); }
static void open_backward(const long* shape) {
    B = shape[0], T = shape[1], C = shape[2], H = shape[3];
    const long N = B * T;
    qkv = input("qkv", BF16, N * 3 * C, 1.0f);
    dy = input("dy", BF16, N * C, 0x1p-8f);
    y = new_array("y", INPUT, BF16, N * C);
    lse = new_array("lse", INPUT, FP32, H * N);
    dqkv = output("dqkv", BF16, N * 3 * C, 200, 0.5);
    for (long i = 0; i < N * C; i++) dy->value[i] *= sqrtf((float)(i / C % T + 1) / (float)T);
    attention_forward(y->value = floats((double)(N * C)), qkv->value, SCALE, 1, B, 0, T, C, H, BF16);
    lse->value = floats((double)(H * N));
    attention_lse(lse->value, qkv->value, B, T, C, H);
    encode(dy), encode(y), encode(lse);
    attention_backward(dqkv->want, dy->value, qkv->value, SCALE, 1, B, T, C, H, BF16);
    output_codes(&codes, &codes_t, dqkv->want, N, 3 * C, E5M2, 0.025);
    delta = space(H * N), dq_sum = space(N * C), P = space(H * N * T), dS = space(H * N * T);
    floor_flops = 5.0 * B * T * T * C, floor_format = BF16;
}

static const Version VERSIONS[] = {
    {"P and dS in memory", run1, "attention_dot pair_each gradient_each"},
    {"P again, a warp a position", run2, "attention_dot attention_backward_plain"},
    {"tensor cores, one pass, dQ by atomicAdd", run3, "attention_dot attention_backward_atomic put_dq"},
    {"candidate: 32 keys a warp", run4,
     "attention_dot attention_backward_kv_32 attention_backward_q_mma<64>"},
    {"two passes, no atomics", run5,
     "attention_dot attention_backward_kv_mma<64> attention_backward_q_mma<64>"},
    {}};
static const Kernel KERNELS[] = {
    {"attention backward", "B T C H", open_backward, VERSIONS,
     {{1, 1, 64, 1}, {2, 33, 128, 2}, {1, 128, 64, 1}, {1, 130, 64, 1}},
     {{8, 1024, 768, 12}, {4, 1024, 1600, 25}}},
};
int main(int argc, char** argv) { return lab(argc, argv, "attention_backward", KERNELS); }
