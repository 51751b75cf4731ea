/* kernels.h - the arithmetic of the forward pass, as one function pointer per kernel.
 *
 * kernels_ref.c holds all of them in scalar C and is the definition; kernels_<isa>.c starts from a copy and
 * replaces what it improves. Every instruction set, every number of threads, and runtime/kernels_numba.py give
 * the same bits, because
 *   - sign products are exact: activations are integers of at most 14 bits, sums are int32;
 *   - a float sum has DBF_LANES partial sums, element i in lane i % DBF_LANES, which are then added in halves:
 *     lane l += lane l + 8, then + 4, + 2, + 1;
 *   - there is no fused multiply-add and no libm function but rint and sqrt, which are exact.
 * "Error" is the largest difference from the formula in exact arithmetic, u = 2^-24; tests/kernels.c checks it.
 */
#ifndef DBF_KERNELS_H
#define DBF_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define DBF_LANES 16
#define DBF_PANEL 64           /* rows that one call of sign_gemv computes at most */
#define DBF_STRIP 16           /* tokens that are turned and quantized together */
#define DBF_BLOCK 64           /* tokens that are multiplied together, at most */
#define DBF_GEMM_ROWS 640      /* rows that one call of sign_gemm computes at most */
#define DBF_QMAX 8191          /* activations of a sign product lie in -8191 .. 8191 */
#define DBF_QMAX8 126          /* or, where 8 bits are asked for, in -126 .. 126 */
#define DBF_MAX_COLS 131072    /* 2 * 8191 * cols < 2^31 */
#define DBF_BATCH 4            /* vectors that one pass of a gemv over its weights serves at most */

/* GGML's blocks: how many weights, in how many bytes */
#define DBF_Q4_0_BLOCK 32      /* float16 d, 16 bytes: v + 8 of the weights i in the low, of i + 16 in the high nibbles */
#define DBF_Q4_0_BYTES 18
#define DBF_Q8_0_BLOCK 32      /* float16 d, 32 int8 v */
#define DBF_Q8_0_BYTES 34
#define DBF_Q6_K_BLOCK 256     /* v + 32: 128 bytes of low nibbles, 64 of two bits more; 16 int8 s; float16 d */
#define DBF_Q6_K_BYTES 210
#define DBF_Q6_K_GROUP 16      /* weights of a Q6_K block that share an s */

