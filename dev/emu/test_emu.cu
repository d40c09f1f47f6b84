// test_emu.cu -- checks the emulator: kernels of the kinds a transformer is made of against plain loops, the
// runtime and cuBLASLt calls around them, and planted bugs, each of which must be caught. `test_emu NAME`
// plants that one.
#define US_NO_MAIN
#include "train_us.c"
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cublasLt.h>
#include <string>
#include <vector>

typedef __nv_bfloat16 bf16;
enum Bug { NONE, NO_SYNC_REDUCE, NO_SYNC_TILE, NO_SYNCWARP, UNWRITTEN, OFF_BY_ONE, OFF_BY_ONE_SHARED,
        MISALIGNED,
           BEFORE_WAIT, NO_SYNC_AFTER_WAIT, TWO_BARRIERS, LEFT_BARRIER, SHUFFLE_OUTSIDE, SHUFFLE_GONE,
           SHUFFLE_SPLIT, HOST_POINTER, BLOCKS_RACE, HOST_TOUCHES, GLOBAL_STORE };
static int bug = NONE, passed, failed;
static void check(bool ok, const std::string &what) {
    printf("%-60s %s\n", what.c_str(), ok ? "ok" : "FAIL");
    (ok ? passed : failed)++;
}
#define CUDA(x) do { if (cudaError_t e_ = (x)) die("%s: %s", #x, cudaGetErrorString(e_)); } while (0)

