/*
probe_gpu.cu: what cuBLASLt proposes for every product of the trainer, in BF16 and in FP8, at five sizes of
model and a few odd ones. Nothing is trained or even multiplied: it is asked, and the answer checked by
AlgoCheck. `make gpu_probe` runs it. A product that is refused has a row that says so; the exit status is 1.

A proposal's tile and stages are cuBLASLt's names (a tile of the output; k of a stage x stages). align: what
the algorithm needs of its pointers, in bytes; ours have 256, or what is written beside it.
*/
#ifndef US_SOURCE
#define US_SOURCE "../train_us.cu"
#endif
#define US_NO_MAIN
#include US_SOURCE
#include "sizes.h"

static const BenchModel ODD[] = {{"bytes", 4, 4, 128, 128, 8},      {"N 70", 2, 2, 128, 70, 1},
                                 {"N 66, C 320", 1, 5, 320, 33, 2}, {"N 17, C 208", 1, 13, 208, 17, 1}};
enum { NUM_ODD = sizeof ODD / sizeof *ODD, MOST = 8 };
typedef struct { int id; const char* name; } Name;
#ifdef __CUDACC__
static const Name TILES[] = {
#include "../out/tiles.h"  // from the toolkit's cublasLt.h
    {0, "?"}};
static const Name STAGES[] = {
#include "../out/stages.h"
    {0, "?"}};
#else
static const Name TILES[] = {{0, "?"}}, STAGES[] = {{0, "?"}};
#endif
static const char* named(const Name* names, uint32_t id) {
    while (names->id && names->id != (int)id) names++;
    return names->id ? names->name : form("%u", id);
}
static char where[64];  // size and precision
static int refused, asked;

static uint32_t setting_of(const cublasLtMatmulAlgo_t* algo, cublasLtMatmulAlgoConfigAttributes_t what) {
    uint32_t value = 0;
    size_t written;
    LT(cublasLtMatmulAlgoConfigGetAttribute(algo, what, &value, sizeof value, &written));
    return value;
}
static uint32_t needs(const cublasLtMatmulAlgo_t* algo) {  // the largest alignment of its four pointers
    const cublasLtMatmulAlgoCapAttributes_t of[] = {
        CUBLASLT_ALGO_CAP_MIN_ALIGNMENT_A_BYTES, CUBLASLT_ALGO_CAP_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_ALGO_CAP_MIN_ALIGNMENT_C_BYTES, CUBLASLT_ALGO_CAP_MIN_ALIGNMENT_D_BYTES};
    uint32_t most = 0, value;
    size_t written;
    for (int i = 0; i < 4; i++) {
        LT(cublasLtMatmulAlgoCapGetAttribute(algo, of[i], &value, sizeof value, &written));
        if (value > most) most = value;
    }
    return most;
}
// gemm() comes here instead of multiplying.
static void ask(const char* name, const Shape* s) {
    cublasLtMatmulHeuristicResult_t found[MOST], checked;
    Product p;
    int n = 0;
    product_open(&p, s);
    const cublasStatus_t status = proposals(&p, found, MOST, &n);
    asked++;
    printf("| %s | %s | %ld | %ld | %ld | %s x %s, %s%s | ", where, name, s->M, s->N, s->K,
           type_name(s->type_a), type_name(s->type_b), type_name(s->type),
           s->fast  ? ", fast"
           : s->add ? ", added"
                    : "");
    if (status != CUBLAS_STATUS_SUCCESS || n == 0) {
        printf("**refused**: status %d, %d proposals | | | | | |\n", (int)status, n);
        refused++;
    } else {
        const cublasLtMatmulAlgo_t* algo = &found->algo;
        const cublasStatus_t check =
            cublasLtMatmulAlgoCheck(lt.handle, p.operation, p.b, p.a, p.out, p.out, algo, &checked);
        refused += check != CUBLAS_STATUS_SUCCESS;
        printf("%d | %s | %s | %u, %u | %u%s | %s |\n", n,
               named(TILES, setting_of(algo, CUBLASLT_ALGO_CONFIG_TILE_ID)),
               named(STAGES, setting_of(algo, CUBLASLT_ALGO_CONFIG_STAGES_ID)),
               setting_of(algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM),
               setting_of(algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME), needs(algo),
               s->align < 256 ? form(" (ours %d)", s->align) : "",
               check == CUBLAS_STATUS_SUCCESS ? form("ok, %.1f MB", (double)checked.workspaceSize * 1e-6)
                                              : form("**status %d**", (int)check));
    }
    fflush(stdout);
    product_close(&p);
}
// The products of a block and of the head, as forward and backward ask for them. No array is ever read: all
// begin at the same place, and only the padding of small ones is written there.
static void ask_model(const BenchModel* b, int mode, int vocab, void* memory) {
    const Config c = config_of(b, mode, vocab);
    Model m;
    model_layout(&m, &c);
    m.training = 1;
    gpu.is_fp8 = m.precision->weight == E4M3, gpu.type = CUDA_R_16BF;
    gpu.x = gpu.dy = gpu.dyt = gpu.wt = (fp8*)memory;
    gpu.params = gpu.grads = (float*)memory;
    for (int k = 0; k < PARTS; k++) gpu.copy[k] = memory;
    for (int k = 0; k < BUFFERS; k++) gpu.act[k][0] = memory;
    for (int k = 0; k < LINEARS; k++) gpu.xt[k][0] = (fp8*)memory;
    bf16* x = (bf16*)memory;
    for (int kind = QKV; kind <= DOWN; kind++) {
        linear_forward_gpu<bf16>(&m, 0, kind, x, x, m.rows);
        linear_backward_gpu<bf16>(&m, 0, kind, x, x, x, m.rows);
    }
    const long n = min_l(head_rows, m.rows);
    logits_gpu<bf16>(&m, 0, n);
    logits_backward_gpu<bf16>(&m, 0, n);
    free(m.tensors);
}

int main(void) {
    cudaDeviceProp card;
    void* memory;
    program = "probe_gpu";
    const int sm = open_card(&card, "make probe_gpu_emu runs this on a CPU");
    gpu.native = sm >= 89;
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CUDA(cudaMalloc(&memory, 1 << 20));
    LT(cublasLtCreate(&lt.handle));
    instead = ask;
    printf("%s, sm_%d, cuBLASLt %zu. Of the first proposal:\n\n| model | product | M | N | K | types | "
           "proposals | tile | stages | split-K, scheme | align | AlgoCheck |\n"
           "|---|---|---|---|---|---|---|---|---|---|---|---|\n",
           card.name, sm, cublasLtGetVersion());
    for (int i = 0; i < NUM_MODELS + NUM_ODD; i++)
        for (int mode = IN_BF16; mode <= IN_BF16 + gpu.native; mode++) {
            const int odd = i >= NUM_MODELS;
            const BenchModel* b = odd ? &ODD[i - NUM_MODELS] : &MODELS[i];
            snprintf(where, sizeof where, "%s %s", b->name, PRECISIONS[mode].name);
            ask_model(b, mode, odd ? BYTES_VOCAB : GPT2_VOCAB, memory);
        }
    printf("\n%d products asked for, %d refused.\n", asked, refused);
    CUDA(cudaFree(memory));
    LT(cublasLtDestroy(lt.handle));
    return refused > 0 || asked == 0;
}
