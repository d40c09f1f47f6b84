/*
train_us.cu: µnit Scaling on a GPU, the same program as train_us.c with its arithmetic in CUDA.

Everything that is not arithmetic (settings, data, checkpoints, random numbers, command line, log) is
train_us.c itself, which this file includes: a run started on one continues on the other. What is here: the
kernels, the matmuls through cuBLASLt, and the training step.

Data flow ([µS] 3, fig. 1). With static scaling no tensor is looked at before it is cast, so there is no cast
kernel: whoever computes a tensor also writes its FP8 codes, once row by row and once transposed, as the FP8
tensor cores want the summed dimension contiguous in both operands.

  value                        written by                     as (umup: gradients in E4M3, y and g in E5M2)
  stream x                     embedding, norm_forward        BF16, E4M3, E4M3 transposed
  attention output y           attention_forward              BF16, E4M3, E4M3 transposed
  activation g                 activation_forward             E4M3, E4M3 transposed (`up`'s output stays BF16)
  gradients at out, down       norm_backward                  E5M2, E5M2 transposed
  gradient at up               activation_backward            E5M2, E5M2 transposed
  gradient at qkv              attention_backward             E5M2, E5M2 transposed
  weights                      update                         FP32, E4M3, E4M3 transposed

Kernels are templates of one parameter, the stream's format S: bf16, or float for --precision fp32. No float
is ever added atomically: the same run gives the same bits.

  make train_us_cuda && ./train_us_cuda --input FILE       needs the CUDA Toolkit
  make train_us_emu && ./train_us_emu --input FILE         the same source on a CPU (dev/emu)
*/
#ifndef US_NO_MAIN
#define US_NO_MAIN  // train_us.c's
#define US_CUDA_MAIN
#endif
#include "train_us.c"
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cublasLt.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error compute capability 8.0 is needed; where no GPU is found, name one: add ARCH=sm_90 to make
#endif
#define US_CUDA        // for the tests: there is a GPU,
#define US_DEVICE GPU  // and this is it

typedef __nv_bfloat16 bf16;
typedef uint8_t fp8;  // the code of an E4M3 or E5M2 value

// ---- Errors -----------------------------------------------------------------------------------------------
// After one of these nothing on the card is to be trusted: no last words.
static void cuda_check(cudaError_t e, const char* what, const char* file, int line) {
    if (e == cudaSuccess) return;
    last_words = NULL;
    const char* hint = e == cudaErrorMemoryAllocation ? "; a smaller batch (or --recompute) needs less" : "";
    die("%s:%d: %s: %s%s", file, line, what, cudaGetErrorString(e), hint);
}
static void lt_check(cublasStatus_t s, const char* what, const char* file, int line) {
    if (s == CUBLAS_STATUS_SUCCESS) return;
    last_words = NULL;
    die("%s:%d: %s: cuBLAS status %d (is this toolkit's libcublasLt the one found?)", file, line, what, s);
}
#define CUDA(call) cuda_check(call, #call, __FILE__, __LINE__)
#define LT(call) lt_check(call, #call, __FILE__, __LINE__)
static int local_rank;  // among those on this machine: which of its cards is ours
// Our card, and its compute capability times ten. Where none can be used the driver's reason is printed, most
// often that it is older than the toolkit.
static int open_card(cudaDeviceProp* card, const char* instead) {
    int n = 0;
    const cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || n == 0) die("no GPU can be used (%s); %s", cudaGetErrorString(e), instead);
    if (n > 1 && local_rank >= n)
        die("for this rank there is no GPU: the machine has %d; start fewer (mpirun -np)", n);
    const int device = n > 1 ? local_rank : 0;  // a cluster may show each rank its own card alone
    CUDA(cudaSetDevice(device));
    CUDA(cudaGetDeviceProperties(card, device));
    return card->major * 10 + card->minor;
}

// After every launch: did it start? With a profile, an event is left behind to take the time from.
enum { PROFILE_MAX = 8192 };
typedef struct { int n; const char* name[PROFILE_MAX]; cudaEvent_t event[PROFILE_MAX]; } Profile;
static Profile* profile;
static cudaStream_t stream;  // all work is on this one
static void launched(const char* name) {
    cuda_check(cudaGetLastError(), name, __FILE__, __LINE__);
    if (!profile) return;
    if (profile->n == PROFILE_MAX) die("a profile has room for %d launches", PROFILE_MAX);
    if (!profile->event[profile->n]) CUDA(cudaEventCreate(&profile->event[profile->n]));
    CUDA(cudaEventRecord(profile->event[profile->n], stream));
    profile->name[profile->n++] = name;
}

// ---- Sixteen bytes at a time, and tiles -------------------------------------------------------------------
// As much as one load or store moves: 8 bf16 or 4 floats.
template <class S> struct alignas(16) Pack {
    enum { N = 16 / sizeof(S) };
    S v[16 / sizeof(S)];
};

static long padded(long N) { return div_up(N, 16) * 16; }  // as FP8 products want all their dimensions

// Where a kernel's result goes, each copy only where its pointer is set: the value itself, its FP8 code, and
// the codes transposed, which the matmul over the other dimension reads (FP8 tensor cores want K contiguous).
template <class S> struct Dest {
    S* out;         // (N,W)
    fp8 *q, *qt;    // (N,W), (W,Np): Np = padded(N)
    long W, Np;
    Format format;  // of q and qt
};

// Two values' codes, the first in the low byte. Cards before sm_89 have no instruction for it.
__device__ static inline uint32_t to_fp8x2(float x, float y, Format format) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
    return fp8_encode(x, format) | (uint32_t)fp8_encode(y, format) << 8;
#else
    const __nv_fp8_interpretation_t as = format == E4M3 ? __NV_E4M3 : __NV_E5M2;
    return __nv_cvt_float2_to_fp8x2(make_float2(x, y), __NV_SATFINITE, as);
#endif
}
// Values as 16-byte stores. (Told to store a Pack, nvcc may still store value by value.)
__device__ static inline void store_bits(void* p, uint4 bits) { __stwb((uint4*)p, bits); }
__device__ static inline void store_fp8(fp8* p, const float* v, Format format) {  // 16 of them
    uint32_t word[4];
    #pragma unroll
    for (int i = 0; i < 4; i++)
        word[i] = to_fp8x2(v[4 * i], v[4 * i + 1], format) |
                  to_fp8x2(v[4 * i + 2], v[4 * i + 3], format) << 16;
    store_bits(p, make_uint4(word[0], word[1], word[2], word[3]));
}
template <class S> __device__ static inline void store16(S* p, const float* v) {
    #pragma unroll
    for (int i = 0; i < 16; i += Pack<S>::N) {
        Pack<S> x;
        uint4 bits;
        #pragma unroll
        for (int k = 0; k < Pack<S>::N; k++) x.v[k] = (S)v[i + k];
        memcpy(&bits, &x, sizeof bits);
        store_bits(p + i, bits);
    }
}
template <class S> __device__ static inline void load16(float* v, const S* p) {
    #pragma unroll
    for (int i = 0; i < 16; i += Pack<S>::N) {
        const Pack<S> x = *(const Pack<S>*)(p + i);
        #pragma unroll
        for (int k = 0; k < Pack<S>::N; k++) v[i + k] = (float)x.v[k];
    }
}

// Most kernels work on tiles of TILE x TILE, a block of THREADS on each: four threads a row, 16 values a
// thread.
enum { TILE = 64, THREADS = 256 };

// Writes a tile that the block has put into shared memory, its value (r, c) at tile[r * stride + c], to rows
// row0 .. row0+rows-1 and columns col0 .. col0+cols-1 of d. cols, col0 and W are multiples of 16; rows and
// row0 are any. All threads of the block call it, between two __syncthreads of the caller's.
template <class S>
__device__ static void put_tile(Dest<S> d, const S* tile, int stride, long row0, long col0, int rows,
                                int cols) {
    const unsigned pieces = (unsigned)cols / 16, runs = (unsigned)(rows + 15) / 16;  // of a row, of a column
    float v[16];
    if (d.out || d.q)
        for (unsigned p = threadIdx.x; p < rows * pieces; p += blockDim.x) {
            const unsigned r = p / pieces, c = p % pieces * 16;
            const long at = (row0 + r) * d.W + col0 + c;
            #pragma unroll
            for (int i = 0; i < 16; i++) v[i] = (float)tile[r * stride + c + i];
            if (d.out) store16(d.out + at, v);
            if (d.q) store_fp8(d.q + at, v, d.format);
        }
    if (!d.qt) return;
    for (unsigned p = threadIdx.x; p < cols * runs; p += blockDim.x) {
        const unsigned c = p / runs, r = p % runs * 16;
        fp8* to = d.qt + (col0 + c) * d.Np + row0 + r;
        if (r + 16 <= (unsigned)rows && row0 % 16 == 0) {
            #pragma unroll
            for (int i = 0; i < 16; i++) v[i] = (float)tile[(r + i) * stride + c];
            store_fp8(to, v, d.format);
        } else {
            #pragma unroll 1
            for (unsigned i = r; i < (unsigned)rows && i < r + 16; i++, to++)
                *to = (fp8)to_fp8x2((float)tile[i * stride + c], 0.0f, d.format);
        }
    }
}

