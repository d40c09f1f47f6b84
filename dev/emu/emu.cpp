// emu.cpp -- runs a kernel block by block, every CUDA thread on a stack of its own that gives way to another
// only where CUDA makes threads wait: at barriers and warp operations. Runs repeat, and EMU_SEED chooses who
// goes: 0 the first thread that can (a warp goes as far as it can before the next one starts), 1 the last, 2
// each in turn, n at random. A missing barrier shows when a thread runs far ahead of another: 0 and 1
// together find what others may not.
#include "cuda_runtime.h"
#include <map>
#include <sys/mman.h>
// AddressSanitizer, where it is linked, must be told of every change of stack.
extern "C" void __sanitizer_start_switch_fiber(void **, const void *, size_t) __attribute__((weak));
extern "C" void __sanitizer_finish_switch_fiber(void *, const void **, size_t *) __attribute__((weak));

// Saves what a call must keep and the stack pointer, and returns on the other stack, where that was done
// before.
extern "C" void emu_switch(void **save, void *load);
#if defined(__x86_64__)
asm(".text\n.globl emu_switch\nemu_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
enum { FRAME = 8, ENTRY = 6 };                      // words of a first frame, and which says where to start
#elif defined(__aarch64__)
asm(".text\n.globl emu_switch\nemu_switch:\nsub sp, sp, #160\nstp x19, x20, [sp]\nstp x21, x22, [sp, #16]\n"
    "stp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\nldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\n"
    "ldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\nldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n");
enum { FRAME = 20, ENTRY = 11 };
#else
#error "emu_switch is written for x86-64 and aarch64 only"
#endif

__thread uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {
struct Fiber { void *sp; const void *stack; size_t size; };                       // sp while it waits
struct Copy { void *to; const void *from; int bytes, valid, group; const void *code; };
struct Thread {
    unsigned id, syncs;                             // syncs: how many __syncwarp it has passed
    uint3 index;
    Fiber *fiber;                                   // null before it starts
    const char *at;                                 // what it waits in, and where
    int line, groups;                               // groups: of cp.async, committed
    std::vector<Copy> copies;                       // of cp.async, not waited for yet
};
struct Meeting { unsigned mask, here; int line; Resolve resolve; void *lane[32]; };
struct Piece { const char *key, *memory; void *raw; size_t bytes; };              // of shared memory
struct Grid {
    const char *name;
    dim3 grid, block;
    size_t shared;
    const std::function<void()> &thread;
    unsigned first, seed;                           // first: its block 0 among all blocks ever
};
struct Block {
    const Grid *grid;
    unsigned serial, barriers;                      // barriers: how many were passed
    int size, alive, waiting, line;                 // waiting: how many at the next one, and at which line
    Thread *self;                                   // who runs; null on the host
    std::vector<Thread> threads;
    std::vector<Meeting> meetings[32];              // of each warp, by mask: parts of it can wait apart
    char ready[1024];                               // who could run
    uint32_t left[32];                              // a bit a thread: left the kernel, or never was
    std::vector<Piece> pieces;
    std::vector<Fiber *> idle;
    Fiber host;
    uint64_t random;
};
static __thread Block *b;                           // this host thread's, the same for all launches
static bool working;
int setting(const char *name, int otherwise) {
    const char *text = getenv(name);
    char *end;
    const long value = text ? strtol(text, &end, 10) : otherwise;
    if (!text || (*text && !*end && value >= 0 && value <= INT32_MAX)) return (int)value;
    fprintf(stderr, "emu: %s=%s: a number is wanted there\n", name, text);
    exit(1);
}

const char *context = "";
int open_groups;
void say_where() {
    fprintf(stderr, "emu: %s", context);
    if (!b || !b->self) return;
    fprintf(stderr, "%s: block (%u,%u,%u) thread (%u,%u,%u)", b->grid->name, blockIdx.x, blockIdx.y,
            blockIdx.z,
            threadIdx.x, threadIdx.y, threadIdx.z);
    if (b->self->at) fprintf(stderr, " in %s at line %d", b->self->at, b->self->line);
    fprintf(stderr, ": ");
}
extern "C" void __asan_on_error() { say_where(); }  // AddressSanitizer calls it before it reports
void fail() {
    fflush(nullptr);
    abort();                                        // a debugger stops here, on the CUDA thread's stack
}
Place place() {
    if (!b || !b->self) return {0, 0, 0, 0, 0, working};
    return {b->serial, b->grid->first, b->self->id, b->barriers, b->self->syncs, true};
}
int lane() { return b->self->id & 31; }

// ---- Who runs next ----------------------------------------------------------------------------------------
static Thread *next_ready() {
    const unsigned n = b->size, me = b->self ? b->self->id : 0, seed = b->grid->seed;
    b->random = b->random * 6364136223846793005u + 1442695040888963407u;
    const unsigned r = (unsigned)(b->random >> 33);  // mostly this thread goes on, if it can
    const unsigned start = seed <= 1 ? 0 : seed == 2 ? (me + 1) % n : r % 4 ? me : r / 4 % n;
    const void *p = seed == 1 ? memrchr(b->ready, 1, n) : memchr(b->ready + start, 1, n - start);
    if (!p) p = memchr(b->ready, 1, start);
    return p ? &b->threads[(const char *)p - b->ready] : nullptr;
}
[[noreturn]] static void stuck() {                  // all wait, and nobody will come
    fprintf(stderr, "emu: %s: block (%u,%u,%u) is stuck", b->grid->name, blockIdx.x, blockIdx.y, blockIdx.z);
    for (int i = 0; i < b->size; i++) {             // those who do the same as the last are not named
        const Thread &t = b->threads[i];
        if (!i || t.line != (&t)[-1].line) fprintf(stderr, ", thread %d %s at line %d", i, t.at, t.line);
    }
    fputc('\n', stderr);
    fail();
}
static void enter(Thread *t) {
    b->ready[t->id] = 0;
    b->self = t;
    threadIdx = t->index;
}
static void jump(Fiber *from, Fiber *to) {
    void *fake = nullptr;
    if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&fake, to->stack, to->size);
    emu_switch(&from->sp, to->sp);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}
static void fiber_main() {
    Fiber from = {};                                // the first of all comes from the host
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.size);
    if (!b->host.stack) b->host.stack = from.stack, b->host.size = from.size;
    for (;;) {
        b->grid->thread();
        Thread *const me = b->self;
        me->at = "has left the kernel", me->line = 0;
        b->left[me->id / 32] |= 1u << me->id % 32;
        b->alive--;
        Thread *t = next_ready();
        if (!t && b->alive) stuck();
        if (t) enter(t);
        if (t && !t->fiber) {                       // starts here: without barriers one stack serves all
            t->fiber = me->fiber;
            continue;
        }
        b->idle.push_back(me->fiber);
        jump(me->fiber, t ? t->fiber : &b->host);
    }
}
static Fiber *idle_fiber() {
    const size_t size = 256 << 10, guard = 16 << 10;   // running off the end hits pages nobody may touch
    static __thread unsigned count;  // tops whole pages apart would fight for the same cache lines
    if (!b->idle.empty()) {
        Fiber *f = b->idle.back();
        b->idle.pop_back();
        return f;
    }
    char *m = (char *)mmap(nullptr, guard + size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (m == MAP_FAILED || mprotect(m, guard, PROT_NONE)) EMU_FAIL("no memory for a stack");
    void **sp = (void **)(m + guard + size - count++ % 64 * 192) - FRAME;
    sp[ENTRY] = (void *)fiber_main;                 // the rest is zero, where a debugger's backtrace ends
    return new Fiber{sp, m + guard, size};
}
static void give_way() {                            // until someone makes this thread ready
    Thread *me = b->self, *t = next_ready();
    if (!t) stuck();
    enter(t);
    if (t != me) {
        if (!t->fiber) t->fiber = idle_fiber();
        jump(me->fiber, t->fiber);
    }
    me->at = nullptr;
}
void barrier(int line) {
    b->self->at = "__syncthreads", b->self->line = line;
    if (b->alive < b->size) EMU_FAIL("%d of %d threads have left the kernel", b->size - b->alive, b->size);
    if (b->waiting++ && b->line != line) EMU_FAIL("other threads of the block wait at line %d", b->line);
    b->line = line;
    if (b->waiting == b->size) b->waiting = 0, b->barriers++, memset(b->ready, 1, b->size);
    give_way();
}
void meet(const char *what, unsigned mask, int line, void *mine, Resolve resolve, bool orders_memory) {
    Thread *me = b->self;
    const unsigned l = me->id % 32, warp = me->id / 32, missing = mask & b->left[warp];
    me->at = what, me->line = line;
    if (!(mask >> l & 1)) EMU_FAIL("lane %u is not in its own mask %08x", l, mask);
    if (missing) EMU_FAIL("lane %d of mask %08x has left the kernel", __builtin_ctz(missing), mask);
    std::vector<Meeting> &all = b->meetings[warp];
    size_t i = 0;
    while (i < all.size() && all[i].mask != mask) i++;
    if (i == all.size()) all.push_back({mask, 0, 0, nullptr, {}});
    Meeting &m = all[i];
    if (m.here && (m.line != line || m.resolve != resolve))
        EMU_FAIL("the warp is split: other lanes of mask %08x wait at line %d", mask, m.line);
    m.line = line, m.resolve = resolve, m.lane[l] = mine, m.here |= 1u << l;
    if (m.here == mask) {
        m.here = 0;
        resolve(m.lane, mask);
        for (int i = 0; i < 32; i++) b->ready[warp * 32 + i] |= mask >> i & 1;
    }
    give_way();
    me->syncs += orders_memory;
}

// ---- Shared memory, cp.async ------------------------------------------------------------------------------
void *shared_memory(const char *key, size_t bytes, size_t align) {
    size_t variables = key ? bytes : 0;
    for (const Piece &p : b->pieces) {
        if (p.key == key) return (void *)p.memory;
        if (p.key) variables += p.bytes;
    }
    if (variables > 48 << 10) EMU_FAIL("%zu bytes of __shared__ variables, limit 48 KiB", variables);
    if (!key) bytes = b->grid->shared, align = std::max(align, (size_t)16);
    void *raw;                                      // aligned as asked and no better: __align__ matters
    const size_t offset = align < 256 ? align : 0;
    if (posix_memalign(&raw, 256, offset + bytes)) EMU_FAIL("no memory");
    char *memory = (char *)raw + offset;
    memset(memory, 0xFF, bytes);                    // a NaN in FP32, BF16, E4M3 and E5M2, as all new memory
    if (note_memory) note_memory(memory, bytes, key ? key : "dynamic shared memory");
    b->pieces.push_back({key, memory, raw, bytes});
    return memory;
}
bool in_shared(const void *p, size_t bytes) {
    for (const Piece &s : b->pieces)
        if ((const char *)p >= s.memory && (const char *)p + bytes <= s.memory + s.bytes) return true;
    return false;
}
// The bytes may arrive any time from here to the wait: what was there is lost, what will be is not there yet.
void cp_async(void *to, const void *from, int bytes, int valid) {
    const bool aligned = ((uintptr_t)to | (uintptr_t)from) % bytes == 0;
    if (!aligned || !in_shared(to, bytes) || (valid && !on_device(from, valid)))
        EMU_FAIL("cp.async from %p to %p: not %d aligned bytes of device and of shared memory", from, to,
                 bytes);
    b->self->copies.push_back({to, from, bytes, valid, b->self->groups, __builtin_return_address(0)});
    if (note_access) note_access(to, bytes, WRITE, __builtin_return_address(0));
    memset(to, 0xFF, bytes);
}
void cp_async_commit() { b->self->groups++; }
void cp_async_wait(int groups) {
    std::vector<Copy> &copies = b->self->copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group < b->self->groups - groups; done++) {
        const Copy &c = copies[done];
        memset(c.to, 0, c.bytes);
        memmove(c.to, c.from, c.valid);
        if (!note_access) continue;
        note_access(c.to, c.bytes, WRITE, c.code);
        note_access(c.from, c.valid, READ, c.code);
    }
    copies.erase(copies.begin(), copies.begin() + done);
}

