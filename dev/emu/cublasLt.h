// cublasLt.h -- the part of cuBLASLt that a trainer uses, by train_us.c's matmul(): include it after that.
// It refuses what the library refuses on a Hopper GPU, with the reason on stderr, so what passes here is
// well formed there.
#pragma once
#include "cuda_fp8.h"
enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_EXECUTION_FAILED = 13,
        CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14, CUDA_R_8F_E4M3 = 28, CUDA_R_8F_E5M2 = 29 };
typedef cudaDataType_t cudaDataType;
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_FAST_TF32 = 77 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasLtMatmulDescAttributes_t { CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4,
    CUBLASLT_MATMUL_DESC_A_SCALE_POINTER = 17, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER = 18,
    CUBLASLT_MATMUL_DESC_FAST_ACCUM = 25 };
enum cublasLtMatmulPreferenceAttributes_t { CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES };
enum { CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };
struct emu_lt {                                      // a handle, descriptor, layout or preference
    int type, compute;
    int64_t rows, cols, ld;
    uint64_t set[32];                                // by attribute
    size_t size() const { return type == CUDA_R_32F ? 4 : type == CUDA_R_16BF ? 2 : 1; }
};
typedef emu_lt *cublasLtHandle_t, *cublasLtMatmulDesc_t, *cublasLtMatrixLayout_t, *cublasLtMatmulPreference_t;
enum cublasLtMatmulAlgoConfigAttributes_t { CUBLASLT_ALGO_CONFIG_TILE_ID = 1, CUBLASLT_ALGO_CONFIG_SPLITK_NUM,
    CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, CUBLASLT_ALGO_CONFIG_STAGES_ID = 6 };
enum cublasLtMatmulAlgoCapAttributes_t { CUBLASLT_ALGO_CAP_MIN_ALIGNMENT_A_BYTES = 16,
    CUBLASLT_ALGO_CAP_MIN_ALIGNMENT_B_BYTES, CUBLASLT_ALGO_CAP_MIN_ALIGNMENT_C_BYTES,
    CUBLASLT_ALGO_CAP_MIN_ALIGNMENT_D_BYTES };
struct cublasLtMatmulAlgo_t { uint64_t data[8]; };
struct cublasLtMatmulHeuristicResult_t { cublasLtMatmulAlgo_t algo; size_t workspaceSize;
        cublasStatus_t state; };

#define EMU_LT(NAME, ...) inline cublasStatus_t cublasLt##NAME { __VA_ARGS__; return CUBLAS_STATUS_SUCCESS; }
EMU_LT(Create(emu_lt **x), *x = new emu_lt())
EMU_LT(MatmulPreferenceCreate(emu_lt **x), *x = new emu_lt())
EMU_LT(MatmulDescCreate(emu_lt **x, cublasComputeType_t c, cudaDataType t),
        *x = new emu_lt{t, c, 0, 0, 0, {}})
EMU_LT(MatrixLayoutCreate(emu_lt **x, cudaDataType t, uint64_t rows, uint64_t cols, int64_t ld),
       *x = new emu_lt{t, 0, (int64_t)rows, (int64_t)cols, ld, {}})
EMU_LT(Destroy(emu_lt *x), delete x)
EMU_LT(MatmulPreferenceDestroy(emu_lt *x), delete x)
EMU_LT(MatmulDescDestroy(emu_lt *x), delete x)
EMU_LT(MatrixLayoutDestroy(emu_lt *x), delete x)
EMU_LT(MatmulPreferenceSetAttribute(emu_lt *x, cublasLtMatmulPreferenceAttributes_t a, const void *p,
                                    size_t n), memcpy(&x->set[a], p, n))
EMU_LT(MatmulDescSetAttribute(emu_lt *x, cublasLtMatmulDescAttributes_t a, const void *p, size_t n),
       memcpy(&x->set[a], p, n))

