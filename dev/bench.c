/*
bench.c: how fast the CPU trainer is, and where its time goes. `make bench`, or ./bench_us SECONDS.

Two shapes: a small byte model, and GPT-2 124M at a short context. For each, in FP32 and in FP8, whole
optimizer steps (forward, backward, update) are run in turn, and the fastest of each is printed: on a machine
that does other things too, that is the one disturbed least. FLOPs per token = 6 (12 L C^2 + Vp C) + 6 L C T.
Last, the mean step of the default model beside 0, 1, 2 and 4 busy processes a core, which this program starts
and ends: it should take at most 2 (1 + busy / cores) times as long as alone.
*/
#define US_NO_MAIN
#include "../train_us.c"
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

// A model for c with random tokens.
static void model_open(Model* m, const Config* c) {
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
    static const struct { const char* name; int layers, heads, width, seq, vocab;
    } shapes[] = {{"L4 H4 C256 T256 B4 V256", 4, 4, 256, 256, BYTES_VOCAB},
                  {"L12 H12 C768 T64 B4 V50257", 12, 12, 768, 64, GPT2_VOCAB}};
    const double budget = argc > 1 ? atof(argv[1]) : 20;
    wait_briefly(argv);
    printf("%d threads, %d float lanes, tile %d x %d\n", max_threads(), LANES, MR, NR);
    for (int s = 0; s < 2; s++) {
        Model m[2];
        double best[2] = {1e30, 1e30}, laps[2][LAPS], start = seconds(), flops = 0;
        for (int k = 0; k < 2; k++) {
            char* none[] = {argv[0]};
            Config c;
            config_parse(&c, 1, none, NULL);
            c.layers = shapes[s].layers, c.heads = shapes[s].heads, c.width = shapes[s].width,
            c.seq = shapes[s].seq;
            c.vocab = shapes[s].vocab, c.batch = 4, c.precision = k ? 2 : 0;
            config_defaults(&c);
            model_open(&m[k], &c);
            const double L = c.layers, C = c.width;
            flops = 6 * (12 * L * C * C + (double)m[k].vp * C) + 6 * L * C * c.seq;
        }
        for (int round = 0; round < 2 || seconds() - start < budget; round++)
            for (int k = 0; k < 2; k++) {
                const double t = step(&m[k]);
                if (t < best[k]) best[k] = t, memcpy(laps[k], lap_spent, sizeof lap_spent);
            }
        printf("\n%-28s %12s %12s %12s\n", shapes[s].name, "tokens/s", "GFLOP/s", "ms/step");
        for (int k = 0; k < 2; k++) {
            double rate = (double)m[k].rows / best[k];
            printf("  %-26s %12.1f %12.1f %12.1f\n", k ? "fp8" : "fp32", rate, rate * flops * 1e-9,
                   best[k] * 1e3);
        }
        printf("  fp8 costs %.1f %% over fp32. Share of a step:   fp32    fp8\n",
               100 * (best[1] / best[0] - 1));
        for (int i = 0; i < LAPS; i++)
            printf("  %44s %7.1f%% %5.1f%%\n", LAP_NAMES[i], 100 * laps[0][i] / best[0],
                   100 * laps[1][i] / best[1]);
        fflush(stdout);
        model_free(&m[0]), model_free(&m[1]);
    }
    Config c;
    config_parse(&c, 1, argv, NULL);
    c.vocab = BYTES_VOCAB;
    beside_busy_processes(c, budget / 5);
    return 0;
}
