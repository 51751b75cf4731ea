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

/* byte shuffles: entry i of a table takes, for column j, max(q[j], 0) if bit j of i is set, else max(-q[j], 0);
 * the former are the words 0-3 of a register, the latter the words 4-7 */
#define PICK(i, j) (int16_t)((2 * (j) + ((i) >> (j) & 1 ? 0 : 8)) * 257 + 256)
#define PICKS(i, j) \
    PICK(i, j), PICK(i + 1, j), PICK(i + 2, j), PICK(i + 3, j), \
    PICK(i + 4, j), PICK(i + 5, j), PICK(i + 6, j), PICK(i + 7, j)
#define SHUFFLE(i, j) _mm256_shuffle_epi8(parts, _mm256_setr_epi16(PICKS(i, j), PICKS(i, j)))

/* the tables of 8 columns, those of 0-3 in the low halves of the registers and those of 4-7 in the high; returns
 * sums of |q| in the four int32 of a register */
static inline __m128i tables_of_8(uint8_t *out, __m128i q)
{
    const __m128i zero = _mm_setzero_si128();
    __m128i plus = _mm_max_epi16(q, zero), minus = _mm_sub_epi16(plus, q);
    __m256i parts = _mm256_set_m128i(_mm_unpackhi_epi64(plus, minus), _mm_unpacklo_epi64(plus, minus));
    /* the entries 8-15 differ from 0-7 in column 3 only */
    __m256i three = _mm256_add_epi16(_mm256_add_epi16(SHUFFLE(0, 0), SHUFFLE(0, 1)), SHUFFLE(0, 2));
    __m256i e0 = _mm256_add_epi16(three, SHUFFLE(0, 3)), e8 = _mm256_add_epi16(three, SHUFFLE(8, 3));
    const __m256i byte = _mm256_set1_epi16(255);
    __m256i low = _mm256_packus_epi16(_mm256_and_si256(e0, byte), _mm256_and_si256(e8, byte));
    __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(e0, 8), _mm256_srli_epi16(e8, 8));
    _mm256_storeu_si256((__m256i *)out, low);
    _mm256_storeu_si256((__m256i *)out + 1, high);
    return _mm_madd_epi16(_mm_add_epi16(plus, minus), _mm_set1_epi16(1));
}

static void sign_table_avx2(void *table, const int16_t *q, int cols)
{
    uint8_t *out = (uint8_t *)table + LUT16_HEAD;
    __m128i sums = _mm_setzero_si128();
    int k = 0;
    for (; k + 8 <= cols; k += 8, out += LUT16_GROUP)
        sums = _mm_add_epi32(sums, tables_of_8(out, _mm_loadu_si128((const __m128i *)(q + k))));
    if (k < cols) {
        int16_t rest[8] = { 0 };
        memcpy(rest, q + k, (size_t)(cols - k) * sizeof *q);
        sums = _mm_add_epi32(sums, tables_of_8(out, _mm_loadu_si128((const __m128i *)rest)));
    }
    sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4e));
    sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0xb1));
    int32_t l1 = _mm_cvtsi128_si32(sums);
    memcpy(table, &l1, sizeof l1);
}

/* the same with one plane; returns the sums of |q| of the columns 0-3 and 4-7 in the two int64 of a register */
static inline __m128i tables8_of_8(uint8_t *out, __m128i q)
{
    const __m128i zero = _mm_setzero_si128();
    __m128i plus = _mm_max_epi16(q, zero), minus = _mm_sub_epi16(plus, q);
    __m256i parts = _mm256_set_m128i(_mm_unpackhi_epi64(plus, minus), _mm_unpacklo_epi64(plus, minus));
    __m256i three = _mm256_add_epi16(_mm256_add_epi16(SHUFFLE(0, 0), SHUFFLE(0, 1)), SHUFFLE(0, 2));
    __m256i e0 = _mm256_add_epi16(three, SHUFFLE(0, 3)), e8 = _mm256_add_epi16(three, SHUFFLE(8, 3));
    _mm256_storeu_si256((__m256i *)out, _mm256_packus_epi16(e0, e8));
    return _mm_sad_epu8(_mm_add_epi16(plus, minus), zero);
}

static void make_tables8(uint8_t *out, const int16_t *q)
{
    tables8_of_8(out, _mm_loadu_si128((const __m128i *)q));
}