namespace emu {
enum { PROPOSALS = 3 };                              // ways to compute a product: by name only
struct Problem {                                     // column-major: D (m,n) = alpha A (m,k) B (k,n) + beta C
    emu_lt d, A, B, C, D;
    bool ta = d.set[CUBLASLT_MATMUL_DESC_TRANSA], tb = d.set[CUBLASLT_MATMUL_DESC_TRANSB];
    long m = D.rows, n = D.cols, k = ta ? A.rows : A.cols;
    const float *scales[2] = {(const float *)d.set[CUBLASLT_MATMUL_DESC_A_SCALE_POINTER],
                              (const float *)d.set[CUBLASLT_MATMUL_DESC_B_SCALE_POINTER]};
};
inline const char *refusal(const Problem &p) {       // why the library would not do it, or null
    const emu_lt &A = p.A, &B = p.B, &C = p.C, &D = p.D;
    cudaDeviceProp device;
    cudaGetDeviceProperties(&device, 0);
    if (p.m != (p.ta ? A.cols : A.rows) || p.n != (p.tb ? B.rows : B.cols) || p.k != (p.tb ? B.cols : B.rows)
        || C.rows != p.m || C.cols != p.n) return "the shapes do not fit together";
    for (auto *l : {&A, &B, &C, &D}) if (l->ld < l->rows) return "a leading dimension is too short";
    if (p.d.type != CUDA_R_32F || p.d.compute != CUBLAS_COMPUTE_32F) return "the compute type must be 32F";
    if (C.type != D.type || D.size() == 1) return "C and D must both be BF16 or both FP32";
    if (A.size() != B.size()) return "A and B are of different types";
    if (A.size() == 4 && D.size() != 4) return "FP32 inputs need an FP32 output";
    if (A.size() > 1) return p.scales[0] || p.scales[1] ? "scales are for FP8 inputs" : nullptr;
    if (device.major * 10 + device.minor < 89) return "FP8 needs compute capability 8.9 or higher";
    if (!p.ta || p.tb) return "FP8 needs A transposed and B not (TN)";
    if (A.type == CUDA_R_8F_E5M2 && B.type == CUDA_R_8F_E5M2) return "E5M2 x E5M2 does not exist";
    // The manual asks for less (K, leading dimensions, whole 16 bytes of D); reports of other rows or columns
    // disagree (CUDALibrarySamples #172, tensorflow #60110).
    if (p.m % 16 || p.n % 16 || p.k % 16 || A.ld % 16 || B.ld % 16 || C.ld % 16 || D.ld % 16)
        return "FP8 wants all dimensions in multiples of 16";
    return nullptr;
}
inline cublasStatus_t refuse(const char *why, const Problem &p) {
    EMU_SAY("cublasLt: %s (m %ld, n %ld, k %ld)", why, p.m, p.n, p.k);
    return CUBLAS_STATUS_NOT_SUPPORTED;
}
inline std::vector<float> decode(const void *p, const emu_lt &l) {   // tight, in the same order
    std::vector<float> values(l.rows * l.cols);
    const float *fp8 = fp8_values(l.type == CUDA_R_8F_E4M3 ? E4M3 : E5M2);
    float *to = values.data();
    for (long c = 0; c < l.cols; c++) for (long i = c * l.ld; i < c * l.ld + l.rows; i++)
        *to++ = l.size() == 4 ? ((const float *)p)[i] : l.size() == 2 ? (float)((const __nv_bfloat16 *)p)[i]
                                                                      : fp8[((const uint8_t *)p)[i]];
    return values;
}
// A sum as Hopper's FP8 tensor cores are reported to make it: 32 products and what is there already are
// aligned to the largest, cut after 13 bits of fraction and added; without fast accumulation only 128
// products at a time (DeepSeek-V3, arXiv 2412.19437, 3.3.2: about 14 bits). EMU_FP8_SUMS=13,128 asks for it;
// NVIDIA names neither number, so others can be tried (0: never promoted): the tests measure a card's.
struct Sums { int bits, promoted; };
inline bool short_sums(Sums &s) {
    const char *set = getenv("EMU_FP8_SUMS");
    if (!set) return false;
    if (sscanf(set, "%d,%d", &s.bits, &s.promoted) == 2 && s.bits > 0 && s.promoted % 32 == 0) return true;
    die("EMU_FP8_SUMS=%s: bits of fraction and products between promotions, such as 13,128", set);
}
inline float cut(double x, int exponent, int bits) {
    return (float)ldexp(trunc(ldexp(x, bits - exponent)), exponent - bits);
}
inline float tensor_core_sum(const float *x, const float *y, long k, int bits, int promoted) {
    float total = 0, sum = 0;
    for (long k0 = 0; k0 < k; k0 += 32) {
        int top = sum != 0 ? ilogbf(sum) : -200;
        for (long i = k0; i < k && i < k0 + 32; i++)
            if (x[i] * y[i] != 0) top = std::max(top, ilogbf(x[i]) + ilogbf(y[i]));
        double exact = cut(sum, top, bits);
        for (long i = k0; i < k && i < k0 + 32; i++) exact += cut((double)x[i] * y[i], top, bits);
        sum = exact != 0 ? cut(exact, ilogb(exact), bits) : 0;
        if (promoted && (k0 + 32) % promoted == 0) total += sum, sum = 0;
    }
    return total + sum;
}
inline void multiply(const Problem &p, float alpha, float beta, const void *A, const void *B, const void *C,
        void *D) {
    const std::vector<float> a = decode(A, p.A), b = decode(B, p.B);
    std::vector<float> d = beta != 0 ? decode(C, p.C) : std::vector<float>(p.m * p.n);
    for (float &x : d) x *= beta;
    for (const float *scale : p.scales) if (scale) alpha *= *scale;
    Sums sums;
    if (p.A.size() == 1 && short_sums(sums)) {
        if (p.d.set[CUBLASLT_MATMUL_DESC_FAST_ACCUM]) sums.promoted = 0;
        #pragma omp parallel for
        for (long j = 0; j < p.n; j++) for (long i = 0; i < p.m; i++)
            d[j * p.m + i] +=
                    alpha * tensor_core_sum(&a[i * p.k], &b[j * p.k], p.k, sums.bits, sums.promoted);
    } else for (long k0 = 0, k1; k0 < p.k; k0 = k1) {
        // With EMU_SPLIT_K a sum is made of pieces whose length depends on the shape: the library, too, may
        // add in another order for another shape.
        k1 = getenv("EMU_SPLIT_K") ? std::min(p.k, k0 + 1 + (p.m + p.n) % 7) : p.k;
        matmul(d.data(), p.m, // D^T = B^T A^T
               view(b.data() + k0 * (p.tb ? p.n : 1), p.tb ? 1 : p.k, p.tb ? p.n : 1, FP32),
               view(a.data() + k0 * (p.ta ? 1 : p.m), p.ta ? p.k : 1, p.ta ? 1 : p.m, FP32),
               p.n, p.m, k1 - k0, alpha, 1, FP32);
    }
    for (long j = 0; j < p.n; j++) for (long i = 0; i < p.m; i++)
        if (p.D.size() == 4) ((float *)D)[j * p.D.ld + i] = d[j * p.m + i];
        else ((__nv_bfloat16 *)D)[j * p.D.ld + i] = d[j * p.m + i];
}
} // namespace emu
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(emu_lt *, emu_lt *d, emu_lt *A, emu_lt *B, emu_lt *C,
        emu_lt *D,
        emu_lt *preference, int asked, cublasLtMatmulHeuristicResult_t *result, int *found) {
    const emu::Problem p = {*d, *A, *B, *C, *D};
    const char *why = emu::refusal(p);
    *found = why ? 0 : std::min(asked, (int)emu::PROPOSALS);
    if (why) return emu::refuse(why, p);
    // Takes it all
    const size_t bytes = preference ? preference->set[CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES] : 0;
    // What suits one problem does not suit another
    const uint64_t types = A->type << 16 | B->type << 8 | D->type;
    for (int i = 0; i < *found; i++)
        result[i] = {{{(uint64_t)p.m, (uint64_t)p.n, (uint64_t)p.k, types, bytes, (uint64_t)i}}, bytes,
                     CUBLAS_STATUS_SUCCESS};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmul(emu_lt *lt, emu_lt *d, const void *alpha, const void *A, emu_lt *la,
        const void *B, emu_lt *lb, const void *beta, const void *C, emu_lt *lc, void *D, emu_lt *ld,
        const cublasLtMatmulAlgo_t *algo, void *workspace, size_t bytes, cudaStream_t stream) {
    const emu::Problem p = {*d, *la, *lb, *lc, *ld};
    const float al = *(const float *)alpha, be = *(const float *)beta;
    cublasLtMatmulHeuristicResult_t mine;
    int n;
    if (auto status = cublasLtMatmulAlgoGetHeuristic(lt, d, la, lb, lc, ld, nullptr, 1, &mine, &n))
        return status;
    auto wrong = [](const void *q, const emu_lt &l) {
        return !emu::on_device(q, ((l.cols - 1) * l.ld + l.rows) * l.size()) || (uintptr_t)q % l.size();
    };
    const char *why = nullptr;
    if (algo && memcmp(algo, &mine.algo, 4 * sizeof(uint64_t))) why = "an algorithm of another problem";
    else if (algo && bytes < algo->data[4]) why = "the workspace is smaller than the algorithm was promised";
    else if (bytes && ((uintptr_t)workspace % 256 || !emu::on_device(workspace, bytes)))
        why = "the workspace is not in device memory aligned to 256 bytes";
    else if (wrong(A, p.A) || wrong(B, p.B) || wrong(D, p.D) || (be != 0 && wrong(C, p.C)))
        why = "an operand is not wholly in device memory, or not aligned";
    else if (p.A.size() == 1 && ((uintptr_t)A | (uintptr_t)B | (uintptr_t)C | (uintptr_t)D) % 16)
        why = "FP8 needs pointers aligned to 16 bytes";
    for (const float *s : p.scales) if (s && !emu::on_device(s, sizeof *s))
        why = "a scale is not in device memory";
    if (why) return emu::refuse(why, p);
    return emu::submit(stream, [=] { emu::multiply(p, al, be, A, B, C, D); }) ? CUBLAS_STATUS_EXECUTION_FAILED
                                                                             : CUBLAS_STATUS_SUCCESS;
}
// What is asked of an algorithm: here they have no tiles or stages, and all of them want 16 bytes.
inline size_t cublasLtGetVersion() { return 0; }
inline cublasStatus_t cublasLtMatmulAlgoCheck(emu_lt *lt, emu_lt *d, emu_lt *A, emu_lt *B, emu_lt *C,
        emu_lt *D, const cublasLtMatmulAlgo_t *algo, cublasLtMatmulHeuristicResult_t *result) {
    int n;
    const auto status = cublasLtMatmulAlgoGetHeuristic(lt, d, A, B, C, D, nullptr, 1, result, &n);
    const bool another = memcmp(algo, &result->algo, 4 * sizeof(uint64_t));
    return !status && another ? CUBLAS_STATUS_NOT_SUPPORTED : status;
}
inline cublasStatus_t emu_set(void *to, size_t bytes, size_t *written, uint32_t value) {
    memcpy(to, &value, *written = std::min(bytes, sizeof value));
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t *,
        cublasLtMatmulAlgoConfigAttributes_t, void *to, size_t n, size_t *written) {
    return emu_set(to, n, written, 0);
}
inline cublasStatus_t cublasLtMatmulAlgoCapGetAttribute(const cublasLtMatmulAlgo_t *,
        cublasLtMatmulAlgoCapAttributes_t, void *to, size_t n, size_t *written) {
    return emu_set(to, n, written, 16);
}
