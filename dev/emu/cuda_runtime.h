// cuda_runtime.h -- CUDA C++ and its runtime for the host compiler, in place of the toolkit's header of that
// name; emu.cpp is the rest. Include it after train_us.c, as the other headers here: formats and matmul()
// exist once, there.
#pragma once
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Always inlined, so that debuggers and sanitizers name the line of the .cu and not one of this file
#define EMU_INLINE inline __attribute__((always_inline))
#define EMU_LINE int line = __builtin_LINE()
// What cuda.sed makes of __shared__. The key tells one declaration from another; none means the launch's
// bytes.
#define EMU_SHARED(X) static char X##_key[] = #X; \
    X##_shared &X = *(X##_shared *)emu::shared_memory(X##_key, sizeof(X##_shared), alignof(X##_shared))
#define EMU_DYNAMIC(X) \
    auto *X = (std::remove_extent_t<X##_shared> *)emu::shared_memory(nullptr, 0, alignof(X##_shared))

#define EMU_VECTOR(N, T) \
    struct alignas(8) N##2 { T x, y; }; \
    struct N##3 { T x, y, z; }; \
    struct alignas(16) N##4 { T x, y, z, w; }; \
    inline N##2 make_##N##2(T x, T y) { return {x, y}; } \
    inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTOR(float, float)
EMU_VECTOR(int, int)
EMU_VECTOR(uint, unsigned)
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern __thread uint3 threadIdx, blockIdx;          // a host thread each, for blocks can run side by side
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define EMU_ERRORS(X) X(cudaSuccess, 0) X(cudaErrorInvalidValue, 1) X(cudaErrorMemoryAllocation, 2) \
    X(cudaErrorInvalidConfiguration, 9) X(cudaErrorInsufficientDriver, 35) X(cudaErrorInvalidDevice, 101) \
    X(cudaErrorNotReady, 600) X(cudaErrorLaunchFailure, 719) X(cudaErrorNotPermitted, 800) \
    X(cudaErrorStreamCaptureUnsupported, 900) X(cudaErrorStreamCaptureInvalidated, 901) \
    X(cudaErrorStreamCaptureImplicit, 906)
#define EMU_ENUM(NAME, CODE) NAME = CODE,
#define EMU_NAME(NAME, CODE) e == NAME ? #NAME :
enum cudaError_t { EMU_ERRORS(EMU_ENUM) };
inline const char *cudaGetErrorName(cudaError_t e) { return EMU_ERRORS(EMU_NAME) "unknown"; }
inline const char *cudaGetErrorString(cudaError_t e) { return cudaGetErrorName(e); }  // stderr has the reason
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal,
                             cudaStreamCaptureModeRelaxed };
enum { cudaStreamNonBlocking = 1 };
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, l2CacheSize;
};
typedef struct CUgraph_st { std::vector<std::function<void()>> operations; } *cudaGraph_t, *cudaGraphExec_t;
typedef struct CUstream_st { cudaGraph_t graph; bool spoiled; } *cudaStream_t;   // graph: under capture
typedef struct CUevent_st { std::chrono::steady_clock::time_point at; } *cudaEvent_t;

