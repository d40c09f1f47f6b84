/*
test_us.c: the tests of us.c. It includes the trainer, so that every function can be called: train_us.c, or
with -DUS_SOURCE train_us.cu, compiled for a GPU or for the emulator of dev/emu. Then `device` is the GPU:
tests of arithmetic that is not there are left out, and the tests that hold it to the CPU are added.

  make test                   all tests
  ./test_us NAME ...          the tests whose name contains NAME; with -x, no test after one that fails
  ./test_us -- FLAGS          this binary as the trainer (the tests of the command line start themselves so)

Every comparison is of the form error <= bound, false for NaN. Where a bound is not zero, a comment says why.
*/
#define US_NO_MAIN
#ifndef US_SOURCE
#define US_SOURCE "train_us.c"
#endif
#ifndef _GNU_SOURCE
#define _GNU_SOURCE  // as the trainer does
#endif
#include <unistd.h>
static int watched_fsync(int fd);
#define fsync watched_fsync  // test_archive looks at what is synced, and when
#include US_SOURCE
#undef fsync
#ifndef US_DEVICE
#define US_DEVICE CPU
#endif
#include <limits.h>
#include <sys/resource.h>
#include <sys/wait.h>

static const Device* const device = &US_DEVICE;
static int passed, failed;
static char work[1024], self[4096];  // a directory for files, removed at the end; the path of this program

__attribute__((format(printf, 2, 3))) static void check(int good, const char* format, ...) {
    va_list args;
    va_start(args, format);
    if (good) passed++;
    else {
        FILE* to = rank ? stderr : stdout;  // where another rank's is seen
        failed++;
        fprintf(to, "  FAILED: ");
        vfprintf(to, format, args);
        fprintf(to, "\n");
        fflush(to);
    }
    va_end(args);
}
// The larger of a worst error so far and another; NaN counts as infinite and stays.
static double worse(double worst, double error) {
    return error <= worst ? worst : isnan(error) ? (double)INFINITY : error;
}
static void check_below(double error, double bound, const char* what, const char* name) {
    check(error <= bound, "%s %s: error %.3g, bound %.3g", what, name, error, bound);
}

// ||a - b|| / ||b||; where b is all zero, whether a is.
static double distance(const float* a, const float* b, long n) {
    double difference = 0, norm = 0;
    for (long i = 0; i < n; i++)
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]), norm += (double)b[i] * b[i];
    return norm > 0 ? sqrt(difference / norm) : difference;
}
static float* normals(long n, float std, const char* name) {
    float* x = floats((double)n);
    fill_normal(x, n, std, 7, stream_of(name));
    return x;
}

// -----------------------------------------------------------------------------------------------------------
// Number formats

// The value of a code, from the definition (OCP 8-bit floating point specification, table 1), not from
// fp8_decode.
static double code_value(int code, Format format) {
    const int m = format == E4M3 ? 3 : 2, bias = format == E4M3 ? 7 : 15, e = (code & 0x7F) >> m,
              f = code & ((1 << m) - 1);
    double a = e ? (1.0 + f / (double)(1 << m)) * pow(2, e - bias) : f / (double)(1 << m) * pow(2, 1 - bias);
    if (format == E4M3 && (code & 0x7F) == 0x7F) a = NAN;
    if (format == E5M2 && e == 31) a = f ? NAN : INFINITY;
    return code & 0x80 ? -a : a;
}
// Nearest finite value to x by search over all codes; a tie goes to the even code.
static double nearest_value(double x, Format format) {
    double best = NAN;
    int best_code = -1;
    for (int code = 0; code < 256; code++) {
        double v = code_value(code, format);
        if (!isfinite(v) || signbit(v) != signbit(x)) continue;
        double d = fabs(v - x), e = fabs(best - x);
        if (best_code < 0 || d < e || (d == e && code % 2 == 0)) best = v, best_code = code;
    }
    return best;
}
// A copy of n floats that ends where a page begins that nobody may read.
static float* fenced(const float* x, long n) {
    const long page = sysconf(_SC_PAGESIZE), bytes = div_up(4 * n, page) * page;
    const int access = PROT_READ | PROT_WRITE, kind = MAP_PRIVATE | MAP_ANON;
    char* p = (char*)mmap(NULL, (size_t)(bytes + page), access, kind, -1, 0);
    if (p == MAP_FAILED || mprotect(p + bytes, (size_t)page, PROT_NONE)) die("no memory");
    return (float*)memcpy(p + bytes - 4 * n, x, sizeof(float) * (size_t)n);
}
static void unfence(float* x, long n) {
    const long page = sysconf(_SC_PAGESIZE), bytes = div_up(4 * n, page) * page;
    munmap((char*)(x + n) - bytes, (size_t)(bytes + page));
}

static int same(float a, float b) { return (isnan(a) && isnan(b)) || (float_bits(a) == float_bits(b)); }

static void test_formats(void) {
    for (int f = E4M3; f <= E5M2; f++) {
        const Format format = (Format)f;
        const char* name = FORMATS[f].name;
        const float max = format == E4M3 ? 448.0f : 57344.0f, least = format == E4M3 ? 0x1p-9f : 0x1p-16f;
        int wrong = 0;
        for (int code = 0; code < 256; code++) {
            float v = (float)code_value(code, format);
            wrong += !same(fp8_decode((uint8_t)code, format), v);
            if (!isfinite(v)) continue;
            wrong += fp8_encode(v, format) != code;
            wrong += !same(round_fp8(v, format), v);
        }
        check(wrong == 0, "%s: %d of 256 codes are wrong", name, wrong);
        check(FORMATS[f].max == max && fp8_decode(1, format) == least, "%s: largest or least value", name);
        wrong = 0;
        for (uint32_t high = 0; high < 65536; high++) {  // every BF16 value
            float x = bits_float(high << 16), r = round_fp8(x, format);
            if (isnan(x)) {
                wrong += !isnan(r) || !isnan(fp8_decode(fp8_encode(x, format), format));
                continue;
            }
            wrong += !same(r, (float)nearest_value(fmax(-2 * max, fmin(2 * max, x)), format));
            wrong += !same(r, fp8_decode(fp8_encode(x, format), format)) || !same(round_to(x, format), r);
        }
        check(wrong == 0, "%s: %d roundings of BF16 values are wrong", name, wrong);
        wrong = 0;
        for (int code = 0; code < 127; code++)  // each midpoint, and the floats beside it
            for (int sign = -1; sign <= 1; sign += 2) {
                float a = (float)code_value(code, format), b = (float)code_value(code + 1, format);
                if (!isfinite(b)) continue;
                float middle = (a + b) / 2, even = code % 2 ? b : a;
                wrong += round_fp8((float)sign * middle, format) != (float)sign * even;
                wrong += round_fp8((float)sign * nextafterf(middle, 0), format) != (float)sign * a;
                wrong += round_fp8((float)sign * nextafterf(middle, 1e9f), format) != (float)sign * b;
            }
        check(wrong == 0, "%s: %d midpoints are rounded wrongly", name, wrong);
        const float big[] = {max, nextafterf(max, 1e9f), 1.03f * max, 1.07f * max, 1e6f, FLT_MAX, INFINITY};
        for (int i = 0; i < 7; i++)
            check(round_fp8(big[i], format) == max && round_fp8(-big[i], format) == -max,
                  "%s: %g is not clipped", name, (double)big[i]);
        check(round_fp8(least / 2, format) == 0 && round_fp8(least * 0.51f, format) == least,
              "%s: least subnormal", name);
        check(signbit(round_fp8(-0.0f, format)) && isnan(round_fp8(-NAN, format)), "%s: -0 and NaN", name);
        float all[] = {1.03f, -1.07f, least * 0.3f, 1e9f, NAN, -INFINITY, 0.0f}, one[7];
        for (int i = 0; i < 7; i++) one[i] = round_to(all[i], format);
        round_all(all, 7, format);
        for (int i = 0; i < 7; i++) check(same(all[i], one[i]), "%s: round_all differs from round_to", name);
    }
    long wrong = 0;
    const uint32_t lows[] = {0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF};
    for (uint32_t high = 0; high < 65536; high++)
        for (int i = 0; i < 6; i++) {
            float x = bits_float(high << 16 | lows[i]), r = round_bf16(x);
            if (isnan(x)) { wrong += !isnan(r); continue; }
            if (isinf(x)) { wrong += r != x; continue; }
            double down =
                (double)bits_float(high << 16);  // towards zero; the step away from zero, by the exponent
            double step = ldexp(1, (int)fmax((double)((high >> 7) & 255), 1) - 127 - 7),
                   off = fabs((double)x - down) / step;
            int up = off > 0.5 || (off == 0.5 && high % 2);
            double want = copysign(fabs(down) + (up ? step : 0), (double)x);
            wrong += !(fabs(want) > 3.4e38 ? isinf(r) && signbit(r) == signbit(x) : (double)r == want);
        }
    check(wrong == 0, "BF16: %ld of 393216 roundings are wrong", wrong);
    // An FP8 operand is rounded from its BF16 value: 1.0625 + 2^-12 is a BF16 tie short of E4M3's midpoint
    // 1.0625.
    check(round_to(1.0625f + 0x1p-12f, E4M3) == 1.0f && round_fp8(1.0625f + 0x1p-12f, E4M3) == 1.125f,
          "E4M3 from BF16");
}

static void test_random(void) {
    const long n = 1 << 20;
    float *x = normals(n, 2.0f, "a"), *y = normals(n, 2.0f, "b"), *part = normals(1001, 2.0f, "a");
    double m1 = 0, m2 = 0, m4 = 0, xy = 0, lag = 0;
    for (long i = 0; i < n; i++) {
        double v = x[i] / 2.0;
        m1 += v / n, m2 += v * v / n, m4 += v * v * v * v / n, xy += v * y[i] / 2.0 / n;
        if (i) lag += v * x[i - 1] / 2.0 / n;
    }
    // standard errors at n = 2^20: 0.001, 0.0014, 0.0096, 0.001; bounds at five of them
    check(fabs(m1) <= 0.005 && fabs(m2 - 1) <= 0.007 && fabs(m4 - 3) <= 0.05, "moments %g %g %g of N(0,1)",
          m1, m2, m4);
    check(fabs(xy) <= 0.005 && fabs(lag) <= 0.005, "correlations %g %g", xy, lag);
    check(memcmp(x, part, 1001 * sizeof(float)) == 0, "a number depends on how many are drawn");
    fill_normal(part, 1001, 2.0f, 8, stream_of("a"));
    check(memcmp(x, part, 1001 * sizeof(float)) != 0, "another seed draws the same numbers");
    // A seed is a model that anyone gets again: by Steele, Lea and Flood's mix of 64 bits, in Python.
    static const struct { int i; double value; } drawn[] = {{0, 0.5308014}, {1, 2.0779291}, {2, -0.1305575},
        {3, -0.9205967}, {1000, 1.5017516}, {1001, -2.2800218}};
    for (int i = 0; i < 6; i++)
        check(fabs(x[drawn[i].i] - 2 * drawn[i].value) <= 1e-6, "number %d is %.7f", drawn[i].i,
              (double)x[drawn[i].i]);
    free(x), free(y), free(part);
}

static void test_exp(void) {
    double worst = 0;
    for (float x = -87.0f; x < 88.0f; x += 0.00137f)
        worst = worse(worst, fabs(fast_exp(x) / exp((double)x) - 1));
    check(worst <= 2.4e-7, "fast_exp: relative error %g, 2 units in the last place are 2.4e-7", worst);
    check(isnan(fast_exp(NAN)) && fast_exp(0) == 1 && fast_exp(-1000) < 2e-38f && fast_exp(1000) > 1e38f,
          "fast_exp: ends");
}

// -----------------------------------------------------------------------------------------------------------
// Matmul against a plain loop in double: the error of a sum of K FP32 products is at most K 2^-24 sum |a b|.

static void test_matmul(void) {
    // The last ones: several stretches of K; more rows and words than a block has; more than caches hold.
    const long shapes[][3] = {{1, 1, 1}, {1, 17, 300}, {5, 3, 2}, {13, 33, 257}, {64, 64, 64}, {127, 50, 513},
                              {300, 2100, 20}, {3, 40, 1700}, {1100, 20, 1100}, {520, 2048, 40}};
    for (int i = 0; i < 10; i++)
        for (int mode = 0; mode < 8; mode++) {
            const long M = shapes[i][0], N = shapes[i][1], K = shapes[i][2], ld = N + (N < 2048 ? 3 : 0);
            const int ta = mode & 1, tb = mode >> 1 & 1, accumulate = mode >> 2;
            float *a = normals(M * K, 1, "a"), *b = normals(N * K, 1, "b"), *out = normals(M * ld, 1, "out"),
                  *old = normals(M * ld, 1, "out");
            matmul(out, ld, view(a, ta ? 1 : K, ta ? M : 1, FP32), view(b, tb ? 1 : K, tb ? N : 1, FP32), M,
                   N, K, 0.5f, accumulate, FP32);
            if (M * N * K < 1e7) {
                float *a_end = fenced(a, M * K), *b_end = fenced(b, N * K);
                float* same_out = normals(M * ld, 1, "out");
                matmul(same_out, ld, view(a_end, ta ? 1 : K, ta ? M : 1, FP32),
                       view(b_end, tb ? 1 : K, tb ? N : 1, FP32), M, N, K, 0.5f, accumulate, FP32);
                check(memcmp(out, same_out, sizeof(float) * (size_t)(M * ld)) == 0, "operands elsewhere");
                unfence(a_end, M * K), unfence(b_end, N * K), free(same_out);
            }
            double worst = 0;
            for (long m = 0; m < M; m++)
                for (long n = 0; n < ld; n++) {
                    double sum = 0, size = 0;
                    for (long k = 0; k < K && n < N; k++) {
                        double p = (double)a[ta ? k * M + m : m * K + k] * b[tb ? k * N + n : n * K + k];
                        sum += 0.5 * p, size += fabs(p);
                    }
                    double want = n < N ? sum + (accumulate ? old[m * ld + n] : 0) : old[m * ld + n];
                    double bound = n < N ? (double)(K + 4) * 0x1p-24 * (size + fabs(want)) : 0,
                           error = fabs(out[m * ld + n] - want);
                    worst = worse(worst, error <= bound ? 0 : 1);
                }
            check(worst == 0, "matmul %ld x %ld x %ld, mode %d", M, N, K, mode);
            // Rounded operands: as the definition has it, but for the order of the sums.
            const Operand x = view(a, ta ? 1 : K, ta ? M : 1, E5M2),
                          y = view(b, tb ? 1 : K, tb ? N : 1, E4M3);
            memcpy(out, old, sizeof(float) * (size_t)(M * ld));
            matmul(out, ld, x, y, M, N, K, 0.5f, accumulate, FP32);
            matmul_plain(old, ld, x, y, M, N, K, 0.5f, accumulate, FP32);
            check_below(distance(out, old, M * ld), 1e-6, "matmul and its definition",
                        form("%ld x %ld x %ld, mode %d", M, N, K, mode));
            // A result is rounded once, at the end of K; and one operand in FP32 is no pair.
            float *rounded = normals(M * ld, 1, "out"), *again = normals(M * ld, 1, "out");
            matmul(again, ld, x, y, M, N, K, 0.5f, accumulate, FP32);
            matmul(rounded, ld, x, y, M, N, K, 0.5f, accumulate, BF16);
            for (long m = 0; m < M; m++) round_all(again + m * ld, N, BF16);
            check(memcmp(rounded, again, sizeof(float) * (size_t)(M * ld)) == 0,
                  "matmul %ld x %ld x %ld, mode %d: the result is not that in FP32, rounded", M, N, K, mode);
            Operand whole = x;
            whole.format = FP32;
            matmul(out, ld, whole, y, M, N, K, 0.5f, 0, FP32);
            matmul_plain(old, ld, whole, y, M, N, K, 0.5f, 0, FP32);
            check_below(distance(out, old, M * ld), 1e-6, "matmul of FP32 and E4M3",
                        form("%ld x %ld x %ld, mode %d", M, N, K, mode));
            free(a), free(b), free(out), free(old), free(rounded), free(again);
        }
    float a[] = {1.07f, 300, 2}, b[] = {1, 2, NAN}, out[2] = {0, 0};
    matmul(out, 1, view(a, 1, 1, E4M3), view(b, 1, 1, E4M3), 1, 1, 2, 1.0f, 0, FP32);
    check(out[0] == 1.125f + 2 * 288.0f, "matmul rounds its operands: %g", (double)out[0]);
    matmul(out, 1, view(a, 1, 1, E4M3), view(b, 1, 1, E4M3), 1, 1, 3, 1.0f, 0, BF16);
    check(isnan(out[0]), "NaN passes through matmul");
    float c[] = {1, 0x1p-8f}, d[] = {1, 1.5f};
    matmul(out, 1, view(c, 2, 1, FP32), view(d, 2, 1, FP32), 1, 1, 2, 1.0f, 0, BF16);
    check(out[0] == 1.0f + 0x1p-7f, "matmul rounds its result: %g", (double)out[0]);
}

// -----------------------------------------------------------------------------------------------------------
// Every layer's backward against central differences of its forward, without any oracle. The scalar is sum(r
// * out) with random r. In FP32 with a step h of 1/64 the difference is good to about 1e-7 / h + h^2 of the
// largest gradient: 3e-4; the bound is 2e-3.

