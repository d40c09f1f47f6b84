/*
bench_gpu.cu: how fast the GPU trainer is, where its time goes, and how far that is from what the card can do.
`make gpu_bench` runs it; ./bench_gpu prints markdown, ./bench_gpu SECONDS begins nothing after so many;
./bench_gpu 124M (a name in sizes.h) measures only that; ./bench_gpu tiny takes seconds and shows only that it
works. Under mpirun tokens/s are those of all GPUs, and the kernels the first one's, with its collectives.

For each model, in BF16 and in FP8: the largest batch that fits and divides a step of 524,288 tokens; steps
(batches, gradient norm, update) as graphs, of one batch and of up to four, the faster of two each: what more
batches a step has counts as much as these. Then one batch and one update with an event behind every kernel.
FLOPs per token = 6 (12 L C^2 + Vp C) + 6 L C T. Tokens are random, so no token is frequent: real text costs
embedding backward more.
*/
#ifndef US_SOURCE
#define US_SOURCE "../../train_us.cu"  // as seen from cuda/
#endif
#include "cuda/bench.h"
#include "sizes.h"

static const BenchModel TINY[] = {{"tiny", 2, 2, 128, 64, 1}};
static const char* const MODES[] = {"fp32", "bf16", "fp8"};
static struct { const char* name; double ms[3]; } kernels[64];
static int num_kernels;

// The time between a kernel's event and the one before it, by name.
static void add_profile(int mode) {
    CUDA(cudaStreamSynchronize(stream));
    for (int i = 1; i < profile->n; i++) {
        float ms;
        int k = 0;
        CUDA(cudaEventElapsedTime(&ms, profile->event[i - 1], profile->event[i]));
        while (k < num_kernels && strcmp(kernels[k].name, profile->name[i]) != 0) k++;
        if (k == num_kernels && ++num_kernels > 64) die("more than 64 kinds of kernels");
        kernels[k].name = profile->name[i];
        kernels[k].ms[mode] += ms;
    }
}

// Sets batch and accum, or recompute too if it has to be; 0: not even that fits.
static int fit(Config* c, long step_tokens, int native) {
    Model m;
    c->batch = 1;
    model_layout(&m, c);
    gpu.is_fp8 = c->precision == IN_FP8, gpu.native = native, gpu.type = CUDA_R_16BF;
    m.training = 1;
    const double usable = usable_bytes() - 64e6;  // less a stream, a handle and pinned memory
    int most = largest_batch(&m, usable, 0);
    c->recompute = most == 0;
    if (!most) most = largest_batch(&m, usable, 1);
    free(m.tensors);
    memset(&gpu, 0, sizeof gpu);
    while (step_tokens % ((long)c->batch * 2 * c->seq * ranks) == 0 && c->batch * 2 <= most) c->batch *= 2;
    c->accum = (int)(step_tokens / ((long)c->batch * c->seq * ranks));
    return most > 0;
}

// Seconds of a step of `batches`, the faster of two.
static double time_steps(Model* m, const Split* split, int batches, const char* what) {
    double best = 1e30;
    m->c.accum = batches, gpu.staged_at = -1;  // what is staged may be another number
    for (int i = 0; i < 3; i++) {              // the first one stages its own batches, too
        const double start = seconds(), loss = gpu_step(m, split, 1e-4).loss;
        if (i) best = fmin(best, seconds() - start);
        if (!isfinite(loss)) die("%s: the loss is not finite", what);
    }
    return best;
}
// Prints the rows of a model in one precision; returns tokens/s.
static double measure(Model* m, const BenchModel* b, const Split* split, double bf16_rate, double slower) {
    const int mode = m->c.precision, accum = m->c.accum, some = (int)min_l(accum, 4);
    const double step_tokens = (double)m->rows * accum * ranks;
    size_t left, total;
    gpu_open(m);
    model_init(m, &GPU);
    time_steps(m, split, 1, b->name);  // launches, then the graphs
    const double one = time_steps(m, split, 1, b->name);
    const double several = some > 1 ? time_steps(m, split, some, b->name) : one;
    const double step = several + (accum > some ? (accum - some) * (several - one) / (some - 1) : 0);
    profile = (Profile*)calloc(1, sizeof *profile);
    m->c.accum = 1;
    launched("start");
    gpu_step(m, split, 1e-4);
    add_profile(mode);
    for (int k = 0; k < PROFILE_MAX; k++) if (profile->event[k]) CUDA(cudaEventDestroy(profile->event[k]));
    free(profile);
    profile = NULL;
    CUDA(cudaMemGetInfo(&left, &total));
    const double rate = step_tokens / step;
    const double of_ceiling = 100 * rate * flops_per_token(m) / bf16_rate / ranks;
    printf("| %s | %d x %d%s | %.0f | %.1f | %.0f %% | %.1f GB | %s |\n", MODES[mode], m->c.batch, accum,
           m->c.recompute ? ", recompute" : "", rate, step * 1e3, of_ceiling,
           (double)(total - left) * 1e-9, slower > 0 ? form("%.2f x bf16", rate / slower) : "");
    fflush(stdout);
    gpu_close(m);
    return rate;
}

