/* kernels_avx2.c - AVX2 + F16C; compiled with -mavx2 -mf16c (CMakeLists.txt), called only where the CPU has both.
 *
 *   vpshufb      32 table look-ups                 vbroadcasti128   one table for both halves
 *   vpsrlw       the odd bytes of a pair sum       vpmaddwd         int8 weights x int16 activations
 */
#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#include "lut16.h"
#include "scalar.h"

#define VW 8
typedef __m256 vf;
typedef __m256i vi;
#define vf_load _mm256_loadu_ps
#define vf_store _mm256_storeu_ps
#define vf_set1 _mm256_set1_ps
#define vf_max _mm256_max_ps
#define vf_min _mm256_min_ps
#define vf_rint(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define vf_f16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define vf_to_f16(p, x) _mm_storeu_si128((__m128i *)(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT))
#define vf_from_i32(p) _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define vf_i8(p) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define vf_abs_bits(x) _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff))
#define vi_max _mm256_max_epi32
#define vi_store(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define vi_load(p) _mm256_loadu_si256((const __m256i *)(p))
#define vf_and(x, mask) _mm256_and_ps(x, _mm256_castsi256_ps(mask))

static inline vf vf_pow2(vf n)
{
    __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

static inline void vf_store_i16(int16_t *p, vf x)
{
    __m256i v = _mm256_cvtps_epi32(x);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}

static inline float sum8(__m256 v) /* lanes_sum from half = 4 on */
{
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}
#define halves_of(acc) (acc[0] + acc[1])
#define lanes_of(acc) sum8(halves_of(acc))
#define FLIGHT 4

static inline vf sums_of(const vf *v)
{
    vf u[4], s, t;
    for (int i = 0; i < 4; i++) /* rows i and i + 4 */
        u[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20) + _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
    s = _mm256_shuffle_ps(u[0], u[1], 0x44) + _mm256_shuffle_ps(u[0], u[1], 0xee);
    t = _mm256_shuffle_ps(u[2], u[3], 0x44) + _mm256_shuffle_ps(u[2], u[3], 0xee);
    return _mm256_shuffle_ps(s, t, 0x88) + _mm256_shuffle_ps(s, t, 0xdd);
}

#include "float_simd.h"

#define VH_BYTES 32
#define vh_avg(a, b) ((vh)_mm256_avg_epu16((__m256i)(a), (__m256i)(b)))
#define PANEL_STEP 1
#include "turn_x86.h"
#include "gemm_simd.h"

/* ---- sign products ---------------------------------------------------------------------------------------- */

#define LB 32
#define vb_table(p) ((vb)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(p))))
#define vb_low(v) ((v) & 15)
#define vb_high(v) ((vb)((vw)(v) >> 4) & 15)
#define vb_look_up(table, v) ((vb)_mm256_shuffle_epi8((__m256i)(table), (__m256i)(v)))
#define vb_avg(a, b) ((vb)_mm256_avg_epu8((__m256i)(a), (__m256i)(b)))

#include "lut16_x86.h"
#include "table_x86.h"

#define SHUFFLE(i, j) _mm256_shuffle_epi8(parts, _mm256_broadcastsi128_si256(PICKS(i, j)))

typedef struct entries {
    __m256i e0, e8;
} entries_t;

/* the entries 0-7 and 8-15, which differ in column 3 only, of 4 columns of each group */
INLINE entries_t entries(__m256i parts)
{
    __m256i three = _mm256_add_epi16(_mm256_add_epi16(SHUFFLE(0, 0), SHUFFLE(0, 1)), SHUFFLE(0, 2));
    return (entries_t){ _mm256_add_epi16(three, SHUFFLE(0, 3)), _mm256_add_epi16(three, SHUFFLE(8, 3)) };
}

INLINE void make_pair(uint8_t *out, __m256i plus, __m256i minus)
{
    const __m256i bits = _mm256_set1_epi16(127);
    for (int half = 0; half < 2; half++, out += 32) {
        entries_t e = entries(half ? _mm256_unpackhi_epi64(plus, minus) : _mm256_unpacklo_epi64(plus, minus));
        __m256i low = _mm256_packus_epi16(_mm256_and_si256(e.e0, bits), _mm256_and_si256(e.e8, bits));
        __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(e.e0, 7), _mm256_srli_epi16(e.e8, 7));
        _mm256_storeu_si256((__m256i *)out, low);
        _mm256_storeu_si256((__m256i *)out + 2, high);
    }
}