namespace emu {
#define EMU_SAY(...) (emu::say_where(), fprintf(stderr, __VA_ARGS__), fputc('\n', stderr))
#define EMU_FAIL(...) (EMU_SAY(__VA_ARGS__), emu::fail())
extern const char *context;                          // set by a program: what it is at, said first
extern int open_groups;                              // of nccl.h: what is called in one has not begun
int setting(const char *name, int otherwise);        // of the environment
void say_where();
[[noreturn]] void fail();

// ---- Launches, and what a kernel sees -------------------------------------------------------------------
cudaError_t launch_grid(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared,
                        cudaStream_t s, std::function<void()> thread);
bool on_device(const void *p, size_t bytes);        // all in one allocation, of the current device
bool in_shared(const void *p, size_t bytes);
void *shared_memory(const char *key, size_t bytes, size_t align);
template <class T> void check_argument(const char *name, int i, const T &value) {
    if constexpr (std::is_pointer_v<T>)
        if (value && !on_device((const void *)value, 0))
            EMU_FAIL("argument %d of %s is %p, which is no device memory", i, name, (const void *)value);
}
template <class... P> auto launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block,
                                  size_t shared = 0, cudaStream_t s = nullptr) {
    return [=](P... p) {                            // arguments are copied now, for a graph may run later
        [[maybe_unused]] int i = 0;
        (check_argument(name, ++i, p), ...);
        launch_grid(name, (const void *)kernel, grid, block, shared, s, [=] { kernel(p...); });
    };
}
int lane();
void barrier(int line);
// The lanes of mask wait for each other; the last to come runs resolve over what each has brought, by lane.
typedef void (*Resolve)(void **lanes, unsigned mask);
void meet(const char *what, unsigned mask, int line, void *mine, Resolve resolve, bool orders_memory = false);
template <class T> T shuffle(const char *what, unsigned mask, T value, int from, int line) {
    struct Lane { T value, result; int from; } mine = {value, value, from};
    meet(what, mask, line, &mine, [](void **lanes, unsigned mask) {
        for (int i = 0; i < 32; i++) if (mask >> i & 1) {
            Lane &lane = *(Lane *)lanes[i];
            if (!(mask >> lane.from & 1))
                EMU_FAIL("lane %d reads lane %d, not in mask %08x", i, lane.from, mask);
            lane.result = ((Lane *)lanes[lane.from])->value;
        }
    });
    return mine.result;
}
inline unsigned vote(unsigned mask, bool yes, int line) {
    unsigned mine = yes;                            // becomes the votes of all
    meet("a vote", mask, line, &mine, [](void **lanes, unsigned mask) {
        unsigned all = 0;
        for (int i = 0; i < 32; i++) if (mask >> i & 1) all |= *(unsigned *)lanes[i] << i;
        for (int i = 0; i < 32; i++) if (mask >> i & 1) *(unsigned *)lanes[i] = all;
    });
    return mine;
}
void cp_async(void *shared, const void *global, int bytes = 16, int valid = 16);   // beyond valid: zeros
void cp_async_commit();
void cp_async_wait(int groups);                     // until all but the latest groups are done
// What race.cpp gets to see, if it is linked. Blocks are counted over all launches, from 1; on the host
// block is 0, and working says whether it does what a stream was asked to.
enum Access { READ, WRITE, ATOMIC };
struct Place { unsigned block, first_block, thread, barriers, syncs; bool working; };
Place place();
void note_access(const void *p, size_t bytes, Access access, const void *code) __attribute__((weak));
void note_memory(const void *p, size_t bytes, const char *name) __attribute__((weak));   // 0 bytes: gone
} // namespace emu

// ---- What CUDA calls by these names ---------------------------------------------------------------------
inline void __syncthreads(EMU_LINE) { emu::barrier(line); }
inline void __syncwarp(unsigned mask = ~0u, EMU_LINE) {
    emu::meet("__syncwarp", mask, line, nullptr, [](void **, unsigned) {}, true);
}
#define EMU_SHUFFLE(NAME, FROM) \
    template <class T> T NAME(unsigned mask, T value, int by, int width = 32, EMU_LINE) { \
        const int me = emu::lane(), in = width - 1; \
        return emu::shuffle(#NAME, mask, value, FROM, line); \
    }
EMU_SHUFFLE(__shfl_sync, (me & ~in) | (by & in))
EMU_SHUFFLE(__shfl_xor_sync, (me ^ by) <= (me | in) ? me ^ by : me)
EMU_SHUFFLE(__shfl_down_sync, (me & in) + by <= in ? me + by : me)
EMU_SHUFFLE(__shfl_up_sync, (me & in) >= by ? me - by : me)
inline unsigned __ballot_sync(unsigned mask, int p, EMU_LINE) { return emu::vote(mask, p, line); }
inline int __any_sync(unsigned mask, int p, EMU_LINE) { return emu::vote(mask, p, line) != 0; }
inline int __all_sync(unsigned mask, int p, EMU_LINE) { return emu::vote(mask, p, line) == mask; }
int atomicAdd(int *p, int v);
unsigned atomicAdd(unsigned *p, unsigned v);
float atomicAdd(float *p, float v);
int atomicMax(int *p, int v);
template <class T> EMU_INLINE T __ldg(const T *p) { return *p; }
template <class T> EMU_INLINE T __ldcs(const T *p) { return *p; }
// These compile to st.global, which on a GPU takes a shared address for another one.
template <class T> EMU_INLINE void emu_store_global(T *p, T v, const char *name) {
    if (emu::in_shared(p, sizeof v)) EMU_FAIL("%s to shared memory: it stores to global memory only", name);
    *p = v;
}
template <class T> EMU_INLINE void __stwb(T *p, std::common_type_t<T> v) { emu_store_global(p, v, "__stwb"); }
template <class T> EMU_INLINE void __stcs(T *p, std::common_type_t<T> v) { emu_store_global(p, v, "__stcs"); }
template <class A, class B> std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
#define __float_as_uint(x) float_bits(x)            // of train_us.c
#define __uint_as_float(u) bits_float(u)
#define __float_as_int(x) ((int)float_bits(x))
#define __int_as_float(i) bits_float((uint32_t)(i))
#define rsqrtf(x) (1.0f / sqrtf(x))                 // macros, as C libraries have functions of these names
#define __expf expf
#define __logf logf
#define __fdividef(a, b) ((a) / (b))

// ---- Runtime API ----------------------------------------------------------------------------------------
namespace emu {
cudaError_t submit(cudaStream_t s, std::function<void()> operation);   // do it, or record it under capture
// All is done already, but under capture it is a mistake, and so is to wait for an open group.
cudaError_t synchronize(const char *what, bool waits = true);
cudaError_t allocate(void **p, size_t bytes, bool host);
cudaError_t release(void *p, bool host);
cudaError_t set_shared_limit(const void *kernel, int bytes);
} // namespace emu
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaGetDeviceCount(int *n);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device);
cudaError_t cudaMemGetInfo(size_t *free, size_t *total);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind,
        cudaStream_t s = nullptr);
