/* gemm_simd.h - sign products of many tokens, by the method of the four Russians; included by kernels_<isa>.c after
 * float_simd.h.
 *
 * Tokens lie side by side in vectors. For 4 columns and every token, a table holds the 16 sums that 4 signs may give
 * ("agree" of lut16.h, at most 4 * 8191), the sums of one sign pattern side by side: a row needs one load and one
 * addition for 4 columns of a whole vector of tokens, and no shuffle.
 *
 * Entries are u16, and two of them may be added: 8 columns. How the sum S of many such pairs x is kept in two u16:
 * the one adds up x, mod 2^16; the other adds up (average of four x) >> 6, about S / 256. The average of averages that
 * round up is in [sum / 4, sum / 4 + 1], so for p passes of four x, -4 * p <= S - 256 * other <= 252 * p: both together
 * are exact for GEMM_PASSES passes.
 *
 * Of 2048 x 2048 signs, on one core of a Cascade Lake whose other hyperthread was busy, in signs per cycle: this
 * 77 (AVX-512) and 44 (AVX2), tables included; sign_gemv token by token 40 and 33; the same with nibbles shared by
 * 2 or 4 tokens 38 (the loads of tables bind, not the instructions). By count of instructions and ports, 32 columns
 * of 64 tokens take 14 cycles here, 28 with lut16.h, 32 with vpdpbusd on two int8 planes of the activations (1
 * instruction for 64 signs of one plane), 25.6 with vpermi2d on int32 tables of 5 columns.
 *
 * The including file defines, beside what float_simd.h needs:
 *   VH_BYTES  bytes of a vector      vh_avg(a, b)  (a + b + 1) >> 1 of u16
 *   VT        4 or 8: the floats of vt, vt_load, vt_store
 *   vt_gather(p, stride), vt_scatter(p, stride, v)  floats 0-3 at p, 4-7 at p + 4 * stride
 *   vt_turn(a, b, c, d)  floats 0-3, and 4-7, of the four transposed as 4 x 4
 *   PANEL_STEP  row r of a panel is byte r * PANEL_STEP % 64 + r * PANEL_STEP / 64 of a group */
#ifndef DBF_GEMM_SIMD_H
#define DBF_GEMM_SIMD_H

#define GEMM_GROUPS 4 /* of 8 columns, in one pass over the rows: their tables take 16 KB */
#define GEMM_COLS (8 * GEMM_GROUPS)
#define GEMM_TABLES (2 * GEMM_GROUPS)
#define GEMM_PASSES 64 /* until sums move to int32: 64 * (65528 >> 6) < 2^16 */

typedef uint16_t vh __attribute__((vector_size(VH_BYTES)));
typedef int16_t vhs __attribute__((vector_size(VH_BYTES)));
typedef uint16_t vh_memory __attribute__((vector_size(VH_BYTES), aligned(2), may_alias));
#define VH (VH_BYTES / 2)

static inline vh vh_load(const void *p)
{
    return (vh)*(const vh_memory *)p;
}

static inline void vh_store(void *p, vh x)
{
    *(vh_memory *)p = (vh_memory)x;
}

/* table[GEMM_TABLES][16][wide] of q[GEMM_COLS][wide] */
static inline __attribute__((always_inline)) void gemm_tables(uint16_t *table, const int16_t *q, int wide)
{
    for (int t = 0; t < GEMM_TABLES; t++, table += 16 * wide, q += 4 * wide)
        for (int i = 0; i < wide; i += VH) {
            vh x[4], e[16] = { { 0 } };
            for (int j = 0; j < 4; j++) {
                x[j] = vh_load(q + j * wide + i);
                vhs z = (vhs)x[j];
                e[0] = e[0] + (vh)(-z & z >> 15); /* entry 0 agrees with the negative columns */
            }
            for (int j = 0; j < 4; j++)
                for (int k = 0; k < 1 << j; k++) e[k + (1 << j)] = e[k] + x[j];
            for (int k = 0; k < 16; k++) vh_store(table + k * wide + i, e[k]);
        }
}

