/* float_simd.h - the float kernels for any vector width VW that divides DBF_LANES; included by kernels_<isa>.c.
 *
 * The including file defines, for vectors of VW floats (vf) and int32 (vi), on which + - * / work:
 *   vf_load vf_store vf_set1 vf_max(a, b) vf_min(a, b) vf_rint,
 *   vf_f16(const uint16_t *) and vf_to_f16(uint16_t *, vf), vf_store_i16(int16_t *, vf integers),
 *   vf_from_i32(const int32_t *), vf_i8(const uint8_t * of int8), vf_pow2(vf integers) = 2^n, vf_abs_bits, vi_max, vi_store,
 *   halves_of(vf[ACCS]) = the first VW lanes of a sum, to which the others are added in halves,
 *   sums_of(vf[VW]) = the sums of VW such vectors, lanes_of(vf[ACCS]) = one sum, FLIGHT (a divisor of VW);
 *   AHEAD is lut16.h's
 * Element i of a sum stays in lane i % DBF_LANES, so the results are those of kernels_ref.c, bit for bit. */
#ifndef DBF_FLOAT_SIMD_H
#define DBF_FLOAT_SIMD_H

#define ACCS (DBF_LANES / VW)

static inline vf vf_exp(vf x)
{
    /* with the operands in this order both max and min hand a NaN on */
    x = vf_min(vf_set1(EXP_HIGH), vf_max(vf_set1(EXP_LOW), x));
    vf n = vf_rint(x * vf_set1(EXP_LOG2E));
    vf r = (x - n * vf_set1(EXP_LN2_HIGH)) - n * vf_set1(EXP_LN2_LOW);
    vf p = vf_set1(EXP_P0) * r + vf_set1(EXP_P1);
    p = p * r + vf_set1(EXP_P2);
    p = p * r + vf_set1(EXP_P3);
    p = p * r + vf_set1(EXP_P4);
    p = p * r + vf_set1(EXP_P5);
    return ((p * (r * r) + r) + vf_set1(1.0f)) * vf_pow2(n);
}

/* add the last elements, fewer than DBF_LANES, and then the lanes */
#define SUM_TAIL(acc, first, n, term)                                        \
    do {                                                                     \
        float lane_[DBF_LANES];                                              \
        for (int a_ = 0; a_ < ACCS; a_++) vf_store(lane_ + a_ * VW, acc[a_]); \
        for (int i = first; i < n; i++) lane_[i - first] = lane_[i - first] + (term); \
        sum = lanes_sum(lane_);                                              \
    } while (0)

static inline float quantize_scaled_simd(int16_t *q, float *z, const float *x, const uint16_t *s, int n, int qmax)
{
    int i = 0;
    vi top = { 0 };
    for (; i + VW <= n; i += VW) {
        vf v = vf_load(x + i);
        if (s) {
            v = v * vf_f16(s + i);
            vf_store(z + i, v);
        }
        top = vi_max(top, vf_abs_bits(v));
    }
    int32_t tops[VW];
    vi_store(tops, top);
    uint32_t magnitude = 0;
    for (int l = 0; l < VW; l++) magnitude = (uint32_t)tops[l] > magnitude ? (uint32_t)tops[l] : magnitude;
    for (; i < n; i++) {
        float v = s ? (z[i] = x[i] * f32_from_f16(s[i])) : x[i];
        uint32_t m = bits_of(v) & 0x7fffffffu;
        magnitude = m > magnitude ? m : magnitude;
    }
    float inverse, scale = scale_to((float)qmax, magnitude, &inverse);
    if (!(inverse > 0.0f)) {
        memset(q, 0, (size_t)n * sizeof *q);
        return scale;
    }
    x = s ? z : x;
    for (i = 0; i + VW <= n; i += VW) vf_store_i16(q + i, vf_load(x + i) * vf_set1(inverse));
    for (; i < n; i++) q[i] = (int16_t)rintf(x[i] * inverse);
    return scale;
}

