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

static inline void lut16_pack(uint8_t *w, const uint8_t *bits, int rows, int cols)
{
    size_t groups = (size_t)((cols + 7) / 8);
    for (int r0 = 0; r0 < rows; r0 += DBF_PANEL, w += groups * DBF_PANEL)
        for (size_t g = 0; g < groups; g++)
            for (int r = 0; r < DBF_PANEL; r++)
                w[g * DBF_PANEL + (size_t)r] = r0 + r < rows ? bits[(size_t)(r0 + r) * groups + g] : 0;
}

#endif