/* the nibbles of GEMM_GROUPS groups of a panel, times 16: nibble[GEMM_TABLES][DBF_PANEL]; 0 beyond `groups` */
static inline void gemm_nibbles(uint8_t *nibble, const uint8_t *w, int groups)
{
    for (int g = 0; g < GEMM_GROUPS; g++, w += DBF_PANEL, nibble += 2 * DBF_PANEL) {
        if (g >= groups) {
            memset(nibble, 0, 2 * DBF_PANEL);
            continue;
        }
        __builtin_prefetch(w + GEMM_GROUPS * DBF_PANEL); /* of the next pass: no one linear stream here */
        for (int i = 0; i < DBF_PANEL; i++) {
            nibble[i] = (uint8_t)(w[i] << 4);
            nibble[DBF_PANEL + i] = w[i] & 0xf0;
        }
    }
}

/* one row: sums[2][wide] = or += what four pairs of entries give; nibble: of this row, DBF_PANEL apart */
static inline __attribute__((always_inline)) void gemm_row(uint16_t *sums, const uint16_t *table,
                                                           const uint8_t *nibble, int first, int wide)
{
    const char *entry[GEMM_TABLES];
    for (int t = 0; t < GEMM_TABLES; t++)
        entry[t] = (const char *)(table + t * 16 * wide) + (size_t)nibble[t * DBF_PANEL] * (size_t)(wide / 8);
    for (int i = 0; i < wide; i += VH) {
        vh x[4];
        for (int j = 0; j < 4; j++) x[j] = vh_load(entry[2 * j] + 2 * i) + vh_load(entry[2 * j + 1] + 2 * i);
        vh low = (x[0] + x[1]) + (x[2] + x[3]);
        vh high = vh_avg(vh_avg(x[0], x[1]), vh_avg(x[2], x[3])) >> 6;
        vh_store(sums + i, first ? low : low + vh_load(sums + i));
        vh_store(sums + wide + i, first ? high : high + vh_load(sums + wide + i));
    }
}

/* one pass over the rows: sums[rows + 2][2][wide]; last two rows of + and of - alone */
static inline __attribute__((always_inline)) void gemm_pass(uint16_t *sums, const uint16_t *table, const uint8_t *w,
                                                            size_t panel, int rows, int groups, int first, int wide)
{
    uint8_t nibble[GEMM_TABLES * DBF_PANEL];
    for (int r = 0; r < rows; w += panel) {
        gemm_nibbles(nibble, w, groups);
        for (int begin = 0; begin < PANEL_STEP; begin++)
            for (int at = begin; at < DBF_PANEL && r < rows; at += PANEL_STEP, r++, sums += 2 * wide)
                gemm_row(sums, table, nibble + at, first, wide);
    }
    for (int sign = 0; sign < 2; sign++, sums += 2 * wide) {
        memset(nibble, sign ? 0 : 0xf0, sizeof nibble);
        gemm_row(sums, table, nibble, first, wide);
    }
}

/* the sum that two u16 stand for */
static inline int32_t gemm_sum(const uint16_t *sums, int wide)
{
    int32_t about = sums[wide] << 8, margin = 4 * GEMM_PASSES;
    return about + (uint16_t)(sums[0] - about + margin) - margin;
}

