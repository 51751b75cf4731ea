/* kernels_avx512.c - AVX-512 F, BW, VL and DQ; compiled with these flags (CMakeLists.txt), called only where CPU and
 * system have them.
 *
 *   vpshufb          64 table look-ups: a panel's 64 rows fill one register
 *   vbroadcasti32x4  one table for all four quarters, on a load port
 *   vpmaddwd         int8 weights x int16 activations of two rows
 *
 * Registers of 512 bits run on two ports instead of three. Sign products by the method of lut16.h take 17 vector
 * instructions for 512 signs, 8.5 cycles, where AVX2 needs 34 and 11.3. Selecting with AND and adding with vpdpbusd,
 * on two int8 planes of the activations, takes 24 and 12: slower, and it would need VNNI. */
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

/* Table: int32 l1, padding to 64 bytes; then per 16 columns 8 x 16 bytes: the low planes of the columns 0-3, 8-11,
 * 4-7, 12-15, then their high planes.
 * Weights: those of lut16.h, with row 16i + j of a panel in byte 4j + i of its 64, so that the sums of the bytes i
 * of all 32-bit words are 16 neighbouring rows. */
#define PAIR 128 /* bytes of table for two groups of 8 columns */

static void sign_pack_avx512(uint8_t *w, const uint8_t *bits, int rows, int cols)
{
    uint8_t order[DBF_PANEL];
    for (int r = 0; r < DBF_PANEL; r++) order[4 * (r % 16) + r / 16] = (uint8_t)r;
    lut16_pack_as(order, w, bits, rows, cols);
}

/* ---- tables ----------------------------------------------------------------------------------------------- */

/* byte shuffles: entry i of a table takes, for column j, max(q[j], 0) if bit j of i is set, else max(-q[j], 0);
 * the former are the words 0-3 of each quarter, the latter the words 4-7 */
#define PICK(i, j) (int16_t)((2 * (j) + ((i) >> (j) & 1 ? 0 : 8)) * 257 + 256)
#define PICKS(i, j) \
    PICK(i, j), PICK(i + 1, j), PICK(i + 2, j), PICK(i + 3, j), \
    PICK(i + 4, j), PICK(i + 5, j), PICK(i + 6, j), PICK(i + 7, j)
#define SHUFFLE(i, j) _mm512_shuffle_epi8(parts, _mm512_broadcast_i32x4(_mm_setr_epi16(PICKS(i, j))))

/* int64 order[i] of a, where it is below 4, or order[i] - 8 of b */
static inline __m512i side_by_side(__m256i a, __m256i b, __m512i order)
{
    return _mm512_permutex2var_epi64(_mm512_castsi256_si512(a), order, _mm512_castsi256_si512(b));
}

/* the tables of 16 columns; returns sums of |q| in the eight int32 of a register */
static inline __m256i tables_of_16(uint8_t *out, __m256i q)
{
    __m256i plus = _mm256_max_epi16(q, _mm256_setzero_si256()), minus = _mm256_sub_epi16(plus, q);
    __m512i parts = side_by_side(plus, minus, _mm512_setr_epi64(0, 8, 2, 10, 1, 9, 3, 11));
    /* the entries 8-15 differ from 0-7 in column 3 only */
    __m512i three = _mm512_add_epi16(_mm512_add_epi16(SHUFFLE(0, 0), SHUFFLE(0, 1)), SHUFFLE(0, 2));
    __m512i e0 = _mm512_add_epi16(three, SHUFFLE(0, 3)), e8 = _mm512_add_epi16(three, SHUFFLE(8, 3));
    const __m512i byte = _mm512_set1_epi16(255);
    _mm512_storeu_si512(out, _mm512_packus_epi16(_mm512_and_si512(e0, byte), _mm512_and_si512(e8, byte)));
    _mm512_storeu_si512(out + 64, _mm512_packus_epi16(_mm512_srli_epi16(e0, 8), _mm512_srli_epi16(e8, 8)));
    return _mm256_madd_epi16(_mm256_add_epi16(plus, minus), _mm256_set1_epi16(1));
}

static void sign_table_avx512(void *table, const int16_t *q, int cols)
{
    uint8_t *out = (uint8_t *)table + LUT16_HEAD;
    __m256i sums = _mm256_setzero_si256();
    int k = 0;
    for (; k + 16 <= cols; k += 16, out += PAIR)
        sums = _mm256_add_epi32(sums, tables_of_16(out, _mm256_loadu_si256((const __m256i *)(q + k))));
    if (k < cols) {
        __mmask16 rest = (__mmask16)((1u << (cols - k)) - 1);
        sums = _mm256_add_epi32(sums, tables_of_16(out, _mm256_maskz_loadu_epi16(rest, q + k)));
    }
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
    int32_t l1 = _mm_cvtsi128_si32(sum);
    memcpy(table, &l1, sizeof l1);
}