enum { STRIDE = TILE + 2 };  // of a tile in shared memory: neither rows nor columns fall on one bank
// The tile of the usual kernels: what of it lies within the first `rows` rows, and within d's columns.
template <class S>
__device__ static inline void put_tile(Dest<S> d, const S* tile, long row0, long col0, long rows) {
    put_tile(d, tile, STRIDE, row0, col0, (int)min(rows - row0, (long)TILE),
             (int)min(d.W - col0, (long)TILE));
}
__device__ static inline int tile_row(void) { return (int)threadIdx.x / 4; }
__device__ static inline int tile_col(void) { return (int)threadIdx.x % 4 * 16; }
template <class S> __device__ static inline void fill_tile(S* tile, const float* v) {
    for (int i = 0; i < 16; i++) tile[tile_row() * STRIDE + tile_col() + i] = (S)v[i];
}
template <class S> __device__ static inline float round_s(float x) { return (float)(S)x; }
__device__ static inline float quad_sum(float x) {  // over the four threads of a row
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
// The sum over a block, in every thread, in an order that depends on nothing but the number of threads.
template <class X> __device__ static inline X block_sum(X x, X* shared) {  // shared: 32 of them
    for (int i = 16; i; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int i = 0; i < (int)blockDim.x / 32; i++) x += shared[i];
    return x;
}
__device__ static inline float block_max(float x, float* shared) {
    for (int i = 16; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    for (int i = 0; i < (int)blockDim.x / 32; i++) x = fmaxf(x, shared[i]);
    return x;
}
static dim3 tiles(long rows, long cols) {
    return dim3((unsigned)div_up(cols, TILE), (unsigned)div_up(rows, TILE));
}

// ---- Embedding --------------------------------------------------------------------------------------------
// x = scale (wte[token] + wpe[position])
template <class S> static __global__ void __launch_bounds__(THREADS)
embedding_forward_kernel(Dest<S> x, const int* tokens, const S* wte, const S* wpe, float scale, long N,
                         long T, long C) {
    __shared__ S tile[TILE * STRIDE];
    const long n = (long)blockIdx.y * TILE + tile_row(), c = (long)blockIdx.x * TILE + tile_col();
    if (n < N && c < C) {
        float e[16], p[16];
        load16(e, wte + tokens[n] * C + c);
        load16(p, wpe + n % T * C + c);
        for (int i = 0; i < 16; i++) e[i] = (e[i] + p[i]) * scale;
        fill_tile(tile, e);
    }
    __syncthreads();
    const long row0 = (long)blockIdx.y * TILE, col0 = (long)blockIdx.x * TILE;
    put_tile(x, tile, row0, col0, N);
}

// On the host: order holds all rows, sorted by token; those of v are number starts[v] .. starts[v+1]-1.
static void sort_by_token(int* order, int* starts, const int* tokens, long N, long V) {  // (N), (V+1), (N)
    memset(starts, 0, sizeof(int) * (size_t)(V + 1));
    for (long n = 0; n < N; n++) starts[tokens[n]]++;
    for (long v = 0, before = 0; v <= V; v++) {  // of each token, where the next of its rows goes
        const int count = starts[v];
        starts[v] = (int)before, before += count;
    }
    for (long n = 0; n < N; n++) order[starts[tokens[n]]++] = (int)n;
    for (long v = V; v > 0; v--) starts[v] = starts[v - 1];  // each now stands at the next one's start
    starts[0] = 0;
}
// dwte[v] += scale * sum of dx over the rows whose token is v. A block a token; its threads are groups of
// C/16, the groups' sums are added in their order.
template <class S> static __global__ void __launch_bounds__(THREADS)
embedding_backward_kernel(float* dwte, const S* dx, const int* order, const int* starts, float scale,
                              long C) {
    __shared__ float sums[THREADS][17];
    const int first = starts[blockIdx.x], last = starts[blockIdx.x + 1],
              wide = (int)min((long)THREADS, C / 16);
    const int groups = THREADS / wide, group = (int)threadIdx.x / wide, lane = (int)threadIdx.x % wide;
    if (first == last) return;
    for (long c0 = 0; c0 < C; c0 += 16 * wide) {
        const long c = c0 + 16 * lane;
        float sum[16] = {0};
        if (group < groups && c < C)
            #pragma unroll 4
            for (int i = first + group; i < last; i += groups) {
                float v[16];
                load16(v, dx + order[i] * C + c);
                #pragma unroll
                for (int k = 0; k < 16; k++) sum[k] += scale * v[k];
            }
        __syncthreads();
        for (int k = 0; k < 16; k++) sums[threadIdx.x][k] = sum[k];
        __syncthreads();
        if (group == 0 && c < C)
            for (int k = 0; k < 16; k++) {
                float total = 0;
                for (int g = 0; g < groups; g++) total += sums[g * wide + lane][k];
                dwte[blockIdx.x * C + c + k] += total;
            }
    }
}
// dwpe[t] += scale * sum over the batch of dx[b][t]
template <class S> static __global__ void __launch_bounds__(THREADS)
position_backward_kernel(float* dwpe, const S* dx, float scale, long B, long T, long C) {
    const long at = ((long)blockIdx.x * THREADS + threadIdx.x) * 16;
    if (at >= T * C) return;
    float sum[16], v[16];
    load16(sum, dwpe + at);
    for (long b = 0; b < B; b++) {
        load16(v, dx + b * T * C + at);
        #pragma unroll
        for (int k = 0; k < 16; k++) sum[k] += scale * v[k];
    }
    store16(dwpe + at, sum);
}
template <class S>
static void launch_embedding_forward(Dest<S> x, const int* tokens, const S* wte, const S* wpe, float scale,
                                     long N, long T, long C) {
    embedding_forward_kernel<S><<<tiles(N, C), THREADS, 0, stream>>>(x, tokens, wte, wpe, scale, N, T, C);
    launched("embedding forward");
}
template <class S>
static void launch_embedding_backward(float* dwte, float* dwpe, const S* dx, const int* order,
                                      const int* starts, float scale, long B, long T, long C, long V) {
    embedding_backward_kernel<S><<<(unsigned)V, THREADS, 0, stream>>>(dwte, dx, order, starts, scale, C);
    launched("embedding backward");
    const unsigned blocks = (unsigned)div_up(T * C, 16 * THREADS);
    position_backward_kernel<S><<<blocks, THREADS, 0, stream>>>(dwpe, dx, scale, B, T, C);
    launched("embedding backward");
}

// ---- LayerNorm with the weighted residual -----------------------------------------------------------------
// out = a skip + b LN(x), LN(x) = (x - mean) rstd gain + bias ([µS] eq. 11); skip = NULL: b LN(x).
// With `add` x is first replaced by a x + b add and that is kept in `sum`: the residual sum of a scheme whose
// branches begin with their LayerNorm. A block has TILE rows, four threads a row.
template <class S> static __global__ void __launch_bounds__(THREADS)
norm_forward_kernel(Dest<S> out, float* mean, float* rstd, S* sum, const S* x, const S* add, const S* skip,
                    const float* gain, const float* bias, float a, float b, long N, long C) {
    __shared__ S tile[TILE * STRIDE];
    const long row0 = (long)blockIdx.x * TILE, n = row0 + tile_row();
    const bool live = n < N;
    float v[16], s = 0, square = 0;
    for (long c = tile_col(); c < C && live; c += TILE) {
        load16(v, x + n * C + c);
        if (add) {
            float w[16];
            load16(w, add + n * C + c);
            for (int i = 0; i < 16; i++) v[i] = round_s<S>(a * v[i] + b * w[i]);
            store16(sum + n * C + c, v);
        }
        for (int i = 0; i < 16; i++) s += v[i];
    }
    if (add) x = sum, b = 1.0f;
    const float mu = quad_sum(s) / (float)C;
    for (long c = tile_col(); c < C && live; c += TILE) {  // read again: a row is in the cache
        load16(v, x + n * C + c);
        for (int i = 0; i < 16; i++) square += (v[i] - mu) * (v[i] - mu);
    }
    const float rs = 1.0f / sqrtf(quad_sum(square) / (float)C + 1e-5f);
    if (live && tile_col() == 0) mean[n] = mu, rstd[n] = rs;
    for (long c0 = 0; c0 < C; c0 += TILE) {
        const long c = c0 + tile_col();
        if (live && c < C) {
            float g[16], h[16];
            load16(v, x + n * C + c);
            load16(g, gain + c);
            load16(h, bias + c);
            for (int i = 0; i < 16; i++) v[i] = b * ((v[i] - mu) * rs * g[i] + h[i]);
            if (skip) {
                load16(g, skip + n * C + c);
                for (int i = 0; i < 16; i++) v[i] += a * g[i];
            }
            fill_tile(tile, v);
        }
        __syncthreads();
        put_tile(out, tile, row0, c0, N);
        __syncthreads();
    }
}

// The two places of a LayerNorm in a branch differ in where the stream's gradient goes:
//   last        dx = a dskip + dout is the stream's gradient, kept in `sum`; out = LN'(b dx), into the branch
//   first       out = a dskip + LN'(dout), which is the stream's gradient and the next branch's too
// dskip = NULL: no such term. partial: what this block's rows add to dgain and dbias, 16 rows in one.
template <class S> static __global__ void __launch_bounds__(THREADS, sizeof(S) == 2 ? 3 : 2)
norm_backward_kernel(Dest<S> out, S* sum, float* partial, const S* dout, const S* dskip, const S* x,
                     const float* mean, const float* rstd, const float* gain, float a, float b, int last,
                     long N, long C) {                                          // partial (blocks, 4, 2, C)
    __shared__ S tile[TILE * STRIDE];
    __shared__ float columns[TILE * (TILE + 1)];
    const long row0 = (long)blockIdx.x * TILE, n = row0 + tile_row();
    const bool live = n < N;
    const float mu = live ? mean[n] : 0, rs = live ? rstd[n] : 0;
    float d[16], v[16], g[16], s1 = 0, s2 = 0;
    for (long c = tile_col(); c < C && live; c += TILE) {
        load16(d, dout + n * C + c);
        if (last && dskip) {
            load16(v, dskip + n * C + c);
            for (int i = 0; i < 16; i++) d[i] = round_s<S>(a * v[i] + d[i]);
            store16(sum + n * C + c, d);
        }
        load16(v, x + n * C + c);
        load16(g, gain + c);
        for (int i = 0; i < 16; i++) {
            s1 += b * d[i] * g[i];
            s2 += b * d[i] * g[i] * (v[i] - mu) * rs;
        }
    }
    if (last && dskip) dout = sum;
    s1 = quad_sum(s1) / (float)C;
    s2 = quad_sum(s2) / (float)C;
    for (long c0 = 0; c0 < C; c0 += TILE) {
        const long c = c0 + tile_col();
        float o[16];
        for (int i = 0; i < 16; i++) v[i] = d[i] = 0;
        if (live && c < C) {
            load16(d, dout + n * C + c);
            load16(v, x + n * C + c);
            load16(g, gain + c);
            for (int i = 0; i < 16; i++) {
                d[i] *= b;
                v[i] = (v[i] - mu) * rs;
                o[i] = rs * (d[i] * g[i] - s1 - v[i] * s2);
            }
            if (!last && dskip) {
                load16(g, dskip + n * C + c);
                for (int i = 0; i < 16; i++) o[i] += a * g[i];
            }
            fill_tile(tile, o);
        }
        for (int bias = 0; bias < 2; bias++) {
            for (int i = 0; i < 16; i++)
                columns[tile_row() * (TILE + 1) + tile_col() + i] = bias ? d[i] : d[i] * v[i];
            __syncthreads();
            const int col = (int)threadIdx.x % TILE, part = (int)threadIdx.x / TILE;
            float total = 0;
            for (int r = 0; r < 16; r++) total += columns[(16 * part + r) * (TILE + 1) + col];
            if (c0 + col < C) partial[(((long)blockIdx.x * 4 + part) * 2 + bias) * C + c0 + col] = total;
            if (!bias)
                put_tile(out, tile, row0, c0, N);
            __syncthreads();
        }
    }
}
// dgain, dbias += the sums of their partial rows. A block has 32 columns, eight threads a column.
static __global__ void __launch_bounds__(THREADS)
norm_parameters_kernel(float* dgain, float* dbias, const float* partial, long rows, long C) {
    __shared__ float sums[8][32];
    const long c = (long)blockIdx.x * 32 + threadIdx.x % 32;
    const int group = (int)threadIdx.x / 32;
    float sum = 0;
    #pragma unroll 16
    for (long r = group; r < rows && c < 2 * C; r += 8) sum += partial[r * 2 * C + c];
    sums[group][threadIdx.x % 32] = sum;
    __syncthreads();
    if (group || c >= 2 * C) return;
    for (int i = 1; i < 8; i++) sum += sums[i][threadIdx.x];
    if (c < C) dgain[c] += sum;
    else dbias[c - C] += sum;
}
template <class S>
static void launch_norm_forward(Dest<S> out, float* mean, float* rstd, S* sum, const S* x, const S* add,
                                const S* skip, const float* gain, const float* bias, float a, float b, long N,
                                long C) {
    norm_forward_kernel<S><<<(unsigned)div_up(N, TILE), THREADS, 0, stream>>>(out, mean, rstd, sum, x, add,
                                                                              skip, gain, bias, a, b, N, C);
    launched("norm forward");
}
template <class S>
static void launch_norm_backward(Dest<S> out, S* sum, float* dgain, float* dbias, float* partial,
                                 const S* dout, const S* dskip, const S* x, const float* mean,
                                 const float* rstd, const float* gain, float a, float b, int last, long N,
                                 long C) {
    const unsigned blocks = (unsigned)div_up(N, TILE);
    norm_backward_kernel<S><<<blocks, THREADS, 0, stream>>>(out, sum, partial, dout, dskip, x, mean, rstd,
                                                            gain, a, b, last, N, C);
    launched("norm backward");
    norm_parameters_kernel<<<(unsigned)div_up(2 * C, 32), THREADS, 0, stream>>>(dgain, dbias, partial,
                                                                                4 * blocks, C);
    launched("norm parameters");
}

// out = a x + b y, or a x where y is NULL: the gradient of the stream below all LayerNorms; and with a = 1
// the codes of a stream whose block is computed again.
template <class S> static __global__ void __launch_bounds__(THREADS)
weighted_sum_kernel(Dest<S> out, float a, const S* x, float b, const S* y, long N, long C) {
    __shared__ S tile[TILE * STRIDE];
    const long row0 = (long)blockIdx.y * TILE, col0 = (long)blockIdx.x * TILE;
    const long n = row0 + tile_row(), c = col0 + tile_col();
    if (n < N && c < C) {
        float v[16], w[16];
        load16(v, x + n * C + c);
        if (y) load16(w, y + n * C + c);
        for (int i = 0; i < 16; i++) v[i] = a * v[i] + (y ? b * w[i] : 0.0f);
        fill_tile(tile, v);
    }
    __syncthreads();
    put_tile(out, tile, row0, col0, N);
}
template <class S>
static void launch_weighted_sum(Dest<S> out, float a, const S* x, float b, const S* y, long N, long C) {
    weighted_sum_kernel<S><<<tiles(N, C), THREADS, 0, stream>>>(out, a, x, b, y, N, C);
    launched("weighted sum");
}

// ---- Activation -------------------------------------------------------------------------------------------
// g = b activation(a h), or with `dg` dh = dg * b activation'(a h), rounded as one product.
template <class S> static __global__ void __launch_bounds__(THREADS)
activation_kernel(Dest<S> out, const S* h, const S* dg, Activation kind, float a, float b, long N, long W) {
    __shared__ S tile[TILE * STRIDE];
    const long row0 = (long)blockIdx.y * TILE, col0 = (long)blockIdx.x * TILE;
    const long n = row0 + tile_row(), c = col0 + tile_col();
    if (n < N && c < W) {
        float v[16], d[16];
        load16(v, h + n * W + c);
        if (dg) {
            load16(d, dg + n * W + c);
            for (int i = 0; i < 16; i++) v[i] = d[i] * (b * activation_slope(a * v[i], kind));
        } else for (int i = 0; i < 16; i++) v[i] = b * activate(a * v[i], kind);
        fill_tile(tile, v);
    }
    __syncthreads();
    put_tile(out, tile, row0, col0, N);
}
template <class S>
static void launch_activation(Dest<S> out, const S* h, const S* dg, Activation kind, float in, float factor,
                              long N, long W) {
    activation_kernel<S><<<tiles(N, W), THREADS, 0, stream>>>(out, h, dg, kind, in, dg ? factor * in : factor,
                                                              N, W);
    launched(dg ? "activation backward" : "activation forward");
}

// ---- Attention --------------------------------------------------------------------------------------------
// FlashAttention-2 (Dao 2023, arXiv 2307.08691): no T x T matrix is ever stored. A block of threads keeps 64
// rows of one head on chip and walks over the tiles of the other side.
//   forward   S = Q K^T, P = softmax(scale S), Y = factor P V, with a running maximum and sum for the
//             softmax. It saves lse, the base-2 logarithm of the sum of e^(scale s), of each row of S.
//   backward  P = 2^(scale log2(e) s - lse), dV = factor P^T dY, dP = factor dY V^T, dQ = dS K, dK = dS^T Q
//             with dS = scale P (dP - delta) and delta = rowsum(P dP) = rowsum(dY Y). A pass whose blocks own
//             keys makes dK and dV, one whose blocks own queries makes dQ: seven matmuls where one pass needs
//             five, but no atomics, so the same bits in every run.
// In µS scale is 1 / sqrt(D) and factor 1.
// A row of qkv (B,T,3C) is all heads' Q, then K, then V; lse and delta are (B,H,T), FP32.
static const float LOG2E = 1.44269504f;

// ---- Attention on tensor cores: BF16, D = 32, 64 or 128
// 128 threads are 4 warps of 16 rows each. Tiles of the other side come by cp.async into two buffers: one
// fills while the other is in use. A row of a tile is D/8 chunks of 16 bytes, and chunk c of row r lies at
// place c ^ (r % 8): the eight rows that ldmatrix reads at once are in different banks (of D = 32, two rows
// fill all banks: c ^ (r / 2 % 4)). Loops over fragments have constant bounds: nvcc unrolls them and the
// arrays are registers (-Xptxas -v: no stack frame).
enum { MMA_THREADS = 128, ROWS = 64 };

// Each PTX instruction has one wrapper; without nvcc the emulator stands in for it.
// Copies BYTES (4 or 16) from global to shared memory in the background; zeros where not valid.
template <int BYTES> __device__ static inline void copy_async(void* shared, const void* global, bool valid) {
#ifdef __CUDACC__
    unsigned to = (unsigned)__cvta_generic_to_shared(shared), n = valid ? BYTES : 0;
    if (BYTES == 16)  // past L1, which gains nothing
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(global), "r"(n));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(to), "l"(global), "r"(n));
#else
    emu::cp_async(shared, global, BYTES, valid ? BYTES : 0);
#endif
}
// Waits for this thread's copies; others' may be read after the __syncthreads that follows.
__device__ static inline void copy_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
    emu::cp_async_commit();
    emu::cp_async_wait(0);
#endif
}
// Reads four 8 x 8 matrices; lane 8i + j gives the address of row j of matrix i. Lane 4g + t gets into r[i]
// the values 2t, 2t+1 of row g of matrix i or, transposed, of its column g.
template <bool TRANSPOSED> __device__ static inline void ldmatrix(uint32_t (&r)[4], const bf16* row) {
#ifdef __CUDACC__
    unsigned from = (unsigned)__cvta_generic_to_shared(row);
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from));
#else
    emu::ldmatrix(r, row, TRANSPOSED);
#endif
}
// d (16 x 8, FP32) += a (16 x 16) b (16 x 8), by a warp. Lane 4g + t holds
//   of d   d[0], d[1]: row g, columns 2t, 2t+1; d[2], d[3]: the same of row g+8
//   of a   a[0]: row g, columns 2t, 2t+1; a[1]: the same of row g+8; a[2], a[3]: as these, 8 columns on
//   of b   b0: column g, rows 2t, 2t+1; b1: 8 rows on
// so two neighbouring d, rounded to BF16, are an a: one product feeds the next without leaving the registers.
__device__ static inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    const uint32_t b[2] = {b0, b1};
    emu::mma_bf16(d, a, b);
#endif
}
__device__ static inline float exp2_fast(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}
__device__ static inline uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

