/* kernels_avx512.c - AVX-512 F, BW, VL and DQ; compiled with these flags (CMakeLists.txt), called only where CPU and
 * system have them.
 *
 *   vpshufb          64 table look-ups: a panel's 64 rows fill one register
 *   vbroadcasti32x4  one table for all four quarters, on a load port
 *   vpmaddwd         int8 weights x int16 activations of two rows
 *
 * Registers of 512 bits run on two ports instead of three. Sign products by the method of lut16_x86.h take 13.5 vector
 * instructions for 512 signs, 6.75 cycles, where AVX2 needs 27 and 9. What else was tried:
 *   VNNI  selecting with AND and adding with vpdpbusd, on two int8 planes of the activations, takes 24 and 12.
 *   VBMI  vpermi2b looks up 128 entries, all 8 columns of a group with one sign folded away: 10.5 instructions, but it
 *         takes two of an Intel core's cycles for shuffles where vpshufb takes one. On a Sapphire Rapids, weights and
 *         tables in the caches, 148 Gs/s, where this gives 197. vpermb: kernels_avx512vbmi.c. */
#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#include "lut16.h"
#include "scalar.h"

#define VW 16
typedef __m512 vf;
typedef __m512i vi;
#define vf_load _mm512_loadu_ps
#define vf_store _mm512_storeu_ps
#define vf_set1 _mm512_set1_ps
#define vf_max _mm512_max_ps
#define vf_min _mm512_min_ps
#define vf_rint(x) _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define vf_f16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define vf_to_f16(p, x) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT))
#define vf_from_i32(p) _mm512_cvtepi32_ps(_mm512_loadu_si512(p))
#define vf_i8(p) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define vf_store_i16(p, x) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)))
#define vf_abs_bits(x) _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff))
#define vi_max _mm512_max_epi32
#define vi_store _mm512_storeu_si512
#define vi_load _mm512_loadu_si512
#define vf_and(x, mask) _mm512_and_ps(x, _mm512_castsi512_ps(mask))

static inline vf vf_pow2(vf n)
{
    __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}

static inline float sum8(__m256 v) /* lanes_sum from half = 4 on */
{
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}
#define lanes_of(acc) sum8(_mm256_add_ps(_mm512_castps512_ps256(acc[0]), _mm512_extractf32x8_ps(acc[0], 1)))
#define halves_of(acc) acc[0]
#define FLIGHT 16

static inline vf sums_of(const vf *v)
{
    vf u[8], w[4], s, t;
    for (int i = 0; i < 8; i++) { /* rows r and r + 4 */
        int r = i < 4 ? i : i + 4;
        u[i] = _mm512_shuffle_f32x4(v[r], v[r + 4], 0x44) + _mm512_shuffle_f32x4(v[r], v[r + 4], 0xee);
    }
    for (int i = 0; i < 4; i++) /* rows i, i + 4, i + 8, i + 12 */
        w[i] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88) + _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
    s = _mm512_shuffle_ps(w[0], w[1], 0x44) + _mm512_shuffle_ps(w[0], w[1], 0xee);
    t = _mm512_shuffle_ps(w[2], w[3], 0x44) + _mm512_shuffle_ps(w[2], w[3], 0xee);
    return _mm512_shuffle_ps(s, t, 0x88) + _mm512_shuffle_ps(s, t, 0xdd);
}

#include "float_simd.h"

#define VH_BYTES 64
#define vh_avg(a, b) ((vh)_mm512_avg_epu16((__m512i)(a), (__m512i)(b)))
#define PANEL_STEP 4 /* sign_pack_avx512 */
#include "turn_x86.h"
#include "gemm_simd.h"

/* ---- layouts ---------------------------------------------------------------------------------------------- */

/* Weights: those of lut16.h, with row 16i + j of a panel in byte 4j + i of its 64, so that the sums of the bytes i of
 * all 32-bit words are 16 neighbouring rows. */
static void sign_pack_avx512(uint8_t *w, const uint8_t *bits, int rows, int cols)
{
    uint8_t order[DBF_PANEL];
    for (int r = 0; r < DBF_PANEL; r++) order[4 * (r % 16) + r / 16] = (uint8_t)r;
    lut16_pack_as(order, w, bits, rows, cols);
}

/* ---- sign products ---------------------------------------------------------------------------------------- */

#define vb_table(p) ((vb)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(p))))
#define vb_low(v) ((v) & 15)
#define vb_high(v) ((vb)((vw)(v) >> 4) & 15)
#define vb_look_up(table, v) ((vb)_mm512_shuffle_epi8((__m512i)(table), (__m512i)(v)))

#include "lut16_avx512.h"
#include "table_x86.h"

#define SHUFFLE(i, j) _mm512_shuffle_epi8(parts, _mm512_broadcast_i32x4(PICKS(i, j)))

