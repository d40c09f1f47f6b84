// cuda_bf16.h -- BF16 as a type, with the toolkit's names, and the tensor cores' instructions on it. Include
// it after train_us.c, which has the format.
#pragma once
#include "cuda_runtime.h"
struct __nv_bfloat16 {
    unsigned short x;
    __nv_bfloat16() = default;
    EMU_INLINE __nv_bfloat16(float f) : x((unsigned short)(float_bits(round_bf16(f)) >> 16)) {}
    EMU_INLINE operator float() const { return bits_float((uint32_t)x << 16); }
};
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
EMU_INLINE __nv_bfloat16 __float2bfloat16_rn(float f) { return f; }
EMU_INLINE __nv_bfloat16 __float2bfloat16(float f) { return f; }
EMU_INLINE float __bfloat162float(__nv_bfloat16 h) { return h; }
EMU_INLINE __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
EMU_INLINE float2 __bfloat1622float2(__nv_bfloat162 h) { return {h.x, h.y}; }

namespace emu {
// mma.sync on E values a register: BF16 (E = 2), or bytes (E = 4) whose values are in tables. Lane 4g + t
// has in register r of a the values of row g + 8 (r % 2) from column E t + 4E (r / 2) on, in register r of b
// those of column g from row E t + 4E r on, and in d[r] row g + 8 (r / 2), column 2t + r % 2.
typedef float Four __attribute__((vector_size(16)));             // in a register that every CPU has
template <int E> void mma(float *d, const uint32_t *a, const uint32_t *b, const float *values_a,
                          const float *values_b, int line) {
    struct Lane { float *d; const uint32_t *a, *b; const float *values_a, *values_b; };
    Lane mine = {d, a, b, values_a, values_b};
    meet("mma.sync", ~0u, line, &mine, [](void **lanes, unsigned) {
        union { float at[8]; Four four[2]; } B[8 * E], sum;
        float A[16][8 * E];
        for (int l = 0; l < 32; l++) for (int i = 0; i < E; i++) {
            const Lane &x = *(Lane *)lanes[l];
            const int g = l / 4, t = l % 4;
            auto value = [i](uint32_t v, const float *values) {
                return E == 2 ? bits_float(v >> 16 * i << 16) : values[v >> 8 * i & 255];
            };
            for (int r = 0; r < 4; r++) A[g + r % 2 * 8][E * t + r / 2 * 4 * E + i] = value(x.a[r],
                    x.values_a);
            for (int r = 0; r < 2; r++) B[E * t + r * 4 * E + i].at[g] = value(x.b[r], x.values_b);
        }
        for (int row = 0; row < 16; row++) {
            sum.four[0] = sum.four[1] = Four{};
            for (int k = 0; k < 8 * E; k++) for (int h = 0; h < 2; h++)
                sum.four[h] += A[row][k] * B[k].four[h];
            for (int c = 0; c < 8; c++)
                ((Lane *)lanes[row % 8 * 4 + c / 2])->d[row / 8 * 2 + c % 2] += sum.at[c];
        }
    });
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMU_LINE) {
    mma<2>(d, a, b, nullptr, nullptr, line);                     // m16n8k16
}
// Lane 8j + i names row i of matrix j; lane 4g + t gets values 2t, 2t + 1 of row g, or of column g.
template <int N> EMU_INLINE void ldmatrix(uint32_t (&r)[N], const void *row, bool trans = false, EMU_LINE) {
    struct Lane { uint16_t row[8]; uint32_t *r; bool trans; } mine = {{}, r, trans};
    if (lane() < 8 * N && ((uintptr_t)row % 16 || !in_shared(row, 16)))
        EMU_FAIL("ldmatrix at line %d: %p is not shared memory aligned to 16 bytes", line, row);
    if (lane() < 8 * N) memcpy(mine.row, row, 16);
    meet("ldmatrix", ~0u, line, &mine, [](void **lanes, unsigned) {
        for (int l = 0; l < 32; l++) for (int j = 0; j < N; j++) {
            const int g = l / 4, t = l % 4 * 2;
            const Lane &me = *(Lane *)lanes[l], **matrix = (const Lane **)lanes + 8 * j;
            me.r[j] = me.trans ? matrix[t]->row[g] | (uint32_t)matrix[t + 1]->row[g] << 16
                               : matrix[g]->row[t] | (uint32_t)matrix[g]->row[t + 1] << 16;
        }
    });
}
} // namespace emu