// A tile is N rows of D values. Where its chunks are, and how it is copied: `left` rows, then zeros.
template <int D> __device__ static inline int chunk(int row, int c) {
    return row * D + (c ^ (D == 32 ? row / 2 & 3 : row & 7)) * 8;
}
template <int D, int N>
__device__ static inline void load_tile(bf16* to, const bf16* from, int stride, int left) {
    const int c = threadIdx.x % (D / 8);
    #pragma unroll
    for (int r = threadIdx.x / (D / 8); r < N; r += MMA_THREADS / (D / 8))
        copy_async<16>(to + chunk<D>(r, c), from + r * stride + c * 8, r < left);
}
// This warp's 16 rows of a tile of 64, as left operands.
template <int D> __device__ static inline void load_rows(uint32_t (&a)[D / 16][4], const bf16* tile) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
    for (int k = 0; k < D / 16; k++) ldmatrix<false>(a[k], tile + chunk<D>(row, 2 * k + lane / 16));
}
// s (16 x N) = a (16 x D) times the transpose of a tile (N x D).
template <int D, int N>
__device__ static inline void times_transposed(float (&s)[N / 8][4], const uint32_t (&a)[D / 16][4],
                                               const bf16* tile) {
    const int lane = threadIdx.x % 32;
    memset(s, 0, sizeof s);
    for (int k = 0; k < D / 16; k++)
        for (int j = 0; j < N / 8; j += 2) {
            uint32_t b[4];
            ldmatrix<false>(b, tile + chunk<D>(8 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            mma(s[j], a[k], b[0], b[1]);
            mma(s[j + 1], a[k], b[2], b[3]);
        }
}
// o (16 x D) += p (16 x N), rounded to BF16, times a tile (N x D).
template <int D, int N>
__device__ static inline void add_product(float (&o)[D / 8][4], const float (&p)[N / 8][4],
                                          const bf16* tile) {
    const int lane = threadIdx.x % 32;
    for (int k = 0; k < N / 8; k += 2) {
        const uint32_t a[4] = {pack_bf16(p[k][0], p[k][1]), pack_bf16(p[k][2], p[k][3]),
                               pack_bf16(p[k + 1][0], p[k + 1][1]), pack_bf16(p[k + 1][2], p[k + 1][3])};
        for (int j = 0; j < D / 8; j += 2) {
            uint32_t b[4];
            ldmatrix<true>(b, tile + chunk<D>(8 * k + lane % 16, j + lane / 16));
            mma(o[j], a, b[0], b[1]);
            mma(o[j + 1], a, b[2], b[3]);
        }
    }
}
// Hides from each query the keys after it. Rows are queries and columns keys, or the reverse.
template <int N>
__device__ static inline void hide(float (&s)[N / 8][4], int row0, int col0, bool rows_are_keys) {
    const int row = row0 + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, col = col0 + threadIdx.x % 4 * 2;
    for (int j = 0; j < N / 8; j++)
        for (int i = 0; i < 4; i++) {
            const int ahead = col + 8 * j + i % 2 - row - i / 2 * 8;
            if (rows_are_keys ? ahead < 0 : ahead > 0) s[j][i] = -INFINITY;
        }
}
// The online softmax: s becomes 2^(scale (s - max)), with o and sum brought to the new maximum. A lane has
// parts of two rows, as have its three neighbours; each sums its own columns.
template <int D, int N>
__device__ static inline void softmax_step(float (&s)[N / 8][4], float (&o)[D / 8][4], float (&max)[2],
                                           float (&sum)[2], float scale) {
    for (int h = 0; h < 2; h++) {
        float m = max[h];
        for (int j = 0; j < N / 8; j++) m = fmaxf(m, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
        for (int i = 1; i < 4; i *= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, i));
        const float shrink = exp2_fast((max[h] - m) * scale);
        max[h] = m;
        sum[h] *= shrink;
        for (int j = 0; j < D / 8; j++) o[j][2 * h] *= shrink, o[j][2 * h + 1] *= shrink;
        for (int j = 0; j < N / 8; j++)
            for (int i = 2 * h; i < 2 * h + 2; i++)
                sum[h] += s[j][i] = exp2_fast(s[j][i] * scale - m * scale);
    }
}
// The block's 64 x D result goes through shared memory to d, `left` rows of it: a lane's row g times low, its
// row g+8 times high.
template <int D>
__device__ static void put_rows(Dest<bf16> d, bf16* shared, const float (&o)[D / 8][4], float low, float high,
                                long row0, long col0, int left) {
    const int lane = threadIdx.x % 32, stride = D + 2;  // D/2 + 1 words: each row starts one bank further
    bf16* to = shared + (threadIdx.x / 32 * 16 + lane / 4) * stride + lane % 4 * 2;
    __syncthreads();  // all are done with what was there
    for (int j = 0; j < D / 8; j++) {
        *(uint32_t*)(to + 8 * j) = pack_bf16(o[j][0] * low, o[j][1] * low);
        *(uint32_t*)(to + 8 * j + 8 * stride) = pack_bf16(o[j][2] * high, o[j][3] * high);
    }
    __syncthreads();
    put_tile(d, shared, stride, row0, col0, min(left, (int)ROWS), D);
}

// y and lse of queries t0 .. T-1, t0 a multiple of ROWS; y is (B,T-t0,C). A block: 64 queries of one head,
// the last ones first, for they have most keys. Here scale has log2(e) in it. Shared: Q and two tiles each of
// K and V, 64 rows: 40 KB for D = 64, 80 KB for D = 128.
template <int D> static __global__ void __launch_bounds__(MMA_THREADS, D <= 64 ? 4 : 2)
attention_forward_mma(Dest<bf16> y, float* lse, const bf16* qkv, int t0, int T, long C, float scale,
                      float factor) {
    extern __shared__ __align__(16) bf16 shared[];
    enum { SIZE = ROWS * D };
    bf16 *Q = shared, *K = Q + SIZE, *V = K + 2 * SIZE;
    const int last = t0 / ROWS + gridDim.x - 1 - blockIdx.x, q0 = last * ROWS, lane = threadIdx.x % 32;
    const long b = blockIdx.z, h = blockIdx.y, stride = 3 * C;
    const bf16 *q = qkv + b * T * stride + h * D, *k = q + C, *v = k + C;
    uint32_t rows[D / 16][4];
    float o[D / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    load_tile<D, ROWS>(Q, q + q0 * stride, stride, T - q0);
    load_tile<D, ROWS>(K, k, stride, T);
    load_tile<D, ROWS>(V, v, stride, T);
    for (int j = 0; j <= last; j++) {
        copy_wait();
        __syncthreads();  // tile j is there, and nobody uses tile j-1 any more
        if (j == 0) load_rows<D>(rows, Q);
        if (j < last) {
            const long k0 = (j + 1) * ROWS, at = (j + 1) % 2 * SIZE;
            load_tile<D, ROWS>(K + at, k + k0 * stride, stride, T - k0);
        }
        float s[ROWS / 8][4];
        times_transposed<D, ROWS>(s, rows, K + j % 2 * SIZE);
        if (j < last) {  // only now: before the scores its addresses take more registers than there are
            const long k0 = (j + 1) * ROWS, at = (j + 1) % 2 * SIZE;
            load_tile<D, ROWS>(V + at, v + k0 * stride, stride, T - k0);
        }
        if (j == last) hide<ROWS>(s, q0, j * ROWS, false);
        softmax_step<D, ROWS>(s, o, max, sum, scale);
        add_product<D, ROWS>(o, s, V + j % 2 * SIZE);
    }
    for (int i = 0; i < 2; i++) {
        for (int n = 1; n < 4; n *= 2) sum[i] += __shfl_xor_sync(0xffffffff, sum[i], n);
        const long t = q0 + threadIdx.x / 32 * 16 + lane / 4 + 8 * i;
        if (lane % 4 == 0 && t < T) lse[(b * gridDim.y + h) * T + t] = max[i] * scale + log2f(sum[i]);
    }
    put_rows<D>(y, shared, o, factor / sum[0], factor / sum[1], b * (T - t0) + q0 - t0, h * D, T - q0);
}

// Backward's shared memory: two tiles of 64 rows that stay, and twice a step's two tiles and two rows of
// floats. 49 KB for D = 64, 64.5 KB for D = 128, whose narrower steps leave registers for the wider sums.
template <int D> struct Backward {
    enum { STEP = D <= 64 ? 64 : 32, SIZE = STEP * D };
    enum { BYTES = (2 * ROWS * D + 4 * SIZE) * sizeof(bf16) + 4 * STEP * sizeof(float) };
};

// dK and dV. A block: 64 keys of one head, over the queries from the first of these on. The scores are
// transposed, their rows are keys, so that P^T and dS^T, being left operands, stay in registers. Queries
// beyond T are zeros and add zeros.
template <int D> static __global__ void __launch_bounds__(MMA_THREADS, D <= 64 ? 3 : 2)
attention_backward_kv_mma(Dest<bf16> dqkv, const bf16* dy, const bf16* qkv, const float* lse,
                          const float* delta, int T, long C, float scale, float factor) {
    extern __shared__ __align__(16) bf16 shared[];
    enum { STEP = Backward<D>::STEP, SIZE = Backward<D>::SIZE };
    bf16 *K = shared, *V = K + ROWS * D, *Q = V + ROWS * D, *dY = Q + 2 * SIZE;
    float *L = (float*)(dY + 2 * SIZE), *E = L + 2 * STEP;  // lse and delta of the queries
    const int k0 = blockIdx.x * ROWS, steps = (T - k0 + STEP - 1) / STEP, col = threadIdx.x % 4 * 2;
    const long b = blockIdx.z, h = blockIdx.y, stride = 3 * C;
    const bf16 *q = qkv + b * T * stride + h * D, *k = q + C, *v = k + C;
    dy += b * T * C + h * D;
    lse += (b * gridDim.y + h) * T;
    delta += (b * gridDim.y + h) * T;
    auto load_step = [&](int j) {
        const long q0 = k0 + j * STEP, t = q0 + threadIdx.x, buffer = j % 2, at = buffer * STEP + threadIdx.x;
        load_tile<D, STEP>(Q + buffer * SIZE, q + q0 * stride, stride, T - q0);
        load_tile<D, STEP>(dY + buffer * SIZE, dy + q0 * C, C, T - q0);
        if (threadIdx.x >= STEP) return;
        copy_async<4>(L + at, lse + t, t < T);
        copy_async<4>(E + at, delta + t, t < T);
    };
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    load_tile<D, ROWS>(K, k + k0 * stride, stride, T - k0);
    load_tile<D, ROWS>(V, v + k0 * stride, stride, T - k0);
    load_step(0);
    for (int j = 0; j < steps; j++) {
        copy_wait();
        __syncthreads();  // as in forward
        if (j + 1 < steps) load_step(j + 1);
        const bf16 *Qj = Q + j % 2 * SIZE, *dYj = dY + j % 2 * SIZE;
        const float *Lj = L + j % 2 * STEP + col, *Ej = E + j % 2 * STEP + col;
        uint32_t rows[D / 16][4];  // read again in each step: there is no room to keep them
        float p[STEP / 8][4], ds[STEP / 8][4];
        load_rows<D>(rows, K);
        times_transposed<D, STEP>(p, rows, Qj);
        if (j * STEP < ROWS) hide<STEP>(p, k0, k0 + j * STEP, true);
        for (int n = 0; n < STEP / 8; n++)
            for (int i = 0; i < 4; i++)
                p[n][i] = exp2_fast(p[n][i] * (scale * LOG2E) - Lj[8 * n + i % 2]);
        add_product<D, STEP>(dv, p, dYj);
        load_rows<D>(rows, V);
        times_transposed<D, STEP>(ds, rows, dYj);
        for (int n = 0; n < STEP / 8; n++)
            for (int i = 0; i < 4; i++) ds[n][i] = p[n][i] * (factor * ds[n][i] - Ej[8 * n + i % 2]);
        add_product<D, STEP>(dk, ds, Qj);
    }
    put_rows<D>(dqkv, shared, dk, scale, scale, b * T + k0, C + h * D, T - k0);
    put_rows<D>(dqkv, shared, dv, factor, factor, b * T + k0, 2 * C + h * D, T - k0);
}

// dQ. A block: 64 queries of one head, over the keys up to the last of these.
template <int D> static __global__ void __launch_bounds__(MMA_THREADS, D <= 64 ? 3 : 2)
attention_backward_q_mma(Dest<bf16> dqkv, const bf16* dy, const bf16* qkv, const float* lse,
                         const float* delta, int T, long C, float scale, float factor) {
    extern __shared__ __align__(16) bf16 shared[];
    enum { STEP = Backward<D>::STEP, SIZE = Backward<D>::SIZE };
    bf16 *Q = shared, *dY = Q + ROWS * D, *K = dY + ROWS * D, *V = K + 2 * SIZE;
    const int q0 = (gridDim.x - 1 - blockIdx.x) * ROWS, steps = (min(q0 + ROWS, T) + STEP - 1) / STEP;
    const long b = blockIdx.z, h = blockIdx.y, stride = 3 * C;
    const bf16 *q = qkv + b * T * stride + h * D, *k = q + C, *v = k + C;
    auto load_step = [&](int j) {
        const long first = j * STEP, at = j % 2 * SIZE;
        load_tile<D, STEP>(K + at, k + first * stride, stride, T - first);
        load_tile<D, STEP>(V + at, v + first * stride, stride, T - first);
    };
    uint32_t q_rows[D / 16][4], dy_rows[D / 16][4];
    float dq[D / 8][4] = {}, L[2] = {}, E[2] = {};  // lse and delta of a lane's two rows
    load_tile<D, ROWS>(Q, q + q0 * stride, stride, T - q0);
    load_tile<D, ROWS>(dY, dy + (b * T + q0) * C + h * D, C, T - q0);
    load_step(0);
    for (int i = 0; i < 2; i++) {
        const long t = q0 + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i, row = b * gridDim.y + h;
        if (t < T) L[i] = lse[row * T + t], E[i] = delta[row * T + t];
    }
    for (int j = 0; j < steps; j++) {
        copy_wait();
        __syncthreads();  // as in forward
        if (j == 0) load_rows<D>(q_rows, Q), load_rows<D>(dy_rows, dY);
        if (j + 1 < steps) load_step(j + 1);
        const bf16 *Kj = K + j % 2 * SIZE, *Vj = V + j % 2 * SIZE;
        float p[STEP / 8][4], ds[STEP / 8][4];
        times_transposed<D, STEP>(p, q_rows, Kj);
        if ((j + 1) * STEP > q0) hide<STEP>(p, q0, j * STEP, false);
        times_transposed<D, STEP>(ds, dy_rows, Vj);
        for (int n = 0; n < STEP / 8; n++)
            for (int i = 0; i < 4; i++)
                ds[n][i] = exp2_fast(p[n][i] * (scale * LOG2E) - L[i / 2]) * (factor * ds[n][i] - E[i / 2]);
        add_product<D, STEP>(dq, ds, Kj);
    }
    put_rows<D>(dqkv, shared, dq, scale, scale, b * T + q0, h * D, T - q0);
}

// ---- Attention, plain: FP32, and other head sizes
// A block is one warp and makes one row, of which lane l has the values l, l + 32, and so on. No tensor cores
// and no shared memory: to be read and compared with, not to be fast. It rounds as train_us.c does.
enum { ATTENTION_MAX_D = 512, LANE_D = ATTENTION_MAX_D / 32 };

template <class S> __device__ static float warp_dot(const S* a, const S* b, int D) {
    float sum = 0.0f;
    for (int d = threadIdx.x % 32; d < D; d += 32) sum += (float)a[d] * (float)b[d];
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffff, sum, i);
    return sum;
}
template <class S>
__device__ static void add_row(float (&to)[LANE_D], float factor, const S* row, int D) {
    for (int i = 0, d = threadIdx.x; i < LANE_D; i++, d += 32)
        if (d < D) to[i] += factor * (float)row[d];
}
template <class S>
__device__ static void put_row(Dest<S> to, long n, long col, const float (&x)[LANE_D], float factor,
                               int D) {
    for (int i = 0, d = threadIdx.x; i < LANE_D; i++, d += 32) {
        if (d >= D) continue;
        const S value = (S)(x[i] * factor);
        const fp8 code = (fp8)to_fp8x2((float)value, 0.0f, to.format);
        if (to.out) to.out[n * to.W + col + d] = value;
        if (to.q) to.q[n * to.W + col + d] = code;
        if (to.qt) to.qt[(col + d) * to.Np + n] = code;
    }
}

// y and lse of query t0 + blockIdx.x, as above. Here scale has log2(e) in it.
template <class S> static __global__ void __launch_bounds__(32)
attention_forward_plain(Dest<S> y, float* lse, const S* qkv, long t0, long T, int D, float scale,
                        float factor) {
    const long t = t0 + blockIdx.x, h = blockIdx.y, b = blockIdx.z, C = (long)gridDim.y * D, stride = 3 * C;
    const S *q = qkv + b * T * stride + h * D, *k = q + C, *v = k + C;
    float o[LANE_D] = {}, max = -INFINITY, sum = 0.0f;
    for (long j = 0; j <= t; j++) max = fmaxf(max, scale * warp_dot(q + t * stride, k + j * stride, D));
    for (long j = 0; j <= t; j++) {
        const float p = exp2f(scale * warp_dot(q + t * stride, k + j * stride, D) - max);
        add_row(o, (float)(S)p, v + j * stride, D);
        sum += p;
    }
    put_row(y, b * (T - t0) + t - t0, h * D, o, factor / sum, D);
    if (threadIdx.x == 0) lse[(b * gridDim.y + h) * T + t] = max + log2f(sum);
}

// dQ, dK and dV of position blockIdx.x: over the keys up to it, then over the queries from it on.
template <class S> static __global__ void __launch_bounds__(32)
attention_backward_plain(Dest<S> dqkv, const S* dy, const S* qkv, const float* lse,
                         const float* delta, long T, int D, float scale, float factor) {
    const long t = blockIdx.x, h = blockIdx.y, b = blockIdx.z, C = (long)gridDim.y * D, stride = 3 * C;
    const S *q = qkv + b * T * stride + h * D, *k = q + C, *v = k + C;
    dy += b * T * C + h * D;
    lse += (b * gridDim.y + h) * T;
    delta += (b * gridDim.y + h) * T;
    auto probability = [&](long i, long j) {  // of key j for query i
        return exp2f(scale * LOG2E * warp_dot(q + i * stride, k + j * stride, D) - lse[i]);
    };
    auto score_gradient = [&](long i, long j, float p) {
        return p * (factor * warp_dot(dy + i * C, v + j * stride, D) - delta[i]);
    };
    float dq[LANE_D] = {}, dk[LANE_D] = {}, dv[LANE_D] = {};
    for (long j = 0; j <= t; j++)
        add_row(dq, (float)(S)score_gradient(t, j, probability(t, j)), k + j * stride, D);
    for (long i = t; i < T; i++) {
        const float p = probability(i, t);
        add_row(dv, (float)(S)p, dy + i * C, D);
        add_row(dk, (float)(S)score_gradient(i, t, p), q + i * stride, D);
    }
    put_row(dqkv, b * T + t, h * D, dq, scale, D);
    put_row(dqkv, b * T + t, C + h * D, dk, scale, D);
    put_row(dqkv, b * T + t, 2 * C + h * D, dv, factor, D);
}

// delta = rowsum(dY Y) within each head: a warp for one head of one position.
template <class S>
static __global__ void attention_dot(float* delta, const S* dy, const S* y, long B, long T, long H, int D) {
    const long i = (blockIdx.x * (long)blockDim.x + threadIdx.x) / 32, n = i / H, h = i % H;
    if (n >= B * T) return;
    const float sum = warp_dot(dy + i * D, y + i * D, D);
    if (threadIdx.x % 32 == 0) delta[(n / T * H + h) * T + n % T] = sum;
}

// ---- Attention: the launches
template <int D>
static void forward_mma(Dest<bf16> y, float* lse, const bf16* qkv, float scale, float factor, long B, long t0,
                        long T, long C, cudaStream_t s) {
    const dim3 grid(div_up(T - t0, ROWS), C / D, B);
    const int bytes = 5 * ROWS * D * sizeof(bf16);
    CUDA(cudaFuncSetAttribute(attention_forward_mma<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    attention_forward_mma<D><<<grid, MMA_THREADS, bytes, s>>>(y, lse, qkv, t0, T, C, LOG2E * scale, factor);
    launched("attention forward");
}
template <int D>
static void backward_mma(Dest<bf16> dqkv, const bf16* dy, const bf16* qkv, const float* lse,
                         const float* delta, float scale, float factor, long B, long T, long C,
                         cudaStream_t s) {
    const dim3 grid(div_up(T, ROWS), C / D, B);
    const int bytes = Backward<D>::BYTES;
    const cudaFuncAttribute most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    CUDA(cudaFuncSetAttribute(attention_backward_kv_mma<D>, most, bytes));
    CUDA(cudaFuncSetAttribute(attention_backward_q_mma<D>, most, bytes));
    attention_backward_kv_mma<D><<<grid, MMA_THREADS, bytes, s>>>(dqkv, dy, qkv, lse, delta, T, C, scale,
                                                                 factor);
    launched("attention backward, dK and dV");
    attention_backward_q_mma<D><<<grid, MMA_THREADS, bytes, s>>>(dqkv, dy, qkv, lse, delta, T, C, scale,
                                                                factor);
    launched("attention backward, dQ");
}

// y (B,T-t0,C) and lse from qkv (B,T,3C): attention_forward of train_us.c.
template <class S>
static void attention_forward_gpu(Dest<S> y, float* lse, const S* qkv, float scale, float factor, long B,
                                  long t0, long T, long C, long H, cudaStream_t s) {
    const long D = C / H;
    if constexpr (sizeof(S) == sizeof(bf16)) {
        if (D == 32) return forward_mma<32>(y, lse, qkv, scale, factor, B, t0, T, C, s);
        if (D == 64) return forward_mma<64>(y, lse, qkv, scale, factor, B, t0, T, C, s);
        if (D == 128) return forward_mma<128>(y, lse, qkv, scale, factor, B, t0, T, C, s);
    }
    attention_forward_plain<S><<<dim3(T - t0, H, B), 32, 0, s>>>(y, lse, qkv, t0, T, D, LOG2E * scale,
                                                                 factor);
    launched("attention forward");
}

// dqkv from dy, y, qkv and lse: attention_backward of train_us.c. delta (B,H,T) is work space.
template <class S>
static void attention_backward_gpu(Dest<S> dqkv, float* delta, const S* dy, const S* y,
                                   const S* qkv, const float* lse, float scale, float factor, long B, long T,
                                   long C, long H, cudaStream_t s) {
    const long D = C / H;
    attention_dot<S><<<div_up(B * T * H, THREADS / 32), THREADS, 0, s>>>(delta, dy, y, B, T, H, D);
    launched("attention delta");
    if constexpr (sizeof(S) == sizeof(bf16)) {
        if (D == 32) return backward_mma<32>(dqkv, dy, qkv, lse, delta, scale, factor, B, T, C, s);
        if (D == 64) return backward_mma<64>(dqkv, dy, qkv, lse, delta, scale, factor, B, T, C, s);
        if (D == 128) return backward_mma<128>(dqkv, dy, qkv, lse, delta, scale, factor, B, T, C, s);
    }
    attention_backward_plain<S><<<dim3(T, H, B), 32, 0, s>>>(dqkv, dy, qkv, lse, delta, T, D, scale, factor);
    launched("attention backward");
}

// ---- Loss -------------------------------------------------------------------------------------------------
// Cross-entropy of a row of logits, a block a row; with want_gradient the logits become their own gradient,
// scale (softmax - onehot) and zero in the padded columns V..Vp-1 (NaN, if the row's sum is). See
// loss_forward_backward on scale. A loop has few instructions for each logit, for memory leaves time for few:
// e^x is a power of 2, the division is done once a row, and padded columns are read as -inf, which changes no
// maximum and whose power is 0.
template <class S> static __global__ void __launch_bounds__(1024)
loss_kernel(float* losses, S* logits, const int* targets, int want_gradient, float scale, int V, int Vp) {
    enum { P = Pack<S>::N };
    __shared__ float shared[32];
    S* z = logits + (long)blockIdx.x * Vp;
    const int target = targets[blockIdx.x], first = (int)threadIdx.x * P, step = (int)blockDim.x * P;
    float x[P], max = -FLT_MAX,
                sum = 0;  // sum of e^(z - max), as seen by this thread so far; max is never -inf
    auto read = [&](int v) {
        const Pack<S> p = *(const Pack<S>*)(z + v);
        for (int i = 0; i < P; i++) x[i] = (float)p.v[i];
        if (v + P > V)
            for (int i = 0; i < P; i++) if (v + i >= V) x[i] = -INFINITY;
    };
    for (int v = first; v < Vp; v += step) {
        float most = max;
        read(v);
        for (int i = 0; i < P; i++) most = fmaxf(most, x[i]);
        if (most > max) sum *= exp2_fast((max - most) * LOG2E);
        for (int i = 0; i < P; i++) sum += exp2_fast((x[i] - most) * LOG2E);
        max = most;
    }
    const float most = block_max(max, shared);
    sum = block_sum(max == most ? sum : sum * exp2_fast((max - most) * LOG2E), shared);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + most - (float)z[target];
    __syncthreads();  // the target's logit is read before anyone writes
    if (!want_gradient) return;
    const float factor = scale / sum;
    for (int v = first; v < Vp; v += step) {
        Pack<S> p;
        read(v);
        for (int i = 0; i < P; i++) x[i] = factor * exp2_fast((x[i] - most) * LOG2E);
        if (v <= target && target < v + P)
            for (int i = 0; i < P; i++) if (v + i == target) x[i] -= scale;
        for (int i = 0; i < P; i++) p.v[i] = (S)x[i];
        *(Pack<S>*)(z + v) = p;
    }
}
template <class S>
static void launch_loss(float* losses, S* logits, const int* targets, int want_gradient, float scale, long N,
                        long V, long Vp) {
    // As many as a block can have: two rows of 100 KB a processor are 26 MB of an H100's 50 MB of L2 cache,
    // in which the second reading finds them; four of 512 threads would be more than it holds.
    const int threads = (int)min_l(1024, div_up(Vp, 32 * Pack<S>::N) * 32);
    loss_kernel<S><<<(unsigned)N, threads, 0, stream>>>(losses, logits, targets, want_gradient, scale, (int)V,
                                                    (int)Vp);
    launched("loss");
}

// ---- What a step comes to ---------------------------------------------------------------------------------
// The one struct that goes back to the host each step.
typedef struct { double loss, norm2; int bad, stop; } Result;  // bad: first tensor not finite, or -1

static __global__ void __launch_bounds__(THREADS) add_loss_kernel(Result* r, const float* losses, long N) {
    __shared__ double shared[32];
    double sum = 0;
    for (long n = threadIdx.x; n < N; n += THREADS) sum += losses[n];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) r->loss += sum / (double)N;
}

// Parameters lie in memory by part (train_us.c: part_of): matrices, tables, vectors. Of several GPUs each
// holds the masters and moments of an equal share of each part, which may begin inside a tensor, or a row:
//   parameters   |m m m m m m|t t t t|v v|    of 2 ranks the second has  m m m, t t, v  in its memory, one
//   their ranks   0 0 0 1 1 1 0 0 1 1 0 1     after the other
// A Piece is what one rank holds of one tensor: n values, of the parameters (and gradients) from `first` on,
// of the rank's memory from `at` on; n <= 0: nothing. On one GPU that is all of it, and at = first.
typedef struct { long first, at, n; } Piece;
static int sharded(const Model* m) { return ranks > 1 && m->training; }
static int owners(const Model* m) { return sharded(m) ? ranks : 1; }  // of a part
static long part_begin(const Model* m, int part) { return part ? m->part_end[part - 1] : 0; }
static long share_of(const Model* m, int part) {
    return (m->part_end[part] - part_begin(m, part)) / owners(m);
}
static Piece piece_of(const Model* m, const Tensor* t, int of_rank) {  // of a tensor
    const int part = part_of(t), who = sharded(m) ? of_rank : 0;
    const long before = part_begin(m, part) / owners(m), share = share_of(m, part);
    const long begin = part_begin(m, part) + who * share, first = max_l(t->offset, begin);
    const long end = min_l(t->offset + t->rows * t->cols, begin + share);
    const Piece p = {first, before + first - begin, end - first};
    return p;
}

// Sums of squares of the gradients of our share, by chunks that never span two tensors.
enum { CHUNK = 65536 };
typedef struct { long offset, n; int tensor; double share; } Chunk;  // norm_share
static Chunk* chunks_of(const Model* m, int* count) {
    Chunk* chunks = (Chunk*)alloc(sizeof(Chunk) * ((double)m->num_params / CHUNK + m->num_tensors + 1));
    *count = 0;
    for (int i = 0; i < m->num_tensors; i++) {
        const Piece p = piece_of(m, &m->tensors[i], rank);
        for (long at = 0; at < p.n; at += CHUNK) {
            const Chunk k = {p.first + at, min_l(CHUNK, p.n - at), i, m->tensors[i].norm_share};
            chunks[(*count)++] = k;
        }
    }
    return chunks;
}
static __global__ void __launch_bounds__(THREADS)
norm_chunk_kernel(double* sums, const float* grads, const Chunk* chunks) {
    __shared__ double shared[32];
    const Chunk k = chunks[blockIdx.x];
    double sum = 0;
    for (long i = (long)threadIdx.x * 16; i < k.n; i += THREADS * 16) {
        float v[16], part = 0;
        load16(v, grads + k.offset + i);
        for (int j = 0; j < 16; j++) part += v[j] * v[j];
        sum += part;
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
static __global__ void __launch_bounds__(THREADS)
result_kernel(Result* r, const double* sums, const Chunk* chunks, int n) {
    __shared__ double shared[32];
    __shared__ int first[THREADS];
    double sum = 0;
    int bad = INT32_MAX;
    for (int i = (int)threadIdx.x; i < n; i += THREADS) {
        sum += sums[i] * chunks[i].share;
        if (!isfinite(sums[i])) bad = min(bad, chunks[i].tensor);
    }
    first[threadIdx.x] = bad;
    sum = block_sum(sum, shared);
    if (threadIdx.x) return;
    for (int i = 0; i < THREADS; i++) bad = min(bad, first[i]);
    r->norm2 = sum;
    r->bad = bad == INT32_MAX ? -1 : bad;
    r->stop = r->bad >= 0 || !isfinite(r->loss);
}
// What all ranks have found, added in their order: the same decision everywhere.
static __global__ void combine_kernel(Result* r, const Result* all, int n) {
    Result sum = {0, 0, INT32_MAX, 0};
    for (int i = 0; i < n; i++) {
        sum.loss += all[i].loss, sum.norm2 += all[i].norm2, sum.stop |= all[i].stop;
        if (all[i].bad >= 0) sum.bad = min(sum.bad, all[i].bad);
    }
    if (sum.bad == INT32_MAX) sum.bad = -1;
    *r = sum;
}
// The sum of squares of the gradients, and what is not finite, into r.
static void launch_gradient_norm(Result* r, double* sums, const float* grads, const Chunk* chunks, int n) {
    norm_chunk_kernel<<<(unsigned)n, THREADS, 0, stream>>>(sums, grads, chunks);
    launched("gradient norm");
    result_kernel<<<1, THREADS, 0, stream>>>(r, sums, chunks, n);
    launched("gradient norm");
}

// ---- Optimizer --------------------------------------------------------------------------------------------
// The 16 values from `at` on, after their step; rates = NULL: as they are.
__device__ static inline void take_step(float (&to)[16], long at, float* w, float* m, float* v,
                                        const float* g, const Rates* rates) {
    load16(to, w + at);
    if (!rates) return;
    float mt[16], vt[16], gt[16];
    const Rates r = *rates;
    load16(mt, m + at);
    load16(gt, g + at);
    if (v) load16(vt, v + at);
    for (int i = 0; i < 16; i++)
        to[i] = v ? adamw(to[i], &mt[i], &vt[i], gt[i], r) : lion(to[i], &mt[i], gt[i], r);
    store16(w + at, to);
    store16(m + at, mt);
    if (v) store16(v + at, vt);
}
// One step of a tensor (rows, cols), and the copies of it that the matmuls read. rates = NULL: only the
// copies. A step that is not finite changes nothing.
template <class S> static __global__ void __launch_bounds__(THREADS)
update_kernel(Dest<S> copy, float* w, float* m, float* v, const float* g, const Rates* rates,
              const Result* result, long rows, long cols) {
    __shared__ S tile[TILE * STRIDE];
    const long row0 = (long)blockIdx.y * TILE, col0 = (long)blockIdx.x * TILE;
    const long row = row0 + tile_row(), col = col0 + tile_col(), at = row * cols + col;
    if (rates && result->stop) return;
    if (row < rows && col < cols) {
        float wt[16];
        take_step(wt, at, w, m, v, g, rates);
        fill_tile(tile, wt);
    }
    if (!copy.out && !copy.q) return;  // the same for all threads
    __syncthreads();
    put_tile(copy, tile, row0, col0, rows);
}
template <class S>
static void launch_update(Dest<S> copy, float* w, float* m, float* v, const float* g, const Rates* rates,
                          const Result* result, long rows, long cols) {
    update_kernel<S><<<tiles(rows, cols), THREADS, 0, stream>>>(copy, w, m, v, g, rates, result, rows, cols);
    launched("update");
}

// One step of n values in a row, somewhere in a tensor, and their copy in its format.
template <class S> static __global__ void __launch_bounds__(THREADS)
update_piece_kernel(S* copy, fp8* codes, float* w, float* m, float* v, const float* g, const Rates* rates,
                    const Result* result, long n) {
    const long i = ((long)blockIdx.x * THREADS + threadIdx.x) * 16;
    if (i >= n || result->stop) return;
    float wt[16];
    take_step(wt, i, w, m, v, g, rates);
    if (codes) {
        for (int k = 0; k < 16; k++) wt[k] = round_s<S>(wt[k]);
        store_fp8(codes + i, wt, E4M3);
    } else store16(copy + i, wt);
}
template <class S>
static void launch_update_piece(S* copy, fp8* codes, float* w, float* m, float* v, const float* g,
                                const Rates* rates, const Result* result, long n) {
    update_piece_kernel<S><<<(unsigned)div_up(n, 16 * THREADS), THREADS, 0, stream>>>(copy, codes, w, m, v, g,
                                                                                      rates, result, n);
    launched("update");
}
// The transpose (cols, rows) of codes (rows, cols), both multiples of 16.
static __global__ void __launch_bounds__(THREADS)
transpose_kernel(fp8* out, const fp8* codes, long rows, long cols) {
    __shared__ __align__(16) fp8 tile[TILE * (TILE + 16)];
    const long row0 = (long)blockIdx.y * TILE, col0 = (long)blockIdx.x * TILE;
    const int r = tile_row(), c = tile_col(), stride = TILE + 16;
    if (row0 + r < rows && col0 + c < cols)
        *(uint4*)(tile + r * stride + c) = *(const uint4*)(codes + (row0 + r) * cols + col0 + c);
    __syncthreads();
    if (col0 + r >= cols || row0 + c >= rows) return;  // now r is a column, and c 16 rows
    Pack<fp8> column;
    uint4 bits;
    for (int i = 0; i < 16; i++) column.v[i] = tile[(c + i) * stride + r];
    memcpy(&bits, &column, sizeof bits);
    store_bits(out + (col0 + r) * rows + row0 + c, bits);
}

// ---- Unit-scale statistics --------------------------------------------------------------------------------
// As stat_record: of the BF16 values, and of what a cast to `format` would make of them. A block a part.
template <class S> static __global__ void __launch_bounds__(THREADS)
stat_kernel(StatSums* sums, const S* x, long n, int bf16_first, Format format) {
    __shared__ float shared[32];
    StatSums s = {0, 0, 0, 0, 0};
    for (long i = (long)blockIdx.x * THREADS + threadIdx.x; i < n; i += (long)gridDim.x * THREADS) {
        const float v = bf16_first ? round_bf16((float)x[i]) : (float)x[i], a = fabsf(v);
        const float cast = fabsf(format == E4M3   ? round_fp8(v, E4M3)
                                 : format == E5M2 ? round_fp8(v, E5M2)
                                                  : v);
        const float most = format == E4M3 ? 448.0f : format == E5M2 ? 57344.0f : FLT_MAX;
        s.square += v * v;
        s.max = a > s.max ? a : s.max;
        s.nonzero += a != 0.0f ? 1.0f : 0.0f;
        s.flushed += a != 0.0f && cast == 0.0f ? 1.0f : 0.0f;
        s.saturated += a > most ? 1.0f : 0.0f;
    }
    s.square = block_sum(s.square, shared);
    s.nonzero = block_sum(s.nonzero, shared);
    s.flushed = block_sum(s.flushed, shared);
    s.saturated = block_sum(s.saturated, shared);
    s.max = block_max(s.max, shared);
    if (threadIdx.x == 0) sums[blockIdx.x] = s;
}

// The BF16 values of FP8 codes, for cards whose tensor cores have no FP8.
static __global__ void __launch_bounds__(THREADS)
decode_kernel(bf16* out, const fp8* codes, Format format, long n) {
    const long i = (long)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) out[i] = (bf16)fp8_decode(codes[i], format);
}

static void launch_transpose(fp8* out, const fp8* codes, long rows, long cols) {
    transpose_kernel<<<tiles(rows, cols), THREADS, 0, stream>>>(out, codes, rows, cols);
    launched("transpose");
}

// ---- Matmul by cuBLASLt -----------------------------------------------------------------------------------
// As in train_us.c: out[i*ld + j] (+)= alpha * sum over k of a(i,k) b(j,k). An operand is stored with k
// contiguous or with i (j); FP8 has to have k contiguous in both, and has alpha as its only scale: no scale
// pointer is ever set ([µS] 3: that is the point).
typedef struct { const void* p; long ld; int k_contiguous; cudaDataType_t type; } Side;
typedef struct { long M, N, K, ld_a, ld_b, ld; int k_a, k_b, type_a, type_b, type, align, fast, add; } Shape;
typedef struct {
    Shape shape;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, out;
    cublasLtMatmulAlgo_t algo;
} Product;
static struct {
    cublasLtHandle_t handle;
    void* workspace;
    bf16* decoded[2];  // both operands of an FP8 product, on cards without FP8
    Product* products;
    int count, last;   // last: the product that gemm() did last
} lt;
enum { WORKSPACE = 32 << 20 };
static Side side(const void* p, long ld, int k_contiguous, cudaDataType_t type) {
    Side s = {p, ld, k_contiguous, type};
    return s;
}

static cudaDataType_t type_of(Format f) {
    return f == FP32 ? CUDA_R_32F : f == BF16 ? CUDA_R_16BF : f == E4M3 ? CUDA_R_8F_E4M3 : CUDA_R_8F_E5M2;
}
static long bytes_of(cudaDataType_t t) { return t == CUDA_R_32F ? 4 : t == CUDA_R_16BF ? 2 : 1; }
static const char* type_name(int t) {
    return t == CUDA_R_32F ? "FP32" : t == CUDA_R_16BF ? "BF16" : t == CUDA_R_8F_E4M3 ? "E4M3" : "E5M2";
}
static cublasLtMatrixLayout_t layout(int type, long contiguous, long other, long ld) {
    cublasLtMatrixLayout_t l;
    LT(cublasLtMatrixLayoutCreate(&l, (cudaDataType_t)type, (uint64_t)contiguous, (uint64_t)other, ld));
    return l;
}
// How cuBLASLt would compute p: its first `most` proposals, best guess first, and how many there are.
static cublasStatus_t proposals(const Product* p, cublasLtMatmulHeuristicResult_t* found, int most, int* n) {
    const Shape* s = &p->shape;
    const size_t workspace = WORKSPACE;
    const uint32_t align = (uint32_t)s->align;
    const uint32_t reduce = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;  // parts of a sum are added in FP32 only
    const cublasLtMatmulPreferenceAttributes_t aligned[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    cublasLtMatmulPreference_t preference;
    LT(cublasLtMatmulPreferenceCreate(&preference));
    LT(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                            sizeof workspace));
    LT(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduce,
                                            sizeof reduce));
    for (int i = 0; i < 4; i++)
        LT(cublasLtMatmulPreferenceSetAttribute(preference, aligned[i], &align, sizeof align));
    *n = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(lt.handle, p->operation, p->b, p->a, p->out,
                                                                 p->out, preference, most, found, n);
    LT(cublasLtMatmulPreferenceDestroy(preference));
    return status != CUBLAS_STATUS_SUCCESS ? status : *n ? found->state : CUBLAS_STATUS_NOT_SUPPORTED;
}
// cuBLASLt is column-major: what is row-major here is its transpose there, so a and b change places.
static void product_open(Product* p, const Shape* s) {
    p->shape = *s;
    const cublasOperation_t op_b = s->k_b ? CUBLAS_OP_T : CUBLAS_OP_N,
                            op_a = s->k_a ? CUBLAS_OP_N : CUBLAS_OP_T;
    const int8_t fast = (int8_t)s->fast;
    LT(cublasLtMatmulDescCreate(&p->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    LT(cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSA, &op_b, sizeof op_b));
    LT(cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSB, &op_a, sizeof op_a));
    LT(cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast));
    p->b = s->k_b ? layout(s->type_b, s->K, s->N, s->ld_b) : layout(s->type_b, s->N, s->K, s->ld_b);
    p->a = s->k_a ? layout(s->type_a, s->K, s->M, s->ld_a) : layout(s->type_a, s->M, s->K, s->ld_a);
    p->out = layout(s->type, s->N, s->M, s->ld);
}
static void product_close(const Product* p) {
    const cublasLtMatrixLayout_t layouts[] = {p->a, p->b, p->out};
    for (int k = 0; k < 3; k++) LT(cublasLtMatrixLayoutDestroy(layouts[k]));
    LT(cublasLtMatmulDescDestroy(p->operation));
}
// Each shape is asked for once.
static const Product* product_of(const Shape* s) {
    cublasLtMatmulHeuristicResult_t first;
    int n;
    for (int i = 0; i < lt.count; i++)
        if (memcmp(&lt.products[i].shape, s, sizeof *s) == 0) return &lt.products[i];
    lt.products = (Product*)realloc(lt.products, sizeof(Product) * (size_t)(lt.count + 1));
    if (!lt.products) die("out of memory");
    Product* p = &lt.products[lt.count++];
    product_open(p, s);
    const cublasStatus_t status = proposals(p, &first, 1, &n);
    if (status != CUBLAS_STATUS_SUCCESS)
        die("cuBLASLt cannot multiply (%ld,%ld) %s by (%ld,%ld) %s into %s (status %d); try --precision bf16",
            s->M, s->K, type_name(s->type_a), s->K, s->N, type_name(s->type_b), type_name(s->type),
            (int)status);
    p->algo = first.algo;
    return p;
}
// Set: shown every product that gemm() is asked for, which is not done.
static void (*instead)(const char* name, const Shape* s);

// FP32 out with add = 1 accumulates. fast: FP8 sums of about 14 bits, for outputs that are rounded to BF16.
static void gemm(const char* name, void* out, cudaDataType_t type, long ld, Side a, Side b, long M, long N,
                 long K, float alpha, int add, int fast) {
    Side* const sides[] = {&a, &b};
    const long rows[] = {a.k_contiguous ? M : K, b.k_contiguous ? N : K};
    for (int i = 0; i < 2; i++) {
        Side* s = sides[i];
        if (bytes_of(s->type) > 1 || !lt.decoded[0]) continue;
        const long n = rows[i] * s->ld;
        decode_kernel<<<(unsigned)div_up(n, THREADS), THREADS, 0, stream>>>(
            lt.decoded[i], (const fp8*)s->p, s->type == CUDA_R_8F_E4M3 ? E4M3 : E5M2, n);
        launched("decode");
        s->p = lt.decoded[i], s->type = CUDA_R_16BF;
    }
    const uintptr_t bits = (uintptr_t)a.p | (uintptr_t)b.p | (uintptr_t)out | 256;
    Shape s;
    memset(&s, 0, sizeof s);  // for memcmp: padding too
    s.M = M, s.N = N, s.K = K, s.ld_a = a.ld, s.ld_b = b.ld, s.ld = ld, s.add = add;
    s.k_a = a.k_contiguous, s.k_b = b.k_contiguous, s.type_a = a.type, s.type_b = b.type, s.type = type;
    s.fast = fast && bytes_of(a.type) == 1;
    s.align = (int)(bits & -bits);
    if (instead) { instead(name, &s); return; }
    const Product* p = product_of(&s);
    lt.last = (int)(p - lt.products);
    const float beta = (float)add;
    LT(cublasLtMatmul(lt.handle, p->operation, &alpha, b.p, p->b, a.p, p->a, &beta, out, p->out, out, p->out,
                      &p->algo, lt.workspace, WORKSPACE, stream));
    launched(name);
}
// The products of a linear, as in train_us.c; where N is summed it may be padded.
static void launch_linear_forward(void* y, cudaDataType_t type, Side x, Side w, long N, long I, long O,
                                  float alpha) {
    gemm("linear forward", y, type, O, x, w, N, O, I, alpha, 0, 1);
}
static void launch_linear_dx(void* dx, cudaDataType_t type, Side dy, Side w, long N, long I, long O,
                             float alpha) {
    gemm("linear dX", dx, type, I, dy, w, N, I, O, alpha, 0, 0);
}
static void launch_linear_dw(float* dw, Side dy, Side x, long N, long I, long O, float alpha) {
    gemm("linear dW", dw, CUDA_R_32F, I, dy, x, O, I, N, alpha, 1, 0);
}

// FLOP/s of an n x n x n product, the best of a few: what this card can do, measured and not taken from a
// leaflet.
static double measure_product(cudaDataType_t type, long n) {
    enum { SOME = 1 << 20 };
    static uint8_t some[SOME];
    const size_t bytes = (size_t)(n * n * bytes_of(type));
    uint8_t* p[3];
    double best = 0;
    cudaEvent_t start, end;
    for (int i = 0; i < SOME; i += (int)bytes_of(type)) {  // normal values: zeros would draw less power
        const uint64_t u = random_u64(1, 2, (uint64_t)i);
        const uint32_t bits = float_bits((float)(u % 2001) / 1000.0f - 1.0f);
        if (bytes_of(type) == 1) some[i] = fp8_encode(bits_float(bits), type == CUDA_R_8F_E4M3 ? E4M3 : E5M2);
        else memcpy(some + i, (char*)&bits + 4 - bytes_of(type), (size_t)bytes_of(type));
    }
    for (int i = 0; i < 3; i++) CUDA(cudaMalloc(&p[i], i < 2 ? bytes : 4 * (size_t)(n * n)));
    for (int i = 0; i < 2; i++)
        for (size_t at = 0; at < bytes; at += SOME)
            CUDA(
                cudaMemcpy(p[i] + at, some, (size_t)min_l((long)(bytes - at), SOME), cudaMemcpyHostToDevice));
    CUDA(cudaEventCreate(&start));
    CUDA(cudaEventCreate(&end));
    for (int i = 0; i < 8; i++) {
        float ms;
        CUDA(cudaEventRecord(start, stream));
        gemm("ceiling", p[2], CUDA_R_16BF, n, side(p[0], n, 1, type), side(p[1], n, 1, type), n, n, n, 1.0f,
             0, 1);
        CUDA(cudaEventRecord(end, stream));
        CUDA(cudaEventSynchronize(end));
        CUDA(cudaEventElapsedTime(&ms, start, end));
        best = fmax(best, 2e3 * (double)n * (double)n * (double)n / ms);
    }
    CUDA(cudaEventDestroy(start));
    CUDA(cudaEventDestroy(end));
    for (int i = 0; i < 3; i++) CUDA(cudaFree(p[i]));
    return best;
}
static void products_close(void) {
    for (int i = 0; i < lt.count; i++) product_close(&lt.products[i]);
    free(lt.products);
    LT(cublasLtDestroy(lt.handle));
    memset(&lt, 0, sizeof lt);
}

#ifndef US_KERNELS_ONLY  // dev/cuda is built without what follows, which takes most of the time
// ---- The model on the GPU ---------------------------------------------------------------------------------
// Device memory. The buffers are train_us.c's, in the stream's format; of the inputs of the four linears of a
// block the FP8 mode keeps the transposed codes instead (backward needs no others).
enum { LINEARS = 4, MAX_LAYERS = 1000 };
static long head_rows = 8192;  // logits exist for so many rows at a time; a test has fewer
static struct {
    cudaDeviceProp card;
    int is_fp8, native;                     // hidden operands are FP8; the card multiplies FP8
    cudaDataType_t type;                    // of the stream
    float *params, *grads, *m, *v;          // as in Model, but of params, m and v our shares only: see Piece
    void* copy[PARTS];                      // what forward and backward read of them, all: see copy_bytes
    fp8* wt;                                // the codes of each hidden matrix again, transposed
    float* whole;                           // one tensor, put together from all ranks' pieces
    Result* results;                        // of all ranks
    void* act[BUFFERS][MAX_LAYERS];         // forward's buffers and backward's, see buffers_of
    fp8* xt[LINEARS][MAX_LAYERS];           // (I,Np) codes of a linear's input
    fp8 *x, *dy, *dyt;                      // codes of one linear's input (N,4C) and gradient, (4C,Np)
    float *lse[MAX_LAYERS], *delta;         // (B,H,T) of attention
    float* partial;                         // of dgain and dbias
    int *batch, *staged[2];                 // tokens, targets, order, starts; a step's on the host
    double* sums;                           // a chunk's sum of squares
    Chunk* chunks;
    int num_chunks;
    Rates *rates, *host_rates;              // of each tensor
    Result *result, *host_result;
    StatSums *stat, *host_stat;
    cudaGraphExec_t micro, finish;          // forward and backward of a batch; norm and update
    int micro_runs, finish_runs;
    int turn;                               // which of staged the next step finds its batches in
    long staged_at, staged_end;             // sequences they begin and end at; -1: nothing is staged
    long step_end;                          // sequences consumed after the step under way; 0: there is none
    int full;                               // statistics or a trace: write BF16 values along with codes
    int tracing;
    double ceiling;                         // measured, FLOP/s; 0: not measured
    double bytes[5];                        // of memory, by part
} gpu = {};
enum { WEIGHTS, OPTIMIZER, GRADIENTS, ACTIVATIONS, WORK };
enum { STAT_PARTS = 256 };

static long ints_of_batch(const Model* m) { return 3 * m->rows + m->c.vocab + 1; }
// Of a value that forward and backward read: codes, BF16, or FP32.
static long copy_bytes(int part) {
    return part == VECTORS ? 4 : part == MATRICES && gpu.is_fp8 ? 1 : bytes_of(gpu.type);
}

// How many of a buffer there are: as kept() says, or one that every block uses in turn, or none.
static int buffers_of(const Model* m, int k) {
    const int per_block = kept(m, k), post = m->scheme->norm_last;
    if (k == A_NORM1 || k == A_NORM2) return post || gpu.is_fp8 ? 0 : per_block;
    if (k == A_G) return gpu.is_fp8 ? 0 : per_block;
    if (k == A_OUT || k == A_DOWN) return post ? per_block : 1;        // else used up by the residual sum
    if (k == A_MID) return post && gpu.is_fp8 ? 1 : per_block;         // us: backward needs its codes only
    if (k == A_X) return post && gpu.is_fp8 && !m->c.recompute ? 1 : per_block;
    return k == A_LOSSES ? 0 : per_block;
}

// The allocation plan. It is carried out, or only added up.
static void* allocations[64 * MAX_LAYERS];
static int num_allocations;
static void plan_one(void** at, int part, double bytes) {
    const double page = bytes > 1 << 20 ? 1 << 21 : 512;  // what cudaMalloc takes for it
    gpu.bytes[part] += ceil(bytes / page) * page;
    if (!at || bytes == 0) return;
    CUDA(cudaMalloc(at, (size_t)bytes));
    allocations[num_allocations++] = *at;
}
#define PLAN(pointer, part, bytes) plan_one(carry_out ? (void**)&(pointer) : NULL, part, (double)(bytes))
static double plan(const Model* m, int carry_out) {
    const int training = m->training;
    const double C = m->c.width, N = (double)m->rows, S = (double)bytes_of(gpu.type),
                 P = (double)m->num_params;
    const double Np = (double)padded(m->rows), share = P / owners(m);
    const int slots = m->c.recompute ? 1 : m->c.layers, widths[LINEARS] = {1, 1, 1, 4};
    memset(gpu.bytes, 0, sizeof gpu.bytes);
    PLAN(gpu.params, WEIGHTS, 4 * share);
    for (int k = 0; k < PARTS; k++)  // on one GPU FP32 is read from the masters themselves
        if (sharded(m) || copy_bytes(k) < 4)
            PLAN(gpu.copy[k], WEIGHTS, copy_bytes(k) * (m->part_end[k] - part_begin(m, k)));
    if (gpu.is_fp8 && training) PLAN(gpu.wt, WEIGHTS, m->part_end[MATRICES]);
    if (training) {
        PLAN(gpu.m, OPTIMIZER, 4 * share);
        if (m->c.optimizer == ADAMW) PLAN(gpu.v, OPTIMIZER, 4 * share);
        PLAN(gpu.grads, GRADIENTS, 4 * P);
    }
    for (int k = 0; k < BUFFERS; k++) {
        const double width = (double)dim_of(&m->c, BUFFER_KINDS[k].width);
        const double rows = k == A_LOGITS ? fmin(N, (double)head_rows) : gpu.is_fp8 ? Np : N;
        for (int l = 0; l < buffers_of(m, k) && (training || k < D_X || k == D_WIDE || k == D_BRANCH); l++)
            PLAN(gpu.act[k][l], ACTIVATIONS, rows * width * (width == 1 ? 4 : S));
    }
    PLAN(gpu.act[A_LOSSES][0], ACTIVATIONS, 4 * N);
    for (int l = 0; l < slots; l++) {
        PLAN(gpu.lse[l], ACTIVATIONS, 4 * N * m->c.heads);
        for (int i = 0; i < LINEARS && gpu.is_fp8 && training; i++)
            PLAN(gpu.xt[i][l], ACTIVATIONS, widths[i] * C * Np);
    }
    if (gpu.is_fp8) PLAN(gpu.x, WORK, 4 * C * Np);
    if (training) {
        if (gpu.is_fp8) PLAN(gpu.dy, WORK, 4 * C * Np);
        if (gpu.is_fp8) PLAN(gpu.dyt, WORK, 4 * C * Np);
        PLAN(gpu.delta, WORK, 4 * N * m->c.heads);
        PLAN(gpu.partial, WORK, 32 * C * (double)div_up(m->rows, TILE));
        PLAN(gpu.chunks, WORK, sizeof(Chunk) * (P / CHUNK + (double)m->num_tensors + 1));
        PLAN(gpu.sums, WORK, sizeof(double) * (P / CHUNK + (double)m->num_tensors + 1));
        PLAN(gpu.stat, WORK, sizeof(StatSums) * STAT_PARTS);
    }
    for (int i = 0; i < 2 && gpu.is_fp8 && !gpu.native; i++)
        PLAN(lt.decoded[i], WORK, 2 * 4 * C * fmax(C, Np));
    PLAN(gpu.batch, WORK, 4 * (double)ints_of_batch(m));
    PLAN(gpu.rates, WORK, sizeof(Rates) * (double)m->num_tensors);
    PLAN(gpu.result, WORK, sizeof(Result));
    if (sharded(m)) PLAN(gpu.results, WORK, sizeof(Result) * (double)ranks);
    if (sharded(m)) PLAN(gpu.whole, WORK, 4 * C * fmax(4 * C, (double)max_l(m->vp, m->c.seq)));
    PLAN(lt.workspace, WORK, WORKSPACE);
    double total = 0;
    for (int i = 0; i <= WORK; i++) total += gpu.bytes[i];
    return total;
}
static double plan_for_batch(const Model* m, int batch, int recompute) {
    Config c = m->c;
    Model other;
    c.batch = batch, c.recompute = recompute;
    model_layout(&other, &c);
    other.training = m->training;
    const double bytes = plan(&other, 0);
    free(other.tensors);
    return bytes;
}
// Of the memory that is free. What CUDA takes later stays: cuBLASLt's kernels, loaded as they are first used,
// and two graphs.
static double usable_bytes(void) {
    const double RESERVE = (ranks > 1 ? 512 : 256) << 20;
    size_t free_bytes, total_bytes;
    CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
    return fmax(0, (double)free_bytes - RESERVE);
}
// The largest batch whose plan fits into so many bytes; 0: none.
static int largest_batch(const Model* m, double bytes, int recompute) {
    int fits = 0, too_many = 65536;  // a grid has at most 65535 blocks in two of its dimensions
    while (too_many - fits > 1) {
        const int middle = (fits + too_many) / 2;
        *(plan_for_batch(m, middle, recompute) <= bytes ? &fits : &too_many) = middle;
    }
    return fits;
}

template <class S> static S* act(const Model* m, int l, int kind) {
    return (S*)gpu.act[kind][buffers_of(m, kind) > 1 ? l : 0];
}
static float* floats_of(const Model* m, int l, int kind) { return act<float>(m, l, kind); }
static void* copy_gpu(const Model* m, const Tensor* t) {  // a tensor as it is read
    const int part = part_of(t);
    return (char*)gpu.copy[part] + (t->offset - part_begin(m, part)) * copy_bytes(part);
}
static void* weight_gpu(const Model* m, int l, int kind) { return copy_gpu(m, tensor(m, l, kind)); }
static float* vector_gpu(const Model* m, int l, int kind) { return (float*)weight_gpu(m, l, kind); }
static float* grad_gpu(const Model* m, int l, int kind) { return gpu.grads + tensor(m, l, kind)->offset; }
static int slot(const Model* m, int l) { return m->c.recompute ? 0 : l; }

// ---- Many GPUs --------------------------------------------------------------------------------------------
// mpirun starts a process a GPU, a rank; all go through the same program with the same flags. Each has its
// own sequences of a step, all weights as matmuls read them, and gradients of all of them; but of the masters
// and moments it holds only a share (ZeRO stage 1: Rajbhandari et al. 2020, arXiv 1910.02054; see Piece). A
// step ends so:
//   reduce-scatter   the sum over ranks of its share's gradients, FP32, to each: as grad_scale S counts all
//                    ranks' tokens, that sum is S times the true gradient, and nothing is divided
//   result           each share's part of the norm and each rank's loss go to all, who add in one order
//   update           of the share, with codes or BF16 written into the rank's piece of the copies
//   all-gather       the copies: of a hidden weight its E4M3 code, one byte where BF16 has two. There is no
//                    scale to agree on. Then each rank transposes the codes for itself.
// Where one rank asks for a collective all have to: a whole tensor (whole_gpu: for a checkpoint, which the
// first writes), a sum of the host's (Device.sum: is any told to stop? is the first one's save overdue?). So
// an error that one rank alone meets saves nothing; it ends all.
// MPI counts ranks, hands on NCCL's name of itself, sums the host's numbers, and ends all if one ends. NCCL
// does the rest, in stream order; it adds in an order that depends on machine and version: same ones, same
// bits.
static void check_alone(void) {  // one process to MPI: has a launcher started more?
    static const char* const sizes[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    for (int i = 0; i < 3; i++)
        if (getenv(sizes[i]) && atoi(getenv(sizes[i])) > 1)
            die("each of %s processes would train alone: build with MPI=1, of the launcher's MPI",
                getenv(sizes[i]));
}
#ifdef US_MPI
#define OMPI_SKIP_MPICXX
#include <mpi.h>
#include <nccl.h>

static void mpi_check(int e, const char* what, const char* file, int line) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int n;
    if (e == MPI_SUCCESS) return;
    MPI_Error_string(e, text, &n);
    last_words = NULL;
    die("%s:%d: %s: %s (is this the MPI that it was built with?)", file, line, what, text);
}
static void nccl_check(ncclResult_t e, const char* what, const char* file, int line) {
    if (e == ncclSuccess) return;
    last_words = NULL;
    die("%s:%d: %s: %s: %s (NCCL_DEBUG=INFO says more)", file, line, what, ncclGetErrorString(e),
        ncclGetLastError(NULL));
}
#define MPI(call) mpi_check(call, #call, __FILE__, __LINE__)
#define NCCL(call) nccl_check(call, #call, __FILE__, __LINE__)
static ncclComm_t communicator;

static void end_all(void) {  // at exit: in the middle of a run, for an error that is in stderr's buffer
    int over = 0, size = 1;
    if (MPI_Finalized(&over) != MPI_SUCCESS || over) return;
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    signal(SIGTERM, SIG_DFL);
    if (rank) sleep(2);  // what all find wrong the first alone says: its MPI_Abort ends the others by then
    fflush(NULL);
    if (size > 1) MPI_Abort(MPI_COMM_WORLD, 1);
    else MPI_Finalize();
}
__attribute__((unused)) static void ranks_open(void) {
    int level;
    MPI_Comm here;
    MPI(MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &level));
    MPI(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
    MPI(MPI_Comm_rank(MPI_COMM_WORLD, &rank));
    MPI(MPI_Comm_size(MPI_COMM_WORLD, &ranks));
    MPI(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &here));
    MPI(MPI_Comm_rank(here, &local_rank));
    MPI(MPI_Comm_free(&here));
    atexit(end_all);
    if (ranks == 1) check_alone();
    if (rank == 0) return;
    setenv("NCCL_DEBUG_FILE", "/dev/stderr", 0);  // its own choice is stdout
    program = copied(form("%s, rank %d", program, rank));
    setvbuf(stderr, NULL, _IOFBF, 1 << 14);  // until end_all
    if (!freopen("/dev/null", "w", stdout)) die("cannot open /dev/null: %s", strerror(errno));
}
__attribute__((unused)) static void ranks_close(void) {
    if (communicator) NCCL(ncclCommDestroy(communicator));
    MPI(MPI_Finalize());
}
static void communicator_check(void) {  // a lost peer does not end a wait: NCCL says so here
    ncclResult_t e;
    NCCL(ncclCommGetAsyncError(communicator, &e));
    NCCL(e);
}
static double gpu_sum(double x) {
    double sum = x;
    if (ranks > 1) MPI(MPI_Allreduce(&x, &sum, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD));
    return sum;
}
// Calls of one kind, done as one.
static void together(int begin) { NCCL(begin ? ncclGroupStart() : ncclGroupEnd()); }
static void reduce_scatter(float* all, long n) {  // n for each rank, in place
    NCCL(ncclReduceScatter(all, all + rank * n, (size_t)n, ncclFloat, ncclSum, communicator, stream));
}
static void all_gather(void* all, const void* ours, long bytes) {  // of each rank
    NCCL(ncclAllGather(ours, all, (size_t)bytes, ncclUint8, communicator, stream));
}
static void broadcast(float* to, const float* from, long n, int root) {
    NCCL(ncclBroadcast(from, to, (size_t)n, ncclFloat, root, communicator, stream));
}
static void communicator_open(void) {  // once, of whatever model
    ncclUniqueId id;
    if (communicator) return;
    if (rank == 0) NCCL(ncclGetUniqueId(&id));
    MPI(MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD));
    NCCL(ncclCommInitRank(&communicator, ranks, id, rank));
    float* some;  // it connects, and takes memory, when a call is first made
    CUDA(cudaMalloc(&some, sizeof(float) * (size_t)ranks));
    reduce_scatter(some, 1);
    all_gather(some, some + rank, sizeof(float));
    broadcast(some, some, ranks, 0);
    CUDA(cudaStreamSynchronize(stream));
    CUDA(cudaFree(some));
}
#else  // one process, which asks for none of this
__attribute__((unused)) static void ranks_open(void) { check_alone(); }
__attribute__((unused)) static void ranks_close(void) {}
static void communicator_open(void) {}
static void communicator_check(void) {}
static double gpu_sum(double x) { return x; }
static void together(int) {}
static void reduce_scatter(float*, long) {}
static void all_gather(void*, const void*, long) {}
static void broadcast(float*, const float*, long, int) {}
#endif