typedef struct entries {
    __m512i e0, e8;
} entries_t;

/* the entries 0-7 and 8-15, which differ in column 3 only, of the columns 0-3, 8-11, 4-7 and 12-15 */
INLINE entries_t entries(__m256i plus, __m256i minus)
{
    const __m512i order = _mm512_setr_epi64(0, 8, 2, 10, 1, 9, 3, 11);
    __m512i parts = _mm512_permutex2var_epi64(_mm512_castsi256_si512(plus), order, _mm512_castsi256_si512(minus));
    __m512i three = _mm512_add_epi16(_mm512_add_epi16(SHUFFLE(0, 0), SHUFFLE(0, 1)), SHUFFLE(0, 2));
    return (entries_t){ _mm512_add_epi16(three, SHUFFLE(0, 3)), _mm512_add_epi16(three, SHUFFLE(8, 3)) };
}

INLINE void make_pair(uint8_t *out, __m256i plus, __m256i minus)
{
    entries_t e = entries(plus, minus);
    const __m512i bits = _mm512_set1_epi16(127);
    _mm512_storeu_si512(out, _mm512_packus_epi16(_mm512_and_si512(e.e0, bits), _mm512_and_si512(e.e8, bits)));
    _mm512_storeu_si512(out + 64, _mm512_packus_epi16(_mm512_srli_epi16(e.e0, 7), _mm512_srli_epi16(e.e8, 7)));
}

INLINE void make_pair8(uint8_t *out, __m256i plus, __m256i minus)
{
    entries_t e = entries(plus, minus);
    _mm512_storeu_si512(out, _mm512_packus_epi16(e.e0, e.e8));
}

/* ---- around the sign products: as in float_simd.h, but the last elements, too, are a vector ---------------- */

#define ALL ((__mmask16)0xffff)

static inline __mmask16 first(int n)
{
    return (__mmask16)((1u << n) - 1);
}

/* z = x * s of 16; returns the bits of |z| */
static inline __m512i scale_16(float *z, const float *x, const uint16_t *s, __mmask16 some)
{
    vf v = _mm512_maskz_loadu_ps(some, x);
    if (s) {
        v = v * _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, s));
        _mm512_mask_storeu_ps(z, some, v);
    }
    return vf_abs_bits(v);
}

static inline void quantize_16(int16_t *q, const float *x, vf inverse, __mmask16 some)
{
    __m512i v = _mm512_cvtps_epi32(_mm512_maskz_loadu_ps(some, x) * inverse);
    _mm256_mask_storeu_epi16(q, some, _mm512_cvtepi32_epi16(v));
}

static inline float quantize_scaled_avx512(int16_t *q, float *z, const float *x, const uint16_t *s, int n, int qmax)
{
    __m512i top = _mm512_setzero_si512();
    int i = 0;
    for (; i + 16 <= n; i += 16) top = vi_max(top, scale_16(s ? z + i : NULL, x + i, s ? s + i : NULL, ALL));
    if (i < n) top = vi_max(top, scale_16(s ? z + i : NULL, x + i, s ? s + i : NULL, first(n - i)));
    float inverse, scale = scale_to((float)qmax, (uint32_t)_mm512_reduce_max_epi32(top), &inverse);
    if (!(inverse > 0.0f)) {
        memset(q, 0, (size_t)n * sizeof *q);
        return scale;
    }
    x = s ? z : x;
    for (i = 0; i + 16 <= n; i += 16) quantize_16(q + i, x + i, vf_set1(inverse), ALL);
    if (i < n) quantize_16(q + i, x + i, vf_set1(inverse), first(n - i));
    return scale;
}

static float quantize_avx512(int16_t *q, const float *x, int n)
{
    return quantize_scaled_avx512(q, NULL, x, NULL, n, DBF_QMAX);
}

static inline void descale_16(float *y, const int32_t *isum, float scale, const uint16_t *s, const float *bias,
                              __mmask16 some)
{
    vf v = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(some, isum)) * vf_set1(scale);
    v = v * _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, s));
    if (bias) v = v + _mm512_maskz_loadu_ps(some, bias);
    _mm512_mask_storeu_ps(y, some, v);
}

static void descale_avx512(float *y, const int32_t *isum, float scale, const uint16_t *s, const float *bias, int n)
{
    int i = 0;
    for (; i + 16 <= n; i += 16) descale_16(y + i, isum + i, scale, s + i, bias ? bias + i : NULL, ALL);
    if (i < n) descale_16(y + i, isum + i, scale, s + i, bias ? bias + i : NULL, first(n - i));
}

/* ---- unfactorized matrices -------------------------------------------------------------------------------- */