cudaError_t cudaMemset2DAsync(void *p, size_t pitch, int value, size_t width, size_t rows,
        cudaStream_t s = nullptr);
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph);
#define EMU_API(NAME, ...) inline cudaError_t cuda##NAME { __VA_ARGS__; return cudaSuccess; }
template <class T> EMU_API(Malloc(T **p, size_t n), return emu::allocate((void **)p, n, false))
template <class T> EMU_API(MallocHost(T **p, size_t n), return emu::allocate((void **)p, n, true))
EMU_API(Free(void *p), return emu::release(p, false))
EMU_API(FreeHost(void *p), return emu::release(p, true))
EMU_API(Memcpy(void *to, const void *from, size_t n, cudaMemcpyKind k),
        return cudaMemcpyAsync(to, from, n, k))
EMU_API(MemsetAsync(void *p, int v, size_t n, cudaStream_t s = 0), return cudaMemset2DAsync(p, n, v, n, 1, s))
EMU_API(Memset(void *p, int value, size_t n), return cudaMemsetAsync(p, value, n))
EMU_API(DeviceSynchronize(), return emu::synchronize("cudaDeviceSynchronize"))
EMU_API(StreamSynchronize(cudaStream_t), return emu::synchronize("cudaStreamSynchronize"))
EMU_API(StreamQuery(cudaStream_t), return emu::synchronize("cudaStreamQuery"))
EMU_API(EventSynchronize(cudaEvent_t), return emu::synchronize("cudaEventSynchronize"))
EMU_API(RuntimeGetVersion(int *v), *v = 13000)
EMU_API(DriverGetVersion(int *v), *v = 13000)
EMU_API(StreamCreateWithFlags(cudaStream_t *s, unsigned), *s = new CUstream_st())
EMU_API(StreamCreate(cudaStream_t *s), *s = new CUstream_st())
EMU_API(StreamDestroy(cudaStream_t s), delete s)
EMU_API(EventCreate(cudaEvent_t *e), *e = new CUevent_st())
EMU_API(EventDestroy(cudaEvent_t e), delete e)
EMU_API(EventRecord(cudaEvent_t e, cudaStream_t s = nullptr),
        return emu::submit(s, [=] { e->at = std::chrono::steady_clock::now(); }))
EMU_API(EventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to),
        *ms = std::chrono::duration<float, std::milli>(to->at - from->at).count())
EMU_API(GraphInstantiate(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long), *x = new CUgraph_st{*g})
EMU_API(GraphLaunch(cudaGraphExec_t x, cudaStream_t s),
        return emu::submit(s, [=] { for (auto &operation : x->operations) operation(); }))
EMU_API(GraphDestroy(cudaGraph_t g), delete g)
EMU_API(GraphExecDestroy(cudaGraphExec_t x), delete x)
template <class F> EMU_API(FuncSetAttribute(F *kernel, cudaFuncAttribute, int value),
        return emu::set_shared_limit((void *)kernel, value))
