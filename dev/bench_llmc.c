/*
bench_llmc.c: tokens/s of llm.c's train_gpt2.c, the fastest of its steps in SECONDS, with random weights:
  make out/bench_llmc LLMC=DIR && out/bench_llmc "L4 H4 C256 T256 B4 V256" SECONDS
DIR is a checkout of https://github.com/karpathy/llm.c, whose own Makefile builds this. `make bench LLMC=DIR`
has it take turns with ours (bench_torch.py). GPT-2's head is its embedding: V C parameters less to update.
*/
#define TESTING  // leaves out its main
#include "train_gpt2.c"

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(int argc, char** argv) {
    static GPT2 model;  // zeros, as gpt2_build_from_checkpoint leaves what it does not read
    GPT2Config* c = &model.config;
    int B, T;
    if (argc != 3 || sscanf(argv[1], "L%d H%d C%d T%d B%d V%d", &c->num_layers, &c->num_heads, &c->channels,
                            &T, &B, &c->vocab_size) != 6) {
        fprintf(stderr, "bench_llmc \"L4 H4 C256 T256 B4 V256\" SECONDS\n");
        return 1;
    }
    c->max_seq_len = T;
    c->padded_vocab_size = (c->vocab_size + 127) / 128 * 128;
    fill_in_parameter_sizes(model.param_sizes, *c);
    float* w = model.params_memory = malloc_and_point_parameters(&model.params, model.param_sizes);
    srand(1);
    for (int i = 0; i < NUM_PARAMETER_TENSORS; i++) {
        const int gain = i == 2 || i == 8 || i == 14;  // ln1w, ln2w, lnfw
        model.num_parameters += model.param_sizes[i];
        for (size_t k = 0; k < model.param_sizes[i]; k++)
            *w++ = gain ? 1.0f : 0.04f * ((float)rand() / (float)RAND_MAX - 0.5f);
    }
    int* tokens = (int*)mallocCheck(2 * (size_t)(B * T) * sizeof(int));
    for (int i = 0; i < 2 * B * T; i++) tokens[i] = rand() % c->vocab_size;

    double best = 1e30;
    const double start = seconds();
    for (int n = 1; n <= 2 || seconds() - start < atof(argv[2]); n++) {  // the first also allocates
        const double t = seconds();
        gpt2_forward(&model, tokens, tokens + B * T, B, T);
        gpt2_zero_grad(&model);
        gpt2_backward(&model);
        gpt2_update(&model, 1e-4f, 0.9f, 0.999f, 1e-8f, 0.0f, n);
        best = fmin(best, seconds() - t);
    }
    printf("%.1f\n", B * T / best);
    return 0;
}
