/* turn_x86.h - what gemm_simd.h needs to transpose, for kernels_avx2.c and kernels_avx512.c. */
#ifndef DBF_TURN_X86_H
#define DBF_TURN_X86_H

#define VT 8
typedef __m256 vt;
#define vt_load _mm256_loadu_ps
#define vt_store _mm256_storeu_ps

static inline vt vt_gather(const float *p, size_t stride)
{
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * stride), 1);
}

static inline void vt_scatter(float *p, size_t stride, vt v)
{
    _mm_storeu_ps(p, _mm256_castps256_ps128(v));
    _mm_storeu_ps(p + 4 * stride, _mm256_extractf128_ps(v, 1));
}

#define vt_turn(a, b, c, d)                                                 \
    do {                                                                    \
        vt ab_ = _mm256_unpacklo_ps(a, b), ab2_ = _mm256_unpackhi_ps(a, b); \
        vt cd_ = _mm256_unpacklo_ps(c, d), cd2_ = _mm256_unpackhi_ps(c, d); \
        a = _mm256_shuffle_ps(ab_, cd_, 0x44);                              \
        b = _mm256_shuffle_ps(ab_, cd_, 0xee);                              \
        c = _mm256_shuffle_ps(ab2_, cd2_, 0x44);                            \
        d = _mm256_shuffle_ps(ab2_, cd2_, 0xee);                            \
    } while (0)

#endif
