/*
matmul_fp8.cu: one product in FP8, and how tensor cores are fed with it.

  out = alpha a b^T     a (M,K), b (N,K) E4M3, summed in FP32, alpha = 1/sqrt(K); out (M,N) BF16

Both operands have k contiguous, the only layout of FP8 tensor cores (TN). K is a multiple of 16 and N of 8,
so that rows begin at 16 bytes; M is any. The trainer's product is version 0, cuBLASLt: it uses none of the
others.

The floor. 2 M N K operations, each byte once. (16384 x 3072) x 768 is 77 GFLOP for 116 MB, 670 a byte; 4096^3
is 137 GFLOP for 67 MB, 2,050 a byte. A card of 2e15 FLOP/s in FP8 and 3e12 bytes/s has 670 for each byte: the
second is held up by arithmetic alone, the first by memory as much.

What mma.sync in FP8 becomes. The PTX instruction is the same on all cards from sm_89 on, what runs is not.
For one mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32, nvcc 13.0 -cubin, then cuobjdump -sass (13.1)
shows

  sm_89, sm_120         1 QMMA.16832.F32.E4M3.E4M3
  sm_90, 90a, 100       12 F2FP.F16.E4M3.UNPACK_B, 2 HMMA.16816.F32 (the first adds to zero), 4 FADD

and for wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 on sm_90a 1 QGMMA.64x8x32.F32.E4M3.E4M3. So on
Hopper mma.sync does not reach the FP8 tensor cores: codes are unpacked and multiplied as FP16, at best at
half the rate of FP8, and the sum is carried by FP32 adds beside it. Of the two gains of FP8, bytes and
operations, the first is left. (In version 4's loop fragments are unpacked once for several mma: 48 F2FP, 32
HMMA, 64 FADD for 16 mma.) wgmma, which four warps issue together and which reads operands from shared memory
by itself, is the only way that PTX has to the FP8 rate.
*/
#include "bench.h"

static long M, N, K;
static Array *a, *b, *out;

// ---- 0. cuBLASLt with fast accumulation, which is the trainer's -------------------------------------------
// As linear_forward_gpu calls it. On sm_90 the tensor cores keep about 14 bits of a sum.
static void run0(void) {
    gemm("cuBLASLt", at<bf16>(out), CUDA_R_16BF, N, side(at<fp8>(a), K, 1, CUDA_R_8F_E4M3),
         side(at<fp8>(b), K, 1, CUDA_R_8F_E4M3), M, N, K, 1 / sqrtf((float)K), 0, 1);
}

// ---- 1. A thread an output --------------------------------------------------------------------------------
// Each code is decoded where it is used: 27 instructions for one multiply-add (107 for four in the SASS for
// sm_90). A warp reads one row of a and 32 rows of b, K bytes apart: 33 sectors of 32 bytes for 33 codes.
static __global__ void __launch_bounds__(THREADS)
product_value(bf16* out, const fp8* a, const fp8* b, float alpha, long M, long N, long K) {
    const long i = (long)blockIdx.x * THREADS + threadIdx.x, m = i / N, n = i % N;
    if (m >= M) return;
    float sum = 0;
    for (long k = 0; k < K; k++) sum += fp8_decode(a[m * K + k], E4M3) * fp8_decode(b[n * K + k], E4M3);
    out[i] = (bf16)(alpha * sum);
}
static void run1(void) {
    product_value<<<blocks(M * N, THREADS), THREADS, 0, stream>>>(
        at<bf16>(out), at<fp8>(a), at<fp8>(b), 1 / sqrtf((float)K), M, N, K);
    launched("value");
}

