/*
matmul.c: the CPU's matrix product, from its definition to what train_us.c ships, one idea a version.

  out(i,j) = alpha * sum over k of a(i,k) b(j,k), added to what is there if `accumulate`; i < M, j < N, k < K

The definition is train_us.c's matmul_plain; the last version is its matmul: included, not copied. All have
the same arguments. Versions 1 to 4 are for FP32. From 5 on operands have formats: E4M3 is timed as well.
`make -C dev/cpu check` and `bench` run all of them; dev/cpu/matmul 5, or check 5, the fifth alone.

The floor. A product is 2 M N K operations, 0.4 and 0.9 G at the two shapes that are timed. Memory does not
limit it: that is 5 and 10 MB, of which each value is used hundreds of times. A core of today has two units
that multiply and add a vector in every cycle, 64 operations with AVX-512, if there are always two such
instructions whose operands are at hand. How to have them there is all of the story.
*/
#define US_NO_MAIN
#include "../../train_us.c"
#include "peak.h"
#define INLINE __attribute__((always_inline)) static inline
// What every version is given, and hands on.
#define PRODUCT float* out, long ld, Operand a, Operand b, long M, long N, long K, float alpha, \
                int accumulate, __attribute__((unused)) Format format
#define SAME out, ld, a, b, M, N, K, alpha, accumulate, format

// ---- 1. The definition: matmul_plain ----------------------------------------------------------------------
// One sum at a time, and each addition to it waits two to four cycles for the one before, in which the units
// could have done up to 8 vectors of 16: a hundredth of a core's peak. No compiler may help, as another order
// of additions rounds otherwise (-ffast-math would let it, and would let NaN pass the tests).

// ---- 2. The order of the loops ----------------------------------------------------------------------------
// With j inside k the sums of a row grow side by side; none waits for another, each keeps its order, and
// compilers make vectors of them. It takes b's values of one k beside each other: b is transposed first, N K
// values moved for M N K products. (`width` is N rounded up to whole vectors, for version 4.)
static const float* transposed(const Operand* b, long N, long K, long width) {
    float* to = scratch(SCRATCH_TENSOR, width * K);
    for (long j0 = 0; j0 < width; j0 += NR)
        for (long k = 0; k < K; k++)
            for (long j = j0; j < j0 + NR; j++) to[k * width + j] = j < N ? b->p[j * b->row + k * b->col] : 0;
    return to;
}
static void add_rows(float* out, long ld, const Operand* a, const float* bt, long width, long M, long n,
                     long k0, long k1, float alpha, int accumulate) {
    for (long i = 0; i < M; i++) {
        float* restrict o = out + i * ld;
        if (k0 == 0 && !accumulate) zero(o, n);
        for (long k = k0; k < k1; k++) {
            const float x = alpha * a->p[i * a->row + k * a->col], *restrict bk = bt + k * width;
            for (long j = 0; j < n; j++) o[j] += x * bk[j];
        }
    }
}
static void order(PRODUCT) {
    const long width = div_up(N, NR) * NR;
    add_rows(out, ld, &a, transposed(&b, N, K, width), width, M, N, 0, K, alpha, accumulate);
}

// ---- 3. Blocks that stay in a cache -----------------------------------------------------------------------
// Version 2 reads all of b again for every row of out: 0.8 or 7 MB, from L2 or L3. A block of 8 x 768 of its
// values is 24 KB: it stays in L1 beside a row of out while all rows pass. It pays most where b is not in L2.
static void blocks(PRODUCT) {
    enum { DEEP = 8, WIDE = 768 };
    const long width = div_up(N, NR) * NR;
    const float* bt = transposed(&b, N, K, width);
    for (long k = 0; k < K; k += DEEP)
        for (long j = 0; j < N; j += WIDE)
            add_rows(out + j, ld, &a, bt + j, width, M, min_l(WIDE, N - j), k, min_l(K, k + DEEP), alpha,
                     accumulate);
}