typedef struct {
    int kind;  // which layer
    Activation activation;
    long B, T, C, H, O, V;
    float *x, *w, *w2, *skip, *out, *s1, *s2, *r;
    int *tokens;
} Layer;
static void layer_forward(Layer* l) {
    const long N = l->B * l->T;
    switch (l->kind) {
    case 0: linear_forward(l->out, l->x, l->w, 0.3f, &PRECISIONS[0], N, l->C, l->O); break;
    case 1:
        layernorm_forward(l->out, l->s1, l->s2, l->x, l->w, l->w2, l->skip, 0.8f, 0.6f, N, l->C, FP32);
        break;
    case 2: activation_forward(l->out, l->x, l->activation, 0.7f, 1.3f, N * l->C, FP32); break;
    case 3: attention_forward(l->out, l->x, 0.4f, 1.7f, l->B, 0, l->T, l->C, l->H, FP32); break;
    case 4: embedding_forward(l->out, l->tokens, l->w, l->w2, 0.7f, l->B, 0, l->T, l->C, FP32); break;
    case 5: memcpy(l->out, l->x, sizeof(float) * (size_t)(N * l->C));
            loss_forward_backward(l->s1, l->out, l->tokens, 0, 1.0f, N, l->V, l->C, FP32); break;
    }
}
static double layer_scalar(Layer* l, long n) {
    double sum = 0;
    layer_forward(l);
    const float* out = l->kind == 5 ? l->s1 : l->out;
    for (long i = 0; i < n; i++) sum += l->kind == 5 ? (double)out[i] : (double)out[i] * l->r[i];
    return sum;
}
static void check_gradient(Layer* l, long outputs, float* x, const float* dx, long n, const char* layer,
                           const char* of) {
    double worst = 0, largest = 0;
    for (long i = 0; i < n; i++) largest = fmax(largest, fabs(dx[i]));
    for (long i = 0; i < n; i += n > 400 ? n / 200 : 1) {
        const float old = x[i], h = 1.0f / 64;
        x[i] = old + h;
        double up = layer_scalar(l, outputs);
        x[i] = old - h;
        double error = fabs((up - layer_scalar(l, outputs)) / (2 * h) - dx[i]) / largest;
        worst = worse(worst, error);
        x[i] = old;
    }
    check_below(worst, 2e-3, layer, of);
}
static void test_gradients(void) {
    for (int odd = 0; odd < 2; odd++) {
        Layer l;
        memset(&l, 0, sizeof l);
        l.B = 2, l.T = odd ? 67 : 6, l.C = odd ? 15 : 32, l.H = odd ? 3 : 4, l.O = odd ? 7 : 24,
        l.V = odd ? 11 : 32;
        const long N = l.B * l.T, C = l.C;
        l.x = normals(N * 3 * C, 1, "x"), l.w = normals(60 * C, 1, "w"), l.w2 = normals(l.T * C, 1, "w2");
        l.skip = normals(N * C, 1, "skip"), l.out = normals(N * 3 * C, 1, "out"),
        l.r = normals(N * 3 * C, 1, "r");
        l.s1 = floats((double)N), l.s2 = floats((double)N), l.tokens = (int*)floats((double)N);
        float *dx = floats((double)(N * 3 * C)), *dw = floats(60.0 * (double)C),
              *dw2 = floats((double)(l.T * C));
        for (long i = 0; i < N; i++)
            l.tokens[i] = (int)(random_u64(1, 2, (uint64_t)i) % (uint64_t)min_l(l.V, 11));

        l.kind = 0;
        layer_forward(&l);
        memset(dw, 0xFF, sizeof(float) * (size_t)(l.O * C));  // NaN: without `add` it is written
        linear_backward(dx, dw, l.r, l.x, l.w, 0.3f, &PRECISIONS[0], N, C, l.O, 0);
        check_gradient(&l, N * l.O, l.x, dx, N * C, "linear", "dx");
        check_gradient(&l, N * l.O, l.w, dw, l.O * C, "linear", "dw");

        for (int skip = 0; skip < 2; skip++) {
            l.kind = 1;
            float* kept = l.skip;
            if (!skip) l.skip = NULL;
            layer_forward(&l);
            memset(dw, 0, sizeof(float) * 60 * (size_t)C), memset(dw2, 0, sizeof(float) * (size_t)C);
            layernorm_backward(dx, dw, dw2, l.r, l.x, l.s1, l.s2, l.w, NULL, 0.0f, 0.6f, N, C, FP32);
            check_gradient(&l, N * C, l.x, dx, N * C, "layernorm", "dx");
            check_gradient(&l, N * C, l.w, dw, C, "layernorm", "dgain");
            check_gradient(&l, N * C, l.w2, dw2, C, "layernorm", "dbias");
            l.skip = kept;
        }
        float* sum = floats((double)(N * C));  // dx = a dskip + the layernorm's dx
        layernorm_backward(sum, dw, dw2, l.r, l.x, l.s1, l.s2, l.w, l.skip, 0.8f, 0.6f, N, C, FP32);
        for (long i = 0; i < N * C; i++) dx[i] += 0.8f * l.skip[i];
        check_below(distance(sum, dx, N * C), 1e-6, "layernorm", "dx with skip");
        free(sum);

        for (int a = GELU; a <= SILU; a++) {
            l.kind = 2, l.activation = (Activation)a;
            for (long i = 0; i < N * C; i++)
                if (fabsf(l.x[i]) < 0.02f) l.x[i] = 0.1f;  // away from relu's corner
            activation_backward(dx, l.r, l.x, l.activation, 0.7f, 1.3f, N * C, FP32);
            check_gradient(&l, N * C, l.x, dx, N * C, "activation",
                           a == GELU   ? "gelu"
                           : a == RELU ? "relu"
                                       : "silu");
        }
        l.kind = 3;
        attention_backward(dx, l.r, l.x, 0.4f, 1.7f, l.B, l.T, C, l.H, FP32);
        check_gradient(&l, N * C, l.x, dx, N * 3 * C, "attention", "dqkv");

        l.kind = 4;
        memset(dw, 0, sizeof(float) * 60 * (size_t)C), memset(dw2, 0, sizeof(float) * (size_t)(l.T * C));
        embedding_backward(dw, dw2, l.r, l.tokens, 0.7f, l.B, l.T, C);
        check_gradient(&l, N * C, l.w, dw, 11 * C, "embedding", "dwte");
        check_gradient(&l, N * C, l.w2, dw2, l.T * C, "embedding", "dwpe");

        l.kind = 5;
        memcpy(dx, l.x, sizeof(float) * (size_t)(N * C));
        loss_forward_backward(l.s1, dx, l.tokens, 1, 1.0f, N, l.V, C, FP32);
        for (long i = 0; i < N * C; i++) if (i % C >= l.V) dx[i] = 0;  // padded columns are not touched
        check_gradient(&l, N, l.x, dx, N * C, "loss", "dlogits");
        free(l.x), free(l.w), free(l.w2), free(l.skip), free(l.out), free(l.r), free(l.s1), free(l.s2),
            free(l.tokens);
        free(dx), free(dw), free(dw2);
    }
}
// Logits so large that e^z is none, or so low that all are 0: only differences count. Against double.
static void test_large_logits(void) {
    enum { N = 4, V = 77, VP = 128 };
    const float shift[N] = {0, 300, -300, 100};
    const int targets[N] = {3, 76, 0, 41};
    float *z = normals(N * VP, 3.0f, "large logits"), *d = floats(N * VP), losses[N];
    for (long i = 0; i < N * VP; i++)
        z[i] += i % VP < V ? shift[i / VP] : 1e4f;  // padded columns take no part
    z[3 * VP + 5] = -INFINITY;
    memcpy(d, z, sizeof(float) * N * VP);
#ifdef US_CUDA
    float *gpu_z, *gpu_losses;
    int* gpu_targets;
    CUDA(cudaMalloc(&gpu_z, sizeof(float) * N * VP));
    CUDA(cudaMalloc(&gpu_losses, sizeof losses));
    CUDA(cudaMalloc(&gpu_targets, sizeof targets));
    CUDA(cudaMemcpy(gpu_z, z, sizeof(float) * N * VP, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(gpu_targets, targets, sizeof targets, cudaMemcpyHostToDevice));
    launch_loss<float>(gpu_losses, gpu_z, gpu_targets, 1, 1.0f, N, V, VP);
    CUDA(cudaMemcpy(d, gpu_z, sizeof(float) * N * VP, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(losses, gpu_losses, sizeof losses, cudaMemcpyDeviceToHost));
    CUDA(cudaFree(gpu_z));
    CUDA(cudaFree(gpu_losses));
    CUDA(cudaFree(gpu_targets));
#else
    loss_forward_backward(losses, d, targets, 1, 1.0f, N, V, VP, FP32);
#endif
    double worst = 0;
    for (int n = 0; n < N; n++) {
        double max = -INFINITY, sum = 0;
        for (int v = 0; v < V; v++) max = fmax(max, z[n * VP + v]);
        for (int v = 0; v < V; v++) sum += exp(z[n * VP + v] - max);
        worst =
            worse(worst, fabs(losses[n] - (log(sum) + max - z[n * VP + targets[n]])) / fmax(1, fabs(max)));
        for (int v = 0; v < V; v++)
            worst = worse(worst, fabs(d[n * VP + v] - (exp(z[n * VP + v] - max) / sum - (v == targets[n]))));
    }
    check_below(worst, 1e-6, "loss", "of large logits");  // a few FP32 roundings of the largest number
    free(z), free(d);
}
static void test_activations(void) {  // against libm; 4 units of FP32 at the largest magnitude
    double worst = 0;
    for (float x = -8; x < 8; x += 0.001f) {
        double u = sqrt(2 / M_PI) * (x + 0.044715 * pow(x, 3)), gelu = 0.5 * x * (1 + tanh(u)),
               silu = x / (1 + exp(-(double)x));
        worst = worse(worst, fabs(activate(x, GELU) - gelu) / fmax(1, fabs((double)x)));
        worst = worse(worst, fabs(activate(x, SILU) - silu) / fmax(1, fabs((double)x)));
    }
    check(worst <= 4 * 0x1p-23, "activations: error %g", worst);
    check(activate(-1, RELU) == 0 && activate(2, RELU) == 2 && isnan(activate(NAN, RELU)) &&
              isnan(activate(NAN, GELU)),
          "relu, NaN");
    // All of a tensor, value by value, and nothing beyond it: it ends where nobody may write.
    const long n = 2 * 4096 + 5;
    float *h = normals(n, 2, "h"), *dg = normals(n, 1, "dg"), *g = fenced(h, n), *dh = fenced(dg, n);
    for (int kind = GELU; kind <= SILU; kind++) {
        int wrong = 0;
        activation_forward(g, h, (Activation)kind, 0.5f, 3, n, BF16);
        activation_backward(dh, dg, h, (Activation)kind, 0.5f, 3, n, BF16);
        for (long i = 0; i < n; i++) {
            const float slope = activation_slope(0.5f * h[i], (Activation)kind);
            const float value = activate(0.5f * h[i], (Activation)kind);
            wrong += !(fabsf(g[i] - 3 * value) <= 0x1p-8f * fabsf(g[i]));
            wrong += !(fabsf(dh[i] - 1.5f * dg[i] * slope) <= 0x1p-8f * fabsf(dh[i]) + 1e-6f);
        }
        check(wrong == 0, "activation %d: %d of %ld values are wrong", kind, wrong, n);
    }
    for (long size = 1; size <= n; size = size == 1 ? 4096 : size == 4096 ? n : n + 1) {
        long left = 0;
        memcpy(g, h, sizeof(float) * (size_t)n), zero(g + n - size, size);
        for (long i = 0; i < n; i++) left += g[i] != (i < n - size ? h[i] : 0);
        check(left == 0, "%ld zeros: %ld values are wrong", size, left);
    }
    unfence(g, n), unfence(dh, n), free(h), free(dg);
}

// -----------------------------------------------------------------------------------------------------------
// The whole model against the state that dev/reference.py wrote: the same formulas in PyTorch, float64,
// autograd.

static double meta_number(const Archive* a, const char* key) {
    const char* value = archive_get(a, key);
    if (!value) die("%s lacks %s", a->path, key);
    return atof(value);
}
static void forget(Tokens* t) {
    for (int i = 0; i < t->num_shards; i++) free((char*)t->shards[i].path);
    free(t->shards);
}
static void close_archive(Archive* a) { free((char*)a->path), free((char*)a->header); }
static void text_file(char* path, size_t size, const char* name) {
    snprintf(path, size, "%s/%s", work, name);
}

static Config small_config(void) {
    char* argv[] = {self};
    Config c;
    config_parse(&c, 1, argv, NULL, 0);
    c.layers = 4, c.width = 256, c.seq = 256, c.batch = 4, c.vocab = BYTES_VOCAB;
    config_defaults(&c);
    return c;
}
enum { US, SP, MUP, UMUP, US_PRE, US_MEAN, ALL_SCHEMES };
static float* multiplier(Config* c, const Option* o) {  // that the scheme has, or NULL
    return o->type == FLOAT && o->choices && option_applies(c, o) ? (float*)((char*)c + o->offset) : NULL;
}
static void odd_multipliers(Config* c) {  // none of them 1
    float value = 0.8f;
    for (const Option* o = OPTIONS; o < OPTIONS_END; o++)
        if (multiplier(c, o)) *multiplier(c, o) = value, value *= 1.2f;
}
static const float* state_of(const Archive* a, const char* format, const char* x, const char* y,
                             const char* z) {
    char name[160];
    snprintf(name, sizeof name, format, x, y, z);
    return (const float*)archive_tensor(a, name).data;
}

// A step with the gradients of the last trace.
static StepResult update(const Device* on, Model* m, double lr) {
    const StepResult r = {0, 0, NULL};
    if (on == &CPU) return cpu_finish(m, r, lr);
#ifdef US_CUDA
    is_fp32(m) ? finish_step<float>(m, lr) : finish_step<bf16>(m, lr);
    return step_result(m);
#endif
    return r;
}

#ifdef US_CUDA
static int emulated(void) {
    cudaDeviceProp card;
    CUDA(cudaGetDeviceProperties(&card, 0));
    return strcmp(card.name, "emulated GPU") == 0;
}
// FP8 tensor cores align the products of a sum to the largest and keep about 14 bits: with fast accumulation
// (the forward pass) of a whole sum, without it of some products at a time, then FP32 goes on. How many of
// both differs from card to card and nobody says: so one product is measured against exact sums.
static double short_sums[2];  // RMS of their errors over that of the sums; without and with `fast`
static void measure_short_sums(void) {
    enum { M = 64, K = 1280 };  // K: the longest sum in test_step_by_step
    const Format formats[] = {E5M2, E4M3};
    static fp8 codes[2][M * K];
    static float got[M * M];
    fp8* p[2];
    float* out;
    LT(cublasLtCreate(&lt.handle));
    CUDA(cudaMalloc(&lt.workspace, WORKSPACE));
    CUDA(cudaMalloc(&out, sizeof got));
    for (int i = 0; i < 2; i++) {
        float* x = normals(M * K, 1, i ? "right" : "left");
        for (long k = 0; k < M * K; k++) codes[i][k] = fp8_encode(x[k], formats[i]);
        CUDA(cudaMalloc(&p[i], sizeof *codes));
        CUDA(cudaMemcpy(p[i], codes[i], sizeof *codes, cudaMemcpyHostToDevice));
        free(x);
    }
    for (int fast = 0; fast < 2; fast++) {
        double square = 0, errors = 0;
        gemm("short sums", out, CUDA_R_32F, M, side(p[0], K, 1, CUDA_R_8F_E5M2),
             side(p[1], K, 1, CUDA_R_8F_E4M3), M, M, K, 1, 0, fast);
        CUDA(cudaMemcpy(got, out, sizeof got, cudaMemcpyDeviceToHost));
        for (long i = 0; i < M; i++) for (long j = 0; j < M; j++) {
            double exact = 0;
            for (long k = 0; k < K; k++)
                exact += (double)fp8_decode(codes[0][i * K + k], E5M2) *
                         fp8_decode(codes[1][j * K + k], E4M3);
            square += exact * exact, errors += (got[i * M + j] - exact) * (got[i * M + j] - exact);
        }
        short_sums[fast] = sqrt(errors / square);
        printf("FP8 sums of %d products with %s accumulation are off by %.2g (RMS); the bounds follow\n", K,
               fast ? "fast" : "FP32", short_sums[fast]);
        check(short_sums[fast] < 0x1p-9, "FP8 sums keep about 14 bits, 13 at least: an error of %g",
              short_sums[fast]);
    }
    CUDA(cudaFree(p[0]));
    CUDA(cudaFree(p[1]));
    CUDA(cudaFree(out));
    CUDA(cudaFree(lt.workspace));
    products_close();
}
// Relative error of a linear's sums. The normal numbers of the measured product have shorter tails than
// gradients, and the largest error of 80,000 counts: 16 times its RMS.
static double sum_error(const Model* m, int fast) {
    return fmax(m->precision->weight == E4M3 && gpu.native ? 16 * short_sums[fast] : 0, 1e-5);
}
#endif
// By how much bounds grow that hold where sums are off by up to 2^-12: such errors flip roundings to FP8.
static double slack_of_short_sums(void) {
#ifdef US_CUDA
    return fmax(1, short_sums[1] / 0x1p-12);
#else
    return 1;
#endif
}

// FP32 is held to 1e-5 of each tensor's norm. In FP8 the sums' order decides some roundings, and one flipped
// E4M3 or BF16 rounding moves everything behind it: so the reference was run many times with its FP32 sums in
// random orders, and the file holds how far each tensor moved ("spread"). The bound is 4 times that, and at
// least the FP32 bound. A GPU's attention takes rowsum(P dP) from the rounded y, and FP8 makes a flip of one
// BF16 unit an eighth: there the reference's own FP32 gradients are the measure, and FP8 on a GPU has to be
// nearer to the reference's FP8 than they are (at most half as far was seen), if its sums are good.
static void check_tensors(const Model* m, const float* data, const float* base, const Archive* a,
                          const char* prefix, const char* scheme_param, const char* spread,
                          const char* rough, const char* what) {
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor* t = &m->tensors[i];
        const long n = t->rows * t->cols;
        const float *got = data + t->offset,
                    *want = state_of(a, "%s%s", prefix, t->name, "");
        double bound = 1e-5;
        if (*spread)
            bound = fmax(bound, 4.0 * *state_of(a, "%s%s", spread, t->name, ""));
        if (*rough)
            bound = slack_of_short_sums() * 0.7 *
                    distance(state_of(a, "%s%s", rough, t->name, ""), want, n);
        if (!base) check_below(distance(got, want, n), bound, what, t->name);
        else {  // compare the update, not the much larger weight
            const float* before = state_of(a, "%s%s", scheme_param, t->name, "");
            double difference = 0, norm = 0;
            for (long k = 0; k < n; k++) {
                difference += ((double)got[k] - want[k]) * ((double)got[k] - want[k]);
                norm += ((double)want[k] - before[k]) * ((double)want[k] - before[k]);
            }
            if (t->lr_factor == 0) {
                check(difference == 0 && norm == 0, "%s: %s has changed", what, t->name);
                continue;
            }
            // FP32 weights near 1 hold their update of size lr to 2^-24 / lr: at lr 0.002 that is 3e-5
            check_below(sqrt(difference / norm), fmax(bound, 1e-4), what, t->name);
        }
    }
}
// The multipliers that the scheme has, as the state's metadata names them.
static void state_multipliers(Config* c, const Archive* a) {
    for (const Option* o = OPTIONS; o < OPTIONS_END; o++) {
        char key[64];
        if (!multiplier(c, o)) continue;
        snprintf(key, sizeof key, "%s", o->name);
        for (char* at = key; (at = strchr(at, '-')) != NULL;) *at = '_';
        *multiplier(c, o) = (float)meta_number(a, key);
    }
}
static void test_oracle(void) {
    static Archive a;
    archive_read(&a, "dev/debug_state.safetensors");
    for (int scheme = US; scheme <= UMUP; scheme++)
        for (int precision = 0; precision <= 2; precision += 2)
            for (int optimizer = LION; optimizer <= ADAMW; optimizer++) {
                const char *s = SCHEMES[scheme].name, *p = PRECISIONS[precision].name,
                           *o = optimizer ? "adamw" : "lion";
                const int rough = device != &CPU && precision;
                char prefix[64], spread[64] = "", fp32[64] = "", what[64], base[64];
                Config c = small_config();
                c.scheme = scheme, c.precision = precision, c.optimizer = optimizer, c.accum = 1;
                c.layers = (int)meta_number(&a, "layers"), c.width = (int)meta_number(&a, "width");
                c.heads = (int)meta_number(&a, "heads"), c.seq = (int)meta_number(&a, "seq");
                c.batch = (int)meta_number(&a, "batch"), c.vocab = (int)meta_number(&a, "vocab");
                c.base_width = (int)meta_number(&a, "base_width"), c.warmup = (int)meta_number(&a, "warmup");
                c.steps = (int)meta_number(&a, "steps"), c.tau = (float)meta_number(&a, "tau");
                c.decay = (float)meta_number(&a, "decay"),
                c.lr = (float)meta_number(&a, form("lr_%s", s));
                state_multipliers(&c, &a);
                Model m;
                model_layout(&m, &c);
                model_alloc_params(&m, 1);
                snprintf(base, sizeof base, "%s.param.", s);
                device->open(&m);
                for (const Tensor* t = m.tensors; t < m.tensors + m.num_tensors; t++) {
                    const char* name = form("%s%s", base, t->name);
                    device->put(&m, PARAMS, t, archive_find(&a, name, t->rows, t->cols));
                }
                device->fetch(&m);
                const int* tokens = (const int*)state_of(&a, "tokens%s%s%s", "", "", "");
                const int* targets = (const int*)state_of(&a, "targets%s%s%s", "", "", "");
                for (int step = 0; step < 3; step++) {
                    memcpy(m.inputs, tokens + step * m.rows, sizeof(int) * (size_t)m.rows);
                    memcpy(m.targets, targets + step * m.rows, sizeof(int) * (size_t)m.rows);
                    const double loss = device->trace(&m);
                    if (step == 0 && optimizer == LION) {
                        float* logits = floats((double)(m.rows * c.vocab));
                        for (long n = 0; n < m.rows; n++)
                            memcpy(logits + n * c.vocab, buffer(&m, 0, A_LOGITS, n),
                                   sizeof(float) * (size_t)c.vocab);
                        const float* want = state_of(&a, "%s.%s.logits%s", s, p, "");
                        double bound = 1e-5;
                        if (precision) {
                            const float* e = state_of(&a, "%s.fp8.spread.logits%s%s", s, "", "");
                            bound = fmax(bound, 4.0 * *e);
                        }
                        if (rough) bound = fmax(bound, 0x1p-6 * slack_of_short_sums());
                        check_below(distance(logits, want, m.rows * c.vocab), bound, s,
                                    "logits");
                        free(logits);
                    }
                    const double norm = update(device, &m, learning_rate(&c, step + 1)).norm;
                    float want_loss = (state_of(&a, "%s.%s.%s.losses", s, p, o))[step];
                    float want_norm =
                        (state_of(&a, "%s.%s.%s.grad_norms", s, p, o))[step];
                    snprintf(what, sizeof what, "%s %s %s step %d", s, p, o, step + 1);
                    double loss_bound = 1e-5, norm_bound = 1e-4;  // the parameters' own bounds, see above
                    if (precision) {
                        const float* e = state_of(&a, "%s.fp8.%s.spread.losses%s", s, o, "");
                        loss_bound = fmax(loss_bound, 4.0 * *e);
                        e = state_of(&a, "%s.fp8.%s.spread.grad_norms%s", s, o, "");
                        norm_bound = fmax(norm_bound, 4.0 * *e);
                    }
                    const double slack = slack_of_short_sums();
                    if (rough) {  // a BF16 unit; later losses depend on all before, a norm on what sums flip
                        loss_bound = (step ? 0x1p-6 : 0x1p-8) * slack;
                        norm_bound = (slack > 1 ? 0x1p-6 : 0x1p-8) * slack;
                    }
                    check_below(fabs(loss / want_loss - 1), loss_bound, what, "loss");
                    if (!rough || step == 0)
                        check_below(fabs(norm / want_norm - 1), norm_bound, what, "gradient norm");
                    if (rough) snprintf(fp32, sizeof fp32, "%s.fp32.grad.", s);
                    snprintf(prefix, sizeof prefix, "%s.%s.grad.", s, p);
                    if (precision) snprintf(spread, sizeof spread, "%s.fp8.spread.grad.", s);
                    if (step == 0 && optimizer == LION)
                        check_tensors(&m, m.grads, NULL, &a, prefix, "", spread, fp32, what);
                }
                device->fetch(&m);
                snprintf(prefix, sizeof prefix, "%s.%s.%s.param.", s, p, o);
                if (precision) snprintf(spread, sizeof spread, "%s.fp8.%s.spread.", s, o);
                if (!rough) check_tensors(&m, m.params, m.params, &a, prefix, base, spread, "", what);
                device->close(&m), model_free(&m);
            }
    close_archive(&a);
}

// The true gradient is grads / grad_scale, for all schemes and activations: central
// differences along the gradient itself, where the slope of the loss is its norm. The step moves the loss by
// 4e-5 either way. Of that difference FP32 loses 6e-8 RMS, 2e-7 at worst (the losses of 42 rows, near 4.4,
// are each rounded to 2^-21 three times), 0.25 %; ReLU's kinks take up to 0.5 %, all curvature under 0.01 %.
static void test_model_gradient(void) {
    for (int scheme = US; scheme < ALL_SCHEMES; scheme++)
        for (int activation = GELU; activation <= SILU; activation++) {
            Config c = small_config();
            c.scheme = scheme, c.activation = activation, c.precision = 0;
            c.layers = 3, c.width = 40, c.heads = 5, c.seq = 21, c.batch = 2, c.tau = 0.3f, c.vocab = 77;
            odd_multipliers(&c);
            Model m;
            model_layout(&m, &c);
            model_alloc_params(&m, 1);
            model_alloc_buffers(&m);
            model_init(&m, &CPU);
            for (long i = 0; i < m.rows; i++) {
                m.inputs[i] = (int)(random_u64(3, 1, (uint64_t)i) % 77);
                m.targets[i] = (int)(random_u64(3, 2, (uint64_t)i) % 77);
            }
            memset(m.grads, 0xFF, sizeof(float) * (size_t)m.num_params);
            model_loss(&m, 1);
            model_backward(&m, 0);
            for (int i = 0; i < m.num_tensors; i++) {
                const Tensor* t = &m.tensors[i];
                float *w = m.params + t->offset, *g = m.grads + t->offset;
                const long n = t->rows * t->cols;
                double square = 0, value[2];
                for (long k = 0; k < n; k++) square += (double)g[k] * g[k];
                const double want = square / t->grad_scale, h = 4e-5 / want;
                float* kept = floats((double)n);
                memcpy(kept, w, sizeof(float) * (size_t)n);
                for (int side = 0; side < 2; side++) {
                    for (long k = 0; k < n; k++) w[k] = (float)(kept[k] + (side ? h : -h) * g[k]);
                    value[side] = model_loss(&m, 0);
                }
                memcpy(w, kept, sizeof(float) * (size_t)n);
                free(kept);
                const double slope = (value[1] - value[0]) / (2 * h);
                check_below(fabs(slope / want - 1), activation == RELU ? 0.01 : 0.005,
                            form("%s: slope along the gradient of", m.scheme->name), t->name);
            }
            model_free(&m);
        }
}

// -----------------------------------------------------------------------------------------------------------
// What must come out at initialisation, on real text (this project's own sources), at widths 128 and 512
// (GPU: 128).

static Model text_model_on(const Device* d, Config c, Tokens* tokens, const char* path) {
    Model m;
    model_layout(&m, &c);
    model_alloc_params(&m, 1);
    d->open(&m);
    model_init(&m, d);
    d->fetch(&m);
    tokens_open(tokens, path);
    return m;
}
static Model text_model(Config c, Tokens* tokens, const char* path) {
    return text_model_on(&CPU, c, tokens, path);
}
// RMS over four seeds: one draw of the weights moves the stream by up to 9 % at width 128, since all rows
// share it. In umup GELU's output has deviation 1.04 and mean 0.5, so an RMS of 1.15; E4M3, which its
// gradients are in, has seven octaves less below 1 than E5M2; and its stream grows, for attention's factor is
// meant for values that are independent, which those of a text are not (1.2 to 2.9 after blocks 1 to 4).
static void check_unit_scale(int scheme, int widest) {
    const double of_gelu = scheme == UMUP ? 1.15 : 0.65;
    const double most_flushed[] = {0.005, 0.005, scheme == UMUP ? 0.15 : 0.005};
    for (int width = 128; width <= widest; width *= 4)
        for (int scaled = 1; scaled >= 0; scaled--) {  // with S, and without it
            enum { ROWS = 2 + 5 * 4 };
            const int SEEDS = scaled ? 4 : 1;
            double square[ROWS][3], dead = 0, mean_loss = 0, want = log(256) + 1 / (2.0 * width);
            memset(square, 0, sizeof square);
            for (int seed = 1; seed <= SEEDS; seed++) {
                Tokens tokens;
                Config c = small_config();
                c.width = width, c.heads = width / 64, c.seed = (uint64_t)seed, c.scheme = scheme;
                if (!scaled) c.grad_scale = 1;
                Model m = text_model_on(device, c, &tokens, "train_us.c");
                Split all = {&tokens, 0, tokens.count};
                m.stats_on = 1;
                next_batch(&m, &all);
                mean_loss += device->trace(&m) / SEEDS;
                for (int i = 0; i < ROWS; i++) {
                    const StatRow* r = &m.stats[i];
                    const int last = i == ROWS - 1, stream = i % 5 == 0 && !last;
                    for (int k = 0; k < (stream ? 1 : 3); k++) {
                        const Stat* s = &r->stat[k];
                        square[i][k] += s->rms * s->rms / SEEDS;
                        if (k == 2 && !last) dead = fmax(dead, s->flushed);
                        if (scaled)
                            check(s->flushed < most_flushed[k] && s->saturated == 0,
                                  "%s, width %d: %s, operand %d: %.2f %% flushed, %.2f %% saturated",
                                  m.scheme->name, width, r->name, k, 100 * s->flushed, 100 * s->saturated);
                        const int ends = i % 5 == 1 + OUT || i % 5 == 1 + DOWN;
                        const int e5m2 = scheme == UMUP ? k == 0 && ends : k == 2;
                        check(s->format == (last || stream ? BF16 : e5m2 ? E5M2 : E4M3), "%s: format",
                              r->name);
                    }
                }
                device->close(&m), model_free(&m), forget(&tokens);
            }
            if (!scaled)
                check(dead > 0.5, "width %d: without S only %.1f %% of the gradients are flushed", width,
                      100 * dead);
            if (!scaled) continue;
            check(fabs(mean_loss / want - 1) <= 0.01, "width %d: loss %.4f, ln V + 1/2C is %.4f", width,
                  mean_loss, want);
            for (int i = 0; i < ROWS; i++) {
                const int last = i == ROWS - 1, kind = last ? HEAD : i % 5 - 1;
                const double input = sqrt(square[i][0]),
                             weight = i % 5 == 0 && !last ? 1 : sqrt(square[i][1]);
                if (kind == DOWN)
                    check(fabs(input / of_gelu - 1) <= 0.08, "width %d, row %d: RMS of GELU is %.3f", width,
                          i, input);
                else if (kind != OUT && !(scheme == UMUP && kind < QKV && i > 0))
                    check(fabs(input - 1) <= 0.05, "width %d, row %d: RMS is %.3f", width, i, input);
                check(fabs(weight - 1) <= 0.05, "width %d, row %d: RMS of the weight is %.3f", width, i,
                      weight);
            }
        }
}
static void test_unit_scale(void) {
    check_unit_scale(US, device == &CPU ? 512 : 128);  // an emulated GPU is slow
    check_unit_scale(UMUP, 128);
}
// [µS] eq. 6: attention over k independent values has variance e/k - (e-1)/k^2 where scores are unit normal.
// The formula takes the sum of the exponentials as its mean: exact at k = 1, and off by a share that falls as
// 1/k.
static void test_attention_variance(void) {
    const long B = 16, T = 256, C = 2048, H = 128;
    float *qkv = normals(B * T * 3 * C, 1, "qkv"), *y = floats((double)(B * T * C));
    attention_forward(y, qkv, 0.25f, 1, B, 0, T, C, H, FP32);
    for (long k = 1; k <= T; k += k == 1 ? 15 : k) {
        double sum = 0, want = M_E / (double)k - (M_E - 1) / (double)(k * k);
        for (long b = 0; b < B; b++) for (long i = 0; i < C; i++) sum += pow(y[(b * T + k - 1) * C + i], 2);
        double off = sum / (double)(B * C) / want - 1;
        check(fabs(off) <= 0.03 + (k == 1 ? 0 : 4.0 / (double)k), "position %ld: variance is %.1f %% off", k,
              100 * off);
    }
    free(qkv), free(y);
}
// The schemes' rules, for two blocks at four times the base width, a quarter of the base depth.
static void test_table(void) {
    const struct {
        double alpha, head, lr, lr_down, lr_embedding, lr_norm, scale, init_up, init_down, skip, branch;
    } want[ALL_SCHEMES] = {  // in the order of the schemes; skip, branch: of block 1's mlp
        {.alpha = 1 / sqrt(2048), .head = 1. / 512, .lr = 0.5, .lr_down = 0.5, .lr_embedding = 1,
                .lr_norm = 1, .scale = 512, .init_up = 1, .init_down = 1, .skip = sqrt(0.6),
                .branch = sqrt(0.4)},
        {.alpha = 1, .head = 1, .lr = 1, .lr_down = 1, .lr_embedding = 1, .lr_norm = 1, .scale = 1,
                .init_up = 0.02, .init_down = 0.01, .skip = 1, .branch = 1},
        {.alpha = 1, .head = 0.25, .lr = 0.5, .lr_down = 0.5, .lr_embedding = 1, .lr_norm = 0, .scale = 4,
                 .init_up = 0.01, .init_down = 0.0025, .skip = 1, .branch = 2},
        {.alpha = 1 / sqrt(2048), .head = 1. / 512, .lr = 1. / 32, .lr_down = 1. / 64,
                  .lr_embedding = 1 / sqrt(512), .lr_norm = 0, .scale = 512, .init_up = 1, .init_down = 1,
                  .skip = sqrt(5. / 6), .branch = sqrt(1. / 6)},
        {.alpha = 1 / sqrt(2048), .head = 1. / 512, .lr = 0.5, .lr_down = 0.5, .lr_embedding = 1,
                    .lr_norm = 1, .scale = 512, .init_up = 1, .init_down = 1, .skip = sqrt(0.6),
                    .branch = sqrt(0.4)},
        {.alpha = 1 / sqrt(2048), .head = 1. / 512, .lr = 0.5, .lr_down = 0.5, .lr_embedding = 1,
                     .lr_norm = 1, .scale = 512, .init_up = 1, .init_down = 1, .skip = sqrt(0.8),
                     .branch = sqrt(0.2)},
    };
    for (int scheme = US; scheme < ALL_SCHEMES; scheme++) {
        Config c = small_config();
        c.scheme = scheme, c.width = 512, c.base_width = 128, c.layers = 2, c.base_layers = 8, c.accum = 3;
        Model m;
        model_layout(&m, &c);
        model_alloc_params(&m, 0);
        model_init(&m, &CPU);
        const Tensor *up = tensor(&m, 1, UP), *down = tensor(&m, 1, DOWN), *head = tensor(&m, 0, HEAD);
        const Tensor *gain = tensor(&m, 1, LN2_GAIN), *wpe = tensor(&m, 0, WPE);
        const Tensor* found[] = {up, down, head, gain, wpe};
        const char* s = m.scheme->name;
        const double factors[] = {want[scheme].lr, want[scheme].lr_down, 1, want[scheme].lr_norm,
                                want[scheme].lr_embedding};
        const double S = (double)m.rows * 3 * want[scheme].scale, b = want[scheme].branch;
        const int post = scheme == US || scheme == US_MEAN;
        check(m.num_tensors == 21 && strcmp(down->name, "h.1.down") == 0 && strcmp(head->name, "head") == 0,
              "names");
        check(down->rows == 512 && down->cols == 2048 && head->rows == 256 && gain->rows == 1, "shapes");
        check_below(fabs(down->alpha / want[scheme].alpha - 1), 1e-6, s, "multiplier of down");
        check_below(fabs(head->alpha / want[scheme].head - 1), 1e-6, s, "multiplier of the head");
        for (int i = 0; i < 5; i++)
            check_below(fabs(found[i]->lr_factor - factors[i]), 1e-6 * factors[i], s,
                        form("rate of %s", found[i]->name));
        check(decays(down) && decays(head) && decays(wpe) && !decays(gain), "decay");
        check_below(fabs(m.grad_scale / S - 1), 1e-7, s, "S");
        check_below(fabs(up->grad_scale / (post ? S : S / b) - 1), 1e-6, s, "scale of up's gradient");
        check(gain->grad_scale == m.grad_scale && head->grad_scale == m.grad_scale, "%s: scale of others", s);
        const Residual sum = residual(&m, 3);
        check_below(fabs(sum.skip - want[scheme].skip) + fabs(sum.branch - b), 1e-6, s, "residual sum");
        for (int kind = UP; kind <= DOWN; kind++) {
            const double std = kind == UP ? want[scheme].init_up : want[scheme].init_down;
            double square = 0;
            for (long k = 0; k < 512 * 2048; k++) square += pow(param(&m, 1, kind)[k], 2);
            check_below(fabs(sqrt(square / (512 * 2048)) / std - 1), 0.005, s, "init");
        }
        check(param(&m, 1, LN2_GAIN)[511] == 1 && param(&m, 1, LN2_BIAS)[511] == 0, "init of gain and bias");
        // AdamW's epsilon; and the base width, which means nothing to umup.
        const double eps = scheme == SP || scheme == MUP ? 1e-8 * up->grad_scale : 1e-8;
        check_below(fabs(rates(&m, up, 1).eps / eps - 1), 1e-6, s, "epsilon");
        c.base_width = 64;
        Model other;
        model_layout(&other, &c);
        int moved = other.grad_scale != m.grad_scale;
        for (int i = 0; i < m.num_tensors; i++)
            moved |= other.tensors[i].alpha != m.tensors[i].alpha ||
                     other.tensors[i].lr_factor != m.tensors[i].lr_factor;
        check(moved == !(scheme == SP || scheme == UMUP), "%s: --base-width", s);
        free(other.tensors), model_free(&m);
    }
    // What µS is compared with is µS but for where LayerNorm stands, and how the stream adds up.
    for (int scheme = US_PRE; scheme <= US_MEAN; scheme++) {
        Scheme other;
        memcpy(&other, &SCHEMES[US], sizeof other);
        other.name = SCHEMES[scheme].name, other.decay = 0;
        memset(other.lr_bytes, 0, sizeof other.lr_bytes), memset(other.lr_tokens, 0, sizeof other.lr_tokens);
        if (scheme == US_PRE) other.norm_last = 0;
        else other.residual = MEAN;
        const int alike = memcmp(&other, &SCHEMES[scheme], sizeof other) == 0;
        check(alike, "%s is µS, but for one thing", other.name);
    }
    check(same(default_tau(4), 0.4f) && default_tau(2) == 0.4f && fabsf(default_tau(100) - 0.1f) < 0.001f,
          "tau by depth");
    Config c = small_config();
    c.lr = 1, c.warmup = 10, c.steps = 110;
    check(fabs(learning_rate(&c, 1) - 0.1) < 1e-9 && learning_rate(&c, 10) == 1 &&
              fabs(learning_rate(&c, 60) - 0.55) < 1e-9 && fabs(learning_rate(&c, 110) - 0.1) < 1e-9,
          "schedule");
}

// The values of graphcore-research/unit-scaling (a7b5b3c), which is u-µP's own code.
static void test_umup(void) {
    static const struct { float D, T; double factor; } attention[] = {
        {32, 64, 3.8815041}, {32, 128, 5.0714755}, {64, 256, 6.7441030}, {64, 1024, 12.0369558},
        {128, 1024, 12.0954733}, {128, 2048, 16.3000317}};
    // L = 4
    static const double taus[] = {.5, .447214, .408248, .377964, .353553, .333333, .316228, .301511};
    static const double odd_taus[] = {.447214, .204124, .4, .185695};  // L = 2, alpha_res 0.5, ratio 2
    for (int i = 0; i < 6; i++)
        check_below(fabs(attention_factor(attention[i].D, attention[i].T, 1) / attention[i].factor - 1), 1e-6,
                    "umup:", "factor of attention");
    check_below(fabs(activation_factor(GELU, 1) / 1.766782948 - 1), 1e-6, "umup:", "factor of GELU");
    check_below(fabs(activation_factor(SILU, 0.5f) / 1.850869282 - 1), 1e-6, "umup:", "at 0.5");
    check_below(fabs(activation_factor(GELU, 2) / 1.728545530 - 1), 1e-6, "umup:", "at 2");
    check_below(fabs(activation_factor(RELU, 2) / 1.712858550 - 1), 1e-6, "umup:", "factor of ReLU");
    Config c = small_config();
    Model m;
    c.scheme = UMUP;
    for (int odd = 0; odd < 2; odd++) {
        if (odd) c.layers = 2, c.alpha_res = 0.5f, c.alpha_res_attn_ratio = 2;
        model_layout(&m, &c);
        for (int i = 0; i < 2 * c.layers; i++) {
            const Residual r = residual(&m, i);
            const double tau = r.branch / r.skip, variance = r.branch * r.branch + r.skip * r.skip;
            check_below(fabs(tau - (odd ? odd_taus : taus)[i]), 1e-6, "umup:", form("tau of branch %d", i));
            check_below(fabs(variance - 1), 1e-6, "umup:", "variance of the sum");
        }
        free(m.tensors);
    }
    c.layers = 4, c.width = 128, c.batch = 4, c.seq = 256, c.accum = 1, c.alpha_res = 1;
    model_layout(&m, &c);
    check_below(fabs(m.grad_scale * sqrt(256 / 255.) / 131329 - 1), 1e-5, "umup:", "S, for V = 256");
    free(m.tensors);
}
// At the base shape mup is sp, but that LayerNorm does not learn: the same bits where sp's does not either.
static void test_mup_is_sp(void) {
    float* params[2];
    long n = 0;
    for (int i = 0; i < 2; i++) {
        Tokens tokens;
        Config c = small_config();
        c.scheme = i ? MUP : SP, c.norm_lr = 0, c.layers = 3, c.base_layers = 3, c.width = c.base_width = 64;
        c.heads = 2, c.seq = 32, c.batch = 2, c.lr = 0.01f, c.steps = 4, c.warmup = 1;
        Model m = text_model(c, &tokens, "train_us.c");
        Split all = {&tokens, 0, tokens.count};
        for (long s = 1; s <= c.steps; s++) CPU.step(&m, &all, learning_rate(&c, s));
        n = m.num_params, params[i] = m.params, m.params = NULL;
        model_free(&m), forget(&tokens);
    }
    check(memcmp(params[0], params[1], sizeof(float) * (size_t)n) == 0, "mup is not sp at the base shape");
    free(params[0]), free(params[1]);
}

// -----------------------------------------------------------------------------------------------------------
// Data and text

static void write_file(const char* path, const void* data, size_t n) {
    FILE* f = fopen(path, "wb");
    if (!f || fwrite(data, 1, n, f) != n || fclose(f) != 0) die("the tests cannot write %s", path);
}
static void write_shard(const char* path, const uint16_t* tokens, int n, int claimed) {
    uint32_t header[256] = {SHARD_MAGIC, 1, (uint32_t)claimed};
    char* data = (char*)floats(1024 + 2.0 * n);
    memcpy(data, header, 1024);
    memcpy(data + 1024, tokens, sizeof(uint16_t) * (size_t)n);
    write_file(path, data, 1024 + sizeof(uint16_t) * (size_t)n);
    free(data);
}
// Inputs and targets are the files' own tokens, every value that there is among them: of all that two files
// hold, read at once, and of batches.
static void check_tokens(int width) {
    const long V = width == 1 ? BYTES_VOCAB : GPT2_VOCAB, n = V + 700, first = n / 3;
    uint16_t* all = (uint16_t*)floats((double)n);
    uint8_t* bytes = (uint8_t*)floats((double)n);
    int *in = (int*)floats((double)n), *out = (int*)floats((double)n);
    char path[1100];
    for (long i = 0; i < n; i++) all[i] = (uint16_t)(i * 10007 % V), bytes[i] = (uint8_t)all[i];
    for (int k = 0; k < 2; k++) {
        const long from = k ? first : 0, count = k ? n - first : first;
        text_file(path, sizeof path, form("tokens%d_%d.%s", width, k, width == 1 ? "txt" : "bin"));
        if (width == 1) write_file(path, bytes + from, (size_t)count);
        else write_shard(path, all + from, (int)count, (int)count);
    }
    text_file(path, sizeof path, form("tokens%d_?.*", width));
    Tokens t;
    Model m;
    tokens_open(&t, path);
    Split split = {&t, 0, n};
    long wrong = 0;
    tokens_read(&split, 0, n - 1, in, out);
    for (long i = 0; i + 1 < n; i++) wrong += (in[i] != all[i]) + (out[i] != all[i + 1]);
    check(t.count == n && wrong == 0, "tokens of %d bytes: %ld of %ld are not the files'", width, wrong, n);
    Config c = small_config();
    c.batch = 3, c.seq = 50;
    model_layout(&m, &c);
    model_alloc_batch(&m);
    split.start = 90, split.count = n - 100, wrong = 0;
    for (long step = 0; step < 40; step++) {
        next_batch(&m, &split);
        for (long i = 0; i < m.rows; i++) {
            const long begin = window_start(c.seed, 3 * step + i / 50, n - 100, 50);
            const uint16_t* want = all + 90 + begin + i % 50;
            wrong += (m.inputs[i] != want[0]) + (m.targets[i] != want[1]);
            wrong += begin < 0 || begin + 50 >= n - 100;
        }
    }
    check(wrong == 0 && m.sequence == 120, "tokens of %d bytes: %ld in batches are not the windows'",
          width, wrong);
    free(all), free(bytes), free(in), free(out), model_free(&m), forget(&t);
}
static void test_data(void) {
    check_tokens(1), check_tokens(2);
    char a[1100], b[1100], pattern[1100];
    uint16_t tokens[500];
    Tokens t;
    for (int i = 0; i < 500; i++) tokens[i] = (uint16_t)(i * 101 % 50257);
    text_file(a, sizeof a, "d_1.bin"), text_file(b, sizeof b, "d_2.bin"),
        text_file(pattern, sizeof pattern, "d_?.bin");
    write_shard(a, tokens, 200, 200), write_shard(b, tokens + 200, 300, 300);
    tokens_open(&t, pattern);
    check(t.count == 500 && t.num_shards == 2 && tokens_vocab(&t) == GPT2_VOCAB, "two shards by a pattern");
    Split split = {&t, 10, 480};
    int in[40], out[40], wrong = 0;
    tokens_read(&split, 170, 40, in, out);
    for (int i = 0; i < 40; i++) wrong += in[i] != tokens[180 + i] || out[i] != tokens[181 + i];
    check(wrong == 0, "a window across two shards");
    forget(&t);
    for (int big = 0; big < 2; big++) {  // every epoch visits every window once, in another order
        const long count = big ? 100003 : 23, T = big ? 10 : 10, n = (count - T) / T;
        char* seen = (char*)floats((double)n);
        long repeats = 0, outside = 0, moved = 0, base = 0;
        for (long epoch = 0; epoch < 3; epoch++) {
            memset(seen, 0, (size_t)n);
            long least = LONG_MAX;
            for (long i = 0; i < n; i++) least = min_l(least, window_start(5, epoch * n + i, count, T));
            for (long i = 0; i < n; i++) {
                long start = window_start(5, epoch * n + i, count, T);
                outside += start < 0 || start + T + 1 > count || (start - least) % T != 0;
                repeats += seen[(start - least) / T]++;
                moved += start != window_start(5, i, count, T);
            }
            base += least;
        }
        check(repeats == 0 && outside == 0, "an epoch of %ld windows: %ld repeated, %ld outside", n, repeats,
              outside);
        if (big) check(moved > n && base > 0, "epochs differ in order");
        free(seen);
    }
    // The mark of the data, which a run goes on with: all files, their sizes and their order count.
    text_file(a, sizeof a, "abc.txt"), write_file(a, "abc", 3);
    tokens_open(&t, a);
    const uint64_t mark = tokens_hash(&t, 0);
    check(mark == 554745769876478 && tokens_hash(&t, mark) != mark, "abc's mark is %llu",
          (unsigned long long)mark);
    forget(&t);
    check(window_start(1, 0, 11, 10) == 0 && window_start(1, 7, 11, 10) == 0, "a text of one window");
    check(window_start(1, 3, 100003, 10) != window_start(2, 3, 100003, 10), "seeds differ");
    // A seed's order is one that anyone gets again: the permutation once more, in Python.
    const long sequences[] = {0, 1, 2, 9998, 9999, 10000};
    const long starts[] = {84705, 7795, 47495, 81945, 17572, 61152};
    for (int i = 0; i < 6; i++) {
        const long start = window_start(5, sequences[i], 100003, 10);
        check(start == starts[i], "sequence %ld begins at %ld", sequences[i], start);
    }
}
static void test_text(void) {
    // A small vocabulary in llm.c's format: all bytes, and more.
    static Text text;
    static const char* const merges[] = {" t", "he", " the", "th", "in", "ing", "'s", "  "};
    char path[1100], file[4096];
    uint32_t header[256] = {TOKENIZER_MAGIC, 2, 256 + 8 + 1, 264};
    size_t n = 1024;
    memcpy(file, header, 1024);
    for (int i = 0; i < 256; i++) file[n++] = 1, file[n++] = (char)i;
    for (int i = 0; i < 8; i++)
        file[n++] = (char)strlen(merges[i]), n = (size_t)(stpcpy(file + n, merges[i]) - file);
    file[n++] = 0;
    text_file(path, sizeof path, "tokenizer.bin");
    write_file(path, file, n);
    text_open(&text, path);
    check(text.vocab == 265 && text.end == 264 && text.length[258] == 4, "tokenizer file");
    int tokens[8];
    check(text_tokens(&text, "264 0 7", tokens) == 3 && tokens[0] == 264 && tokens[1] == 0 && tokens[2] == 7,
          "numbers are tokens");
    text.vocab = BYTES_VOCAB;
    check(text_tokens(&text, "7\xff", tokens) == 2 && tokens[0] == '7' && tokens[1] == 255, "bytes, too");
}

static void read_text(const char* path, char* to, size_t size) {
    FILE* f = fopen(path, "rb");
    size_t n = f ? fread(to, 1, size - 1, f) : 0;
    to[n] = 0;
    if (f) fclose(f);
}
// What is printed goes into a file, until undivert is given what this returns; it returns what was printed.
static int divert(void) {
    char path[1100];
    text_file(path, sizeof path, "printed.txt");
    fflush(stdout);
    const int out = dup(STDOUT_FILENO), file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    dup2(file, STDOUT_FILENO), close(file);
    return out;
}
static const char* undivert(int out) {
    static char text[8192];
    char path[1100];
    fflush(stdout), dup2(out, STDOUT_FILENO), close(out);
    text_file(path, sizeof path, "printed.txt");
    read_text(path, text, sizeof text);
    return text;
}

// What is printed is UTF-8 without control characters: every character of Unicode passes, nothing else does.
static void test_printing(void) {
    char s[16];
    int wrong = 0;
    for (uint32_t c = 1; c < 0x110000; c++) {
        const int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
        const int bad = (c < 32 && c != '\n' && c != '\t') || (c >= 127 && c < 0xA0) ||
                        (c >= 0xD800 && c < 0xE000);
        s[0] = (char)(n == 1 ? c : (n == 2 ? 0xC0 : n == 3 ? 0xE0 : 0xF0) | c >> 6 * (n - 1));
        for (int i = 1; i < n; i++) s[i] = (char)(0x80 | (c >> 6 * (n - 1 - i) & 63));
        char kept[16];
        memcpy(kept, s, sizeof s);
        for (int part = 1; part < n && !bad; part++) wrong += make_safe(s, part, 1) != 0;
        for (int more = 1; more >= 0; more--) {  // also if more follows: what is bad does not wait for it
            memcpy(s, kept, sizeof s);
            wrong += make_safe(s, n, more) != n || (memcmp(s, kept, (size_t)n) != 0) != bad;
        }
        for (int i = 0; i < n && bad; i++) wrong += s[i] != '?';
    }
    check(wrong == 0, "%d of Unicode's characters", wrong);
    static const char* const cases[][2] = {{"\xC0\x80", "??"}, {"\xC1\xBF", "??"}, {"\xE0\x9F\xBF", "???"},
        {"\xF0\x8F\xBF\xBF", "????"}, {"\xF4\x90\x80\x80", "????"}, {"\xF8\x88\x80\x80\x80", "?????"},
        {"a\x80" "b", "a?b"}, {"\xE2\x82", "??"}, {"\xE2\x82z", "??z"}, {"\x1B[2Jx", "?[2Jx"},
        {"\xFF\xFE", "??"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (int more = 0; more < 2; more++) {
            snprintf(s, sizeof s, "%s", cases[i][0]);
            const long n = (long)strlen(s), done = make_safe(s, n, more), want = more && i == 7 ? 0 : n;
            check(done == want && strncmp(s, cases[i][1], (size_t)done) == 0, "case %d: %s", (int)i, s);
        }
    }
    // Characters that arrive byte by byte, and one that never ends.
    static Text text;
    static Config c;
    static const char bytes[] = "a\xC3\xA9\xF0\x9F\x99\x82\x9B\xE2\x82";
    c.input = c.tokenizer = "", c.vocab = BYTES_VOCAB;
    table_open(&text, &c);
    const int out = divert();
    for (size_t i = 0; i < sizeof bytes - 1; i++) text_print(&text, (uint8_t)bytes[i]);
    text_print(&text, -1);
    const char* got = undivert(out);
    check(strcmp(got, "a\xC3\xA9\xF0\x9F\x99\x82???") == 0, "byte by byte: %s", got);
}
// A file is synced when all of it is written and before it takes its name; its directory after that, for the
// name. What cannot be synced does not take the place of what was there.
enum { OLD_SIZE = 3 };
static struct { const char* path; char calls[8]; int num_calls, error; long size; } synced;
static int watched_fsync(int fd) {
    struct stat what, dir, there;
    if (!synced.path) return fsync(fd);
    const int known = fstat(fd, &what) == 0 && stat(work, &dir) == 0 && stat(synced.path, &there) == 0;
    const int is_dir = known && S_ISDIR(what.st_mode), renamed = known && there.st_size != OLD_SIZE;
    char call = !known || (is_dir && what.st_ino != dir.st_ino) ? '?' : is_dir ? 'd' : 'f';
    if (call == 'f') synced.size = (long)what.st_size;
    if (renamed) call = call == 'd' ? 'D' : 'F';
    if (synced.num_calls < 7) synced.calls[synced.num_calls++] = call;
    if (call != 'f' || !synced.error) return fsync(fd);
    errno = synced.error;
    return -1;
}
static void check_synced(const char* path, int error) {
    const float x[] = {1, 2, 3};
    struct stat there;
    Writer w;
    write_file(path, "old", OLD_SIZE);
    archive_begin(&w, "vocab", "256");
    archive_add(&w, "x", FP32, x, 3, 0, 0);
    memset(&synced, 0, sizeof synced);
    synced.path = path, synced.error = error;
    const int says = archive_write(&w, path, NULL, NULL);
    synced.path = NULL;
    const long size = stat(path, &there) == 0 ? (long)there.st_size : -1;
    check(says == error && (error ? size == OLD_SIZE : size > 12), "%s: error %d, %ld bytes", path, says,
          size);
    check(access(form("%s.tmp", path), F_OK) != 0, "%s: the temporary file is left", path);
    if (error) check(*synced.calls == 'f', "%s, not to be synced: %s", path, synced.calls);
    else
        check(strcmp(synced.calls, "fD") == 0 && synced.size == size, "%s: synced %s, %ld of %ld bytes", path,
              synced.calls, synced.size, size);
    unlink(path);
}
static void check_all_synced(void) {
    char path[1100], here[4096];
    text_file(path, sizeof path, "synced.safetensors");
    check_synced(path, 0), check_synced(path, EIO), check_synced(path, ENOSPC);
    if (!getcwd(here, sizeof here) || chdir(work) != 0) die("the tests cannot enter %s", work);
    check_synced("synced.safetensors", 0);  // a name without a directory
    if (chdir(here) != 0) die("the tests cannot go back to %s", here);
}
// A header as the safetensors library writes it, long values and many keys; and what is written is found.
static void test_archive(void) {
    check_all_synced();
    static char file[40000];
    char path[1100], longest[2001];
    Archive a;
    size_t n = 8;
    memset(longest, 'x', 2000), longest[2000] = 0;
    n += (size_t)sprintf(file + n, "{\"__metadata__\":{\"a\":\"µ\",\"long\":\"%s\"", longest);
    for (int i = 0; i < 70; i++) n += (size_t)sprintf(file + n, ",\"k%d\":\"%d\"", i, i * i);
    n += (size_t)sprintf(file + n,
                         "},\"t.u\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[0,8]},"
                         "\"t\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}  ");
    for (int i = 0; i < 8; i++) file[i] = (char)((n - 8) >> 8 * i);
    const float values[] = {1, -2, 3};
    memcpy(file + n, values, 12);
    text_file(path, sizeof path, "python.safetensors");
    write_file(path, file, n + 12);
    archive_read(&a, path);
    const char *odd = archive_get(&a, "a"), *whole = archive_get(&a, "long"), *last = archive_get(&a, "k69");
    check(odd && strcmp(odd, "µ") == 0 && whole && strcmp(whole, longest) == 0 && last &&
              strcmp(last, "4761") == 0 && !archive_get(&a, "k70") && !archive_get(&a, "t"), "metadata");
    check(archive_find(&a, "t", 1, 1)[0] == 3 && archive_find(&a, "t.u", 2, 1)[1] == -2, "tensors");
    close_archive(&a);

    // Written in every format and read again: values that a format has are the same, others are rounded.
    float x[259];
    Writer w;
    for (int i = 0; i < 256; i++) {
        x[i] = fp8_decode((uint8_t)i, E4M3);
        if (isnan(x[i])) x[i] = 0;
    }
    x[256] = 1.3f, x[257] = 1e9f, x[258] = -1.0625f - 0x1p-9f;  // the last one: in two steps another value
    archive_begin(&w, "vocab", "256");
    archive_meta(&w, "name", "a\"b\\c\n");
    for (int dtype = FP32; dtype <= E4M3; dtype++) archive_add(&w, DTYPES[dtype].name, dtype, x, 259, 0, 0);
    check(archive_write(&w, path, NULL, NULL) == 0, "written");
    archive_read(&a, path);
    const char* name = archive_get(&a, "name");
    check(strcmp(name, "a?b?c?") == 0, "what would need an escape: %s", name);
    for (int dtype = FP32; dtype <= E4M3; dtype++) {
        const float* y = archive_find(&a, DTYPES[dtype].name, 1, 259);
        int wrong = 0;
        for (int i = 0; i < 259; i++)
            wrong += y[i] != round_to(x[i], (Format)dtype) || !signbit(y[i]) != !signbit(x[i]);
        check(wrong == 0, "%s: %d values are not what was written", DTYPES[dtype].name, wrong);
        check(archive_tensor(&a, DTYPES[dtype].name).values == 259, "%s: how many", DTYPES[dtype].name);
    }
    close_archive(&a);
}

// -----------------------------------------------------------------------------------------------------------
// The command line: this binary runs itself as the trainer, and what it prints and leaves behind is looked
// at.

typedef struct { int status; char out[1 << 20], err[65536]; } Run;
static Run result;
static const char* run_on = "";  // or --cpu

// Runs `flags` as a shell would split them, with %s standing for the directory of the tests. threads 0: as
// they are; limit > 0: no file may grow beyond it, as on a full disk; end: a signal, sent once other/log.csv
// has a step, or TWICE, with some SIGINT right after it; or CUT: then cut.txt is cut off.
enum { TWICE = 1000, CUT = -1 };
static const Run* run_with(const char* flags, int threads, long limit, int end) {
    char command[8192], out[1100], err[1100], text[32];
    text_file(out, sizeof out, "out.txt"), text_file(err, sizeof err, "err.txt");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        size_t n = (size_t)snprintf(command, sizeof command, "exec '%s' %s -- ", self, run_on);
        int quoted = 0;  // the directory may have spaces in its name
        for (const char* p = flags; *p && n < sizeof command - 1200; p++) {
            quoted ^= *p == '\'';
            if (p[0] != '%' || p[1] != 's') { command[n++] = *p; continue; }
            n += (size_t)sprintf(command + n, quoted ? "%s" : "'%s'", work), p++;
        }
        command[n] = 0;
        snprintf(text, sizeof text, "%d", threads);
        if (threads) setenv("OMP_NUM_THREADS", text, 1);
        if (limit) {
            struct rlimit r = {(rlim_t)limit, (rlim_t)limit};
            struct sigaction ignore;
            memset(&ignore, 0, sizeof ignore);
            ignore.sa_handler = SIG_IGN;
            sigaction(SIGXFSZ, &ignore, NULL);
            setrlimit(RLIMIT_FSIZE, &r);
        }
        const int common[] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE};  // a background shell ignores some of them
        for (int i = 0; i < 4; i++) signal(common[i], SIG_DFL);
        if (end) alarm(300);  // a run that a signal does not end
        if (!freopen(out, "w", stdout) || !freopen(err, "w", stderr)) _exit(99);
        execl("/bin/sh", "sh", "-c", command, (char*)NULL);
        _exit(98);
    }
    if (end) {  // once the first step is in its log
        char log[1100], text_of_log[256] = "";
        text_file(log, sizeof log, "other/log.csv");
        for (int i = 0; i < 6000 && !strstr(text_of_log, "\n1,"); i++) {
            usleep(10000);
            read_text(log, text_of_log, sizeof text_of_log);
        }
        text_file(log, sizeof log, "cut.txt");
        if (end == CUT && truncate(log, 0) != 0) die("the tests cannot truncate %s", log);
        if (end > 0) kill(child, end % TWICE);
        for (int i = 0; i < 50 && end > TWICE; i++) usleep(10), kill(child, SIGINT);
    }
    int status = 0;
    waitpid(child, &status, 0);
    result.status = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
    read_text(out, result.out, sizeof result.out), read_text(err, result.err, sizeof result.err);
    return &result;
}
static const Run* run_us(const char* flags) { return run_with(flags, 0, 0, 0); }
static void check_fails(const char* flags, const char* says) {
    const Run* r = run_us(flags);
    const char* newline = strchr(r->err, '\n');
    check(r->status == 1 && newline && !newline[1] && strstr(r->err, says) &&
              strncmp(r->err, "train_us: ", 10) == 0,
          "%s\n    exit %d, wanted one line with '%s', got: %.500s", flags, r->status, says, r->err);
}
static void shell(const char* format) {
    char command[8192];
    snprintf(command, sizeof command, format, work, work, work, work);
    if (system(command) != 0) die("the tests cannot run: %s", command);
}
static int same_files(const char* a, const char* b) {
    char command[4096];
    snprintf(command, sizeof command, "cmp -s '%s/%s' '%s/%s'", work, a, work, b);
    return system(command) == 0;
}
#define SMALL \
    "--layers 2 --width 64 --heads 1 --seq 32 --batch 8 --eval-every 0 --tokens 1 --optimizer adamw "