static void scatter_gradients(const Model* m) {
    together(1);
    for (int k = 0; k < PARTS; k++) reduce_scatter(gpu.grads + part_begin(m, k), share_of(m, k));
    together(0);
    launched("reduce-scatter");
}
static void share_result(void) {
    all_gather(gpu.results, gpu.result, sizeof(Result));
    combine_kernel<<<1, 1, 0, stream>>>(gpu.result, gpu.results, ranks);
    launched("result");
}
static void gather_copies(const Model* m) {
    together(1);
    for (int k = 0; k < PARTS; k++) {
        const long n = share_of(m, k) * copy_bytes(k);
        all_gather(gpu.copy[k], (char*)gpu.copy[k] + rank * n, n);
    }
    together(0);
    launched("all-gather");
    for (const Tensor* t = m->tensors; t < m->tensors + m->num_tensors && gpu.wt; t++)
        if (is_hidden(t)) launch_transpose(gpu.wt + t->offset, (fp8*)copy_gpu(m, t), t->rows, t->cols);
}
// All of a tensor's masters or moments; of several ranks all have to ask. Until the next is asked for.
static float* gpu_lasting(Lasting what) {
    return what == PARAMS ? gpu.params : what == FIRST_MOMENT ? gpu.m : gpu.v;
}
static const float* whole_gpu(const Model* m, Lasting what, const Tensor* t) {
    if (!sharded(m)) return gpu_lasting(what) + t->offset;
    together(1);
    for (int r = 0; r < ranks; r++) {
        const Piece p = piece_of(m, t, r);
        if (p.n > 0) broadcast(gpu.whole + (p.first - t->offset), gpu_lasting(what) + p.at, p.n, r);
    }
    together(0);
    launched("broadcast");
    return gpu.whole;
}