// Device memory that lives to the end of a test. up() also rounds v to what T can hold.
static std::vector<void *> held;
template <class T> T *room(size_t n) {
    T *p;
    CUDA(cudaMalloc(&p, n * sizeof(T)));
    held.push_back(p);
    return p;
}
template <class T> T *up(std::vector<float> &v) {
    std::vector<T> values(v.size());
    for (size_t i = 0; i < v.size(); i++) v[i] = (float)(values[i] = (T)v[i]);
    T *p = room<T>(v.size());
    CUDA(cudaMemcpy(p, values.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}
template <class T> std::vector<float> down(const T *p, size_t n) {
    std::vector<T> values(n);
    CUDA(cudaMemcpy(values.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    std::vector<float> v(n);
    for (size_t i = 0; i < n; i++) v[i] = (float)values[i];
    return v;
}
static std::vector<float> numbers(size_t n, float scale) {
    static uint64_t stream;
    std::vector<float> v(n);
    stream++;
    for (size_t i = 0; i < n; i++) v[i] = scale * (float)(2 * random_uniform(1, stream, i) - 1);
    return v;
}
static bool near(float got, double want, double limit) { return fabs(got - want) <= limit * (1 + fabs(want));
        }

// ---- Reductions: shuffles, a block sum, a template that launches a template -----------------------------
__device__ static float sum_warp(float v) {
    for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(0xffffffff, v, o);
    return v;
}
__device__ static float sum_block(float v, int bug) {
    __shared__ float parts[32];
    const int lane = threadIdx.x % 32;
    v = sum_warp(v);
    if (lane == 0) parts[threadIdx.x / 32] = v;
    if (bug != NO_SYNC_REDUCE) __syncthreads();
    v = sum_warp(lane < (int)blockDim.x / 32 ? parts[lane] : 0);
    __syncthreads();
    return v;
}
template <class T, int THREADS> static __global__ void __launch_bounds__(THREADS)
normalize(T *out, float *mean, const T *x, int C, int bug) {
    const T *row = x + blockIdx.x * C;
    float s = 0, v = 0;
    for (int i = threadIdx.x; i < C; i += THREADS) s += (float)row[i];
    const float m = sum_block(s, bug) / C;
    for (int i = threadIdx.x; i < C; i += THREADS) v += ((float)row[i] - m) * ((float)row[i] - m);
    const float r = rsqrtf(sum_block(v, bug) / C + 1e-5f);
    const int end = C + (bug == OFF_BY_ONE && blockIdx.x + 1 == gridDim.x);
    for (int i = threadIdx.x; i < end; i += THREADS)
        out[blockIdx.x * C + i] = (T)((i < C ? (float)row[i] - m : 0) * r);
    if (threadIdx.x == 0 && !(bug == UNWRITTEN && blockIdx.x == 3)) mean[blockIdx.x] = m;
}
template <class T> static void test_reduction(const char *type, double limit) {
    const int N = 9, C = 320;
    std::vector<float> x = numbers(N * C, 3);
    T *dx = up<T>(x), *out = room<T>(N * C);
    float *mean = room<float>(N);
    normalize<T, 128><<<N, 128>>>(bug == HOST_POINTER ? (T *)x.data() : out, mean, dx, C, bug);
    CUDA(cudaGetLastError());
    if (bug == HOST_TOUCHES) mean[0] = 0;
    std::vector<float> got = down(out, N * C), means = down(mean, N);
    bool ok = true;
    for (int n = 0; n < N; n++) {
        double m = 0, v = 0;
        for (int i = 0; i < C; i++) m += (double)x[n * C + i] / C;
        for (int i = 0; i < C; i++) v += (x[n * C + i] - m) * (x[n * C + i] - m) / C;
        ok = ok && near(means[n], m, 1e-5);
        for (int i = n * C; i < (n + 1) * C; i++) ok = ok && near(got[i], (x[i] - m) / sqrt(v + 1e-5), limit);
    }
    check(ok, form("normalize rows, %s", type));
}

// ---- Transposes through shared memory, sixteen bytes at a time, arguments in a struct -------------------
template <class T> struct alignas(16) Pack { T v[16 / sizeof(T)]; };
struct Dest { uint8_t *outT; int R, C; };
static __global__ void cast_transpose(Dest to, const bf16 *in, int bug) {       // (R,C) -> (C,R), E4M3
    extern __shared__ __align__(16) uint8_t bytes[];                      // 64 x 80: rows of the output
    const int r0 = blockIdx.y * 64, c0 = blockIdx.x * 64;
    for (int i = threadIdx.x; i < 64 * 8; i += blockDim.x) {
        const int r = i / 8, c = i % 8 * 8;
        const Pack<bf16> p = *(const Pack<bf16> *)(in + (r0 + r) * to.C + c0 + c);
        for (int k = 0; k < 8; k++)
            bytes[(c + k) * 80 + r + (bug == OFF_BY_ONE_SHARED ? 17 : 0)] =
                __nv_cvt_float_to_fp8((float)p.v[k], __NV_SATFINITE, __NV_E4M3);
    }
    if (bug != NO_SYNC_TILE) __syncthreads();
    for (int i = threadIdx.x; i < 64 * 4; i += blockDim.x) {
        const int c = i / 4, r = i % 4 * 16;
        const uint4 *from = (const uint4 *)&bytes[c * 80 + r + (bug == MISALIGNED)];
        *(uint4 *)(to.outT + (c0 + c) * to.R + r0 + r) = *from;
    }
}
// 32 x 32, by one warp: no block barrier
static __global__ void warp_transpose(float *out, const float *in, int bug) {
    __shared__ float tile[32][33];
    for (int r = 0; r < 32; r++) tile[r][threadIdx.x] = in[r * 32 + threadIdx.x];
    if (bug != NO_SYNCWARP) __syncwarp();
    for (int r = 0; r < 32; r++) out[r * 32 + threadIdx.x] = tile[threadIdx.x][r];
}
static void test_transposes() {
    const int R = 128, C = 192;
    std::vector<float> x = numbers(R * C, 500), y = numbers(1024, 1);
    const bf16 *dx = up<bf16>(x);
    __nv_fp8_e4m3 *outT = room<__nv_fp8_e4m3>(C * R);
    cast_transpose<<<dim3(C / 64, R / 64), 128, 64 * 80>>>(Dest{(uint8_t *)outT, R, C}, dx, bug);
    CUDA(cudaGetLastError());
    std::vector<float> got = down(outT, C * R);
    bool ok = true;
    for (int r = 0; r < R; r++) for (int c = 0; c < C; c++)
        ok = ok && got[c * R + r] == round_fp8(x[r * C + c], E4M3);
    check(ok, "cast and transpose");
    float *dy = up<float>(y), *dyT = room<float>(1024);
    warp_transpose<<<1, 32>>>(dyT, dy, bug);
    CUDA(cudaGetLastError());
    got = down(dyT, 1024);
    ok = true;
    for (int i = 0; i < 1024; i++) ok = ok && got[i % 32 * 32 + i / 32] == y[i];
    check(ok, "transpose by one warp");
}

// ---- Tensor cores ---------------------------------------------------------------------------------------
#ifdef __CUDACC__
#define ADDRESS(p) ((unsigned)__cvta_generic_to_shared(p))
__device__ static void cp_async(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(ADDRESS(to)), "l"(from));
}
__device__ static void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ static void cp_async_wait(int groups) {
    if (groups) asm volatile("cp.async.wait_group 1;" ::: "memory");
    else asm volatile("cp.async.wait_group 0;" ::: "memory");
}
__device__ static void ldmatrix(uint32_t (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(ADDRESS(row)));
}
#define LDMATRIX4(TRANS) asm volatile( \
    "ldmatrix.sync.aligned.m8n8.x4" TRANS ".shared.b16 {%0,%1,%2,%3}, [%4];" \
    : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(ADDRESS(row)))
__device__ static void ldmatrix(uint32_t (&r)[4], const void *row, bool trans = false) {
    if (trans) LDMATRIX4(".trans");
    else LDMATRIX4("");
}
#define MMA(SHAPE_AND_TYPES) asm volatile("mma.sync.aligned." SHAPE_AND_TYPES \
    " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
__device__ static void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
__device__ static void mma_fp8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Format fa,
        Format) {
    if (fa == E5M2) MMA("m16n8k32.row.col.f32.e5m2.e4m3.f32");
    else MMA("m16n8k32.row.col.f32.e4m3.e4m3.f32");
}
#else
using namespace emu;                                 // has each of these
#endif

// D (M,N) = A (M,K) B: B is (N,K) or, with KN, (K,N). Tiles of 64 x 64 x 32 arrive while the last are used.
template <bool KN> static __global__ void __launch_bounds__(128) gemm_bf16(float *D, const bf16 *A,
        const bf16 *B, int N,
                                                                    int K, int bug) {
    __shared__ __align__(16) bf16 As[2][64][40];
    __shared__ __align__(16) bf16 Bs[2][KN ? 32 : 64][KN ? 72 : 40];
    const int m0 = blockIdx.y * 64, n0 = blockIdx.x * 64, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto fetch = [&](int stage, int k0) {
        for (int i = threadIdx.x; i < 256; i += 128) {
            cp_async(&As[stage][i / 4][i % 4 * 8], A + (m0 + i / 4) * K + k0 + i % 4 * 8);
            if (KN) cp_async(&Bs[stage][i / 8][i % 8 * 8], B + (k0 + i / 8) * N + n0 + i % 8 * 8);
            else cp_async(&Bs[stage][i / 4][i % 4 * 8], B + (n0 + i / 4) * K + k0 + i % 4 * 8);
        }
        cp_async_commit();
    };
    float d[8][4] = {};
    fetch(0, 0);
    for (int k0 = 0, stage = 0; k0 < K; k0 += 32, stage ^= 1) {
        if (k0 + 32 < K) { fetch(stage ^ 1, k0 + 32); cp_async_wait(1); }
        else if (bug != BEFORE_WAIT) cp_async_wait(0);
        if (bug != NO_SYNC_AFTER_WAIT) __syncthreads();
        for (int k = 0; k < 32; k += 16) {
            uint32_t a[4], b[2], b4[4];
            ldmatrix(a, &As[stage][warp * 16 + lane % 16][k + lane / 16 * 8]);
            for (int j = 0; j < 8; j++) {
                if (!KN) ldmatrix(b, &Bs[stage][j * 8 + lane % 8][k + lane / 8 % 2 * 8]);
                else if (j % 2 == 0) {               // four matrices at once: this column tile and the next
                    ldmatrix(b4, &Bs[stage][k + lane % 16][j * 8 + lane / 16 * 8], true);
                    b[0] = b4[0]; b[1] = b4[1];
                } else { b[0] = b4[2]; b[1] = b4[3]; }
                mma_bf16(d[j], a, b);
            }
        }
        __syncthreads();
    }
    const int row = m0 + warp * 16 + lane / 4, col = n0 + lane % 4 * 2;
    for (int j = 0; j < 8; j++) for (int h = 0; h < 2; h++)
        *(float2 *)&D[(row + 8 * h) * N + col + j * 8] = make_float2(d[j][2 * h], d[j][2 * h + 1]);
}
// D (M,N) = A (M,K) B (N,K)^T in FP8, one warp for 16 x 8, registers straight from memory
template <Format FA> static __global__ void gemm_fp8(float *D, const uint8_t *A, const uint8_t *B, int N,
        int K) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4, m0 = blockIdx.y * 16 + g, n0 = blockIdx.x * 8;
    float d[4] = {};
    for (int k = t * 4; k < K; k += 32) {
        uint32_t a[4], b[2];
        for (int r = 0; r < 4; r++) a[r] = *(const uint32_t *)&A[(m0 + r % 2 * 8) * K + k + r / 2 * 16];
        for (int r = 0; r < 2; r++) b[r] = *(const uint32_t *)&B[(n0 + g) * K + k + r * 16];
        mma_fp8(d, a, b, FA, E4M3);
    }
    for (int h = 0; h < 2; h++) *(float2 *)&D[(m0 + 8 * h) * N + n0 + t * 2] = make_float2(d[2 * h],
            d[2 * h + 1]);
}
// d(i,j) = sum over k of a(i,k) b(j,k), where (i, k) is i * row + k * col
static bool is_product(const std::vector<float> &d, const std::vector<float> &a, int ar, int ac,
                       const std::vector<float> &b, int br, int bc, int M, int N, int K, double limit) {
    bool ok = true;
    for (int i = 0; i < M; i++) for (int j = 0; j < N; j++) {
        double s = 0;
        for (int k = 0; k < K; k++) s += (double)a[i * ar + k * ac] * b[j * br + k * bc];
        ok = ok && near(d[i * N + j], s, limit);
    }
    return ok;
}
static void test_tensor_cores() {
    const int M = 128, N = 64, K = 96;
    std::vector<float> a = numbers(M * K, 1), b = numbers(N * K, 1), e = numbers(M * K, 4),
            w = numbers(N * K, 4), g = e;
    bf16 *da = up<bf16>(a), *db = up<bf16>(b);
    float *d = room<float>(M * N);
    gemm_bf16<false><<<dim3(N / 64, M / 64), 128>>>(d, da, db, N, K, bug);
    CUDA(cudaGetLastError());
    check(is_product(down(d, M * N), a, K, 1, b, K, 1, M, N, K, 1e-5), "mma bf16, ldmatrix, cp.async");
    gemm_bf16<true><<<dim3(N / 64, M / 64), 128>>>(d, da, db, N, K, bug);
    CUDA(cudaGetLastError());
    check(is_product(down(d, M * N), a, K, 1, b, 1, N, M, N, K, 1e-5), "mma bf16, ldmatrix.trans");
    const uint8_t *de = (uint8_t *)up<__nv_fp8_e4m3>(e), *dg = (uint8_t *)up<__nv_fp8_e5m2>(g);
    const uint8_t *dw = (uint8_t *)up<__nv_fp8_e4m3>(w);
    gemm_fp8<E4M3><<<dim3(N / 8, M / 16), 32>>>(d, de, dw, N, K);
    CUDA(cudaGetLastError());
    check(is_product(down(d, M * N), e, K, 1, w, K, 1, M, N, K, 1e-2), "mma e4m3 x e4m3");
    gemm_fp8<E5M2><<<dim3(N / 8, M / 16), 32>>>(d, dg, dw, N, K);
    CUDA(cudaGetLastError());
    check(is_product(down(d, M * N), g, K, 1, w, K, 1, M, N, K, 1e-2), "mma e5m2 x e4m3");
}