int main(int argc, char** argv) {
    wait_briefly(argv);
    ranks_open();
    const int tiny = argc > 1 && strcmp(argv[1], "tiny") == 0;
    const char* only = NULL;
    for (int i = 0; i < NUM_MODELS && argc > 1; i++)
        if (strcmp(argv[1], MODELS[i].name) == 0) only = argv[1];
    const double limit = argc > 1 && !tiny && !only ? atof(argv[1]) : INFINITY, until = seconds() + limit;
    if (!(limit > 0)) die("%s is no model here, nor a number of seconds", argv[1]);
    const BenchModel* models = tiny ? TINY : MODELS;
    const int num_models = tiny ? 1 : NUM_MODELS;
    const int vocab = tiny ? BYTES_VOCAB : GPT2_VOCAB;
    const long step_tokens = tiny ? 512 : 524288, n = tiny ? 128 : 8192, count = 1 << 21;
    static uint16_t text[1 << 21];
    Shard shard = {(const uint8_t*)text, count, "random tokens"};
    Tokens tokens = {&shard, 1, 2, count};
    Split split = {&tokens, 0, count};
    cudaDeviceProp card;
    int runtime;
    char date[32];
    const time_t now = time(NULL);
    strftime(date, sizeof date, "%Y-%m-%d", gmtime(&now));
    for (long i = 0; i < count; i++) text[i] = (uint16_t)(random_u64(1, 1, (uint64_t)i) % (uint64_t)vocab);
    const int native = open_card(&card, "make bench_gpu_emu runs this on a CPU") >= 89;
    CUDA(cudaRuntimeGetVersion(&runtime));

    // The ceilings need a handle and a workspace, and no model.
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    LT(cublasLtCreate(&lt.handle));
    CUDA(cudaMalloc(&lt.workspace, WORKSPACE));
    const double bandwidth = copy_bandwidth(tiny ? 1 << 20 : (size_t)1 << 30);
    const double bf16_rate = measure_product(CUDA_R_16BF, n);
    const double fp8_rate = native ? measure_product(CUDA_R_8F_E4M3, n) : 0;
    CUDA(cudaFree(lt.workspace));
    gpu_close(NULL);
    printf("## Speed on %s, %s, CUDA %d.%d\n\n", card.name, date, runtime / 1000, runtime % 1000 / 10);
    printf("Ceilings measured in this run: copy %.2f TB/s, %ld^3 products %.0f TFLOP/s in BF16",
           bandwidth * 1e-12, n, bf16_rate * 1e-12);
    if (native) printf(", %.0f in FP8 (fast accumulation)", fp8_rate * 1e-12);
    printf(". %ld tokens a step%s.\n", step_tokens, ranks > 1 ? form(", on %d GPUs", ranks) : "");

    for (int i = 0; i < num_models; i++) {
        const BenchModel* b = &models[i];
        if (only && strcmp(only, b->name) != 0) continue;
        double rate = 0, total[3] = {0, 0, 0};
        num_kernels = 0;
        memset(kernels, 0, sizeof kernels);
        printf("\n### %s: L%d H%d C%d T%d\n\n| precision | batch x accum | tokens/s | ms a step | "
               "of the BF16 ceiling | memory | |\n|---|---|---|---|---|---|---|\n",
               b->name, b->layers, b->heads, b->width, b->seq);
        for (int mode = IN_BF16; mode <= IN_FP8; mode++) {
            Model m;
            Config c = config_of(b, mode, vocab);
            if (gpu_sum(seconds() > until) > 0) {
                printf("| %s | not measured: the time was over | | | | | |\n", MODES[mode]);
                continue;
            }
            if (!fit(&c, step_tokens, native)) {
                printf("| %s | does not fit | | | | | |\n", MODES[mode]);
                continue;
            }
            model_layout(&m, &c);
            m.training = 1;
            rate = measure(&m, b, &split, bf16_rate, mode == IN_FP8 ? rate : 0);
            model_free(&m);
        }
        printf("\nms of one batch and one update, by kernel (launched one by one, so gaps count):\n\n"
               "| kernel | bf16 | fp8 |\n|---|---|---|\n");
        for (int k = 0; k < num_kernels; k++) {
            printf("| %s | %.2f | %.2f |\n", kernels[k].name, kernels[k].ms[IN_BF16], kernels[k].ms[IN_FP8]);
            for (int mode = IN_BF16; mode <= IN_FP8; mode++) total[mode] += kernels[k].ms[mode];
        }
        printf("| all | %.2f | %.2f |\n", total[IN_BF16], total[IN_FP8]);
        fflush(stdout);
    }
    ranks_close();
    return 0;
}