// ---- Looking at tensors -----------------------------------------------------------------------------------
template <class S> static void fetch_floats(float* to, const S* from, long n) {
    S* host = (S*)alloc(sizeof(S) * (double)n);
    CUDA(cudaStreamSynchronize(stream));
    CUDA(cudaMemcpy(host, from, sizeof(S) * (size_t)n, cudaMemcpyDeviceToHost));
    for (long i = 0; i < n; i++) to[i] = (float)host[i];
    free(host);
}
// A trace fills the host's buffers.
template <class S> static void trace_buffer(Model* m, int l, int kind, const S* from, long row, long n) {
    if (!gpu.tracing) return;
    fetch_floats(buffer(m, l, kind, row), from, n);
    wrote(m, l, kind, n);
}
template <class S> static void stat_gpu(Model* m, int row, const char* name, int operand, const S* x, long n,
                                        Format f) {
    if (!m->stats_on) return;
    const int parts = (int)min_l(STAT_PARTS, div_up(n, 16 * THREADS));
    stat_kernel<S><<<(unsigned)parts, THREADS, 0, stream>>>(gpu.stat, x, n, f != FP32, f);
    launched("statistics");
    CUDA(cudaMemcpyAsync(gpu.host_stat, gpu.stat, sizeof(StatSums) * (size_t)parts, cudaMemcpyDeviceToHost,
                         stream));
    CUDA(cudaStreamSynchronize(stream));
    stat_finish(m, row, name, operand, gpu.host_stat, parts, (double)n, f);
}