INLINE void make_pair8(uint8_t *out, __m256i plus, __m256i minus)
{
    entries_t low = entries(_mm256_unpacklo_epi64(plus, minus)), high = entries(_mm256_unpackhi_epi64(plus, minus));
    _mm256_storeu_si256((__m256i *)out, _mm256_packus_epi16(low.e0, low.e8));
    _mm256_storeu_si256((__m256i *)out + 1, _mm256_packus_epi16(high.e0, high.e8));
}

static inline void flush(int32_t *isum, sums_t low, sums_t high)
{
    __m256i l[2] = { _mm256_unpacklo_epi16((__m256i)low.even, (__m256i)low.odd),
                     _mm256_unpackhi_epi16((__m256i)low.even, (__m256i)low.odd) };
    __m256i h[2] = { _mm256_unpacklo_epi16((__m256i)high.even, (__m256i)high.odd),
                     _mm256_unpackhi_epi16((__m256i)high.even, (__m256i)high.odd) };
    for (int i = 0; i < 4; i++) { /* rows 8i .. 8i+7 */
        __m128i l16 = i < 2 ? _mm256_castsi256_si128(l[i & 1]) : _mm256_extracti128_si256(l[i & 1], 1);
        __m128i h16 = i < 2 ? _mm256_castsi256_si128(h[i & 1]) : _mm256_extracti128_si256(h[i & 1], 1);
        __m256i low32 = _mm256_cvtepu16_epi32(l16), high32 = _mm256_cvtepu16_epi32(h16);
        __m256i v = _mm256_add_epi32(_mm256_slli_epi32(low32, 1), _mm256_slli_epi32(high32, 8));
        __m256i *sum = (__m256i *)(isum + 8 * i);
        _mm256_storeu_si256(sum, _mm256_add_epi32(_mm256_loadu_si256(sum), v));
    }
}

/* ---- unfactorized matrices -------------------------------------------------------------------------------- */

/* one block as two registers of int16, the columns 0-15 and 16-31 */
typedef void unpack_t(__m256i *v, const uint8_t *block);

INLINE void unpack_q4_0(__m256i *v, const uint8_t *block)
{
    __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(block + 2)));
    v[0] = _mm256_sub_epi16(_mm256_and_si256(words, _mm256_set1_epi16(15)), _mm256_set1_epi16(8));
    v[1] = _mm256_sub_epi16(_mm256_srli_epi16(words, 4), _mm256_set1_epi16(8));
}

INLINE void unpack_q8_0(__m256i *v, const uint8_t *block)
{
    v[0] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(block + 2)));
    v[1] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(block + 18)));
}

/* the float16 in half number `at` of the four bytes at p, in all lanes: they go straight into a vector register */
INLINE __m256 scale_at(const uint8_t *p, int at)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_srli_epi32(_mm_cvtsi32_si128(four), 16 * at)));
}

INLINE void rows_blocks(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols,
                        unpack_t *unpack, int bytes)
{
    for (int r = 0; r < rows; r++) {
        __m256 acc[DBF_BATCH] = { 0 };
        for (int k = 0; k < cols; k += 32, w += bytes) {
            __m256i v[2];
            unpack(v, w);
            __m256 d = scale_at(w, 0);
            for (int i = 0; i < n; i++) {
                const __m256i *p = (const __m256i *)(q + (size_t)i * cols + k);
                __m256i isum = _mm256_add_epi32(_mm256_madd_epi16(v[0], _mm256_loadu_si256(p)),
                                                _mm256_madd_epi16(v[1], _mm256_loadu_si256(p + 1)));
                acc[i] = acc[i] + _mm256_cvtepi32_ps(isum) * d;
            }
            _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);
        }
        for (int i = 0; i < n; i++) y[(size_t)i * rows + r] = sum8(acc[i]) * scale[i];
    }
}

