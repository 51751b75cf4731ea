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
 * A u16 accumulator of byte pairs (acc += s, odd += s >> 8; even = acc - (odd << 8)) holds 257 bytes of at most 255;
 * the low plane adds two a group, so sums move to int32 every LUT16_GROUPS groups. */
#ifndef DBF_LUT16_H
#define DBF_LUT16_H

#include <string.h>

#include "kernels.h"

#define LUT16_HEAD 64
#define LUT16_GROUP 64
#define LUT16_GROUPS 128

static inline size_t lut16_table_bytes(int cols)
{
    return LUT16_HEAD + (size_t)((cols + 7) / 8) * LUT16_GROUP;
}

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
