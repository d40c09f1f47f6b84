/*
bench.h: what the files of this folder share. A file describes its kernels (arrays, reference, versions,
shapes) in a table of Kernel and ends in lab(): this checks each version at each shape and, on a GPU, times
it.

  ./gelu           all versions of all kernels of the file, at odd shapes and at large ones
  ./gelu 3         version 3 of each only
  ./gelu check     at odd shapes only, nothing is timed: all that the emulator of dev/emu does
  ./gelu tiny      times odd shapes too: shows that timing works, and nothing else
  ./gelu list      names of kernels, versions and their functions, for table.sh

Checks. Inputs are N(0,1), new for every shape. What is expected comes from the function of train_us.c. Before
each run outputs are poisoned with NaN and inputs restored; after it an output may be off by so many units in
the last place of its format, in so large a share of its values; an input must be what it was; nothing beyond
the end of an array may have changed. NaN never passes.

Times. The arrays exist so often that all together are three times the L2 cache, and a run takes the next copy
(what a kernel updates it finds as its last run left it). The time is the median of samples of a millisecond.
The floor is the time in which the card would move every byte of input and output once, at the rate at which
it copies 1 GiB, or do the arithmetic, at the rate of an 8192^3 product by cuBLASLt; both rates are the best
of eight at the start of the same run.
*/
#pragma once
#ifndef US_NO_MAIN
#define US_NO_MAIN
#endif
#ifndef US_SOURCE
#define US_SOURCE "../../train_us.cu"
#endif
#include US_SOURCE

#ifdef __CUDACC__
static const bool emulated = false;
#else
static const bool emulated = true;
#endif

// ---- Arrays -----------------------------------------------------------------------------------------------
typedef enum { INPUT, OUTPUT, UPDATED } Role;
typedef struct {
    const char* name;
    Role role;
    Format format;
    long n, size;         // values, and bytes of each
    float *value, *want;  // what an input is, what is expected of an output; want = NaN: not to be written
    double units, share;  // allowed: units in the last place; the share of values that are not equal
    uint8_t *bits, *device;
    long stride;          // bytes from one copy on the device to the next
} Array;
static Array arrays[32];
static int num_arrays, copies, copy;  // copy: the one that at() finds

static Array* new_array(const char* name, Role role, Format format, long n) {
    if (num_arrays == 32) die("more than 32 arrays");
    Array* a = &arrays[num_arrays++];
    memset(a, 0, sizeof *a);
    a->name = name, a->role = role, a->format = format, a->n = n;
    a->size = format == FP32 ? 4 : format == BF16 ? 2 : 1;
    return a;
}
// n values of N(0, std^2), rounded to the format. A file may set others: then call encode().
static void encode(Array* a) {
    if (!a->bits) a->bits = (uint8_t*)alloc((double)(a->n * a->size));
    #pragma omp parallel for
    for (long i = 0; i < a->n; i++) {
        const uint32_t u = float_bits(a->value[i] = round_to(a->value[i], a->format));
        if (a->size == 4) memcpy(a->bits + 4 * i, &u, 4);
        if (a->size == 2) a->bits[2 * i] = (uint8_t)(u >> 16), a->bits[2 * i + 1] = (uint8_t)(u >> 24);
        if (a->size == 1) a->bits[i] = fp8_encode(a->value[i], a->format);
    }
}
static Array* input(const char* name, Format format, long n, float std) {
    static uint64_t seed;
    Array* a = new_array(name, INPUT, format, n);
    a->value = floats((double)n);
    fill_normal(a->value, n, std, ++seed, stream_of(name));
    encode(a);
    return a;
}
// Bytes that are no floats: tokens, structs.
static Array* input_bytes(const char* name, const void* data, long n) {
    Array* a = new_array(name, INPUT, E4M3, n);  // of one byte each
    memcpy(a->bits = (uint8_t*)alloc((double)n), data, (size_t)n);
    return a;
}
// The file writes what is expected into want.
static Array* output(const char* name, Format format, long n, double units, double share) {
    Array* a = new_array(name, OUTPUT, format, n);
    a->want = floats((double)n);
    a->units = units, a->share = share;
    return a;
}
// An input that the kernel changes; want begins as a copy of it.
static Array* updated(const char* name, Format format, long n, float std, double units, double share) {
    Array* a = input(name, format, n, std);
    a->role = UPDATED, a->want = floats((double)n);
    a->units = units, a->share = share;
    memcpy(a->want, a->value, sizeof(float) * (size_t)n);
    return a;
}
// The FP8 codes of values (N,W), row by row, and transposed, padded to 16 in rows that nobody writes.
static void output_codes(Array** q, Array** qt, const float* values, long N, long W, Format format,
                         double share) {
    const long Np = padded(N);
    *q = output("codes", format, N * W, 1, share);
    *qt = output("codes transposed", format, W * Np, 1, share);
    #pragma omp parallel for
    for (long w = 0; w < W; w++)
        for (long n = 0; n < Np; n++) {
            const float v = n < N ? round_to(values[n * W + w], format) : NAN;
            (*qt)->want[w * Np + n] = v;
            if (n < N) (*q)->want[n * W + w] = v;
        }
}
static unsigned blocks(long n, long each) { return (unsigned)div_up(n, each); }  // of a launch
// Where an array is in the copy that is used now; NULL for none.
template <class X> static X* at(const Array* a) { return a ? (X*)(a->device + copy * a->stride) : NULL; }
static Dest<bf16> dest(const Array* out, const Array* q, const Array* qt, long N, long W, Format format) {
    const Dest<bf16> d = {at<bf16>(out), at<fp8>(q), at<fp8>(qt), W, padded(N), format};
    return d;
}

