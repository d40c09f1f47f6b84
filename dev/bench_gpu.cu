/*
bench_gpu.cu: how fast the GPU trainer is, where its time goes, and how far that is from what the card can do.
`make gpu` runs it; ./bench_gpu prints markdown; ./bench_gpu tiny takes seconds and shows only that it works.

For each model, in BF16 and in FP8: the largest batch that fits and divides a step of 524,288 tokens, whole
steps (batches, gradient norm, update) as graphs, the faster of two; then one batch and one update with an
event behind every kernel. FLOPs per token = 6 (12 L C^2 + Vp C) + 6 L C T. Tokens are random: the work does
not depend on them.
*/
#define US_NO_MAIN
#ifndef US_SOURCE
#define US_SOURCE "../train_us.cu"
#endif
#include US_SOURCE

typedef struct { const char* name; int layers, heads, width, seq; } BenchModel;
static const BenchModel MODELS[] = {{"124M", 12, 12, 768, 1024}, {"350M", 24, 16, 1024, 1024},
                                    {"774M", 36, 20, 1280, 1024}, {"1.5B", 48, 25, 1600, 1024},
                                    {"L4 C4096", 4, 32, 4096, 1024}};
static const BenchModel TINY[] = {{"tiny", 2, 2, 128, 64}};
static const char* const MODES[] = {"fp32", "bf16", "fp8"};
enum { IN_BF16 = 1, IN_FP8 };
static struct { const char* name; double ms[3]; } kernels[64];
static int num_kernels;

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

// The time between a kernel's event and the one before it, by name.
static void add_profile(int mode) {
    CUDA(cudaStreamSynchronize(stream));
    for (int i = 1; i < profile->n; i++) {
        float ms;
        int k = 0;
        CUDA(cudaEventElapsedTime(&ms, profile->event[i - 1], profile->event[i]));
        while (k < num_kernels && strcmp(kernels[k].name, profile->name[i]) != 0) k++;
        if (k == num_kernels) kernels[num_kernels++].name = profile->name[i];
        kernels[k].ms[mode] += ms;
    }
}