#define TINY "--layers 2 --width 32 --heads 2 --seq 16 --batch 3 --eval-every 0 --tokens 8 "

static void test_command_line(void) {
    const Run* r = run_us("--help");
    int lines = 0, wide = 0;
    for (const char *p = r->out, *start = p; *p; p++)
        if (*p == '\n') lines++, wide += p - start > 120, start = p + 1;
    check(r->status == 0 && lines > 30 && lines <= 65 && !wide, "--help: %d lines, %d too wide", lines, wide);
    for (const Option* o = OPTIONS; o < OPTIONS_END; o++) {
        char flag[64];
        snprintf(flag, sizeof flag, "--%s ", o->name ? o->name : "out");
        check(strstr(r->out, flag) != NULL, "--help lacks %s", flag);
    }
    check(run_us("")->status == 1 && strstr(result.out, "--input"), "without flags: the help, and a failure");
    check_fails("--nonsense 1", "there is no option --nonsense");
    check_fails("text.txt", "there is no option text.txt");
    check_fails("--input", "--input wants a value");
    check_fails("--steps=5", "there is no option --steps=5");
    check_fails("--resume", "--resume needs the --out");
    check_fails("--load a --generate --dump b", "--export and --dump exclude each other");
    check_fails("--load a --evaluate --export b", "exclude each other");
    check_fails("--generate", "want a model: --load FILE");
    check_fails("--export x --input train_us.c", "want a model: --load FILE");
    check_fails("--load", "--load wants a value");
    check_fails("--load a --export ''", "--export wants a value");
    check_fails("--load a --export out/checkpoint.safetensors", "is the name of a run's checkpoint");
    check_fails("--input train_us.c --dump checkpoint.safetensors", "is the name of a run's checkpoint");
    check_fails("--input train_us.c test_us.c", "no option test_us.c (see --help; quote patterns of");
    check_fails("--steps 5", "--input FILE is missing");
    // Every option: a value that is no number, one out of range, a choice that is none.
    for (const Option* o = OPTIONS; o < OPTIONS_END; o++) {
        char flags[256], says[128];
        if (!o->name || o->type == TEXT || o->type == FLAG) continue;
        const char* const values[] = {"x", "-7", "1e99", "3.x", "nan", "99999999999999999999", "''"};
        snprintf(says, sizeof says, "--%s is ", o->name);
        for (int i = 0; i < 7; i++) {
            snprintf(flags, sizeof flags, "--input train_us.c --%s %s", o->name, values[i]);
            check_fails(flags, says);
        }
    }
    check_fails("--input train_us.c --steps 2.5", "--steps is a whole number from 1 to 1e+09, not '2.5'");
    check_fails("--input train_us.c --seed 9007199254740993", "--seed is a whole number from 0 to");
    check_fails("--input train_us.c --width 100 --heads 3", "--width 100 is not a multiple of --heads 3");
    check_fails("--input train_us.c --width 65536 --layers 1000 --heads 128", "memory wanted");
    check(strstr(result.out, "; memory: ") != NULL, "the memory line comes before the end");
    check(run_us("--input README.md --steps 1 " TINY)->status == 0 &&
              strstr(result.out, " warmup 0 ") &&
              strstr(result.out, "nothing will be saved") && strstr(result.out, "input: README.md, "),
          "what the header says: %s", result.out);
    check_fails("--input train_us.c --seq 1048576", "use more text or a smaller --seq");
    check_fails("--input train_us.c --alpha-act 2", "--alpha-act is of --scheme umup, not of us");
    check_fails("--input train_us.c --scheme mup --alpha-res 2", "--alpha-res is of --scheme umup, not of");
    check_fails("--input train_us.c --scheme umup --emb-lr 0.5", "--emb-lr is of --scheme mup, not of umup");
    check_fails("--input train_us.c --scheme sp --base-layers 2", "--base-layers is of --scheme mup, not of");
}

// What a release promises of the command line: names, defaults, the limits of numbers, and what a checkpoint
// has: 0 nothing, 1 what a flag may change, 2 not for a run that goes on, 3 never.
static const char PROMISED[] =
    "input [] 1, val [] 1, tokenizer [] 1, hellaswag [] 1, scheme [us] 3, layers [4] 1..1000 3, "
    "width [128] 1..65536 3, heads [4] 1..1024 3, seq [128] 1..1048576 3, activation [gelu] 3, "
    "tau [auto] 0..1 3, batch [8] 1..65536 1, accum [1] 1..65536 1, steps [1500] 1..1e+09 1, "
    "optimizer [adamw] 2, lr [auto] 1e-12..1000 1, warmup [50] 0..1e+09 1, decay [auto] 0..1 1, "
    "base-width [256] 1..65536 1, precision [fp8] 1, recompute [] 0, seed [1] 0..9007199254740991 1, "
    "alpha-res [1] 1e-06..1000000 1, alpha-res-attn-ratio [1] 1e-06..1000000 1, "
    "alpha-attn [1] 1e-06..1000000 1, alpha-act [1] 1e-06..1000000 1, alpha-out [1] 1e-06..1000000 1, "
    "base-layers [4] 1..1000 1, emb-lr [1] 0..1000000 1, head-lr [1] 0..1000000 1, "
    "norm-lr [1] 0..1000000 1, grad-scale [auto] 1e-09..1e+12 1, eval-every [100] 0..1e+09 1, "
    "eval-tokens [65536] 0..1e+09 1, "
    "stats-every [0] 0..1e+09 1, out [] 0, save-every [0] 0..1e+09 1, resume [] 0, new-data [] 0, "
    "load [] 0, evaluate [] 0, export [] 0, dump [] 0, generate [] 0, prompt [] 0, tokens [256] 1..1e+09 0, "
    "temperature [0.8] 0..100 0, top-k [0] 0..65536 0, help [] 0, "
    "lr and decay of bytes, of tokens: lion, adamw; us 0.02/0.001 0.02/0.001 0.08/0.001 0.16/0.001; "
    "sp 0.0003/0.0001 0.002/0.0001 0.0005/0.0001 0.002/0.0001; "
    "mup 0.0003/0.0001 0.001/0.0001 0.0005/0.0001 0.001/0.0001; "
    "umup 0.5/0.001 0.5/0.001 0.5/0.001 0.5/0.001; "
    "us-pre 0.02/0.001 0.02/0.001 0.08/0.001 0.16/0.001; "
    "us-mean 0.02/0.001 0.02/0.001 0.08/0.001 0.16/0.001";

