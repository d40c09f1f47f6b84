// nccl.h -- the part of NCCL that a trainer uses, over MPI: a process is a rank and has one device. Sums are
// made in the order of the ranks, so runs repeat. It refuses what NCCL refuses, and buffers that it would
// spoil in silence, with the reason on stderr. Where ranks do not all do the same, and NCCL hangs or mixes up
// data, the program ends and says who does what.
#pragma once
#define OMPI_SKIP_MPICXX
#include <mpi.h>
#include "cuda_runtime.h"
#include <csignal>
#include <list>
#include <string>
#include <unistd.h>
enum ncclResult_t : int { ncclSuccess, ncclUnhandledCudaError, ncclSystemError, ncclInternalError,
        ncclInvalidArgument, ncclInvalidUsage, ncclRemoteError, ncclInProgress, ncclNumResults };
enum ncclRedOp_t : int { ncclSum, ncclProd, ncclMax, ncclMin, ncclAvg, ncclNumOps };
enum ncclDataType_t : int { ncclInt8, ncclChar = 0, ncclUint8, ncclInt32, ncclInt = 2, ncclUint32, ncclInt64,
        ncclUint64, ncclFloat16, ncclHalf = 6, ncclFloat32, ncclFloat = 7, ncclFloat64, ncclDouble = 8,
        ncclBfloat16, ncclFloat8e4m3, ncclFloat8e5m2, ncclNumTypes };
enum { NCCL_UNIQUE_ID_BYTES = 128, NCCL_VERSION_CODE = 22809 };
struct ncclUniqueId { char internal[NCCL_UNIQUE_ID_BYTES]; };
typedef struct ncclComm { MPI_Comm mpi; int rank, size; ncclUniqueId id; } *ncclComm_t;