/* 16 bytes from p and 16 from p1 */
INLINE __m256i two_loads(const uint8_t *p, const uint8_t *p1)
{
    return _mm256_set_m128i(_mm_loadu_si128((const __m128i *)p1), _mm_loadu_si128((const __m128i *)p));
}

/* one block of two rows: the first in the lower halves of the registers, the second in the upper; columns 0-15 and
 * 16-31 as int16 */
typedef void unpack_t(__m512i *v, const uint8_t *block, const uint8_t *block1);

INLINE void unpack_q4_0(__m512i *v, const uint8_t *block, const uint8_t *block1)
{
    __m512i words = _mm512_cvtepu8_epi16(two_loads(block + 2, block1 + 2));
    v[0] = _mm512_sub_epi16(_mm512_and_si512(words, _mm512_set1_epi16(15)), _mm512_set1_epi16(8));
    v[1] = _mm512_sub_epi16(_mm512_srli_epi16(words, 4), _mm512_set1_epi16(8));
}

INLINE void unpack_q8_0(__m512i *v, const uint8_t *block, const uint8_t *block1)
{
    v[0] = _mm512_cvtepi8_epi16(two_loads(block + 2, block1 + 2));
    v[1] = _mm512_cvtepi8_epi16(two_loads(block + 18, block1 + 18));
}

/* the float16 at p in the lower half, that at p1 in the upper */
INLINE __m512 two_scales(const uint8_t *p, const uint8_t *p1)
{
    const __m256i scales = _mm256_set1_epi16(0x0100); /* word 0 of every 128 bits, eight times */
    int32_t four, four1; /* bytes, of which the scale is two */
    memcpy(&four, p, sizeof four);
    memcpy(&four1, p1, sizeof four1);
    __m256i heads = _mm256_mask_set1_epi32(_mm256_set1_epi32(four), 0xf0, four1);
    return _mm512_cvtph_ps(_mm256_shuffle_epi8(heads, scales));
}

/* four rows side by side, whose weights are prefetched as the one stream they are */
INLINE void rows_blocks(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols,
                        unpack_t *unpack, int bytes)
{
    size_t row = (size_t)cols / 32 * (size_t)bytes;
    for (int r = 0; r < rows; r += 4, w += 4 * row) {
        int some = rows - r < 4 ? rows - r : 4;
        const uint8_t *w0 = w, *w1 = some > 1 ? w0 + row : w0, *w2 = some > 2 ? w1 + row : w0,
                      *w3 = some > 3 ? w2 + row : w0;
        __m512 acc[DBF_BATCH][2] = { 0 };
        size_t at = 0;
        for (int k = 0; k < cols; k += 32, at += (size_t)bytes) {
            __m512i v[2], u[2];
            const char *ahead = (const char *)w + AHEAD + 4 * at;
            for (int i = 0; i < 4 * bytes; i += 64) { /* into the L2 cache, then from there: see lut16_x86.h */
                _mm_prefetch(ahead + AHEAD + i, _MM_HINT_T1);
                _mm_prefetch(ahead + i, _MM_HINT_T0);
            }
            unpack(v, w0 + at, w1 + at);
            unpack(u, w2 + at, w3 + at);
            __m512 d01 = two_scales(w0 + at, w1 + at), d23 = two_scales(w2 + at, w3 + at);
            for (int i = 0; i < n; i++) {
                const __m256i *p = (const __m256i *)(q + (size_t)i * cols + k);
                __m512i q0 = _mm512_broadcast_i64x4(_mm256_loadu_si256(p));
                __m512i q16 = _mm512_broadcast_i64x4(_mm256_loadu_si256(p + 1));
                __m512i s01 = _mm512_add_epi32(_mm512_madd_epi16(v[0], q0), _mm512_madd_epi16(v[1], q16));
                __m512i s23 = _mm512_add_epi32(_mm512_madd_epi16(u[0], q0), _mm512_madd_epi16(u[1], q16));
                acc[i][0] = acc[i][0] + _mm512_cvtepi32_ps(s01) * d01;
                acc[i][1] = acc[i][1] + _mm512_cvtepi32_ps(s23) * d23;
            }
        }
        for (int i = 0; i < n; i++) {
            float out[4] = { sum8(_mm512_castps512_ps256(acc[i][0])), sum8(_mm512_extractf32x8_ps(acc[i][0], 1)),
                             sum8(_mm512_castps512_ps256(acc[i][1])), sum8(_mm512_extractf32x8_ps(acc[i][1], 1)) };
            for (int j = 0; j < some; j++) y[(size_t)i * rows + r + j] = out[j] * scale[i];
        }
    }
}

static void gemv_q4_0_avx512(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows,
                             int cols)
{
    IN_BATCHES(rows_blocks(y + (size_t)i * rows, w, q + (size_t)i * cols, scale + i, N, rows, cols, unpack_q4_0,
                           DBF_Q4_0_BYTES))
}