static Config parsed(const char* option, const char* value) {
    char *argv[] = {self, (char*)option, (char*)value}, flag[64];
    Config c;
    if (option) snprintf(flag, sizeof flag, "--%s", option), argv[1] = flag;
    config_parse(&c, 1 + !!option + !!value, argv, NULL, 0);
    return c;
}
// Each option, at its limits or with each of its choices, changes its own field and no other.
static void test_options(void) {
    static char all[8192];
    size_t n = 0;
    const Config defaults = parsed(NULL, NULL);
    for (const Option* o = OPTIONS; o < OPTIONS_END; o++) {
        if (!o->name) continue;
        const int limits = (o->type == INT && !o->choices) || o->type == UINT64 || o->type == FLOAT;
        n += (size_t)sprintf(all + n, "%s [%s] ", o->name, o->value);
        if (limits) n += (size_t)sprintf(all + n, "%g..%.*g ", o->low, o->type == UINT64 ? 16 : 9, o->high);
        n += (size_t)sprintf(all + n, "%d, ", o->stored);
        char value[64] = "1";
        for (int i = 0; i < 2 || (o->choices && o->type == INT && *choice(o->choices, i)); i++) {
            if (o->type == INT && o->choices) snprintf(value, sizeof value, "%s", choice(o->choices, i));
            else if (limits) snprintf(value, sizeof value, "%.17g", i ? o->high : o->low);
            else if (o->type == TEXT) snprintf(value, sizeof value, "%s", i ? "a b" : "x");
            Config c = parsed(o->name, o->type == FLAG ? NULL : value);
            const char* back = option_get(&c, o);
            const double got = o->type == FLOAT ? (double)strtof(back, NULL) : atof(back);
            const double number = o->type == FLOAT ? (double)strtof(value, NULL) : atof(value);
            check(limits ? got == number : strcmp(back, value) == 0, "--%s %s is %s", o->name, value, back);
            check(c.eval_tokens == (o->offset == AT(eval_tokens) ? (int)atof(value) :
                                    o->offset == AT(evaluate) ? 0 : 65536), "--%s: eval-tokens %d", o->name,
                  c.eval_tokens);
            int changed = 0;
            for (const Option* other = OPTIONS; other < OPTIONS_END; other++)
                if (other->name && other != o && other->offset != AT(eval_tokens))
                    changed += strcmp(option_get(&c, other), option_get(&defaults, other)) != 0;
            check(changed == 0, "--%s %s changes %d others, too", o->name, value, changed);
        }
    }
    n += (size_t)sprintf(all + n, "lr and decay of bytes, of tokens: lion, adamw");
    for (int i = 0; i < 4 * ALL_SCHEMES; i++) {
        Config c = parsed(NULL, NULL);
        c.scheme = i / 4, c.optimizer = i % 2, c.vocab = i % 4 / 2 ? GPT2_VOCAB : BYTES_VOCAB;
        config_defaults(&c);
        const char* name = i % 4 == 0 ? form("; %s", SCHEMES[c.scheme].name) : "";
        n += (size_t)sprintf(all + n, "%s %g/%g", name, (double)c.lr, (double)c.decay);
    }
    size_t same = 0;
    while (all[same] && all[same] == PROMISED[same]) same++;
    check(strcmp(all, PROMISED) == 0, "options: %.60s, promised: %.60s", all + same, PROMISED + same);
}

// Where two runs first differ: "STEP COLUMN" of log.csv, "sample", or "". What is measured in seconds does.
static const char* first_difference(const char* a, const char* b) {
    static const char* const columns[] = {"step", "train_loss", "val_loss", "lr", "grad_norm", "ms",
                                          "tokens_per_s", "hellaswag"};
    int column = 0, step = 0;
    for (; *a && *b; column++) {
        const size_t x = strcspn(a, ",\n"), y = strcspn(b, ",\n");
        if (column != 5 && column != 6 && (x != y || memcmp(a, b, x) != 0))
            return step > 4 ? "sample" : form("%d %s", step, columns[column]);
        if (a[x] == '\n') step++, column = -1;
        if (a[x] != b[y] && step <= 4) return form("%d rows", step);
        a += x + !!a[x], b += y + !!b[y];
    }
    return *a || *b ? step > 4 ? "sample" : "rows" : "";
}
static const char* logged(const char* flags) {  // of a run: its log, and the text at its end
    static char texts[2][16384];
    static int which;
    char path[1100], *text = texts[which ^= 1];
    shell("rm -rf '%s/effect'");
    run_us(form("--input README.md --steps 4 --warmup 2 " TINY "--eval-every 2 --eval-tokens 64 "
                "--out %%s/effect %s", flags));
    check(result.status == 0, "%s: %s", flags, result.err);
    text_file(path, sizeof path, "effect/log.csv");
    read_text(path, text, sizeof texts[0] - 1024);
    const char* sample = strstr(result.out, "a sample:\n");
    snprintf(text + strlen(text), 1000, "%s", sample ? sample + 10 : "none");
    return text;
}
// Every option changes a run from one number on, and nothing before; some change nothing that is logged.
static void test_effects(void) {
    static const struct { const char *option, *value, *scheme, *first; } effects[] = {
        {"input", "LICENSE", "us", "1 train_loss"}, {"val", "LICENSE", "us", "1 train_loss"},
        {"scheme", "us-pre", "us", "1 train_loss"}, {"layers", "3", "us", "1 train_loss"},
        {"width", "64", "us", "1 train_loss"}, {"heads", "4", "us", "1 train_loss"},
        {"seq", "32", "us", "1 train_loss"}, {"activation", "relu", "us", "1 train_loss"},
        {"tau", "0.3", "us", "1 train_loss"}, {"batch", "4", "us", "1 train_loss"},
        {"accum", "2", "us", "1 train_loss"}, {"seed", "2", "us", "1 train_loss"},
        {"precision", "bf16", "us", "1 train_loss"}, {"steps", "5", "us", "3 lr"},
        {"lr", "0.01", "us", "1 lr"}, {"warmup", "3", "us", "1 lr"},
        {"optimizer", "lion", "us", "2 "},  // Adam's first step is nearly a sign, as Lion's is
        {"decay", "0.9", "us", "2 train_loss"}, {"base-width", "16", "us", "2 train_loss"},
        {"grad-scale", "0.001", "us", "1 grad_norm"}, {"head-lr", "3", "us", "2 train_loss"},
        {"norm-lr", "3", "us", "2 train_loss"}, {"norm-lr", "0", "us", "1 grad_norm"},
        {"emb-lr", "3", "mup", "2 train_loss"},
        {"base-layers", "1", "mup", "1 train_loss"}, {"alpha-res", "2", "umup", "1 train_loss"},
        {"alpha-res-attn-ratio", "2", "umup", "1 train_loss"}, {"alpha-attn", "3", "mup", "1 train_loss"},
        {"alpha-attn", "3", "umup", "1 train_loss"}, {"alpha-act", "2", "umup", "1 train_loss"},
        {"alpha-out", "2", "mup", "1 train_loss"}, {"alpha-out", "2", "umup", "1 train_loss"},
        {"eval-every", "3", "us", "2 val_loss"}, {"eval-tokens", "16", "us", "2 val_loss"},
        {"recompute", "", "us", ""}, {"stats-every", "2", "us", ""}, {"save-every", "1", "us", ""},
        {"resume", "", "us", ""}, {"new-data", "", "us", ""}, {"tokenizer", "nothing", "us", ""},
        {"tokens", "7", "us", "sample"}, {"prompt", "ab", "us", "sample"},
        {"temperature", "3", "us", "sample"}, {"top-k", "1", "us", "sample"}};
    static const char* const otherwise[] = {"hellaswag", "out", "load", "evaluate", "export", "dump",
                                            "generate", "help"};
    char base[16384];
    const char* scheme = "";
    for (size_t i = 0; i < sizeof effects / sizeof *effects; i++) {
        if (strcmp(scheme, effects[i].scheme) != 0)
            snprintf(base, sizeof base, "%s", logged(form("--scheme %s", scheme = effects[i].scheme)));
        const char* flags = form("--scheme %s --%s %s", scheme, effects[i].option, effects[i].value);
        const char* first = first_difference(base, logged(flags));
        const size_t length = strlen(effects[i].first);
        check(length ? strncmp(first, effects[i].first, length) == 0 : !*first,
              "--%s %s changes '%s' first, not '%s'", effects[i].option, effects[i].value, first,
              effects[i].first);
        const int stats = access(form("%s/effect/stats.csv", work), F_OK) == 0;
        const int copies = access(form("%s/effect/step_00000001.safetensors", work), F_OK) == 0;
        check(stats == !strcmp(effects[i].option, "stats-every") &&
                  copies == !strcmp(effects[i].option, "save-every"), "--%s: files", effects[i].option);
    }
    for (const Option* o = OPTIONS; o < OPTIONS_END; o++) {
        int known = !o->name;
        for (size_t i = 0; i < sizeof effects / sizeof *effects && o->name; i++)
            known |= strcmp(effects[i].option, o->name) == 0;
        for (int i = 0; i < 8 && o->name; i++) known |= strcmp(otherwise[i], o->name) == 0;
        check(known, "what does --%s change?", o->name);
    }
}

// What a run prints and logs, every number against a second computation: the same steps taken here, the
// learning rate and the windows of validation from their definitions.
static double next_number(const char** p, const char* before) {  // after these words, which come next
    const size_t n = strlen(before);
    char* end = NULL;
    if (!*p || strncmp(*p, before, n) != 0) return *p = NULL, NAN;
    const double x = strtod(*p + n, &end);
    return *p = end == *p + n ? NULL : end, x;
}
static double mean_loss(Model* m, const uint8_t* text, long count) {  // 5 windows, evenly spread
    const int T = m->c.seq;
    Model one = *m;
    double sum = 0;
    one.c.batch = 1, one.rows = T;
    for (int i = 0; i < 5; i++) {
        const uint8_t* from = text + (long)((double)(count - T - 1) * (i / 4.0));
        for (int t = 0; t < T; t++) one.inputs[t] = from[t], one.targets[t] = from[t + 1];
        const float* losses = cpu_losses(&one);
        for (int t = 0; t < T; t++) sum += losses[t];
    }
    return sum / (5 * T);
}
static int off(double got, double want, double by) { return !(fabs(got - want) <= by * 0.5000001); }
static void test_log(void) {
    static char rows[65536], stats[65536];
    char path[1100];
    shell("rm -rf '%s/log'");
    const char* flags = "--input README.md --out %s/log --steps 7 --warmup 3 --lr 0.03 --batch 3 --accum 2 "
                        "--layers 2 --width 128 --heads 2 --seq 64 --eval-every 3 --eval-tokens 300 "
                        "--stats-every 4 --tokens 1";
    check(run_us(flags)->status == 0, "%s", result.err);
    text_file(path, sizeof path, "log/log.csv"), read_text(path, rows, sizeof rows);
    text_file(path, sizeof path, "log/stats.csv"), read_text(path, stats, sizeof stats);
    Tokens tokens;
    Config c = small_config();
    c.layers = 2, c.width = 128, c.heads = 2, c.seq = 64, c.batch = 3, c.accum = 2, c.lr = 0.03f, c.steps = 7;
    Model m = text_model_on(&CPU, c, &tokens, "README.md");
    const long all = tokens.count, held = all / 10;
    Split train = {&tokens, 0, all - held};
    check(strstr(result.out, form("\ninput: README.md, %ld bytes\n%ld bytes to train on, %ld to validate on; "
                                  "384 tokens a step\n%.2f M parameters; ", all, all - held, held,
                                  (double)m.num_params * 1e-6)) != NULL, "the header: %.1500s", result.out);
    char settings[2000] = "";  // all that a checkpoint keeps, but paths; some are of other schemes
    for (const Option* o = OPTIONS; o < OPTIONS_END; o++) {
        if (!o->name || !o->stored || o->type == TEXT || (o->type == FLOAT && o->choices)) continue;
        const char* value = o->offset == AT(precision) ? "fp8" : o->offset == AT(eval_every) ? "3" :
                            o->offset == AT(eval_tokens) ? "300" : o->offset == AT(stats_every) ? "4" :
                            o->offset == AT(warmup) ? "3" : option_get(&c, o);
        strcat(strcat(strcat(strcat(settings, " "), o->name), " "), value);
    }
    const char *shown_one = strstr(result.out, ", scheme "), *want = settings + 1;
    for (shown_one += shown_one ? 2 : 0; shown_one && *want && *shown_one; shown_one++)
        if (*shown_one == '\n') shown_one += strspn(shown_one, " \n") - 1, want += *want == ' ';
        else if (*want++ != *shown_one) break;
    check(shown_one && !*want && *shown_one == '\n', "the header's settings: %.300s, not %s",
          shown_one ? shown_one : "none", want);
    double buffers = 0;
    for (int k = 0; k < BUFFERS; k++) buffers += 4e-6 * buffer_size(&m, k);
    const char* p = strstr(result.out, "memory: ");
    check(!off(next_number(&p, "memory: "), 16e-6 * (double)m.num_params, 1) &&
              !off(next_number(&p, " MB parameters, gradients and optimizer state, "), buffers, 1),
          "memory of %.1f and %.1f MB", 16e-6 * (double)m.num_params, buffers);
    const char *row = strchr(rows, '\n'), *stat = strchr(stats, '\n'), *screen = result.out;
    double val = NAN;
    for (int s = 1; s <= 7; s++) {
        const double share = s <= 3 ? s / 3.0 : 0.1 + 0.9 * (1 + cos((s - 3) / 4.0 * acos(-1))) / 2;
        const double lr = 0.03f * share;
        const int validates = s % 3 == 0 || s == 7, shows = s == 1 || s == 4 || s == 7;
        m.stats_on = shows;
        const StepResult r = CPU.step(&m, &train, lr);
        if (validates) val = mean_loss(&m, tokens.shards[0].p + all - held, held);
        int wrong = off(next_number(&row, "\n"), s, 0) + off(next_number(&row, ","), r.loss, 1e-6);
        if (validates) wrong += off(next_number(&row, ","), val, 3e-6);
        wrong += off(next_number(&row, validates ? "," : ",,"), lr, 1e-5 * lr);
        wrong += off(next_number(&row, ","), r.norm, 1e-5 * r.norm);
        const double ms = next_number(&row, ","), rate = next_number(&row, ",");
        wrong += !(ms > 0) + off(rate * ms, 384e3, 2e-3 * 384e3);
        if (row && *row++ != ',') row = NULL;
        check(!wrong && row && *row == '\n', "step %d: %d numbers of the log are wrong", s, wrong);
        const char* line = strstr(screen, form("\nstep %d/", s));
        screen = line ? line : screen;
        wrong = off(next_number(&line, form("\nstep %d/", s)), 7, 0);
        wrong += off(next_number(&line, " | loss "), r.loss, 1e-4);
        if (validates) wrong += off(next_number(&line, " | val "), val, 1.01e-4);
        wrong += off(next_number(&line, " | lr "), lr, 1e-5);
        wrong += off(next_number(&line, " | norm "), r.norm, 1e-2 * r.norm);
        wrong += off(next_number(&line, " | "), ms, 1) + off(next_number(&line, " ms | "), rate, 1.1);
        const double minutes = next_number(&line, " tokens/s | "), left = next_number(&line, ":");
        wrong += !(minutes >= 0 && left >= 0 && left < 60 && (s < 7 || minutes + left == 0));
        check(!wrong && line && strncmp(line, " left\n", 6) == 0, "step %d: %d numbers are wrong: %.100s", s,
              wrong, screen);
        // Of each tensor: what the step recorded, in the file and on the screen.
        for (int i = 0; i < 12 && shows; i++) {
            const StatRow* of = &m.stats[i];
            const int stream = i % 5 == 0 && i < 11;
            if (line) line = strstr(line, form("\n%-11s %-5s", of->name, FORMATS[of->stat[0].format].name));
            if (line) line += 18;
            for (int k = 0; k < (stream ? 1 : 3); k++) {
                const Stat* x = &of->stat[k];
                const char* operand = stream ? "stream" : k == 0 ? "input" : k == 1 ? "weight" : "grad";
                const char* want = form("\n%d,%s,%s,%s,%.6g,%.6g,%.6g,%.6g", s, of->name, operand,
                                        FORMATS[x->format].name, x->rms, x->max, x->flushed, x->saturated);
                check(stat && strncmp(stat, want, strlen(want)) == 0, "stats.csv: %.60s, not %s",
                      stat ? stat : "no more", want);
                stat = stat ? strchr(stat + 1, '\n') : NULL;
                wrong = off(next_number(&line, "| "), x->rms, 1e-2 * x->rms);
                wrong += off(next_number(&line, " "), x->max, 1e-2 * x->max);
                wrong += off(next_number(&line, " "), 100 * x->flushed, 1e-2);
                wrong += off(next_number(&line, " "), 100 * x->saturated, 1e-2);
                if (line && *line++ != ' ') line = NULL;
                check(!wrong && line, "step %d, %s: %d numbers on the screen are wrong", s, of->name, wrong);
            }
            check(line && *line == '\n', "step %d, %s: the screen's row ends", s, of->name);
        }
    }
    check(row && !row[1] && stat && !stat[1], "the logs end there");
    p = strstr(screen, "\nsaved ");
    if (p) p = strstr(p, "/log/checkpoint.safetensors");
    int wrong = off(next_number(&p, "/log/checkpoint.safetensors, step "), 7, 0);
    wrong += off(next_number(&p, "\nvalidation loss "), val, 1.01e-4);
    wrong += off(next_number(&p, ", "), val / log(2), 1.5e-4);
    check(!wrong && p && strncmp(p, " bits per byte; a sample:\n", 26) == 0, "the end: %.200s", screen);
    // What is left: as many steps as are left, at what a step took so far; what ms says is part of that.
    double ms = 0;
    shell("rm -rf '%s/other'");
    const double begin = seconds();
    run_with("--input README.md --out %s/other --steps 1000 " TINY, 0, 0, SIGINT);
    const double took = seconds() - begin;
    text_file(path, sizeof path, "other/log.csv"), read_text(path, rows, sizeof rows);
    long s = 0;
    for (row = strchr(rows, '\n'); row && row[1] && strchr(row + 1, '\n'); s++) {
        for (int comma = 0; comma < 5 && row; comma++) row = strchr(row + 1, ',');
        ms += next_number(&row, ","), row = row ? strchr(row, '\n') : NULL;
    }
    for (p = result.out; (row = strstr(p, " tokens/s | ")); p = row + 1) continue;
    p--;
    const double minutes = next_number(&p, " tokens/s | "), left = 60 * minutes + next_number(&p, ":");
    const double rest = (double)(1000 - s) / (double)s;
    check(s > 0 && left >= 1e-3 * ms * rest - 1 && left <= took * rest,
          "after step %ld, %.0f ms of %.0f: %.0f s left", s, ms, 1e3 * took, left);
    // The checkpoint: every tensor's shape, and the parameters and moments that these steps led to.
    const float* const state[] = {m.params, m.m, m.v};
    static const char* const prefixes[] = {"", "adam.m.", "adam.v."};
    Archive a;
    text_file(path, sizeof path, "log/checkpoint.safetensors"), archive_read(&a, path);
    for (const Tensor* t = m.tensors; t < m.tensors + m.num_tensors; t++)
        for (int i = 0; i < 3; i++) {
            const Found found = archive_tensor(&a, form("%s%s", prefixes[i], t->name));
            const char* shape = t->rows == 1 ? form("%ld", t->cols) : form("%ld,%ld", t->rows, t->cols);
            const size_t size = sizeof(float) * (size_t)(t->rows * t->cols);
            check(found.dtype == FP32 && found.values == t->rows * t->cols &&
                      strcmp(found.shape, shape) == 0 && memcmp(found.data, state[i] + t->offset, size) == 0,
                  "the checkpoint's %s%s: [%s]", prefixes[i], t->name, found.shape);
        }
    int keys = 0, stored = 0;  // of its metadata: all stored settings, and six more
    for (const char* at = a.header; *at && *at != '}'; at++) keys += strncmp(at, "\":\"", 3) == 0;
    for (const Option* o = OPTIONS; o < OPTIONS_END; o++) stored += o->name && o->stored;
    check(keys == stored + 6, "%d keys for %d stored settings", keys, stored);
    check(meta_number(&a, "step") == 7 && meta_number(&a, "sequence") == 42 &&
              meta_number(&a, "ranks") == 1 && meta_number(&a, "grad_scale") == m.grad_scale,
          "7 steps of 6 sequences");
    close_archive(&a);
    model_free(&m), forget(&tokens);
}
// The host's memory: what a model takes there, and what the machine has left; and how a long wait is told.
static void test_host(void) {
    char path[1100];
    Model m;
    Config c = small_config();
    model_layout(&m, &c);
    m.training = 1, m.c.width = 1024, m.num_params = 1L << 50;  // those are on a device
    int out = divert();
    check_memory(&m, 0);
    const char* printed = undivert(out);
    check(strcmp(printed, "memory: 17 MB on the host\n") == 0, "4 bytes x 1024 x 4096: %s", printed);
    // What is left is read from files like these.
    static const char meminfo[] = "MemTotal: 9 kB\nMemAvailable:    123456 kB\nMemAvailable: 7 kB\n";
    text_file(path, sizeof path, "memory.txt"), write_file(path, meminfo, sizeof meminfo - 1);
    check(file_number(path, "MemAvailable:") == 123456 && file_number(path, "MemTotal:") == 9 &&
              isinf(file_number(path, "Swap:")), "numbers in /proc");
    write_file(path, "max\n", 4);
    check(isinf(file_number(path, "")) && isinf(file_number("/no such file", "")), "no limit, no file");
    write_file(path, "4096\n", 5);
    check(file_number(path, "") == 4096, "a limit");
    // Progress is said at most every half minute, with what is left of it.
    out = divert();
    progress("questions", 1, 4, seconds() - 100), progress("questions", 2, 4, seconds() - 100);
    printed = undivert(out);
    check(strcmp(printed, "questions: 25 %, 300 s left\n") == 0, "progress: %s", printed);
    free(m.tensors);
}

static void test_bad_files(void) {
    uint16_t tokens[600];
    char path[1100], random[4000];
    for (int i = 0; i < 600; i++) tokens[i] = (uint16_t)(i % 50257);
    for (int i = 0; i < 4000; i++) random[i] = (char)random_u64(1, 1, (uint64_t)i);
    shell("mkdir -p '%s/dir' && : >'%s/empty.txt' && printf 'short' >'%s/short.txt'");
    const struct { const char* name; const void* data; size_t n; } files[] = {
        {"random.bin", random, 4000}, {"random.safetensors", random, 4000}, {"tiny.safetensors", random, 5}};
    for (int i = 0; i < 3; i++)
        text_file(path, sizeof path, files[i].name), write_file(path, files[i].data, files[i].n);
    text_file(path, sizeof path, "good.bin"), write_shard(path, tokens, 600, 600);
    text_file(path, sizeof path, "cut.bin"), write_shard(path, tokens, 600, 700);
    tokens[300] = 50257;
    text_file(path, sizeof path, "alien.bin"), write_shard(path, tokens, 600, 600);
    check_fails("--input %s/nothing.txt", "no file matches");
    check_fails("--input '%s/no*.txt'", "no file matches");
    check_fails("--input %s/dir", "is not a regular file");
    check_fails("--input %s/empty.txt", "is empty");
    check_fails("--input %s/short.txt", "too few for --seq 128");
    check_fails("--input train_us.c --val %s/short.txt", "5 to validate on are too few");
    check_fails("--input %s/random.bin", "is not a token shard");
    check_fails("--input %s/cut.bin --seq 16", "is damaged");
    check_fails("--input train_us.c --val %s/good.bin --seq 16", "are not of one kind");
    check_fails("--input '%s/[gs]*.[bt]*' --seq 16", "mixes token shards");
    check_fails("--input %s/good.bin --seq 16 --tokenizer %s/none", "cannot open tokenizer");
    const Run* numbers = run_us("--input %s/good.bin --steps 1 --out %s/ids " TINY);
    const char* sample = strstr(numbers->out, "; a sample:\n");
    check(numbers->status == 0 && strstr(numbers->out, "--tokenizer-only` writes it") && sample &&
              strspn(sample + 12, " 0123456789\n") == strcspn(sample + 12, "s"),
          "without a table: %s %s", numbers->err, sample);
    check(run_us("--load %s/ids/checkpoint.safetensors --generate --tokens 3")->status == 0, "%s",
          result.err);
    for (int i = 0; i < 4; i++) {
        const char* const wrong[] = {"a", "50257", "-1", "'7 ,'"};
        const char* flags = form("--load %%s/ids/checkpoint.safetensors --generate --prompt %s", wrong[i]);
        check_fails(flags, "--prompt wants numbers of tokens here");
    }
    run_us("--load %s/ids/checkpoint.safetensors --generate --tokens 1 --prompt ' 50255 0 '");
    check(strstr(result.out, "\n 50255 0 ") != NULL, "a prompt of numbers: %s%s", result.out, result.err);
    shell("mkfifo '%s/fifo'");
    check_fails("--input %s/fifo", "is not a regular file");
    check(run_us("--input %s/random.safetensors --steps 1 " TINY)->status == 0, "any bytes: %s", result.err);
    check_fails("--input %s/good.bin --seq 16 --tokenizer %s/dir", "is not a regular file");
    check_fails("--input %s/good.bin --seq 16 --tokenizer %s/random.bin", "is not a tokenizer file");
    char other[1026 + 2] = {0};
    const uint32_t one[4] = {TOKENIZER_MAGIC, 2, 2, 0}, cut[4] = {TOKENIZER_MAGIC, 2, 3, 0};
    memcpy(other, one, sizeof one);
    text_file(path, sizeof path, "two.bin"), write_file(path, other, sizeof other);  // a vocabulary of two
    check_fails("--input %s/good.bin --seq 16 --tokenizer %s/two.bin", "has 2 tokens, the model 50257");
    memcpy(other, cut, sizeof cut);
    other[1024] = 100;
    text_file(path, sizeof path, "tokenizer_cut.bin"), write_file(path, other, sizeof other);
    check_fails("--input %s/good.bin --seq 16 --tokenizer %s/tokenizer_cut.bin", "is cut off at token");
    // A whole vocabulary, so that training starts and meets the token that is none.
    uint32_t header[256] = {TOKENIZER_MAGIC, 2, GPT2_VOCAB, 50256};
    char* vocabulary = (char*)floats(1024 + 2.0 * GPT2_VOCAB);
    memcpy(vocabulary, header, 1024);
    for (int i = 0; i < GPT2_VOCAB; i++) vocabulary[1024 + 2 * i] = 1, vocabulary[1025 + 2 * i] = 'a';
    text_file(path, sizeof path, "gpt2_tokenizer.bin"), write_file(path, vocabulary, 1024 + 2 * GPT2_VOCAB);
    free(vocabulary);
    check_fails("--input %s/good.bin --val %s/alien.bin --steps 30 " TINY, "holds token 50257 at 300");
    check(!strstr(result.out, "step 1"), "a bad token to validate on is found before the first step");
    check_fails("--input %s/alien.bin --val %s/good.bin --steps 30 --out %s/bad " TINY, "holds token 50257");
    check(strstr(result.out, "saved ") != NULL, "what was learned before it is saved: %s", result.out);
    check(run_us("--input %s/good.bin --steps 2 " TINY)->status == 0, "a good shard: %s", result.err);
    // The table beside the shards; from another directory it has to be named.
    char command[16384];
    snprintf(command, sizeof command,
             "cd '%s' && mkdir -p up && cp good.bin gpt2_tokenizer.bin up && '%s' %s "
             "-- --input up/good.bin --steps 1 --out run_up " TINY " >/dev/null && '%s' %s -- "
             "--load '%s/run_up/checkpoint.safetensors' --generate --tokens 2 --prompt 3 >'%s/up.txt'",
             work, self, run_on, self, run_on, work, work);
    check(system(command) == 0, "text with a table beside the data");
    text_file(path, sizeof path, "up.txt");
    read_text(path, result.out, sizeof result.out);
    check(strcmp(result.out, "aaa\n") == 0, "with the table beside the data: %s", result.out);
    snprintf(command, sizeof command, "cd '%s' && '%s' %s -- --input good.bin --steps 1 " TINY ">beside.txt "
             "&& ! grep -q 'no gpt2_tokenizer' beside.txt", work, self, run_on);
    check(system(command) == 0, "with the table beside a file of this folder");
    const char* elsewhere = "--load %s/run_up/checkpoint.safetensors --generate --tokens 2 --prompt 3";
    check(run_us(elsewhere)->status == 0, "a table that lay beside the data is not missed: %s", result.err);
    check(strcmp(run_us(form("%s --tokenizer %%s/gpt2_tokenizer.bin", elsewhere))->out, "aaa\n") == 0, "%s",
          result.err);
    check_fails("--input train_us.c --out %s/short.txt/x", "cannot make --out");
    check_fails("--input train_us.c --out %s/short.txt", "cannot write");
    check_fails("--input train_us.c --out %s/no/such", "cannot make --out");
    check(run_us("--input README.md --out %s/none --resume --steps 2 " TINY)->status == 0 &&
              strstr(result.out, "saved "), "--resume without a checkpoint begins: %s", result.err);
    check_fails("--input train_us.c --dump %s/no/such.st " TINY, "cannot write");
    check_fails("--load %s/nothing --generate", "cannot open safetensors file");
    check_fails("--load %s/dir --generate", "is not a regular file");
    check_fails("--load %s/empty.txt --evaluate", "is empty");
    check_fails("--load %s/tiny.safetensors --export %s/x", "is not a safetensors file, or its header is");
    check_fails("--load %s/random.safetensors --generate", "is not a safetensors file");
    check_fails("--load dev/debug_state.safetensors --generate", "does not say its --");
    shell("test ! -e '%s/x'");
}