typedef struct kernels {
    const char *name;

    /* ---- sign products -------------------------------------------------------------------------------- */

    /* scale = absmax(x) / 8191,  q[i] = rint(x[i] * (8191 / absmax(x)));  returns scale
     * all q = 0 where absmax(x) < 2^-100 or is no finite number;  error: 0.501 of q, u of scale */
    float (*quantize)(int16_t *q, const float *x, int n);

    /* z[i] = x[i] * s[i],  scale = absmax(z) / qmax,  q[i] = rint(z[i] * (qmax / absmax(z)));  returns scale
     * s float16, NULL for z = x, of which nothing is written; qmax DBF_QMAX or DBF_QMAX8; else as quantize
     * error: u |z|; 0.501 of q and u of scale, of that z */
    float (*quantize_scaled)(int16_t *q, float *z, const float *x, const uint16_t *s, int n, int qmax);

    /* y[i] = (isum[i] * scale) * s[i] + bias[i],  s float16, bias may be NULL;  error: u (4 |y - bias| + |y|) */
    void (*descale)(float *y, const int32_t *isum, float scale, const uint16_t *s, const float *bias, int n);

    /* bytes of sign_table's output; bytes of sign_pack's output, 0 if sign_gemv reads DBF1 as it is */
    size_t (*sign_table_bytes)(int cols);
    size_t (*sign_pack_bytes)(int rows, int cols);

    /* q as sign_gemv wants it */
    void (*sign_table)(void *table, const int16_t *q, int cols);

    /* DBF1 rows as sign_gemv wants them: panel p starts at w + p * DBF_PANEL * ((cols + 7) / 8) */
    void (*sign_pack)(uint8_t *w, const uint8_t *bits, int rows, int cols);

    /* isum[r] = sum_k s[r,k] * q[k],  s = +1 where bit k of row r is set, else -1
     * one panel: rows <= DBF_PANEL; isum has room for DBF_PANEL;  error: none */
    void (*sign_gemv)(int32_t *isum, const uint8_t *w, const void *table, int rows, int cols);

    /* the same for |q| <= DBF_QMAX8, faster: its table, which fits where sign_table's does, and its product;
     * error: none */
    void (*sign_table8)(void *table, const int16_t *q, int cols);
    void (*sign_gemv8)(int32_t *isum, const uint8_t *w, const void *table, int rows, int cols);

    /* ---- sign products of many tokens: number k of token i is x[k * wide + i], wide 32 or 64 ------------ */

    /* y[k * wide + i] = x[i * stride + k],  k < cols, i < n;  0 for the other i < DBF_STRIP;  error: none */
    void (*to_columns)(float *y, const float *x, size_t stride, int n, int wide, int cols);

    /* y[i * stride + r] = x[r * wide + i], or += where add is set,  r < rows, i < n;  error: u |y| of += */
    void (*to_rows)(float *y, const float *x, size_t stride, int n, int wide, int rows, int add);

    /* scale[i], q[k * wide + i] = those of quantize_scaled for x[k * stride + i] * s[k],  k < cols, i < DBF_STRIP
     * s float16 or NULL;  error: that of quantize_scaled */
    void (*quantize_many)(int16_t *q, float *scale, const float *x, const uint16_t *s, int cols, int wide, int stride,
                          int qmax);

    /* isum[r * wide + i] = sum_k s[r,k] * q[k * wide + i],  s = +1 where bit k of row r is set, else -1
     * rows <= DBF_GEMM_ROWS, from the start of a panel; work[(rows + 2) * wide] is work space;  error: none */
    void (*sign_gemm)(int32_t *isum, const uint8_t *w, const int16_t *q, uint32_t *work, int rows, int cols, int wide);

    /* y[r * wide + i] = (isum[r * wide + i] * scale[i]) * s[r] + bias[r],  s float16, bias may be NULL
     * error: that of descale */
    void (*descale_many)(float *y, const int32_t *isum, const float *scale, const uint16_t *s, const float *bias,
                         int rows, int wide);

    /* ---- unfactorized matrices, with n vectors at once ------------------------------------------------- */

    /* y[i,r] = sum_k w[r,k] * x[i,k];  error: (cols/16 + 6) u sum_k |w x|
     * y[n][rows], w[rows][cols], x[n][cols] */
    void (*gemv_f32)(float *y, const float *w, const float *x, int n, int rows, int cols);
    void (*gemv_f16)(float *y, const uint16_t *w, const float *x, int n, int rows, int cols);

    /* y[i,r] = scale[i] * sum_l sum_b d[r,b] * isum[r,b,l],  isum[r,b,l] = sum of v[r,k] * q[i,k] over the columns
     * 2l, 2l + 1, 2l + 16, 2l + 17 of block b,  l = 0 .. 7;  cols % 32 == 0
     * y[n][rows], q[n][cols], scale[n];  error: (cols/32 + 6) u scale sum_k |d v q| */
    void (*gemv_q4_0)(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols);
    void (*gemv_q8_0)(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols);

    /* y[i,r] = scale[i] * sum_l sum_b d[r,b] * isum[r,b,l],  isum[r,b,l] = sum of s[r,g] * v[r,k] * q[i,k] over the
     * columns 16g + 2l, 16g + 2l + 1 of block b,  g = 0 .. 15,  l = 0 .. 7;  cols % 256 == 0
     * y[n][rows], q[n][cols], scale[n]; |isum| <= 32 * 128 * 32 * 8191 < 2^31
     * error: (cols/256 + 7) u scale sum_k |d s v q| */
    void (*gemv_q6_k)(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols);

    /* ---- everything else ------------------------------------------------------------------------------ */

    /* y[i] = (x[i] / sqrt(sum_k x[k]^2 / n + eps)) * w[i];  y may be x;  error: (n/32 + 8) u |y| */
    void (*rmsnorm)(float *y, const float *x, const float *w, float eps, int n);

    /* y[i] = ((x[i] - mean) / sqrt(variance + eps)) * w[i] + b[i],
     * mean and variance those of x;  b may be NULL
     * y may be x;  error: (n/16 + 12) u (max |x| / sqrt(variance + eps) |w| + |y|) */
    void (*layernorm)(float *y, const float *x, const float *w, const float *b, float eps, int n);

    /* rotate the first dims elements of one head, in place: (a, b) -> (a cos - b sin, a sin + b cos)
     * cos_sin[dims/2][2]; pairing DBF_ADJACENT or DBF_HALVES;  error: 2 u (|a| + |b|) */
    void (*rope)(float *x, const float *cos_sin, int dims, int pairing);

    /* y[j] = (sum_i k[j,i] * x[i]) * factor
     * scores of n keys: y[n], x[dim], k[n][dim];  error: (dim/16 + 7) u factor sum_i |k x| */
    void (*scores)(float *y, const float *x, const float *k, float factor, int n, int dim);

    /* x[j] = exp(x[j] - max(x));  returns their sum
     * error: (|x[j] - max(x)| + 5) u exp(x[j] - max(x)) for |x[j] - max(x)| <= 80, (n/16 + 6) u of the sum */
    float (*softmax)(float *x, int n);

    /* y[i] = y[i] + sum_j p[j] * v[j,i],  added one by one
     * y[dim], p[n], v[n][dim];  error: (n + 1) u (|y| + sum_j |p v|) */
    void (*mix)(float *y, const float *p, const float *v, int n, int dim);

    /* y[i] = gate[i] / (1 + exp(-gate[i])) * up[i];  error: 9 u |y| for |gate| <= 80 */
    void (*silu_mul)(float *y, const float *gate, const float *up, int n);

    /* y[i] = gate[i] / (1 + exp(-a)) * up[i],  a = 2 sqrt(2/pi) (gate[i] + 0.044715 gate[i]^3), which is GELU with tanh
     * error: (6 |a| + 9) u |y| for |a| <= 80 */
    void (*gelu_mul)(float *y, const float *gate, const float *up, int n);

    /* y[i] = x[i] / (1 + exp(-a)),  a = 2 sqrt(2/pi) (x[i] + 0.044715 x[i]^3)
     * y may be x;  error: (6 |a| + 8) u |y| for |a| <= 80 */
    void (*gelu)(float *y, const float *x, int n);

    /* y[i] = y[i] + x[i];  error: u |y| */
    void (*add)(float *y, const float *x, int n);

    /* y[i] = y[i] * factor;  error: u |y| */
    void (*scale)(float *y, float factor, int n);

    /* y[i] = cap * tanh(y[i] / cap),  cap > 0;  error: 9 u cap */
    void (*softcap)(float *y, float cap, int n);

    /* float32 to float16, round to nearest even */
    void (*to_f16)(uint16_t *y, const float *x, int n);

    /* float16 to float32 */
    void (*from_f16)(float *y, const uint16_t *x, int n);

    /* float32 to Q8_0: d = absmax / 127,  v[i] = rint(x[i] * (127 / absmax)),  absmax that of the block;
     * n % 32 == 0
     * all v = 0 where absmax < 2^-100 or is no finite number;  error: 0.501 of v */
    void (*to_q8_0)(uint8_t *y, const float *x, int n);

    /* Q4_0 and Q8_0 to float32: y[i] = d * v[i],  n % 32 == 0;  error: none for normal d */
    void (*from_q4_0)(float *y, const uint8_t *x, int n);
    void (*from_q8_0)(float *y, const uint8_t *x, int n);

    /* Q6_K to float32: y[i] = (d * s[i / 16]) * v[i],  n % 256 == 0;  error: u |y| for normal d */
    void (*from_q6_k)(float *y, const uint8_t *x, int n);
} kernels_t;

extern const kernels_t kernels_ref;
void kernels_avx2(kernels_t *k); /* overwrite what AVX2 + F16C improves */
void kernels_avx512(kernels_t *k); /* the same for AVX-512 F, BW, VL and DQ */
void kernels_avx512vbmi(kernels_t *k); /* the same for these, VBMI and GFNI */
void kernels_neon(kernels_t *k); /* overwrite what AArch64's Advanced SIMD improves */

/* dispatch.c: the active set, or NULL if DBF_ISA names an unusable one */
const kernels_t *dbf_kernels_active(void);

#endif