// ---- 4. Sums that stay in registers -----------------------------------------------------------------------
// Version 3 loads two vectors and stores one for each FMA; a core can load two in a cycle and store one: that
// leaves half of its arithmetic idle. A tile of MR x NR sums in registers loads MR values and NV vectors for
// MR * NV FMAs (14 for 24 with AVX-512), none of which waits for another, and stores at its end.
static void registers(PRODUCT) {
    const long width = div_up(N, NR) * NR;
    const float* bt = transposed(&b, N, K, width);
    for (long k0 = 0; k0 < K; k0 += KC)
        for (long j = 0; j < N; j += NR)
            for (long i = 0; i < M; i += MR) {
                const long k1 = min_l(K, k0 + KC);
                const float* row[MR];
                for (int r = 0; r < MR; r++) row[r] = a.p + min_l(i + r, M - 1) * a.row;
                Vec c[MR][NV];
                memset(c, 0, sizeof c);
                for (long k = k0; k < k1; k++)
                    for (int r = 0; r < MR; r++)
                        for (int l = 0; l < NV; l++)
                            c[r][l] += row[r][k * a.col] * ((const Vec*)(bt + k * width + j))[l];
                store(out + i * ld + j, ld, (float*)c, alpha, min_l(MR, M - i), min_l(NR, N - j),
                      accumulate || k0 > 0, k1 == K ? format : FP32);
            }
}

// ---- 5. Packing -------------------------------------------------------------------------------------------
// Version 4's tile steps through b a row of `width` floats at a time: 3 or 9 KB, another page of memory with
// each k or two, and lines that meet in few sets of the cache; a's come from MR places. Copied once into the
// order in which the tile reads them, both are streams. The copy is also where formats belong: rounding a
// value costs more than an FMA, and is done once for a panel here, instead of once for a product.
typedef void Tile(float* sums, const float* a, const float* b, long words);
__attribute__((noinline)) static void bare_tile(float* sums, const float* a, const float* b, long words) {
    Vec c[MR][NV];
    memset(c, 0, sizeof c);
    for (long k = 0; k < words; k += WK, a += MR * WK)
        for (int p = 0; p < WK; p++, b += NR)
            for (int i = 0; i < MR; i++)
                for (int j = 0; j < NV; j++) c[i][j] += a[i * WK + p] * ((const Vec*)b)[j];
    memcpy(sums, c, sizeof c);
}
INLINE void by_panels(Tile* multiply, int R, int pairs, int ahead, PRODUCT) {
    const long depth = pairs ? 2 : 1, stretch = depth * KC;  // values of K in a word, and in a panel
    float *panels = scratch(SCRATCH_A, (M + WK + 2 * R) * KC), *panel = scratch(SCRATCH_B, NR * KC);
    for (long k = 0; k < K; k += stretch) {
        const long k1 = min_l(K, k + stretch), words = div_up(k1 - k, WK * depth) * WK;
        pack(panels, &a, 0, M, k, k1, words, pairs, 0);
        for (long j = 0; j < N; j += NR) {
            pack(panel, &b, j, min_l(N, j + NR), k, k1, words, pairs, 1);
            for (long i = 0; i < M; i += R) {
                float sums[PAIR_ROWS * NR] __attribute__((aligned(64))), *o = out + i * ld + j;
                const long rows = min_l(R, M - i);
                for (long r = 0; r < rows && ahead; r++)
                    for (int l = 0; l < NR; l += 16) __builtin_prefetch(o + r * ld + l, 1);
                multiply(sums, panels + i * words, panel, words);
                store(o, ld, sums, alpha, rows, min_l(NR, N - j), accumulate || k > 0,
                      k1 == K ? format : FP32);
            }
        }
    }
}
static void packing(PRODUCT) { by_panels(bare_tile, MR, 0, 0, SAME); }

// ---- 6. Threads -------------------------------------------------------------------------------------------
// A strip of rows for each. They meet once, at the end: no two write to the same lines, and each packs all of
// b for itself. (Panels shared by all take a wait for each, and come out of another core's cache.)
INLINE void by_strips(Tile* multiply, int R, int pairs, int ahead, PRODUCT) {
    const long rows = div_up(div_up(M, max_threads()), R) * R;
    #pragma omp parallel for schedule(static)
    for (long i = 0; i < M; i += rows)
        by_panels(multiply, R, pairs, ahead, out + i * ld, ld, view(a.p + i * a.row, a.row, a.col, a.format),
                  b, min_l(rows, M - i), N, K, alpha, accumulate, format);
}
static void threads(PRODUCT) { by_strips(bare_tile, MR, 0, 0, SAME); }

// ---- 7. Prefetch ------------------------------------------------------------------------------------------
// b's panel is in L1, a's come from L2, some 14 cycles away, and out from further still. train_us.c's tile
// asks for the next 16 k of a while it works on these; out is asked for before it begins. Hardware guesses
// most of that by itself.
static void prefetch(PRODUCT) { by_strips(tile, MR, 0, 1, SAME); }

