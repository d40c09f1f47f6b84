/*
attention_forward.cu: causal attention, from a matrix of scores in memory to tiles that never leave the chip.

  y = P V,  P = softmax(Q K^T / sqrt(D)) over the keys up to the query          head by head, D = C/H
  qkv (B,T,3C) BF16, a row is all heads' Q, then K, then V;  y (B,T,C) in BF16, in E4M3, and transposed (C,Np)
  lse (B,H,T) FP32 = log2 of the sum of e^(q k / sqrt(D)) over the keys: backward computes P again from it

All versions are for D = 64; from the second on they are FlashAttention-2 (Dao 2023, arXiv 2307.08691).

The floor. Two products of which the mask leaves half: 2 B T^2 C operations. Each array once is 10 bytes for
each of B T C values: T/5 operations a byte, 205 at T = 1024, where an H100 (750 TFLOP/s on a large product,
3 TB/s) does 250. So at T = 1024 bytes and products bound alike, beyond it products. And each score is an
exponential: an SM makes 16 in a clock cycle, in which its tensor cores at best do the products of 16 scores.
mma.sync, the instruction here, reaches about two thirds of that on Hopper (Shah 2024, arXiv 2407.08608).
*/
#include "steps.h"

enum { D = 64, SIZE = ROWS * D };  // ROWS = 64 and MMA_THREADS = 128: train_us.cu's tile and block
static long B, T, C, H;
static Array *qkv, *y, *codes, *codes_t, *lse;
static Dest<bf16> to_y(void) { return dest(y, codes, codes_t, B * T, C, E4M3); }
static const float SCALE = 1.44269504f / 8;  // log2(e) / sqrt(D)
static dim3 grid(long rows) { return dim3((unsigned)div_up(T, rows), (unsigned)H, (unsigned)B); }

// ---- 1. The scores in memory ------------------------------------------------------------------------------
// A thread for each score, then each row, then each output. A query has 256 bytes of Q and Y in a head, and
// 4 T of scores, half of them hidden; the others are written three times and read four times.
static float* scores;  // (B,H,T,T)
static __global__ void score_each(float* s, const bf16* qkv, long B, long T, long H) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x, j = i % T, t = i / T % T, bh = i / T / T;
    if (bh >= B * H || j > t) return;
    const bf16 *q = qkv + (bh / H * T + t) * 3 * H * D + bh % H * D, *k = q + (j - t) * 3 * H * D + H * D;
    float sum = 0;
    for (int d = 0; d < D; d++) sum += (float)q[d] * (float)k[d];
    s[i] = sum * SCALE;
}
static __global__ void softmax_rows(float* s, float* lse, long rows, long T) {
    const long row = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float *p = s + row * T, max = -INFINITY, sum = 0;
    for (long j = 0; j <= row % T; j++) max = fmaxf(max, p[j]);
    for (long j = 0; j <= row % T; j++) sum += p[j] = exp2f(p[j] - max);
    for (long j = 0; j <= row % T; j++) p[j] /= sum;
    lse[row] = max + log2f(sum);
}
static __global__ void value_each(Dest<bf16> y, const float* p, const bf16* qkv, long B, long T, long C) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x, c = i % C, t = i / C % T, b = i / C / T;
    if (b >= B) return;
    const bf16* v = qkv + b * T * 3 * C + 2 * C + c;
    float sum = 0;
    p += ((b * (C / D) + c / D) * T + t) * T;
    for (long j = 0; j <= t; j++) sum += p[j] * (float)v[j * 3 * C];
    y.out[i] = (bf16)sum;
    y.q[i] = y.qt[c * y.Np + i / C] = (fp8)to_fp8x2(round_s<bf16>(sum), 0.0f, y.format);
}
static void run1(void) {
    score_each<<<blocks(B * H * T * T, THREADS), THREADS, 0, stream>>>(scores, at<bf16>(qkv), B, T, H);
    launched("scores");
    softmax_rows<<<blocks(B * H * T, THREADS), THREADS, 0, stream>>>(scores, at<float>(lse), B * H * T, T);
    launched("softmax");
    value_each<<<blocks(B * T * C, THREADS), THREADS, 0, stream>>>(to_y(), scores, at<bf16>(qkv), B, T, C);
    launched("values");
}

// ---- 2. Nothing is stored ---------------------------------------------------------------------------------
// train_us.cu's for other head sizes and FP32: a warp a query goes over its keys twice, for the largest
// score, then for sum and values. Memory sees inputs and outputs only, but a query reads its keys' K twice
// and V from the cache, 384 bytes for 384 operations, and each product of 64 values ends in five shuffles.
static void run2(void) {
    attention_forward_plain<bf16><<<dim3((unsigned)T, (unsigned)H, (unsigned)B), 32, 0, stream>>>(
        to_y(), at<float>(lse), at<bf16>(qkv), 0, T, D, SCALE, 1.0f);
    launched("attention forward");
}

