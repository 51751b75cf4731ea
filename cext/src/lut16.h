/* lut16.h - layouts of the 16-entry-table kernels (AVX2, NEON; AVX-512 with changes of its own).
 *
 * With bit = 1 for +1, isum[r] = 2 * agree[r] - l1, where l1 = sum |q[k]| and agree[r] adds |q[k]| over the columns
 * whose sign is that of q[k]. For 4 columns, agree has 16 possible values, 0 .. 4 * 8191: 15 bits, which a byte
 * shuffle looks up as a low plane of 8 bits and a high plane of 7.
 *
 * Table: int32 l1, padding to 64 bytes; then per group of 8 columns 4 x 16 bytes: the low planes of the columns 0-3
 * (low nibble of a DBF1 byte) and of the columns 4-7, then their high planes.
 * Weights ("g64"): panels of 64 rows; in a panel, per group of 8 columns, the DBF1 bytes of the 64 rows. One linear
 * stream of bytes per thread.
 *
 * Of activations of at most 126 there is a table with one plane, sign_table8's: a byte holds what agrees of 4 columns
 * where the sum of their |q| is at most 255, as it nearly always is. A group where it is not is divided: each q is
 * the sum of two halves, of which one stays and the other comes behind all groups, as an extra. Head: int32 l1, int32
 * number of extras; per group 2 x 16 bytes (the columns 0-3 and 4-7), then the same of every extra; then of every
 * extra, as int32, its group.
 *
 * A u16 accumulator of byte pairs (acc += s, odd += s >> 8; even = acc - (odd << 8)) holds 257 bytes of at most 255;
 * the low plane adds two a group, so sums move to int32 every LUT16_GROUPS groups. */
#ifndef DBF_LUT16_H
#define DBF_LUT16_H

#include <string.h>

#include "kernels.h"

#define LUT16_HEAD 64
#define LUT16_GROUP 64
#define LUT16_GROUPS 128
#define LUT8_GROUP 32

/* groups of a table: AVX-512 makes those of two at once */
static inline size_t lut16_groups(int cols)
{
    return (size_t)((cols + 15) / 16 * 2);
}

/* of the larger of the two tables */
static inline size_t lut16_table_bytes(int cols)
{
    return LUT16_HEAD + lut16_groups(cols) * (2 * LUT8_GROUP + sizeof(int32_t));
}

/* ---- tables of small activations -------------------------------------------------------------------------- */

typedef struct lut8 {
    uint8_t *group; /* [groups][LUT8_GROUP] */
    uint8_t *extra; /* [extras][LUT8_GROUP] */
    uint8_t *at;    /* int32 [extras] */
    int32_t l1, extras;
} lut8_t;

static inline lut8_t lut8_open(const void *table, int cols)
{
    lut8_t t = { .group = (uint8_t *)table + LUT16_HEAD };
    t.extra = t.group + lut16_groups(cols) * LUT8_GROUP;
    t.at = t.extra + lut16_groups(cols) * LUT8_GROUP;
    memcpy(&t.l1, table, sizeof t.l1);
    memcpy(&t.extras, (const uint8_t *)table + sizeof t.l1, sizeof t.extras);
    return t;
}

static inline void lut8_close(void *table, const lut8_t *t)
{
    memcpy(table, &t->l1, sizeof t->l1);
    memcpy((uint8_t *)table + sizeof t->l1, &t->extras, sizeof t->extras);
}

/* the group of an extra */
static inline size_t lut8_at(const lut8_t *t, int extra)
{
    int32_t g;
    memcpy(&g, t->at + (size_t)extra * sizeof g, sizeof g);
    return (size_t)g;
}

/* divide group g of q[cols]; make writes the tables of 8 columns */
static inline void lut8_divide(lut8_t *t, int g, const int16_t *q, int cols,
                               void (*make)(uint8_t *out, const int16_t *q))
{
    int16_t half[8] = { 0 }, other[8] = { 0 };
    int32_t at = g;
    for (int i = 0; i < 8 && 8 * g + i < cols; i++) {
        half[i] = q[8 * g + i] / 2;
        other[i] = (int16_t)(q[8 * g + i] - half[i]);
    }
    make(t->group + (size_t)g * LUT8_GROUP, half);
    make(t->extra + (size_t)t->extras * LUT8_GROUP, other);
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
