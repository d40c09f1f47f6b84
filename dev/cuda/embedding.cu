/*
embedding.cu: tokens become the stream, and the stream's gradient goes back to the tables.

  forward    x = s (wte[token] + wpe[position])        tokens (N); wte (V,C), wpe (T,C), x (N,C) BF16, and
             its E4M3 codes, (N,C) and (C,Np); s = 1/sqrt(2)
  backward   dwte[token] += s dx,  dwpe[position] += s dx                          dx (N,C) BF16; dwte, dwpe
             FP32

The floor. Forward reads a row of C values for each token that occurs, once if it stays in the cache, and
writes 4 bytes a value. Backward reads dx once and reads and writes the rows of the tokens that occur. Here
tokens are distributed as words are (Zipf: the k-th most frequent has a share of 1 / (k ln V)), so one token
is a fifteenth of the text: many rows of dx go to one row of dwte, and backward is about in which order they
are added.
*/
#include "steps.h"

static long N, T, C, V;
static const float S = 0.70710678f;
static Array *tokens, *order, *starts, *wte, *wpe, *x, *codes, *codes_t, *dx, *dwte, *dwpe;

// ---- Forward 1. A thread a value; cast and transposition apart --------------------------------------------
static __global__ void forward_value(bf16* x, const int* tokens, const bf16* wte, const bf16* wpe, long N,
                                     long T, long C) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x, n = i / C, c = i % C;
    if (n >= N) return;
    const float e = (float)wte[tokens[n] * C + c], p = (float)wpe[n % T * C + c];
    x[i] = (bf16)((e + p) * S);
}
static void forward1(void) {
    forward_value<<<blocks(N * C, THREADS), THREADS, 0, stream>>>(
        at<bf16>(x), at<int>(tokens), at<bf16>(wte), at<bf16>(wpe), N, T, C);
    launched("embedding");
    launch_cast_value(at<fp8>(codes), at<bf16>(x), E4M3, N * C);
    launch_transpose_value(at<fp8>(codes_t), at<fp8>(codes), N, C);
}

// ---- Forward 2. Sixteen values a thread, and their codes --------------------------------------------------
// One division for 16 values, loads and stores of 16 bytes; the stream is not read again for the cast.
static __global__ void forward_codes(bf16* x, fp8* q, const int* tokens, const bf16* wte, const bf16* wpe,
                                     long N, long T, long C) {
    const long i = ((long)blockIdx.x * blockDim.x + threadIdx.x) * 16, n = i / C, c = i % C;
    float e[16], p[16];
    if (n >= N) return;
    load16(e, wte + tokens[n] * C + c);
    load16(p, wpe + n % T * C + c);
    #pragma unroll
    for (int k = 0; k < 16; k++) e[k] = round_s<bf16>((e[k] + p[k]) * S);
    store16(x + i, e);
    store_fp8(q + i, e, E4M3);
}
static void forward2(void) {
    forward_codes<<<blocks(N * C, 16 * THREADS), THREADS, 0, stream>>>(
        at<bf16>(x), at<fp8>(codes), at<int>(tokens), at<bf16>(wte), at<bf16>(wpe), N, T, C);
    launched("embedding");
    launch_transpose_tile(at<fp8>(codes_t), at<fp8>(codes), N, C);
}

// ---- Forward 3. train_us.cu's: both layouts from the tile -------------------------------------------------
static void forward3(void) {
    launch_embedding_forward<bf16>(dest(x, codes, codes_t, N, C, E4M3), at<int>(tokens), at<bf16>(wte),
                                   at<bf16>(wpe), S, N, T, C);
}

// ---- Backward 1. Atomic sums ------------------------------------------------------------------------------
// Shortest, and in step with nothing: the order of additions, and with it the last bits, change from run to
// run. A frequent token's row is one place in memory that all threads want.
static __global__ void backward_atomic(float* dwte, float* dwpe, const bf16* dx, const int* tokens, long N,
                                       long T, long C) {
    const long i = (long)blockIdx.x * blockDim.x + threadIdx.x, n = i / C, c = i % C;
    if (n >= N) return;
    const float d = S * (float)dx[i];
    atomicAdd(&dwte[tokens[n] * C + c], d);
    atomicAdd(&dwpe[n % T * C + c], d);
}
static void backward1(void) {
    backward_atomic<<<blocks(N * C, THREADS), THREADS, 0, stream>>>(
        at<float>(dwte), at<float>(dwpe), at<bf16>(dx), at<int>(tokens), N, T, C);
    launched("atomic sums");
}

