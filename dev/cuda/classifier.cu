/*
classifier.cu: softmax and cross-entropy of the head's logits, which become their own gradient.

  loss       l = log(sum_v e^z_v) - z_target                   z (N,Vp) BF16; l (N) FP32
  gradient   z_v <- e^z_v / sum - [v = target], in place; 0 in the padded columns V..Vp-1

Vp is V rounded up to 128, and e^z is taken of z less the row's maximum, so that nothing overflows. The mean's
1/N is left out: train_us.c says why (loss_forward_backward).

The floor. A logit is read once and written once, 4 bytes: 8192 rows of GPT-2's 50257 are 1.65 GB, 0.55 ms at
3 TB/s. But a row is needed three times, for its maximum, its sum and its gradient, and has 100 KB. Where the
second and the third time come from depends on how many rows are under way: an H100's L2 cache holds 500 of
them (50 MB), the shared memory of each of its 132 processors two.

The instructions count too. In those 0.55 ms the card issues 38 of them for each logit (132 x 4 x 32 a cycle,
1.7 GHz), and 5 of its special function units, which do 2^x and 1/x (132 x 16). A division is 8 instructions,
one of them special, and a branch; the comparison of a 64-bit column with V is 4.
*/
#include "bench.h"

static long N, V, Vp;
static Array *logits, *targets, *losses;
static float* probabilities;  // (N,V), between the kernels of version 1

// ---- 1. A kernel a formula --------------------------------------------------------------------------------
// Softmax, its logarithm at the target, and the difference; the probabilities lie in memory, in FP32: 6
// bytes a logit are read and 4 written, then 4 read and 2 written, 16. A thread has a row, so a warp
// reads 2 bytes of each of 32 rows, 16 times the bytes unless the sectors of 32 stay in the L1 cache for
// 16 steps.
static __global__ void softmax_row(float* p, const bf16* logits, long N, long V, long Vp) {
    const long n = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    const bf16* z = logits + n * Vp;
    float max = -INFINITY, sum = 0;
    for (long v = 0; v < V; v++) max = fmaxf(max, (float)z[v]);
    for (long v = 0; v < V; v++) sum += fast_exp((float)z[v] - max);
    for (long v = 0; v < V; v++) p[n * V + v] = fast_exp((float)z[v] - max) / sum;
}
static __global__ void loss_row(float* losses, const float* p, const int* targets, long N, long V) {
    const long n = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) losses[n] = -logf(p[n * V + targets[n]]);
}
static __global__ void gradient_value(bf16* logits, const float* p, const int* targets, long N, long V,
                                      long Vp) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x, n = i / Vp, v = i % Vp;
    if (n >= N) return;
    logits[i] = (bf16)(v < V ? p[n * V + v] - (v == targets[n] ? 1.0f : 0.0f) : 0.0f);
}
static void run1(void) {
    const unsigned rows = (unsigned)div_up(N, 32), values = (unsigned)div_up(N * Vp, THREADS);
    softmax_row<<<rows, 32, 0, stream>>>(probabilities, at<bf16>(logits), N, V, Vp);
    launched("softmax");
    loss_row<<<rows, 32, 0, stream>>>(at<float>(losses), probabilities, at<int>(targets), N, V);
    launched("loss");
    gradient_value<<<values, THREADS, 0, stream>>>(at<bf16>(logits), probabilities, at<int>(targets), N, V,
                                                   Vp);
    launched("gradient");
}

// ---- 2. A block a row, and no probabilities in memory -----------------------------------------------------
// They are computed again where they are used, for 8 bytes there and back cost more than e^x. Neighbours
// read side by side, 2 bytes a thread. Three reads and a write, 8 bytes a logit: with 8 blocks a
// processor 1056 rows are under way, twice what the L2 cache holds.
static __global__ void __launch_bounds__(THREADS)
loss_block(float* losses, bf16* logits, const int* targets, long V, long Vp) {
    __shared__ float shared[32];
    bf16* z = logits + (long)blockIdx.x * Vp;
    const int target = targets[blockIdx.x];
    float max = -INFINITY, sum = 0;
    for (long v = threadIdx.x; v < V; v += THREADS) max = fmaxf(max, (float)z[v]);
    max = block_max(max, shared);
    for (long v = threadIdx.x; v < V; v += THREADS) sum += fast_exp((float)z[v] - max);
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + max - (float)z[target];
    __syncthreads();  // the target's logit is read before anyone writes
    for (long v = threadIdx.x; v < Vp; v += THREADS)
        z[v] = (bf16)(v < V ? fast_exp((float)z[v] - max) / sum - (v == target ? 1.0f : 0.0f) : 0.0f);
}
static void run2(void) {
    loss_block<<<(unsigned)N, THREADS, 0, stream>>>(at<float>(losses), at<bf16>(logits), at<int>(targets), V,
                                                    Vp);
    launched("loss");
}