static void sign_table8_avx2(void *table, const int16_t *q, int cols)
{
    lut8_t t = lut8_open(table, cols);
    t.l1 = t.extras = 0;
    for (int g = 0; g < (cols + 7) / 8; g++) {
        int16_t rest[8] = { 0 };
        const int16_t *from = q + 8 * g;
        if (cols - 8 * g < 8) from = memcpy(rest, from, (size_t)(cols - 8 * g) * sizeof *q);
        __m128i sums = tables8_of_8(t.group + g * LUT8_GROUP, _mm_loadu_si128((const __m128i *)from));
        int32_t low = _mm_cvtsi128_si32(sums), high = _mm_extract_epi16(sums, 4);
        t.l1 += low + high;
        if ((low | high) > 255) lut8_divide(&t, g, q, cols, make_tables8);
    }
    lut8_close(table, &t);
}

/* isum[32] += even and odd bytes' sums of the low plane + 256 * those of the high plane */
static inline void flush(int32_t *isum, __m256i low, __m256i low_odd, __m256i high, __m256i high_odd)
{
    __m256i low_even = _mm256_sub_epi16(low, _mm256_slli_epi16(low_odd, 8));
    __m256i high_even = _mm256_sub_epi16(high, _mm256_slli_epi16(high_odd, 8));
    __m256i l[2] = { _mm256_unpacklo_epi16(low_even, low_odd), _mm256_unpackhi_epi16(low_even, low_odd) };
    __m256i h[2] = { _mm256_unpacklo_epi16(high_even, high_odd), _mm256_unpackhi_epi16(high_even, high_odd) };
    for (int i = 0; i < 4; i++) { /* rows 8i .. 8i+7 */
        __m128i l16 = i < 2 ? _mm256_castsi256_si128(l[i & 1]) : _mm256_extracti128_si256(l[i & 1], 1);
        __m128i h16 = i < 2 ? _mm256_castsi256_si128(h[i & 1]) : _mm256_extracti128_si256(h[i & 1], 1);
        __m256i v = _mm256_add_epi32(_mm256_cvtepu16_epi32(l16), _mm256_slli_epi32(_mm256_cvtepu16_epi32(h16), 8));
        __m256i *sum = (__m256i *)(isum + 8 * i);
        _mm256_storeu_si256(sum, _mm256_add_epi32(_mm256_loadu_si256(sum), v));
    }
}

/* look up 32 rows x 8 columns; the high plane's entries are < 128, so two of them fit in a byte */
#define LOOK_UP(bytes, low, low_odd, high, high_odd)                                                          \
    do {                                                                                                      \
        __m256i w_ = _mm256_loadu_si256((const __m256i *)(bytes));                                            \
        __m256i a_ = _mm256_and_si256(w_, nibble), b_ = _mm256_and_si256(_mm256_srli_epi16(w_, 4), nibble);   \
        __m256i s_ = _mm256_shuffle_epi8(a_low, a_), t_ = _mm256_shuffle_epi8(b_low, b_);                     \
        low = _mm256_add_epi16(low, _mm256_add_epi16(s_, t_));                                                \
        low_odd = _mm256_add_epi16(low_odd, _mm256_srli_epi16(s_, 8));                                        \
        low_odd = _mm256_add_epi16(low_odd, _mm256_srli_epi16(t_, 8));                                        \
        s_ = _mm256_add_epi8(_mm256_shuffle_epi8(a_high, a_), _mm256_shuffle_epi8(b_high, b_));               \
        high = _mm256_add_epi16(high, s_);                                                                    \
        high_odd = _mm256_add_epi16(high_odd, _mm256_srli_epi16(s_, 8));                                      \
    } while (0)