// ---- Blocks, grids ----------------------------------------------------------------------------------------
static void run_block(const Grid &g, unsigned index) {
    if (!b) b = new Block();
    const dim3 size = g.block;
    const int n = b->size = b->alive = size.x * size.y * size.z;
    blockIdx = {index % g.grid.x, index / g.grid.x % g.grid.y, index / g.grid.x / g.grid.y};
    b->grid = &g, b->serial = g.first + index, b->barriers = 0, b->random = (uint64_t)g.seed << 32 | index;
    if ((int)b->threads.size() < n) b->threads.resize(n);
    unsigned i = 0;
    for (unsigned z = 0; z < size.z; z++) for (unsigned y = 0; y < size.y; y++)
        for (unsigned x = 0; x < size.x; x++, i++)
            b->threads[i] = {i, 0, {x, y, z}, nullptr, nullptr, 0, 0, {}};
    for (int w = 0; w * 32 < n; w++) b->left[w] = n - w * 32 >= 32 ? 0 : ~0u << n % 32,
            b->meetings[w].clear();
    memset(b->ready, 1, n);
    Thread *t = next_ready();
    enter(t);
    t->fiber = idle_fiber();
    jump(&b->host, t->fiber);
    b->self = nullptr;
    for (const Piece &p : b->pieces) {
        if (note_memory) note_memory(p.memory, 0, nullptr);
        free(p.raw);
    }
    b->pieces.clear();
}
static void run_grid(const char *name, dim3 grid, dim3 block, size_t shared,
        const std::function<void()> &thread) {
    static unsigned serial = 1;
    const unsigned n = grid.x * grid.y * grid.z, seed = setting("EMU_SEED", 0);
    const Grid g = {name, grid, block, shared, thread, serial, seed};
    serial += n, gridDim = grid, blockDim = block;
    // Blocks side by side are for speed; race.cpp wants one at a time.
    #pragma omp parallel for num_threads(note_access ? 1 : setting("EMU_THREADS", 1)) schedule(dynamic)
    for (unsigned i = 0; i < n; i++)                // a factor without divisors in common with n: each once
        run_block(g, seed == 1 ? n - 1 - i : seed <= 2 ? i : (unsigned)((i * 2147483647ull + seed) % n));
}

