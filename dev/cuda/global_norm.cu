/*
global_norm.cu: the norm of all gradients, and which tensor is the first with a value that is not finite.

  norm^2 = sum over all tensors of g^2; a step with a value that is not finite must change nothing, and say
  where

g is FP32, all tensors in one allocation with gaps between them (a table says where each begins). The sum is
in double: 162 M squares in FP32 would lose their last digits one by one.

The floor. 4 bytes for each gradient, once: 0.65 GB for the 162 M of GPT-2's smallest shape with a head of its
own, 0.22 ms at 3 TB/s; two operations each. It is run once a step, so what counts more is that its result is
the same in every run: a float sum by atomics is not, since blocks end in any order.
*/
#include "bench.h"

static Model model;
static Array *g, *chunk_table, *norm2, *bad;
static Result* result;
static double* sums;
static int num_chunks, planted;  // planted: the tensor that has an infinity, or -1

// ---- 1. A block a tensor ----------------------------------------------------------------------------------
// As one would write it first. One block has all of the embedding, a quarter of all: the rest of the card
// waits for it.
static __global__ void __launch_bounds__(THREADS) tensor_sum(double* sum, const float* g, long n) {
    __shared__ double shared[32];
    double s = 0;
    for (long i = threadIdx.x; i < n; i += THREADS) s += (double)g[i] * g[i];
    s = block_sum(s, shared);
    if (threadIdx.x == 0) *sum = s;
}
static __global__ void add_tensors(Result* r, const double* sums, int tensors) {
    r->norm2 = 0, r->bad = -1;
    for (int i = 0; i < tensors; i++) {
        if (!isfinite(sums[i]) && r->bad < 0) r->bad = i;
        r->norm2 += sums[i];
    }
}
static void run1(void) {
    for (int i = 0; i < model.num_tensors; i++) {
        const Tensor* t = &model.tensors[i];
        tensor_sum<<<1, THREADS, 0, stream>>>(sums + i, at<float>(g) + t->offset, t->rows * t->cols);
        launched("sums of tensors");
    }
    add_tensors<<<1, 1, 0, stream>>>(result, sums, model.num_tensors);
    launched("sum");
}

// ---- 2. All of the card, and an atomic sum ----------------------------------------------------------------
// Blocks share all values (the gaps are zero), 16 a thread at a time, and add what they have to one float.
// Fast and short, and the last digits change from run to run; and nobody knows which tensor an infinity was
// in.
static __global__ void __launch_bounds__(THREADS) atomic_sum(float* sum, const float* g, long n) {
    __shared__ float shared[32];
    float s = 0;
    for (long i = ((long)blockIdx.x * THREADS + threadIdx.x) * 16; i < n;
         i += (long)gridDim.x * THREADS * 16) {
        float v[16];
        load16(v, g + i);
        for (int k = 0; k < 16; k++) s += v[k] * v[k];
    }
    s = block_sum(s, shared);
    if (threadIdx.x == 0) atomicAdd(sum, s);
}
static __global__ void atomic_result(Result* r, const float* sum) {
    r->norm2 = *sum, r->bad = isfinite(*sum) ? -1 : 0;
}
static void run2(void) {
    CUDA(cudaMemsetAsync(sums, 0, sizeof(float), stream));
    atomic_sum<<<528, THREADS, 0, stream>>>((float*)sums, at<float>(g), model.num_params);
    launched("atomic sum");
    atomic_result<<<1, 1, 0, stream>>>(result, (float*)sums);
    launched("result");
}

// ---- 3. train_us.cu's: chunks that never span two tensors -------------------------------------------------
// A block for each 65,536 values of a tensor, then one block that adds the blocks' sums in their order: the
// same bits in every run, and the chunk that is not finite knows its tensor.
static void run3(void) {
    CUDA(cudaMemsetAsync(result, 0, sizeof(Result), stream));  // as a step begins: it has the loss too
    launch_gradient_norm(result, sums, at<float>(g), at<Chunk>(chunk_table), num_chunks);
}

// What the check looks at. (That of a norm which is not finite: the tensor only.)
static __global__ void read_result(float* norm2, float* bad, const Result* r) {
    if (isfinite(r->norm2)) *norm2 = (float)r->norm2;
    *bad = (float)r->bad;
}
static void collect(void) {
    read_result<<<1, 1, 0, stream>>>(at<float>(norm2), at<float>(bad), result);
    launched("read");
}
static void expect(int version) { bad->want[0] = version == 2 && planted >= 0 ? 0 : (float)planted; }

static void open_case(const long* shape) {
    char name[] = "global_norm", *none[] = {name};
    Config c;
    const Tensor* first_bad;
    config_parse(&c, 1, none, NULL, 0);
    c.layers = (int)shape[0], c.width = (int)shape[1], c.vocab = (int)shape[2], planted = (int)shape[3];
    free(model.tensors);
    model_layout(&model, &c);
    g = input("gradients", FP32, model.num_params, 1.0f);
    for (int i = 0; i < model.num_tensors; i++) {
        const long end = model.tensors[i].offset + model.tensors[i].rows * model.tensors[i].cols;
        for (long k = end; k % 256; k++) g->value[k] = 0;  // gaps, as in training
    }
    if (planted >= 0) {
        const Tensor* t = &model.tensors[planted];
        g->value[t->offset + t->rows * t->cols - 1] = -INFINITY;
        g->value[model.tensors[model.num_tensors - 1].offset] = NAN;  // a later one is not the first
    }
    encode(g);
    Chunk* chunks = chunks_of(&model, &num_chunks);
    chunk_table = input_bytes("chunks", chunks, (long)sizeof(Chunk) * num_chunks);
    free(chunks);
    // FP32 sums of some 1,200 squares a thread in version 2, and of 528 blocks
    norm2 = output("norm squared", FP32, 1, 64, 1);
    bad = output("first bad tensor", FP32, 1, 0, 0);
    model.grads = g->value;
    const double norm = gradient_norm(&model, &first_bad) * model.grad_scale;
    norm2->want[0] = planted < 0 ? (float)(norm * norm) : NAN;
    if (first_bad != (planted < 0 ? NULL : &model.tensors[planted]))
        die("the reference found another tensor");
    model.grads = NULL;
    sums = (double*)work_space(sizeof(double) * (size_t)(num_chunks + model.num_tensors));
    result = (Result*)work_space(sizeof(Result));
}

static const Version VERSIONS[] = {
    {"a block a tensor", run1, "tensor_sum add_tensors"},
    {"all of the card, an atomic sum: not deterministic", run2, "atomic_sum atomic_result"},
    {"blocks' sums of chunks, added in order", run3, "norm_chunk_kernel result_kernel"},
    {}};
static const Kernel KERNELS[] = {
    {"gradient norm", "L C V infinity-in-tensor", open_case, VERSIONS,
     {{1, 64, 77, -1}, {2, 80, 256, -1}, {2, 80, 256, 9}, {2, 80, 256, 20}}, {{12, 768, 50257, -1}},
     0, expect, collect},
};
int main(int argc, char** argv) { return lab(argc, argv, "global_norm", KERNELS); }
