/* lut16_avx512.h - lut16_x86.h for a panel's 64 rows in one register, in the order of sign_pack_avx512.
 *
 * The including file defines, before this, vb_low, vb_high, vb_table and vb_look_up. */
#ifndef DBF_LUT16_AVX512_H
#define DBF_LUT16_AVX512_H

#define LB 64
#define vb_avg(a, b) ((vb)_mm512_avg_epu8((__m512i)(a), (__m512i)(b)))

#include "lut16_x86.h"

/* isum[16] += 2 * low + 256 * high of the lower or the upper u16 of every 32 bits */
static inline void flush_16(int32_t *isum, vw low16, vw high16, int upper)
{
    __m512i l = (__m512i)low16, h = (__m512i)high16;
    if (upper) {
        l = _mm512_srli_epi32(l, 16);
        h = _mm512_srli_epi32(h, 16);
    } else {
        l = _mm512_and_si512(l, _mm512_set1_epi32(0xffff));
        h = _mm512_and_si512(h, _mm512_set1_epi32(0xffff));
    }
    __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(l, 1), _mm512_slli_epi32(h, 8));
    _mm512_storeu_si512(isum, _mm512_add_epi32(_mm512_loadu_si512(isum), sum));
}

static inline void flush(int32_t *isum, sums_t low, sums_t high)
{
    flush_16(isum, low.even, high.even, 0);
    flush_16(isum + 16, low.odd, high.odd, 0);
    flush_16(isum + 32, low.even, high.even, 1);
    flush_16(isum + 48, low.odd, high.odd, 1);
}

#endif