// ---- The runtime API --------------------------------------------------------------------------------------
// A stream's operations run at once; under capture they are only recorded, as on a GPU, so that mistakes in
// capturing show. What a GPU refuses is refused here too, with the reason on stderr.
// Each apart, so that AddressSanitizer sees where it ends
struct Allocation { size_t bytes; bool host; int device; };
static std::map<const char *, Allocation> allocations;
static std::map<const void *, size_t> shared_limits;
static size_t in_use;
static cudaError_t last_error;
static const char *unasked;  // the kernel launched last, until somebody asks whether it could be
#ifdef __SANITIZE_ADDRESS__
static const size_t BAND = 0;  // the sanitizer sees what is written behind an allocation
#else
static const size_t BAND = 4096;  // bytes behind an allocation, which nobody may write
#endif
static cudaStream_t captured;
static int device;                                  // the current one
#define REFUSE(E, ...) return EMU_SAY(__VA_ARGS__), last_error = E

static const Allocation *find(const void *p, size_t bytes) {
    auto a = allocations.upper_bound((const char *)p);
    if (a == allocations.begin() || (const char *)p + bytes > (--a)->first + a->second.bytes) return nullptr;
    return &a->second;
}
bool on_device(const void *p, size_t bytes) {
    const Allocation *a = find(p, bytes);
    return a && (a->host || a->device == device);
}
cudaError_t synchronize(const char *what, bool waits) {
    if (waits && open_groups)
        REFUSE(cudaErrorNotPermitted, "%s in an open group, whose work begins at ncclGroupEnd", what);
    if (!captured) return cudaSuccess;
    captured->spoiled = true;
    REFUSE(cudaErrorStreamCaptureUnsupported, "%s while a stream is under capture", what);
}
cudaError_t submit(cudaStream_t s, std::function<void()> operation) {
    if (captured && !s) {
        captured->spoiled = true;
        REFUSE(cudaErrorStreamCaptureImplicit, "the default stream is used while another is under capture");
    }
    if (s && captured == s) s->graph->operations.push_back(std::move(operation));
    else working = true, operation(), working = false;
    return cudaSuccess;
}
cudaError_t launch_grid(const char *name, const void *kernel, dim3 g, dim3 b, size_t shared, cudaStream_t s,
                        std::function<void()> thread) {
    const size_t threads = (size_t)b.x * b.y * b.z, blocks = (size_t)g.x * g.y * g.z;
    const size_t limit = shared_limits.count(kernel) ? shared_limits[kernel] : 48 << 10;
    if (!threads || threads > 1024 || b.z > 64 || !blocks || blocks >> 31 || g.y > 65535 || g.z > 65535)
        REFUSE(cudaErrorInvalidConfiguration, "%s: grid (%u,%u,%u), block (%u,%u,%u)", name, g.x, g.y, g.z,
               b.x, b.y, b.z);
    if (shared > limit) REFUSE(cudaErrorInvalidValue, "%s: %zu shared bytes, limit %zu", name, shared, limit);
    static int launches;
    if (++launches == setting("EMU_FAILS_AT", 0))
        REFUSE(cudaErrorLaunchFailure, "%s, launch %d: EMU_FAILS_AT", name, launches);
    const char *const before = unasked;
    unasked = name;
    if (before) REFUSE(cudaErrorNotPermitted, "no cudaGetLastError() followed the launch of %s", before);
    return submit(s, [=] { run_grid(name, g, b, shared, thread); });
}
cudaError_t set_shared_limit(const void *kernel, int bytes) {
    if (bytes < 0 || bytes > 227 << 10) REFUSE(cudaErrorInvalidValue, "%d shared bytes", bytes);
    shared_limits[kernel] = bytes;
    return cudaSuccess;
}
cudaError_t allocate(void **p, size_t bytes, bool host) {
    size_t free, total;
    cudaMemGetInfo(&free, &total);
    if (cudaError_t e = synchronize("cudaMalloc", false)) return e;
    if ((!host && bytes > free) || posix_memalign(p, 256, bytes + BAND + !bytes))
        REFUSE(cudaErrorMemoryAllocation, "%zu bytes asked for, %zu free", bytes, free);
    memset(*p, 0xFF, bytes);                        // NaNs, so that what nobody wrote shows; each time
    static int other;                               // others, so that it never compares equal
    if (other++ % 2) for (size_t i = 1; i < bytes; i += 2) ((uint8_t *)*p)[i] = 0x7F;
    memset((char *)*p + bytes, 0xFE, BAND);
    allocations[(char *)*p] = {bytes, host, device};
    if (!host) in_use += bytes;
    if (!host && note_memory) note_memory(*p, bytes, "device memory");
    return cudaSuccess;
}
cudaError_t release(void *p, bool host) {
    auto a = allocations.find((char *)p);
    if (cudaError_t e = synchronize("cudaFree", false)) return e;
    if (!p && !host) return cudaSuccess;             // of cudaFree only is that promised
    if (a == allocations.end() || a->second.host != host) REFUSE(cudaErrorInvalidValue, "free of %p", p);
    if (!host) in_use -= a->second.bytes;
    for (size_t i = 0; i < BAND; i++)
        if (((uint8_t *)p)[a->second.bytes + i] != 0xFE)
            REFUSE(cudaErrorInvalidValue, "byte %zu behind the %zu of an allocation was written", i,
                   a->second.bytes);
    if (note_memory) note_memory(p, 0, nullptr);
    allocations.erase(a);
    free(p);
    return cudaSuccess;
}
} // namespace emu
using namespace emu;

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = (size_t)setting("EMU_MEM_MIB", 8192) << 20;
    *free = *total > in_use ? *total - in_use : 0;
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind, cudaStream_t s) {
    auto wrong = [=](const void *p, bool device) {  // pinned memory belongs to both sides
        const Allocation *a = find(p, device ? n : 0);
        return device ? !a : a && !a->host;
    };
    if (wrong(to, kind != cudaMemcpyDeviceToHost) || wrong(from, kind != cudaMemcpyHostToDevice))
        REFUSE(cudaErrorInvalidValue, "cudaMemcpy of %zu bytes from %p to %p", n, from, to);
    return submit(s, [=] { memmove(to, from, n); });
}
cudaError_t cudaMemset2DAsync(void *p, size_t pitch, int value, size_t width, size_t rows, cudaStream_t s) {
    if (width > pitch || !find(p, rows ? (rows - 1) * pitch + width : 0))
        REFUSE(cudaErrorInvalidValue, "cudaMemset of %zu times %zu bytes at %p", rows, width, p);
    return submit(s, [=] { for (size_t r = 0; r < rows; r++) memset((char *)p + r * pitch, value, width); });
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    if (!s || captured) REFUSE(cudaErrorStreamCaptureUnsupported,
            "capture one stream, and not the default one");
    *s = {new CUgraph_st(), false};
    captured = s;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    if (!s || captured != s) REFUSE(cudaErrorInvalidValue, "this stream is not under capture");
    captured = nullptr;
    if (open_groups) EMU_SAY("the capture ends in an open group, whose work begins at ncclGroupEnd");
    s->spoiled |= open_groups > 0;
    *graph = s->spoiled ? nullptr : s->graph;
    if (!s->spoiled) return cudaSuccess;
    delete s->graph;
    REFUSE(cudaErrorStreamCaptureInvalidated, "an earlier mistake has spoiled the capture");
}
cudaError_t cudaGetDeviceCount(int *n) {
    *n = setting("EMU_GPUS", 8);
    return getenv("EMU_OLD_DRIVER") ? cudaErrorInsufficientDriver : cudaSuccess;
}
cudaError_t cudaGetDevice(int *current) { return *current = device, cudaSuccess; }
cudaError_t cudaSetDevice(int chosen) {
    const int n = setting("EMU_GPUS", 8);
    if (chosen < 0 || chosen >= n) REFUSE(cudaErrorInvalidDevice, "device %d of %d", chosen, n);
    device = chosen;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    const int sm = setting("EMU_SM", 90);
    size_t free, total;
    cudaMemGetInfo(&free, &total);
    if (device < 0 || device >= setting("EMU_GPUS", 8)) REFUSE(cudaErrorInvalidDevice, "device %d", device);
    *p = {"emulated GPU", total, 48 << 10, 227 << 10, sm / 10, sm % 10, 4, 32, 1024, 50 << 20};
    return cudaSuccess;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() {
    const cudaError_t e = last_error;
    last_error = cudaSuccess, unasked = nullptr;
    return e;
}
template <class T, class F>
static T change(T *p, T v, F f, const void *code) {  // race.cpp hears of it as a whole
    T old, now;
    if (note_access) note_access(p, sizeof(T), ATOMIC, code);
    __atomic_load(p, &old, __ATOMIC_SEQ_CST);
    do now = f(old, v); while (!__atomic_compare_exchange(p, &old, &now, 0, __ATOMIC_SEQ_CST,
            __ATOMIC_SEQ_CST));
    return old;
}
int atomicAdd(int *p, int v) { return change(p, v, std::plus<int>(), __builtin_return_address(0)); }
unsigned atomicAdd(unsigned *p, unsigned v) {
    return change(p, v, std::plus<unsigned>(), __builtin_return_address(0));
}
float atomicAdd(float *p, float v) { return change(p, v, std::plus<float>(), __builtin_return_address(0)); }
int atomicMax(int *p, int v) {
    return change(p, v, [](int a, int b) { return a > b ? a : b; }, __builtin_return_address(0));
}