// ---- Forward ----------------------------------------------------------------------------------------------
// Where results go. In FP8 a value in the stream's format is written only if something else reads it
// (`always`) or somebody looks at it.
template <class S> static Dest<S> value_only(S* value, long W, long N) {
    Dest<S> d = {value, NULL, NULL, W, padded(N), E4M3};
    return d;
}
template <class S> static Dest<S> input_of(const Model* m, int l, int kind, S* value, int always, long N) {
    const Tensor* t = tensor(m, l, kind);
    Dest<S> d = value_only(always || !gpu.is_fp8 || gpu.full ? value : (S*)NULL, t->cols, N);
    if (gpu.is_fp8) d.q = gpu.x, d.qt = m->training ? gpu.xt[kind][slot(m, l)] : NULL;
    if (gpu.is_fp8) d.format = t->precision.input;
    return d;
}
template <class S>
static Dest<S> gradient_of(const Model* m, int l, int kind, S* value, int always, long N) {
    const Tensor* t = tensor(m, l, kind);
    Dest<S> d = value_only(always || !gpu.is_fp8 || gpu.full ? value : (S*)NULL, t->rows, N);
    if (gpu.is_fp8) d.q = gpu.dy, d.qt = gpu.dyt, d.format = t->precision.gradient;
    return d;
}

// Y = alpha X W^T. value: X in the stream's format, which FP8 reads for statistics only. Rows beyond N fill
// up an FP8 product; whatever is in them ends in rows beyond N, which nobody reads.
template <class S> static void linear_forward_gpu(Model* m, int l, int kind, S* y, const S* value, long N) {
    const Tensor* t = tensor(m, l, kind);
    const long I = t->cols, O = t->rows;
    stat_gpu(m, stat_row(m, l, kind), t->name, 0, value, N * I, t->precision.input);
    if (m->stats_on)
        stat_gpu(m, stat_row(m, l, kind), t->name, 1, whole_gpu(m, PARAMS, t), O * I, t->precision.weight);
    const Side x = side(gpu.is_fp8 ? (void*)gpu.x : (void*)value, I, 1, type_of(t->precision.input));
    launch_linear_forward(y, gpu.type, x, side(weight_gpu(m, l, kind), I, 1, type_of(t->precision.weight)),
                          gpu.is_fp8 ? padded(N) : N, I, O, t->alpha);
}
// dX = alpha dY W, dW += alpha dY^T X. dy and x: in the stream's format, where they are not FP8.
template <class S>
static void linear_backward_gpu(Model* m, int l, int kind, S* dx, const S* dy, const S* x, long N) {
    const Tensor* t = tensor(m, l, kind);
    const long I = t->cols, O = t->rows, Np = gpu.is_fp8 ? padded(N) : N;
    stat_gpu(m, stat_row(m, l, kind), t->name, 2, dy, N * O, t->precision.gradient);
    Side dy_rows = side(dy, O, 1, gpu.type), dy_columns = side(dy, O, 0, gpu.type);
    Side w = side(weight_gpu(m, l, kind), I, 0, gpu.type), x_columns = side(x, I, 0, gpu.type);
    if (gpu.is_fp8) {  // k has to be contiguous: the transposed copies
        fp8* xt = gpu.xt[kind][slot(m, l)];
        const cudaDataType_t gradient = type_of(t->precision.gradient);
        dy_rows = side(gpu.dy, O, 1, gradient), dy_columns = side(gpu.dyt, Np, 1, gradient);
        w = side(gpu.wt + t->offset, O, 1, type_of(t->precision.weight));
        x_columns = side(xt, Np, 1, type_of(t->precision.input));
        if (Np > N) {  // rows that are not there count as zero
            CUDA(cudaMemset2DAsync(xt + N, (size_t)Np, 0, (size_t)(Np - N), (size_t)I, stream));
            CUDA(cudaMemset2DAsync(gpu.dyt + N, (size_t)Np, 0, (size_t)(Np - N), (size_t)O, stream));
        }
    }
    launch_linear_dx(dx, gpu.type, dy_rows, w, Np, I, O, t->alpha);
    launch_linear_dw(grad_gpu(m, l, kind), dy_columns, x_columns, Np, I, O, t->alpha);
}

template <class S> static void norm_forward_gpu(Model* m, int l, Norm k, Dest<S> out, const S* x, S* sum,
                                                const S* add, const S* skip, Residual r, long N) {
    launch_norm_forward<S>(out, floats_of(m, l, k.mean), floats_of(m, l, k.rstd), sum, x, add, skip,
                           vector_gpu(m, l, k.gain), vector_gpu(m, l, k.bias), r.skip, r.branch, N,
                           m->c.width);
}

// A block's buffers, as in train_us.c. With FP8 only statistics look at the values of norm1, norm2 and g,
// which are in buffers of backward's.
template <class S> struct BlockGpu { S *before, *norm1, *qkv, *y, *out, *mid, *norm2, *up, *g, *down, *x; };
template <class S> static const S* stream_before_gpu(const Model* m, int l) {
    return l ? act<S>(m, l - 1, A_X) : act<S>(m, 0, A_X0);
}
template <class S> static BlockGpu<S> block_gpu(const Model* m, int l) {
    BlockGpu<S> b = {(S*)stream_before_gpu<S>(m, l), act<S>(m, l, gpu.is_fp8 ? D_BRANCH : A_NORM1),
                     act<S>(m, l, A_QKV), act<S>(m, l, A_Y), act<S>(m, l, A_OUT), act<S>(m, l, A_MID),
                     act<S>(m, l, gpu.is_fp8 ? D_BRANCH : A_NORM2), act<S>(m, l, A_UP),
                     act<S>(m, l, gpu.is_fp8 ? D_WIDE : A_G), act<S>(m, l, A_DOWN), act<S>(m, l, A_X)};
    return b;
}