// Device memory for all arrays, in one copy of exactly their sizes (then the address sanitizer sees each
// end), or in several with room between them.
enum { GUARD = 256, GUARD_BYTE = 0xA5 };
static void arrays_upload(int several) {
    long bytes = 0;
    for (int i = 0; i < num_arrays; i++) bytes += arrays[i].n * arrays[i].size;
    copies = 1, copy = 0;
    if (several) {
        cudaDeviceProp card;
        size_t left, total;
        CUDA(cudaGetDeviceProperties(&card, 0));
        CUDA(cudaMemGetInfo(&left, &total));
        const long most = (long)left / 2 / (bytes + num_arrays * 2 * GUARD);
        copies = (int)min_l(min_l(2 + 3L * card.l2CacheSize / bytes, most), 64);
        if (copies < 2) die("%ld bytes twice are more than this GPU has", bytes);
    }
    for (int i = 0; i < num_arrays; i++) {
        Array* a = &arrays[i];
        a->stride = several ? (a->n * a->size + 2 * GUARD - 1) / GUARD * GUARD : a->n * a->size;
        CUDA(cudaMalloc(&a->device, (size_t)(a->stride * copies)));
        CUDA(cudaMemset(a->device, several ? GUARD_BYTE : 0xFF, (size_t)(a->stride * copies)));
        for (int k = 0; k < copies && a->bits; k++)
            CUDA(cudaMemcpy(a->device + k * a->stride, k ? a->device : a->bits, (size_t)(a->n * a->size),
                            k ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice));
    }
    CUDA(cudaDeviceSynchronize());
}
// Device memory that only the kernels themselves use, until the shape is done; NaN before each checked run.
static struct { void* p; size_t bytes; } spaces[8];
static int num_spaces;
static void* work_space(size_t bytes) {
    if (num_spaces == 8) die("more than 8 work spaces");
    spaces[num_spaces].bytes = bytes;
    CUDA(cudaMalloc(&spaces[num_spaces].p, bytes));
    return spaces[num_spaces++].p;
}
static void arrays_free(void) {
    while (num_spaces) CUDA(cudaFree(spaces[--num_spaces].p));
    for (; num_arrays; num_arrays--) {
        Array* a = &arrays[num_arrays - 1];
        CUDA(cudaFree(a->device));
        free(a->value), free(a->want), free(a->bits);
    }
}

