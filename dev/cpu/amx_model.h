/*
amx_model.h: the instructions of Intel's matrix unit (AMX) that train_us.c uses, in plain C, so that its code
for them is tested where there are none: `gcc -include dev/cpu/amx_model.h ...`. Bit for bit what TDPBF16PS
does (Intel 64 and IA-32 Architectures Software Developer's Manual; compared with a Sapphire Rapids): of 16
pairs the sum of all first products and that of all second ones, each by FMA in order; these two are added,
then the sum so far; numbers below 2^-126 are 0 before and after each operation. AMX_REFUSED=1 in the
environment: the kernel refuses its use.
*/
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#ifdef __SSE2__
#include <immintrin.h>  // which has the real ones, as macros
#endif
#ifndef __AMX_BF16__
#define __AMX_BF16__ 1
#endif
#ifndef SYS_arch_prctl
#define SYS_arch_prctl 0
#endif
#define syscall(...) (getenv("AMX_REFUSED") ? -1 : 0)
#undef _tile_loadconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(shapes) amx_configure(shapes)
#define _tile_zero(t) memset(amx_tile(t), 0, sizeof(AmxTile))
#define _tile_loadd(t, from, stride) amx_copy((char*)amx_tile(t), 64, (const char*)(from), stride)
#define _tile_stored(t, to, stride) amx_copy((char*)(to), stride, (const char*)amx_tile(t), 64)
#define _tile_dpbf16ps(c, a, b) amx_multiply(amx_tile(c), amx_tile(a), amx_tile(b))

typedef float AmxTile[16][16];
static __thread AmxTile amx_tiles[8];
static __thread int amx_configured;  // each thread for itself: without it the hardware stops the program
static float (*amx_tile(int t))[16] {
    if (!amx_configured) abort();
    return amx_tiles[t];
}
static void amx_configure(const void* shapes) {  // palette 1; 64 bytes and 16 rows for each register used
    const uint8_t* byte = (const uint8_t*)shapes;
    for (int t = 0; t < 8; t++)
        if (byte[0] != 1 || byte[1] != 0 || byte[16 + 2 * t] != 64 || byte[48 + t] != 16) abort();
    memset(amx_tiles, 0xFF, sizeof amx_tiles);  // NaN, until they are set
    amx_configured = 1;
}
static void amx_copy(char* to, long to_stride, const char* from, long from_stride) {
    for (int i = 0; i < 16; i++) memcpy(to + i * to_stride, from + i * from_stride, 64);
}
static float amx_flushed(float x) { return fabsf(x) < FLT_MIN ? copysignf(0, x) : x; }
static float amx_half(float pair, int high) {
    uint32_t u;
    memcpy(&u, &pair, 4);
    u = high ? u & 0xFFFF0000u : u << 16;
    memcpy(&pair, &u, 4);
    return amx_flushed(pair);
}
static void amx_multiply(AmxTile c, AmxTile a, AmxTile b) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float sum[2] = {0, 0};
            for (int k = 0; k < 16; k++)
                for (int h = 0; h < 2; h++)
                    sum[h] = amx_flushed(fmaf(amx_half(a[i][k], h), amx_half(b[k][j], h), sum[h]));
            c[i][j] = amx_flushed(amx_flushed(c[i][j]) + amx_flushed(sum[0] + sum[1]));
        }
}