// The input of a block's qkv, where nothing before has written it: at the first block of sp, and at a block
// that is computed again.
template <class S> static void enter_block(Model* m, int l, long N) {
    const BlockGpu<S> b = block_gpu<S>(m, l);
    const int post = m->scheme->norm_last;
    const Dest<S> input = input_of<S>(m, l, QKV, post ? b.before : b.norm1, 0, N);
    if (!post) norm_forward_gpu<S>(m, l, NORM1, input, b.before, NULL, NULL, NULL, NO_SUM, N);
    else if (gpu.is_fp8) launch_weighted_sum<S>(input, 1.0f, b.before, 0.0f, NULL, N, m->c.width);
    if (!post) trace_buffer(m, l, A_NORM1, b.norm1, 0, N * m->c.width);
}

// A block, from its first linear's input to its stream and the next linear's input: each residual sum is one
// kernel with the LayerNorm before it (post) or with the one after it, which is the next branch's. alone:
// again, for backward: nothing beyond the block. Of a sequence that goes on from t0, that row is the first of
// every buffer but qkv, in which attention finds the keys and values of the rows before.
template <class S> static void block_forward_gpu(Model* m, int l, long B, long t0, long T, int alone) {
    const long C = m->c.width, N = B * (T - t0);
    const int post = m->scheme->norm_last, end = l == m->c.layers - 1;
    const Residual sum1 = residual(m, 2 * l), sum2 = residual(m, 2 * l + 1);
    const BlockGpu<S> b = block_gpu<S>(m, l);

    linear_forward_gpu<S>(m, l, QKV, b.qkv + t0 * 3 * C, post ? b.before : b.norm1, N);
    trace_buffer(m, l, A_QKV, b.qkv, 0, N * 3 * C);
    attention_forward_gpu<S>(input_of<S>(m, l, OUT, b.y, 1, N), gpu.lse[slot(m, l)], b.qkv,
                             m->softmax_scale, m->attention_factor, B, t0, T, C, m->c.heads, stream);
    trace_buffer(m, l, A_Y, b.y, 0, N * C);
    linear_forward_gpu<S>(m, l, OUT, b.out, b.y, N);
    trace_buffer(m, l, A_OUT, b.out, 0, N * C);
    const Dest<S> to_up = input_of<S>(m, l, UP, post ? b.mid : b.norm2, post, N);
    if (post) norm_forward_gpu<S>(m, l, NORM1, to_up, b.out, NULL, NULL, b.before, sum1, N);
    else norm_forward_gpu<S>(m, l, NORM2, to_up, b.before, b.mid, b.out, NULL, sum1, N);
    trace_buffer(m, l, A_MID, b.mid, 0, N * C);

    if (!post) trace_buffer(m, l, A_NORM2, b.norm2, 0, N * C);
    linear_forward_gpu<S>(m, l, UP, b.up, post ? b.mid : b.norm2, N);
    trace_buffer(m, l, A_UP, b.up, 0, N * 4 * C);
    const Activation activation = (Activation)m->c.activation;
    launch_activation<S>(input_of<S>(m, l, DOWN, b.g, 0, N), b.up, NULL, activation, m->act_in, m->act_out, N,
                         4 * C);
    trace_buffer(m, l, A_G, b.g, 0, N * 4 * C);
    linear_forward_gpu<S>(m, l, DOWN, b.down, b.g, N);
    trace_buffer(m, l, A_DOWN, b.down, 0, N * C);
    if (post) {
        const Dest<S> x = alone ? value_only((S*)NULL, C, N) : value_only(b.x, C, N);
        norm_forward_gpu<S>(m, l, NORM2, end || alone ? x : input_of<S>(m, l + 1, QKV, b.x, 1, N), b.down,
                            NULL, NULL, b.mid, sum2, N);
    } else if (end) {
        const Dest<S> lnf = value_only(act<S>(m, 0, A_LNF), C, N);
        norm_forward_gpu<S>(m, 0, FINAL, lnf, b.mid, b.x, b.down, NULL, sum2, N);
    } else if (!alone) {
        const Dest<S> to_qkv = input_of<S>(m, l + 1, QKV, block_gpu<S>(m, l + 1).norm1, 0, N);
        norm_forward_gpu<S>(m, l + 1, NORM1, to_qkv, b.mid, b.x, b.down, NULL, sum2, N);
    }
    trace_buffer(m, l, A_X, b.x, 0, N * C);
    if (!post && !end && !alone) trace_buffer(m, l + 1, A_NORM1, block_gpu<S>(m, l + 1).norm1, 0, N * C);
    stat_gpu(m, 5 * (l + 1), form("h.%d.x", l), 0, b.x, N * C, m->precision->stream);
}

// Tokens on the GPU -> A_LNF, the head's input. batch: tokens, targets, order, starts (see stage). t0 > 0, a
// multiple of ROWS, continues one sequence (B = 1): tokens and A_LNF are those of rows t0 .. T-1.
template <class S> static void forward_gpu(Model* m, long B, long t0, long T) {
    const long C = m->c.width, N = B * (T - t0);
    const int post = m->scheme->norm_last;
    S* x0 = act<S>(m, 0, A_X0);
    launch_embedding_forward<S>(post ? input_of<S>(m, 0, QKV, x0, 1, N) : value_only(x0, C, N), gpu.batch,
                                (const S*)weight_gpu(m, 0, WTE), (const S*)weight_gpu(m, 0, WPE) + t0 * C,
                                m->scheme->embedding_scale, N, T, C);
    trace_buffer(m, 0, A_X0, x0, 0, N * C);
    stat_gpu(m, 0, "x", 0, x0, N * C, m->precision->stream);
    if (!post) enter_block<S>(m, 0, N);
    for (int l = 0; l < m->c.layers; l++) block_forward_gpu<S>(m, l, B, t0, T, 0);
    S* lnf = act<S>(m, 0, A_LNF);
    if (post)
        norm_forward_gpu<S>(m, 0, FINAL, value_only(lnf, C, N), stream_before_gpu<S>(m, m->c.layers), NULL,
                            NULL, NULL, NO_SUM, N);
    trace_buffer(m, 0, A_LNF, lnf, 0, N * C);
}

template <class S> static void logits_gpu(Model* m, long row, long n) {
    const long C = m->c.width;
    gemm("head forward", act<S>(m, 0, A_LOGITS), gpu.type, m->vp,
         side(act<S>(m, 0, A_LNF) + row * C, C, 1, gpu.type), side(weight_gpu(m, 0, HEAD), C, 1, gpu.type),
         n, m->vp, C, tensor(m, 0, HEAD)->alpha, 0, 0);
}
// From the gradient at the logits: dW_head, and in D_BRANCH the gradient at the head's input.
template <class S> static void logits_backward_gpu(Model* m, long row, long n) {
    const long C = m->c.width;
    S *logits = act<S>(m, 0, A_LOGITS), *lnf = act<S>(m, 0, A_LNF);
    gemm("head dX", act<S>(m, 0, D_BRANCH) + row * C, gpu.type, C, side(logits, m->vp, 1, gpu.type),
         side(weight_gpu(m, 0, HEAD), C, 0, gpu.type), n, C, m->vp, 1.0f, 0, 0);
    gemm("head dW", grad_gpu(m, 0, HEAD), CUDA_R_32F, C, side(logits, m->vp, 0, gpu.type),
         side(lnf + row * C, C, 0, gpu.type), m->vp, C, n, 1.0f, 1, 0);
}
// Losses of all rows; with want_gradient backward through the head too. The logits exist for head_rows rows
// at a time.
template <class S> static void head_gpu(Model* m, long N, int want_gradient) {
    const long C = m->c.width, V = m->c.vocab;
    const Format f = tensor(m, 0, HEAD)->precision.input;
    const int row_of_stats = stat_row(m, 0, HEAD);
    S *logits = act<S>(m, 0, A_LOGITS), *lnf = act<S>(m, 0, A_LNF);
    float* losses = floats_of(m, 0, A_LOSSES);
    stat_gpu(m, row_of_stats, "head", 0, lnf, N * C, f);
    if (m->stats_on) stat_gpu(m, row_of_stats, "head", 1, whole_gpu(m, PARAMS, tensor(m, 0, HEAD)), V * C, f);
    for (long row = 0; row < N; row += head_rows) {
        const long n = min_l(head_rows, N - row);
        logits_gpu<S>(m, row, n);
        trace_buffer(m, 0, A_LOGITS, logits, row, n * m->vp);
        launch_loss<S>(losses + row, logits, gpu.batch + m->rows + row, want_gradient, m->loss_scale, n, V,
                       m->vp);
        if (!want_gradient) continue;
        if (watch)
            trace_buffer(m, 0, A_LOGITS, logits, row, n * m->vp);  // a dump wants the logits themselves
        if (row == 0) stat_gpu(m, row_of_stats, "head", 2, logits, n * m->vp, f);
        logits_backward_gpu<S>(m, row, n);
    }
    if (want_gradient) trace_buffer(m, 0, D_BRANCH, act<S>(m, 0, D_BRANCH), 0, N * C);
    add_loss_kernel<<<1, THREADS, 0, stream>>>(gpu.result, losses, N);
    launched("loss");
}

// ---- Backward ---------------------------------------------------------------------------------------------
template <class S>
static void norm_backward_gpu(Model* m, int l, Norm k, Dest<S> out, S* sum, const S* dout, const S* dskip,
                              const S* x, Residual r, int last, long N) {
    launch_norm_backward<S>(out, sum, grad_gpu(m, l, k.gain), grad_gpu(m, l, k.bias), gpu.partial, dout,
                            dskip, x, floats_of(m, l, k.mean), floats_of(m, l, k.rstd),
                            vector_gpu(m, l, k.gain), r.skip, r.branch, last, N, m->c.width);
}

// As in train_us.c, but where LayerNorm ends a branch the sum dx = skip dx + din of the branch above waits
// for the LayerNorm that is next: they are one kernel, with the skip of the one and the branch of the other.
// After block 0 it is left over.
template <class S> static void block_backward_gpu(Model* m, int l, long B, long T) {
    const long C = m->c.width, N = B * T;
    const int post = m->scheme->norm_last, top = l == m->c.layers - 1;
    const Residual sum1 = residual(m, 2 * l), sum2 = residual(m, 2 * l + 1), above = residual(m, 2 * l + 2);
    const BlockGpu<S> b = block_gpu<S>(m, l);
    S *dx = act<S>(m, 0, D_X), *dout = post ? act<S>(m, 0, D_BRANCH) : dx, *ddown = dout;
    S *dy = act<S>(m, 0, D_NARROW), *din = dy, *dg = act<S>(m, 0, D_WIDE), *dup = dg, *dqkv = dg;

    const Residual r2 = {above.skip, sum2.branch}, r1 = {sum2.skip, sum1.branch};
    if (post) norm_backward_gpu<S>(m, l, NORM2, gradient_of<S>(m, l, DOWN, ddown, 0, N), dx, top ? dx : din,
                                   top ? (S*)NULL : dx, b.down, r2, 1, N);
    if (post && !top) trace_buffer(m, l + 1, D_X, dx, 0, N * C);
    if (post) trace_buffer(m, l, D_BRANCH, ddown, 0, N * C);
    linear_backward_gpu<S>(m, l, DOWN, dg, ddown, b.g, N);
    trace_buffer(m, l, D_WIDE, dg, 0, N * 4 * C);
    launch_activation<S>(gradient_of<S>(m, l, UP, dup, 0, N), b.up, dg, (Activation)m->c.activation,
                         m->act_in, m->act_out, N, 4 * C);
    trace_buffer(m, l, D_WIDE, dup, 0, N * 4 * C);
    linear_backward_gpu<S>(m, l, UP, din, dup, post ? b.mid : b.norm2, N);
    trace_buffer(m, l, D_NARROW, din, 0, N * C);
    const Dest<S> to_out = gradient_of<S>(m, l, OUT, dout, !post, N);
    if (post) norm_backward_gpu<S>(m, l, NORM1, to_out, dx, din, dx, b.out, r1, 1, N);
    else norm_backward_gpu<S>(m, l, NORM2, to_out, NULL, din, dx, b.mid, sum2, 0, N);
    trace_buffer(m, l, D_X, dx, 0, N * C);

    if (post) trace_buffer(m, l, D_BRANCH, dout, 0, N * C);
    linear_backward_gpu<S>(m, l, OUT, dy, dout, b.y, N);
    trace_buffer(m, l, D_NARROW, dy, 0, N * C);
    attention_backward_gpu<S>(gradient_of<S>(m, l, QKV, dqkv, 0, N), gpu.delta, dy, b.y, b.qkv,
                              gpu.lse[slot(m, l)], m->softmax_scale, m->attention_factor, B, T, C, m->c.heads,
                              stream);
    trace_buffer(m, l, D_WIDE, dqkv, 0, N * 3 * C);
    linear_backward_gpu<S>(m, l, QKV, din, dqkv, post ? b.before : b.norm1, N);
    trace_buffer(m, l, D_NARROW, din, 0, N * C);
    if (post) return;
    const Dest<S> next = l ? gradient_of<S>(m, l - 1, DOWN, dx, 1, N) : value_only(dx, C, N);
    norm_backward_gpu<S>(m, l, NORM1, next, NULL, din, dx, b.before, sum1, 0, N);
    trace_buffer(m, l, D_X, dx, 0, N * C);
}

// Adds the scaled gradients of the batch that forward_gpu and head_gpu have seen to gpu.grads.
template <class S> static void backward_gpu(Model* m, long B, long T) {
    const long C = m->c.width, N = B * T;
    const int post = m->scheme->norm_last, stats_on = m->stats_on, tracing = gpu.tracing;
    S *dx = act<S>(m, 0, D_X), *dlnf = act<S>(m, 0, D_BRANCH), *din = act<S>(m, 0, D_NARROW);
    const int l_end = m->c.layers - 1;
    norm_backward_gpu<S>(m, 0, FINAL, post ? value_only(dx, C, N) : gradient_of<S>(m, l_end, DOWN, dx, 1, N),
                         NULL, dlnf, NULL, stream_before_gpu<S>(m, m->c.layers), NO_SUM, 0, N);
    trace_buffer(m, 0, D_X, dx, 0, N * C);
    for (int l = m->c.layers - 1; l >= 0; l--) {
        if (m->c.recompute && l < m->c.layers - 1) {
            m->stats_on = gpu.tracing = 0;
            enter_block<S>(m, l, N);
            block_forward_gpu<S>(m, l, B, 0, T, 1);
            m->stats_on = stats_on, gpu.tracing = tracing;
        }
        block_backward_gpu<S>(m, l, B, T);
    }
    if (post) {
        launch_weighted_sum<S>(value_only(dx, C, N), residual(m, 0).skip, dx, 1.0f, din, N, C);
        trace_buffer(m, 0, D_X, dx, 0, N * C);
    }
    const int *order = gpu.batch + 2 * m->rows, *starts = order + m->rows;
    launch_embedding_backward<S>(grad_gpu(m, 0, WTE), grad_gpu(m, 0, WPE), dx, order, starts,
                                 m->scheme->embedding_scale, B, T, C, m->c.vocab);
}

// ---- A step -----------------------------------------------------------------------------------------------
template <class S> static void micro_gpu(Model* m) {  // one batch, from tokens to gradients
    forward_gpu<S>(m, m->c.batch, 0, m->c.seq);
    head_gpu<S>(m, m->rows, 1);
    backward_gpu<S>(m, m->c.batch, m->c.seq);
}
// A tensor's copies, where it is read from any.
template <class S> static Dest<S> copies_of(const Model* m, const Tensor* t) {
    Dest<S> copy = {NULL, NULL, NULL, t->cols, t->rows, E4M3};
    if (copy_bytes(part_of(t)) == 1) {
        copy.q = (fp8*)copy_gpu(m, t);
        if (gpu.wt) copy.qt = gpu.wt + t->offset;
    } else if (copy_gpu(m, t) != gpu.params + t->offset) copy.out = (S*)copy_gpu(m, t);
    return copy;
}
template <class S> static void make_copies(const Model* m, const Tensor* t, float* w) {
    const Dest<S> copy = copies_of<S>(m, t);
    if (copy.out || copy.q) launch_update<S>(copy, w, NULL, NULL, NULL, NULL, NULL, t->rows, t->cols);
}
// A tensor's step, or of several ranks that of our piece of it.
template <class S> static void update_tensor_gpu(const Model* m, const Tensor* t) {
    const Rates* r = gpu.rates + (t - m->tensors);
    const Piece p = piece_of(m, t, rank);
    const Dest<S> copy = copies_of<S>(m, t);
    const long skipped = p.first - t->offset;
    float *w = gpu.params + p.at, *first = gpu.m + p.at, *second = gpu.v ? gpu.v + p.at : NULL;
    if (!sharded(m))
        launch_update<S>(copy, w, first, second, gpu.grads + p.first, r, gpu.result, t->rows, t->cols);
    else if (p.n > 0)
        launch_update_piece<S>(copy.out ? copy.out + skipped : NULL, copy.q ? copy.q + skipped : NULL, w,
                               first, second, gpu.grads + p.first, r, gpu.result, p.n);
}
template <class S>
static void finish_gpu(Model* m) {  // norm, is all finite, update, and the result to the host
    if (sharded(m)) scatter_gradients(m);
    launch_gradient_norm(gpu.result, gpu.sums, gpu.grads, gpu.chunks, gpu.num_chunks);
    if (sharded(m)) share_result();
    for (const Tensor* t = m->tensors; t < m->tensors + m->num_tensors; t++)
        part_of(t) == VECTORS ? update_tensor_gpu<float>(m, t) : update_tensor_gpu<S>(m, t);
    if (sharded(m)) gather_copies(m);
    CUDA(cudaMemcpyAsync(gpu.host_result, gpu.result, sizeof(Result), cudaMemcpyDeviceToHost, stream));
}

