/* kernels_ref.c - every kernel in scalar C, as its formula in kernels.h says.
 * Mirror: runtime/kernels_numba.py, same names, parameters and order. */
#include "../dbf.h"
#include "scalar.h"

/* ---- sign products ---------------------------------------------------------------------------------------- */

static float quantize_to(int qmax, int16_t *q, const float *x, int n)
{
    /* the largest |x| as an integer: the bits of non-negative floats are ordered, and NaN comes last */
    uint32_t magnitude = 0;
    for (int i = 0; i < n; i++) {
        uint32_t m = bits_of(x[i]) & 0x7fffffffu;
        magnitude = m > magnitude ? m : magnitude;
    }
    float inverse, scale = scale_to((float)qmax, magnitude, &inverse);
    for (int i = 0; i < n; i++) q[i] = inverse > 0.0f ? (int16_t)rintf(x[i] * inverse) : 0;
    return scale;
}

static float quantize(int16_t *q, const float *x, int n)
{
    return quantize_to(DBF_QMAX, q, x, n);
}

static float quantize_scaled(int16_t *q, float *z, const float *x, const uint16_t *s, int n, int qmax)
{
    if (!s) return quantize_to(qmax, q, x, n);
    for (int i = 0; i < n; i++) z[i] = x[i] * f32_from_f16(s[i]);
    return quantize_to(qmax, q, z, n);
}

static void descale(float *y, const int32_t *isum, float scale, const uint16_t *s, const float *bias, int n)
{
    for (int i = 0; i < n; i++) {
        float v = ((float)isum[i] * scale) * f32_from_f16(s[i]);
        y[i] = bias ? v + bias[i] : v;
    }
}

static size_t sign_table_bytes(int cols)
{
    return (size_t)cols * sizeof(int16_t);
}

static size_t sign_pack_bytes(int rows, int cols)
{
    (void)rows, (void)cols;
    return 0;
}

static void sign_table(void *table, const int16_t *q, int cols)
{
    memcpy(table, q, (size_t)cols * sizeof(int16_t));
}

static void sign_pack(uint8_t *w, const uint8_t *bits, int rows, int cols)
{
    memcpy(w, bits, (size_t)rows * (size_t)((cols + 7) / 8));
}

static void sign_gemv(int32_t *isum, const uint8_t *w, const void *table, int rows, int cols)
{
    const int16_t *q = table;
    int row_bytes = (cols + 7) / 8;
    for (int r = 0; r < rows; r++) {
        int32_t sum = 0;
        for (int k = 0; k < cols; k++) {
            int bit = w[r * row_bytes + (k >> 3)] >> (k & 7) & 1;
            sum += bit ? q[k] : -q[k];
        }
        isum[r] = sum;
    }
}

/* ---- sign products of many tokens ------------------------------------------------------------------------- */

static void to_columns(float *y, const float *x, size_t stride, int n, int wide, int cols)
{
    for (int k = 0; k < cols; k++)
        for (int i = 0; i < DBF_STRIP; i++) y[(size_t)k * wide + i] = i < n ? x[i * stride + k] : 0.0f;
}

static void to_rows(float *y, const float *x, size_t stride, int n, int wide, int rows, int add)
{
    for (int i = 0; i < n; i++)
        for (int r = 0; r < rows; r++) {
            float v = x[(size_t)r * wide + i];
            y[i * stride + r] = add ? y[i * stride + r] + v : v;
        }
}

static void quantize_many(int16_t *q, float *scale, const float *x, const uint16_t *s, int cols, int wide, int stride,
                          int qmax)
{
    for (int i = 0; i < DBF_STRIP; i++) {
        uint32_t magnitude = 0;
        for (int k = 0; k < cols; k++) {
            float z = x[(size_t)k * stride + i];
            uint32_t m = bits_of(s ? z * f32_from_f16(s[k]) : z) & 0x7fffffffu;
            magnitude = m > magnitude ? m : magnitude;
        }
        float inverse;
        scale[i] = scale_to((float)qmax, magnitude, &inverse);
        for (int k = 0; k < cols; k++) {
            float z = x[(size_t)k * stride + i];
            z = s ? z * f32_from_f16(s[k]) : z;
            q[(size_t)k * wide + i] = inverse > 0.0f ? (int16_t)rintf(z * inverse) : 0;
        }
    }
}

