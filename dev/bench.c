/*
bench.c: how fast the CPU trainer is, and where its time goes. `make bench`, or
  ./bench_us SECONDS                          all of it, with SECONDS for each shape (20)
  ./bench_us --one SHAPE PRECISION SECONDS    tokens/s of one case: for bench_torch.py, which takes turns

Two shapes: a small byte model, and GPT-2 124M at a short context. For each, in FP32, BF16 and FP8, whole
optimizer steps (forward, backward, update) are run in turn, and the fastest of each is printed: on a machine
that does other things too, that is the one disturbed least. FLOPs per token = 6 (12 L C^2 + Vp C) + 6 L C T.
Beside them stand the machine's peaks, measured in the same turns: of multiply-adds in registers alone and,
where it multiplies pairs of BF16 values, of these.
Last, the mean step of the default model beside 0, 1, 2 and 4 busy processes a core, which this program starts
and ends: it should take at most 2 (1 + busy / cores) times as long as alone.
*/
#define US_NO_MAIN
#include "../train_us.c"
#include "cpu/peak.h"
#include <sys/wait.h>

// The kinds of operations. What has passed since the last one is charged to the kind of the one that has just
// written a buffer.
enum { LINEAR, HEAD_MATMUL, ATTENTION, NORM, ACTIVATION, LOSS, EMBEDDING, UPDATE, LAPS };
static const char* const LAP_NAMES[LAPS] = {"hidden linears", "head", "attention", "norm, residual",
                                            "activation",     "loss", "embedding", "optimizer"};
static double lap_spent[LAPS], lap_last;
static int written;  // the buffer before
static void lap(int kind) {
    const double t = seconds();
    lap_spent[kind] += t - lap_last;
    lap_last = t;
}
static void charge(Model* m, int l, int kind, long n) {
    (void)m, (void)l, (void)n;
    lap(kind == A_X0                               ? EMBEDDING
        : kind == A_Y                              ? ATTENTION
        : kind == A_G                              ? ACTIVATION
        : kind == A_LOGITS                         ? (written == A_LOGITS ? LOSS : HEAD_MATMUL)
        : kind == D_BRANCH && written == A_LOGITS  ? HEAD_MATMUL
        : kind == D_WIDE && written == D_WIDE      ? ACTIVATION
        : kind == D_WIDE && written == D_NARROW    ? ATTENTION
        : kind == A_QKV || kind == A_OUT || kind == A_UP || kind == A_DOWN ? LINEAR
        : kind == D_WIDE || kind == D_NARROW       ? LINEAR
                                                   : NORM);
    written = kind;
}

// A model of a shape like "L4 H4 C256 T256 B4 V256": blocks, heads, width, positions, sequences, vocabulary.
static Config config_of(const char* shape, const char* precision) {
    char name[] = "bench_us", flag[] = "--precision", *args[] = {name, flag, copied(precision)};
    Config c;
    config_parse(&c, 3, args, NULL, 0);
    if (sscanf(shape, "L%d H%d C%d T%d B%d V%d", &c.layers, &c.heads, &c.width, &c.seq, &c.batch,
               &c.vocab) != 6) die("\"%s\" is no shape", shape);
    config_defaults(&c);
    return c;
}
static void model_open(Model* m, const Config* c) {  // with random tokens
    model_layout(m, c);
    model_alloc_params(m, 1);
    model_alloc_buffers(m);
    model_init(m, &CPU);
    for (long i = 0; i < m->rows; i++) {
        m->inputs[i] = (int)(random_u64(1, 1, (uint64_t)i) % (uint64_t)c->vocab);
        m->targets[i] = (int)(random_u64(1, 2, (uint64_t)i) % (uint64_t)c->vocab);
    }
}
// Seconds of one optimizer step.
static double step(Model* m) {
    const Tensor* bad;
    memset(lap_spent, 0, sizeof lap_spent);
    watch = charge;
    const double t = lap_last = seconds();
    model_loss(m, 1);
    model_backward(m, 0);
    lap(EMBEDDING);  // backward ends with it
    gradient_norm(m, &bad);
    model_update(m, 1e-3);
    lap(UPDATE);
    return seconds() - t;
}