// ---- 8. Pairs of BF16 -------------------------------------------------------------------------------------
// Where both operands are narrower than FP32, a word of a panel holds two values that follow in K, and one
// instruction multiplies pairs and adds both products: twice the work of an FMA with AVX512_BF16, 16 times as
// much in a cycle with AMX. FP8 values are exact in BF16, and products of two BF16 values in FP32.
static void pairs_of_bf16(PRODUCT) { by_strips(tile_pairs, PAIR_ROWS, 1, 1, SAME); }

// ---- A version of your own: its function here, and a row before the last ----------------------------------

// ---- 9. train_us.c's matmul -------------------------------------------------------------------------------
// Version 8, or 7 where an operand is FP32, and what makes it good at every shape: rows and columns divided
// so that threads pack the least; at most 2 MB of a at once; no threads for small products.
typedef struct { const char* idea; void (*run)(PRODUCT); int fp32, narrow; } Version;  // of which operands
static const Version VERSIONS[] = {
    {"the definition", matmul_plain, 1, 0}, {"order of the loops", order, 1, 0},
    {"blocks in a cache", blocks, 1, 0},    {"sums in registers", registers, 1, 0},
    {"packing", packing, 1, 1},             {"threads", threads, 1, 1},
    {"prefetch", prefetch, 1, 1},           {"pairs of BF16", pairs_of_bf16, 0, 1},
    {"train_us.c's matmul", matmul, 1, 1},
};
enum { COUNT = sizeof VERSIONS / sizeof *VERSIONS };
static int only;  // the one version that was asked for, or 0
static int runs(int v, int narrow) {
    return (!only || only == v + 1) && (narrow ? VERSIONS[v].narrow : VERSIONS[v].fp32) &&
           (VERSIONS[v].run != pairs_of_bf16 || multiplies_pairs());
}

// ---- The check --------------------------------------------------------------------------------------------
// Around `out`, guards that must stay what they are; in it, NaN if nothing is to be added to it; NaN between
// the operands' rows. Two orders of a sum of K products differ by some K 2^-24: a few times that is allowed,
// and a unit of a BF16 result. A product that is lost, or not rounded, is a thousand times as much.
static Operand operand(long rows, long K, int across, Format format, const char* name) {
    const long n = across ? rows : K, stride = n + 1, count = (across ? K : rows) * stride;
    float* p = floats((double)count);
    fill_normal(p, count, 1, 1, stream_of(name));
    for (long i = n; i < count; i += stride) p[i] = NAN;
    return across ? view(p, 1, stride, format) : view(p, stride, 1, format);
}
static int check(void) {
    static const long shapes[][3] = {{1, 1, 1}, {3, 17, 37}, {37, 130, 17}, {1, 130, 300}, {1100, 3, 5},
                                     {130, 37, 257}, {70, 90, 530}, {30, 33, 800}, {140, 8192, 1}};
    static const Format formats[][3] = {{FP32, FP32, FP32}, {E4M3, E5M2, FP32}, {BF16, BF16, BF16}};
    double worst[COUNT] = {0};
    int right[COUNT] = {0}, failed = 0;
    const char* wrong[COUNT] = {0};
    for (size_t test = 0; test < 24 * sizeof shapes / sizeof *shapes; test++) {
        const long *s = shapes[test / 24], M = s[0], N = s[1], K = s[2], ld = N % NR ? N + 3 : N;
        const long n = ld * (M + 2);  // a row of guards before and behind, and some between
        const Format* f = formats[test / 8 % 3];
        const int add = test & 1;
        const Operand a = operand(M, K, test & 2, f[0], "a"), b = operand(N, K, test & 4, f[1], "b");
        float *old = floats((double)n), *want = floats((double)n), *got = floats((double)n);
        fill_normal(old, n, 1, 1, stream_of("out"));
        for (long t = ld; t < n - ld && !add; t++) if (t % ld < N) old[t] = NAN;
        memcpy(want, old, sizeof(float) * (size_t)n);
        matmul_plain(want + ld, ld, a, b, M, N, K, 0.3f, add, f[2]);
        for (int v = 1; v < COUNT; v++) {
            if (!runs(v, f[0] != FP32) || wrong[v]) continue;
            memcpy(got, old, sizeof(float) * (size_t)n);
            VERSIONS[v].run(got + ld, ld, a, b, M, N, K, 0.3f, add, f[2]);
            right[v]++;
            for (long t = 0; t < n && !wrong[v]; t++) {
                const int inside = t >= ld && t < n - ld && t % ld < N;
                const double to = want[t], off = fabs(got[t] - to), unit = f[2] == BF16 ? 0x1p-7 : 0,
                             allowed = inside ? (double)(K + 16) * 0x1p-22 + unit * fabs(to) : 0;
                if (inside && !unit) worst[v] = fmax(worst[v], off / allowed);
                if (!(off <= allowed) || (inside && got[t] != round_to(got[t], f[2])))
                    wrong[v] = copied(form("%ld x %ld x %ld, %s, test %zu: out(%ld,%ld) is %g, not %g", M, N,
                                           K, FORMATS[f[0]].name, test, t / ld - 1, t % ld, got[t], to));
            }
        }
        free((void*)a.p), free((void*)b.p), free(old), free(want), free(got);
    }
    for (int v = 0; v < COUNT; v++) {
        if (only && only != v + 1) continue;
        printf("%d %-21s ", v + 1, VERSIONS[v].idea);
        if (wrong[v]) failed = 1, printf("FAILED: %s\n", wrong[v]);
        else if (right[v]) printf("right %d times, %.0f %% of what is allowed\n", right[v], 100 * worst[v]);
        else printf(v ? "left out: nothing here multiplies pairs\n" : "the measure of the others\n");
    }
    return failed;
}