static inline __attribute__((always_inline)) void gemm(int32_t *isum, const uint8_t *w, const int16_t *q,
                                                       uint16_t *sums, int rows, int cols, int wide)
{
    _Alignas(64) uint16_t table[GEMM_TABLES * 16 * DBF_BLOCK];
    int16_t rest[GEMM_COLS * DBF_BLOCK];
    int groups = (cols + 7) / 8;
    size_t panel = (size_t)groups * DBF_PANEL;
    for (int g0 = 0; g0 < groups; g0 += GEMM_PASSES * GEMM_GROUPS) {
        int end = groups - g0 < GEMM_PASSES * GEMM_GROUPS ? groups : g0 + GEMM_PASSES * GEMM_GROUPS;
        for (int g = g0; g < end; g += GEMM_GROUPS) {
            const int16_t *from = q + (size_t)g * 8 * wide;
            if (cols - 8 * g < GEMM_COLS) {
                size_t have = (size_t)(cols - 8 * g) * wide;
                memcpy(rest, from, have * sizeof *rest);
                memset(rest + have, 0, (size_t)GEMM_COLS * wide * sizeof *rest - have * sizeof *rest);
                from = rest;
            }
            gemm_tables(table, from, wide);
            if (g == g0)
                gemm_pass(sums, table, w + (size_t)g * DBF_PANEL, panel, rows, end - g, 1, wide);
            else
                gemm_pass(sums, table, w + (size_t)g * DBF_PANEL, panel, rows, end - g, 0, wide);
        }
        int32_t l1[DBF_BLOCK];
        const uint16_t *plus = sums + (size_t)rows * 2 * wide, *minus = plus + 2 * wide;
        for (int i = 0; i < wide; i++) l1[i] = gemm_sum(plus + i, wide) + gemm_sum(minus + i, wide);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < wide; i++) {
                int32_t sum = 2 * gemm_sum(sums + r * 2 * wide + i, wide) - l1[i];
                isum[r * wide + i] = g0 == 0 ? sum : isum[r * wide + i] + sum;
            }
    }
}

static void sign_gemm_simd(int32_t *isum, const uint8_t *w, const int16_t *q, uint32_t *work, int rows, int cols,
                           int wide)
{
    if (wide == DBF_BLOCK)
        gemm(isum, w, q, (uint16_t *)work, rows, cols, DBF_BLOCK);
    else
        gemm(isum, w, q, (uint16_t *)work, rows, cols, DBF_BLOCK / 2);
}

/* ---- around it -------------------------------------------------------------------------------------------- */

#define TILE 16 /* columns that are turned together: whole cache lines are read */

static void to_columns_simd(float *y, const float *x, size_t stride, int n, int wide, int cols)
{
    int full_n = n / VT * VT, full_cols = cols / 4 * 4;
    for (int tile = 0; tile < full_cols; tile += TILE)
        for (int i = 0; i < full_n; i += VT)
            for (int k = tile; k < tile + TILE && k < full_cols; k += 4) {
                const float *from = x + i * stride + k;
                float *to = y + (size_t)k * wide + i;
                vt a = vt_gather(from, stride), b = vt_gather(from + stride, stride);
                vt c = vt_gather(from + 2 * stride, stride), d = vt_gather(from + 3 * stride, stride);
                vt_turn(a, b, c, d);
                vt_store(to, a);
                vt_store(to + wide, b);
                vt_store(to + 2 * wide, c);
                vt_store(to + 3 * wide, d);
            }
    for (int k = 0; k < cols; k++)
        for (int i = k < full_cols ? full_n : 0; i < DBF_STRIP; i++)
            y[(size_t)k * wide + i] = i < n ? x[i * stride + k] : 0.0f;
}

static void to_rows_simd(float *y, const float *x, size_t stride, int n, int wide, int rows, int add)
{
    int full_n = n / VT * VT, full_rows = rows / 4 * 4;
    for (int i = 0; i < full_n; i += VT)
        for (int r = 0; r < full_rows; r += 4) { /* no tiles: rows a power of two apart would share few places of L1 */
            const float *from = x + (size_t)r * wide + i;
            float *to = y + i * stride + r;
            vt a = vt_load(from), b = vt_load(from + wide), c = vt_load(from + 2 * wide), d = vt_load(from + 3 * wide);
            vt_turn(a, b, c, d);
            if (add) {
                a = vt_gather(to, stride) + a;
                b = vt_gather(to + stride, stride) + b;
                c = vt_gather(to + 2 * stride, stride) + c;
                d = vt_gather(to + 3 * stride, stride) + d;
            }
            vt_scatter(to, stride, a);
            vt_scatter(to + stride, stride, b);
            vt_scatter(to + 2 * stride, stride, c);
            vt_scatter(to + 3 * stride, stride, d);
        }
    for (int i = 0; i < n; i++)
        for (int r = i < full_n ? full_rows : 0; r < rows; r++) {
            float v = x[(size_t)r * wide + i];
            y[i * stride + r] = add ? y[i * stride + r] + v : v;
        }
}

