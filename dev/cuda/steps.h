// steps.h: what first versions do in kernels of their own and later ones on the way; and a reference that
// train_us.c does not have.
#pragma once
#include "bench.h"

static __global__ void cast_value(fp8* q, const bf16* x, Format format, long n) {  // a thread a value
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) q[i] = (fp8)to_fp8x2((float)x[i], 0.0f, format);
}
static void launch_cast_value(fp8* q, const bf16* x, Format format, long n) {
    cast_value<<<blocks(n, THREADS), THREADS, 0, stream>>>(q, x, format, n);
    launched("cast");
}

// (N,W) codes to (W,Np). Neighbours read side by side and write Np bytes apart: 32 bytes move for each one.
static __global__ void transpose_value(fp8* qt, const fp8* q, long N, long W, long Np) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < N * W) qt[i % W * Np + i / W] = q[i];
}
static void launch_transpose_value(fp8* qt, const fp8* q, long N, long W) {
    transpose_value<<<blocks(N * W, THREADS), THREADS, 0, stream>>>(qt, q, N, W, padded(N));
    launched("transpose");
}

// The same by tiles of 64 x 64 in shared memory: both sides move in runs of 16 bytes and more. W is a
// multiple of 16.
static __global__ void transpose_tile(fp8* qt, const fp8* q, long N, long W, long Np) {
    __shared__ __align__(4) fp8 tile[TILE][TILE + 4];
    const long row0 = (long)blockIdx.y * TILE, col0 = (long)blockIdx.x * TILE;
    const long n = row0 + tile_row(), w = col0 + tile_col();
    if (n < N && w < W) {
        const uint4 bits = *(const uint4*)(q + n * W + w);
        uint32_t* to = (uint32_t*)&tile[tile_row()][tile_col()];
        to[0] = bits.x, to[1] = bits.y, to[2] = bits.z, to[3] = bits.w;
    }
    __syncthreads();
    const long column = col0 + tile_row(), first = row0 + tile_col();
    if (column >= W) return;
    if (first + 16 <= N) {
        uint4 bits;
        for (int i = 0; i < 16; i++) ((fp8*)&bits)[i] = tile[tile_col() + i][tile_row()];
        store_bits(qt + column * Np + first, bits);
    } else
        for (int i = 0; first + i < N; i++) qt[column * Np + first + i] = tile[tile_col() + i][tile_row()];
}
static void launch_transpose_tile(fp8* qt, const fp8* q, long N, long W) {
    transpose_tile<<<tiles(N, W), THREADS, 0, stream>>>(qt, q, N, W, padded(N));
    launched("transpose");
}

// train_us.cu's add_product with F fragments on the left, each a warp's 16 rows: o (16 x D) += p (16 x N),
// rounded to BF16, times a tile (N x D). What ldmatrix reads feeds all of them.
template <int D, int F, int N>
__device__ static inline void add_products(float (&o)[F][D / 8][4], const float (&p)[F][N / 8][4],
                                           const bf16* tile) {
    const int lane = threadIdx.x % 32;
    for (int k = 0; k < N / 8; k += 2) {
        uint32_t a[F][4], b[4];
        for (int f = 0; f < F; f++)
            for (int i = 0; i < 4; i++)
                a[f][i] = pack_bf16(p[f][k + i / 2][i % 2 * 2], p[f][k + i / 2][i % 2 * 2 + 1]);
        for (int j = 0; j < D / 8; j += 2) {
            ldmatrix<true>(b, tile + chunk<D>(8 * k + lane % 16, j + lane / 16));
            for (int f = 0; f < F; f++) mma(o[f][j], a[f], b[0], b[1]), mma(o[f][j + 1], a[f], b[2], b[3]);
        }
    }
}

// On the host, in double: what attention saves of each row of scores (B,H,T), the base-2 logarithm of its sum
// of e^(q k / sqrt(D)) over the keys up to the query. qkv (B,T,3C).
static void attention_lse(float* lse, const float* qkv, long B, long T, long C, long H) {
    const long D = C / H;
    #pragma omp parallel for
    for (long i = 0; i < B * H * T; i++) {
        const float *q = qkv + (i / T / H * T + i % T) * 3 * C + i / T % H * D, *k = q + C;
        double max = -INFINITY, sum = 0;
        for (long j = i % T; j >= 0; j--, k -= 3 * C) {
            double s = 0;
            for (long d = 0; d < D; d++) s += (double)q[d] * k[d];
            s /= sqrt((double)D);
            sum = s > max ? 1 + sum * exp(max - s) : sum + exp(s - max);
            max = fmax(max, s);
        }
        lse[i] = (float)((max + log(sum)) / log(2));
    }
}