// ---- cuBLASLt -------------------------------------------------------------------------------------------
static cublasLtHandle_t lt;
static char *workspace;
struct Call {  // column-major: D (m,n) = A (m,k) B (k,n), or their transposes
    void *D; cudaDataType_t td;
    const void *A; cudaDataType_t ta; int transA;
    const void *B; cudaDataType_t tb; int transB;
    int m, n, k;
    const float *scale = nullptr;
    cudaStream_t stream = 0;
    int given = 1024, shift = 0, stale = 0;  // workspace: bytes, and how late it starts; stale: the last algo
    int proposal = 0;                        // of the eight that are asked for
};
static bool multiply_lt(const Call &c) {
    static cublasLtMatmulHeuristicResult_t result, last, proposals[8];
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t la, lb, ld;
    cublasLtMatmulPreference_t preference;
    int found = 0;
    const size_t promised = 1024;
    const float alpha = 1, beta = 0;
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &c.transA, sizeof c.transA);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &c.transB, sizeof c.transB);
    if (c.scale) cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &c.scale,
            sizeof c.scale);
    cublasLtMatrixLayoutCreate(&la, c.ta, c.transA ? c.k : c.m, c.transA ? c.m : c.k, c.transA ? c.k : c.m);
    cublasLtMatrixLayoutCreate(&lb, c.tb, c.transB ? c.n : c.k, c.transB ? c.k : c.n, c.transB ? c.n : c.k);
    cublasLtMatrixLayoutCreate(&ld, c.td, c.m, c.n, c.m);
    cublasLtMatmulPreferenceCreate(&preference);
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &promised, 8);
    cublasStatus_t s = cublasLtMatmulAlgoGetHeuristic(lt, desc, la, lb, ld, ld, preference, 8, proposals,
            &found);
    result = proposals[c.proposal];
    if (found <= c.proposal) s = CUBLAS_STATUS_NOT_SUPPORTED;
    if (s == CUBLAS_STATUS_SUCCESS)
        s = cublasLtMatmul(lt, desc, &alpha, c.A, la, c.B, lb, &beta, c.D, ld, c.D, ld,
                           c.stale ? &last.algo : &result.algo, workspace + c.shift, c.given, c.stream);
    last = result;
    cublasLtMatmulPreferenceDestroy(preference);
    for (cublasLtMatrixLayout_t l : {la, lb, ld}) cublasLtMatrixLayoutDestroy(l);
    cublasLtMatmulDescDestroy(desc);
    return s == CUBLAS_STATUS_SUCCESS;
}
static void test_cublas() {
    const int m = 48, n = 32, k = 64;
    std::vector<float> w = numbers(m * k, 2), x = numbers(n * k, 2), g = numbers(m * k, 2), two(1, 2);
    const float *scale = up<float>(two);
    const void *w8 = up<__nv_fp8_e4m3>(w), *x8 = up<__nv_fp8_e4m3>(x), *g8 = up<__nv_fp8_e5m2>(g);
    bf16 *y = room<bf16>(m * n);                     // w and x stay as E4M3 has them: BF16 and FP32 are exact
    float *f = room<float>(m * n), *w32 = up<float>(w), *x32 = up<float>(x);
    bf16 *w16 = up<bf16>(w), *x16 = up<bf16>(x);
    const Call fp8 = {y, CUDA_R_16BF, w8, CUDA_R_8F_E4M3, 1, x8, CUDA_R_8F_E4M3, 0, m, n, k};
    auto right = [&](const Call &c, const std::vector<float> &a, int ar, int ac, int br, int bc,
            double limit) {
        const bool done = multiply_lt(c);
        const std::vector<float> d = c.D == f ? down(f, m * n) : down(y, m * n);
        return done && is_product(d, x, br, bc, a, ar, ac, n, m, k, limit);
    };
    check(right(fp8, w, k, 1, k, 1, 1e-2), "cublasLt: e4m3 x e4m3 to bf16");
    check(right({f, CUDA_R_32F, g8, CUDA_R_8F_E5M2, 1, x8, CUDA_R_8F_E4M3, 0, m, n, k}, g, k, 1, k, 1, 1e-5),
          "cublasLt: e5m2 x e4m3 to fp32");
    check(right({y, CUDA_R_16BF, w16, CUDA_R_16BF, 0, x16, CUDA_R_16BF, 1, m, n, k}, w, 1, m, 1, n, 1e-2),
          "cublasLt: bf16, NT, to bf16");
    check(right({f, CUDA_R_32F, w32, CUDA_R_32F, 1, x32, CUDA_R_32F, 1, m, n, k}, w, k, 1, 1, n, 1e-5),
          "cublasLt: fp32, TT");
    Call c = fp8;
    c.proposal = 2;
    check(right(c, w, k, 1, k, 1, 1e-2), "cublasLt: the third proposal");
    for (float &v : w) v *= 2;
    c = fp8;
    c.scale = scale;
    check(right(c, w, k, 1, k, 1, 1e-2), "cublasLt: a scale in device memory");
    auto refused = [&](const char *what,
            const Call &c) { check(!multiply_lt(c), form("cublasLt refuses: %s", what)); };
    refused("NN in FP8", (c = fp8, c.transA = 0, c));
    refused("e5m2 x e5m2", (c = fp8, c.A = c.B = g8, c.ta = c.tb = CUDA_R_8F_E5M2, c));
    refused("K no multiple of 16", (c = fp8, c.k = 56, c));
    refused("m no multiple of 8", (c = fp8, c.m = 44, c));
    refused("a misaligned pointer", (c = fp8, c.m = 16, c.A = (const char *)w8 + 8, c));
    refused("FP32 in, BF16 out", {y, CUDA_R_16BF, w32, CUDA_R_32F, 1, x32, CUDA_R_32F, 0, m, n, k});
    refused("another problem's algorithm", (c = fp8, c.m = 32, c.stale = 1, c));
    refused("less workspace than promised", (c = fp8, c.given = 512, c));
    refused("a misaligned workspace", (c = fp8, c.shift = 16, c));
#ifndef __CUDACC__                                   // a GPU computes these, or they are errors later
    refused("m no multiple of 16", (c = fp8, c.m = 40, c));
    refused("n no multiple of 16", (c = fp8, c.n = 24, c));
    refused("more proposals than there are", (c = fp8, c.proposal = 3, c));
    refused("a scale on the host", (c = fp8, c.scale = &two[0], c));
    refused("an operand on the host", (c = fp8, c.A = w.data(), c));
    refused("D that ends too early", (c = fp8, c.n = 48, c.B = room<char>(48 * k), c));
    setenv("EMU_SM", "80", 1);
    refused("FP8 on sm_80", fp8);
    unsetenv("EMU_SM");
#endif
}