static void sign_gemm(int32_t *isum, const uint8_t *w, const int16_t *q, uint32_t *work, int rows, int cols, int wide)
{
    (void)work;
    int row_bytes = (cols + 7) / 8;
    for (int r = 0; r < rows; r++, isum += wide) {
        for (int i = 0; i < wide; i++) isum[i] = 0;
        for (int k = 0; k < cols; k++) {
            int bit = w[r * row_bytes + (k >> 3)] >> (k & 7) & 1;
            for (int i = 0; i < wide; i++) isum[i] += bit ? q[k * wide + i] : -q[k * wide + i];
        }
    }
}

static void descale_many(float *y, const int32_t *isum, const float *scale, const uint16_t *s, const float *bias,
                         int rows, int wide)
{
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < wide; i++) {
            float v = ((float)isum[r * wide + i] * scale[i]) * f32_from_f16(s[r]);
            y[r * wide + i] = bias ? v + bias[r] : v;
        }
}

/* ---- unfactorized matrices -------------------------------------------------------------------------------- */

static void gemv_f32(float *y, const float *w, const float *x, int n, int rows, int cols)
{
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) {
            float lane[DBF_LANES] = { 0 };
            for (int k = 0; k < cols; k++)
                lane[k % DBF_LANES] = lane[k % DBF_LANES] + w[(size_t)r * cols + k] * x[(size_t)i * cols + k];
            y[(size_t)i * rows + r] = lanes_sum(lane);
        }
}

static void gemv_f16(float *y, const uint16_t *w, const float *x, int n, int rows, int cols)
{
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) {
            float lane[DBF_LANES] = { 0 };
            for (int k = 0; k < cols; k++)
                lane[k % DBF_LANES] =
                    lane[k % DBF_LANES] + f32_from_f16(w[(size_t)r * cols + k]) * x[(size_t)i * cols + k];
            y[(size_t)i * rows + r] = lanes_sum(lane);
        }
}

/* gemv_q4_0 and gemv_q8_0 differ in their blocks only */
static void gemv_blocks(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols,
                        int (*value)(const uint8_t *block, int i), int bytes)
{
    int blocks = cols / 32;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) {
            float lane[DBF_LANES] = { 0 };
            for (int b = 0; b < blocks; b++) {
                const uint8_t *block = w + ((size_t)r * blocks + b) * bytes;
                const int16_t *p = q + (size_t)i * cols + b * 32;
                float d = f32_at(block);
                for (int l = 0; l < 8; l++) {
                    int k = 2 * l;
                    int32_t isum = value(block, k) * p[k] + value(block, k + 1) * p[k + 1]
                                 + value(block, k + 16) * p[k + 16] + value(block, k + 17) * p[k + 17];
                    lane[l] = lane[l] + (float)isum * d;
                }
            }
            y[(size_t)i * rows + r] = lanes_sum(lane) * scale[i];
        }
}

static void gemv_q4_0(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols)
{
    gemv_blocks(y, w, q, scale, n, rows, cols, q4_0_value, DBF_Q4_0_BYTES);
}

static void gemv_q8_0(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols)
{
    gemv_blocks(y, w, q, scale, n, rows, cols, q8_0_value, DBF_Q8_0_BYTES);
}

static void gemv_q6_k(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols)
{
    int blocks = cols / DBF_Q6_K_BLOCK;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) {
            float lane[DBF_LANES] = { 0 };
            for (int b = 0; b < blocks; b++) {
                const uint8_t *block = w + ((size_t)r * blocks + b) * DBF_Q6_K_BYTES;
                const int16_t *p = q + (size_t)i * cols + b * DBF_Q6_K_BLOCK;
                const int8_t *s = (const int8_t *)block + Q6_K_SCALES;
                float d = f32_at(block + Q6_K_D);
                for (int l = 0; l < 8; l++) {
                    int32_t isum = 0;
                    for (int g = 0; g < DBF_Q6_K_BLOCK / DBF_Q6_K_GROUP; g++) {
                        int k = g * DBF_Q6_K_GROUP + 2 * l;
                        isum += s[g] * (q6_k_value(block, k) * p[k] + q6_k_value(block, k + 1) * p[k + 1]);
                    }
                    lane[l] = lane[l] + (float)isum * d;
                }
            }
            y[(size_t)i * rows + r] = lanes_sum(lane) * scale[i];
        }
}

