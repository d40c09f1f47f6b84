// test_nccl.cu -- checks nccl.h under mpirun, on any number of ranks: what each call computes, in groups and
// graphs, and that what NCCL refuses is refused. `test_nccl NAME` plants a mistake that ends the program, and
// `test_nccl bugs` lists them, with the words that must be on stderr; test_nccl.sh goes through all.
#include <nccl.h>
#include <cstdint>
#include <string>
#include <vector>

static int rank, ranks, passed, failed;
static std::string bug;
static ncclComm_t comm;
static cudaStream_t stream;
#define REQUIRE(x) do { if (x) { fprintf(stderr, "%s failed\n", #x); \
        MPI_Abort(MPI_COMM_WORLD, 1); } } while (0)
static void check(bool ok, const std::string &what) {   // it is ok if it is on all ranks
    int mine = ok, all = 0;
    MPI_Allreduce(&mine, &all, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    if (!ok) fprintf(stderr, "rank %d: %s: FAIL\n", rank, what.c_str());
    if (!rank) printf("%-70s %s\n", what.c_str(), all ? "ok" : "FAIL");
    (all ? passed : failed)++;
}
static ncclUniqueId shared_id() {
    ncclUniqueId id;
    if (!rank) REQUIRE(ncclGetUniqueId(&id));
    MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    return id;
}
static std::vector<void *> held;
template <class T> T *room(size_t n) {
    T *p;
    REQUIRE(cudaMalloc(&p, n * sizeof(T)));
    held.push_back(p);
    return p;
}
template <class T> T *up(const std::vector<T> &v) {
    T *p = room<T>(v.size());
    if (!v.empty()) REQUIRE(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}
template <class T> std::vector<T> down(const T *p, size_t n) {
    std::vector<T> v(n);
    REQUIRE(cudaStreamSynchronize(stream));
    if (n) REQUIRE(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
}
// What rank r has at i: sizes from 1 to 1e8, so that a sum depends on its order
template <class T> T value(int r, size_t i) {
    static const double sizes[] = {1e8, 1, -1e8, 0.3};
    return std::is_integral<T>() ? (T)(r * 91 + i * 7 + 3) : (T)(sizes[(r + i) % 4] * (1 + i % 11) + r);
}
template <class T> std::vector<T> values(int r, size_t n, size_t from = 0) {
    std::vector<T> v(n);
    for (size_t i = 0; i < n; i++) v[i] = value<T>(r, from + i);
    return v;
}
template <class T> bool same(const std::vector<T> &a, const std::vector<T> &b) {
    return a.size() == b.size() && (a.empty() || !memcmp(a.data(), b.data(), a.size() * sizeof(T)));
}
template <class T> std::vector<T> total(size_t n, size_t from) {
    std::vector<T> v = values<T>(0, n, from);
    for (int r = 1; r < ranks; r++) for (size_t i = 0; i < n; i++) v[i] += value<T>(r, from + i);
    return v;
}
template <class T> std::vector<T> gathered(size_t n) {
    std::vector<T> v;
    for (int r = 0; r < ranks; r++) for (T x : values<T>(r, n)) v.push_back(x);
    return v;
}
static std::string of(const char *what, size_t n, const char *type) {
    return std::string(what) + " of " + std::to_string(n) + " " + type;
}

template <class T> static void test_sums(size_t n, ncclDataType_t type, const char *name) {
    T *x = up(values<T>(rank, n * ranks)), *y = room<T>(n);
    REQUIRE(ncclReduceScatter(x, y, n, type, ncclSum, comm, stream));
    check(same(down(y, n), total<T>(n, rank * n)) && same(down(x, n * ranks), values<T>(rank, n * ranks)),
          of("reduce-scatter", n, name));
    REQUIRE(ncclReduceScatter(x, x + rank * n, n, type, ncclSum, comm, stream));
    std::vector<T> want = values<T>(rank, n * ranks), sum = total<T>(n, rank * n);
    std::copy(sum.begin(), sum.end(), want.begin() + rank * n);
    check(same(down(x, n * ranks), want), of("reduce-scatter in place", n, name));
}
template <class T> static void test_copies(size_t n, ncclDataType_t type, const char *name) {
    T *x = up(values<T>(rank, n)), *y = room<T>(n * ranks);
    REQUIRE(ncclAllGather(x, y, n, type, comm, stream));
    check(same(down(y, n * ranks), gathered<T>(n)), of("all-gather", n, name));
    REQUIRE(cudaMemset(y, 0x55, n * ranks * sizeof(T)));
    REQUIRE(cudaMemcpy(y + rank * n, x, n * sizeof(T), cudaMemcpyDeviceToDevice));
    REQUIRE(ncclAllGather(y + rank * n, y, n, type, comm, stream));
    check(same(down(y, n * ranks), gathered<T>(n)), of("all-gather in place", n, name));
    bool ok = true;
    for (int root = 0; root < ranks; root++) {
        T *z = up(values<T>(rank, n));               // sendbuff means nothing but on the root
        REQUIRE(ncclBroadcast(rank == root ? x : nullptr, y, n, type, root, comm, stream));
        REQUIRE(ncclBroadcast(z, z, n, type, root, comm, stream));
        ok = ok && same(down(y, n), values<T>(root, n)) && same(down(z, n), values<T>(root, n));
    }
    check(ok, of("broadcast from each rank, in place and not,", n, name));
}
static void test_values() {
    for (size_t n : {0, 1, 7, 1001, 65537}) {
        test_sums<float>(n, ncclFloat, "floats");
        test_sums<double>(n, ncclFloat64, "doubles");
        test_copies<float>(n, ncclFloat32, "floats");
        test_copies<double>(n, ncclDouble, "doubles");
        test_copies<uint16_t>(n, ncclBfloat16, "bf16");
        test_copies<uint8_t>(n, ncclUint8, "bytes");
        for (void *p : held) REQUIRE(cudaFree(p));
        held.clear();
    }
}

// ---- Groups, graphs, communicators ----------------------------------------------------------------------
static __global__ void add(float *x, float by, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += by;
}
static void test_groups() {
    const int n = 33;
    float *x = up(std::vector<float>(n * ranks, rank + 1.0f)), *sum = room<float>(n);
    float *all = room<float>(n * ranks);
    uint8_t *bytes = up(values<uint8_t>(rank, n));
    const float S = ranks * (ranks + 1) / 2.0f;
    REQUIRE(cudaMemset(sum, 0, n * sizeof(float)));
    REQUIRE(ncclGroupStart());
    REQUIRE(ncclReduceScatter(x, sum, n, ncclFloat, ncclSum, comm, stream));
    REQUIRE(ncclGroupStart());
    REQUIRE(ncclAllGather(sum, all, n, ncclFloat, comm, stream));      // of one stream: in order
    REQUIRE(ncclGroupEnd());
    REQUIRE(ncclBroadcast(bytes, bytes, n, ncclUint8, ranks - 1, comm, stream));
#ifndef __CUDACC__
    check(sum[0] == 0, "in a group nothing begins");
#endif
    REQUIRE(ncclGroupEnd());
    check(same(down(sum, n), std::vector<float>(n, S)) && same(down(bytes, n), values<uint8_t>(ranks - 1, n))
          && same(down(all, n * ranks), std::vector<float>(n * ranks, S)),
          "a group of three calls, two deep");
    for (int grouped = 0; grouped < 2; grouped++) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        REQUIRE(cudaMemset(x, 0, n * ranks * sizeof(float)));
        REQUIRE(cudaStreamSynchronize(0));
        REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        add<<<(n * ranks + 31) / 32, 32, 0, stream>>>(x, 1.0f + rank, n * ranks);
        cudaGetLastError();
        if (grouped) REQUIRE(ncclGroupStart());
        REQUIRE(ncclReduceScatter(x, sum, n, ncclFloat, ncclSum, comm, stream));
        REQUIRE(ncclAllGather(sum, x, n, ncclFloat, comm, stream));
        if (grouped) REQUIRE(ncclGroupEnd());
        REQUIRE(cudaStreamEndCapture(stream, &graph));
        REQUIRE(cudaGraphInstantiate(&exec, graph, 0));
        REQUIRE(cudaGraphDestroy(graph));
        const bool idle = down(x, 1)[0] == 0;
        for (int i = 0; i < 3; i++) REQUIRE(cudaGraphLaunch(exec, stream));
        const float want = ranks * (ranks * S + S) + S;      // each time x becomes the sum of x + 1 + rank
        check(idle && same(down(x, n * ranks), std::vector<float>(n * ranks, want)),
              grouped ? "a graph with a group, launched three times" : "a graph launched three times");
        REQUIRE(cudaGraphExecDestroy(exec));
    }
}
static void test_communicators() {
    float *x = up(values<float>(rank, 5)), *y = room<float>(5 * ranks);
    ncclComm_t other;
    ncclResult_t e = ncclInternalError;
    int version = 0;
    REQUIRE(ncclCommInitRank(&other, ranks, shared_id(), rank));
    REQUIRE(ncclAllGather(x, y, 5, ncclFloat, other, stream));
    check(same(down(y, 5 * ranks), gathered<float>(5)), "a second communicator");
    check(!ncclCommGetAsyncError(other, &e) && e == ncclSuccess && !ncclGetVersion(&version) &&
          version > 22000          && !strcmp(ncclGetErrorString(ncclSuccess), "no error"),
          "no asynchronous error, the version, a text");
    REQUIRE(ncclCommDestroy(other));
#ifndef __CUDACC__
    auto refused = [](ncclResult_t e, const char *words, const char *what) {
        check(e == ncclInvalidArgument && strstr(ncclGetLastError(nullptr), words), what);
    };
    refused(ncclCommDestroy(other), "destroyed before", "a second ncclCommDestroy is refused");
    refused(ncclAllGather(x, y, 5, ncclFloat, other, stream), "destroyed", "so is a call of it");
    refused(ncclCommGetAsyncError(other, &e), "destroyed", "and a question to it");
#endif
}

// ---- What is refused ------------------------------------------------------------------------------------
#ifndef __CUDACC__
static void test_refusals() {
    const int n = 12;
    float *x = room<float>(n * ranks), *y = room<float>(n * ranks), host[4 * n];
    double *d = room<double>(n * ranks);
    ncclComm_t none = nullptr, made;
    ncclUniqueId id;
    cudaGraph_t graph;
    int device = -1, count = 0;
    cudaDeviceProp card;
    auto refused = [](ncclResult_t got, ncclResult_t want, const char *words, const std::string &what) {
        if (got != want || !strstr(ncclGetLastError(comm), words))
            fprintf(stderr, "rank %d: %d, not %d: %s\n", rank, got, want, ncclGetLastError(comm));
        check(got == want && strstr(ncclGetLastError(comm), words), "refused: " + what);
    };
    const ncclResult_t argument = ncclInvalidArgument, usage = ncclInvalidUsage;
    auto sum = [&](const void *from, void *to, size_t n, ncclDataType_t t = ncclFloat,
            ncclRedOp_t op = ncclSum) {
        return ncclReduceScatter(from, to, n, t, op, comm, stream);
    };
    auto gather = [&](const void *from, void *to, size_t n, ncclDataType_t t = ncclFloat) {
        return ncclAllGather(from, to, n, t, comm, stream);
    };
    auto cast = [&](const void *from, void *to, int root) {
        return ncclBroadcast(from, to, n, ncclFloat, root, comm, stream);
    };
    refused(ncclAllGather(x, y, n, ncclFloat, none, stream), argument, "NULL", "no communicator");
    refused(ncclAllGather(x, y, n, ncclFloat, (ncclComm_t)host, stream), argument, "none",
            "what is no communicator");
    refused(ncclCommDestroy(none), argument, "NULL", "to destroy none");
    refused(sum(host, y, n), argument, "sendbuff is not wholly", "sendbuff on the host");
    refused(sum(x, host, n), argument, "recvbuff is not wholly", "recvbuff on the host");
    refused(sum(x + 1, y, n), argument, "sendbuff is not wholly", "a sendbuff too short for all parts");
    refused(gather(x, y + 1, n), argument, "recvbuff is not wholly", "a recvbuff too short for them");
    refused(gather(x, y, (size_t)1 << 62), argument, "count", "2^62 elements");
    refused(gather(nullptr, y, n), argument, "sendbuff is not wholly", "a NULL sendbuff");
    refused(cast(x, nullptr, 0), argument, "recvbuff is not wholly", "a NULL recvbuff");
    refused(gather((char *)x + 2, y, n / 2), argument, "aligned", "a sendbuff between floats");
    refused(sum(d, (char *)y + 4, 1, ncclDouble), argument, "aligned", "a recvbuff between doubles");
    refused(gather(x, y, n, ncclInt32), argument, "type", "integers");
    refused(gather(x, y, n, (ncclDataType_t)77), argument, "type", "a type that is none");
    refused(sum(x, y, n, ncclBfloat16), argument, "type", "sums in BF16");
    refused(sum(x, y, n, ncclFloat, ncclMax), argument, "operation", "a maximum");
    refused(cast(x, y, ranks), argument, "root", "a root beyond the ranks");
    refused(cast(x, y, -1), argument, "root", "root -1");
    refused(sum(x, x + (rank + 1) % ranks * n + (ranks == 1), n - (ranks == 1)), argument, "overlap",
            "reduce-scatter to another rank's part");
    refused(gather(y + (rank + 1) % ranks * n + (ranks == 1), y, n - (ranks == 1)), argument, "overlap",
            "all-gather from another rank's part");
    refused(ncclBroadcast(x, x + 1, n - 1, ncclFloat, rank, comm, stream), argument, "overlap",
            "broadcast to itself, shifted");
    refused(ncclGroupEnd(), usage, "no group", "the end of no group");

    REQUIRE(cudaMemset(y, 0, n * sizeof(float)));
    REQUIRE(ncclGroupStart());
    refused(ncclCommInitRank(&made, ranks, id = shared_id(), rank), usage, "group",
            "ncclCommInitRank in a group");
    refused(ncclCommDestroy(comm), usage, "group", "ncclCommDestroy in a group");
    REQUIRE(gather(x, y, 1));
    refused(ncclGroupEnd(), usage, "group", "a group with a mistake in it");
    check(y[0] == 0, "and the rest of it is off");
    REQUIRE(ncclGroupStart());
    check(cudaStreamSynchronize(stream) && cudaDeviceSynchronize() && cudaEventSynchronize(nullptr),
          "refused: to wait in a group");
    REQUIRE(ncclGroupEnd());
    REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    REQUIRE(ncclGroupStart());
    check(cudaStreamEndCapture(stream, &graph), "refused: to end a capture in a group");
    REQUIRE(ncclGroupEnd());
    REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    check(ncclAllGather(x, y, n, ncclFloat, comm, nullptr) == ncclUnhandledCudaError
          && cudaStreamEndCapture(stream, &graph),
          "refused: the default stream while another is under capture");
    cudaGetLastError();

    refused(ncclCommInitRank(&made, ranks + 1, id, rank), argument, "calls itself", "a rank too many");
    refused(ncclCommInitRank(&made, ranks, id, ranks - rank), argument, "calls itself", "a wrong rank");
    refused(ncclCommInitRank(nullptr, ranks, id, rank), usage, "NULL", "nowhere to put a communicator");
    REQUIRE(ncclCommInitRank(&made, ranks, id, rank));
    REQUIRE(ncclCommDestroy(made));
    refused(ncclCommInitRank(&made, ranks, id, rank), argument, "used before", "a unique id used before");
    memset(&id, 7, sizeof id);
    refused(ncclCommInitRank(&made, ranks, id, rank), argument, "did not make it", "a made up unique id");
    if (ranks > 1) {
        REQUIRE(ncclGetUniqueId(&id));
        refused(ncclCommInitRank(&made, ranks, id, rank), argument, "another unique id",
                "an id for each rank");
        REQUIRE(cudaSetDevice(rank / 2));
        refused(ncclCommInitRank(&made, ranks, shared_id(), rank), usage, "Duplicate GPU",
                "two ranks on a device");
    }
    REQUIRE(cudaSetDevice(7 - rank));
    REQUIRE(cudaGetDevice(&device) || cudaGetDeviceCount(&count));
    refused(gather(x, y, n), argument, "this device's", "memory of another device");
    check(device == 7 - rank && count == 8 && cudaSetDevice(8) == cudaErrorInvalidDevice
          && cudaSetDevice(-1) && cudaGetDeviceProperties(&card, 8) && !cudaGetDeviceProperties(&card, 7),
          "eight devices, and none beyond");
    setenv("EMU_GPUS", "2", 1);
    check(!cudaGetDeviceCount(&count) && count == 2 && cudaSetDevice(2) && !cudaSetDevice(1), "or two");
    unsetenv("EMU_GPUS");
    REQUIRE(cudaSetDevice(rank));
    cudaGetLastError();
    REQUIRE(gather(x, y, n));
    check(true, "and all goes on");
}

// ---- What ends the program ------------------------------------------------------------------------------
// On three ranks, of which the last does something else; it is the shell's turn to look at what they say.
static const struct { const char *name, *words; } BUGS[] = {
    {"other_call",
        "rank 2 calls ncclAllGather of 64 ncclFloat32, rank 0 ncclReduceScatter of 64 ncclFloat32"},
    {"other_count", "rank 2 calls ncclAllGather of 63 ncclFloat32, rank 0 ncclAllGather of 64 ncclFloat32"},
    {"other_type", "rank 2 calls ncclAllGather of 64 ncclUint8, rank 0 ncclAllGather of 64 ncclFloat32"},
    {"other_root",
        "ncclBroadcast of 64 ncclFloat32 from rank 1, rank 0 ncclBroadcast of 64 ncclFloat32 from rank 0"},
    {"other_order",
        "rank 2 calls ncclBroadcast of 64 ncclFloat32 from rank 0, rank 0 ncclAllGather of 64 ncclFloat32"},
    {"other_graph", "rank 2 calls ncclAllGather of 63 ncclFloat32, rank 0 ncclAllGather of 64 ncclFloat32"},
    {"destroys", "rank 2 calls ncclCommDestroy, rank 0 ncclAllGather of 64 ncclFloat32"},
    {"absent", "waits in ncclAllGather for a rank that does not come"},
    {"no_destroy", "waits in ncclCommDestroy for a rank that does not come"},
    {"no_init", "waits in ncclCommInitRank for a rank that does not come"},
    {"other_comm", "for a rank that does not come"},
    {"freed", "ncclAllGather, when its turn comes: recvbuff is not wholly in this device's memory"},
    {"stale", "ncclAllGather, when its turn comes: the communicator is NULL, destroyed, or none"}};
static void plant() {
    const bool last = rank == ranks - 1, graph = bug == "other_graph" || bug == "freed" || bug == "stale";
    float *x = room<float>(64 * ranks), *y = room<float>(64 * ranks);
    ncclComm_t other;
    cudaGraph_t g;
    cudaGraphExec_t exec;
    if (bug == "other_comm") REQUIRE(ncclCommInitRank(&other, ranks, shared_id(), rank));
    const ncclUniqueId id = shared_id();
    if (graph) REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    if (bug == "other_call" && !last) ncclReduceScatter(x, y, 64, ncclFloat, ncclSum, comm, stream);
    else if (bug == "other_root") ncclBroadcast(x, y, 64, ncclFloat, last, comm, stream);
    else if (bug == "other_order") {
        REQUIRE(ncclGroupStart());
        if (last) ncclBroadcast(x, x, 64, ncclFloat, 0, comm, stream);
        ncclAllGather(x, y, 64, ncclFloat, comm, stream);
        if (!last) ncclBroadcast(x, x, 64, ncclFloat, 0, comm, stream);
        REQUIRE(ncclGroupEnd());
    } else if (bug == "destroys" && last) ncclCommDestroy(comm);
    else if (bug == "absent" && last) sleep(600);
    else if (bug == "no_destroy") { if (last) sleep(600); else ncclCommDestroy(comm); }
    else if (bug == "no_init") { if (last) sleep(600); else ncclCommInitRank(&other, ranks, id, rank); }
    else if (bug == "other_comm" && last) ncclAllGather(x, y, 64, ncclFloat, other, stream);
    else ncclAllGather(x, y, (bug == "other_count" || bug == "other_graph") && last ? 63 : 64,
                       bug == "other_type" && last ? ncclUint8 : ncclFloat, comm, stream);
    if (!graph) return;
    REQUIRE(cudaStreamEndCapture(stream, &g));
    REQUIRE(cudaGraphInstantiate(&exec, g, 0));
    if (bug == "freed") REQUIRE(cudaFree(y));
    if (bug == "stale") REQUIRE(ncclCommDestroy(comm));
    cudaGraphLaunch(exec, stream);
}
#endif
int main(int argc, char **argv) {
    bug = argc > 1 ? argv[1] : "";
#ifndef __CUDACC__
    if (bug == "bugs") for (const auto &b : BUGS) printf("%s|%s\n", b.name, b.words);
    if (bug == "bugs") return 0;
    if (bug.empty())                                 // there is no MPI yet
        REQUIRE(ncclCommInitRank(&comm, 1, ncclUniqueId(), 0) != ncclInvalidUsage);
#endif
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    REQUIRE(cudaSetDevice(rank));
    REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    REQUIRE(ncclCommInitRank(&comm, ranks, shared_id(), rank));
#ifndef __CUDACC__
    if (!bug.empty()) return plant(), 0;
#endif
    test_values();
    test_groups();
    test_communicators();
#ifndef __CUDACC__
    test_refusals();
#endif
    for (void *p : held) REQUIRE(cudaFree(p));
    REQUIRE(ncclCommDestroy(comm));
    REQUIRE(cudaStreamDestroy(stream));
    MPI_Finalize();
    if (!rank) printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