namespace emu::nccl {
enum What { REDUCE_SCATTER, ALL_GATHER, BROADCAST, DESTROY };
inline const char *const NAMES[] = {"ncclReduceScatter", "ncclAllGather", "ncclBroadcast", "ncclCommDestroy"};
inline const struct { const char *name; int size; MPI_Datatype mpi; } TYPES[ncclNumTypes] = {
        {}, {"ncclUint8", 1, MPI_BYTE}, {}, {}, {}, {}, {}, {"ncclFloat32", 4, MPI_FLOAT},
        {"ncclFloat64", 8, MPI_DOUBLE}, {"ncclBfloat16", 2, MPI_UINT16_T}, {}, {}};
struct Call {                                        // up to count the same on all ranks
    What what; ncclDataType_t type; int which, unused; size_t count;    // which: the operation, or the root
    ncclComm_t comm; const void *send; void *recv; cudaStream_t stream;
};
inline std::list<ncclComm> comms;                    // the destroyed too: none gets an address that was used
inline std::vector<Call> collected;                  // in the open groups
inline ncclResult_t spoiled;                         // the first error in them, which calls all of it off
inline std::string reason;
inline void say(const std::string &why) {            // in one piece, for the ranks speak at the same time
    fprintf(stderr, "emu: %s%s\n", context, why.c_str());
}
inline std::string who(int rank) { return "rank " + std::to_string(rank); }
[[noreturn]] inline void give_up(const std::string &why) {
    say(why);
    signal(SIGABRT, SIG_DFL);                        // MPI's handler prints the stack
    fail();
}
inline ncclResult_t refuse(ncclResult_t e, const char *name, const std::string &why) {
    say(reason = std::string(name) + ": " + why);
    return open_groups && !spoiled ? spoiled = e : e;
}
inline bool alive(ncclComm_t comm) {
    for (const ncclComm &c : comms) if (&c == comm) return c.mpi != MPI_COMM_NULL;
    return false;
}
inline void finish(MPI_Request request, const ncclComm &c, const char *name) {
    const auto start = std::chrono::steady_clock::now();
    for (int nap = 8, done = 0;; nap = nap < 500 ? 2 * nap : 1000) {   // others may need the core
        MPI_Test(&request, &done, MPI_STATUS_IGNORE);
        if (done) return;
        if (std::chrono::steady_clock::now() - start > std::chrono::seconds(setting("EMU_NCCL_SECONDS", 60)))
            give_up(who(c.rank) + " waits in " + name + " for a rank that does not come");
        usleep(nap);
    }
}
template <class T> std::vector<T> exchange(const T &mine, const ncclComm &c, const char *name) {
    std::vector<T> all(c.size);
    MPI_Request request;
    MPI_Iallgather(&mine, sizeof mine, MPI_BYTE, all.data(), sizeof mine, MPI_BYTE, c.mpi, &request);
    finish(request, c, name);
    return all;
}
inline std::string text(const Call &c) {
    if (c.what == DESTROY) return NAMES[c.what];
    return NAMES[c.what] + (" of " + std::to_string(c.count)) + " " + TYPES[c.type].name +
           (c.what == BROADCAST ? " from " + who(c.which) : "");
}
inline void agree(const Call &c) {
    const std::vector<Call> all = exchange(c, *c.comm, NAMES[c.what]);
    for (size_t r = 1; r < all.size(); r++) if (memcmp(&all[r], &all[0], offsetof(Call, comm)))
        give_up(who(r) + " calls " + text(all[r]) + ", rank 0 " + text(all[0]));
}
inline const char *refusal(const Call &c) {          // why it cannot be done, or null
    if (!alive(c.comm)) return "the communicator is NULL, destroyed, or none";
    const bool sum = c.what == REDUCE_SCATTER, gather = c.what == ALL_GATHER;
    const size_t size = c.type >= 0 && c.type < ncclNumTypes ? TYPES[c.type].size : 0;
    if (!size || (sum && size < 4)) return "the type is not supported here";
    if (sum && c.which != ncclSum && c.which != ncclAvg) return "the operation is not supported here";
    if (!sum && !gather && (c.which < 0 || c.which >= c.comm->size)) return "the root is no rank";
    if (c.count > INT32_MAX) return "more elements than MPI can count";
    const size_t part = c.count * size, whole = part * c.comm->size, mine = part * c.comm->rank;
    const size_t sent = sum ? whole : part, received = gather ? whole : part;
    const char *to = (const char *)c.recv;           // of a broadcast only the root looks at sendbuff
    const char *from = sum || gather || c.which == c.comm->rank ? (const char *)c.send : to;
    if (part && !on_device(to, received)) return "recvbuff is not wholly in this device's memory";
    if (part && !on_device(from, sent)) return "sendbuff is not wholly in this device's memory";
    if ((uintptr_t)from % size || (uintptr_t)to % size) return "a buffer is not aligned to its type";
    const bool in_place = sum ? to == from + mine : from == to + (gather ? mine : 0);
    const bool overlap = from < to + received && to < from + sent;
    return overlap && !in_place ? "the buffers overlap, and not in place" : nullptr;
}
template <class T> void sum(const Call &c, const T *slices) {
    for (size_t i = 0; i < c.count; i++) {
        T s = slices[i];
        for (int r = 1; r < c.comm->size; r++) s += slices[r * c.count + i];
        ((T *)c.recv)[i] = c.which == ncclAvg ? s / c.comm->size : s;
    }
}
inline void run(const Call &c) {                     // in a graph much later: is all of it still there?
    if (const char *why = refusal(c)) give_up(std::string(NAMES[c.what]) + ", when its turn comes: " + why);
    agree(c);
    const MPI_Datatype t = TYPES[c.type].mpi;
    const int n = (int)c.count;
    const size_t part = c.count * TYPES[c.type].size;
    const void *from = c.send == (char *)c.recv + c.comm->rank * part ? MPI_IN_PLACE : c.send;
    std::vector<double> slices(c.what == REDUCE_SCATTER ? (c.comm->size * part + 7) / 8 : 0);
    MPI_Request request;
    if (c.what == REDUCE_SCATTER) MPI_Ialltoall(c.send, n, t, slices.data(), n, t, c.comm->mpi, &request);
    if (c.what == ALL_GATHER) MPI_Iallgather(from, n, t, c.recv, n, t, c.comm->mpi, &request);
    if (c.what == BROADCAST && c.which == c.comm->rank && part) memmove(c.recv, c.send, part);
    if (c.what == BROADCAST) MPI_Ibcast(c.recv, n, t, c.which, c.comm->mpi, &request);
    finish(request, *c.comm, NAMES[c.what]);
    if (c.what == REDUCE_SCATTER && c.type == ncclFloat) sum(c, (const float *)slices.data());
    if (c.what == REDUCE_SCATTER && c.type == ncclDouble) sum(c, slices.data());
}
inline ncclResult_t submit(const Call &c) {
    return emu::submit(c.stream, [=] { run(c); }) ? ncclUnhandledCudaError : ncclSuccess;
}
inline ncclResult_t call(const Call &c) {
    if (const char *why = refusal(c)) return refuse(ncclInvalidArgument, NAMES[c.what], why);
    if (!open_groups) return submit(c);
    return collected.push_back(c), ncclSuccess;
}
} // namespace emu::nccl

#define EMU_NCCL(NAME, ...) \
    inline ncclResult_t nccl##NAME { using namespace emu::nccl; __VA_ARGS__; return ncclSuccess; }
EMU_NCCL(ReduceScatter(const void *send, void *recv, size_t n, ncclDataType_t t, ncclRedOp_t op,
        ncclComm_t comm, cudaStream_t s), return call({REDUCE_SCATTER, t, op, 0, n, comm, send, recv, s}))
EMU_NCCL(AllGather(const void *send, void *recv, size_t n, ncclDataType_t t, ncclComm_t comm,
        cudaStream_t s), return call({ALL_GATHER, t, 0, 0, n, comm, send, recv, s}))
