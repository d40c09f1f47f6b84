// sizes.h: the models that bench_gpu.cu measures and probe_gpu.cu asks for. Included after the trainer.
#pragma once
typedef struct { const char* name; int layers, heads, width, seq, batch; } BenchModel;  // about what fits
static const BenchModel MODELS[] = {{"124M", 12, 12, 768, 1024, 64}, {"350M", 24, 16, 1024, 1024, 32},
                                    {"774M", 36, 20, 1280, 1024, 16}, {"1.5B", 48, 25, 1600, 1024, 8},
                                    {"L4 C4096", 4, 32, 4096, 1024, 8}};
enum { NUM_MODELS = sizeof MODELS / sizeof *MODELS, IN_BF16 = 1, IN_FP8 };

static Config config_of(const BenchModel* b, int mode, int vocab) {
    char name[] = "sizes", *none[] = {name};
    Config c;
    config_parse(&c, 1, none, NULL, 0);
    c.layers = b->layers, c.heads = b->heads, c.width = b->width, c.seq = b->seq, c.vocab = vocab;
    c.precision = mode, c.steps = 100, c.batch = b->batch, c.tau = default_tau(c.layers);
    return c;
}