// ---- The table that a file fills --------------------------------------------------------------------------
typedef struct {
    const char* idea = NULL;       // one line: what this version changes
    void (*run)(void) = NULL;      // launches it, on at() of the arrays
    const char* functions = NULL;  // the __global__ functions it is made of, separated by spaces
    int sm = 0;                    // the least compute capability, 89 for 8.9, if not the trainer's
    long (*shared)(void) = NULL;   // bytes of dynamic shared memory at this shape, where a card may have less
} Version;
typedef struct {
    const char *name, *dims;          // of the kernel; of its shape's numbers, separated by spaces
    void (*open)(const long* shape);  // makes the arrays and what is expected
    const Version* versions;          // up to one without run; the last is train_us.cu's
    long small[8][4], large[4][4];    // shapes
    int from_zero = 0;                // version 0 is a library's, to compare with
    void (*expect)(int version) = NULL;  // where versions do different things: sets what is expected of one
    void (*collect)(void) = NULL;        // after a checked run: brings what is in work spaces into outputs
} Kernel;
static int number(const Kernel* k, int i) { return i + !k->from_zero; }  // of versions[i]
// Set by open: the arithmetic, if it may be what limits, and the format of the product it is compared with;
// the bytes, if not each array once (an updated one twice).
static double floor_flops, floor_bytes;
static Format floor_format;

// ---- Checks -----------------------------------------------------------------------------------------------
static int checks_passed, checks_failed;
static float decode(const Array* a, const uint8_t* bits, long i) {
    uint32_t u = 0;
    if (a->size == 1) return fp8_decode(bits[i], a->format);
    memcpy((uint8_t*)&u + 4 - a->size, bits + i * a->size, (size_t)a->size);
    return bits_float(u);
}
// The unit in the last place of values like x.
static float unit_of(Format format, float x) {
    const int e = (int)(float_bits(x) >> 23 & 255) - 127, least = FORMATS[format].min_exponent;
    return ldexpf(1, (e > least ? e : least) - FORMATS[format].mantissa_bits);
}
// By how many units value i is off: 0 where nothing was to be written and nothing was, infinite where it was,
// or where it is not finite. Values below `least` are held to the unit there.
static double error_of(const Array* a, const uint8_t* got, long i, float least) {
    const float want = a->want[i], x = decode(a, got, i);
    if (isnan(want)) {
        for (long k = i * a->size; k < (i + 1) * a->size; k++) if (got[k] != 0xFF) return (double)INFINITY;
        return 0;
    }
    if (x == want) return 0;
    const double error = fabs((double)x - want) / unit_of(a->format, fmaxf(fabsf(want), least));
    return isnan(error) ? (double)INFINITY : error;
}
// "" or what is wrong with the array after a run. Values far below the others, 1/64 of their root mean
// square, are held to the unit there: sums of larger ones made them.
static const char* wrong(const Array* a) {
    const long bytes = a->n * a->size, n = a->want ? a->n : 0;
    uint8_t* got = (uint8_t*)alloc((double)a->stride);
    double square = 0, worst = 0, count = 0, differ = 0, beyond = 0;
    long first = n;
    const char* what = "";
    CUDA(cudaMemcpy(got, a->device + copy * a->stride, (size_t)a->stride, cudaMemcpyDeviceToHost));
    for (long i = bytes; i < a->stride && !*what; i++)
        if (got[i] != GUARD_BYTE) what = form("%s: byte %ld beyond its end was written", a->name, i - bytes);
    if (a->role == INPUT && memcmp(got, a->bits, (size_t)bytes) != 0)
        what = form("%s, an input, changed", a->name);
    #pragma omp parallel for reduction(+ : square, count)
    for (long i = 0; i < n; i++)
        if (!isnan(a->want[i])) square += (double)a->want[i] * a->want[i], count++;
    const float least = a->size > 1 && count > 0 ? (float)sqrt(square / count) / 64 : 0;
    #pragma omp parallel for reduction(max : worst) reduction(+ : differ, beyond) reduction(min : first)
    for (long i = 0; i < n; i++) {
        const double error = error_of(a, got, i, least);
        worst = error > worst ? error : worst, differ += error != 0;
        if (!(error <= a->units)) beyond++, first = i < first ? i : first;
    }
    if (!*what && beyond > 0 && isnan(a->want[first]))
        what = form("%s[%ld] is padding and was written", a->name, first);
    if (!*what && beyond > 0)
        what = form("%s[%ld] is %g, not %g; %.0f of %.0f values are off by more than %g units, by up to %.3g",
                    a->name, first, (double)decode(a, got, first), (double)a->want[first], beyond, count,
                    a->units, worst);
    if (!*what && !(differ <= a->share * count + (a->share > 0 ? 2 : 0)))
        what = form("%s: %.2f %% of the values differ, %.2f %% allowed", a->name, 100 * differ / count,
                    100 * a->share);
    free(got);
    return what;
}
// A version once more into a graph that nobody runs: a launch that does not name the stream, and so would not
// be in the time that is measured, fails there.
static void check_stream(void (*run)(void)) {
    cudaGraph_t graph;
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    run();
    const cudaError_t e = cudaStreamEndCapture(stream, &graph);
    if (e != cudaSuccess)
        die("%s: a kernel is not launched on `stream`, which is a launch's fourth argument",
            cudaGetErrorString(e));
    CUDA(cudaGraphDestroy(graph));
}
static void check_version(const Kernel* k, int i, const char* shape) {
    static char where[256];
    const char* what = "";
    copy = 0;
    snprintf(where, sizeof where, "%s, version %d,%s: ", k->name, number(k, i), shape);
    if (k->expect) k->expect(number(k, i));
    for (int j = 0; j < num_arrays; j++) {
        Array* a = &arrays[j];
        if (a->bits) CUDA(cudaMemcpy(a->device, a->bits, (size_t)(a->n * a->size), cudaMemcpyHostToDevice));
        else CUDA(cudaMemset(a->device, 0xFF, (size_t)(a->n * a->size)));
    }
    for (int j = 0; j < num_spaces; j++) CUDA(cudaMemset(spaces[j].p, 0xFF, spaces[j].bytes));
    CUDA(cudaDeviceSynchronize());
#ifndef __CUDACC__
    emu::context = where;
#endif
    k->versions[i].run();
    if (k->collect) k->collect();
    CUDA(cudaStreamSynchronize(stream));
    for (int j = 0; j < num_arrays && !*what; j++) what = wrong(&arrays[j]);
    check_stream(k->versions[i].run);
    if (*what) printf("  FAILED: %s%s\n", where, what);
    *(*what ? &checks_failed : &checks_passed) += 1;
}