// Whatever ends a run: what it has learned is saved, and it can go on.
static void test_nothing_lost(void) {
    const int ends[] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE, TWICE + SIGTERM, CUT};
    char path[1100], command[8192], text[256];
    for (int i = 0; i < 6; i++) {
        shell("rm -rf '%s/other' && cat README.md README.md >'%s/cut.txt'");
        const char* longer = ends[i] > TWICE ? "--batch 100" : "";  // time for all of its signals
        const char* flags = "--input %%s/cut.txt --val README.md --steps 1000000 --out %%s/other " TINY "%s";
        run_with(form(flags, longer), 0, 0, ends[i]);
        if (ends[i] == CUT)
            check(result.status == 1 && strstr(result.err, "a file was cut off while it was read"),
                  "a file cut off: exit %d %s", result.status, result.err);
        else check(result.status == 0 && strstr(result.out, "stopped by a signal after step"),
                   "signal %d: exit %d %s", ends[i], result.status, result.err);
        const char *saved = strstr(result.out, "saved "), *step = saved ? strstr(saved, ", step ") : NULL;
        check(step != NULL, "end %d: nothing is saved: %s", ends[i], result.err);
        if (!step) continue;
        shell("cat README.md README.md >'%s/cut.txt'");
        check(run_us(form("--out %%s/other --resume --steps %ld", atol(step + 7) + 1))->status == 0 &&
                  strstr(result.out, "resumed from"),
              "resuming after end %d: %s", ends[i], result.err);
    }
    snprintf(command, sizeof command, "'%s' %s -- --input README.md --steps 1000000 --out '%s/piped' " TINY
             "2>/dev/null | head -40 >/dev/null && ls '%s'/piped/checkpoint.safetensors", self, run_on, work,
             work);
    check(system(form("%s >/dev/null", command)) == 0, "a pipe that ends costs nothing");

    // A name that is not UTF-8 and has control characters, a quote and a backslash: the checkpoint is UTF-8
    // without any all the same, and the run goes on.
#define ODD_NAME "\"$(printf '%s/\\377\\t\\n\\033\"\\\\.txt')\""
    shell("cp README.md " ODD_NAME);
    check(run_us("--input " ODD_NAME " --steps 1 --out %s/name " TINY)->status == 0, "%s", result.err);
    shell("cd '%s/name' && tail -c +9 checkpoint.safetensors | head -c $(od -An -tu4 -N4 check*) >header "
          "&& iconv -f UTF-8 -t UTF-8 header >/dev/null && grep -qF '/??????.txt' header && "
          "test \"$(LC_ALL=C tr -d '\\040-\\377' <header; echo x)\" = x");
    check(run_us("--out %s/name --resume --steps 2 --input " ODD_NAME)->status == 0, "%s", result.err);

    // Where output cannot be written: neither into the log, nor in silence.
    check(run_us("--input README.md --steps 1 --out %s/closed " TINY " >&-")->status == 1 &&
              strstr(result.err, "not all of the output could be written"), "stdout closed: %s", result.err);
    text_file(path, sizeof path, "closed/log.csv");
    read_text(path, text, sizeof text);
    check(strncmp(text, "step,train_loss", 15) == 0, "nothing else is in the log: %s", text);
    check(run_us("--input README.md --steps 1 " TINY " >/dev/full")->status == 1 &&
              strstr(result.err, "not all of the output could be written"), "/dev/full: %s", result.err);

    if (device == &CPU) {  // the disk is full for the logs, not for the smaller checkpoint: the run goes on
        run_with("--input README.md --steps 300 --stats-every 1 --out %s/rows --layers 1 --width 8 --heads 1 "
                 "--seq 8 --batch 2 --tokens 1 >/dev/null", 0, 100000, 0);
        const char* rows = form("train_us: rows of the logs in %s/rows could not be written\n", work);
        check(result.status == 0 && strcmp(result.err, rows) == 0, "exit %d %s", result.status, result.err);
        check(run_us("--out %s/rows --resume --steps 301")->status == 0 &&
                  strstr(result.out, ", step 300\n"), "and it can be resumed: %s", result.err);
    }
    // A checkpoint now and then: the newest stays, and copies of those that --save-every names.
    setenv("TEST_SAVE_SECONDS", "0", 1);
    check(run_us("--input README.md --steps 7 --save-every 3 --out %s/timed " TINY)->status == 0, "%s",
          result.err);
    shell("cd '%s/timed' && test \"$(echo *.safetensors)\" = "
          "'checkpoint.safetensors step_00000003.safetensors step_00000006.safetensors' && "
          "strings -n 9 step_00000003.safetensors | grep -q '\"step\":\"3\"' && "
          "strings -n 9 checkpoint.safetensors | grep -q '\"step\":\"7\"'");
    unsetenv("TEST_SAVE_SECONDS");
    // It is damaged: it is named, and a copy in its place goes on.
    shell("cd '%s/timed' && head -c 20000 checkpoint.safetensors >x && mv x checkpoint.safetensors");
    check_fails("--out %s/timed --resume --steps 8", "lies outside the file (is it cut off?)");
    shell("cd '%s/timed' && cp step_00000006.safetensors checkpoint.safetensors");
    check(run_us("--out %s/timed --resume --steps 8")->status == 0 &&
              strstr(result.out, "checkpoint.safetensors, step 6\n"), "without it: %s", result.err);

#if defined(_OPENMP) && !defined(KMP_VERSION_MAJOR)
    // Threads spin briefly: the program sets that and begins again, unless the user says how they shall wait.
    for (int own = 0; own < 2; own++) {
        fflush(stdout);
        const pid_t waits = fork();
        if (waits == 0) {
            char none[] = "no such test", *again[] = {self, none, NULL};
            unsetenv("GOMP_SPINCOUNT"), unsetenv("OMP_WAIT_POLICY");
            if (own) setenv("OMP_WAIT_POLICY", "passive", 1);
            omp_set_num_threads(2);
            if (!freopen("/dev/null", "w", stdout)) _exit(8);
            wait_briefly(again);  // which ends with status 1, having run no test
            _exit(7);
        }
        int waited = 0;
        waitpid(waits, &waited, 0);
        check(WEXITSTATUS(waited) == (own ? 7 : 1), own ? "OMP_WAIT_POLICY wins" : "it begins again");
    }
#endif
    // A copy of an earlier run at the same step gives way, and cannot be written through.
    shell("cd '%s/timed' && cp step_00000006.safetensors step_00000009.safetensors && "
          "ln step_00000009.safetensors other");
    check(run_us("--out %s/timed --resume --steps 10")->status == 0, "%s", result.err);
    shell("cd '%s/timed' && cmp other step_00000006.safetensors && ! cmp -s other step_00000009.safetensors");
    text_file(path, sizeof path, "timed");
    const int dir = open(path, O_RDONLY);
    check(flock(dir, LOCK_EX) == 0, "flock");
    check_fails("--out %s/timed --resume --steps 20", "another process trains into --out");
    close(dir);
    // A file cut off during validation, in a batch that is not whole: the checkpoint has the whole batch.
    shell("rm -rf '%s/other' && cat README.md >'%s/cut.txt'");
    run_with("--input README.md --val %s/cut.txt --steps 1000000 --eval-tokens 64 --out %s/other --layers 1 "
             "--width 32 --heads 2 --seq 16 --batch 3 --eval-every 1", 0, 0, CUT);
    check(result.status == 1 && strstr(result.out, "saved "), "cut off: %d %s", result.status, result.err);
    shell("cd '%s/other' && strings -n 12 checkpoint.safetensors | grep -q '\"batch\":\"3\"'");
}

// Validation is of the same windows for any batch: FP32 rounding apart, the same number.
static void test_validation(void) {
    const int batches[] = {1, 3, 8, 40};
    double loss[4];
    for (int i = 0; i < 4; i++) {
        Tokens tokens;
        Config c = small_config();
        c.precision = 0, c.layers = 1, c.width = 64, c.heads = 2, c.seq = 32, c.batch = batches[i];
        c.eval_tokens = 50 * 32 + 1;
        Model m = text_model_on(device, c, &tokens, "README.md");
        Split val = {&tokens, 7, 9000};
        check(val_windows(&c, &val) == 51, "%ld windows", val_windows(&c, &val));
        if (i == 0) {
            const uint8_t* text = tokens.shards[0].p + 7;
            val_read(&m, &val, 0, 1);
            check(m.inputs[0] == text[0] && m.targets[31] == text[32], "the first window is the beginning");
            val_read(&m, &val, 50, 1);
            check(m.inputs[0] == text[9000 - 33] && m.targets[31] == text[8999], "the last one is the end");
        }
        loss[i] = validate(&m, device, &val);
        m.c.eval_tokens = 0;
        check(val_windows(&m.c, &val) == 8999 / 32 && m.c.batch == batches[i] && m.rows == 32 * batches[i],
              "0: all windows, and the batch is as it was");
        check_below(fabs(loss[i] / loss[0] - 1), 1e-6, "validation:", form("batch %d", batches[i]));
        device->close(&m), model_free(&m), forget(&tokens);
    }
}

// Replaces the first `from` in a checkpoint's header by `to`, and repairs the header's length.
static void forge(const char* name, const char* from, const char* to, long cut) {
    char path[1100];
    long size;
    text_file(path, sizeof path, "run/checkpoint.safetensors");
    const uint8_t* good = map_file(path, "checkpoint", &size);
    long length = (long)read_u32(good), grow = (long)strlen(to) - (long)strlen(from);
    char *bad = (char*)floats((double)size + 64), *header = (char*)floats((double)length + 8);
    memcpy(header, good + 8, (size_t)length);
    char* at = strstr(header, from);
    if (!at) die("the tests cannot find %s in a checkpoint", from);
    long before = at - header;
    memcpy(bad + 8, header, (size_t)before);
    memcpy(bad + 8 + before, to, strlen(to));
    memcpy(bad + 8 + before + strlen(to), good + 8 + before + strlen(from),
           (size_t)(size - 8 - before - (long)strlen(from)));
    for (int i = 0; i < 8; i++) bad[i] = (char)((length + grow) >> 8 * i);
    text_file(path, sizeof path, name);
    write_file(path, bad, (size_t)(size + grow - cut));
    free(bad), free(header);
    munmap((void*)good, (size_t)size);
}
static void test_checkpoints(void) {
    // The uninterrupted run, and one resumed from its middle: all files must be the same bits, for both
    // optimizers. The text is short, so that an epoch ends on the way: 100 bytes to train on are 5 sequences
    // of 16, a step takes 6.
    shell("head -c 112 README.md >'%s/epoch.txt'");
    const char* const optimizers[] = {"lion", "adamw"};
    for (int i = 0; i < 2; i++) {
        char flags[1024];
        shell("rm -rf '%s/run' '%s/half' '%s/other'");
        snprintf(flags, sizeof flags,
                 "--input %%s/epoch.txt --val README.md --steps 8 --save-every 4 --accum 2 --optimizer %s "
                 "--out %%s/run --stats-every 3 " TINY,
                 optimizers[i]);
        check(run_us(flags)->status == 0, "training: %s", result.err);
        shell("mkdir '%s/half' && cp '%s/run/step_00000004.safetensors' '%s/half/checkpoint.safetensors'");
        shell("cp '%s'/run/*.csv '%s/half'");
        check(run_us("--out %s/half --resume")->status == 0, "resuming: %s", result.err);
        shell("rm -rf '%s/logged' && mkdir '%s/logged' && cp '%s/run/log.csv' '%s/logged'");
        check_fails("--input README.md --out %s/logged " TINY, "holds a run already");
        check(same_files("run/checkpoint.safetensors", "half/checkpoint.safetensors"),
              "%s: resume is bit-exact", optimizers[i]);
        check(same_files("run/stats.csv", "half/stats.csv"), "resume continues stats.csv");
        shell("for d in run half; do cut -d, -f1-5 '%s'/$d/log.csv >'%s'/$d.txt; done");
        check(same_files("run.txt", "half.txt"), "resume continues log.csv");
        for (int threads = 0; threads <= (device == &CPU ? 3 : 0); threads++) {
            shell("rm -rf '%s/other'");
            snprintf(flags, sizeof flags,
                     "--input %%s/epoch.txt --val README.md --steps 8 --save-every 4 --accum 2 --optimizer "
                     "%s --out %%s/other --stats-every 3 %s" TINY,
                     optimizers[i], threads ? "" : "--recompute ");
            run_with(flags, threads, 0, 0);
            check(same_files("run/checkpoint.safetensors", "other/checkpoint.safetensors"),
                  threads ? "%d threads agree bit for bit" : "%d: --recompute agrees bit for bit", threads);
            check(same_files("run/stats.csv", "other/stats.csv"), "%d: and so do the statistics", threads);
        }
    }
    static char log[65536];
    char path[1100];
    text_file(path, sizeof path, "run/log.csv");
    read_text(path, log, sizeof log);
    int rows = 0;
    for (char* p = log; (p = strchr(p, '\n')); p++) rows++;
    const char* columns = "step,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s,hellaswag\n1,";
    check(rows == 9 && strncmp(log, columns, strlen(columns)) == 0, "log.csv: %d rows", rows);
    check(run_us("--out %s/run --resume")->status == 0 && strstr(result.out, "nothing to do"),
          "resuming a run that is done: %s%s", result.out, result.err);
    check_fails("--input train_us.c --out %s/run " TINY, "holds a run already");
    shell("cp README.md '%s/notes[1].txt' && printf '9' >>'%s/half/log.csv' && "
          "cp '%s/run/step_00000004.safetensors' '%s/half/checkpoint.safetensors'");
    check(run_us("--input '%s/notes[1].txt' --steps 1 " TINY)->status == 0, "brackets in a name: %s",
          result.err);
    check(run_us("--out %s/half --resume --tau auto --heads 2 --lr auto")->status == 0,
          "the same flags again: %s", result.err);
    check(run_us("--out %s/half --resume --lr 0.003 --steps 9")->status == 0, "%s", result.err);
    check(run_us("--out %s/half --resume --lr auto --steps 10")->status == 0 &&
              strstr(result.out, " lr 0.003 "), "--lr auto is the run's: %s", result.out);
    shell("cut -d, -f1-5 '%s/half/log.csv' | head -9 >'%s/half.txt'");
    check(same_files("run.txt", "half.txt"), "a log cut off in a line is mended");
    check_fails("--out %s/run --resume --width 64", "--width 64 does not fit checkpoint");
    check_fails("--out %s/run --resume --optimizer lion", "--optimizer lion does not fit");
    uint16_t tokens[600] = {0};
    text_file(path, sizeof path, "good.bin"), write_shard(path, tokens, 600, 600);
    check_fails("--out %s/run --resume --input %s/good.bin --steps 9", "was not trained on the kind");
    // Other data is refused, an edit in its middle too.
    shell("cp README.md '%s/other.txt' && cd '%s' && tr t T <other.txt >edited.txt");
    shell("rm -rf '%s/a' && cp -r '%s/run' '%s/a'");
    check_fails("--out %s/a --resume --input %s/other.txt --steps 9", "--new-data goes on");
    check_fails("--out %s/a --resume --val %s/edited.txt --steps 9", "--new-data goes on");
    check(run_us("--out %s/a --resume --val %s/other.txt --steps 9")->status == 0,
          "a copy is the same data: %s", result.err);
    check(run_us("--out %s/a --resume --val %s/edited.txt --steps 10 --new-data")->status == 0, "%s",
          result.err);

    // Writing text: the same for the same seed, and with keys and values kept as without.
    const char* the = "--load %s/run/checkpoint.safetensors --generate --prompt 'The µ' --tokens 40";
    run_us(the);
    check(result.status == 0 && strncmp(result.out, "The µ", 6) == 0 && strlen(result.out) >= 46,
          "generate: %s", result.err);
    char first[256];
    snprintf(first, sizeof first, "%.255s", result.out);
    check(strcmp(run_us(the)->out, first) == 0, "the same text again");
    check(strcmp(run_us(form("%s --seed 9", the))->out, first) != 0, "other seed, other text");
    const char* a = "--load %s/run/checkpoint.safetensors --generate --prompt A --tokens 20";
    run_us(form("%s --temperature 0", a));
    snprintf(first, sizeof first, "%.255s", result.out);
    check(strcmp(run_us(form("%s --top-k 1 --seed 5", a))->out, first) == 0, "top-k 1 is temperature 0");
    check_fails("--load %s/run/checkpoint.safetensors --generate --layers 3",
                "--layers 3 does not fit checkpoint");

    // A full disk: an error, and what was written before is as it was.
    shell("rm -rf '%s/other' && mkdir '%s/other' && "
          "cp '%s/run/step_00000004.safetensors' '%s/other/checkpoint.safetensors'");
    run_with("--out %s/other --resume --save-every 6", 0, 20000, 0);
    const char* first_error = strstr(result.err, "checkpoint.safetensors: File too large");
    check(result.status == 1 && first_error && strstr(result.out, "step 8/8") &&
              strstr(first_error + 1, "checkpoint.safetensors: File too large"),
          "a full disk: exit %d %s", result.status, result.err);
    check(same_files("other/checkpoint.safetensors", "run/step_00000004.safetensors"),
          "a full disk costs no checkpoint");
    shell("test \"$(echo '%s'/other/*.safetensors*)\" = '%s/other/checkpoint.safetensors'");
    if (device != &CPU) return;  // what follows does not get to the device
    // Forged checkpoints: each is refused, in one line.
    static const struct { const char *from, *to, *says; long cut; } forgeries[] = {
        {"F32", "F64", "h.0.qkv is F64, not F32, BF16, F8_E4M3 or I32", 0},
        {"\"F32\"", "\"I32\"", "is not so many floats", 0},
        {"\"F32\"", "\"BF16\"", "is not so many floats", 0},
        {"\"F32\"", "\"F8_E4M3\"", "is not so many floats", 0},
        {"[96,32]", "[32,96]", "is not 96 x 32 but [32,96]", 0},
        {"[96,32]", "[97,32]", "is not 96 x 32 but [97,32]", 0},
        {"[96,32]", "[4611686018427387904,4]", "is not 96 x 32 but", 0},
        {"[96,32]", "[1,1,1,1,96,32]", "is not 96 x 32 but [1,1,1,1,96,32]", 0},
        {"[96,32]", "[96,-32]", "entry for h.0.qkv is damaged", 0},
        {"[96,32]", "[+96,32]", "entry for h.0.qkv is damaged", 0},
        {"[96,32]", "[96.0,32]", "entry for h.0.qkv is damaged", 0},
        {"[96,32]", "[]", "entry for h.0.qkv is damaged", 0},
        {"[96,32]", "[96, 32]", "entry for h.0.qkv is damaged", 0},
        {"[96,32]", "[96,32,]", "is not 96 x 32 but", 0},
        {"[12288,16384]", "[12288,12284]", "h.0.out lies outside the file", 0},
        {"[12288,16384]", "[-12288,16384]", "h.0.out lies outside the file", 0},
        {"[12288,16384]", "[12288,16380]", "is not so many floats", 0},
        {"[12288,16384]", "[12288,16388]", "is not so many floats", 0},
        {"[0,12288]", "[0]", "entry for h.0.qkv is damaged", 0},
        {"[0,12288]", "[0,99999999]", "h.0.qkv lies outside the file", 0},
        {"[0,12288]", "[99999999999999999999,99999999999999999999]", "h.0.qkv lies outside the file", 0},
        {"h.0.out", "h.0.owt", "has no tensor h.0.out", 0},
        {"lion.m.h.0.out", "lion.n.h.0.out", "has no tensor lion.m.h.0.out", 0},
        {"\"dtype\":", "\"dtypo\":", "has no tensor h.0.qkv", 0},
        {"\"dtype\":\"F32\",", "", "has no tensor h.0.qkv", 0},
        {"[96,32],\"data_off", "[96,32],\"data off", "entry for h.0.qkv is damaged", 0},
        {"\"width\":\"32\"", "\"width\":\"x\"", "--width is a whole number", 0},
        {"\"width\":\"32\"", "\"width\":\"64\"", "is not 192 x 64 but [96,32]", 0},
        {"\"width\":\"32\",", "", "does not say its --width", 0},
        {"\"alpha-out\":\"1\",", "", "does not say its --alpha-out", 0},
        {"\"width\":\"32\"", "\"width\":32", "does not say its --width", 0},
        {"\"width\":\"32\"", "\"width\",\"32\"", "does not say its --width", 0},
        {"\"vocab\":\"256\"", "\"vocab\":\"-3\"", "has no good vocab", 0},
        {"\"vocab\":\"256\"", "\"vocab\":\"99\"", "was not trained on the kind of tokens", 0},
        {"\"step\":\"4\"", "\"step\":\"4x\"", "has no good step", 0},
        {"{\"__metadata__\"", "[\"__metadata__\"", "is not a safetensors file", 0},
        {"\"us\"", "\"u\\x\"", "--scheme is one of", 0},
        {"h.0.qkv", "h.0.qkvqkvqkvqkvqkvqkvqkvqkvqkvqkvqkvqkvqkvqkvqkvqkvqkv", "has no tensor h.0.qkv", 0},
        {"h.0.qkv", "h.0.qkv", "lies outside the file (is it cut off?)", 100},
    };
    shell("rm -rf '%s/run' '%s/forged'");
    run_us("--input train_us.c --steps 4 --optimizer lion --out %s/run " TINY);
    shell("mkdir '%s/forged'");
    for (size_t i = 0; i < sizeof forgeries / sizeof *forgeries; i++) {
        forge("forged/checkpoint.safetensors", forgeries[i].from, forgeries[i].to, forgeries[i].cut);
        check_fails("--out %s/forged --resume --steps 5", forgeries[i].says);
    }
    forge("forged/checkpoint.safetensors", "h.0.qkv", "h.0.qkv", 0);
    check(run_us("--out %s/forged --resume --steps 5")->status == 0, "an unchanged copy: %s", result.err);
    forge("forged/checkpoint.safetensors", "\"ranks\":\"1\"", "\"ranks\":\"3\"", 0);
    check(run_us("--out %s/forged --resume --steps 5")->status == 0 &&
              strstr(result.out, ", step 4 (saved by 3 ranks, now 1)\n"), "by three ranks: %s", result.out);
    // A weight that is NaN is refused before the first step.
    forge("forged/checkpoint.safetensors", "h.0.qkv", "h.0.qkv", 0);
    shell(
        "cd '%s/forged' && n=$(od -An -t u4 -N 4 checkpoint.safetensors) && "
        "printf '\\377\\377\\377\\377' | dd of=checkpoint.safetensors bs=1 seek=$((n + 8)) conv=notrunc "
        "2>/dev/null");
    check_fails("--out %s/forged --resume --steps 5", "holds values that are not finite, in ");
    check_fails("--load %s/forged/checkpoint.safetensors --generate", "holds values that are not finite");
    // The largest finite weight overflows: the step is not taken, and the tensor is named.
    shell(
        "cd '%s/forged' && n=$(od -An -t u4 -N 4 checkpoint.safetensors) && "
        "printf '\\377\\377\\177\\177' | dd of=checkpoint.safetensors bs=1 seek=$((n + 8)) conv=notrunc "
        "2>/dev/null");
    check_fails("--out %s/forged --resume --steps 5 --precision fp32",
                "is not finite; the parameters are as they were before it");
    check(!strstr(result.out, "saved "), "nothing new is saved, or said to be: %s", result.out);
    forge("forged/other", "\"vocab\":\"256\"", "\"vocab\":\"250\"", 0);
    check_fails("--load %s/forged/other --generate", "was not trained on the kind of tokens known here");
    // Random damage to the header: an error or a run, but never a crash.
    long size;
    text_file(path, sizeof path, "run/checkpoint.safetensors");
    const uint8_t* good = map_file(path, "checkpoint", &size);
    char* bad = (char*)floats((double)size);
    for (int i = 0; i < 60; i++) {
        memcpy(bad, good, (size_t)size);
        for (int k = 0; k < 3; k++)
            bad[random_u64(1, (uint64_t)i, (uint64_t)k) % (8 + read_u32(good))] =
                (char)random_u64(2, (uint64_t)i, (uint64_t)k);
        text_file(path, sizeof path, "damaged");
        write_file(path, bad, (size_t)size);
        run_us("--load %s/damaged --generate --tokens 1");
        check(result.status <= 1, "damage %d: exit %d %.300s", i, result.status, result.err);
    }
    free(bad);
}

// Keys and values kept from earlier positions give the same bits as a pass over the whole prefix.
static void test_generate(void) {
    for (int scheme = US; scheme < ALL_SCHEMES; scheme++) {
        Config c = small_config();
        c.scheme = scheme, c.width = 48, c.heads = 3, c.seq = 90, c.batch = 1;
        Model m;
        Tokens tokens;
        m = text_model(c, &tokens, "README.md");
        Split all = {&tokens, 0, tokens.count};
        tokens_read(&all, 0, 90, m.inputs, m.targets);
        float* whole = floats(256);
        memcpy(whole, cpu_next(&m, 0, 90), 256 * sizeof(float));
        const long stops[] = {1, 2, 63, 64, 65, 89, 90};
        long known = 0;
        for (int i = 0; i < 7; known = stops[i++]) cpu_next(&m, known, stops[i]);
        check(memcmp(whole, buffer(&m, 0, A_LOGITS, 89), 256 * sizeof(float)) == 0, "%s: incremental logits",
              SCHEMES[scheme].name);
        free(whole);
        model_free(&m), forget(&tokens);
    }
    Config c = small_config();
    float logits[256];
    long counts[3] = {0, 0, 0};
    for (int i = 0; i < 256; i++)
        logits[i] = i < 2 ? logf((float)(i + 1)) : -99.0f;  // probabilities 1/3, 2/3
    c.temperature = 1;
    for (long i = 0; i < 30000; i++) counts[(int)min_l(2, sample_token(logits, &c, i))]++;
    long cold = 0;  // at half the temperature 1/5 and 4/5; a standard deviation is 69
    c.temperature = 0.5f;
    for (long i = 0; i < 30000; i++) cold += sample_token(logits, &c, i) == 0;
    check(labs(cold - 6000) < 350, "samples follow the temperature: %ld of 30000", cold);
    logits[7] = logits[1], c.temperature = 0;
    check(sample_token(logits, &c, 1) == 1 && sample_token(logits, &c, 2) == 1,
          "of equals the first is taken");
    // Of the k likeliest only, and each as often as it should be.
    for (int k = 1; k <= 256; k = k == 3 ? 256 : k + 1) {
        const int places[] = {3, 200, 77, 90, 250};
        const double share[] = {4, 4, 2, 1, 1};
        long drawn[256] = {0}, others = 0;
        double sum = 0;
        for (int i = 0; i < 256; i++) logits[i] = -99;
        for (int i = 0; i < 5; i++) logits[places[i]] = logf((float)share[i]), sum += i < k ? share[i] : 0;
        c.temperature = 1, c.top_k = k;
        for (long i = 0; i < 20000; i++) drawn[sample_token(logits, &c, i)]++;
        for (int i = 0; i < 5; i++) {
            const double want = i < k ? 20000 * share[i] / sum : 0;
            check(fabs((double)drawn[places[i]] - want) <= 6 * sqrt(want), "top-k %d: token %d: %ld times", k,
                  places[i], drawn[places[i]]);
            others += drawn[places[i]];
        }
        check(others == 20000, "top-k %d: other tokens were drawn", k);
    }
    c.top_k = 4;
    int seen[256] = {0};
    for (long i = 0; i < 2000; i++) seen[sample_token(logits, &c, i)]++;
    check(seen[90] > 0 && seen[250] == 0, "of equals at the border the first is taken");
    c.top_k = 0, c.temperature = 0, logits[1] = logits[7] = 9;
    check(labs(counts[0] - 10000) < 500 && counts[2] == 0, "samples follow the probabilities: %ld of 30000",
          counts[0]);
}