// ---- 3. Tensor cores: 64 queries share each key -----------------------------------------------------------
// A block keeps 64 queries and walks over tiles of 64 keys in shared memory: K and V are read once for all of
// them. The softmax is online: with the largest score and the sum so far, and what is summed shrinks when
// the largest grows. A warp has 16 queries, and an mma does 4096 operations. Fragments are gathered with
// plain loads, of 16 bits where a lane's values are not side by side, as in V. Rows are 128 bytes, so lanes
// with different rows meet in one bank: eight of K, four of V.
static __device__ void copy_tile(bf16* to, const bf16* from, long stride, int left) {
    for (int i = threadIdx.x; i < SIZE / 8; i += MMA_THREADS) {
        const int r = i / (D / 8), c = i % (D / 8) * 8;
        const uint4 zeros = {0, 0, 0, 0};
        *(uint4*)(to + r * D + c) = r < left ? *(const uint4*)(from + r * stride + c) : zeros;
    }
}
static __device__ uint32_t word(const bf16* p) { return *(const uint32_t*)p; }
static __device__ void gather_rows(uint32_t (&a)[D / 16][4], const bf16* tile) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, col = lane % 4 * 2;
    for (int k = 0; k < D / 16; k++)
        for (int i = 0; i < 4; i++)
            a[k][i] = word(tile + (row + i % 2 * 8) * D + 16 * k + i / 2 * 8 + col);
}
static __device__ void gather_transposed(float (&s)[ROWS / 8][4], const uint32_t (&a)[D / 16][4],
                                         const bf16* tile) {
    const bf16* from = tile + threadIdx.x % 32 / 4 * D + threadIdx.x % 4 * 2;
    memset(s, 0, sizeof s);
    for (int k = 0; k < D / 16; k++)
        for (int j = 0; j < ROWS / 8; j++)
            mma(s[j], a[k], word(from + 8 * j * D + 16 * k), word(from + 8 * j * D + 16 * k + 8));
}
static __device__ void gather_product(float (&o)[D / 8][4], const float (&p)[ROWS / 8][4],
                                      const bf16* tile) {
    const uint16_t* from = (const uint16_t*)tile + threadIdx.x % 4 * 2 * D + threadIdx.x % 32 / 4;
    for (int k = 0; k < ROWS / 8; k += 2) {
        const uint32_t a[4] = {pack_bf16(p[k][0], p[k][1]), pack_bf16(p[k][2], p[k][3]),
                               pack_bf16(p[k + 1][0], p[k + 1][1]), pack_bf16(p[k + 1][2], p[k + 1][3])};
        for (int j = 0; j < D / 8; j++) {
            const uint16_t *b = from + 8 * k * D + 8 * j, *c = b + 8 * D;
            mma(o[j], a, b[0] | (uint32_t)b[D] << 16, c[0] | (uint32_t)c[D] << 16);
        }
    }
}
// lse of this warp's 16 rows; their sums become the factors of o.
static __device__ void finish(float* lse, const float (&max)[2], float (&sum)[2], int q0, int T) {
    for (int i = 0; i < 2; i++) {
        sum[i] = quad_sum(sum[i]);
        const int t = q0 + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
        if (threadIdx.x % 4 == 0 && t < T) lse[t] = max[i] * SCALE + log2f(sum[i]);
        sum[i] = 1.0f / sum[i];
    }
}
template <bool GATHER>
static __device__ void tiles_in_turn(Dest<bf16> y, float* lse, const bf16* qkv, int T, long C) {
    __shared__ __align__(16) bf16 shared[3 * SIZE];
    bf16 *Q = shared, *K = Q + SIZE, *V = K + SIZE;
    const int last = gridDim.x - 1 - blockIdx.x, q0 = last * ROWS;  // the longest first
    const long b = blockIdx.z, h = blockIdx.y, stride = 3 * C;
    const bf16 *q = qkv + b * T * stride + h * D, *k = q + C;
    auto load = [&](bf16* to, const bf16* from, int left) {
        if (GATHER) copy_tile(to, from, stride, left);
        else load_tile<D, ROWS>(to, from, stride, left);
    };
    uint32_t rows[D / 16][4];
    float o[D / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    load(Q, q + q0 * stride, T - q0);
    for (int j = 0; j <= last; j++, k += ROWS * stride) {
        __syncthreads();  // nobody uses tile j-1 any more
        load(K, k, T - j * ROWS);
        load(V, k + C, T - j * ROWS);
        if (!GATHER) copy_wait();
        __syncthreads();
        float s[ROWS / 8][4];
        if (j == 0 && GATHER) gather_rows(rows, Q);
        if (j == 0 && !GATHER) load_rows<D>(rows, Q);
        if (GATHER) gather_transposed(s, rows, K);
        else times_transposed<D, ROWS>(s, rows, K);
        if (j == last) hide<ROWS>(s, q0, j * ROWS, false);
        softmax_step<D, ROWS>(s, o, max, sum, SCALE);
        if (GATHER) gather_product(o, s, V);
        else add_product<D, ROWS>(o, s, V);
    }
    finish(lse + (b * gridDim.y + h) * T, max, sum, q0, T);
    put_rows<D>(y, shared, o, sum[0], sum[1], b * T + q0, h * D, T - q0);
}
static __global__ void __launch_bounds__(MMA_THREADS, 4)
attention_gather(Dest<bf16> y, float* lse, const bf16* qkv, int T, long C) {
    tiles_in_turn<true>(y, lse, qkv, T, C);
}
static void run3(void) {
    attention_gather<<<grid(ROWS), MMA_THREADS, 0, stream>>>(to_y(), at<float>(lse), at<bf16>(qkv), T, C);
    launched("attention forward");
}

// ---- 4. ldmatrix, and chunks of 16 bytes in other places --------------------------------------------------
// The same kernel with train_us.cu's fragments and copies, waited for at once. An ldmatrix brings 512 bytes,
// for two mma, in 4 cycles, plain loads in 32. Chunk c of row r lies at c ^ (r % 8): no rows meet in a bank.
static __global__ void __launch_bounds__(MMA_THREADS, 4)
attention_ldmatrix(Dest<bf16> y, float* lse, const bf16* qkv, int T, long C) {
    tiles_in_turn<false>(y, lse, qkv, T, C);
}
static void run4(void) {
    attention_ldmatrix<<<grid(ROWS), MMA_THREADS, 0, stream>>>(to_y(), at<float>(lse), at<bf16>(qkv), T, C);
    launched("attention forward");
}

// ---- 5. candidate: 32 queries a warp ----------------------------------------------------------------------
// An ldmatrix takes 4 cycles and feeds two mma, which take 4 on an A100 and at best 2 on an H100: reads may
// be what limits. With two fragments of 16 queries it feeds four, and 128 queries a block halve the copies of
// K and V. What decides: registers for 32 queries leave an SM 8 warps, not 16, to hide exponentials behind
// products; and of the last tile the first 64 queries need nothing, 1/17 of the work at T = 1024.
static __device__ void times_transposed_2(float (&s)[2][ROWS / 8][4], const uint32_t (&a)[2][D / 16][4],
                                          const bf16* tile) {
    const int lane = threadIdx.x % 32;
    memset(s, 0, sizeof s);
    for (int k = 0; k < D / 16; k++)
        for (int j = 0; j < ROWS / 8; j += 2) {
            uint32_t b[4];
            ldmatrix<false>(b, tile + chunk<D>(8 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            for (int f = 0; f < 2; f++)
                mma(s[f][j], a[f][k], b[0], b[1]), mma(s[f][j + 1], a[f][k], b[2], b[3]);
        }
}
// Fragment f of a warp is 16 of the queries q0 + 64 f and on, where a block of 64 queries would have them.
static __global__ void __launch_bounds__(MMA_THREADS, 2)
attention_forward_32(Dest<bf16> y, float* lse, const bf16* qkv, int T, long C) {
    extern __shared__ __align__(16) bf16 shared[];
    bf16 *Q = shared, *K = Q + 2 * SIZE, *V = K + 2 * SIZE;
    const int first = (gridDim.x - 1 - blockIdx.x) * 2, q0 = first * ROWS;  // first: the tile at q0
    const int steps = min(first + 2, (T + ROWS - 1) / ROWS);
    const long b = blockIdx.z, h = blockIdx.y, stride = 3 * C;
    const bf16 *q = qkv + b * T * stride + h * D, *k = q + C, *v = k + C;
    uint32_t rows[2][D / 16][4];
    float o[2][D / 8][4] = {}, sum[2][2] = {};
    float max[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}};
    load_tile<D, 2 * ROWS>(Q, q + q0 * stride, stride, T - q0);
    load_tile<D, ROWS>(K, k, stride, T);
    load_tile<D, ROWS>(V, v, stride, T);
    for (int j = 0; j < steps; j++) {
        copy_wait();
        __syncthreads();  // tile j is there, and nobody uses tile j-1 any more
        if (j == 0) load_rows<D>(rows[0], Q), load_rows<D>(rows[1], Q + SIZE);
        if (j + 1 < steps) {
            const long k0 = (j + 1) * ROWS, at = (j + 1) % 2 * SIZE;
            load_tile<D, ROWS>(K + at, k + k0 * stride, stride, T - k0);
            load_tile<D, ROWS>(V + at, v + k0 * stride, stride, T - k0);
        }
        float s[2][ROWS / 8][4];
        times_transposed_2(s, rows, K + j % 2 * SIZE);
        #pragma unroll
        for (int f = 0; f < 2; f++) {
            if (j >= first + f) hide<ROWS>(s[f], q0 + f * ROWS, j * ROWS, false);
            softmax_step<D, ROWS>(s[f], o[f], max[f], sum[f], SCALE);
        }
        add_products<D, 2, ROWS>(o, s, V + j % 2 * SIZE);
    }
    #pragma unroll
    for (int f = 0, t = q0; f < 2 && t < T; f++, t += ROWS) {
        finish(lse + (b * gridDim.y + h) * T, max[f], sum[f], t, T);
        put_rows<D>(y, shared, o[f], sum[f][0], sum[f][1], b * T + t, h * D, T - t);
    }
}
static void run5(void) {
    const int bytes = 6 * SIZE * sizeof(bf16);  // 48 KB, the most without asking
    attention_forward_32<<<grid(2 * ROWS), MMA_THREADS, bytes, stream>>>(to_y(), at<float>(lse),
                                                                         at<bf16>(qkv), T, C);
    launched("attention forward");
}

// ---- 6. train_us.cu's: the next tiles come while these are in use -----------------------------------------
// Version 4 with two buffers each of K and V: the copies of a step run behind the step before. Shared memory
// grows from 24 to 40 KB, of which four blocks, as many as registers allow, still fit.
static void run6(void) {
    attention_forward_gpu<bf16>(to_y(), at<float>(lse), at<bf16>(qkv), SCALE / LOG2E, 1.0f, B, 0, T, C,
                                H, stream);
}

// V is N(0,1) squared: a sum of positive terms is as exact as they are. P, y and what is wanted are rounded
// to BF16, by 2^-9 at most: together less than two units. A wrong key is several where its V is large.
static void open_forward(const long* shape) {
    B = shape[0], T = shape[1], C = shape[2], H = shape[3];
    qkv = input("qkv", BF16, B * T * 3 * C, 1.0f);
    for (long i = 0; i < B * T * 3 * C; i++) if (i % (3 * C) >= 2 * C) qkv->value[i] *= qkv->value[i];
    for (long i = 0; i < B * T * 3 * C; i++)  // of the first head scores whose e^s is too large for FP32
        if (i % (3 * C) < D) qkv->value[i] *= 30.0f;
    encode(qkv);
    y = output("y", BF16, B * T * C, 1, 0.06);
    attention_forward(y->want, qkv->value, SCALE / LOG2E, 1, B, 0, T, C, H, BF16);
    output_codes(&codes, &codes_t, y->want, B * T, C, E4M3, 0.01);
    lse = output("lse", FP32, B * H * T, 512, 1);  // a score's FP32 sum rounds, and lse may be near zero
    attention_lse(lse->want, qkv->value, B, T, C, H);
    scores = (float*)work_space(sizeof(float) * (size_t)(B * H * T * T));
    floor_flops = 2.0 * B * T * T * C, floor_format = BF16;
}

static const Version VERSIONS[] = {
    {"scores in memory", run1, "score_each softmax_rows value_each"},
    {"nothing stored, a warp a query", run2, "attention_forward_plain"},
    {"tensor cores, fragments gathered", run3, "attention_gather"},
    {"ldmatrix, no bank conflicts", run4, "attention_ldmatrix"},
    {"candidate: 32 queries a warp", run5, "attention_forward_32"},
    {"the next tiles come meanwhile", run6, "attention_forward_mma<64>"},
    {}};
static const Kernel KERNELS[] = {
    {"attention forward", "B T C H", open_forward, VERSIONS,
     {{1, 1, 64, 1}, {2, 70, 128, 2}, {1, 128, 64, 1}, {1, 130, 64, 1}},
     {{8, 1024, 768, 12}, {4, 1024, 1600, 25}}},
};
int main(int argc, char** argv) { return lab(argc, argv, "attention_forward", KERNELS); }