static float quantize_simd(int16_t *q, const float *x, int n)
{
    return quantize_scaled_simd(q, NULL, x, NULL, n, DBF_QMAX);
}

static void descale_simd(float *y, const int32_t *isum, float scale, const uint16_t *s, const float *bias, int n)
{
    int i = 0;
    for (; i + VW <= n; i += VW) {
        vf v = (vf_from_i32(isum + i) * vf_set1(scale)) * vf_f16(s + i);
        if (bias) v = v + vf_load(bias + i);
        vf_store(y + i, v);
    }
    for (; i < n; i++) {
        float v = ((float)isum[i] * scale) * f32_from_f16(s[i]);
        y[i] = bias ? v + bias[i] : v;
    }
}

#define INLINE static inline __attribute__((always_inline))

/* `call` for n vectors, N = 4, 2 or 1 of them at a time, from number i on: a constant keeps the sums in registers */
#define IN_BATCHES(call)                            \
    for (int i = 0; i < n;)                         \
        if (n - i >= 4) {                           \
            enum { N = 4 };                         \
            call;                                   \
            i += N;                                 \
        } else if (n - i >= 2) {                    \
            enum { N = 2 };                         \
            call;                                   \
            i += N;                                 \
        } else {                                    \
            enum { N = 1 };                         \
            call;                                   \
            i += N;                                 \
        }

/* gemv_f32 and gemv_f16 with VALUES(k) = VW weights from column k on, VALUE(k) = one; w is a row */
#define ROWS(VALUES, VALUE)                                                                    \
    int full = cols / DBF_LANES * DBF_LANES;                                                   \
    for (int r = 0; r < rows; r++, w += cols) {                                                \
        vf acc[DBF_BATCH][ACCS] = { 0 };                                                       \
        for (int k = 0; k < full; k += DBF_LANES) {                                            \
            __builtin_prefetch((const char *)(w + k) + AHEAD);                                 \
            for (int a = 0; a < ACCS; a++) {                                                   \
                vf wa = VALUES(k + a * VW);                                                    \
                for (int i = 0; i < n; i++)                                                    \
                    acc[i][a] = acc[i][a] + wa * vf_load(x + (size_t)i * cols + k + a * VW);   \
            }                                                                                  \
        }                                                                                      \
        for (int v = 0; v < n; v++) {                                                          \
            float sum;                                                                         \
            if (full == cols)                                                                  \
                sum = lanes_of(acc[v]);                                                        \
            else                                                                               \
                SUM_TAIL(acc[v], full, cols, VALUE(i) * x[(size_t)v * cols + i]);              \
            y[(size_t)v * rows + r] = sum;                                                     \
        }                                                                                      \
    }

#define F32_VALUES(k) vf_load(w + (k))
#define F32_VALUE(k) w[k]
#define F16_VALUES(k) vf_f16(w + (k))
#define F16_VALUE(k) f32_from_f16(w[k])

INLINE void rows_f32(float *y, const float *w, const float *x, int n, int rows, int cols)
{
    ROWS(F32_VALUES, F32_VALUE)
}

INLINE void rows_f16(float *y, const uint16_t *w, const float *x, int n, int rows, int cols)
{
    ROWS(F16_VALUES, F16_VALUE)
}

static void gemv_f32_simd(float *y, const float *w, const float *x, int n, int rows, int cols)
{
    IN_BATCHES(rows_f32(y + (size_t)i * rows, w, x + (size_t)i * cols, N, rows, cols))
}

static void gemv_f16_simd(float *y, const uint16_t *w, const float *x, int n, int rows, int cols)
{
    IN_BATCHES(rows_f16(y + (size_t)i * rows, w, x + (size_t)i * cols, N, rows, cols))
}