/* The same with one plane, in the order of the columns; returns, in the four int64 of a register, the sums of |q| of
 * the columns 0-3, 4-7, 8-11, 12-15. */
static inline __m256i tables8_of_16(uint8_t *out, __m256i q)
{
    const __m256i zero = _mm256_setzero_si256();
    __m256i plus = _mm256_max_epi16(q, zero), minus = _mm256_sub_epi16(plus, q);
    __m512i parts = side_by_side(plus, minus, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11));
    __m512i three = _mm512_add_epi16(_mm512_add_epi16(SHUFFLE(0, 0), SHUFFLE(0, 1)), SHUFFLE(0, 2));
    __m512i e0 = _mm512_add_epi16(three, SHUFFLE(0, 3)), e8 = _mm512_add_epi16(three, SHUFFLE(8, 3));
    _mm512_storeu_si512(out, _mm512_packus_epi16(e0, e8));
    return _mm256_sad_epu8(_mm256_add_epi16(plus, minus), zero);
}

/* by itself: where gcc 12 sees that half of a vpackuswb is enough, it takes that of the first operand */
static __attribute__((noinline)) void tables8_at(uint8_t *out, __m256i q)
{
    tables8_of_16(out, q);
}

static void make_tables8(uint8_t *out, const int16_t *q) /* of 8 columns */
{
    uint8_t both[2 * LUT8_GROUP];
    tables8_at(both, _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)q)));
    memcpy(out, both, LUT8_GROUP);
}

static void sign_table8_avx512(void *table, const int16_t *q, int cols)
{
    lut8_t t = lut8_open(table, cols);
    __m256i l1 = _mm256_setzero_si256();
    t.extras = 0;
    for (int k = 0; k < cols; k += 16) {
        __mmask16 some = cols - k < 16 ? (__mmask16)((1u << (cols - k)) - 1) : 0xffff;
        __m256i sums = tables8_of_16(t.group + k / 8 * LUT8_GROUP, _mm256_maskz_loadu_epi16(some, q + k));
        l1 = _mm256_add_epi64(l1, sums);
        unsigned large = _mm256_cmpgt_epi64_mask(sums, _mm256_set1_epi64x(255));
        if (large & 3) lut8_divide(&t, k / 8, q, cols, make_tables8);
        if (large & 12) lut8_divide(&t, k / 8 + 1, q, cols, make_tables8);
    }
    __m128i sum = _mm_add_epi64(_mm256_castsi256_si128(l1), _mm256_extracti128_si256(l1, 1));
    t.l1 = _mm_cvtsi128_si32(sum) + _mm_extract_epi32(sum, 2);
    lut8_close(table, &t);
}

/* ---- products --------------------------------------------------------------------------------------------- */

#define TABLE(p) _mm512_broadcast_i32x4(_mm_loadu_si128(p))

/* look up 64 rows x 8 columns, in the first or the second tables of a pair; the high plane's entries are < 128, so
 * two of them fit in a byte */
#define LOOK_UP(bytes, t)                                                                                       \
    do {                                                                                                        \
        __m512i w_ = _mm512_loadu_si512(bytes);                                                                 \
        __m512i a_ = _mm512_and_si512(w_, nibble), b_ = _mm512_and_si512(_mm512_srli_epi16(w_, 4), nibble);     \
        __m512i s_ = _mm512_shuffle_epi8(TABLE(t), a_), t_ = _mm512_shuffle_epi8(TABLE((t) + 2), b_);           \
        low = _mm512_add_epi16(low, _mm512_add_epi16(s_, t_));                                                  \
        low_odd = _mm512_add_epi16(low_odd, _mm512_srli_epi16(s_, 8));                                          \
        low_odd = _mm512_add_epi16(low_odd, _mm512_srli_epi16(t_, 8));                                          \
        s_ = _mm512_add_epi8(_mm512_shuffle_epi8(TABLE((t) + 4), a_), _mm512_shuffle_epi8(TABLE((t) + 6), b_)); \
        high = _mm512_add_epi16(high, s_);                                                                      \
        high_odd = _mm512_add_epi16(high_odd, _mm512_srli_epi16(s_, 8));                                        \
    } while (0)

/* the lower and the upper u16 of every 32 bits: low + 256 * high */
static inline __m512i lower(__m512i low, __m512i high)
{
    const __m512i word = _mm512_set1_epi32(0xffff);
    return _mm512_add_epi32(_mm512_and_si512(low, word), _mm512_slli_epi32(_mm512_and_si512(high, word), 8));
}

static inline __m512i upper(__m512i low, __m512i high)
{
    return _mm512_add_epi32(_mm512_srli_epi32(low, 16), _mm512_slli_epi32(_mm512_srli_epi32(high, 16), 8));
}