int main(int argc, char** argv) {
    const int tiny = argc > 1 && strcmp(argv[1], "tiny") == 0;
    const BenchModel* models = tiny ? TINY : MODELS;
    const int num_models = tiny ? 1 : (int)(sizeof MODELS / sizeof *MODELS);
    const long step_tokens = tiny ? 512 : 524288, n = tiny ? 128 : 8192;
    const size_t copy = tiny ? 1 << 20 : (size_t)1 << 30;
    static uint16_t text[1 << 21];
    Shard shard = {(const uint8_t*)text, 1 << 21, "random tokens"};
    Tokens tokens = {&shard, 1, 2, 1 << 21};
    Split split = {&tokens, 0, 1 << 21};
    cudaDeviceProp card;
    int runtime;
    const time_t now = time(NULL);
    char date[32];
    strftime(date, sizeof date, "%Y-%m-%d", gmtime(&now));
    for (long i = 0; i < 1 << 21; i++) text[i] = (uint16_t)(random_u64(1, 1, (uint64_t)i) % GPT2_VOCAB);
    CUDA(cudaGetDeviceProperties(&card, 0));
    CUDA(cudaRuntimeGetVersion(&runtime));
    const int native = card.major * 10 + card.minor >= 89;

    // The ceilings need a handle and a workspace, and no model.
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    LT(cublasLtCreate(&lt.handle));
    CUDA(cudaMalloc(&lt.workspace, WORKSPACE));
    const double bandwidth = copy_bandwidth(copy), bf16_rate = measure_product(CUDA_R_16BF, n);
    const double fp8_rate = native ? measure_product(CUDA_R_8F_E4M3, n) : 0;
    CUDA(cudaFree(lt.workspace));
    gpu_close(NULL);
    printf("## Speed on %s, %s, CUDA %d.%d\n\n", card.name, date, runtime / 1000, runtime % 1000 / 10);
    printf("Ceilings measured in this run: copy %.2f TB/s, %ld^3 products %.0f TFLOP/s in BF16",
           bandwidth * 1e-12, n, bf16_rate * 1e-12);
    if (native) printf(", %.0f in FP8 (fast accumulation)", fp8_rate * 1e-12);
    printf(
        ".\n\n| model | shape | precision | batch x accum | tokens/s | ms a step | of the BF16 ceiling | "
        "memory GB | "
        "fp8 / bf16 |\n|---|---|---|---|---|---|---|---|---|\n");

    static char rows[8][4096];
    for (int i = 0; i < num_models; i++) {
        double rate[3] = {0, 0, 0};
        num_kernels = 0;
        memset(kernels, 0, sizeof kernels);
        for (int mode = IN_BF16; mode <= IN_FP8; mode++) {
            char* none[] = {argv[0]};
            Config c;
            Model m;
            size_t free_bytes, total;
            config_parse(&c, 1, none, NULL);
            c.layers = models[i].layers, c.heads = models[i].heads, c.width = models[i].width,
            c.seq = models[i].seq;
            c.vocab = tiny ? BYTES_VOCAB : GPT2_VOCAB, c.precision = mode, c.steps = 100, c.batch = 1;
            c.tau = default_tau(c.layers);
            if (tiny) for (long k = 0; k < 1 << 21; k++) text[k] &= 255;
            // The largest batch: model_layout is enough to ask for it, but the precision has to be set.
            model_layout(&m, &c);
            gpu.is_fp8 = mode == IN_FP8, gpu.native = native, gpu.type = CUDA_R_16BF;
            float training;
            m.grads = &training;
            CUDA(cudaMemGetInfo(&free_bytes, &total));
            int most = largest_batch(&m, 0.97 * (double)free_bytes, 0);
            c.recompute = most == 0;
            if (!most) most = largest_batch(&m, 0.97 * (double)free_bytes, 1);
            free(m.tensors);
            memset(&gpu, 0, sizeof gpu);
            if (!most) {
                printf("| %s | | %s | does not fit | | | | | |\n", models[i].name, MODES[mode]);
                continue;
            }
            while (step_tokens % ((long)c.batch * 2 * c.seq) == 0 && c.batch * 2 <= most) c.batch *= 2;
            c.accum = (int)(step_tokens / ((long)c.batch * c.seq));
            model_layout(&m, &c);
            model_alloc_params(&m, 1);
            model_init(&m);
            gpu_open(&m);
            const int accum = m.c.accum;
            double best = 1e30, loss = 0;
            for (int step = 0; step < 4; step++) {  // launches, capture, and two whole steps
                m.c.accum = step < 2 ? 1 : accum;
                gpu.staged_at = -1;
                const double start = seconds();
                loss = gpu_step(&m, &split, 1e-4).loss;
                if (step >= 2) best = fmin(best, seconds() - start);
            }
            if (!isfinite(loss)) die("%s in %s: the loss is not finite", models[i].name, MODES[mode]);
            profile = (Profile*)calloc(1, sizeof *profile);
            m.c.accum = 1, gpu.staged_at = -1;
            launched("start");
            gpu_step(&m, &split, 1e-4);
            add_profile(mode);
            for (int k = 0; k < PROFILE_MAX; k++)
                if (profile->event[k]) CUDA(cudaEventDestroy(profile->event[k]));
            free(profile);
            profile = NULL;
            size_t left;
            CUDA(cudaMemGetInfo(&left, &total));
            rate[mode] = (double)step_tokens / best;
            printf("| %s | L%d H%d C%d T%d | %s | %d x %d%s | %.0f | %.1f | %.0f %% | %.1f | %s |\n",
                   models[i].name, c.layers, c.heads, c.width, c.seq, MODES[mode], c.batch, accum,
                   c.recompute ? ", recompute" : "", rate[mode], best * 1e3,
                   100 * rate[mode] * flops_per_token(&m) / bf16_rate, (double)(total - left) * 1e-9,
                   mode == IN_FP8 && rate[IN_BF16] > 0 ? form("%.2f", rate[IN_FP8] / rate[IN_BF16]) : "");
            fflush(stdout);
            gpu_close(&m), model_free(&m);
        }
        char* to = rows[i];
        to += sprintf(
            to,
            "\n%s, ms of one batch and one update, by kernel (launched one by one, so gaps count):\n\n"
            "| kernel | bf16 | fp8 |\n|---|---|---|\n",
            models[i].name);
        double total[3] = {0, 0, 0};
        for (int k = 0; k < num_kernels; k++) {
            to += sprintf(to, "| %s | %.2f | %.2f |\n", kernels[k].name, kernels[k].ms[IN_BF16],
                          kernels[k].ms[IN_FP8]);
            for (int mode = IN_BF16; mode <= IN_FP8; mode++) total[mode] += kernels[k].ms[mode];
        }
        sprintf(to, "| all | %.2f | %.2f |\n", total[IN_BF16], total[IN_FP8]);
    }
    for (int i = 0; i < num_models; i++) fputs(rows[i], stdout);
    return 0;
}