// The last tenth is held out: a text that ends in another alphabet is learned, its end is not.
static void test_held_out(void) {
    static char text[20000];
    char path[1100];
    for (int i = 0; i < 20000; i++) text[i] = "abzq"[i % 2 + (i < 18000 ? 0 : 2)];
    text_file(path, sizeof path, "two.txt"), write_file(path, text, sizeof text);
    const Run* r = run_us("--input %s/two.txt --steps 80 --out %s/held " TINY);
    const char *p = strstr(r->out, "validation loss "), *last = strstr(r->out, "step 80/80 | loss ");
    double val = p ? atof(p + 16) : NAN, train = last ? atof(last + 18) : NAN;
    check(strstr(r->out, "18000 bytes to train on, 2000 to validate on") != NULL,
          "the last tenth is held out");
    check(train < 2.5 && val > train + 2, "training loss %.3f, validation loss %.3f on what was held out",
          train, val);
    r = run_us("--input %s/two.txt --val README.md --steps 1 " TINY);
    check(strstr(r->out, "20000 bytes to train on") != NULL, "with --val all of --input is trained on");
}

// A short run learns more than how often each byte occurs (the entropy of the bytes, computed from the text),
// and FP8 follows FP32: seeds differ by about 2 % after so few steps, and so may they.
static void test_training(void) {
    static char text[60000];
    char path[1100];
    size_t n = 0, count[256] = {0};
    for (int i = 0; n < sizeof text - 64; i++)
        n += (size_t)sprintf(text + n, "%d times %d is %d\n", i % 97, i % 89, i % 97 * (i % 89));
    text_file(path, sizeof path, "products.txt"), write_file(path, text, n);
    double end[2], entropy = 0;
    for (size_t i = 0; i < n; i++) count[(uint8_t)text[i]]++;
    for (int i = 0; i < 256; i++) if (count[i]) entropy -= (double)count[i] / n * log((double)count[i] / n);
    for (int i = device == &CPU ? 0 : 1; i < 2; i++) {
        const Run* r = run_us(form("--input %%s/products.txt --steps 100 --precision %s --lr 0.02 " SMALL,
                                   i ? "fp8" : "fp32"));
        const char* found = strstr(r->out, "validation loss ");
        end[i] = found ? atof(found + 16) : NAN;
    }
    check(end[1] < entropy - 0.5, "100 steps end at a loss of %.3f, the bytes' entropy is %.3f", end[1],
          entropy);
    if (device == &CPU)
        check(fabs(end[1] / end[0] - 1) <= 0.02, "fp8 ends at %.3f, fp32 at %.3f", end[1], end[0]);
}

// Two batches of 2 added up are one batch of 4: same loss, norm and gradient, up to the order of FP32 sums.
static void test_accumulation(void) {
    Model m[2];
    StepResult r[2];
    Tokens tokens;
    for (int i = 0; i < 2; i++) {
        Config c = small_config();
        c.precision = 0, c.width = 64, c.seq = 32, c.batch = i ? 4 : 2, c.accum = i ? 1 : 2;
        m[i] = text_model(c, &tokens, "train_us.c");
        Split all = {&tokens, 0, tokens.count};
        r[i] = cpu_step(&m[i], &all, 1e-3);
        forget(&tokens);
    }
    check_below(fabs(r[0].loss / r[1].loss - 1), 1e-6, "two batches of 2:", "loss");
    check_below(fabs(r[0].norm / r[1].norm - 1), 1e-5, "two batches of 2:", "norm");
    check_below(distance(m[0].grads, m[1].grads, m[0].num_params), 1e-5, "two batches of 2:", "gradient");
    check(m[0].sequence == 4 && m[1].sequence == 4 && m[0].step == 1, "steps and sequences are counted");
    model_free(&m[0]), model_free(&m[1]);
}

// A weight that is NaN: the loss shows it, a tensor is named, nothing is changed, and the data is not used
// up: once the weight is mended, the run ends as one that never met it. Nor is a step taken whose loss is
// finite and whose gradient is not.
static void test_not_finite(void) {
    float* end[2];
    long n = 0;
    for (int met = 0; met < 3; met++) {
        Tokens tokens;
        Config c = small_config();
        c.layers = 2, c.width = 64, c.heads = 1, c.seq = 32, c.batch = 2, c.accum = 2, c.lr = 0.01f;
        c.steps = 9;
        if (met == 2) c.precision = 0, c.grad_scale = 1e30f;
        Model m = text_model_on(device, c, &tokens, "train_us.c");
        Split all = {&tokens, 0, tokens.count};
        const Tensor* t = tensor(&m, 1, LN2_GAIN);
        for (int step = 0; step < 3 && met < 2; step++)
            check(isfinite(device->step(&m, &all, 0.01).loss), "a good step");
        device->fetch(&m), n = m.num_params;
        float *before = floats((double)n), gain[64];
        memcpy(before, m.params, sizeof(float) * (size_t)n);
        const long sequence = m.sequence, steps = m.step;
        check(sequence == 4 * steps, "%ld steps consume %ld sequences", steps, sequence);
        if (met > 0) {
            if (met == 1) before[t->offset + 5] = NAN;
            memcpy(gain, before + t->offset, sizeof gain);
            device->put(&m, PARAMS, t, gain);
            const StepResult r = device->step(&m, &all, 0.01);
            device->fetch(&m);
            const int seen = met == 1 ? isnan(r.loss) != 0 : isfinite(r.loss) != 0;
            check(seen && r.bad && m.step == steps && m.sequence == sequence,
                  "a step on %s: loss %g, step %ld, sequence %ld",
                  met == 1 ? "NaN" : "an infinite gradient", r.loss, m.step, m.sequence);
            check(memcmp(before, m.params, sizeof(float) * (size_t)n) == 0, "such a step changes parameters");
        }
        if (met < 2) {
            memcpy(gain, before + t->offset, sizeof gain), gain[5] = 1.25f;
            device->put(&m, PARAMS, t, gain);
            check(isfinite(device->step(&m, &all, 0.01).loss) && m.step == 4 && m.sequence == 16,
                  "a mended step");
            device->fetch(&m);
            end[met] = floats((double)n);
            memcpy(end[met], m.params, sizeof(float) * (size_t)n);
        }
        free(before), device->close(&m), model_free(&m), forget(&tokens);
    }
    check(memcmp(end[0], end[1], sizeof(float) * (size_t)n) == 0, "a step on NaN changes the steps after it");
    free(end[0]), free(end[1]);
}

// Statistics of tensors with zeros, values that a format flushes to zero and such that it clips, against the
// definition. Counts are exact; a chunk's 16384 squares are added in FP32.
static void test_statistics(void) {
    const long sizes[] = {1, 3, 16384, 40000};
    const double least[] = {0, 0, 0x1p-9, 0x1p-16};
    const char* const names[] = {"a", "b", "c"};
    Model m;
    Config c = small_config();
    c.layers = 1, c.batch = 1, c.seq = 8;
    model_layout(&m, &c);
    model_alloc_batch(&m);
    for (int f = FP32; f <= E5M2; f++)
        for (int i = 0; i < 12; i++) {
            const long n = sizes[i / 3];
            const int kind = i % 3;  // only zeros; a third of them; none
            const StatRow old = m.stats[3];
            float* x = normals(n, 1, form("%d", i));
            double square = 0, max = 0, nonzero = 0, flushed = 0, saturated = 0;
            for (long k = 0; k < n; k++) {
                const int zero = kind == 0 || (kind == 1 && k % 3 == 0);
                x[k] = zero ? (k % 2 ? -0.0f : 0.0f) : ldexpf(x[k], (int)(k % 41) - 21);
                const double a = fabs((double)(f == FP32 ? x[k] : round_bf16(x[k])));
                square += a * a, max = fmax(max, a), nonzero += a > 0;
                flushed += a > 0 && a <= least[f] / 2;  // the tie goes to zero, which is even
                saturated += a > (f == E4M3 ? 448.0 : f == E5M2 ? 57344.0 : 3.4e38);
            }
            m.stats_on = 0;
            stat_record(&m, 3, names[kind], kind, x, n, (Format)f);
            check(memcmp(&old, &m.stats[3], sizeof old) == 0, "statistics that are off are taken");
            m.stats_on = 1;
            stat_record(&m, 3, names[kind], kind, x, n, (Format)f);
            const Stat* s = &m.stats[3].stat[kind];
            const double rms = sqrt(square / (double)n);
            check(s->format == (Format)f && strcmp(m.stats[3].name, names[kind]) == 0, "statistics: whose");
            check(fabs(s->rms - rms) <= rms * 16384 * 0x1p-25 && s->max == max,
                  "%s, %ld: RMS %g, not %g; max %g, not %g", FORMATS[f].name, n, s->rms, rms, s->max, max);
            check(s->flushed == flushed / fmax(nonzero, 1) && s->saturated == saturated / (double)n,
                  "%s, %ld: flushed %g of %g that are not zero, clipped %g: %g and %g", FORMATS[f].name, n,
                  flushed, nonzero, saturated, s->flushed, s->saturated);
            for (int k = 0; k < 3; k++)
                check(k == kind || memcmp(&old.stat[k], &m.stats[3].stat[k], sizeof *s) == 0,
                      "statistics of another operand change");
            free(x);
        }
    model_free(&m);
}

// The header's table: a row for each tensor of one block, and for those that are there once.
static void check_header(const char* row, const Model* m) {
    const int once = m->num_tensors - m->c.layers * BLOCK_TENSORS;
    for (int i = 0; i < BLOCK_TENSORS + once; i++) {
        const Tensor* t = &m->tensors[i < BLOCK_TENSORS ? i : m->num_tensors - once + i - BLOCK_TENSORS];
        const char* in = FORMATS[t->precision.input].name;
        const char* name = i < BLOCK_TENSORS ? form("h.*.%s", TENSORS[i].name) : t->name;
        const char* size = t->rows > 1 ? form("%ld x %ld", t->rows, t->cols) : form("%ld", t->cols);
        const char* formats = FORMATS[t->precision.weight].name;
        if (t->use <= ENDS) formats = form("%s %s %s", in, formats, FORMATS[t->precision.gradient].name);
        const char *want = form("%s %s %s %.4g %.4g %s\n", name, size, formats, (double)t->alpha,
                                (double)(m->c.lr * t->lr_factor), t->use <= LOGITS ? "yes" : "no"), *p = want;
        for (row += strspn(row, " "); *p && *row == *p; p++, row++)
            if (*row == ' ') row += strspn(row, " ") - 1;
        check(!*p, "the header has %.60s, not %s", row, want);
        if (*p) return;
    }
    check(strncmp(row, "  ", 2) != 0, "the header's table ends there: %.60s", row);
}
// A dump holds what the functions compute: the same step taken here, tensor by tensor, to the bit.
static void test_dump(void) {
    char path[1100], name[64];
    static Archive a;
    const Run* r =
        run_us("--input train_us.c --precision bf16 --optimizer lion --dump %s/dump.safetensors " TINY);
    check(r->status == 0, "--dump: %s", r->err);
    const int refused = getenv("AMX_REFUSED") != NULL;  // of dev/cpu/amx_model.h
    const char* unit = !*PAIRS_BY ? " floats\n" : refused ? "kernel refuses AMX" : form("by %s\n", PAIRS_BY);
    check(strstr(r->out, unit) != NULL, "the header does not say what multiplies BF16: %s", r->out);
    text_file(path, sizeof path, "dump.safetensors");
    archive_read(&a, path);
    Tokens tokens;
    Config c = small_config();
    c.layers = 2, c.width = 32, c.heads = 2, c.seq = 16, c.batch = 3, c.precision = 1;
    Model m = text_model(c, &tokens, "train_us.c");
    Split all = {&tokens, 0, tokens.count - tokens.count / 10};
    const char *title = "  decays\n", *table = strstr(r->out, title);
    m.c.lr = SCHEMES[US].lr_bytes[LION];
    check_header(table ? table + strlen(title) : "", &m);
    next_batch(&m, &all);
    float loss = (float)model_loss(&m, 0), *logits = floats((double)(m.rows * m.vp));
    memcpy(logits, m.buffers[A_LOGITS], sizeof(float) * (size_t)(m.rows * m.vp));
    model_loss(&m, 1);
    model_backward(&m, 0);
    for (int k = 0; k < BUFFERS; k++) {  // what flows between operations is BF16: no value has more bits
        const double n = BUFFER_KINDS[k].width == DIM_1 ? 0 : buffer_size(&m, k);
        long wrong = 0;
        for (long i = 0; i < (long)n; i++) wrong += !same(m.buffers[k][i], round_bf16(m.buffers[k][i]));
        check(wrong == 0, "%ld values of %s are not BF16", wrong, BUFFER_KINDS[k].name);
    }
    check(*(const float*)archive_find(&a, "loss", 1, 1) == loss, "dump: loss");
    for (int i = 0; i < 2; i++) {
        const Found x = archive_tensor(&a, i ? "targets" : "tokens");
        check(strcmp(x.shape, "3,16") == 0 && memcmp(x.data, i ? m.targets : m.inputs, 4 * 48) == 0,
              "dump: tokens, targets");
    }
    for (int k = 0; k <= A_LOGITS; k++)
        for (int l = 0; l < (k < BLOCK_BUFFERS ? 2 : 1) && buffer_size(&m, k) > 0; l++) {
            const long W = dim_of(&c, BUFFER_KINDS[k].width);
            if (W == 1) continue;
            const char* block = k < BLOCK_BUFFERS ? form("h.%d.", l) : "";
            snprintf(name, sizeof name, "act.%s%s", block, BUFFER_KINDS[k].name);
            const Found x = archive_tensor(&a, name);
            check(strcmp(x.shape, form("3,16,%ld", W)) == 0 && x.values == 48 * W &&
                      memcmp(x.data, k == A_LOGITS ? logits : buffer(&m, l, k, 0), 4 * 48 * (size_t)W) == 0,
                  "dump: %s, [%s]", name, x.shape);
        }
    const char* on = archive_get(&a, "device");
    check(on && strcmp(on, device->name) == 0, "the dump says which device it is of");
    check(meta_number(&a, "grad_scale") == 48 * 32 && strcmp(archive_get(&a, "scheme"), "us") == 0,
          "dump: metadata");
    for (int i = 0; i < m.num_tensors; i++) {
        const Tensor* t = &m.tensors[i];
        const size_t bytes = sizeof(float) * (size_t)(t->rows * t->cols);
        snprintf(name, sizeof name, "param.%s", t->name);
        check(memcmp(archive_find(&a, name, t->rows, t->cols), m.params + t->offset, bytes) == 0, "dump: %s",
              name);
        snprintf(name, sizeof name, "grad.%s", t->name);
        check(memcmp(archive_find(&a, name, t->rows, t->cols), m.grads + t->offset, bytes) == 0, "dump: %s",
              name);
    }
    int tensors = 0;
    for (const char* at = a.header; (at = strstr(at, "{\"dtype\"")) != NULL; at++) tensors++;
    check(tensors == 4 + 42 + 2 + 16, "dump: %d tensors", tensors);
    free(logits), close_archive(&a), model_free(&m), forget(&tokens);
}

// What generate asks a device for: a stand-in checks the window it is shown, and always answers with the next
// letter.
static int window_errors, window_calls;
static const float* alphabet_next(Model* m, long t0, long T) {
    static float logits[256];
    memset(logits, 0, sizeof logits);
    for (long t = 1; t < T; t++) window_errors += m->inputs[t] != 'a' + (m->inputs[t - 1] - 'a' + 1) % 26;
    window_errors += T > 6 || t0 >= T || (window_calls == 0 && T != 6) || (T == 6 && window_calls && t0 != 5);
    window_calls++;
    logits[T == 4 || window_calls ? 'a' + (m->inputs[T - 1] - 'a' + 1) % 26 : 'a'] = 50;
    return logits;
}
// A stand-in whose third token ends a text.
static int ending_calls;
static const float* ending_next(Model* m, long t0, long T) {
    static float logits[GPT2_VOCAB];
    (void)m, (void)t0, (void)T;
    memset(logits, 0, sizeof logits);
    logits[++ending_calls == 3 ? GPT2_VOCAB - 1 : 5] = 50;
    return logits;
}
static void test_ending(void) {
    static Device fake;
    static Text text;
    Config c = small_config();
    fake.next = ending_next;
    c.seq = 6, c.batch = 1, c.vocab = GPT2_VOCAB, c.prompt = "50256 7", c.temperature = 1;
    c.input = c.tokenizer = "";
    Model m;
    model_layout(&m, &c);
    m.inputs = (int*)floats(6);
    const int out = divert();
    table_open(&text, &c);
    generate(&m, &fake, &text, 40);
    const char *all = undivert(out), *printed = strchr(all, '\n');
    check(ending_calls == 3 && printed && strcmp(printed, "\n 50256 7 5 5\n") == 0, "%d tokens: %s",
          ending_calls, all);
    model_free(&m);
}
static void generate_with(Model* m, const float* (*next)(Model* m, long t0, long T), int count) {
    static Device fake;
    static Text text;
    fake.next = next, text.vocab = BYTES_VOCAB;
    const int out = divert();
    generate(m, &fake, &text, count);
    undivert(out);
}
static void test_window(void) {
    static char prompt[] = "abcdefghij";
    Config c = small_config();
    c.seq = 6, c.batch = 1, c.vocab = 256, c.prompt = prompt, c.temperature = 1;
    Model m;
    model_layout(&m, &c);
    m.inputs = (int*)floats(6);
    generate_with(&m, alphabet_next, 40);
    check(window_calls == 40 && window_errors == 0, "%d calls, %d windows are wrong", window_calls,
          window_errors);
    model_free(&m);
}

// -----------------------------------------------------------------------------------------------------------
// From training to use

// The last line that a run printed.
static const char* last_line(void) {
    static char line[400];
    char* end = strrchr(result.out, '\n');
    if (!end || end == result.out) return "";
    *end = 0;
    const char* begin = strrchr(result.out, '\n');
    snprintf(line, sizeof line, "%.399s", begin ? begin + 1 : result.out);
    *end = '\n';
    return line;
}
// An exported model is the trained one: validation and text are the same, and a step's dump to the last bit.
// Its matrices are the codes that the matmuls read.
static void served(const char* scheme, int precision) {
    const char* p = PRECISIONS[precision].name;
    char path[1100], trained[400], name[64], text[400], flags[400];
    snprintf(flags, sizeof flags, "--input train_us.c --steps 5 --scheme %s --precision %s --out %%s/served "
             "--eval-tokens 3000 " TINY, scheme, p);
    shell("rm -rf '%s/served'");
    check(run_us(flags)->status == 0, "training: %s", result.err);
    const char* says = strstr(result.out, "validation loss ");
    snprintf(trained, sizeof trained, "%.22s", says ? says : "");
    check(run_us("--load %s/served/checkpoint.safetensors --export %s/served/model")->status == 0 &&
              strcmp(last_line(), form("wrote %s/served/model", work)) == 0, "%s%s", result.err, last_line());
    for (int exported = 0; exported < 2; exported++) {
        const char* model = exported ? "--load %s/served/model" : "--load %s/served/checkpoint.safetensors";
        check(run_us(form("%s --evaluate --eval-tokens 3000", model))->status == 0, "%s", result.err);
        check(strncmp(last_line(), trained, 22) == 0 && strstr(last_line(), ", of 3008 bytes"),
              "%s %s %d: training's validation is '%s', --evaluate's '%s'", scheme, p, exported, trained,
              last_line());
        run_us(form("%s --generate --tokens 30 --prompt 'int '", model));
        check(result.status == 0 && strncmp(result.out, "int ", 4) == 0, "%s", result.err);
        if (exported) check(strcmp(result.out, text) == 0, "%s %s: another text", scheme, p);
        else snprintf(text, sizeof text, "%.399s", result.out);
        check(run_us(form("%s --dump %%s/served/dump%d", model, exported))->status == 0, "%s", result.err);
    }
    // The dumps differ in the parameters only: masters here, what is read of them there.
    Archive a, b, c;
    Config config = small_config();
    config.layers = 2, config.width = 32, config.heads = 2, config.seq = 16, config.precision = precision;
    config.scheme = find_choice("us|sp|mup|umup", scheme);
    Model m;
    model_layout(&m, &config);
    text_file(path, sizeof path, "served/dump0"), archive_read(&a, path);
    text_file(path, sizeof path, "served/dump1"), archive_read(&b, path);
    text_file(path, sizeof path, "served/model"), archive_read(&c, path);
    const char* const same[] = {"act.logits", "loss",   "act.h.1.up", "act.h.1.x",
                                "tokens",     "targets", "grad.wte",   "grad.h.0.qkv"};
    for (int i = 0; i < 8; i++) {
        const Found x = archive_tensor(&a, same[i]), y = archive_tensor(&b, same[i]);
        check(x.values == y.values && memcmp(x.data, y.data, 4 * (size_t)x.values) == 0,
              "%s %s: %s is not the same", scheme, p, same[i]);
    }
    long tensors = 0, bytes = 0;
    for (const char* at = c.header; (at = strstr(at, "{\"dtype\"")) != NULL; at++) tensors++;
    for (const Tensor* t = m.tensors; t < m.tensors + m.num_tensors; t++) {
        const Format f = t->use >= GAIN || precision == 0 ? FP32
                       : precision == 2 && is_hidden(t)   ? E4M3 : BF16;
        const Found x = archive_tensor(&c, t->name);
        snprintf(name, sizeof name, "param.%s", t->name);
        const float* master = state_of(&a, "%s%s%s", name, "", "");
        const float* read = state_of(&b, "%s%s%s", name, "", "");
        int wrong = x.dtype != (int)f || x.values != t->rows * t->cols;
        for (long i = 0; i < x.values && !wrong; i++) {
            wrong += read[i] != round_to(master[i], f);
            if (f == E4M3) wrong += x.data[i] != fp8_encode(round_bf16(master[i]), E4M3);
        }
        check(wrong == 0, "%s %s: %s is not what its matmul reads", scheme, p, t->name);
        bytes += x.values * (f == FP32 ? 4 : f == BF16 ? 2 : 1);
    }
    check(tensors == m.num_tensors && c.size == bytes, "nothing else is in the exported file");
    check(run_us("--load %s/served/model --export %s/served/again")->status == 0, "%s", result.err);
    check(same_files("served/model", "served/again"), "an exported model is exported as it is");
    close_archive(&a), close_archive(&b), close_archive(&c), model_free(&m);
}
static void test_served(void) {
    if (device == &CPU) served("us", 0), served("sp", 1), served("umup", 2);
    served("us", 2);
    // W8A8 of another precision's model is that model's W8A8: casting is one rounding, whenever it is done.
    run_us("--load %s/served/checkpoint.safetensors --precision bf16 --export %s/bf16");
    run_us("--load %s/bf16 --precision fp8 --export %s/fp8");
    check(same_files("fp8", "served/model"), "by way of BF16: the same file");
    check(run_us("--load %s/bf16 --precision fp8 --evaluate")->status == 0, "%s", result.err);
    // Fine-tuning: step 1 of a run of its own, from these parameters, with any optimizer; it goes on as any.
    shell("rm -rf '%s/tuned' && mkdir -p '%s/tuned'");
    run_us("--load %s/served/model --optimizer lion --lr 0.01 --out %s/tuned --steps 3 --warmup 0");
    check(result.status == 0, "%s", result.err);
    char path[1100], csv[4000];
    Archive dump;
    text_file(path, sizeof path, "tuned/log.csv"), read_text(path, csv, sizeof csv);
    text_file(path, sizeof path, "served/dump1"), archive_read(&dump, path);
    const double first = atof(strstr(csv, "\n1,") + 3), want = *archive_find(&dump, "loss", 1, 1);
    check_below(fabs(first / want - 1), 1e-5, "the first step's loss:", "--load");
    close_archive(&dump);
    check(strstr(csv, "\n3,") != NULL, "three steps: %s", csv);
    check_fails("--load %s/served/model --out %s/tuned", "holds a run already");
    check(run_us("--load %s/served/model --out %s/tuned --resume --steps 4")->status == 0 &&
              strstr(result.out, "resumed from") && !strstr(result.out, "step 3/4"), "%s", result.err);
    check_fails("--load %s/served/model --width 64 --steps 3", "--width 64 does not fit checkpoint");
    check_fails("--load %s/served/model --export %s/no/such", "cannot write");
    check_fails("--load %s/served/model --evaluate --hellaswag README.md", "asks in GPT-2's tokens");
    check_fails("--out %s/tuned --resume --steps 9 --optimizer adamw", "--optimizer adamw does not fit");
    check(run_us("--load %s/served/model --evaluate --recompute")->status == 0, "%s", result.err);
    if (device != &CPU) return;  // what follows is the program's
    // Without the text that it was trained on, with another.
    shell("cp train_us.c '%s/gone.txt'");
    run_us("--input %s/gone.txt --steps 2 --eval-tokens 100 --out %s/gone " TINY);
    shell("rm '%s/gone.txt'");
    check_fails("--load %s/gone/checkpoint.safetensors --evaluate", "no file matches");
    check(run_us("--load %s/gone/checkpoint.safetensors --evaluate --val README.md")->status == 0, "%s",
          result.err);
    struct stat st;
    stat("README.md", &st);
    const char* all = form(", of %ld bytes", (long)(st.st_size - 1) / 16 * 16);
    check(strstr(last_line(), all) != NULL, "all of it: %s", last_line());
    const double loss = atof(last_line() + 16), bits = atof(strchr(last_line(), ',') + 1),
                 perplexity = atof(strstr(last_line(), "perplexity ") + 11);
    check(fabs(bits - loss / log(2)) < 2e-4 && fabs(perplexity / exp(loss) - 1) < 1e-3, "%s", last_line());
    // Another text brings its own end to validate on, unless --val is given, before it or after.
    run_us("--input train_us.c --val README.md --steps 1 --lr 0.001 --out %s/val " TINY);
    static const char* const texts[][2] = {{"", " of README.md\n"}, {"--input test_us.c", " of test_us.c\n"},
        {"--input test_us.c --val train_us.c", " of train_us.c\n"},
        {"--val train_us.c --input test_us.c", " of train_us.c\n"}};
    for (int i = 0; i < 4; i++) {
        run_us(form("--load %%s/val/checkpoint.safetensors --evaluate --eval-tokens 16 %s", texts[i][0]));
        check(strstr(result.out, texts[i][1]) != NULL, "%s: %s", texts[i][0], result.out);
    }
    check(run_us("--out %s/val --resume --steps 2 --input train_us.c")->status == 0 &&
              strstr(result.out, "val: README.md"), "a run that goes on keeps its --val: %s", result.err);
    shell("mkdir -p '%s/no_run' && cp '%s/served/model' '%s/no_run/checkpoint.safetensors'");
    check_fails("--out %s/no_run --resume --steps 9", "has no tensor adam.m.h.0.qkv");
    run_us("--load %s/val/checkpoint.safetensors --steps 1");
    check(strstr(result.out, " lr 0.001 ") != NULL, "the file's rate: %s", result.out);
    run_us("--load %s/val/checkpoint.safetensors --lr auto --steps 1");
    check(strstr(result.out, " lr 0.02 ") != NULL, "--lr auto is the scheme's: %s", result.out);
}