// ---- 3. Maximum and sum in one pass, 16 bytes at a time ---------------------------------------------------
// Each thread keeps the sum for the largest logit that it has seen, and scales it when a larger one comes
// (Milakov, Gimelshein 2018, arXiv 1805.02867): two reads and a write. With 36 registers 3 blocks of 512
// threads are on a processor, 396 rows or 40 MB: they and what is being written just fit the L2 cache, or
// just do not, and a logit moves 4 or 6 bytes of DRAM. nvcc's code is some 60 instructions a logit (two
// powers, a division, three comparisons of columns): more than memory leaves time for.
static __global__ void __launch_bounds__(512)
loss_online(float* losses, bf16* logits, const int* targets, long V, long Vp) {
    enum { P = Pack<bf16>::N };
    __shared__ float shared[32];
    bf16* z = logits + (long)blockIdx.x * Vp;
    const int target = targets[blockIdx.x];
    float max = -INFINITY, sum = 0;
    for (long v = (long)threadIdx.x * P; v < V; v += (long)blockDim.x * P) {
        const Pack<bf16> p = *(const Pack<bf16>*)(z + v);
        float most = max;
        for (int i = 0; i < P && v + i < V; i++) most = fmaxf(most, (float)p.v[i]);
        if (most > max) sum *= fast_exp(max - most);
        for (int i = 0; i < P && v + i < V; i++) sum += fast_exp((float)p.v[i] - most);
        max = most;
    }
    const float most = block_max(max, shared);
    sum = block_sum(max == most ? sum : sum * fast_exp(max - most), shared);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + most - (float)z[target];
    __syncthreads();
    for (long v = (long)threadIdx.x * P; v < Vp; v += (long)blockDim.x * P) {
        Pack<bf16> p = *(const Pack<bf16>*)(z + v);
        for (int i = 0; i < P; i++)
            p.v[i] = (bf16)(v + i < V ? fast_exp((float)p.v[i] - most) / sum - (v + i == target ? 1.0f : 0.0f)
                                      : 0.0f);
        *(Pack<bf16>*)(z + v) = p;
    }
}
static void run3(void) {
    loss_online<<<(unsigned)N, 512, 0, stream>>>(at<float>(losses), at<bf16>(logits), at<int>(targets), V,
                                                 Vp);
    launched("loss");
}

