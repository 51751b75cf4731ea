/* dense.h - matrices that are not factorized, in any of GGML's types that the core knows. */
#ifndef DBF_DENSE_H
#define DBF_DENSE_H

#include "../dbf.h"
#include "kernels.h"

/* bytes of a row; 0 if there is no such type, or cols are no whole blocks of it */
size_t dense_row_bytes(int type, int cols);

/* whether dense_gemv takes the vectors as integers (kernels_t.quantize) */
int dense_takes_integers(int type);

/* row r as float32 */
void dense_row(const kernels_t *k, float *y, const dbf_dense *w, int r);

/* y[i,j] = sum_k w[first + j, k] * x[i,k],  j < rows
 * y[n][rows], x[n][cols]; where integers are taken, x[i,k] = q[i,k] * scale[i] */
void dense_gemv(const kernels_t *k, float *y, const dbf_dense *w, int first, int rows, const float *x,
                const int16_t *q, const float *scale, int n);

#endif