// HellaSwag's file from made-up questions, and their answers by the definition: each ending by itself.
enum { ASKED = 23, LONGEST = 60 };
typedef struct { int label, context, ending[4]; uint16_t tokens[5][LONGEST]; } Question;
static long write_questions(uint16_t* w, const Question* q, int n) {  // returns how many words
    const uint32_t header[256] = {QUESTIONS_MAGIC, 1, (uint32_t)n};
    uint16_t* at = w + 512;
    memcpy(w, header, 1024);
    for (int i = 0; i < n; i++) {
        uint16_t* begin = at;
        const uint16_t head[] = {65535, 0, (uint16_t)i, (uint16_t)q[i].label, 4};
        memcpy(at, head, sizeof head), at += 5;
        for (int part = 0; part < 5; part++) {
            const int length = part ? q[i].ending[part - 1] : q[i].context;
            *at++ = (uint16_t)length;
            memcpy(at, q[i].tokens[part], sizeof(uint16_t) * (size_t)length), at += length;
        }
        begin[1] = (uint16_t)(2 * (at - begin));
    }
    return at - w;
}
static int choice_of(Model* m, const Question* q) {
    double mean[4];
    int best = 0;
    for (int k = 0; k < 4; k++) {
        uint16_t all[2 * LONGEST];
        const int n = q->context + q->ending[k], T = m->c.seq;
        memcpy(all, q->tokens[0], sizeof(uint16_t) * (size_t)q->context);
        memcpy(all + q->context, q->tokens[k + 1], sizeof(uint16_t) * (size_t)q->ending[k]);
        const int first = n > T + 1 ? n - T - 1 : 0, length = n - first - 1;
        int count = 0;
        for (int t = 0; t < length; t++) m->inputs[t] = all[first + t];
        model_forward(m, 1, 0, length), model_logits(m, 0, length);
        mean[k] = 0;
        for (int t = 0; t < length; t++) {
            const float* z = buffer(m, 0, A_LOGITS, t);
            double sum = 0;
            if (first + t + 1 < q->context) continue;
            for (int v = 0; v < m->c.vocab; v++) sum += exp((double)z[v]);
            mean[k] += log(sum) - z[all[first + t + 1]], count++;
        }
        mean[k] /= count;
        if (mean[k] < mean[best]) best = k;
    }
    return best;
}
static void test_hellaswag(void) {
    static Question q[ASKED];
    static uint16_t words[512 + ASKED * (10 + 5 * LONGEST)], bad[sizeof words / 2];
    char path[1100], shard[1100];
    const int batches[] = {4, 4, 7};
    int choices[4] = {0};
    uint64_t at = 0;
    long longest = 0;
    for (int i = 0; i < ASKED; i++) {
        q[i].context = 1 + (int)(random_u64(3, 3, at++) % (i % 4 ? 12 : LONGEST));
        for (int part = 0; part < 5; part++) {
            if (part) q[i].ending[part - 1] = 1 + (int)(random_u64(3, 3, at++) % (i == 5 ? LONGEST : 9));
            for (int t = 0; t < LONGEST; t++)
                q[i].tokens[part][t] = (uint16_t)(random_u64(3, 3, at++) % GPT2_VOCAB);
            if (part) longest = max_l(longest, q[i].context + q[i].ending[part - 1]);
        }
    }
    text_file(path, sizeof path, "questions.bin"), text_file(shard, sizeof shard, "words.bin");
    write_shard(shard, q[0].tokens[0], 5 * LONGEST, 5 * LONGEST);
    for (int i = 0; i < 3; i++) {  // at first a few, by a model that sees more than they need
        const int asked = i ? ASKED : 3, seq = i ? 24 : 100;
        Tokens tokens, same;
        Questions questions = {0};
        Config c = small_config();
        c.precision = 0, c.layers = 1, c.width = 32, c.heads = 1, c.seq = seq, c.batch = batches[i];
        c.vocab = GPT2_VOCAB;
        Model m = text_model_on(device, c, &tokens, shard), cpu;
        c.batch = 1;
        cpu = text_model(c, &same, shard);
        for (int k = 0; k < asked; k++) {  // all are answered right; then every third
            if (i == 2) q[k].label = (q[k].label + k % 3) % 4;
            else q[k].label = choice_of(&cpu, &q[k]);
            choices[q[k].label] += i == 1;
        }
        const int right = i == 2 ? (int)div_up(ASKED, 3) : asked;
        write_file(path, words, 2 * (size_t)write_questions(words, q, asked));
        questions_open(&questions, path);
        check(questions.count == asked && (!i || questions.longest == longest), "%ld, %ld", questions.count,
              questions.longest);
        const double found = hellaswag(&m, device, &questions) * asked;
        check(lround(found) == right, "batch %d, seq %d: %g of %d are right, not %d", batches[i], seq, found,
              asked, right);
        check(m.rows == batches[i] * seq && m.c.batch == batches[i], "the batch is as it was");
        device->close(&m), model_free(&m), model_free(&cpu), forget(&tokens), forget(&same);
    }
    check(choices[0] && choices[1] && choices[2] && choices[3], "all four answers are given");
    // In training, in its log, and afterwards: the same share.
    const char* model = "--layers 1 --width 32 --heads 1 --seq 24 --batch 4 --eval-every 1 --tokens 1";
    run_us(form("--input %%s/words.bin --hellaswag %%s/questions.bin --steps 2 --out %%s/asked %s", model));
    check(strstr(result.out, " tokens to train on, ") != NULL, "the header's unit: %s", result.out);
    check(result.status == 0, "%s", result.err);
    const char* step = strstr(result.out, "step 2/2 | loss ");
    const char* share = step ? strstr(step, " | hellaswag ") : NULL;
    char log[4000], value[16];
    check(share != NULL, "a step says it: %s", result.out);
    snprintf(value, sizeof value, "%.6s", share ? share + 13 : "");
    text_file(path, sizeof path, "asked/log.csv"), read_text(path, log, sizeof log);
    const char* column = strrchr(log, ',');
    check(column && strncmp(column + 1, value, 6) == 0, "log.csv ends with %s, not %s", column, value);
    check(run_us("--load %s/asked/checkpoint.safetensors --evaluate")->status == 0, "%s", result.err);
    const char* of = form("hellaswag: %.0f of %d right, %s", atof(value) * ASKED, ASKED, value);
    check(strcmp(last_line(), of) == 0 && strstr(result.out, ", perplexity "), "%s, not %s", last_line(), of);
    check(!strstr(result.out, "bits per byte"), "without a table nobody knows the bytes");
    check_fails(form("--input %%s/words.bin --hellaswag %%s/questions.bin %s --batch 3", model), "--batch 4");
    check(run_us("--load %s/asked/checkpoint.safetensors --evaluate --hellaswag ''")->status == 0 &&
              !strstr(result.out, "hellaswag"), "without questions: %s", result.out);
    // Damaged files.
    const long size = write_questions(words, q, ASKED);
    const struct { long word; int value; const char* says; } damage[] = {
        {0, 7, "is not a file of questions"}, {2, 2, "is not a file of questions"},
        {4, 22, "23 questions, 22 by its header"}, {4, 24, "23 questions, 24 by its header"},
        {512, 1, "damaged in question 0"},
        {513, 8, "damaged in question 0"}, {515, 4, "damaged in question 0"},
        {516, 3, "damaged in question 0"}, {517, 0, "damaged in question 0"},
        {517, 65535, "damaged in question 0"}, {518, 50257, "damaged in question 0"},
        {size - 1, 50257, "damaged in question 22"}, {-900, 0, "is not a file of questions"},
        {-1024, 0, "is damaged: 0 questions"}, {-2 * size + 1, 0, "damaged in question 22"},
        {-2 * size - 1, 0, "is damaged: 23 questions"}};
    for (size_t i = 0; i < sizeof damage / sizeof *damage; i++) {  // a negative word: the file's length
        const long word = damage[i].word;
        memcpy(bad, words, sizeof words);
        if (word >= 0) bad[word] = (uint16_t)damage[i].value;
        text_file(path, sizeof path, "bad_questions.bin");
        write_file(path, bad, (size_t)(word < 0 ? -word : 2 * size));
        check_fails("--load %s/asked/checkpoint.safetensors --evaluate --hellaswag %s/bad_questions.bin",
                    damage[i].says);
    }
    q[0].context = 0;  // nothing to predict an ending's first token from
    write_file(path, bad, 2 * (size_t)write_questions(bad, q, ASKED));
    check_fails("--load %s/asked/checkpoint.safetensors --evaluate --hellaswag %s/bad_questions.bin",
                "damaged in question 0");
}

// -----------------------------------------------------------------------------------------------------------
// The GPU against the CPU

#ifdef US_CUDA
// Every buffer of a step, forward and backward, in the order in which it is written. The CPU takes the same
// step, and whatever it has just written is compared with what the GPU wrote, and then replaced by that: so
// each operation is checked by itself, on the same input bits, and errors do not add up.
static struct { int block, kind; long n; float* data; } seen[4096];
static int seen_count, seen_at;
static const char* seen_what;

static void remember(Model* m, int block, int kind, long n) {
    if (seen_count == 4096) die("the tests have room for 4096 buffers");
    float* data = floats((double)n);
    memcpy(data, buffer(m, block, kind, 0), sizeof(float) * (size_t)n);
    seen[seen_count].block = block, seen[seen_count].kind = kind, seen[seen_count].n = n;
    seen[seen_count++].data = data;
}
// Two roundings of nearly the same sum are the same BF16 value or neighbours: one unit apart; where the sum
// cancels, its own error counts, which goes with the size of its terms. Attention's weights are rounded on
// both sides, but a GPU's relative to the largest score so far, by tiles of 64 keys or, without tensor cores,
// by key; and its backward takes rowsum(P dP) from the rounded y: errors of up to 2^-9 of each term.
static void compare(Model* m, int block, int kind, long n) {
    const float* got = seen[seen_at].data;
    float* want = buffer(m, block, kind, 0);
    const long D = m->c.width / m->c.heads;
    const double attention = kind == D_WIDE && n == m->rows * 3 * m->c.width ? 0x1p-8
                             : kind != A_Y ? 0 : D == 32 || D == 64 || D == 128 ? 0x1p-11 : 0x1p-9;
    char what[128];
    snprintf(what, sizeof what, "%s: block %d, %s, buffer %d", seen_what, block, BUFFER_KINDS[kind].name,
             seen_at);
    if (seen_at >= seen_count || seen[seen_at].kind != kind || seen[seen_at].n != n ||
        seen[seen_at].block != block) {
        check(0, "%s: the GPU has not written it then", what);
        return;
    }
    if (kind == A_LOGITS)  // padded columns take no part
        for (long i = 0; i < n; i++) if (i % m->vp >= m->c.vocab) seen[seen_at].data[i] = want[i];
    const double off = distance(got, want, n);
    if (m->precision->stream == FP32) check_below(off, 1e-5, what, "");
    else if (attention > 0) check_below(off, attention, what, "");
    else {
        double square = 0, worst = 0;
        for (long i = 0; i < n; i++) square += (double)want[i] * want[i] / (double)n;
        const double slack = sqrt(square) * fmax(0x1p-14, sum_error(m, kind < D_X));
        for (long i = 0; i < n; i++) {
            const double size = fmax(fabs((double)got[i]), fabs((double)want[i]));
            const double unit = size > 0 ? ldexp(1, ilogb(size) - 7) : 0;
            worst = worse(worst, fabs((double)got[i] - want[i]) / (unit + slack));
        }
        check_below(worst, 1, what, "in BF16 units");
    }
    memcpy(want, got, sizeof(float) * (size_t)n);
    free(seen[seen_at++].data);
}

// FP8 codes are the codes of the BF16 values, every one of them, in both layouts.
static void check_codes(const fp8* codes, const fp8* transposed, const float* values, long N, long W, long Np,
                        Format f, const char* name) {
    fp8 *q = (fp8*)alloc((double)(N * W)), *qt = (fp8*)alloc((double)(W * Np));
    long wrong = 0, wrong_t = 0;
    if (codes) CUDA(cudaMemcpy(q, codes, (size_t)(N * W), cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(qt, transposed, (size_t)(W * Np), cudaMemcpyDeviceToHost));
    for (long n = 0; n < N; n++)
        for (long i = 0; i < W; i++) {
            const fp8 want = fp8_encode(round_bf16(values[n * W + i]), f);
            if (codes) wrong += q[n * W + i] != want;
            wrong_t += qt[i * Np + n] != want;
        }
    for (long i = 0; i < W; i++) for (long n = N; n < Np; n++) wrong_t += qt[i * Np + n] != 0;
    check(wrong == 0 && wrong_t == 0, "%s: %s: %ld codes are wrong, %ld transposed", seen_what, name, wrong,
          wrong_t);
    free(q), free(qt);
}
static void check_operands(Model* m) {
    const long C = m->c.width, N = m->rows, Np = padded(N), L = m->c.layers;
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor* t = &m->tensors[i];
        if (is_hidden(t))
            check_codes((fp8*)copy_gpu(m, t), gpu.wt + t->offset, m->params + t->offset, t->rows, t->cols,
                        t->rows, E4M3, t->name);
    }
    for (int l = 0; l < L; l++)
        for (int kind = QKV; kind <= DOWN; kind++) {
            const Block b = block_of(m, l, 0);
            const int post = m->scheme->norm_last;
            const float* before = post ? stream_before(m, l, 0) : b.norm1;
            const float* x = kind == QKV    ? before
                             : kind == OUT  ? b.y
                             : kind == DOWN ? b.g
                                            : (post ? b.mid : b.norm2);
            check_codes(l == L - 1 && kind == DOWN ? gpu.x : NULL, gpu.xt[kind][l], x, N,
                        tensor(m, l, kind)->cols, Np, tensor(m, l, kind)->precision.input,
                        form("input of h.%d.%s", l, TENSORS[kind].name));
        }
    check_codes(gpu.dy, gpu.dyt, m->buffers[D_WIDE], N, 3 * C, Np, tensor(m, 0, QKV)->precision.gradient,
                "gradient at h.0.qkv");
}

static Config gpu_config(int scheme, int precision, int optimizer, int layers, int width, int heads, int seq,
                         int batch, int vocab, int activation) {
    Config c = small_config();
    c.scheme = scheme, c.precision = precision, c.optimizer = optimizer, c.layers = layers, c.width = width;
    c.heads = heads, c.seq = seq, c.batch = batch, c.vocab = vocab, c.activation = activation;
    c.tau = default_tau(layers), c.lr = 0.01f, c.warmup = 1;
    odd_multipliers(&c);
    return c;
}
static void step_by_step(Config c) {
    Model cpu, other;
    model_layout(&cpu, &c), model_layout(&other, &c);
    model_alloc_params(&cpu, 1), model_alloc_params(&other, 1);
    CPU.open(&cpu), GPU.open(&other);
    model_init(&cpu, &CPU);
    for (const Tensor* t = cpu.tensors; t < cpu.tensors + cpu.num_tensors; t++) {
        for (long k = 0; t->rows == 1 && k < t->cols; k++)  // gains and biases that do something
            cpu.params[t->offset + k] += 0.1f * (float)(k % 7) - 0.3f;
        GPU.put(&other, PARAMS, t, cpu.params + t->offset);
    }
    GPU.fetch(&other);
    seen_what =
        strdup(form("%s %s %s L%d C%d H%d T%d B%d V%d%s", SCHEMES[c.scheme].name,
                    PRECISIONS[c.precision].name, c.optimizer == LION ? "lion" : "adamw", c.layers, c.width,
                    c.heads, c.seq, c.batch, c.vocab, gpu.native ? "" : ", without FP8 units"));
    for (int step = 0; step < 2; step++) {
        for (long i = 0; i < cpu.rows; i++) {
            other.inputs[i] = cpu.inputs[i] =
                (int)(random_u64(3, 1 + (uint64_t)step, (uint64_t)i) % (uint64_t)c.vocab);
            other.targets[i] = cpu.targets[i] =
                (int)(random_u64(4, 1 + (uint64_t)step, (uint64_t)i) % (uint64_t)c.vocab);
        }
        cpu.stats_on = other.stats_on = 1;
        seen_count = seen_at = 0;
        watch = remember;
        const double loss = GPU.trace(&other);
        watch = compare;
        const double want = model_loss(&cpu, 1);
        model_backward(&cpu, 0);
        watch = NULL;
        check(seen_at == seen_count, "%s: the GPU wrote %d buffers, the CPU %d", seen_what, seen_count,
              seen_at);
        check_below(fabs(loss / want - 1), 1e-5, seen_what, "loss");
        if (gpu.is_fp8) check_operands(&other);
        // The same values: the same statistics, but for the CPU's FP32 sums of 2^10 squares a lane.
        for (int i = 0; i < 2 + 5 * c.layers; i++)
            for (int k = 0; k < 3; k++) {
                const Stat *a = &other.stats[i].stat[k], *b = &cpu.stats[i].stat[k];
                check(fabs(a->rms - b->rms) <= 0x1p-14 * b->rms && a->max == b->max &&
                          a->flushed == b->flushed && a->saturated == b->saturated &&
                          a->format == b->format && strcmp(other.stats[i].name, cpu.stats[i].name) == 0,
                      "%s: statistics of %s, operand %d: %g %g %g %g, on the CPU %g %g %g %g", seen_what,
                      cpu.stats[i].name, k, a->rms, a->max, a->flushed, a->saturated, b->rms, b->max,
                      b->flushed, b->saturated);
            }
        for (int i = 0; i < cpu.num_tensors; i++) {
            const Tensor* t = &cpu.tensors[i];
            check_below(distance(other.grads + t->offset, cpu.grads + t->offset, t->rows * t->cols),
                        sum_error(&cpu, 0), form("%s: gradient of", seen_what), t->name);
        }
        memcpy(cpu.grads, other.grads, sizeof(float) * (size_t)cpu.num_params);
        const double lr = learning_rate(&c, step + 1);
        const StepResult a = update(&GPU, &other, lr), b = update(&CPU, &cpu, lr);
        GPU.fetch(&other);
        check_below(fabs(a.norm / b.norm - 1), 1e-6, seen_what, "gradient norm");
        for (int i = 0; i < cpu.num_tensors; i++) {  // a few FP32 roundings of the weight and of the update
            const Tensor* t = &cpu.tensors[i];
            double worst = 0;
            for (long k = 0; k < t->rows * t->cols; k++) {
                const float x = other.params[t->offset + k], y = cpu.params[t->offset + k];
                worst = worse(worst, fabs((double)x - y) / (fabs((double)y) * 0x1p-22 + lr * 0x1p-18));
            }
            check_below(worst, 1, form("%s: update of", seen_what), t->name);
        }
        memcpy(cpu.params, other.params, sizeof(float) * (size_t)cpu.num_params);
        memcpy(cpu.m, other.m, sizeof(float) * (size_t)cpu.num_params);
        if (cpu.v) memcpy(cpu.v, other.v, sizeof(float) * (size_t)cpu.num_params);
        if (gpu.is_fp8) {
            const Tensor* t = tensor(&other, 0, DOWN);
            check_codes((fp8*)copy_gpu(&other, t), gpu.wt + t->offset, other.params + t->offset, t->rows,
                        t->cols, t->rows, E4M3, "down after the step");
        }
    }
    free((char*)seen_what);
    GPU.close(&other), CPU.close(&cpu);
    model_free(&other), model_free(&cpu);
}
enum { IN_FP32 = 0, IN_BF16, IN_FP8 };
static void test_step_by_step(void) {
    //                         scheme precision optimizer L  C   H  T  B  V
    step_by_step(
        gpu_config(US, IN_FP8, ADAMW, 2, 128, 2, 70, 1, 256, GELU));          // D 64, T no multiple of a tile
    step_by_step(gpu_config(US, IN_FP8, LION, 1, 320, 5, 33, 2, 300, GELU));  // C no multiple of 64, V padded
    step_by_step(gpu_config(SP, IN_FP8, ADAMW, 2, 128, 1, 65, 2, 256, GELU));  // D 128
    step_by_step(gpu_config(US, IN_FP8, ADAMW, 1, 208, 13, 17, 1, 77, SILU));  // D 16
    step_by_step(gpu_config(US, IN_BF16, ADAMW, 2, 256, 2, 64, 1, 256, RELU));
    step_by_step(gpu_config(SP, IN_BF16, LION, 1, 128, 4, 40, 3, 256, SILU));  // D 32
    step_by_step(gpu_config(US, IN_FP32, ADAMW, 2, 192, 3, 37, 2, 77, GELU));
    step_by_step(gpu_config(SP, IN_FP32, LION, 2, 128, 4, 20, 2, 256, RELU));
    step_by_step(gpu_config(UMUP, IN_FP8, ADAMW, 2, 128, 2, 70, 1, 256, GELU));
    step_by_step(gpu_config(UMUP, IN_FP32, LION, 2, 64, 4, 21, 2, 77, SILU));
    step_by_step(gpu_config(UMUP, IN_BF16, ADAMW, 1, 128, 1, 40, 1, 256, RELU));
    step_by_step(gpu_config(UMUP, IN_BF16, LION, 1, 64, 2, 33, 1, 77, SILU));
    step_by_step(gpu_config(MUP, IN_FP8, ADAMW, 2, 128, 4, 33, 2, 256, GELU));
    step_by_step(gpu_config(US_PRE, IN_FP8, LION, 2, 64, 1, 33, 1, 256, GELU));
    step_by_step(gpu_config(US_MEAN, IN_FP8, ADAMW, 2, 64, 2, 33, 1, 256, GELU));
    if (!emulated()) return;
    setenv("EMU_SM", "80", 1);  // a card without FP8: the same values
    step_by_step(gpu_config(US, IN_FP8, ADAMW, 1, 128, 2, 24, 2, 256, GELU));
    unsetenv("EMU_SM");
}

// Fifty steps on real text: the losses of GPU and CPU overlay.
static void test_overlay(void) {
    Tokens tokens, other;
    Config c = small_config();
    c.layers = 2, c.width = 64, c.heads = 1, c.seq = 32, c.batch = 2, c.accum = 2, c.steps = 50, c.tau = 0.4f,
    c.lr = 0.02f, c.warmup = 10;
    Model a = text_model_on(&GPU, c, &tokens, "train_us.c");
    Model b = text_model(c, &other, "train_us.c");
    Split all = {&tokens, 0, tokens.count};
    double worst = 0, first = 0, last = 0, norm = 1;
    for (long s = 1; s <= c.steps; s++) {
        const StepResult x = GPU.step(&a, &all, learning_rate(&c, s)),
                         y = CPU.step(&b, &all, learning_rate(&c, s));
        worst = worse(worst, fabs(x.loss / y.loss - 1));
        if (s == 1) first = x.loss, norm = fabs(x.norm / y.norm - 1);
        last = x.loss;
    }
    check_below(worst, 0.005, "50 steps in fp8:", "largest difference of losses");
    // Roundings to FP8 that fall the other way move the norm: over 48 seeds and texts 0.3 % RMS, at most 0.9.
    check_below(norm, 0x1p-6, "two batches of 2 in fp8:", "gradient norm");
    check(last < first - 1, "50 steps: from %.3f to %.3f", first, last);
    check(a.step == 50 && a.sequence == b.sequence, "steps and sequences are counted");
    GPU.close(&a), CPU.close(&b), model_free(&a), model_free(&b);
    forget(&tokens), forget(&other);
}

// The same bits from a second run, from launches without a graph, and with --recompute.
static void test_same_bits(void) {
    for (int scheme = US; scheme < ALL_SCHEMES; scheme++) {
        float* params[4];
        long n = 0;
        for (int run = 0; run < 4; run++) {
            Tokens tokens;
            Config c = small_config();
            c.scheme = scheme, c.layers = 3, c.width = 64, c.heads = 1, c.seq = 48, c.batch = 2, c.accum = 2,
            c.steps = 4;
            c.recompute = run == 3, c.tau = 0.4f, c.lr = 0.01f;
            Model m = text_model_on(&GPU, c, &tokens, "train_us.c");
            Split all = {&tokens, 0, tokens.count};
            for (long s = 1; s <= c.steps; s++) {
                m.stats_on = run == 2;  // statistics are taken between launches, so no graph
                GPU.step(&m, &all, learning_rate(&c, s));
            }
            GPU.fetch(&m);
            n = m.num_params;
            params[run] = floats((double)n);
            memcpy(params[run], m.params, sizeof(float) * (size_t)n);
            GPU.close(&m), model_free(&m), forget(&tokens);
        }
        const char* const what[] = {"", "a second run", "a run without graphs", "--recompute"};
        for (int run = 1; run < 4; run++)
            check(memcmp(params[0], params[run], sizeof(float) * (size_t)n) == 0, "%s: %s ends elsewhere",
                  SCHEMES[scheme].name, what[run]);
        for (int run = 0; run < 4; run++) free(params[run]);
    }
}

// A head whose logits exist for 24 rows at a time: the same bits but for its own gradient, which is added up
// in another order. Where products of other shapes add in other orders (FP32 sums, 1e-6 apart), one logit in
// about 2^12 lands on the next BF16 value, 2^-8 away: 2^-14 of the gradient (RMS). Rounded to E5M2, in steps
// of an eighth, that flips one code in 2^11 by a step: 2^-9 of it; to be held to four times that.
static void test_head_in_pieces(void) {
    const int same_bits = emulated() && !getenv("EMU_SPLIT_K");
    Tokens tokens[2];
    Model m[2];
    double loss[2];
    float* grads[2];
    for (int i = 0; i < 2; i++) {
        Config c = small_config();
        c.layers = 1, c.width = 64, c.heads = 1, c.seq = 35, c.batch = 2;
        head_rows = i ? 24 : 8192;
        m[i] = text_model_on(&GPU, c, &tokens[i], "train_us.c");
        Split all = {&tokens[i], 0, tokens[i].count};
        next_batch(&m[i], &all);
        loss[i] = GPU.trace(&m[i]);
        grads[i] = m[i].grads;
        GPU.close(&m[i]);
    }
    head_rows = 8192;
    check_below(fabs(loss[1] / loss[0] - 1), same_bits ? 0 : 1e-5, "a head in pieces:", "loss");
    for (int i = 0; i < m[0].num_tensors; i++) {
        const Tensor* t = &m[0].tensors[i];
        const double bound = !same_bits ? 0x1p-7 : t == tensor(&m[0], 0, HEAD) ? 1e-5 : 0;
        check_below(distance(grads[1] + t->offset, grads[0] + t->offset, t->rows * t->cols), bound,
                    "a head in pieces: gradient of", t->name);
    }
    for (int i = 0; i < 2; i++) model_free(&m[i]), forget(&tokens[i]);
}

// Logits for the next token, with keys and values kept and window by window, are those of the CPU.
static void check_next(int scheme) {
    Tokens tokens, other;
    Config c = small_config();
    c.precision = IN_FP32, c.layers = 2, c.width = 48, c.heads = 3, c.seq = 90, c.batch = 1;
    c.scheme = scheme;
    Model a = text_model_on(&GPU, c, &tokens, "README.md"), b = text_model(c, &other, "README.md");
    Split all = {&tokens, 0, tokens.count};
    tokens_read(&all, 0, 90, a.inputs, a.targets), tokens_read(&all, 0, 90, b.inputs, b.targets);
    const long starts[] = {0, 1, 2, 63, 65, 63}, stops[] = {1, 2, 63, 65, 90, 64};
    for (int keep = 1; keep >= 0; keep--)
        for (int i = 0; i < 6; i++) {
            const long t0 = keep ? starts[i] : 0;
            check_below(distance(GPU.next(&a, t0, stops[i]), CPU.next(&b, 0, stops[i]), 256), 1e-5,
                        SCHEMES[scheme].name, form("logits after %ld tokens, %ld kept", stops[i], t0));
        }
    GPU.close(&a), CPU.close(&b), model_free(&a), model_free(&b);
    forget(&tokens), forget(&other);
}