static void gemv_q4_0_avx2(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols)
{
    IN_BATCHES(rows_blocks(y + (size_t)i * rows, w, q + (size_t)i * cols, scale + i, N, rows, cols, unpack_q4_0,
                           DBF_Q4_0_BYTES))
}

static void gemv_q8_0_avx2(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols)
{
    IN_BATCHES(rows_blocks(y + (size_t)i * rows, w, q + (size_t)i * cols, scale + i, N, rows, cols, unpack_q8_0,
                           DBF_Q8_0_BYTES))
}

/* columns 32j .. 32j + 31 of a Q6_K block, times their s, as two registers of int16 */
INLINE void unpack_q6_k(__m256i *v, const uint8_t *block, const int16_t *s, int j)
{
    int half = j / 4, quarter = j % 4;
    __m256i low = _mm256_loadu_si256((const __m256i *)(block + half * 64 + quarter % 2 * 32));
    __m256i high = _mm256_loadu_si256((const __m256i *)(block + Q6_K_HIGH + half * 32));
    if (quarter >= 2) low = _mm256_srli_epi16(low, 4);
    high = quarter < 2 ? _mm256_slli_epi16(high, 4 - 2 * quarter) : _mm256_srli_epi16(high, 2 * quarter - 4);
    __m256i bytes = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(15)),
                                    _mm256_and_si256(high, _mm256_set1_epi8(0x30)));
    bytes = _mm256_sub_epi8(bytes, _mm256_set1_epi8(32));
    __m256i v0 = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes));
    __m256i v1 = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1));
    v[0] = _mm256_mullo_epi16(v0, _mm256_set1_epi16(s[2 * j]));
    v[1] = _mm256_mullo_epi16(v1, _mm256_set1_epi16(s[2 * j + 1]));
}

INLINE void rows_q6_k(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols)
{
    for (int r = 0; r < rows; r++) {
        __m256 acc[DBF_BATCH] = { 0 };
        for (int k = 0; k < cols; k += DBF_Q6_K_BLOCK, w += DBF_Q6_K_BYTES) {
            int16_t s[16];
            __m256i isum[DBF_BATCH] = { 0 };
            _mm256_storeu_si256((__m256i *)s,
                                _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + Q6_K_SCALES))));
            for (int i = 0; i < DBF_Q6_K_BYTES; i += 64) _mm_prefetch((const char *)w + AHEAD + i, _MM_HINT_T0);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                __m256i v[2];
                unpack_q6_k(v, w, s, j);
                for (int i = 0; i < n; i++) {
                    const __m256i *p = (const __m256i *)(q + (size_t)i * cols + k + 32 * j);
                    isum[i] = _mm256_add_epi32(isum[i], _mm256_madd_epi16(v[0], _mm256_loadu_si256(p)));
                    isum[i] = _mm256_add_epi32(isum[i], _mm256_madd_epi16(v[1], _mm256_loadu_si256(p + 1)));
                }
            }
            __m256 d = scale_at(w + Q6_K_D - 2, 1);
            for (int i = 0; i < n; i++) acc[i] = acc[i] + _mm256_cvtepi32_ps(isum[i]) * d;
        }
        for (int i = 0; i < n; i++) y[(size_t)i * rows + r] = sum8(acc[i]) * scale[i];
    }
}

static void gemv_q6_k_avx2(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols)
{
    IN_BATCHES(rows_q6_k(y + (size_t)i * rows, w, q + (size_t)i * cols, scale + i, N, rows, cols))
}

void kernels_avx2(kernels_t *k)
{
    k->name = "avx2";
    k->sign_table_bytes = lut16_table_bytes;
    k->sign_pack_bytes = lut16_pack_bytes;
    k->sign_table = sign_table_x86;
    k->sign_pack = lut16_pack;
    k->sign_gemv = sign_gemv_x86;
    k->sign_table8 = sign_table8_x86;
    k->sign_gemv8 = sign_gemv8_x86;
    k->gemv_q4_0 = gemv_q4_0_avx2;
    k->gemv_q8_0 = gemv_q8_0_avx2;
    k->gemv_q6_k = gemv_q6_k_avx2;
    set_float_kernels(k);
    set_gemm_kernels(k);
}

#else
typedef int dbf_no_avx2; /* a translation unit must not be empty */
#endif
