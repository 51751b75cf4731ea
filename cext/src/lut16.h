/* lut16.h - layouts of the 16-entry-table kernels (AVX2, NEON; AVX-512 with changes of its own).
 *
 * With bit = 1 for +1, isum[r] = 2 * agree[r] - l1, where l1 = sum |q[k]| and agree[r] adds |q[k]| over the columns
 * whose sign is that of q[k]. For 4 columns, agree has 16 possible values, 0 .. 4 * 8191: 15 bits, which a byte
 * shuffle looks up as a low plane and a high plane; or, where all |q| <= 126, in one plane.
 *
 * Table: int32 l1, int32 number of extras, padding to 64 bytes; then the groups of 8 columns, in pairs. Per pair 8 x 16
 * bytes: the low planes of the columns 0-3 (low nibbles of DBF1 bytes) of both groups, of the columns 4-7 of both,
 * then the high planes of these. With one plane (sign_table8) 4 x 16 bytes. (On ARM, two planes are laid out by the
 * group: the low planes of the columns 0-3 and 4-7, then the high planes.)
 * Weights ("g64"): panels of 64 rows; in a panel, per group of 8 columns, the DBF1 bytes of the 64 rows. One linear
 * stream of bytes per thread.
 *
 * Extras: some sums must fit in a byte, and nearly always do. A group where they may not is divided: each q is the sum
 * of two halves, of which one stays and the other comes behind all groups, as the first group of a pair; behind all of
 * these come, as int32, their groups.
 *   One plane: sum |q| <= 255 over 4 columns.
 *   Two planes on x86, 7 bits low and 8 bits high: sum |q| < 2^15 over 8 columns, so that the look-ups of both nibbles
 *   may be added in bytes. (On ARM, where widening costs nothing, 8 bits low and 7 bits high, and no extras.)
 *
 * How bytes are summed: a u16 accumulator of byte pairs (all += x, odd += x >> 8; even = all - (odd << 8)) holds 257
 * bytes of at most 255, so sums move to int32 every LUT16_GROUPS groups. */
#ifndef DBF_LUT16_H
#define DBF_LUT16_H

#include <string.h>

#include "kernels.h"

#define LUT16_HEAD 64
#define LUT16_GROUP 64
#define LUT16_GROUPS 128
#define LUT8_GROUP 32

#define AHEAD 8192 /* bytes that large matrices are prefetched ahead; far beyond what the CPU does by itself */

/* ---- tables ----------------------------------------------------------------------------------------------- */

typedef struct lut16 {
    int32_t l1, extras;
    size_t pair;    /* bytes */
    uint8_t *pairs; /* [pairs][pair] */
    uint8_t *extra; /* [extras][pair] */
    uint8_t *at;    /* int32 [extras] */
} lut16_t;

static inline size_t lut16_pairs(int cols)
{
    return (size_t)((cols + 15) / 16);
}

static inline size_t lut16_table_bytes(int cols)
{
    return LUT16_HEAD + lut16_pairs(cols) * (2 * LUT16_GROUP + 2 * (2 * LUT16_GROUP + sizeof(int32_t)));
}

/* group: LUT16_GROUP or LUT8_GROUP */
static inline lut16_t lut16_open(const void *table, int cols, size_t group)
{
    lut16_t t = { .pair = 2 * group, .pairs = (uint8_t *)table + LUT16_HEAD };
    t.extra = t.pairs + lut16_pairs(cols) * t.pair;
    t.at = t.extra + 2 * lut16_pairs(cols) * t.pair;
    memcpy(&t.l1, table, sizeof t.l1);
    memcpy(&t.extras, (const uint8_t *)table + sizeof t.l1, sizeof t.extras);
    return t;
}

static inline void lut16_close(void *table, const lut16_t *t)
{
    memcpy(table, &t->l1, sizeof t->l1);
    memcpy((uint8_t *)table + sizeof t->l1, &t->extras, sizeof t->extras);
}

/* group g, and the group of an extra */
static inline uint8_t *lut16_group(const lut16_t *t, int g)
{
    return t->pairs + (size_t)(g / 2) * t->pair + g % 2 * 16;
}

static inline size_t lut16_at(const lut16_t *t, int extra)
{
    int32_t g;
    memcpy(&g, t->at + (size_t)extra * sizeof g, sizeof g);
    return (size_t)g;
}