static void sign_gemv_avx2(int32_t *isum, const uint8_t *w, const void *table, int rows, int cols)
{
    (void)rows;
    const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    const __m128i *t = (const __m128i *)((const uint8_t *)table + LUT16_HEAD);
    int groups = (cols + 7) / 8;
    memset(isum, 0, DBF_PANEL * sizeof *isum);
    for (int g0 = 0; g0 < groups; g0 += LUT16_GROUPS) {
        int end = g0 + LUT16_GROUPS < groups ? g0 + LUT16_GROUPS : groups;
        __m256i l0 = zero, l0_odd = zero, h0 = zero, h0_odd = zero, l1 = zero, l1_odd = zero, h1 = zero, h1_odd = zero;
        for (int g = g0; g < end; g++, w += DBF_PANEL, t += 4) {
            __m256i a_low = _mm256_broadcastsi128_si256(_mm_loadu_si128(t));
            __m256i b_low = _mm256_broadcastsi128_si256(_mm_loadu_si128(t + 1));
            __m256i a_high = _mm256_broadcastsi128_si256(_mm_loadu_si128(t + 2));
            __m256i b_high = _mm256_broadcastsi128_si256(_mm_loadu_si128(t + 3));
            _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);
            LOOK_UP(w, l0, l0_odd, h0, h0_odd);
            LOOK_UP(w + 32, l1, l1_odd, h1, h1_odd);
        }
        flush(isum, l0, l0_odd, h0, h0_odd);
        flush(isum + 32, l1, l1_odd, h1, h1_odd);
    }
    int32_t l1;
    memcpy(&l1, table, sizeof l1);
    for (int r = 0; r < DBF_PANEL; r++) isum[r] = 2 * isum[r] - l1;
}

/* look up 32 rows x 8 columns in tables with one plane */
#define LOOK_UP8(bytes, sum, odd)                                                                             \
    do {                                                                                                      \
        __m256i w_ = _mm256_loadu_si256((const __m256i *)(bytes));                                            \
        __m256i a_ = _mm256_and_si256(w_, nibble), b_ = _mm256_and_si256(_mm256_srli_epi16(w_, 4), nibble);   \
        __m256i s_ = _mm256_shuffle_epi8(a, a_), t_ = _mm256_shuffle_epi8(b, b_);                             \
        sum = _mm256_add_epi16(sum, _mm256_add_epi16(s_, t_));                                                \
        odd = _mm256_add_epi16(odd, _mm256_srli_epi16(s_, 8));                                                \
        odd = _mm256_add_epi16(odd, _mm256_srli_epi16(t_, 8));                                                \
    } while (0)

/* isum += what n <= LUT16_GROUPS tables give; extras: table i is that of group lut8_at(extras, first + i) */
static inline void look_up_all8(int32_t *isum, const uint8_t *w, const uint8_t *table, const lut8_t *extras, int first,
                                int n)
{
    const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    __m256i s0 = zero, s0_odd = zero, s1 = zero, s1_odd = zero;
    for (int i = first; i < first + n; i++) {
        const __m128i *t = (const __m128i *)(table + (size_t)i * LUT8_GROUP);
        const uint8_t *bytes = w + (extras ? lut8_at(extras, i) : (size_t)i) * DBF_PANEL;
        __m256i a = _mm256_broadcastsi128_si256(_mm_loadu_si128(t));
        __m256i b = _mm256_broadcastsi128_si256(_mm_loadu_si128(t + 1));
        _mm_prefetch((const char *)bytes + AHEAD, _MM_HINT_T0);
        LOOK_UP8(bytes, s0, s0_odd);
        LOOK_UP8(bytes + 32, s1, s1_odd);
    }
    flush(isum, s0, s0_odd, zero, zero);
    flush(isum + 32, s1, s1_odd, zero, zero);
}

static void sign_gemv8_avx2(int32_t *isum, const uint8_t *w, const void *table, int rows, int cols)
{
    lut8_t t = lut8_open(table, cols);
    (void)rows;
    int groups = (cols + 7) / 8;
    memset(isum, 0, DBF_PANEL * sizeof *isum);
    for (int g = 0; g < groups; g += LUT16_GROUPS)
        look_up_all8(isum, w, t.group, NULL, g, groups - g < LUT16_GROUPS ? groups - g : LUT16_GROUPS);
    for (int i = 0; i < t.extras; i += LUT16_GROUPS)
        look_up_all8(isum, w, t.extra, &t, i, t.extras - i < LUT16_GROUPS ? t.extras - i : LUT16_GROUPS);
    for (int r = 0; r < DBF_PANEL; r++) isum[r] = 2 * isum[r] - t.l1;
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
    k->sign_table = sign_table_avx2;
    k->sign_pack = lut16_pack;
    k->sign_gemv = sign_gemv_avx2;
    k->sign_table8 = sign_table8_avx2;
    k->sign_gemv8 = sign_gemv8_avx2;
    k->gemv_q4_0 = gemv_q4_0_avx2;
    k->gemv_q8_0 = gemv_q8_0_avx2;
    k->gemv_q6_k = gemv_q6_k_avx2;
    set_float_kernels(k);
    set_gemm_kernels(k);
}

#else
typedef int dbf_no_avx2; /* a translation unit must not be empty */
#endif