// ---- 2. Tiles of 64 x 64, a thread a patch of 4 x 4 -------------------------------------------------------
// Codes are read 16 at a time, and decoded once for 64 outputs instead of once for each. From shared memory a
// thread reads 8 values, in two loads, for 16 multiply-adds. FP32 units limit it now, and these do on an H100
// 1/30 of what its FP8 tensor cores do (67 and 1,979 TFLOP/s by its datasheet).
enum { PATCH_K = 32, PATCH_STRIDE = TILE + 4 };  // a multiple of 4: a patch's side is one load
__device__ static inline void decode_rows(float (&to)[PATCH_K][PATCH_STRIDE], const fp8* from, long row,
                                          long rows, long k, long K, int piece) {
    const int r = piece / 2, c = piece % 2 * 16;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (row + r < rows && k + c < K) bits = *(const uint4*)(from + (row + r) * K + k + c);
    const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
    #pragma unroll
    for (int i = 0; i < 16; i++) to[c + i][r] = fp8_decode((uint8_t)(word[i / 4] >> i % 4 * 8), E4M3);
}
static __global__ void __launch_bounds__(THREADS)
product_patch(bf16* out, const fp8* a, const fp8* b, float alpha, long M, long N, long K) {
    __shared__ __align__(16) float A[PATCH_K][PATCH_STRIDE];
    __shared__ __align__(16) float B[PATCH_K][PATCH_STRIDE];
    const int t = (int)threadIdx.x, row = t / 16 * 4, col = t % 16 * 4;
    const long m0 = (long)blockIdx.y * TILE, n0 = (long)blockIdx.x * TILE;
    float sum[4][4] = {};
    for (long k = 0; k < K; k += PATCH_K) {
        if (t < 2 * TILE) decode_rows(A, a, m0, M, k, K, t);
        else decode_rows(B, b, n0, N, k, K, t - 2 * TILE);
        __syncthreads();
        #pragma unroll 8
        for (int i = 0; i < PATCH_K; i++) {
            const Pack<float> x = *(const Pack<float>*)&A[i][row], y = *(const Pack<float>*)&B[i][col];
            for (int r = 0; r < 4; r++)
                for (int c = 0; c < 4; c++) sum[r][c] += x.v[r] * y.v[c];
        }
        __syncthreads();
    }
    if (n0 + col >= N) return;
    for (int r = 0; r < 4 && m0 + row + r < M; r++) {
        uint32_t* to = (uint32_t*)(out + (m0 + row + r) * N + n0 + col);
        for (int c = 0; c < 4; c += 2) to[c / 2] = pack_bf16(alpha * sum[r][c], alpha * sum[r][c + 1]);
    }
}
static void run2(void) {
    product_patch<<<tiles(M, N), THREADS, 0, stream>>>(at<bf16>(out), at<fp8>(a), at<fp8>(b),
                                                       1 / sqrtf((float)K), M, N, K);
    launched("patch");
}

// ---- 3. Tensor cores --------------------------------------------------------------------------------------
// d (16 x 8, FP32) += a (16 x 32) b (32 x 8), by a warp. A register has four codes, which follow each other
// along k, the first in the low byte. Lane 4g + t holds
//   of d   d[0], d[1]: row g, columns 2t, 2t+1; d[2], d[3]: the same of row g+8
//   of a   a[0]: row g, k = 4t .. 4t+3; a[1]: the same of row g+8; a[2], a[3]: as these, k 16 further
//   of b   b0: column g, k = 4t .. 4t+3; b1: k 16 further
// as BF16's fragments with two codes in the place of one value.
__device__ static inline void mma_fp8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifndef __CUDACC__
    const uint32_t b[2] = {b0, b1};
    emu::mma_fp8(d, a, b, E4M3, E4M3);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890  // before it nothing is launched that calls this
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
// Tiles of 64 x 64, k 32 at a time; each of four warps has 32 x 32 outputs: 16 loads of 4 bytes a lane from
// shared memory for 8 mma, which are 32,768 multiply-adds; in version 2 a warp has 128 loads of 16 bytes for
// as many. A row of 48 bytes begins 12 banks after the last: the eight rows that a load touches are in
// different banks. Loading and multiplying take turns.
enum { GATHER_K = 32, GATHER_STRIDE = GATHER_K + 16 };
__device__ static inline uint32_t word_of(const fp8* row, int k) { return *(const uint32_t*)(row + k); }
static __global__ void __launch_bounds__(MMA_THREADS)
product_gather(bf16* out, const fp8* a, const fp8* b, float alpha, long M, long N, long K) {
    __shared__ __align__(16) fp8 A[TILE][GATHER_STRIDE];
    __shared__ __align__(16) fp8 B[TILE][GATHER_STRIDE];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int row = warp / 2 * 32 + g, col = warp % 2 * 32 + g, r = threadIdx.x / 2, c = threadIdx.x % 2 * 16;
    const long m0 = (long)blockIdx.y * TILE, n0 = (long)blockIdx.x * TILE;
    const uint4 zeros = make_uint4(0, 0, 0, 0);
    float sum[2][4][4] = {};
    for (long k = 0; k < K; k += GATHER_K) {
        const bool in_k = k + c < K;
        *(uint4*)&A[r][c] = m0 + r < M && in_k ? *(const uint4*)(a + (m0 + r) * K + k + c) : zeros;
        *(uint4*)&B[r][c] = n0 + r < N && in_k ? *(const uint4*)(b + (n0 + r) * K + k + c) : zeros;
        __syncthreads();
        uint32_t x[2][4];
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 4; j++) x[i][j] = word_of(A[row + 16 * i + j % 2 * 8], 4 * t + j / 2 * 16);
        for (int j = 0; j < 4; j++) {
            const uint32_t b0 = word_of(B[col + 8 * j], 4 * t), b1 = word_of(B[col + 8 * j], 4 * t + 16);
            for (int i = 0; i < 2; i++) mma_fp8(sum[i][j], x[i], b0, b1);
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; i++)  // halves of 16 x 8 pieces: this lane's rows
        for (int j = 0; j < 4; j++) {
            const long m = m0 + row + 8 * i, n = n0 + col - g + 8 * j + 2 * t;
            const float* d = &sum[i / 2][j][i % 2 * 2];
            if (m < M && n < N) *(uint32_t*)(out + m * N + n) = pack_bf16(alpha * d[0], alpha * d[1]);
        }
}
static void run3(void) {
    product_gather<<<tiles(M, N), MMA_THREADS, 0, stream>>>(at<bf16>(out), at<fp8>(a), at<fp8>(b),
                                                            1 / sqrtf((float)K), M, N, K);
    launched("gather");
}

