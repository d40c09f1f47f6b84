// cuda_fp8.h -- E4M3 and E5M2 as bytes, with the toolkit's names. Include it after train_us.c, which has the
// formats.
#pragma once
#include "cuda_bf16.h"
typedef unsigned char __nv_fp8_storage_t;
enum __nv_saturation_t { __NV_SATFINITE = 1 };       // conversions that do not saturate do not compile here
enum __nv_fp8_interpretation_t { __NV_E4M3 = E4M3, __NV_E5M2 = E5M2 };
EMU_INLINE __nv_fp8_storage_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t, __nv_fp8_interpretation_t f) {
    return fp8_encode(x, (Format)f);
}
EMU_INLINE unsigned short __nv_cvt_float2_to_fp8x2(float2 x, __nv_saturation_t, __nv_fp8_interpretation_t f) {
    return (unsigned short)(fp8_encode(x.x, (Format)f) | fp8_encode(x.y, (Format)f) << 8);
}
namespace emu {
static const struct Values {                         // of all 256 codes, in both formats
    float e4m3[256], e5m2[256];
    Values() { for (int i = 0; i < 256; i++) e4m3[i] = fp8_decode(i, E4M3), e5m2[i] = fp8_decode(i, E5M2); }
} values;
inline const float *fp8_values(Format f) { return f == E4M3 ? values.e4m3 : values.e5m2; }
inline void mma_fp8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Format fa, Format fb,
        EMU_LINE) {
    mma<4>(d, a, b, fp8_values(fa), fp8_values(fb), line);            // m16n8k32
}
} // namespace emu
#define EMU_FP8(NAME, FORMAT) struct NAME { \
        __nv_fp8_storage_t __x; \
        NAME() = default; \
        EMU_INLINE explicit NAME(float f) : __x(fp8_encode(f, FORMAT)) {} \
        EMU_INLINE explicit operator float() const { return emu::fp8_values(FORMAT)[__x]; } \
    };
EMU_FP8(__nv_fp8_e4m3, E4M3)
EMU_FP8(__nv_fp8_e5m2, E5M2)