// ---- Backward 2. A thread a column ------------------------------------------------------------------------
// As train_us.c has it: each column is walked from the first row to the last, always in the same order. C
// threads are few (768 of the 270,000 that an H100 holds), and each waits for memory twice a row.
static __global__ void backward_column(float* dwte, float* dwpe, const bf16* dx, const int* tokens, long N,
                                       long T, long C) {
    const long c = (long)blockIdx.x * blockDim.x + threadIdx.x;
    for (long n = 0; n < N && c < C; n++) {
        const float d = S * (float)dx[n * C + c];
        dwte[tokens[n] * C + c] += d;
        dwpe[n % T * C + c] += d;
    }
}
static void backward2(void) {
    backward_column<<<blocks(C, 32), 32, 0, stream>>>(at<float>(dwte), at<float>(dwpe),
                                                                at<bf16>(dx), at<int>(tokens), N, T, C);
    launched("columns");
}

// ---- Backward 3. Candidate: 32 sorted rows a block --------------------------------------------------------
// The host has sorted the rows by token. Version 4 gives a block to each token, so the most frequent one, a
// fifteenth of all rows, is one block's work while most blocks have none. Here every block has 32 rows of the
// sorted order. Sums of tokens that lie within it are finished; of the first and last token, which may go on
// in other blocks, it leaves a part each, and the block in which a token begins adds its parts, in order.
// What decides: whether the longest token or the second kernel takes longer.
enum { RUN = 32 };
static float* parts;  // (blocks,2,C): of the token that began before, of the token that goes on after
static __global__ void backward_runs(float* dwte, float* parts, const bf16* dx, const int* tokens,
                                     const int* order, const int* starts, long N, long C) {
    const long c = ((long)blockIdx.y * blockDim.x + threadIdx.x) * 2;
    const int first = (int)blockIdx.x * RUN, last = (int)min((long)first + RUN, N);
    if (c >= C) return;
    for (int i = first; i < last;) {
        const int token = tokens[order[i]], end = min(starts[token + 1], last);
        const bool before = starts[token] < first, after = starts[token + 1] > last;
        float sum0 = 0, sum1 = 0;
        for (; i < end; i++) {
            const __nv_bfloat162 d = *(const __nv_bfloat162*)(dx + order[i] * C + c);
            sum0 += S * (float)d.x, sum1 += S * (float)d.y;
        }
        float* to = before || after ? parts + (2L * blockIdx.x + !before) * C + c : dwte + token * C + c;
        if (before || after) to[0] = sum0, to[1] = sum1;
        else to[0] += sum0, to[1] += sum1;
    }
}
static __global__ void backward_join(float* dwte, const float* parts, const int* tokens, const int* order,
                                     const int* starts, long N, long C) {
    const long c = (long)blockIdx.y * blockDim.x + threadIdx.x, last = min((blockIdx.x + 1L) * RUN, N);
    const int token = tokens[order[last - 1]];
    if (c >= C || starts[token + 1] <= last || starts[token] < (long)blockIdx.x * RUN)
        return;  // begins elsewhere
    float sum = parts[(2L * blockIdx.x + 1) * C + c];
    for (long k = blockIdx.x + 1; k * RUN < starts[token + 1]; k++) sum += parts[2 * k * C + c];
    dwte[token * C + c] += sum;
}
static void backward3(void) {
    const unsigned grid = blocks(N, RUN);
    const dim3 runs(grid, (unsigned)div_up(C, 2 * 128)), joins(grid, (unsigned)div_up(C, 128));
    backward_runs<<<runs, 128, 0, stream>>>(at<float>(dwte), parts, at<bf16>(dx), at<int>(tokens),
                                            at<int>(order), at<int>(starts), N, C);
    launched("runs");
    backward_join<<<joins, 128, 0, stream>>>(at<float>(dwte), parts, at<int>(tokens), at<int>(order),
                                             at<int>(starts), N, C);
    launched("join");
    position_backward_kernel<bf16><<<blocks(T * C, 16 * THREADS), THREADS, 0, stream>>>(
        at<float>(dwpe), at<bf16>(dx), S, N / T, T, C);
    launched("positions");
}

