/* dense.c - one place that knows the types of matrices that are not factorized. */
#include "dense.h"

#include <string.h>

static const struct {
    int type, block, bytes, integers; /* weights and bytes of a block */
} types[] = {
    { DBF_F32, 1, 4, 0 },
    { DBF_F16, 1, 2, 0 },
    { DBF_Q4_0, DBF_Q4_0_BLOCK, DBF_Q4_0_BYTES, 1 },
    { DBF_Q8_0, DBF_Q8_0_BLOCK, DBF_Q8_0_BYTES, 1 },
    { DBF_Q6_K, DBF_Q6_K_BLOCK, DBF_Q6_K_BYTES, 1 },
};
enum { TYPES = sizeof types / sizeof *types };

size_t dense_row_bytes(int type, int cols)
{
    for (int i = 0; i < TYPES; i++)
        if (types[i].type == type && cols % types[i].block == 0)
            return (size_t)(cols / types[i].block) * (size_t)types[i].bytes;
    return 0;
}

int dense_takes_integers(int type)
{
    for (int i = 0; i < TYPES; i++)
        if (types[i].type == type) return types[i].integers;
    return 0;
}

static const void *row_of(const dbf_dense *w, int r)
{
    return (const uint8_t *)w->data + (size_t)r * dense_row_bytes(w->type, w->cols);
}

void dense_row(const kernels_t *k, float *y, const dbf_dense *w, int r)
{
    const void *row = row_of(w, r);
    switch (w->type) {
    case DBF_F32: memcpy(y, row, (size_t)w->cols * sizeof *y); break;
    case DBF_F16: k->from_f16(y, row, w->cols); break;
    case DBF_Q4_0: k->from_q4_0(y, row, w->cols); break;
    case DBF_Q8_0: k->from_q8_0(y, row, w->cols); break;
    case DBF_Q6_K: k->from_q6_k(y, row, w->cols); break;
    }
}

void dense_gemv(const kernels_t *k, float *y, const dbf_dense *w, int first, int rows, const float *x,
                const int16_t *q, const float *scale, int n)
{
    const void *row = row_of(w, first);
    switch (w->type) {
    case DBF_F32: k->gemv_f32(y, row, x, n, rows, w->cols); break;
    case DBF_F16: k->gemv_f16(y, row, x, n, rows, w->cols); break;
    case DBF_Q4_0: k->gemv_q4_0(y, row, q, scale, n, rows, w->cols); break;
    case DBF_Q8_0: k->gemv_q8_0(y, row, q, scale, n, rows, w->cols); break;
    case DBF_Q6_K: k->gemv_q6_k(y, row, q, scale, n, rows, w->cols); break;
    }
}