// ---- Times ------------------------------------------------------------------------------------------------
static double copy_bandwidth(size_t bytes) {  // bytes read and written, per second
    void *a, *b;
    cudaEvent_t start, end;
    double best = 0;
    CUDA(cudaMalloc(&a, bytes));
    CUDA(cudaMalloc(&b, bytes));
    CUDA(cudaMemset(a, 1, bytes));
    CUDA(cudaEventCreate(&start));
    CUDA(cudaEventCreate(&end));
    for (int i = 0; i < 8; i++) {
        float ms;
        CUDA(cudaEventRecord(start, stream));
        CUDA(cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, stream));
        CUDA(cudaEventRecord(end, stream));
        CUDA(cudaEventSynchronize(end));
        CUDA(cudaEventElapsedTime(&ms, start, end));
        best = fmax(best, 2e3 * (double)bytes / ms);
    }
    CUDA(cudaEventDestroy(start));
    CUDA(cudaEventDestroy(end));
    CUDA(cudaFree(a));
    CUDA(cudaFree(b));
    return best;
}
static int by_time(const void* a, const void* b) {
    return (*(const float*)a > *(const float*)b) - (*(const float*)a < *(const float*)b);
}
// Milliseconds of each of so many samples, of so many runs.
static void take_samples(float* ms, int samples, int runs, void (*run)(void)) {
    static cudaEvent_t before, after;
    if (!before) CUDA(cudaEventCreate(&before));
    if (!after) CUDA(cudaEventCreate(&after));
    for (int i = 0; i < samples; i++) {
        CUDA(cudaEventRecord(before, stream));
        for (int k = 0; k < runs; k++) {
            copy = (copy + 1) % copies;
            run();
        }
        CUDA(cudaEventRecord(after, stream));
        CUDA(cudaEventSynchronize(after));
        CUDA(cudaEventElapsedTime(&ms[i], before, after));
    }
}
// Seconds of a run, the median of samples. A sample is one run after the other for about a millisecond, so
// that neither the events around it nor the host's first launch show. Before them some 30 ms to warm up.
static double median_time(void (*run)(void)) {
    enum { MOST = 100 };
    float ms[MOST];
    take_samples(ms, 1, 1, run);  // it loads what it needs
    take_samples(ms, 1, 4, run);
    const float one = fmaxf(ms[0] / 4, 1e-4f);
    const int runs = emulated ? 1 : (int)fminf(1000, ceilf(1 / one)), most = emulated ? 5 : MOST;
    take_samples(ms, (int)fminf((float)most, ceilf(30 / (one * (float)runs))), runs, run);
    const int samples = (int)fmaxf(5, fminf((float)most, 100 / (one * (float)runs)));
    take_samples(ms, samples, runs, run);
    qsort(ms, (size_t)samples, sizeof *ms, by_time);
    return 1e-3 * ms[samples / 2] / runs;
}