// Runs `work`, the first time as it is, then as a graph: thousands of launches become one.
template <class S> static void run_graph(cudaGraphExec_t* graph, int* runs, void (*work)(Model*), Model* m) {
    if (m->stats_on || gpu.tracing || profile || (*runs)++ == 0) { work(m); return; }
    if (!*graph) {
        cudaGraph_t captured;
        CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        work(m);
        CUDA(cudaStreamEndCapture(stream, &captured));
        CUDA(cudaGraphInstantiate(graph, captured, 0));
        CUDA(cudaGraphDestroy(captured));
    }
    CUDA(cudaGraphLaunch(*graph, stream));
}

// Tokens, targets, and for the embedding's backward the rows in the order of their tokens, of a batch at
// m->inputs.
static void stage(const Model* m, int* to) {
    const long N = m->rows, V = m->c.vocab;
    int *order = to + 2 * N, *starts = order + N;
    memcpy(to, m->inputs, sizeof(int) * (size_t)N);
    memcpy(to + N, m->targets, sizeof(int) * (size_t)N);
    sort_by_token(order, starts, m->inputs, N, V);
}
static void stage_step(Model* m, const Split* train, int* to) {
    gpu.staged_at = m->sequence;
    for (int i = 0; i < m->c.accum; i++) {
        next_batch(m, train);
        stage(m, to + i * ints_of_batch(m));
    }
    gpu.staged_end = m->sequence;
}
static void upload_batch(const int* from, long ints) {
    CUDA(cudaMemcpyAsync(gpu.batch, from, sizeof(int) * (size_t)ints, cudaMemcpyHostToDevice, stream));
}

// The step itself; the result, once the GPU gets there.
template <class S> static void finish_step(Model* m, double lr) {
    const size_t n = (size_t)m->num_tensors;
    for (size_t i = 0; i < n; i++) gpu.host_rates[i] = rates(m, &m->tensors[i], lr);
    CUDA(cudaMemcpyAsync(gpu.rates, gpu.host_rates, sizeof(Rates) * n, cudaMemcpyHostToDevice, stream));
    run_graph<S>(&gpu.finish, &gpu.finish_runs, finish_gpu<S>, m);
}
static StepResult step_result(Model* m) {
    while (sharded(m) && cudaStreamQuery(stream) == cudaErrorNotReady) communicator_check(), usleep(50);
    CUDA(cudaStreamSynchronize(stream));
    const Result* r = gpu.host_result;
    const StepResult result = {r->loss / (m->c.accum * ranks), sqrt(r->norm2) / m->grad_scale,
                               r->bad < 0 ? NULL : &m->tensors[r->bad]};
    if (!r->stop) m->step++;
    return result;
}
template <class S> static StepResult step_gpu(Model* m, const Split* train, double lr) {
    const long sequence = m->sequence, step = m->step, ints = ints_of_batch(m);
    if (gpu.staged_at != sequence) stage_step(m, train, gpu.staged[gpu.turn]);
    m->sequence = gpu.staged_end;
    CUDA(cudaMemsetAsync(gpu.grads, 0, sizeof(float) * (size_t)m->num_params, stream));
    CUDA(cudaMemsetAsync(gpu.result, 0, sizeof(Result), stream));
    for (int i = 0; i < m->c.accum; i++) {
        upload_batch(gpu.staged[gpu.turn] + i * ints, ints);
        launched("zero gradients, upload");
        gpu.full = m->stats_on;
        run_graph<S>(&gpu.micro, &gpu.micro_runs, micro_gpu<S>, m);
        m->stats_on = gpu.full = 0;  // statistics are of the first batch
    }
    finish_step<S>(m, lr);
    gpu.turn ^= 1, gpu.staged_at = -1;
    gpu.step_end = m->sequence;
    if (step + 1 < m->c.steps) {  // the next step's batches, while the GPU is at work
        const long end = m->sequence;
        stage_step(m, train, gpu.staged[gpu.turn]);
        m->sequence = end;
    }
    gpu.step_end = 0;
    const StepResult result = step_result(m);
    if (m->step == step) m->sequence = sequence;
    return result;
}

// ---- The device -------------------------------------------------------------------------------------------
static int is_fp32(const Model* m) { return m->precision->stream == FP32; }

// Of the matmuls and of causal attention, forward and backward (6 for each weight and token).
static double flops_per_token(const Model* m) {
    double weights = (double)m->vp * m->c.width;
    for (int i = 0; i < m->num_tensors; i++)
        if (is_hidden(&m->tensors[i])) weights += (double)m->tensors[i].rows * (double)m->tensors[i].cols;
    return 6 * weights + 6.0 * m->c.layers * m->c.width * m->c.seq;
}

static void gpu_open(Model* m) {
    const int sm = open_card(&gpu.card, "./train_us runs on the CPU");
    if (sharded(m) && *m->c.dump) die("--dump looks at one GPU: run it without mpirun");
    if (sm < 80) die("%s has compute capability %d.%d; 8.0 is needed", gpu.card.name, sm / 10, sm % 10);
    if (m->c.width % 16) die("--width %d: on a GPU it has to be a multiple of 16", m->c.width);
    if (m->c.width / m->c.heads > ATTENTION_MAX_D)
        die("--heads %d: on a GPU a head has at most %d of --width", m->c.heads, ATTENTION_MAX_D);
    if (m->c.batch > 65535 || m->rows > 65535L * TILE)
        die("--batch %d of --seq %d is more than a grid of blocks can hold: use --accum", m->c.batch,
            m->c.seq);
    gpu.is_fp8 = m->precision->weight == E4M3;
    gpu.native = sm >= 89;
    gpu.type = is_fp32(m) ? CUDA_R_32F : CUDA_R_16BF;
    gpu.staged_at = -1;
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    LT(cublasLtCreate(&lt.handle));
    model_alloc_batch(m);

    if (sharded(m)) communicator_open();  // before memory is counted: NCCL takes its own
    const double usable = usable_bytes(), wanted = plan(m, 0);
    if (wanted > usable) {
        const int kept_all = largest_batch(m, usable, 0), recomputed = largest_batch(m, usable, 1);
        if (recomputed == 0)
            die("%.0f MB of GPU memory wanted, %.0f are free: not even --batch 1 --recompute fits",
                wanted * 1e-6, usable * 1e-6);
        die("%.0f MB of GPU memory wanted, %.0f are free: the largest that fits is %s--batch %d --recompute",
            wanted * 1e-6, usable * 1e-6, kept_all ? form("--batch %d, or ", kept_all) : "", recomputed);
    }
    CUDA(cudaMalloc(&lt.workspace, WORKSPACE));
    // Worth measuring where a step is: in a tiny one launches count, not FLOP.
    if (m->training && flops_per_token(m) * (double)m->rows > 1e12 && usable > 1e9)
        gpu.ceiling = measure_product(CUDA_R_16BF, 8192);
    CUDA(cudaFree(lt.workspace));
    plan(m, 1);
    const size_t held = sizeof(float) * (size_t)m->num_params / (size_t)owners(m);
    float* const lasting[] = {gpu.params, gpu.m, gpu.v};  // the gaps between tensors too
    for (int i = 0; i < 3; i++) if (lasting[i]) CUDA(cudaMemsetAsync(lasting[i], 0, held, stream));
    for (int k = 0; k < PARTS; k++)
        if (!gpu.copy[k]) gpu.copy[k] = gpu.params + part_begin(m, k);
    for (int i = 0; i < 2; i++)
        CUDA(cudaMallocHost(&gpu.staged[i], sizeof(int) * (size_t)(ints_of_batch(m) * m->c.accum)));
    CUDA(cudaMallocHost(&gpu.host_stat, sizeof(StatSums) * STAT_PARTS));
    CUDA(cudaMallocHost(&gpu.host_result, sizeof(Result)));
    CUDA(cudaMallocHost(&gpu.host_rates, sizeof(Rates) * (size_t)m->num_tensors));
    if (m->training) {
        Chunk* chunks = chunks_of(m, &gpu.num_chunks);
        CUDA(cudaMemcpy(gpu.chunks, chunks, sizeof(Chunk) * (size_t)gpu.num_chunks, cudaMemcpyHostToDevice));
        free(chunks);
    }
    CUDA(cudaDeviceSynchronize());
}
static void gpu_close(Model* m) {
    void* const pinned[] = {gpu.staged[0], gpu.staged[1], gpu.host_stat, gpu.host_result, gpu.host_rates};
    (void)m;
    if (gpu.micro) CUDA(cudaGraphExecDestroy(gpu.micro));
    if (gpu.finish) CUDA(cudaGraphExecDestroy(gpu.finish));
    while (num_allocations) CUDA(cudaFree(allocations[--num_allocations]));
    for (int i = 0; i < 5; i++) if (pinned[i]) CUDA(cudaFreeHost(pinned[i]));
    products_close();
    CUDA(cudaStreamDestroy(stream));
    memset(&gpu, 0, sizeof gpu);
}
static void gpu_describe(const Model* m) {
    static const char* const parts[] = {"weights", "optimizer", "gradients", "activations", "work space"};
    double total = 0;
    plan(m, 0);
    printf("GPU memory%s:", sharded(m) ? " of each rank" : "");
    for (int i = 0; i <= WORK; total += gpu.bytes[i++]) printf(" %.0f MB %s,", gpu.bytes[i] * 1e-6, parts[i]);
    printf(" %.0f MB in all\n%s, compute capability %d.%d, %.0f GB", total * 1e-6, gpu.card.name,
           gpu.card.major, gpu.card.minor, (double)gpu.card.totalGlobalMem * 1e-9);
    if (gpu.ceiling > 0) printf("; BF16 product of 8192^3: %.0f TFLOP/s", gpu.ceiling * 1e-12);
    if (gpu.is_fp8 && !gpu.native)
        printf("; no FP8 tensor cores: FP8-rounded operands are multiplied in BF16");
    printf("\n");
    if (!sharded(m)) return;
    const double vectors = 4.0 * (double)(m->part_end[VECTORS] - m->part_end[TABLES]);
    const double as_bf16 = 2.0 * (double)m->part_end[TABLES] + vectors;
    const double moved[] = {4.0 * (double)m->num_params, as_bf16, as_bf16 - (double)m->part_end[MATRICES]};
    const int p = m->c.precision;
    printf("%d ranks, a GPU each; a step moves %.1f MB of gradients, and %.1f MB of weights in %s (in %s it "
           "would be %.1f)\nto stop and save: pkill -USR1 mpirun (after a Ctrl-C it kills its ranks within "
           "seconds)\n", ranks, moved[0] * 1e-6, moved[p] * 1e-6, PRECISIONS[p].name,
           PRECISIONS[p < 2 ? 2 : 1].name, moved[p < 2 ? 2 : 1] * 1e-6);
}
static StepResult gpu_step(Model* m, const Split* train, double lr) {
    return is_fp32(m) ? step_gpu<float>(m, train, lr) : step_gpu<bf16>(m, train, lr);
}
// The batch at m->inputs as it is, without a graph: forward and loss, and gradients if wanted.
static double run_batch(Model* m, int want_gradient) {
    stage(m, gpu.staged[gpu.turn ^ 1]);
    CUDA(cudaMemsetAsync(gpu.result, 0, sizeof(Result), stream));
    upload_batch(gpu.staged[gpu.turn ^ 1], ints_of_batch(m));
    if (want_gradient) {
        CUDA(cudaMemsetAsync(gpu.grads, 0, sizeof(float) * (size_t)m->num_params, stream));
        is_fp32(m) ? micro_gpu<float>(m) : micro_gpu<bf16>(m);
    } else if (is_fp32(m)) forward_gpu<float>(m, m->c.batch, 0, m->c.seq), head_gpu<float>(m, m->rows, 0);
    else forward_gpu<bf16>(m, m->c.batch, 0, m->c.seq), head_gpu<bf16>(m, m->rows, 0);
    CUDA(cudaMemcpyAsync(gpu.host_result, gpu.result, sizeof(Result), cudaMemcpyDeviceToHost, stream));
    CUDA(cudaStreamSynchronize(stream));
    return gpu.host_result->loss;
}
static const float* gpu_losses(Model* m) {
    float* losses = scratch(SCRATCH_TENSOR, m->rows);
    run_batch(m, 0);
    fetch_floats(losses, floats_of(m, 0, A_LOSSES), m->rows);
    return losses;
}
static double gpu_trace(Model* m) {
    for (int k = 0; k < BUFFERS; k++) if (!m->buffers[k]) m->buffers[k] = floats(buffer_size(m, k));
    gpu.tracing = gpu.full = 1;
    const double loss = run_batch(m, 1);
    gpu.tracing = gpu.full = 0;
    if (!m->grads) m->grads = floats((double)m->num_params);
    CUDA(cudaMemcpy(m->grads, gpu.grads, sizeof(float) * (size_t)m->num_params, cudaMemcpyDeviceToHost));
    return loss;
}
// Tiles of ROWS rows, as attention has them, from that of row t0 on: so there are few different shapes, and a
// row is computed as in the whole window, but for what cuBLASLt does differently for other shapes.
template <class S> static void next_gpu(Model* m, long t0, long length, float* logits) {
    const long first = m->c.recompute ? 0 : t0 / ROWS * ROWS;  // with one block's buffers nothing is known
    const long end = min_l(m->c.seq, div_up(length, ROWS) * ROWS);
    int* tokens = gpu.staged[gpu.turn ^ 1];
    for (long t = first; t < end; t++) tokens[t - first] = t < length ? m->inputs[t] : 0;
    upload_batch(tokens, end - first);
    forward_gpu<S>(m, 1, first, end);
    logits_gpu<S>(m, length - 1 - first, 1);
    fetch_floats(logits, act<S>(m, 0, A_LOGITS), m->c.vocab);
}
static const float* gpu_next(Model* m, long t0, long length) {
    static float logits[65536];
    is_fp32(m) ? next_gpu<float>(m, t0, length, logits) : next_gpu<bf16>(m, t0, length, logits);
    return logits;
}
static const float* gpu_get(Model* m, Lasting what, const Tensor* t) {
    const long n = t->rows * t->cols;
    float* to = scratch(SCRATCH_TENSOR, n);
    CUDA(cudaMemcpyAsync(to, whole_gpu(m, what, t), sizeof(float) * (size_t)n, cudaMemcpyDeviceToHost,
                         stream));
    CUDA(cudaStreamSynchronize(stream));
    return to;
}
static void gpu_fetch(Model* m) {
    if (gpu.step_end) {  // a step under way, while reading the next one's batches failed: it is taken
        const long step = m->step, end = gpu.step_end;
        step_result(m);
        if (m->step > step) m->sequence = end;
    }
    float* const to[] = {m->params, m->m, m->v};
    for (int i = 0; i < 3; i++)
        for (int k = 0; k < m->num_tensors && to[i]; k++) {
            const Tensor* t = &m->tensors[k];
            memcpy(to[i] + t->offset, gpu_get(m, (Lasting)i, t), sizeof(float) * (size_t)(t->rows * t->cols));
        }
}
static void gpu_put(Model* m, Lasting what, const Tensor* t, const void* values) {
    const Piece p = piece_of(m, t, rank);
    float* const share = gpu_lasting(what) + p.at;
    float* const w = sharded(m) ? gpu.whole : share;
    CUDA(cudaMemcpyAsync(w, values, sizeof(float) * (size_t)(t->rows * t->cols), cudaMemcpyHostToDevice,
                         stream));
    if (sharded(m) && p.n > 0)
        CUDA(cudaMemcpyAsync(share, w + (p.first - t->offset), sizeof(float) * (size_t)p.n,
                             cudaMemcpyDeviceToDevice, stream));
    if (what == PARAMS)
        part_of(t) == VECTORS || is_fp32(m) ? make_copies<float>(m, t, w) : make_copies<bf16>(m, t, w);
    CUDA(cudaStreamSynchronize(stream));  // values may change from here on
}
static const char* gpu_utilisation(const Model* m, double rate) {
    const double all = gpu.ceiling * ranks;
    return all > 0 ? form(" | %.0f %% of BF16", 100 * rate * flops_per_token(m) / all) : "";
}
__attribute__((unused)) static const Device GPU = {
    "GPU", 0, gpu_open, gpu_close, gpu_describe, gpu_step, gpu_losses, gpu_trace, gpu_next, gpu_fetch,
    gpu_get, gpu_put, gpu_utilisation, gpu_sum};

#endif  // US_KERNELS_ONLY

#ifdef US_CUDA_MAIN
int main(int argc, char** argv) {
    wait_briefly(argv);  // which begins again: before MPI does
    ranks_open();
    const int status = run(argc, argv, &GPU);
    ranks_close();
    return status;
}
#endif