EMU_NCCL(Broadcast(const void *send, void *recv, size_t n, ncclDataType_t t, int root, ncclComm_t comm,
        cudaStream_t s), return call({BROADCAST, t, root, 0, n, comm, send, recv, s}))
EMU_NCCL(GroupStart(), emu::open_groups++)
inline ncclResult_t ncclGroupEnd() {
    using namespace emu::nccl;
    if (!emu::open_groups) return refuse(ncclInvalidUsage, "ncclGroupEnd", "no group is open");
    if (--emu::open_groups) return ncclSuccess;
    ncclResult_t e = spoiled;
    for (const Call &c : collected) if (!e) e = submit(c);
    collected.clear();
    return spoiled = ncclSuccess, e;
}
EMU_NCCL(GetUniqueId(ncclUniqueId *id), static int serial;
        if (!id) return refuse(ncclInvalidArgument, "ncclGetUniqueId", "NULL");
        *id = {};
        snprintf(id->internal, sizeof *id, "emu %d %d %lld", getpid(), serial++,
                 (long long)std::chrono::system_clock::now().time_since_epoch().count()))
inline ncclResult_t ncclCommInitRank(ncclComm_t *comm, int nranks, ncclUniqueId id, int rank) {
    using namespace emu::nccl;
    static const char *const name = "ncclCommInitRank";
    struct Rank { ncclUniqueId id; char node[MPI_MAX_PROCESSOR_NAME]; int length, nranks, rank, device; };
    Rank me = {id, {}, 0, nranks, rank, 0};
    ncclComm c = {MPI_COMM_WORLD, 0, 0, id};
    int ready = 0;
    bool fresh = !strncmp(id.internal, "emu ", 4);
    std::string why, twice;
    MPI_Initialized(&ready);
    if (!comm || !ready || emu::open_groups)
        return refuse(ncclInvalidUsage, name, !comm ? "NULL" : ready ? "a group is open" : "before MPI_Init");
    *comm = nullptr;
    cudaGetDevice(&me.device);
    MPI_Get_processor_name(me.node, &me.length);
    MPI_Comm_rank(c.mpi, &c.rank);
    MPI_Comm_size(c.mpi, &c.size);
    for (const ncclComm &old : comms) fresh = fresh && memcmp(&old.id, &id, sizeof id);
    const std::vector<Rank> all = exchange(me, c, name);
    for (int r = c.size - 1; r >= 0; r--) {          // all ranks come to the same verdict
        for (int q = 0; q < r; q++) if (all[q].device == all[r].device && !strcmp(all[q].node, all[r].node))
            twice = "Duplicate GPU detected: " + who(r) + " and " + who(q) + " are on the same device";
        if (memcmp(&all[r].id, &all[0].id, sizeof id)) why = who(r) + " has another unique id than rank 0";
        if (all[r].rank != r || all[r].nranks != c.size) why = who(r) + " of " + std::to_string(c.size) +
                " calls itself " + who(all[r].rank) + " of " + std::to_string(all[r].nranks);
    }
    if (why.empty() && !fresh) why = "the unique id was used before, or ncclGetUniqueId did not make it";
    if (!why.empty()) return refuse(ncclInvalidArgument, name, why);
    if (!twice.empty()) return refuse(ncclInvalidUsage, name, twice);
    MPI_Comm_dup(MPI_COMM_WORLD, &c.mpi);
    comms.push_back(c);
    return *comm = &comms.back(), ncclSuccess;
}
EMU_NCCL(CommDestroy(ncclComm_t c),
        if (!alive(c)) return refuse(ncclInvalidArgument, NAMES[DESTROY], "NULL, destroyed before, or none");
        if (emu::open_groups) return refuse(ncclInvalidUsage, NAMES[DESTROY], "a group is open");
        agree({DESTROY, ncclUint8, 0, 0, 0, c, nullptr, nullptr, nullptr});
        MPI_Comm_free(&c->mpi))
EMU_NCCL(CommGetAsyncError(ncclComm_t c, ncclResult_t *e), if (!e || !alive(c))
        return refuse(ncclInvalidArgument, "ncclCommGetAsyncError", "NULL, or destroyed"); *e = ncclSuccess)
EMU_NCCL(GetVersion(int *version), if (!version)
        return refuse(ncclInvalidArgument, "ncclGetVersion", "NULL"); *version = NCCL_VERSION_CODE)
inline const char *ncclGetLastError(ncclComm_t) { return emu::nccl::reason.c_str(); }
inline const char *ncclGetErrorString(ncclResult_t e) {   // stderr has the reason
    static const char *const texts[] = {"no error", "unhandled cuda error", "unhandled system error",
            "internal error", "invalid argument", "invalid usage", "remote process exited", "in progress"};
    return e >= 0 && e < ncclNumResults ? texts[e] : "unknown result code";
}