static void sign_gemv_avx512(int32_t *isum, const uint8_t *w, const void *table, int rows, int cols)
{
    (void)rows;
    const __m512i nibble = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
    const __m128i *t = (const __m128i *)((const uint8_t *)table + LUT16_HEAD);
    int groups = (cols + 7) / 8;
    __m512i r0 = zero, r16 = zero, r32 = zero, r48 = zero; /* sums of the rows from .. on */
    for (int g0 = 0; g0 < groups; g0 += LUT16_GROUPS) {
        int some = groups - g0 < LUT16_GROUPS ? groups - g0 : LUT16_GROUPS;
        __m512i low = zero, low_odd = zero, high = zero, high_odd = zero;
        for (int pair = 0; pair < some / 2; pair++, w += 2 * DBF_PANEL, t += 8) {
            _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)w + AHEAD + 64, _MM_HINT_T0);
            LOOK_UP(w, t);
            LOOK_UP(w + DBF_PANEL, t + 1);
        }
        if (some % 2) LOOK_UP(w, t);
        low = _mm512_sub_epi16(low, _mm512_slli_epi16(low_odd, 8));
        high = _mm512_sub_epi16(high, _mm512_slli_epi16(high_odd, 8));
        r0 = _mm512_add_epi32(r0, lower(low, high));
        r16 = _mm512_add_epi32(r16, lower(low_odd, high_odd));
        r32 = _mm512_add_epi32(r32, upper(low, high));
        r48 = _mm512_add_epi32(r48, upper(low_odd, high_odd));
    }
    int32_t sum;
    memcpy(&sum, table, sizeof sum);
    __m512i l1 = _mm512_set1_epi32(sum);
    _mm512_storeu_si512(isum, _mm512_sub_epi32(_mm512_slli_epi32(r0, 1), l1));
    _mm512_storeu_si512(isum + 16, _mm512_sub_epi32(_mm512_slli_epi32(r16, 1), l1));
    _mm512_storeu_si512(isum + 32, _mm512_sub_epi32(_mm512_slli_epi32(r32, 1), l1));
    _mm512_storeu_si512(isum + 48, _mm512_sub_epi32(_mm512_slli_epi32(r48, 1), l1));
}

/* r[4] += what n <= LUT16_GROUPS tables with one plane give, for the rows from 0, 16, 32, 48 on; extras: table i is
 * that of group lut8_at(extras, i) */
static inline void look_up_all8(__m512i *r, const uint8_t *w, const uint8_t *table, const lut8_t *extras, int first,
                                int n)
{
    const __m512i nibble = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
    __m512i sum = zero, odd = zero;
    for (int i = first; i < first + n; i++) {
        const __m128i *t = (const __m128i *)(table + (size_t)i * LUT8_GROUP);
        const uint8_t *bytes = w + (extras ? lut8_at(extras, i) : (size_t)i) * DBF_PANEL;
        _mm_prefetch((const char *)bytes + AHEAD, _MM_HINT_T0);
        __m512i v = _mm512_loadu_si512(bytes);
        __m512i a = _mm512_and_si512(v, nibble), b = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
        a = _mm512_shuffle_epi8(TABLE(t), a);
        b = _mm512_shuffle_epi8(TABLE(t + 1), b);
        sum = _mm512_add_epi16(sum, _mm512_add_epi16(a, b));
        odd = _mm512_add_epi16(odd, _mm512_srli_epi16(a, 8));
        odd = _mm512_add_epi16(odd, _mm512_srli_epi16(b, 8));
    }
    sum = _mm512_sub_epi16(sum, _mm512_slli_epi16(odd, 8));
    r[0] = _mm512_add_epi32(r[0], lower(sum, zero));
    r[1] = _mm512_add_epi32(r[1], lower(odd, zero));
    r[2] = _mm512_add_epi32(r[2], upper(sum, zero));
    r[3] = _mm512_add_epi32(r[3], upper(odd, zero));
}

static void sign_gemv8_avx512(int32_t *isum, const uint8_t *w, const void *table, int rows, int cols)
{
    lut8_t t = lut8_open(table, cols);
    (void)rows;
    int groups = (cols + 7) / 8;
    __m512i r[4] = { _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512() };
    for (int g = 0; g < groups; g += LUT16_GROUPS)
        look_up_all8(r, w, t.group, NULL, g, groups - g < LUT16_GROUPS ? groups - g : LUT16_GROUPS);
    for (int i = 0; i < t.extras; i += LUT16_GROUPS)
        look_up_all8(r, w, t.extra, &t, i, t.extras - i < LUT16_GROUPS ? t.extras - i : LUT16_GROUPS);
    for (int i = 0; i < 4; i++)
        _mm512_storeu_si512(isum + 16 * i, _mm512_sub_epi32(_mm512_slli_epi32(r[i], 1), _mm512_set1_epi32(t.l1)));
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
            for (int i = 0; i < 4 * bytes; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T0);
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
    k->sign_table = sign_table_avx512;
    k->sign_pack = sign_pack_avx512;
    k->sign_gemv = sign_gemv_avx512;
    k->sign_table8 = sign_table8_avx512;
    k->sign_gemv8 = sign_gemv8_avx512;
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