// ---- The tables ----------------------------------------------------------------------------------------
enum { MODES = sizeof PRECISIONS / sizeof *PRECISIONS };
static void print_peak(double peak, double fma, const char* what) {
    printf("  %-26s %12s %12.1f %11.1f%% %s\n", "peak", "", peak, 100 * peak / fma, what);
}
static void speed(const char* shape, double budget) {
    Model m[MODES];  // one model: on the first one's arrays, laid out for each precision
    double best[MODES], laps[MODES][LAPS], fma = 0, pairs = 0;
    for (int k = 0; k < MODES; k++) {
        const Config c = config_of(shape, PRECISIONS[k].name);
        best[k] = 1e30;
        if (k == 0) model_open(&m[0], &c);
        else {
            Model same = m[0];
            model_layout(&m[k], &c);
            same.c = c, same.tensors = m[k].tensors, same.precision = m[k].precision, m[k] = same;
        }
    }
    const double L = m[0].c.layers, C = m[0].c.width, start = seconds();
    const double flops = 6 * (12 * L * C * C + (double)m[0].vp * C) + 6 * L * C * m[0].c.seq;
    for (int round = 0; round < 2 || seconds() - start < budget; round++) {
        for (int n = 0; n < 10; n++) fma = fmax(fma, 1e-9 * peak(0)), pairs = fmax(pairs, 1e-9 * peak(1));
        for (int k = 0; k < MODES; k++) {
            const double t = step(&m[k]);
            if (t < best[k]) best[k] = t, memcpy(laps[k], lap_spent, sizeof lap_spent);
        }
    }
    printf("\n%-28s %12s %12s %12s %12s %10s\n", shape, "tokens/s", "GFLOP/s", "of FMA peak", "ms/step",
           "fp32 is 1");
    for (int k = 0; k < MODES; k++) {
        const double rate = (double)m[k].rows / best[k], gflops = rate * flops * 1e-9;
        printf("  %-26s %12.1f %12.1f %11.1f%% %12.1f %10.2f\n", PRECISIONS[k].name, rate, gflops,
               100 * gflops / fma, best[k] * 1e3, best[0] / best[k]);
    }
    print_peak(fma, fma, "FMA");
    if (multiplies_pairs()) print_peak(pairs, fma, PAIRS_BY);
    printf("  %-26s", "share of a step");
    for (int k = 0; k < MODES; k++) printf(" %12s", PRECISIONS[k].name);
    for (int i = 0; i < LAPS; i++) {
        printf("\n  %26s", LAP_NAMES[i]);
        for (int k = 0; k < MODES; k++) printf(" %11.1f%%", 100 * laps[k][i] / best[k]);
    }
    printf("\n");
    fflush(stdout);
    for (int k = 1; k < MODES; k++) free(m[k].tensors);
    model_free(&m[0]);
}
static double tokens_per_second(const char* shape, const char* precision, double budget) {
    const Config c = config_of(shape, precision);
    double best = 1e30;
    Model m;
    model_open(&m, &c);
    const double start = seconds();
    for (int n = 0; n < 2 || seconds() - start < budget; n++) best = fmin(best, step(&m));
    return (double)m.rows / best;
}

static void beside_busy_processes(Config c, double budget) {
    const int cores = max_threads();
    const pid_t parent = getpid();
    double idle = 0;
    Model m;
    config_defaults(&c);
    model_open(&m, &c);
    printf("\nThe default model beside busy processes, %d threads; at most 2 (1 + busy / threads) is wanted\n"
           "  %8s %14s %14s %10s\n", cores, "busy", "ms/step", "times idle", "wanted");
    for (int busy = 0; busy <= 4 * cores; busy = busy ? 2 * busy : cores) {
        pid_t* child = (pid_t*)alloc(sizeof(pid_t) * (double)(busy + 1));
        for (int i = 0; i < busy; i++)
            if ((child[i] = fork()) == 0) {
                while (getppid() == parent) for (volatile int k = 0; k < 1000000; k++) {}
                _exit(0);
            }
        double start = seconds(), spent = 0;
        int steps = 0;
        for (step(&m); steps < 10 || seconds() - start < budget; steps++) spent += step(&m);
        for (int i = 0; i < busy; i++) if (child[i] > 0) kill(child[i], SIGKILL), waitpid(child[i], NULL, 0);
        free(child);
        if (busy == 0) idle = spent / steps;
        printf("  %8d %14.1f %14.2f %10.0f\n", busy, 1e3 * spent / steps, spent / steps / idle,
               2 * (1 + (double)busy / cores));
        fflush(stdout);
    }
    model_free(&m);
}

int main(int argc, char** argv) {
    const double budget = argc > 1 ? atof(argv[argc - 1]) : 20;
    wait_briefly(argv);
    if (argc == 5 && strcmp(argv[1], "--one") == 0) {
        printf("%.1f\n", tokens_per_second(argv[2], argv[3], budget));
        return 0;
    }
    if (argc > 2 || budget <= 0) die("./bench_us SECONDS, or ./bench_us --one SHAPE PRECISION SECONDS");
    printf("%d threads, %d float lanes, tile %d x %d\n", max_threads(), LANES, MR, NR);
    speed("L4 H4 C256 T256 B4 V256", budget);
    speed("L12 H12 C768 T64 B4 V50257", budget);
    Config c;
    config_parse(&c, 1, argv, NULL, 0);
    c.vocab = BYTES_VOCAB;
    beside_busy_processes(c, budget / 5);
    return 0;
}