// ---- 4. ldmatrix, swizzled tiles of 128 x 128 x 64, copies in the background ------------------------------
// A tile of 128 x 128 reads each operand half as often as one of 64 x 64. Each of eight warps has 64 x 32
// outputs: 6 ldmatrix for 16 mma, where version 3 has 32 loads. ldmatrix moves pairs of bytes and does not
// ask what they are: a row of 64 codes is a row of 32 pairs, its chunks are put where train_us.cu puts those
// of a BF16 tile with D = 32. Two stages are on their way while the third is in use; stores are of 16 bytes.
enum { WIDE = 128, WIDE_K = 64, STAGES = 3, WIDE_THREADS = 256, SIDE = WIDE * WIDE_K / 2, PAD = WIDE + 8 };
__device__ static inline void copy_commit() {  // what was copied since the last commit is one group
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emu::cp_async_commit();
#endif
}
__device__ static inline void copy_wait_stages() {  // until all groups but the last STAGES - 2 are there
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
#else
    emu::cp_async_wait(STAGES - 2);
#endif
}
__device__ static inline void load_side(bf16* to, const fp8* from, int rows, int k, int K) {
    const int r = threadIdx.x / 4, c = threadIdx.x % 4, at = r * K + k + 16 * c;
    const bool in_k = k + 16 * c < K;
    copy_async<16>(to + chunk<32>(r, c), from + at, r < rows && in_k);
    copy_async<16>(to + chunk<32>(r + 64, c), from + at + 64 * K, r + 64 < rows && in_k);
}
static __global__ void __launch_bounds__(WIDE_THREADS, 2)
product_stages(bf16* out, const fp8* a, const fp8* b, float alpha, long M, long N, int K) {
    __shared__ __align__(64) bf16 shared[STAGES * 2 * SIDE];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp / 4 * 64, col = warp % 4 * 32;
    const long m0 = (long)blockIdx.y * WIDE, n0 = (long)blockIdx.x * WIDE;
    const int rows = (int)min(M - m0, (long)WIDE), cols = (int)min(N - n0, (long)WIDE);
    // This lane's chunks: of rows 16 further they lie alike, and of k + 32 where bit 5 of the address
    // differs.
    const int at_a = chunk<32>(row + lane % 16, lane / 16);
    const int at_b = chunk<32>(col + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    float sum[4][4][4] = {};
    for (int s = 0; (s - STAGES + 1) * WIDE_K < K; s++) {
        if (s >= STAGES - 1) {
            copy_wait_stages();
            __syncthreads();  // stage s - 2 is there, and nobody uses s - 3, whose place s takes
        }
        if (s * WIDE_K < K) {
            bf16* to = shared + s % STAGES * 2 * SIDE;
            load_side(to, a + m0 * K, rows, s * WIDE_K, K);
            load_side(to + SIDE, b + n0 * K, cols, s * WIDE_K, K);
        }
        copy_commit();  // an empty group too: they are counted
        if (s < STAGES - 1) continue;
        const bf16* stage = shared + (s + 1) % STAGES * 2 * SIDE;
        const uintptr_t A = (uintptr_t)(stage + at_a), B = (uintptr_t)(stage + SIDE + at_b);
        #pragma unroll
        for (int k = 0; k < 4; k += 2) {
            uint32_t x[4], y[2][4];
            for (int j = 0; j < 2; j++) ldmatrix<false>(y[j], (const bf16*)(B ^ 16 * k) + 16 * j * 32);
            for (int i = 0; i < 4; i++) {
                ldmatrix<false>(x, (const bf16*)(A ^ 16 * k) + 16 * i * 32);
                for (int j = 0; j < 4; j++)
                    mma_fp8(sum[i][j], x, y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
    __syncthreads();
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 4; j++) {
            const float* d = &sum[i / 2][j][i % 2 * 2];
            bf16* to = shared + (row + 8 * i + lane / 4) * PAD + col + 8 * j + lane % 4 * 2;
            *(uint32_t*)to = pack_bf16(alpha * d[0], alpha * d[1]);
        }
    __syncthreads();
    for (int p = threadIdx.x; p < WIDE * WIDE / 8; p += WIDE_THREADS) {
        const int r = p / (WIDE / 8), c = p % (WIDE / 8) * 8;
        if (r < rows && c < cols)
            store_bits(out + (m0 + r) * N + n0 + c, *(const uint4*)(shared + r * PAD + c));
    }
}
static void run4(void) {
    const dim3 grid((unsigned)div_up(N, WIDE), (unsigned)div_up(M, WIDE));
    product_stages<<<grid, WIDE_THREADS, 0, stream>>>(at<bf16>(out), at<fp8>(a), at<fp8>(b),
                                                      1 / sqrtf((float)K), M, N, (int)K);
    launched("stages");
}

static void open_product(const long* shape) {
    M = shape[0], N = shape[1], K = shape[2];
    a = input("a", E4M3, M * K, 1.0f), b = input("b", E4M3, N * K, 1.0f);
    out = output("out", BF16, M * N, 1, 0.05);
    matmul(out->want, N, view(a->value, K, 1, FP32), view(b->value, K, 1, FP32), M, N, K,
           1 / sqrtf((float)K), 0, BF16);
    floor_flops = 2.0 * (double)M * (double)N * (double)K, floor_format = E4M3;
}
// FP32 sums in another order, or through HMMA, are the same BF16 value or its neighbour. Where tensor cores
// sum FP8 themselves they may align 32 products and the sum so far to the largest and keep about 14 bits,
// again for every 32 products: an error that grows as sqrt(K), 2^-11.2 of the norm at K = 768 and 2^-8.6 at
// 12288 in the emulator's model of it (EMU_FP8_SUMS=1). It shows most where a sum cancels: of four to nine
// million outputs the worst is off by 45 units at K = 768 and 65 at 3072, all of them by values near zero.
// sqrt(K) / 240 differ.
static void expect(int version) {
    const int own_sums = version == 0 || (version >= 3 && (this_card.sm < 90 || this_card.sm >= 120));
    out->units = own_sums ? 16 + 2 * sqrt((double)K) : 1;
    out->share = own_sums ? 0.02 + sqrt((double)K) / 128 : 0.05;
}

static const Version VERSIONS[] = {
    {"cuBLASLt, fast accumulation: the trainer's", run0, "", 89},
    {"a thread an output", run1, "product_value"},
    {"tiles of 64 x 64, a thread 4 x 4 outputs", run2, "product_patch"},
    {"tensor cores, fragments by 4-byte loads", run3, "product_gather", 89},
    {"128 x 128 x 64, ldmatrix, swizzle, 3 stages", run4, "product_stages", 89},
    {}};
static const Kernel KERNELS[] = {
    {"matmul fp8", "M N K", open_product, VERSIONS,
     {{16, 16, 16}, {80, 80, 48}, {144, 144, 272}, {80, 272, 208}},
     {{4096, 4096, 4096}, {16384, 3072, 768}}, 1, expect},
};
int main(int argc, char** argv) { return lab(argc, argv, "matmul_fp8", KERNELS); }