static void rmsnorm_simd(float *y, const float *x, const float *w, float eps, int n)
{
    int full = n / DBF_LANES * DBF_LANES, i = 0;
    vf acc[ACCS] = { 0 };
    float sum;
    for (int k = 0; k < full; k += DBF_LANES)
        for (int a = 0; a < ACCS; a++) acc[a] = acc[a] + vf_load(x + k + a * VW) * vf_load(x + k + a * VW);
    SUM_TAIL(acc, full, n, x[i] * x[i]);
    float root = 1.0f / sqrtf(sum / (float)n + eps);
    for (; i + VW <= n; i += VW) vf_store(y + i, (vf_load(x + i) * vf_set1(root)) * vf_load(w + i));
    for (; i < n; i++) y[i] = (x[i] * root) * w[i];
}

static void layernorm_simd(float *y, const float *x, const float *w, const float *b, float eps, int n)
{
    int full = n / DBF_LANES * DBF_LANES, j = 0;
    vf acc[ACCS] = { 0 }, squares[ACCS] = { 0 };
    float sum;
    for (int k = 0; k < full; k += DBF_LANES)
        for (int a = 0; a < ACCS; a++) acc[a] = acc[a] + vf_load(x + k + a * VW);
    SUM_TAIL(acc, full, n, x[i]);
    float mean = sum / (float)n;
    for (int k = 0; k < full; k += DBF_LANES)
        for (int a = 0; a < ACCS; a++) {
            vf d = vf_load(x + k + a * VW) - vf_set1(mean);
            squares[a] = squares[a] + d * d;
        }
    SUM_TAIL(squares, full, n, (x[i] - mean) * (x[i] - mean));
    float root = 1.0f / sqrtf(sum / (float)n + eps);
    for (; j + VW <= n; j += VW) {
        vf v = ((vf_load(x + j) - vf_set1(mean)) * vf_set1(root)) * vf_load(w + j);
        if (b) v = v + vf_load(b + j);
        vf_store(y + j, v);
    }
    for (; j < n; j++) {
        float v = ((x[j] - mean) * root) * w[j];
        y[j] = b ? v + b[j] : v;
    }
}

/* The dot products of x with VW rows of k, one in each lane; n is a multiple of DBF_LANES. FLIGHT rows at a time: as
 * many as there are registers for. */
INLINE vf dots_simd(const float *k, const float *x, int n)
{
    vf lanes[VW];
    for (int r = 0; r < VW; r += FLIGHT) {
        vf acc[FLIGHT][ACCS] = { 0 };
        for (int i = 0; i < n; i += DBF_LANES)
            for (int a = 0; a < ACCS; a++) {
                vf xa = vf_load(x + i + a * VW);
                for (int f = 0; f < FLIGHT; f++)
                    acc[f][a] = acc[f][a] + vf_load(k + (size_t)(r + f) * n + i + a * VW) * xa;
            }
        for (int f = 0; f < FLIGHT; f++) lanes[r + f] = halves_of(acc[f]);
    }
    return sums_of(lanes);
}

static inline float dot_f32_simd(const float *w, const float *x, int n)
{
    int full = n / DBF_LANES * DBF_LANES;
    vf acc[ACCS] = { 0 };
    float sum;
    for (int k = 0; k < full; k += DBF_LANES)
        for (int a = 0; a < ACCS; a++) acc[a] = acc[a] + vf_load(w + k + a * VW) * vf_load(x + k + a * VW);
    if (full == n) return lanes_of(acc);
    SUM_TAIL(acc, full, n, w[i] * x[i]);
    return sum;
}

static void scores_simd(float *y, const float *x, const float *k, float factor, int n, int dim)
{
    int j = 0;
    if (dim == 64) /* as most models have it: a constant spares the registers that hold addresses */
        for (; j + VW <= n; j += VW) vf_store(y + j, dots_simd(k + (size_t)j * 64, x, 64) * vf_set1(factor));
    else if (dim == 128)
        for (; j + VW <= n; j += VW) vf_store(y + j, dots_simd(k + (size_t)j * 128, x, 128) * vf_set1(factor));
    else if (dim % DBF_LANES == 0)
        for (; j + VW <= n; j += VW) vf_store(y + j, dots_simd(k + (size_t)j * dim, x, dim) * vf_set1(factor));
    for (; j < n; j++) y[j] = dot_f32_simd(k + (size_t)j * dim, x, dim) * factor;
}