// ---- Backward 4. train_us.cu's: a block a token -----------------------------------------------------------
// The host has sorted the rows by token (it is idle while the GPU works), so a block knows its rows. No
// atomics; dwpe is a kernel of its own.
static void backward4(void) {
    launch_embedding_backward<bf16>(at<float>(dwte), at<float>(dwpe), at<bf16>(dx), at<int>(order),
                                    at<int>(starts), S, N / T, T, C, V);
}

// Tokens as words are distributed, and their rows sorted by token.
static const int* open_tokens(const long* shape) {
    static uint64_t seed;
    static int* t;
    T = shape[1], N = shape[0] * T, C = shape[2], V = shape[3];
    free(t);
    t = (int*)alloc(4.0 * (double)(2 * N + V + 1));
    seed++;
    for (long n = 0; n < N; n++)
        t[n] = (int)min_l(V, (long)exp(random_uniform(seed, 3, (uint64_t)n) * log((double)V + 1))) - 1;
    sort_by_token(t + N, t + 2 * N, t, N, V);
    tokens = input_bytes("tokens", t, 4 * N);
    order = input_bytes("order", t + N, 4 * N);
    starts = input_bytes("starts", t + 2 * N, 4 * (V + 1));
    return t;
}
static double rows_that_occur(const int* t) {
    double rows = 0;
    for (long v = 0; v < V; v++) rows += t[2 * N + v] < t[2 * N + v + 1];
    return rows;
}
static void open_forward(const long* shape) {
    const int* t = open_tokens(shape);
    wte = input("wte", BF16, V * C, 1.0f);
    wpe = input("wpe", BF16, T * C, 1.0f);
    x = output("x", BF16, N * C, 0, 0);  // a sum and a product: every bit is the same
    embedding_forward(x->want, t, wte->value, wpe->value, S, N / T, 0, T, C, BF16);
    output_codes(&codes, &codes_t, x->want, N, C, E4M3, 0);
    floor_bytes = 4.0 * (double)(N + N * C) + 2.0 * (rows_that_occur(t) + (double)T) * (double)C;
}
static void open_backward(const long* shape) {
    const int* t = open_tokens(shape);
    dx = input("dx", BF16, N * C, 1.0f);
    // FP32 sums of up to N/15 terms, in another order than the reference's: 5267 units were seen at N = 8192
    dwte = updated("dwte", FP32, V * C, 1.0f, 128 * sqrt((double)N), 1);
    dwpe = updated("dwpe", FP32, T * C, 1.0f, 128 * sqrt((double)N), 1);
    embedding_backward(dwte->want, dwpe->want, dx->value, t, S, N / T, T, C);
    parts = (float*)work_space(sizeof(float) * (size_t)(2 * div_up(N, RUN) * C));
    floor_bytes =
        2.0 * (double)(N * C) + 8.0 * (double)C * ((double)T + rows_that_occur(t)) + 4.0 * (double)N;
}

static const Version FORWARD[] = {
    {"a thread a value; cast and transposition apart", forward1, "forward_value cast_value transpose_value"},
    {"16 values a thread, cast where they are made", forward2, "forward_codes transpose_tile"},
    {"one kernel writes both layouts", forward3, "embedding_forward_kernel"},
    {}};
static const Version BACKWARD[] = {
    {"atomic sums: not deterministic", backward1, "backward_atomic"},
    {"a thread a column walks all rows", backward2, "backward_column"},
    {"candidate: 32 sorted rows a block", backward3, "backward_runs backward_join position_backward_kernel"},
    {"rows sorted by token, a block a token", backward4,
     "embedding_backward_kernel position_backward_kernel"},
    {}};
static const Kernel KERNELS[] = {
    {"embedding forward", "B T C V", open_forward, FORWARD,
     {{1, 1, 16, 5}, {2, 35, 80, 77}, {1, 130, 208, 300}}, {{16, 1024, 768, 50257}, {8, 1024, 1600, 50257}}},
    {"embedding backward", "B T C V", open_backward, BACKWARD,
     {{1, 1, 16, 5}, {2, 35, 80, 77}, {1, 130, 208, 300}, {2, 70, 272, 2}, {1, 64, 16, 1}, {2, 64, 32, 2}},
     {{16, 1024, 768, 50257}, {8, 1024, 1600, 50257}}},
};
int main(int argc, char** argv) { return lab(argc, argv, "embedding", KERNELS); }