// ---- Graphs, and what the runtime refuses ---------------------------------------------------------------
static __global__ void add(float *x, float by, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += by;
}
static void test_graphs() {
    const int n = 1024;                              // x: 32 x 32
    float *x = room<float>(n), *y = room<float>(n), *pinned, ms = -1;
    CUDA(cudaMallocHost(&pinned, n * sizeof(float)));
    CUDA(cudaMemset(x, 0, n * sizeof(float)));
    cudaStream_t s;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t before, after;
    CUDA(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    CUDA(cudaEventCreate(&before));
    CUDA(cudaEventCreate(&after));
    CUDA(cudaStreamSynchronize(0));
    Call c = {y, CUDA_R_32F, x, CUDA_R_32F, 0, x, CUDA_R_32F, 1, 32, 32, 32};
    c.stream = s;
    CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeRelaxed));
    for (float by = 1; by <= 2; by++) {
        add<<<div_up(n, 256), 256, 0, s>>>(x, by, n);
        CUDA(cudaGetLastError());
    }
    const bool done = multiply_lt(c);                // 32 x 32: every element becomes 32 * 9 * 9
    CUDA(cudaMemset2DAsync(y, 128, 0x3f, 4, 32, s));   // the first column
    CUDA(cudaMemcpyAsync(pinned, y, n * sizeof(float), cudaMemcpyDeviceToHost, s));
    CUDA(cudaStreamEndCapture(s, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    CUDA(cudaGraphDestroy(graph));
    check(done && down(x, n)[0] == 0, "capture runs nothing");
    CUDA(cudaEventRecord(before, s));
    for (int i = 0; i < 3; i++) CUDA(cudaGraphLaunch(exec, s));
    CUDA(cudaEventRecord(after, s));
    CUDA(cudaStreamSynchronize(s));
    CUDA(cudaEventElapsedTime(&ms, before, after));
    check(down(x, n)[n - 1] == 9 && pinned[32] == bits_float(0x3f3f3f3f) && pinned[33] == 2592 && ms > 0,
            "graph replayed");
    CUDA(cudaGraphExecDestroy(exec));
    float *z = nullptr;
    CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
    check(cudaMalloc(&z, 4) != cudaSuccess && cudaStreamEndCapture(s, &graph) != cudaSuccess,
            "capture refuses cudaMalloc");
    cudaGetLastError();
    CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
    add<<<1, 32>>>(x, 1, 32);                        // without the stream: the classic mistake
    check(cudaGetLastError() == cudaErrorStreamCaptureImplicit, "capture refuses the default stream");
    cudaStreamEndCapture(s, &graph);
    cudaGetLastError();
    add<<<1, 2048>>>(x, 1, 1);
    check(cudaGetLastError() == cudaErrorInvalidConfiguration, "2048 threads are refused");
    cast_transpose<<<1, 32, 100 << 10>>>(Dest{}, nullptr, 0);
    check(cudaGetLastError() == cudaErrorInvalidValue, "100 KiB of shared memory are refused");
    for (int i = 0; i < 2; i++) add<<<1, 32>>>(x, 1, 32);
    check(cudaGetLastError() == cudaErrorNotPermitted, "a launch that nobody asks about is seen at the next");
#ifndef __SANITIZE_ADDRESS__
    float *small = nullptr;
    CUDA(cudaMalloc(&small, 4));
    add<<<1, 32>>>(small, 1e38f, 2);                  // 1 would be lost in what is there
    check(cudaGetLastError() == cudaSuccess && cudaFree(small) == cudaErrorInvalidValue,
            "what was written behind an allocation is seen when it is freed");
    cudaGetLastError();
#endif
    CUDA(cudaFuncSetAttribute(cast_transpose, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10));
    size_t room_left, total;
    CUDA(cudaMemGetInfo(&room_left, &total));
    check(cudaMalloc(&z, total + 1) == cudaErrorMemoryAllocation, "more memory than there is is refused");
    check(cudaMemcpy(pinned, x + n - 1, 8, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue,
            "a copy past the end too");
    cudaGetLastError();
    CUDA(cudaStreamDestroy(s));
    CUDA(cudaEventDestroy(before));
    CUDA(cudaEventDestroy(after));
    CUDA(cudaFreeHost(pinned));
}

// ---- Warp operations, barriers, atomics, and how they fail ----------------------------------------------
static __global__ void warp_operations(int *out, float *sum, int bug) {
    const int lane = threadIdx.x % 32;
    int r[8] = {__shfl_sync(0xffffffff, lane, 5, 8), __shfl_up_sync(0xffffffff, lane, 3),
                __shfl_down_sync(0xffffffff, lane, 3, 16), __shfl_xor_sync(0xffffffff, lane, 9, 16),
                (int)__ballot_sync(0xffffffff, lane % 3 == 0),
                __any_sync(0xffffffff, lane == 7) + 2 * __all_sync(0xffffffff, lane < 31), 0, 0};
    if (lane < 16) r[6] = __shfl_xor_sync(0x0000ffff, lane, bug == SHUFFLE_OUTSIDE ? 16 : 1);
    else r[7] = __shfl_xor_sync(0xffff0000, lane, 1);
    if (bug == SHUFFLE_GONE && lane == 31) return;
    if (bug == SHUFFLE_SPLIT && lane < 8) r[6] = __shfl_xor_sync(0xffffffff, r[6], 1);
    r[7] += __shfl_down_sync(0xffffffff, 0, 1);
    atomicAdd(sum, 0.5f);
    for (int i = 0; i < 8; i++) out[(blockIdx.x * blockDim.x + threadIdx.x) * 8 + i] = r[i];
}
static __global__ void barriers(int *counter, int bug) {
    __shared__ int here;
    __stwb(bug == GLOBAL_STORE && threadIdx.x == 0 ? &here : counter + 1 + blockIdx.x * 128 + threadIdx.x, 1);
    if (bug == LEFT_BARRIER && threadIdx.x >= 64) return;
    if (bug == TWO_BARRIERS && threadIdx.x < 64) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    if (threadIdx.x != 0) return;
    if (bug == BLOCKS_RACE) *counter += 1;
    else atomicAdd(counter, 1);
}
static void test_warps() {
    int *out = room<int>(64 * 8), *counter = room<int>(1 + 10 * 128), count = 0, got[64 * 8];
    float *sum = room<float>(1);
    CUDA(cudaMemset(sum, 0, sizeof(float)));
    CUDA(cudaMemset(counter, 0, sizeof(int)));
    warp_operations<<<2, 32>>>(out, sum, bug);
    CUDA(cudaGetLastError());
    CUDA(cudaMemcpy(got, out, sizeof got, cudaMemcpyDeviceToHost));
    int wrong = 0;
    for (int t = 0; t < 64; t++) {
        const int l = t % 32, *r = &got[t * 8];
        wrong += r[0] != l / 8 * 8 + 5 || r[1] != (l < 3 ? l : l - 3) || r[2] != (l % 16 < 13 ? l + 3 : l);
        wrong += r[3] != (l ^ 9) || r[4] != 0x49249249 || r[5] != 1;
        wrong += r[6] != (l < 16 ? l ^ 1 : 0) || r[7] != (l < 16 ? 0 : l ^ 1);
    }
    check(wrong == 0 && down(sum, 1)[0] == 32, "shuffles, votes and atomics");
    barriers<<<10, 128>>>(counter, bug);
    CUDA(cudaGetLastError());
    CUDA(cudaMemcpy(&count, counter, sizeof count, cudaMemcpyDeviceToHost));
    check(count == 10, "blocks counted");
}
// ---- Planted bugs ---------------------------------------------------------------------------------------
// Each must be caught under one of the two orders, by the words given, where a build can see it.
#ifndef __CUDACC__
extern "C" void __asan_init() __attribute__((weak));               // there in the sanitized build
static const char *OVERRUN = __asan_init ? "AddressSanitizer: heap-buffer-overflow" : nullptr;
#ifdef __clang__                                     // it does not look at copies of structs
static const char *UNALIGNED = nullptr;
#else
static const char *UNALIGNED = OVERRUN ? "misaligned address" : nullptr;
#endif
// In the race build
static const char *RACE = note_access ? "race: " : nullptr, *ORDER = RACE ? RACE : "FAIL";
static const char *TOUCH = RACE ? "the host writes device memory" : nullptr;
static const struct { const char *name, *words; } BUGS[] = {      // as in enum Bug
    {"none", nullptr}, {"no_sync_reduce", ORDER}, {"no_sync_tile", ORDER}, {"no_syncwarp", ORDER},
            {"unwritten", "FAIL"},
    {"off_by_one", OVERRUN}, {"off_by_one_shared", OVERRUN}, {"misaligned", UNALIGNED},
            {"before_wait", "FAIL"},
    {"no_sync_after_wait", ORDER}, {"two_barriers", "other threads of the block wait at line"},
    {"left_barrier", "left the kernel"}, {"shuffle_outside", "not in mask 0000ffff"},
            {"shuffle_gone", "left the kernel"},
    {"shuffle_split", "the warp is split"}, {"host_pointer", "which is no device memory"},
            {"blocks_race", RACE},
    {"host_touches", TOUCH}, {"global_store", "it stores to global memory only"}};
static void test_bug(const char *self, int i) {
    std::string found;
    for (int seed = 0; seed < 2 && found.empty(); seed++) {
        FILE *f = popen(form("EMU_SEED=%d %s %s 2>&1", seed, self, BUGS[i].name), "r");
        char line[4096];
        while (f && fgets(line, sizeof line, f)) if (strstr(line, BUGS[i].words) && found.empty())
            found = line;
        if (!f || pclose(f) == 0) found = "";
    }
    check(!found.empty(), form("bug %s is caught", BUGS[i].name));
    printf("    %s", found.c_str());
}
#endif
int main(int argc, char **argv) {
    cublasLtCreate(&lt);
    CUDA(cudaMalloc(&workspace, 2048));
    void (*const tests[])() = {[] { test_reduction<float>("fp32", 1e-5); },
            [] { test_reduction<bf16>("bf16", 1e-2); },
                               test_transposes, test_tensor_cores, test_cublas, test_graphs, test_warps};
#ifndef __CUDACC__
    const int planted = sizeof BUGS / sizeof *BUGS;
    if (argc > 1) while (bug < planted && strcmp(argv[1], BUGS[bug].name)) bug++;
    if (argc == 1) for (int i = 1; i < planted; i++) if (BUGS[i].words) test_bug(argv[0], i);
#endif
    for (auto test : tests) {
        test();
        for (void *p : held) CUDA(cudaFree(p));
        held.clear();
    }
    CUDA(cudaFree(workspace));
    cublasLtDestroy(lt);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