/* Divide group g of q[cols]; make writes the pair of 16 columns. Odd numbers are rounded up in one column and down in
 * the next, so that half of 8 * 8191 is less than 2^15. */
static inline void lut16_divide(lut16_t *t, int g, const int16_t *q, int cols,
                                void (*make)(uint8_t *pair, const int16_t *q))
{
    int16_t halves[16] = { 0 };
    uint8_t pair[2 * LUT16_GROUP], *from = lut16_group(t, g), *extra = t->extra + (size_t)t->extras * t->pair;
    int32_t at = g;
    for (int i = 0; i < 8 && 8 * g + i < cols; i++) {
        int16_t v = q[8 * g + i];
        halves[i] = (int16_t)((v + i % 2 * (v > 0 ? 1 : -1)) / 2);
        halves[8 + i] = (int16_t)(v - halves[i]);
    }
    make(pair, halves);
    for (size_t i = 0; i < t->pair; i += 32) {
        memcpy(from + i, pair + i, 16);
        memcpy(extra + i, pair + i + 16, 16);
    }
    memcpy(t->at + (size_t)t->extras * sizeof at, &at, sizeof at);
    t->extras++;
}

/* ---- weights ---------------------------------------------------------------------------------------------- */

static inline size_t lut16_pack_bytes(int rows, int cols)
{
    return (size_t)((rows + DBF_PANEL - 1) / DBF_PANEL) * DBF_PANEL * (size_t)((cols + 7) / 8);
}

/* ---- packing ---------------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
typedef __m128i bytes16_t;
#define bytes16_load(p) _mm_loadu_si128((const __m128i *)(p))
#define bytes16_store(p, v) _mm_storeu_si128((__m128i *)(p), v)
#define zip_low _mm_unpacklo_epi8
#define zip_high _mm_unpackhi_epi8
#elif defined(__aarch64__)
typedef uint8x16_t bytes16_t;
#define bytes16_load vld1q_u8
#define bytes16_store vst1q_u8
#define zip_low vzip1q_u8
#define zip_high vzip2q_u8
#endif

/* x as a matrix of bytes, transposed: interleaving its first half with the second turns the eight bits of an index,
 * row and column, by one place */
static inline void transpose16(bytes16_t x[16])
{
    for (int turn = 0; turn < 4; turn++) {
        bytes16_t y[16];
        for (int i = 0; i < 8; i++) {
            y[2 * i] = zip_low(x[i], x[i + 8]);
            y[2 * i + 1] = zip_high(x[i], x[i + 8]);
        }
        memcpy(x, y, sizeof y);
    }
}

/* order[i]: which row of a panel comes at place i of each group; absent rows are 0 */
static inline void lut16_pack_as(const uint8_t *order, uint8_t *w, const uint8_t *bits, int rows, int cols)
{
    size_t groups = (size_t)((cols + 7) / 8);
    for (int r0 = 0; r0 < rows; r0 += DBF_PANEL, w += groups * DBF_PANEL) {
        const uint8_t *from[DBF_PANEL];
        for (int i = 0; i < DBF_PANEL; i++)
            from[i] = r0 + order[i] < rows ? bits + (size_t)(r0 + order[i]) * groups : NULL;
        for (size_t at = 0; at < groups && groups >= 16; at += 16) {
            size_t g = at + 16 <= groups ? at : groups - 16; /* the last 16 may have been among those before */
            for (int i = 0; i < DBF_PANEL; i += 16) {
                bytes16_t x[16];
                for (int j = 0; j < 16; j++) x[j] = from[i + j] ? bytes16_load(from[i + j] + g) : (bytes16_t){ 0 };
                transpose16(x);
                for (size_t j = 0; j < 16; j++) bytes16_store(w + (g + j) * DBF_PANEL + (size_t)i, x[j]);
            }
        }
        for (size_t g = 0; g < groups && groups < 16; g++)
            for (size_t i = 0; i < DBF_PANEL; i++) w[g * DBF_PANEL + i] = from[i] ? from[i][g] : 0;
    }
}

/* rows in their order */
static inline void lut16_pack(uint8_t *w, const uint8_t *bits, int rows, int cols)
{
    uint8_t order[DBF_PANEL];
    for (int i = 0; i < DBF_PANEL; i++) order[i] = (uint8_t)i;
    lut16_pack_as(order, w, bits, rows, cols);
}

#endif