static float softmax_simd(float *x, int n)
{
    int full = n / DBF_LANES * DBF_LANES;
    vf tops = vf_set1(-INFINITY), acc[ACCS] = { 0 };
    for (int j = 0; j < full; j += VW) tops = vf_max(vf_load(x + j), tops);
    float lane[VW], top = -INFINITY, sum;
    vf_store(lane, tops);
    for (int l = 0; l < VW; l++) top = lane[l] > top ? lane[l] : top;
    for (int j = full; j < n; j++) top = x[j] > top ? x[j] : top;
    for (int j = 0; j < full; j += DBF_LANES)
        for (int a = 0; a < ACCS; a++) {
            vf e = vf_exp(vf_load(x + j + a * VW) - vf_set1(top));
            vf_store(x + j + a * VW, e);
            acc[a] = acc[a] + e;
        }
    for (int j = full; j < n; j++) x[j] = exp_f32(x[j] - top);
    SUM_TAIL(acc, full, n, x[i]);
    return sum;
}

/* VECTORS registers of y from column i on */
#define MIX(VECTORS)                                                                                  \
    for (; i + (VECTORS) * VW <= dim; i += (VECTORS) * VW) {                                          \
        vf acc[VECTORS];                                                                              \
        for (int a = 0; a < (VECTORS); a++) acc[a] = vf_load(y + i + a * VW);                         \
        for (int j = 0; j < n; j++) {                                                                 \
            vf pj = vf_set1(p[j]);                                                                    \
            const float *vj = v + (size_t)j * dim + i;                                                \
            for (int a = 0; a < (VECTORS); a++) acc[a] = acc[a] + pj * vf_load(vj + a * VW);          \
        }                                                                                             \
        for (int a = 0; a < (VECTORS); a++) vf_store(y + i + a * VW, acc[a]);                         \
    }

static void mix_simd(float *y, const float *p, const float *v, int n, int dim)
{
    int i = 0;
    MIX(8)
    MIX(4)
    MIX(1)
    for (; i < dim; i++)
        for (int j = 0; j < n; j++) y[i] = y[i] + p[j] * v[(size_t)j * dim + i];
}

static void silu_mul_simd(float *y, const float *gate, const float *up, int n)
{
    int i = 0;
    for (; i + VW <= n; i += VW) {
        vf g = vf_load(gate + i);
        vf_store(y + i, g / (vf_set1(1.0f) + vf_exp(-g)) * vf_load(up + i));
    }
    for (; i < n; i++) y[i] = gate[i] / (1.0f + exp_f32(-gate[i])) * up[i];
}

static void gelu_mul_simd(float *y, const float *gate, const float *up, int n)
{
    int i = 0;
    for (; i + VW <= n; i += VW) {
        vf g = vf_load(gate + i);
        vf a = g * (vf_set1(GELU_1) + vf_set1(GELU_3) * (g * g));
        vf_store(y + i, g / (vf_set1(1.0f) + vf_exp(-a)) * vf_load(up + i));
    }
    for (; i < n; i++) y[i] = gelu_f32(gate[i]) * up[i];
}

static void gelu_simd(float *y, const float *x, int n)
{
    int i = 0;
    for (; i + VW <= n; i += VW) {
        vf v = vf_load(x + i);
        vf a = v * (vf_set1(GELU_1) + vf_set1(GELU_3) * (v * v));
        vf_store(y + i, v / (vf_set1(1.0f) + vf_exp(-a)));
    }
    for (; i < n; i++) y[i] = gelu_f32(x[i]);
}

static void add_simd(float *y, const float *x, int n)
{
    int i = 0;
    for (; i + VW <= n; i += VW) vf_store(y + i, vf_load(y + i) + vf_load(x + i));
    for (; i < n; i++) y[i] = y[i] + x[i];
}

