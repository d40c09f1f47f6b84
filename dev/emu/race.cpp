// race.cpp -- names both sides of a race. Compile the translated .cu with -fsanitize=thread, which puts a
// call before every load and store, and link this file instead of that sanitizer's library. CUDA's rules are
// simpler: within a launch a __syncthreads orders the threads of a block, a __syncwarp those of a warp, and
// nothing else does. So for every byte the last write and the last reads by two threads are enough to keep.
// What blocks tell each other through atomics is not understood: data that a counter hands on is reported.
#include "cuda_runtime.h"
#include <dlfcn.h>
#include <map>
#include <string>

namespace emu {
struct Note { int32_t code; uint32_t block; uint16_t thread, barriers, syncs, atomic; };   // block 0: nobody
struct Cell { Note write, read[2]; };
struct Region { size_t bytes; Cell *cells; const char *name; };
static std::map<const char *, Region> *regions;     // device memory, and the running block's shared memory
static const char anchor = 0;                       // code addresses are kept relative to it

static std::string line_of(int32_t code) {
    char command[256], line[4096], *found = nullptr;
    const char *address = &anchor + code - 1;
    Dl_info info;
    if (!dladdr(address, &info)) return "?";
    snprintf(command, sizeof command, "addr2line -ie %s 0x%zx", info.dli_fname,
             (size_t)(address - (char *)info.dli_fbase));
    FILE *f = popen(command, "r");                  // a function, then what it is inlined in: not a header
    while (f && (found = fgets(line, sizeof line, f)) && strstr(line, ".h:")) continue;
    if (f) pclose(f);
    return found ? std::string(line, strcspn(line, " \n")) : "?";
}
static bool unordered(const Note &a, const Place &me) {
    if (a.block < me.first_block) return false;     // never touched, or by an earlier launch
    if (a.block != me.block) return true;
    return a.thread != me.thread && a.barriers == (uint16_t)me.barriers &&
           !(a.thread / 32 == me.thread / 32 && a.syncs < me.syncs);
}
void note_access(const void *p, size_t n, Access access, const void *code) {
    if (!regions) return;                           // memcpy is called before anything is set up, and after
    auto r = regions->upper_bound((const char *)p);
    if (r == regions->begin() || (const char *)p >= (--r)->first + r->second.bytes) return;
    const Place me = place();
    const int32_t at = (int32_t)((const char *)code - &anchor);
    const char *verb = access == READ ? "reads" : "writes";
    if (!me.working) EMU_FAIL("the host %s device memory at %s", verb, line_of(at).c_str());
    if (!me.block) return;
    const Note mine = {at, me.block, (uint16_t)me.thread, (uint16_t)me.barriers, (uint16_t)me.syncs,
                       access == ATOMIC};
    for (size_t i = (const char *)p - r->first; n-- && i < r->second.bytes; i++) {
        Cell &c = r->second.cells[i];
        const Note *other = nullptr;
        if (unordered(c.write, me) && !(c.write.atomic && mine.atomic)) other = &c.write;
        for (Note &read : c.read) if (access != READ && unordered(read, me)) other = &read;
        if (other)
            EMU_FAIL("race: %s byte %zu of %s at %s; thread %u of %s %s it at %s; nothing orders them",
                        verb, i, r->second.name, line_of(at).c_str(), other->thread,
                        other->block == me.block ? "this block" : "another block",
                        other == &c.write ? "writes" : "reads", line_of(other->code).c_str());
        if (access != READ) { c.write = mine; continue; }
        if (c.read[0].block != me.block || c.read[0].thread != me.thread) c.read[1] = c.read[0];
        c.read[0] = mine;
    }
}
void note_memory(const void *p, size_t bytes, const char *name) {
    if (!regions) regions = new std::map<const char *, Region>;
    Region &r = (*regions)[(const char *)p];
    free(r.cells);
    if (bytes) r = {bytes, (Cell *)calloc(bytes, sizeof(Cell)), name};
    else regions->erase((const char *)p);
}
} // namespace emu

extern "C" {                                        // what the compilers call
#define HOOK(NAME, BYTES, ACCESS) \
    void __tsan_##NAME(void *p) { emu::note_access(p, BYTES, emu::ACCESS, __builtin_return_address(0)); }
#define HOOKS(N) HOOK(read##N, N, READ) HOOK(write##N, N, WRITE) \
    HOOK(unaligned_read##N, N, READ) HOOK(unaligned_write##N, N, WRITE)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_read_range(void *p, size_t n) { emu::note_access(p, n, emu::READ, __builtin_return_address(0)); }
void __tsan_write_range(void *p, size_t n) { emu::note_access(p, n, emu::WRITE, __builtin_return_address(0));
        }
// clang copies structs by memcpy, and later clangs call that __tsan_memcpy
#define HOOK_COPY(NAME) void *NAME(void *to, const void *from, size_t n) { \
        const void *code = __builtin_return_address(0); \
        emu::note_access(from, n, emu::READ, code), emu::note_access(to, n, emu::WRITE, code); \
        return memmove(to, from, n); \
    }
HOOK_COPY(memcpy)
HOOK_COPY(__tsan_memcpy)
void *__tsan_memmove(void *to, const void *from, size_t n) { return memmove(to, from, n); }
void *__tsan_memset(void *p, int value, size_t n) { return memset(p, value, n); }
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void **, void *) {}
}