/* the next DBF_LANES scales as float32, fewer at the end; 1 where there are none */
static inline void scales_at(float *to, const uint16_t *s, int n)
{
    for (int i = 0; i < DBF_LANES; i += VW)
        if (s && i + VW <= n)
            vf_store(to + i, vf_f16(s + i));
        else
            for (int j = i; j < i + VW; j++) to[j] = s && j < n ? f32_from_f16(s[j]) : 1.0f;
}

static void quantize_many_simd(int16_t *q, float *scale, const float *x, const uint16_t *s, int cols, int wide,
                               int stride, int qmax)
{
    float sk[DBF_LANES], inverse[DBF_STRIP];
    vi top[ACCS] = { { 0 } }, usable[ACCS];
    vf by[ACCS];
    const float *from = x;
    for (int k = 0; k < cols; k += DBF_LANES) {
        int some = cols - k < DBF_LANES ? cols - k : DBF_LANES;
        scales_at(sk, s ? s + k : NULL, some);
        for (int j = 0; j < some; j++, from += stride)
            for (int a = 0; a < ACCS; a++)
                top[a] = vi_max(top[a], vf_abs_bits(vf_load(from + a * VW) * vf_set1(sk[j])));
    }
    for (int a = 0; a < ACCS; a++) {
        int32_t tops[VW], mask[VW];
        vi_store(tops, top[a]);
        for (int l = 0; l < VW; l++) {
            scale[a * VW + l] = scale_to((float)qmax, (uint32_t)tops[l], &inverse[a * VW + l]);
            mask[l] = inverse[a * VW + l] > 0.0f ? -1 : 0;
        }
        by[a] = vf_load(inverse + a * VW);
        usable[a] = vi_load(mask);
    }
    for (int k = 0; k < cols; k += DBF_LANES) {
        int some = cols - k < DBF_LANES ? cols - k : DBF_LANES;
        scales_at(sk, s ? s + k : NULL, some);
        for (int j = 0; j < some; j++, x += stride, q += wide)
            for (int a = 0; a < ACCS; a++) {
                vf z = (vf_load(x + a * VW) * vf_set1(sk[j])) * by[a];
                vf_store_i16(q + a * VW, vf_and(z, usable[a])); /* 0 where there is an infinity or NaN */
            }
    }
}

static void descale_many_simd(float *y, const int32_t *isum, const float *scale, const uint16_t *s, const float *bias,
                              int rows, int wide)
{
    float sr[DBF_LANES];
    for (int r = 0; r < rows; r++, isum += wide, y += wide) {
        if (r % DBF_LANES == 0) scales_at(sr, s + r, rows - r);
        vf by = vf_set1(sr[r % DBF_LANES]), more = vf_set1(bias ? bias[r] : 0.0f);
        for (int i = 0; i < wide; i += VW) {
            vf v = (vf_from_i32(isum + i) * vf_load(scale + i)) * by;
            if (bias) v = v + more;
            vf_store(y + i, v);
        }
    }
}

static void set_gemm_kernels(kernels_t *k)
{
    k->to_columns = to_columns_simd;
    k->to_rows = to_rows_simd;
    k->quantize_many = quantize_many_simd;
    k->sign_gemm = sign_gemm_simd;
    k->descale_many = descale_many_simd;
}

#endif