static void gemv_q8_0_avx512(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows,
                             int cols)
{
    IN_BATCHES(rows_blocks(y + (size_t)i * rows, w, q + (size_t)i * cols, scale + i, N, rows, cols, unpack_q8_0,
                           DBF_Q8_0_BYTES))
}

/* half a Q6_K block, times s, as four registers of 32 int16 */
INLINE void unpack_q6_k(__m512i *v, const uint8_t *block, __m512i s, int half)
{
    const __m512i nibble = _mm512_set1_epi8(15), two = _mm512_set1_epi8(0x30), bias = _mm512_set1_epi8(32);
    const __m512i left = _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_set1_epi16(2), 1);
    const __m512i right = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
    __m512i low = _mm512_loadu_si512(block + 64 * half);
    __m512i high = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(block + Q6_K_HIGH + 32 * half)));
    __m512i b0 = _mm512_or_si512(_mm512_and_si512(low, nibble), _mm512_and_si512(_mm512_sllv_epi16(high, left), two));
    __m512i b1 = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(low, 4), nibble),
                                 _mm512_and_si512(_mm512_srlv_epi16(high, right), two));
    b0 = _mm512_sub_epi8(b0, bias), b1 = _mm512_sub_epi8(b1, bias);
    v[0] = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(b0));
    v[1] = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(b0, 1));
    v[2] = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(b1));
    v[3] = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(b1, 1));
    for (int j = 0; j < 4; j++) {
        int g = 8 * half + 2 * j; /* its s for the lower half, the next one for the upper */
        __m512i pick = _mm512_inserti64x4(_mm512_set1_epi16((short)g), _mm256_set1_epi16((short)(g + 1)), 1);
        v[j] = _mm512_mullo_epi16(v[j], _mm512_permutexvar_epi16(pick, s));
    }
}

INLINE void rows_q6_k(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols)
{
    for (int r = 0; r < rows; r++) {
        __m256 acc[DBF_BATCH] = { 0 };
        for (int k = 0; k < cols; k += DBF_Q6_K_BLOCK, w += DBF_Q6_K_BYTES) {
            __m512i isum[DBF_BATCH] = { 0 };
            __m512i s = _mm512_castsi256_si512(
                _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + Q6_K_SCALES))));
            for (int i = 0; i < DBF_Q6_K_BYTES; i += 64) _mm_prefetch((const char *)w + AHEAD + i, _MM_HINT_T0);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                __m512i v[4];
                unpack_q6_k(v, w, s, half);
                for (int i = 0; i < n; i++)
                    for (int j = 0; j < 4; j++) {
                        __m512i p = _mm512_loadu_si512(q + (size_t)i * cols + k + 128 * half + 32 * j);
                        isum[i] = _mm512_add_epi32(isum[i], _mm512_madd_epi16(v[j], p));
                    }
            }
            int16_t d16;
            memcpy(&d16, w + Q6_K_D, sizeof d16);
            __m256 d = _mm512_castps512_ps256(_mm512_cvtph_ps(_mm256_set1_epi16(d16)));
            for (int i = 0; i < n; i++) {
                __m256i both = _mm256_add_epi32(_mm512_castsi512_si256(isum[i]),
                                                _mm512_extracti64x4_epi64(isum[i], 1));
                acc[i] = acc[i] + _mm256_cvtepi32_ps(both) * d;
            }
        }
        for (int i = 0; i < n; i++) y[(size_t)i * rows + r] = sum8(acc[i]) * scale[i];
    }
}

static void gemv_q6_k_avx512(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows,
                             int cols)
{
    IN_BATCHES(rows_q6_k(y + (size_t)i * rows, w, q + (size_t)i * cols, scale + i, N, rows, cols))
}

void kernels_avx512(kernels_t *k)
{
    k->name = "avx512";
    k->sign_table_bytes = lut16_table_bytes;
    k->sign_pack_bytes = lut16_pack_bytes;
    k->sign_table = sign_table_x86;
    k->sign_pack = sign_pack_avx512;
    k->sign_gemv = sign_gemv_x86;
    k->sign_table8 = sign_table8_x86;
    k->sign_gemv8 = sign_gemv8_x86;
    k->gemv_q4_0 = gemv_q4_0_avx512;
    k->gemv_q8_0 = gemv_q8_0_avx512;
    k->gemv_q6_k = gemv_q6_k_avx512;
    set_float_kernels(k);
    set_gemm_kernels(k);
    k->quantize = quantize_avx512;
    k->quantize_scaled = quantize_scaled_avx512;
    k->descale = descale_avx512;
}

#else
typedef int dbf_no_avx512; /* a translation unit must not be empty */
#endif