// ---- The times --------------------------------------------------------------------------------------------
static void bench(long M, long N, long K) {
    float *a = floats((double)(M * K)), *b = floats((double)(N * K)), *out = floats((double)(M * N));
    double best[COUNT][2] = {{0}}, top[2] = {0}, start = seconds();  // operations a second
    fill_normal(a, M * K, 1, 1, stream_of("a")), fill_normal(b, N * K, 1, 1, stream_of("b"));
    for (int round = 0; round < 2 || seconds() - start < 7; round++) {
        for (int i = 0, p; i < 20; i++) p = i % 2 && multiplies_pairs(), top[p] = fmax(top[p], peak(p));
        for (int turn = 0; turn < 2 * COUNT; turn++) {
            const int v = turn / 2, narrow = turn % 2;
            const Format f = narrow ? E4M3 : FP32, g = narrow ? BF16 : FP32;
            double* rate = &best[v][narrow];
            if (!runs(v, narrow) || (round % 8 && *rate < 1e10)) continue;  // the slow one: not often
            // 20 ms, as threads that have slept may share a core at first
            for (double now, t = seconds(), end = t + 0.02; t < end; t = now) {
                VERSIONS[v].run(out, N, view(a, K, 1, f), view(b, K, 1, f), M, N, K, 0.1f, 0, g);
                now = seconds();
                *rate = fmax(*rate, 2.0 * (double)(M * N * K) / (now - t));
            }
        }
    }
    printf("\n%ld x %ld x %ld: GFLOP/s, and share of the peaks of %d threads: FMA %.0f, pairs %.0f (%s)\n"
           "%34s    of FMA %9s    of FMA  of pairs\n", M, N, K, max_threads(), 1e-9 * top[0], 1e-9 * top[1],
           multiplies_pairs() ? PAIRS_BY : "none here", "FP32", "E4M3");
    for (int v = 0; v < COUNT; v++) {
        printf("%d %-21s", v + 1, VERSIONS[v].idea);
        for (int i = 0; i < 2; i++)
            if (best[v][i] > 0) printf("%11.1f %6.0f %%", 1e-9 * best[v][i], 100 * best[v][i] / top[0]);
            else printf("%20s", "");
        if (best[v][1] > 0 && top[1] > 0) printf("%8.0f %%", 100 * best[v][1] / top[1]);
        printf("\n");
    }
    free(a), free(b), free(out);
}
int main(int argc, char** argv) {
    const int checks = argc > 1 && strcmp(argv[1], "check") == 0;
    only = argc > 1 + checks ? atoi(argv[1 + checks]) : 0;
    if (only < 0 || only > COUNT) die("there are versions 1 to %d", COUNT);
    wait_briefly(argv);
    if (!checks) bench(1024, 768, 256), bench(256, 2304, 768);
    return checks && check();
}