// ---- 4. The row stays on the chip -------------------------------------------------------------------------
// It is copied to shared memory once, all of it requested before any of it is used; the three passes are over
// the copy: 4 bytes a logit, the floor. A thread reads only what it copied, so the passes need no barriers
// but those of the maximum and the sum. Instructions go, as in version 5: one reciprocal a row, e^x as a
// power of 2, -inf in the padded columns in place of comparisons. Two things decide: two rows a processor
// must keep memory busy although each loads, computes and stores in turn; and a row must fit, which on an
// H100 are 116,000 columns, elsewhere fewer.
static __global__ void __launch_bounds__(512)
loss_on_chip(float* losses, bf16* logits, const int* targets, long V, long Vp) {
    extern __shared__ __align__(16) bf16 shared[];
    __shared__ float parts[32];
    enum { P = Pack<bf16>::N };
    bf16* z = logits + (long)blockIdx.x * Vp;
    const int target = targets[blockIdx.x], first = (int)threadIdx.x * P, step = (int)blockDim.x * P;
    for (int v = first; v < Vp; v += step) copy_async<16>(shared + v, z + v, true);
    copy_wait();
    float max = -INFINITY, sum = 0;
    for (int v = first; v < Vp; v += step) {
        if (v + P > V)
            for (int i = 0; i < P; i++) if (v + i >= V) shared[v + i] = (bf16)-INFINITY;
        const Pack<bf16> p = *(const Pack<bf16>*)(shared + v);
        #pragma unroll
        for (int i = 0; i < P; i++) max = fmaxf(max, (float)p.v[i]);
    }
    max = block_max(max, parts);
    const float shift = max * LOG2E;
    for (int v = first; v < Vp; v += step) {
        const Pack<bf16> p = *(const Pack<bf16>*)(shared + v);
        #pragma unroll
        for (int i = 0; i < P; i++) sum += exp2_fast(fmaf((float)p.v[i], LOG2E, -shift));
    }
    sum = block_sum(sum, parts);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + max - (float)shared[target];
    const float factor = 1.0f / sum;
    for (int v = first; v < Vp; v += step) {
        const Pack<bf16> p = *(const Pack<bf16>*)(shared + v);
        float e[P];
        #pragma unroll
        for (int i = 0; i < P; i++) e[i] = factor * exp2_fast(fmaf((float)p.v[i], LOG2E, -shift));
        store_bits(z + v, make_uint4(pack_bf16(e[0], e[1]), pack_bf16(e[2], e[3]), pack_bf16(e[4], e[5]),
                                     pack_bf16(e[6], e[7])));
    }
    if (target / P % blockDim.x == threadIdx.x)  // its own pack: written just before
        z[target] = (bf16)(factor * exp2_fast(fmaf((float)shared[target], LOG2E, -shift)) - 1.0f);
}
static long bytes_of_row(void) { return Vp * (long)sizeof(bf16); }
static void run4(void) {
    const int bytes = (int)bytes_of_row(), threads = (int)min_l(512, div_up(Vp, 256) * 32);
    CUDA(cudaFuncSetAttribute(loss_on_chip, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    loss_on_chip<<<(unsigned)N, threads, bytes, stream>>>(at<float>(losses), at<bf16>(logits),
                                                          at<int>(targets), V, Vp);
    launched("loss");
}

// ---- 5. train_us.cu's: version 3 in 17 instructions a logit -----------------------------------------------
// What version 4 does to the passes, done to version 3's: any V, and no limit by shared memory. And blocks of
// 1024 threads: two rows a processor are under way, 26 MB, so that the second reading finds them in the L2
// cache.
static void run5(void) {
    launch_loss<bf16>(at<float>(losses), at<bf16>(logits), at<int>(targets), 1, 1.0f, N, V, Vp);
}

static void open_loss(const long* shape) {
    N = shape[0], V = shape[1], Vp = div_up(V, 128) * 128;
    int* columns = (int*)alloc((double)(N * (long)sizeof(int)));
    logits = updated("logits", BF16, N * Vp, 1.0f, 1, 0.002);
    for (long i = 0; i < N * Vp;
         i++)  // rows whose e^z is too large for FP32, and rows that one column dominates
        if (i / Vp % 3) logits->value[i] = 8 * logits->value[i] + (i / Vp % 3 == 1 ? 200.0f : -200.0f);
    encode(logits);
    memcpy(logits->want, logits->value, sizeof(float) * (size_t)(N * Vp));
    for (long n = 0; n < N; n++) columns[n] = (int)(float_bits(logits->value[n * Vp]) / 65536 * 7919 % V);
    columns[N / 2] = 0, columns[0] = (int)V - 1;
    targets = input_bytes("targets", columns, N * (long)sizeof(int));
    // A GPU's e^x is good to 2 + 1.2 |x| units, a loss is a difference of numbers some times its size, and
    // the sum of V terms one by one is off by some part of sqrt(V): 31 units were seen at V = 50257.
    losses = output("losses", FP32, N, 16 + sqrt((double)V) / 4, 1);
    loss_forward_backward(losses->want, logits->want, columns, 1, 1.0f, N, V, Vp, BF16);
    for (long n = 0; n < N; n++)  // the reference leaves the padded columns as they were
        for (long v = V; v < Vp; v++) logits->want[n * Vp + v] = 0;
    probabilities = (float*)work_space(sizeof(float) * (size_t)(N * V));
    free(columns);
}

static const Version VERSIONS[] = {
    {"a kernel a formula, a thread a row", run1, "softmax_row loss_row gradient_value"},
    {"a block a row; no probabilities in memory", run2, "loss_block"},
    {"maximum and sum in one pass, 16 bytes at a time", run3, "loss_online"},
    {"candidate: the row stays in shared memory", run4, "loss_on_chip", 0, bytes_of_row},
    {"as 3, in a third of its instructions", run5, "loss_kernel"},
    {}};
static const Kernel KERNELS[] = {
    {"classifier", "N V", open_loss, VERSIONS, {{1, 5}, {9, 31}, {5, 128}, {6, 1003}, {3, 4300}},
     {{8192, 50257}}},
};
int main(int argc, char** argv) { return lab(argc, argv, "classifier", KERNELS); }