/* ---- everything else -------------------------------------------------------------------------------------- */

static void rmsnorm(float *y, const float *x, const float *w, float eps, int n)
{
    float lane[DBF_LANES] = { 0 };
    for (int i = 0; i < n; i++) lane[i % DBF_LANES] = lane[i % DBF_LANES] + x[i] * x[i];
    float root = 1.0f / sqrtf(lanes_sum(lane) / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = (x[i] * root) * w[i];
}

static void layernorm(float *y, const float *x, const float *w, const float *b, float eps, int n)
{
    float sums[DBF_LANES] = { 0 }, squares[DBF_LANES] = { 0 };
    for (int i = 0; i < n; i++) sums[i % DBF_LANES] = sums[i % DBF_LANES] + x[i];
    float mean = lanes_sum(sums) / (float)n;
    for (int i = 0; i < n; i++) {
        float d = x[i] - mean;
        squares[i % DBF_LANES] = squares[i % DBF_LANES] + d * d;
    }
    float root = 1.0f / sqrtf(lanes_sum(squares) / (float)n + eps);
    for (int i = 0; i < n; i++) {
        float v = ((x[i] - mean) * root) * w[i];
        y[i] = b ? v + b[i] : v;
    }
}

static void rope(float *x, const float *cos_sin, int dims, int pairing)
{
    int half = dims / 2;
    for (int i = 0; i < half; i++) {
        int ia = pairing == DBF_ADJACENT ? 2 * i : i, ib = pairing == DBF_ADJACENT ? 2 * i + 1 : i + half;
        float a = x[ia], b = x[ib], c = cos_sin[2 * i], s = cos_sin[2 * i + 1];
        x[ia] = a * c - b * s;
        x[ib] = a * s + b * c;
    }
}

static void scores(float *y, const float *x, const float *k, float factor, int n, int dim)
{
    for (int j = 0; j < n; j++) {
        float lane[DBF_LANES] = { 0 };
        for (int i = 0; i < dim; i++)
            lane[i % DBF_LANES] = lane[i % DBF_LANES] + k[(size_t)j * dim + i] * x[i];
        y[j] = lanes_sum(lane) * factor;
    }
}

static float softmax(float *x, int n)
{
    float top = -INFINITY, lane[DBF_LANES] = { 0 };
    for (int j = 0; j < n; j++) top = x[j] > top ? x[j] : top;
    for (int j = 0; j < n; j++) {
        x[j] = exp_f32(x[j] - top);
        lane[j % DBF_LANES] = lane[j % DBF_LANES] + x[j];
    }
    return lanes_sum(lane);
}

static void mix(float *y, const float *p, const float *v, int n, int dim)
{
    for (int j = 0; j < n; j++)
        for (int i = 0; i < dim; i++) y[i] = y[i] + p[j] * v[(size_t)j * dim + i];
}

static void silu_mul(float *y, const float *gate, const float *up, int n)
{
    for (int i = 0; i < n; i++) y[i] = gate[i] / (1.0f + exp_f32(-gate[i])) * up[i];
}

static void gelu_mul(float *y, const float *gate, const float *up, int n)
{
    for (int i = 0; i < n; i++) y[i] = gelu_f32(gate[i]) * up[i];
}

static void gelu(float *y, const float *x, int n)
{
    for (int i = 0; i < n; i++) y[i] = gelu_f32(x[i]);
}

static void add(float *y, const float *x, int n)
{
    for (int i = 0; i < n; i++) y[i] = y[i] + x[i];
}

static void scale(float *y, float factor, int n)
{
    for (int i = 0; i < n; i++) y[i] = y[i] * factor;
}

static void softcap(float *y, float cap, int n)
{
    float twice = 2.0f / cap;
    for (int i = 0; i < n; i++) y[i] = softcap_f32(y[i], cap, twice);
}

static void to_f16(uint16_t *y, const float *x, int n)
{
    for (int i = 0; i < n; i++) y[i] = f16_from_f32(x[i]);
}

static void from_f16(float *y, const uint16_t *x, int n)
{
    for (int i = 0; i < n; i++) y[i] = f32_from_f16(x[i]);
}

static void to_q8_0(uint8_t *y, const float *x, int n)
{
    for (int b = 0; b < n; b += DBF_Q8_0_BLOCK, y += DBF_Q8_0_BYTES) {
        uint32_t magnitude = 0;
        for (int i = 0; i < DBF_Q8_0_BLOCK; i++) {
            uint32_t m = bits_of(x[b + i]) & 0x7fffffffu;
            magnitude = m > magnitude ? m : magnitude;
        }
        float inverse;
        uint16_t d = f16_from_f32(scale_to(127.0f, magnitude, &inverse));
        y[0] = (uint8_t)d, y[1] = (uint8_t)(d >> 8);
        for (int i = 0; i < DBF_Q8_0_BLOCK; i++)
            y[2 + i] = inverse > 0.0f ? (uint8_t)(int8_t)rintf(x[b + i] * inverse) : 0;
    }
}

static void from_q4_0(float *y, const uint8_t *x, int n)
{
    for (int b = 0; b < n; b += DBF_Q4_0_BLOCK, x += DBF_Q4_0_BYTES)
        for (int i = 0; i < DBF_Q4_0_BLOCK; i++) y[b + i] = f32_at(x) * (float)q4_0_value(x, i);
}

static void from_q8_0(float *y, const uint8_t *x, int n)
{
    for (int b = 0; b < n; b += DBF_Q8_0_BLOCK, x += DBF_Q8_0_BYTES)
        for (int i = 0; i < DBF_Q8_0_BLOCK; i++) y[b + i] = f32_at(x) * (float)q8_0_value(x, i);
}

static void from_q6_k(float *y, const uint8_t *x, int n)
{
    for (int b = 0; b < n; b += DBF_Q6_K_BLOCK, x += DBF_Q6_K_BYTES)
        for (int i = 0; i < DBF_Q6_K_BLOCK; i++) {
            float s = (float)(int8_t)x[Q6_K_SCALES + i / DBF_Q6_K_GROUP];
            y[b + i] = (f32_at(x + Q6_K_D) * s) * (float)q6_k_value(x, i);
        }
}

const kernels_t kernels_ref = {
    .name = "scalar",
    .quantize = quantize,
    .quantize_scaled = quantize_scaled,
    .descale = descale,
    .sign_table_bytes = sign_table_bytes,
    .sign_pack_bytes = sign_pack_bytes,
    .sign_table = sign_table,
    .sign_pack = sign_pack,
    .sign_gemv = sign_gemv,
    .sign_table8 = sign_table,
    .sign_gemv8 = sign_gemv,
    .to_columns = to_columns,
    .to_rows = to_rows,
    .quantize_many = quantize_many,
    .sign_gemm = sign_gemm,
    .descale_many = descale_many,
    .gemv_f32 = gemv_f32,
    .gemv_f16 = gemv_f16,
    .gemv_q4_0 = gemv_q4_0,
    .gemv_q8_0 = gemv_q8_0,
    .gemv_q6_k = gemv_q6_k,
    .rmsnorm = rmsnorm,
    .layernorm = layernorm,
    .rope = rope,
    .scores = scores,
    .softmax = softmax,
    .mix = mix,
    .silu_mul = silu_mul,
    .gelu_mul = gelu_mul,
    .gelu = gelu,
    .add = add,
    .scale = scale,
    .softcap = softcap,
    .to_f16 = to_f16,
    .from_f16 = from_f16,
    .to_q8_0 = to_q8_0,
    .from_q4_0 = from_q4_0,
    .from_q8_0 = from_q8_0,
    .from_q6_k = from_q6_k,
};