// Text is written with keys and values kept; the logits have the bits of those that one pass over the whole
// window makes, when it is full and at the end. Where products of other shapes add in other orders, some
// roundings fall the other way: 2^-8 in BF16. Keys or positions of another token make a half and more.
static struct { long first, last; float logits[256][256]; double worst; } written;  // by length
static void check_window(Model* m) {
    float whole[256];
    GPU.next(m, 0, written.last);  // the head's input is there for each row
    for (long t = written.first; t <= written.last; t++) {
        is_fp32(m) ? logits_gpu<float>(m, t - 1, 1) : logits_gpu<bf16>(m, t - 1, 1);
        is_fp32(m) ? fetch_floats(whole, act<float>(m, 0, A_LOGITS), 256)
                   : fetch_floats(whole, act<bf16>(m, 0, A_LOGITS), 256);
        if (memcmp(written.logits[t], whole, sizeof whole) == 0) continue;
        const double error = distance(written.logits[t], whole, 256);
        written.worst = worse(written.worst, error == 0 ? 1e-30 : error);
    }
}
static const float* written_next(Model* m, long t0, long T) {
    if (t0 == 0) written.first = T;
    if (T % 64 == 2 && t0 > 3) t0 -= 3;  // over a tile's edge
    written.last = T;
    float* logits = (float*)memcpy(written.logits[T], GPU.next(m, t0, T), sizeof *written.logits);
    if (T == m->c.seq) check_window(m);
    return logits;
}
static void check_kept(int scheme, int precision, int D, int recompute, int seq, int prompt, int count) {
    const int same_bits = emulated() && !getenv("EMU_SPLIT_K");
    const double bounds[] = {1e-5, 0x1p-6, 0x1p-5};  // fp32, bf16, fp8
    static char text[256];
    Tokens tokens;
    Config c = small_config();
    c.scheme = scheme, c.precision = precision, c.layers = 2, c.width = 2 * D, c.heads = 2;
    c.recompute = recompute, c.seq = seq, c.batch = 1, c.temperature = 1, c.prompt = text;
    for (int i = 0; i < prompt; i++) text[i] = (char)('a' + random_u64(3, 0, (uint64_t)i) % 26);
    text[prompt] = 0;
    Model m = text_model_on(&GPU, c, &tokens, "README.md");
    written.worst = 0;
    generate_with(&m, written_next, count);
    if (written.last < seq) check_window(&m);
    check_below(written.worst, same_bits ? 0 : bounds[precision], "keys and values kept:",
                form("logits of %s in %s, D %d, --seq %d --tokens %d after %d", SCHEMES[scheme].name,
                     PRECISIONS[precision].name, D, seq, count, prompt));
    GPU.close(&m), model_free(&m), forget(&tokens);
}
static void test_next(void) {
    check_next(US);
    check_next(UMUP);  // attention's factor is that of the training run's --seq, not of the window so far
    check_kept(US, IN_FP8, 64, 0, 70, 61, 12);
}
static void test_kept_rows(void) {
    const int schemes[] = {US, SP, UMUP};
    for (int i = 0; i < 3; i++) {
        for (int precision = IN_FP32; precision <= IN_FP8; precision++)  // from 61 to 70, then 36 and 37
            for (int D = 16; D <= 64; D *= 2)
                if (precision > IN_FP32 || D == 16) check_kept(schemes[i], precision, D, 0, 70, 61, 12);
        check_kept(schemes[i], IN_FP8, 64, 0, 132, 126, 9);  // from 126 to 132, then 67 and 68
    }
    check_kept(US, IN_FP8, 64, 0, 70, 100, 32);  // 70 at once, then from 36 to 66
    check_kept(US, IN_FP8, 64, 1, 70, 61, 8);
    check_kept(SP, IN_BF16, 16, 0, 8, 1, 20);
}

// A run begun on the GPU goes on on the CPU, and the other way round.
static void test_changing_devices(void) {
    const char* const order[] = {"", "--cpu"};
    const char* flags = "--input train_us.c --steps 8 --save-every 4 --out %s/a " TINY;
    for (int i = 0; i < 2; i++) {
        shell("rm -rf '%s/a' '%s/b'");
        run_on = order[i];
        check(run_us(flags)->status == 0, "training: %s", result.err);
        shell("mkdir '%s/b' && cp '%s/a/log.csv' '%s/b'");
        shell("cp '%s/a/step_00000004.safetensors' '%s/b/checkpoint.safetensors'");
        run_on = order[1 - i];
        check(run_us("--out %s/b --resume")->status == 0, "resuming elsewhere: %s", result.err);
        run_on = "";
        double a[8], b[8], worst = 0;
        for (int k = 0; k < 2; k++) {
            char path[1100], line[256], *end;
            text_file(path, sizeof path, k ? "b/log.csv" : "a/log.csv");
            FILE* f = fopen(path, "r");
            int n = -1;
            while (f && fgets(line, sizeof line, f) && n < 8)
                if (n++ >= 0) (k ? b : a)[n - 1] = strtod(strchr(line, ',') + 1, &end);
            if (f) fclose(f);
            check(n == 8, "log.csv has %d steps", n);
        }
        for (int s = 0; s < 8; s++) worst = worse(worst, fabs(a[s] / b[s] - 1));
        check_below(worst, 0.005, "losses of a run that changed devices:", order[i]);
    }
}

#ifdef US_MPI
// Many ranks, against one with as many batches a step: mpirun -np 3 ./test_us_emu. Sums in another order move
// FP32 losses by 1e-6 (1e-4 is promised) and, where a rounding falls the other way, BF16's and FP8's by up to
// 0.1 % (0.3 %). The one rank's run is in the first one's process, with ranks = 1 for a while.
enum { RANK_STEPS = 20, SAVED_AT = 10 };
typedef struct { double loss[RANK_STEPS], norm[RANK_STEPS]; } Course;
static void follow(Course* to, Model* m, const Device* d, const Split* s, long end) {
    while (m->step < end) {
        m->stats_on = m->step == 0;
        const long step = m->step;
        const StepResult r = d->step(m, s, learning_rate(&m->c, step + 1));
        to->loss[step] = r.loss, to->norm[step] = r.norm;
        if (m->step == step) die("step %ld was not taken", step + 1);
    }
}
static void compare(const Course* a, const Course* b, int first, double bound, const char* what) {
    double loss = 0, norm = 0;
    for (int s = first; s < RANK_STEPS; s++) {
        loss = worse(loss, fabs(a->loss[s] / b->loss[s] - 1));
        norm = worse(norm, fabs(a->norm[s] / b->norm[s] - 1));
    }
    check_below(loss, bound, what, "loss");
    check_below(norm, 20 * bound, what, "norm");  // of few large values more depends on a single rounding
}
// What forward and backward read is the same on all ranks, and made of the masters.
static void check_copies(Model* m, const char* what) {
    seen_what = what;
    GPU.fetch(m);
    for (const Tensor* t = m->tensors; t < m->tensors + m->num_tensors; t++) {
        const long n = t->rows * t->cols, bytes = n * copy_bytes(part_of(t));
        const float* w = m->params + t->offset;
        uint8_t *ours = (uint8_t*)alloc((double)bytes), *first = (uint8_t*)alloc((double)bytes);
        long wrong = 0;
        CUDA(cudaMemcpy(ours, copy_gpu(m, t), (size_t)bytes, cudaMemcpyDeviceToHost));
        memcpy(first, ours, (size_t)bytes);
        MPI(MPI_Bcast(first, (int)bytes, MPI_BYTE, 0, MPI_COMM_WORLD));
        check(memcmp(first, ours, (size_t)bytes) == 0, "%s: %s is not the same on all ranks", what, t->name);
        for (long i = 0; i < n; i++) {
            const uint32_t bits = float_bits(bytes == 4 * n ? w[i] : round_bf16(w[i]));
            const uint32_t code = fp8_encode(round_bf16(w[i]), E4M3);
            const uint32_t want = bytes == n ? code : bytes == 4 * n ? bits : bits >> 16;
            wrong += memcmp(ours + bytes / n * i, &want, (size_t)(bytes / n)) != 0;
        }
        check(wrong == 0, "%s: %ld of %s are not their masters'", what, wrong, t->name);
        if (bytes == n)
            check_codes((fp8*)copy_gpu(m, t), gpu.wt + t->offset, w, t->rows, t->cols, t->rows, E4M3,
                        t->name);
        free(ours), free(first);
    }
}
// What the header says that a step moves: of each tensor what is sent, but for what fills up a rank's share.
static void check_moved(const Model* m) {
    double moved[] = {0, 0, 0}, grads = 0;  // in FP32, BF16, FP8
    for (const Tensor* t = m->tensors; t < m->tensors + m->num_tensors; t++) {
        const double n = (double)t->rows * (double)t->cols * 1e-6;
        const int vector = t->use >= GAIN;
        grads += 4 * n, moved[0] += 4 * n, moved[1] += (vector ? 4 : 2) * n;
        moved[2] += (vector ? 4 : is_hidden(t) ? 1 : 2) * n;
    }
    const int out = divert(), p = m->c.precision, other = p == IN_FP8 ? IN_BF16 : IN_FP8;
    gpu_describe(m);
    const char* text = undivert(out);
    const char *begin = form("%d ranks, a GPU each; a step moves ", ranks), *at = strstr(text, begin);
    int wrong = off(next_number(&at, begin), grads, 0.18);
    wrong += off(next_number(&at, " MB of gradients, and "), moved[p], 0.18);
    const char* in = form(" MB of weights in %s (in %s it would be ", PRECISIONS[p].name,
                          PRECISIONS[other].name);
    wrong += off(next_number(&at, in), moved[other], 0.18);
    check(!wrong && at && strncmp(at, ")\nto stop and save: ", 20) == 0, "%s %.2f %.2f %.2f", text, grads,
          moved[p], moved[other]);
}
static void check_ranks(int scheme, int precision, int optimizer, int layers, int width, int accum,
                        const char* file) {
    const double bounds[] = {1e-4, 3e-3, 3e-3};
    const int all = ranks, me = rank;
    Tokens tokens;
    Course many, again, one;
    Config c = small_config();
    c.scheme = scheme, c.precision = precision, c.optimizer = optimizer, c.layers = layers, c.width = width;
    c.heads = width / 32, c.seq = 25, c.batch = 1, c.accum = accum, c.steps = RANK_STEPS, c.warmup = 5;
    c.tau = 0.4f, c.vocab = 300, c.lr = SCHEMES[scheme].lr_bytes[optimizer], c.eval_tokens = 300;
    c.decay = SCHEMES[scheme].decay;
    Config alone = c;
    alone.accum *= ranks;
    char* what = copied(form("%s %s %s C%d, %d ranks:", SCHEMES[scheme].name, PRECISIONS[precision].name,
                             optimizer == ADAMW ? "adamw" : "lion", width, ranks));

    Model m = text_model_on(&GPU, c, &tokens, "train_us.c");
    const Split data = {&tokens, 0, tokens.count};
    check_copies(&m, form("%s before the first step", what));
    if (rank == 0) check_moved(&m);
    follow(&many, &m, &GPU, &data, SAVED_AT);
    check(checkpoint_save(&m, &GPU, file) == 0, "%s cannot write %s", what, file);
    follow(&many, &m, &GPU, &data, RANK_STEPS);
    check(m.sequence == RANK_STEPS * ranks * accum, "%s %ld sequences were consumed", what, m.sequence);
    check_copies(&m, what);
    float* end = m.params;
    m.params = NULL;
    Stat weights[3];
    const int rows[] = {stat_row(&m, 0, QKV), stat_row(&m, layers - 1, DOWN), stat_row(&m, 0, HEAD)};
    for (int i = 0; i < 3; i++) weights[i] = m.stats[rows[i]].stat[1];
    const double held_out = validate(&m, &GPU, &data);
    rank = 0, ranks = 1;
    const double by_one = validate(&m, &GPU, &data);
    rank = me, ranks = all;
    check_below(fabs(held_out / by_one - 1), 1e-12, what, "validation");
    GPU.close(&m), model_free(&m), forget(&tokens);

    Archive saved;
    archive_read(&saved, file);
    for (int from = 0; from <= SAVED_AT; from += SAVED_AT) {  // the same bits, also from the checkpoint on
        m = text_model_on(&GPU, c, &tokens, "train_us.c");
        if (from) checkpoint_load(&m, &GPU, &saved, lasting(&m));
        follow(&again, &m, &GPU, &data, RANK_STEPS);
        GPU.fetch(&m);
        int same_way = memcmp(end, m.params, sizeof(float) * (size_t)m.num_params) == 0;
        for (int s = from; s < RANK_STEPS; s++) same_way &= again.loss[s] == many.loss[s];
        check(same_way, "%s a second run from step %d ends elsewhere", what, from);
        GPU.close(&m), model_free(&m), forget(&tokens);
    }
    if (rank == 0) {
        ranks = 1;
        for (int on = 0; on < 3; on++) {  // from the beginning; from the checkpoint; and on the CPU
            const Device* d = on == 2 ? &CPU : &GPU;
            m = text_model_on(d, alone, &tokens, "train_us.c");
            if (on) checkpoint_load(&m, d, &saved, lasting(&m));
            follow(&one, &m, d, &data, RANK_STEPS);
            const char* const how[] = {"one GPU", "resumed on one GPU", "resumed on the CPU"};
            compare(&many, &one, on ? SAVED_AT : 0, bounds[precision], form("%s %s:", what, how[on]));
            for (int i = 0; i < 3 && on == 0; i++) {
                const Stat a = weights[i], b = m.stats[rows[i]].stat[1];
                check(a.rms == b.rms && a.max == b.max && a.flushed == b.flushed && a.rms > 0,
                      "%s statistics of weights: rms %g, one GPU %g", what, a.rms, b.rms);
            }
            d->close(&m), model_free(&m), forget(&tokens);
        }
        ranks = all;
    }
    gpu_sum(0);  // the others wait for the first
    free(end), free(what);
}
// Micro-batch i of rank r has the sequences (i R + r) B .. + B-1 of the step.
static void check_batches(void) {
    const int all = ranks, me = rank;
    Tokens tokens;
    Model m;
    Config c = small_config();
    c.batch = 2, c.seq = 16;
    model_layout(&m, &c);
    model_alloc_batch(&m);
    tokens_open(&tokens, "README.md");
    const Split data = {&tokens, 0, tokens.count};
    int* seen = (int*)floats((double)m.rows);
    for (int i = 0; i < 3; i++) {
        m.sequence = (long)i * all * c.batch;
        next_batch(&m, &data);
        memcpy(seen, m.inputs, sizeof(int) * (size_t)m.rows);
        check(m.sequence == (i + 1L) * all * c.batch, "a batch of all ranks is consumed");
        rank = 0, ranks = 1;
        m.sequence = ((long)i * all + me) * c.batch;
        next_batch(&m, &data);
        rank = me, ranks = all;
        check(memcmp(seen, m.inputs, sizeof(int) * (size_t)m.rows) == 0, "batch %d is not rank %d's", i, me);
    }
    free(seen), model_free(&m), forget(&tokens);
}
// What one rank alone meets: all refuse the step and name the same tensor; all are told to stop.
static void check_agreement(void) {
    Tokens tokens;
    Config c = small_config();
    c.layers = 2, c.width = 64, c.heads = 1, c.seq = 32, c.batch = 1, c.lr = 0.01f;
    Model m = text_model_on(&GPU, c, &tokens, "train_us.c");
    const Split data = {&tokens, 0, tokens.count};
    const float nan = NAN;
    for (int i = 0; i < 2; i++) check(isfinite(GPU.step(&m, &data, 0.01).loss), "a good step");
    GPU.fetch(&m);
    float* before = floats((double)m.num_params);
    memcpy(before, m.params, sizeof(float) * (size_t)m.num_params);
    const long sequence = m.sequence;
    if (rank == ranks - 1)
        CUDA(cudaMemcpy(vector_gpu(&m, 1, LN2_GAIN) + 5, &nan, sizeof nan, cudaMemcpyHostToDevice));
    const StepResult r = GPU.step(&m, &data, 0.01);
    const double bad = r.bad ? (double)(r.bad - m.tensors) : -1;
    check(isnan(r.loss) && r.bad && gpu_sum(bad) == bad * ranks && m.step == 2 && m.sequence == sequence,
          "a step on NaN: loss %g, step %ld, tensor %g", r.loss, m.step, bad);
    // Gradients that are not finite in the first and in the last share: all hear of both, and name the first.
    const Tensor *first = tensor(&m, 0, QKV), *last = tensor(&m, 0, HEAD);
    CUDA(cudaMemset(gpu.grads, 0, sizeof(float) * (size_t)m.num_params));
    CUDA(cudaMemset(gpu.result, 0, sizeof(Result)));
    for (int i = 0; i < 2 && rank == ranks - 1; i++) {
        const long at = i ? last->offset + last->rows * last->cols - 1 : first->offset;
        CUDA(cudaMemcpy(gpu.grads + at, &nan, sizeof nan, cudaMemcpyHostToDevice));
    }
    static const char* const kinds[] = {"reduce-scatter", "result", "all-gather"};
    int k = 0;
    profile = (Profile*)calloc(1, sizeof *profile);
    finish_gpu<bf16>(&m);
    CUDA(cudaStreamSynchronize(stream));
    for (int i = 0; i < profile->n && k < 3; i++) k += strcmp(profile->name[i], kinds[k]) == 0;
    check(k == 3, "the profile tells the time of %d of what ranks exchange", k);
    for (int i = 0; i < profile->n; i++) CUDA(cudaEventDestroy(profile->event[i]));
    free(profile), profile = NULL;
    check(gpu.host_result->stop && gpu.host_result->bad == 0, "two shares are bad: tensor %d is named",
          gpu.host_result->bad);
    GPU.fetch(&m);
    check(memcmp(before, m.params, sizeof(float) * (size_t)m.num_params) == 0, "NaN changes parameters");
    check(!told_to_stop(&GPU) && !stop_signal, "nobody was told to stop");
    if (rank == ranks - 1) stop_signal = SIGTERM;
    m.c.steps = 9, m.c.eval_tokens = 100;
    check(isnan(validate(&m, &GPU, &data)), "a validation that one rank left is none");
    check(told_to_stop(&GPU) && stop_signal == SIGTERM, "all are told to stop");
    stop_signal = 0;
    free(before), GPU.close(&m), model_free(&m), forget(&tokens);
}
static const char* shared_file(void) {
    static char file[1100];
    snprintf(file, sizeof file, "%s/ranks.safetensors", work);
    MPI(MPI_Bcast(file, sizeof file, MPI_BYTE, 0, MPI_COMM_WORLD));
    return file;
}
static void test_ranks_agree(void) {
    check_batches();
    check_agreement();
    Tokens tokens;
    const Config c = gpu_config(US, IN_BF16, ADAMW, 2, 96, 3, 25, 1, 300, GELU);
    Model m = text_model_on(&GPU, c, &tokens, "README.md");
    if (rank == 0) check_moved(&m);
    GPU.close(&m), model_free(&m), forget(&tokens);
}
// A share may begin in a table's row (3 ranks), in a matrix (4), in its row (5), or between two.
static void test_ranks_follow(void) { check_ranks(US, IN_FP8, ADAMW, 2, 96, 2, shared_file()); }
static void test_ranks_all(void) {
    const char* file = shared_file();
    for (int precision = IN_FP32; precision <= IN_FP8; precision++)
        for (int scheme = US; scheme <= SP; scheme++)
            for (int optimizer = LION; optimizer <= ADAMW; optimizer++)
                check_ranks(scheme, precision, optimizer, 1, 64, 1, file);
}
#endif

// The plan of the device's memory: what is taken, what the header says, and all given back. A plan that grows
// costs users a batch: those for GPT-2's smallest model at batch 16 are written down.
static void test_gpu_memory(void) {
    static const struct { int scheme, precision, recompute; double megabytes; } plans[] = {
        {US, IN_FP8, 0, 8321}, {US, IN_FP8, 1, 4849}, {US, IN_BF16, 0, 8872}, {SP, IN_FP8, 0, 8321},
        {SP, IN_BF16, 0, 8923}, {UMUP, IN_FP8, 1, 4849}, {US, IN_FP32, 0, 14428}};
    for (int i = 0; i < (int)(sizeof plans / sizeof *plans); i++) {
        size_t before, after, closed, all;
        CUDA(cudaMemGetInfo(&before, &all));
        Tokens tokens;
        Config c = gpu_config(plans[i].scheme, plans[i].precision, ADAMW, 2, 64, 1, 33, 1, 256, GELU);
        c.recompute = plans[i].recompute;
        Model m = text_model_on(device, c, &tokens, "README.md"), big;
        CUDA(cudaMemGetInfo(&after, &all));
        const double wanted = plan(&m, 0), taken = (double)(before - after);
        if (emulated())  // which does not round up to 512 bytes
            check(taken <= wanted && wanted < taken + 512 * num_allocations && num_allocations > 9,
                  "plan %d: %.0f bytes, %.0f are taken", i, wanted, taken);
        const int out = divert();
        gpu_describe(&m);
        const char* text = undivert(out);
        static const char* const parts[] = {" MB weights, ", " MB optimizer, ", " MB gradients, ",
                                            " MB activations, ", " MB work space, "};
        const char* p = text;
        double sum = next_number(&p, "GPU memory: ");
        int wrong = off(sum, gpu.bytes[0] * 1e-6, 1);
        for (int k = 1; k <= 5; k++) {
            const double part = next_number(&p, parts[k - 1]);
            wrong += off(part, k < 5 ? gpu.bytes[k] * 1e-6 : wanted * 1e-6, 1), sum += k < 5 ? part : -part;
        }
        const char* card = form(" MB in all\n%s, compute capability %d.%d, ", gpu.card.name, gpu.card.major,
                                gpu.card.minor);
        wrong += off(next_number(&p, card), (double)all * 1e-9, 1 + 0.1 * (double)all * 1e-9);
        check(!wrong && p && fabs(sum) <= 3, "the header: %s", text);
        c.layers = 12, c.width = 768, c.heads = 12, c.seq = 1024, c.batch = 16, c.vocab = GPT2_VOCAB;
        model_layout(&big, &c);
        big.training = 1;
        const double megabytes = plan(&big, 0) * 1e-6;
        if (gpu.native)  // where operands are decoded that takes room, too
            check(!off(megabytes, plans[i].megabytes, 1), "plan %d takes %.0f MB", i, megabytes);
        device->close(&m);
        CUDA(cudaMemGetInfo(&closed, &all));
        check(closed == before || !emulated(), "%zu bytes are not given back", before - closed);
        free(big.tensors), model_free(&m), forget(&tokens);
    }
}
static void test_gpu_limits(void) {
    check_fails("--input train_us.c --width 120 --heads 4", "it has to be a multiple of 16");
    check_fails("--input train_us.c --width 1040 --heads 1", "on a GPU a head has at most 512");
    if (!emulated()) return;
    setenv("EMU_OLD_DRIVER", "1", 1);
    check_fails("--input train_us.c", "no GPU can be used (cudaErrorInsufficientDriver)");
    unsetenv("EMU_OLD_DRIVER");
    setenv("EMU_MEM_MIB", "319", 1);
    check_fails("--input train_us.c --batch 64", "the largest that fits is --batch ");
    const char *says = strstr(result.err, "--batch "), *again = says ? strstr(says + 8, "--batch ") : NULL;
    const int batch = says ? atoi(says + 8) : 0, recomputed = again ? atoi(again + 8) : 0;
    check(batch > 0 && recomputed > batch && recomputed < 64, "it fits %d, recomputed %d", batch, recomputed);
    const char* small = "--input README.md --layers 2 --steps 1 --eval-every 0 --tokens 1 --batch ";
    setenv("EMU_MEM_MIB", "300", 1);
    check_fails(form("%s64", small), "the largest that fits is --batch ");
    says = strstr(result.err, "--batch ");
    const int most = says ? atoi(says + 8) : 0;
    check(run_us(form("%s%d", small, most))->status == 0, "--batch %d: %s", most, result.err);
    check_fails(form("%s%d", small, most + 1), form("the largest that fits is --batch %d,", most));
    setenv("EMU_MEM_MIB", "289", 1);
    check_fails(form("%s1", small), "not even --batch 1 --recompute fits");
    unsetenv("EMU_MEM_MIB");
    // What cuBLASLt refuses is said with its sizes and formats.
    char path[1100], text[600];
    text_file(path, sizeof path, "refused.txt");
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        const Shape odd = {64, 48, 32, 32, 32, 48, 1, 1, CUDA_R_8F_E5M2, CUDA_R_8F_E5M2, CUDA_R_32F, 16,
                           0, 0};
        if (!freopen(path, "w", stderr)) _exit(9);
        LT(cublasLtCreate(&lt.handle));
        product_of(&odd);
        _exit(8);
    }
    int status = 0;
    waitpid(child, &status, 0);
    read_text(path, text, sizeof text);
    const char* words = "cannot multiply (64,32) E5M2 by (32,48) E5M2 into FP32 (status";
    check(WEXITSTATUS(status) == 1 && strstr(text, words), "exit %d: %s", WEXITSTATUS(status), text);
    // A card that fails in the middle: its parameters are not to be trusted, and are not saved.
    setenv("EMU_FAILS_AT", "60", 1);
    run_us("--input README.md --out %s/failed --steps 9 --layers 1 --width 64 --seq 32 --eval-every 1");
    check(result.status == 1 && strstr(result.err, ": cudaErrorLaunchFailure\n"),
          "a launch of the first validation fails: exit %d %s", result.status, result.err);
    shell("test -e '%s/failed/log.csv' && test ! -e '%s/failed/checkpoint.safetensors'");
    unsetenv("EMU_FAILS_AT");
    setenv("EMU_SM", "75", 1);
    check_fails("--input train_us.c", "8.0 is needed");
    setenv("EMU_SM", "80", 1);
    check(run_us(form("%s2", small))->status == 0 && strstr(result.out, "no FP8 tensor cores"), "sm_80: %s",
          result.err);
    unsetenv("EMU_SM");
}
#endif

// -----------------------------------------------------------------------------------------------------------

// The groups of tests, which can be named like one: of the device's arithmetic, of functions that only the
// CPU has, of the program, which is run many times.
enum { ARITHMETIC, CPU_ONLY, PROGRAM, MANY };  // MANY: of several ranks, which have no others
static const char* const GROUPS[] = {"arithmetic", "cpu", "program", "many"};
#define TEST(name) {#name, test_##name, ARITHMETIC}
#define CPU_TEST(name) {#name, test_##name, CPU_ONLY}
#define RUN_TEST(name) {#name, test_##name, PROGRAM}
static const struct { const char* name; void (*test)(void); int group; } TESTS[] = {
    CPU_TEST(formats), CPU_TEST(random), CPU_TEST(exp), CPU_TEST(matmul), CPU_TEST(activations),
    TEST(large_logits), CPU_TEST(gradients), CPU_TEST(table), CPU_TEST(umup), CPU_TEST(mup_is_sp),
    CPU_TEST(data), CPU_TEST(text), CPU_TEST(printing), CPU_TEST(archive), TEST(oracle),
    CPU_TEST(model_gradient), CPU_TEST(accumulation), TEST(not_finite), CPU_TEST(statistics),
    CPU_TEST(generate), CPU_TEST(window), CPU_TEST(ending), RUN_TEST(served), RUN_TEST(hellaswag),
    RUN_TEST(held_out), CPU_TEST(dump), TEST(unit_scale), CPU_TEST(attention_variance), RUN_TEST(training),
    CPU_TEST(options), CPU_TEST(effects), CPU_TEST(log), CPU_TEST(host), RUN_TEST(command_line),
    RUN_TEST(bad_files), RUN_TEST(checkpoints), RUN_TEST(nothing_lost), TEST(validation),
#ifdef US_CUDA
    TEST(step_by_step), TEST(overlay), TEST(same_bits), TEST(next), TEST(kept_rows), TEST(head_in_pieces),
    RUN_TEST(changing_devices), TEST(gpu_memory), RUN_TEST(gpu_limits),
#endif
#ifdef US_MPI
    {"ranks_agree", test_ranks_agree, MANY}, {"ranks_follow", test_ranks_follow, MANY},
    {"ranks_all", test_ranks_all, MANY},
#endif
};

int main(int argc, char** argv) {
    wait_briefly(argv);
    if (getenv("TEST_SAVE_SECONDS")) save_seconds = atof(getenv("TEST_SAVE_SECONDS"));
    if (argc > 1 && strcmp(argv[1], "--") == 0) {
#ifdef US_CUDA
        if (getenv("OMPI_COMM_WORLD_SIZE")) ranks_open();
        const int status = run(argc - 1, argv + 1, device);
        if (getenv("OMPI_COMM_WORLD_SIZE")) ranks_close();
        return status;
#endif
        return run(argc - 1, argv + 1, device);
    }
    if (argc > 2 && strcmp(argv[1], "--cpu") == 0) return run(argc - 2, argv + 2, &CPU);
#ifdef US_CUDA
    ranks_open();
    cudaDeviceProp card;
    const int native = open_card(&card, "./test_us tests the CPU's functions") >= 89;
    if (native && (!emulated() || getenv("EMU_FP8_SUMS"))) measure_short_sums();
#endif
    const char* tmp = getenv("TMPDIR");
    snprintf(work, sizeof work, "%s/us_test_XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(work) || !realpath(argv[0], self)) die("cannot make %s or find %s", work, argv[0]);
    int ran = 0;
    for (size_t i = 0; i < sizeof TESTS / sizeof *TESTS; i++) {
        const int stop = argc > 1 && strcmp(argv[1], "-x") == 0, before_passed = passed,
                  before_failed = failed;
        int wanted = argc < 2 + stop;
        for (int k = 1 + stop; k < argc; k++)
            wanted |= strstr(TESTS[i].name, argv[k]) || strcmp(GROUPS[TESTS[i].group], argv[k]) == 0;
        const double failed_on_any = device->sum(failed);
        if (!wanted || (stop && failed_on_any > 0)) continue;
        if (TESTS[i].group == CPU_ONLY && device != &CPU) continue;
        if ((TESTS[i].group == MANY) != (ranks > 1)) continue;
        double start = seconds();
        TESTS[i].test(), ran++;
        printf("%-20s %4d passed, %d failed  %5.1f s\n", TESTS[i].name, passed - before_passed,
               failed - before_failed, seconds() - start);
        fflush(stdout);
    }
    char command[1100];
    snprintf(command, sizeof command, "rm -rf '%s'", work);
    if (system(command) != 0) failed++;
    failed = (int)device->sum(failed);
#ifdef US_CUDA
    ranks_close();
#endif
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0 || passed == 0 || ran == 0;
}