static void scale_simd(float *y, float factor, int n)
{
    int i = 0;
    for (; i + VW <= n; i += VW) vf_store(y + i, vf_load(y + i) * vf_set1(factor));
    for (; i < n; i++) y[i] = y[i] * factor;
}

static void softcap_simd(float *y, float cap, int n)
{
    int i = 0;
    float twice = 2.0f / cap;
    for (; i + VW <= n; i += VW) {
        vf e = vf_exp(vf_load(y + i) * vf_set1(twice));
        vf_store(y + i, vf_set1(cap) - vf_set1(cap + cap) / (e + vf_set1(1.0f)));
    }
    for (; i < n; i++) y[i] = softcap_f32(y[i], cap, twice);
}

static void to_f16_simd(uint16_t *y, const float *x, int n)
{
    int i = 0;
    for (; i + VW <= n; i += VW) vf_to_f16(y + i, vf_load(x + i));
    for (; i < n; i++) y[i] = f16_from_f32(x[i]);
}

static void from_f16_simd(float *y, const uint16_t *x, int n)
{
    int i = 0;
    for (; i + 4 * VW <= n; i += 4 * VW)
        for (int a = 0; a < 4; a++) vf_store(y + i + a * VW, vf_f16(x + i + a * VW));
    for (; i + VW <= n; i += VW) vf_store(y + i, vf_f16(x + i));
    for (; i < n; i++) y[i] = f32_from_f16(x[i]);
}

static void to_q8_0_simd(uint8_t *y, const float *x, int n)
{
    for (int b = 0; b < n; b += DBF_Q8_0_BLOCK, y += DBF_Q8_0_BYTES) {
        vi top = { 0 };
        for (int i = 0; i < DBF_Q8_0_BLOCK; i += VW) top = vi_max(top, vf_abs_bits(vf_load(x + b + i)));
        int32_t tops[VW];
        vi_store(tops, top);
        uint32_t magnitude = 0;
        for (int l = 0; l < VW; l++) magnitude = (uint32_t)tops[l] > magnitude ? (uint32_t)tops[l] : magnitude;
        float inverse;
        uint16_t d = f16_from_f32(scale_to(127.0f, magnitude, &inverse));
        memcpy(y, &d, sizeof d);
        int16_t v[DBF_Q8_0_BLOCK] = { 0 };
        if (inverse > 0.0f)
            for (int i = 0; i < DBF_Q8_0_BLOCK; i += VW) vf_store_i16(v + i, vf_load(x + b + i) * vf_set1(inverse));
        for (int i = 0; i < DBF_Q8_0_BLOCK; i++) y[2 + i] = (uint8_t)v[i];
    }
}

static void from_q8_0_simd(float *y, const uint8_t *x, int n)
{
    for (int b = 0; b < n; b += DBF_Q8_0_BLOCK, x += DBF_Q8_0_BYTES) {
        vf d = vf_set1(f32_at(x));
        for (int i = 0; i < DBF_Q8_0_BLOCK; i += VW) vf_store(y + b + i, d * vf_i8(x + 2 + i));
    }
}

static void set_float_kernels(kernels_t *k)
{
    k->quantize = quantize_simd;
    k->quantize_scaled = quantize_scaled_simd;
    k->descale = descale_simd;
    k->gemv_f32 = gemv_f32_simd;
    k->gemv_f16 = gemv_f16_simd;
    k->rmsnorm = rmsnorm_simd;
    k->layernorm = layernorm_simd;
    k->scores = scores_simd;
    k->softmax = softmax_simd;
    k->mix = mix_simd;
    k->silu_mul = silu_mul_simd;
    k->gelu_mul = gelu_mul_simd;
    k->gelu = gelu_simd;
    k->add = add_simd;
    k->scale = scale_simd;
    k->softcap = softcap_simd;
    k->to_f16 = to_f16_simd;
    k->from_f16 = from_f16_simd;
    k->to_q8_0 = to_q8_0_simd;
    k->from_q8_0 = from_q8_0_simd;
}

#endif