// ---- The program ------------------------------------------------------------------------------------------
static struct {
    double copy, product[4];
    int sm;
    long shared;
} this_card;  // bytes/s; FLOP/s by format; bytes

static void shape_text(char text[128], const Kernel* k, const long* shape) {
    int length = 0;
    for (const char* name = k->dims; *name && length < 100; name += strspn(name, " ")) {
        const int n = (int)strcspn(name, " ");
        length += snprintf(text + length, (size_t)(128 - length), " %.*s %ld", n, name, *shape++);
        name += n;
    }
}
static int wanted(const Kernel* k, int i, int only) {
    const Version* v = &k->versions[i];
    return (only < 0 || only == number(k, i)) && v->sm <= this_card.sm &&
           !(v->shared && v->shared() > this_card.shared);
}
static void bench_shape(const Kernel* k, const char* shape, int only) {
    double bytes = floor_bytes, first = 0;
    for (int i = 0; i < num_arrays && floor_bytes == 0; i++)
        bytes += (double)(arrays[i].n * arrays[i].size) * (arrays[i].role == UPDATED ? 2 : 1);
    const double product = this_card.product[floor_format], memory = bytes / this_card.copy;
    const double arithmetic = floor_flops > 0 && product > 0 ? floor_flops / product : 0;
    const int flops = floor_flops > 0;
    const double least = fmax(arithmetic, memory), work = flops ? floor_flops : bytes;
    printf("\n### %s:%s\n\nFloor: %.1f us for %.1f MB", k->name, shape, memory * 1e6, bytes * 1e-6);
    if (flops) printf(", %.1f us for %.1f GFLOP", arithmetic * 1e6, floor_flops * 1e-9);
    printf("\n\n| | version | us | %s | of the floor | speed |\n|---|---|---|---|---|---|\n",
           flops ? "TFLOP/s" : "GB/s");
    for (int i = 0; k->versions[i].run; i++) {
        const Version* v = &k->versions[i];
        if (!wanted(k, i, only)) continue;
        const double time = median_time(v->run);
        if (first == 0) first = time;
        printf("| %d | %s | %.1f | %.0f | %.0f %% | %.2f x |\n", number(k, i), v->idea, time * 1e6,
               work / time * (flops ? 1e-12 : 1e-9), 100 * least / time, first / time);
        fflush(stdout);
    }
}
static void (*after)(int tiny);  // set by a file's main(): what it measures when its versions are done
template <int count>
static int lab(int argc, char** argv, const char* file, const Kernel (&kernels)[count]) {
    int only = -1, check = emulated, tiny = 0, number_wrong = 1;
    program = file;
    for (int i = 1; i < argc; i++) {
        char* end;
        const long n = strtol(argv[i], &end, 10);
        if (strcmp(argv[i], "check") == 0) check = 1;
        else if (strcmp(argv[i], "tiny") == 0) tiny = 1;
        else if (strcmp(argv[i], "list") == 0) {
            for (const Kernel& k : kernels)
                for (int j = 0; k.versions[j].run; j++)
                    printf("%s\t%s\t%d\t%s\t%s\n", file, k.name, number(&k, j), k.versions[j].idea,
                           k.versions[j].functions);
            return 0;
        } else if (*end || n < 0 || end == argv[i] || n > 99 || only >= 0)
            die("%s: usage: %s [check | tiny | list] [the number of one version]", argv[i], argv[0]);
        else only = (int)n;
    }
    for (const Kernel& k : kernels)
        for (int j = 0; k.versions[j].run; j++) number_wrong &= only >= 0 && only != number(&k, j);
    if (number_wrong) die("there is no version %d; %s list names them", only, argv[0]);
    cudaDeviceProp card;
    this_card.sm = open_card(&card, form("make -C dev/cuda check FILES=%s runs it on a CPU", file));
    this_card.shared = (long)card.sharedMemPerBlockOptin;
    setvbuf(stdout, NULL, _IOLBF, 0);  // what is there stays there if someone stops this
    CUDA(cudaStreamCreate(&stream));  // one that the default stream waits for, and that waits for it
    LT(cublasLtCreate(&lt.handle));
    CUDA(cudaMalloc(&lt.workspace, WORKSPACE));
    if (!check || tiny) {
        const long n = tiny ? 128 : 8192;
        this_card.copy = copy_bandwidth(tiny ? 1 << 20 : (size_t)1 << 30);
        this_card.product[BF16] = measure_product(CUDA_R_16BF, n);
        this_card.product[E4M3] = this_card.sm < 89 ? 0 : measure_product(CUDA_R_8F_E4M3, n);
        printf(
            "## %s on %s\n\nMeasured in this run: copy %.2f TB/s, product of %ld^3 %.0f TFLOP/s in BF16, "
            "%.0f in "
            "FP8.\n",
            file, card.name, this_card.copy * 1e-12, n, this_card.product[BF16] * 1e-12,
            this_card.product[E4M3] * 1e-12);
        if (emulated) printf("\nTimes of the emulator: they say nothing about a GPU.\n");
    }
    for (const Kernel& k : kernels) {
        for (int i = 0; k.versions[i].run; i++)
            if (k.versions[i].sm > this_card.sm)
                printf("%s: version %d needs compute capability %d.%d, this is %d.%d\n", k.name,
                       number(&k, i), k.versions[i].sm / 10, k.versions[i].sm % 10, this_card.sm / 10,
                       this_card.sm % 10);
        for (int i = 0; i < (check || tiny ? 8 : 8 + 4); i++) {
            const long* s = i < 8 ? k.small[i] : k.large[i - 8];
            char shape[128];
            if (!s[0]) continue;
            shape_text(shape, &k, s);
            floor_flops = floor_bytes = 0, floor_format = BF16;
            k.open(s);
            arrays_upload(!emulated || tiny);
            for (int j = 0; k.versions[j].run; j++)
                if (wanted(&k, j, only)) check_version(&k, j, shape);
                else if (k.versions[j].shared && k.versions[j].shared() > this_card.shared)
                    printf("%s, version %d,%s: wants %ld bytes of shared memory, a block has %ld\n", k.name,
                           number(&k, j), shape, k.versions[j].shared(), this_card.shared);
            if (i >= 8 || tiny) bench_shape(&k, shape, only);
            arrays_free();
        }
    }
    if (after && only < 0 && (!check || tiny)) after(tiny);
    CUDA(cudaFree(lt.workspace));
    products_close();
    CUDA(cudaStreamDestroy(stream));
    printf("%s: %d passed, %d failed\n", file, checks_passed, checks_failed);
    return checks_failed > 0 || checks_passed == 0;
}
