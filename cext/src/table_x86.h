/* table_x86.h - the tables of lut16.h, for kernels_avx2.c and kernels_avx512.c.
 *
 * The including file defines, after this, make_pair and make_pair8. */
#ifndef DBF_TABLE_X86_H
#define DBF_TABLE_X86_H

/* the tables of 16 columns, with two planes and with one; plus = max(q, 0), minus = max(-q, 0) */
INLINE void make_pair(uint8_t *out, __m256i plus, __m256i minus);
INLINE void make_pair8(uint8_t *out, __m256i plus, __m256i minus);

#define SEARCH 128 /* columns that are looked through if one of their groups must be divided */

/* entries 0-7 (i = 0) or 8-15 (i = 8) take, for column j, the word of plus where bit j of the entry is set, else that
 * of minus; in each 16 bytes, the former are the words 0-3, the latter 4-7 */
#define PICK(i, j) (int16_t)((2 * (j) + ((i) >> (j) & 1 ? 0 : 8)) * 257 + 256)
#define PICKS(i, j)                                                                                                  \
    _mm_setr_epi16(PICK(i, j), PICK(i + 1, j), PICK(i + 2, j), PICK(i + 3, j), PICK(i + 4, j), PICK(i + 5, j),       \
                   PICK(i + 6, j), PICK(i + 7, j))

/* the pair of the 16 columns at q; returns, in the low half of every int64, sum |q| of 4 columns */
INLINE __m256i make_16(uint8_t *pair, const int16_t *q, int planes)
{
    __m256i v = _mm256_loadu_si256((const __m256i *)q), plus = _mm256_max_epi16(v, _mm256_setzero_si256());
    __m256i minus = _mm256_sub_epi16(plus, v);
    if (planes == 2)
        make_pair(pair, plus, minus);
    else
        make_pair8(pair, plus, minus);
    __m256i size = _mm256_madd_epi16(_mm256_add_epi16(plus, minus), _mm256_set1_epi16(1));
    return _mm256_add_epi32(size, _mm256_srli_epi64(size, 32));
}

/* by itself: where gcc 12 sees that half of a vpackuswb is enough, it takes that of the first operand */
static __attribute__((noinline)) void pair_of_2(uint8_t *pair, const int16_t *q)
{
    make_16(pair, q, 2);
}

static __attribute__((noinline)) void pair_of_1(uint8_t *pair, const int16_t *q)
{
    make_16(pair, q, 1);
}

/* divide those groups of SEARCH columns from k on that must be */
static void divide_some(lut16_t *t, const int16_t *q, int cols, int k, int planes)
{
    int end = cols - k < SEARCH ? cols : k + SEARCH;
    for (; k < end; k += 8) {
        int sum[2] = { 0, 0 };
        for (int i = 0; i < 8 && k + i < end; i++) sum[i / 4] += q[k + i] < 0 ? -q[k + i] : q[k + i];
        if (planes == 2 ? sum[0] + sum[1] > 32767 : (sum[0] | sum[1]) > 255)
            lut16_divide(t, k / 8, q, cols, planes == 2 ? pair_of_2 : pair_of_1);
    }
}

INLINE void make_table(void *table, const int16_t *q, int cols, int planes)
{
    lut16_t t = lut16_open(table, cols, planes == 2 ? LUT16_GROUP : LUT8_GROUP);
    __m256i sums = _mm256_setzero_si256(), limit = _mm256_set1_epi32(planes == 2 ? 32767 : 255);
    int full = cols / 16 * 16;
    t.extras = 0;
    for (int begin = 0; begin < cols; begin += SEARCH) {
        __m256i most = _mm256_setzero_si256();
        int end = cols - begin < SEARCH ? cols : begin + SEARCH;
        for (int k = begin; k < end; k += 16) {
            int16_t rest[16];
            const int16_t *from = q + k;
            if (k >= full) {
                memset(rest, 0, sizeof rest);
                from = memcpy(rest, from, (size_t)(cols - k) * sizeof *q);
            }
            __m256i size = make_16(t.pairs + (size_t)k / 16 * t.pair, from, planes);
            sums = _mm256_add_epi32(sums, size);
            if (planes == 2) size = _mm256_add_epi32(size, _mm256_shuffle_epi32(size, 0x4e));
            most = _mm256_max_epi32(most, size);
        }
        if (_mm256_movemask_epi8(_mm256_cmpgt_epi32(most, limit))) divide_some(&t, q, cols, begin, planes);
    }
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    t.l1 = _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e)));
    lut16_close(table, &t);
}

static void sign_table_x86(void *table, const int16_t *q, int cols)
{
    make_table(table, q, cols, 2);
}

static void sign_table8_x86(void *table, const int16_t *q, int cols)
{
    make_table(table, q, cols, 1);
}

#endif
