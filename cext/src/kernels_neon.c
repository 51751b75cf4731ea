/* kernels_neon.c - AArch64 Advanced SIMD; every AArch64 CPU has it, nothing newer is used (Raspberry Pi 4 and 5).
 *
 *   tbl      16 table look-ups          uaddw, uaddw2   bytes into u16 sums
 *   smull    int8 weights, widened, x int16 activations
 */
#if defined(__aarch64__)

#include <arm_neon.h>

#include "lut16.h"
#include "scalar.h"

#define VW 4
typedef float32x4_t vf;
typedef int32x4_t vi;
#define vf_load vld1q_f32
#define vf_store vst1q_f32
#define vf_set1 vdupq_n_f32
#define vf_max vmaxq_f32
#define vf_min vminq_f32
#define vf_rint vrndnq_f32
#define vf_f16(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))
#define vf_to_f16(p, x) vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x)))
#define vf_from_i32(p) vcvtq_f32_s32(vld1q_s32(p))
#define vf_abs_bits(x) vandq_s32(vreinterpretq_s32_f32(x), vdupq_n_s32(0x7fffffff))
#define vi_max vmaxq_s32
#define vi_store vst1q_s32
#define vi_load vld1q_s32
#define vf_and(x, mask) vreinterpretq_f32_s32(vandq_s32(vreinterpretq_s32_f32(x), mask))

static inline vf vf_pow2(vf n)
{
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}

static inline vf vf_i8(const uint8_t *p)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    int16x8_t v = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(v)));
}

static inline void vf_store_i16(int16_t *p, vf x)
{
    vst1_s16(p, vmovn_s32(vcvtnq_s32_f32(x)));
}

static inline float sum8(float32x4_t low, float32x4_t high) /* lanes_sum from half = 4 on */
{
    float32x4_t a = vaddq_f32(low, high);
    float32x2_t b = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(b, 0) + vget_lane_f32(b, 1);
}
#define lanes_of(acc) sum8(acc[0] + acc[2], acc[1] + acc[3])
#define halves_of(acc) ((acc[0] + acc[2]) + (acc[1] + acc[3]))
#define FLIGHT 4

/* l += l + 2 of two rows */
static inline vf quarters(vf a, vf b)
{
    float64x2_t a2 = vreinterpretq_f64_f32(a), b2 = vreinterpretq_f64_f32(b);
    return vreinterpretq_f32_f64(vzip1q_f64(a2, b2)) + vreinterpretq_f32_f64(vzip2q_f64(a2, b2));
}

static inline vf sums_of(const vf *v)
{
    return vpaddq_f32(quarters(v[0], v[1]), quarters(v[2], v[3]));
}

#include "float_simd.h"

#define VH_BYTES 16
#define vh_avg(a, b) ((vh)vrhaddq_u16((uint16x8_t)(a), (uint16x8_t)(b)))
#define PANEL_STEP 1
#define VT 4
typedef float32x4_t vt;
#define vt_load vld1q_f32
#define vt_store vst1q_f32
#define vt_gather(p, stride) vld1q_f32(p)
#define vt_scatter(p, stride, v) vst1q_f32(p, v)
#define vt_turn(a, b, c, d)                                                                           \
    do {                                                                                              \
        float32x4x2_t ab_ = vtrnq_f32(a, b), cd_ = vtrnq_f32(c, d);                                   \
        a = vcombine_f32(vget_low_f32(ab_.val[0]), vget_low_f32(cd_.val[0]));                         \
        b = vcombine_f32(vget_low_f32(ab_.val[1]), vget_low_f32(cd_.val[1]));                         \
        c = vcombine_f32(vget_high_f32(ab_.val[0]), vget_high_f32(cd_.val[0]));                       \
        d = vcombine_f32(vget_high_f32(ab_.val[1]), vget_high_f32(cd_.val[1]));                       \
    } while (0)

#include "gemm_simd.h"

/* ---- sign products ---------------------------------------------------------------------------------------- */

/* byte shuffles: entry i of a table takes, for column j, max(q[j], 0) if bit j of i is set, else max(-q[j], 0);
 * the former are the words 0-3 of a register, the latter the words 4-7 */
#define PICK(i, j) (uint16_t)((2 * (j) + ((i) >> (j) & 1 ? 0 : 8)) * 257 + 256)
#define PICKS(i, j)                                                           \
    {                                                                         \
        PICK(i, j), PICK(i + 1, j), PICK(i + 2, j), PICK(i + 3, j),           \
        PICK(i + 4, j), PICK(i + 5, j), PICK(i + 6, j), PICK(i + 7, j)        \
    }
static const uint16_t picks[5][8] = { PICKS(0, 0), PICKS(0, 1), PICKS(0, 2), PICKS(0, 3), PICKS(8, 3) };

/* the table of 4 columns: its entries 0-7 and 8-15, which differ in column 3 only */
static inline uint16x8x2_t entries(uint16x4_t plus, uint16x4_t minus)
{
    uint8x16_t parts = vreinterpretq_u8_u16(vcombine_u16(plus, minus));
    uint16x8_t e[5];
    for (int j = 0; j < 5; j++)
        e[j] = vreinterpretq_u16_u8(vqtbl1q_u8(parts, vreinterpretq_u8_u16(vld1q_u16(picks[j]))));
    uint16x8_t three = vaddq_u16(vaddq_u16(e[0], e[1]), e[2]);
    return (uint16x8x2_t){ { vaddq_u16(three, e[3]), vaddq_u16(three, e[4]) } };
}

/* the next 8 of cols activations from q on, 0 where there are none: max(q, 0) and max(-q, 0) */
static inline uint16x8x2_t plus_minus(const int16_t *q, int cols)
{
    int16_t rest[8] = { 0 };
    if (cols < 8) q = memcpy(rest, q, (size_t)cols * sizeof *q);
    int16x8_t v = vld1q_s16(q), plus = vmaxq_s16(v, vdupq_n_s16(0));
    return (uint16x8x2_t){ { vreinterpretq_u16_s16(plus), vreinterpretq_u16_s16(vsubq_s16(plus, v)) } };
}

static void sign_table_neon(void *table, const int16_t *q, int cols)
{
    uint8_t *out = (uint8_t *)table + LUT16_HEAD;
    uint32x4_t sums = vdupq_n_u32(0);
    for (int k = 0; k < cols; k += 8, out += LUT16_GROUP) {
        uint16x8x2_t p = plus_minus(q + k, cols - k);
        sums = vpadalq_u16(sums, vaddq_u16(p.val[0], p.val[1]));
        for (int half = 0; half < 2; half++) {
            uint16x8x2_t e = half ? entries(vget_high_u16(p.val[0]), vget_high_u16(p.val[1]))
                                  : entries(vget_low_u16(p.val[0]), vget_low_u16(p.val[1]));
            uint8x16_t e0 = vreinterpretq_u8_u16(e.val[0]), e8 = vreinterpretq_u8_u16(e.val[1]);
            vst1q_u8(out + 16 * half, vuzp1q_u8(e0, e8));
            vst1q_u8(out + 32 + 16 * half, vuzp2q_u8(e0, e8));
        }
    }
    int32_t l1 = (int32_t)vaddvq_u32(sums);
    memcpy(table, &l1, sizeof l1);
}

/* the same with one plane, of one group of a pair */
static inline void tables8_of_8(uint8_t *out, uint16x8x2_t p)
{
    uint16x8x2_t low = entries(vget_low_u16(p.val[0]), vget_low_u16(p.val[1]));
    uint16x8x2_t high = entries(vget_high_u16(p.val[0]), vget_high_u16(p.val[1]));
    vst1q_u8(out, vcombine_u8(vmovn_u16(low.val[0]), vmovn_u16(low.val[1])));
    vst1q_u8(out + 32, vcombine_u8(vmovn_u16(high.val[0]), vmovn_u16(high.val[1])));
}

static void make_pair8(uint8_t *pair, const int16_t *q)
{
    tables8_of_8(pair, plus_minus(q, 8));
    tables8_of_8(pair + 16, plus_minus(q + 8, 8));
}

static void sign_table8_neon(void *table, const int16_t *q, int cols)
{
    lut16_t t = lut16_open(table, cols, LUT8_GROUP);
    t.l1 = t.extras = 0;
    for (int g = 0; g < (cols + 7) / 8; g++) {
        uint16x8x2_t p = plus_minus(q + 8 * g, cols - 8 * g);
        uint16x8_t size = vaddq_u16(p.val[0], p.val[1]);
        int32_t low = vaddv_u16(vget_low_u16(size)), high = vaddv_u16(vget_high_u16(size));
        t.l1 += low + high;
        if ((low | high) > 255)
            lut16_divide(&t, g, q, cols, make_pair8);
        else
            tables8_of_8(lut16_group(&t, g), p);
    }
    lut16_close(table, &t);
}

/* look up 16 rows x 8 columns; the high plane's entries are < 128, so two of them fit in a byte */
#define LOOK_UP(i)                                                                  \
    do {                                                                            \
        uint8x16_t w_ = vld1q_u8(w + 16 * i);                                       \
        uint8x16_t a_ = vandq_u8(w_, nibble), b_ = vshrq_n_u8(w_, 4);               \
        uint8x16_t s_ = vqtbl1q_u8(a_low, a_), t_ = vqtbl1q_u8(b_low, b_);          \
        l##i = vaddw_u8(vaddw_u8(l##i, vget_low_u8(s_)), vget_low_u8(t_));          \
        m##i = vaddw_high_u8(vaddw_high_u8(m##i, s_), t_);                          \
        s_ = vaddq_u8(vqtbl1q_u8(a_high, a_), vqtbl1q_u8(b_high, b_));              \
        h##i = vaddw_u8(h##i, vget_low_u8(s_));                                     \
        n##i = vaddw_high_u8(n##i, s_);                                             \
    } while (0)

/* isum[8] += low + 256 * high */
static inline void flush(int32_t *isum, uint16x8_t low, uint16x8_t high)
{
    uint32x4_t v0 = vaddw_u16(vshll_n_u16(vget_low_u16(high), 8), vget_low_u16(low));
    uint32x4_t v1 = vaddw_u16(vshll_n_u16(vget_high_u16(high), 8), vget_high_u16(low));
    vst1q_s32(isum, vaddq_s32(vld1q_s32(isum), vreinterpretq_s32_u32(v0)));
    vst1q_s32(isum + 4, vaddq_s32(vld1q_s32(isum + 4), vreinterpretq_s32_u32(v1)));
}

static void sign_gemv_neon(int32_t *isum, const uint8_t *w, const void *table, int rows, int cols)
{
    (void)rows;
    const uint8x16_t nibble = vdupq_n_u8(15);
    const uint8_t *t = (const uint8_t *)table + LUT16_HEAD;
    int groups = (cols + 7) / 8;
    memset(isum, 0, DBF_PANEL * sizeof *isum);
    for (int g0 = 0; g0 < groups; g0 += LUT16_GROUPS) {
        int end = g0 + LUT16_GROUPS < groups ? g0 + LUT16_GROUPS : groups;
        uint16x8_t l0 = vdupq_n_u16(0), l1 = l0, l2 = l0, l3 = l0, m0 = l0, m1 = l0, m2 = l0, m3 = l0;
        uint16x8_t h0 = l0, h1 = l0, h2 = l0, h3 = l0, n0 = l0, n1 = l0, n2 = l0, n3 = l0;
        for (int g = g0; g < end; g++, w += DBF_PANEL, t += LUT16_GROUP) {
            uint8x16_t a_low = vld1q_u8(t), b_low = vld1q_u8(t + 16);
            uint8x16_t a_high = vld1q_u8(t + 32), b_high = vld1q_u8(t + 48);
            __builtin_prefetch(w + 1024);
            LOOK_UP(0);
            LOOK_UP(1);
            LOOK_UP(2);
            LOOK_UP(3);
        }
        flush(isum, l0, h0), flush(isum + 8, m0, n0);
        flush(isum + 16, l1, h1), flush(isum + 24, m1, n1);
        flush(isum + 32, l2, h2), flush(isum + 40, m2, n2);
        flush(isum + 48, l3, h3), flush(isum + 56, m3, n3);
    }
    int32_t l1;
    memcpy(&l1, table, sizeof l1);
    for (int r = 0; r < DBF_PANEL; r++) isum[r] = 2 * isum[r] - l1;
}

/* look up 16 rows x 8 columns in tables with one plane */
#define LOOK_UP8(i)                                                             \
    do {                                                                        \
        uint8x16_t w_ = vld1q_u8(bytes + 16 * i);                               \
        uint8x16_t s_ = vqtbl1q_u8(a, vandq_u8(w_, nibble));                    \
        uint8x16_t t_ = vqtbl1q_u8(b, vshrq_n_u8(w_, 4));                       \
        l##i = vaddw_u8(vaddw_u8(l##i, vget_low_u8(s_)), vget_low_u8(t_));      \
        m##i = vaddw_high_u8(vaddw_high_u8(m##i, s_), t_);                      \
    } while (0)

/* isum += what n <= LUT16_GROUPS groups, or extras, from `first` on give */
static inline void look_up_all8(int32_t *isum, const uint8_t *w, const lut16_t *table, int extras, int first, int n)
{
    const uint8x16_t nibble = vdupq_n_u8(15);
    const uint16x8_t zero = vdupq_n_u16(0);
    uint16x8_t l0 = zero, l1 = zero, l2 = zero, l3 = zero, m0 = zero, m1 = zero, m2 = zero, m3 = zero;
    for (int i = first; i < first + n; i++) {
        const uint8_t *t = extras ? table->extra + (size_t)i * table->pair : lut16_group(table, i);
        const uint8_t *bytes = w + (extras ? lut16_at(table, i) : (size_t)i) * DBF_PANEL;
        uint8x16_t a = vld1q_u8(t), b = vld1q_u8(t + 32);
        __builtin_prefetch(bytes + 1024);
        LOOK_UP8(0);
        LOOK_UP8(1);
        LOOK_UP8(2);
        LOOK_UP8(3);
    }
    flush(isum, l0, zero), flush(isum + 8, m0, zero);
    flush(isum + 16, l1, zero), flush(isum + 24, m1, zero);
    flush(isum + 32, l2, zero), flush(isum + 40, m2, zero);
    flush(isum + 48, l3, zero), flush(isum + 56, m3, zero);
}

static void sign_gemv8_neon(int32_t *isum, const uint8_t *w, const void *table, int rows, int cols)
{
    lut16_t t = lut16_open(table, cols, LUT8_GROUP);
    (void)rows;
    int groups = (cols + 7) / 8;
    memset(isum, 0, DBF_PANEL * sizeof *isum);
    for (int g = 0; g < groups; g += LUT16_GROUPS)
        look_up_all8(isum, w, &t, 0, g, groups - g < LUT16_GROUPS ? groups - g : LUT16_GROUPS);
    for (int i = 0; i < t.extras; i += LUT16_GROUPS)
        look_up_all8(isum, w, &t, 1, i, t.extras - i < LUT16_GROUPS ? t.extras - i : LUT16_GROUPS);
    for (int r = 0; r < DBF_PANEL; r++) isum[r] = 2 * isum[r] - t.l1;
}

/* ---- unfactorized matrices -------------------------------------------------------------------------------- */

/* int32 lanes 0-3 (columns 0-7 of 16) and 4-7 (columns 8-15): sums of neighbours */
INLINE int32x4_t products(int16x8_t v, int16x8_t q)
{
    return vpaddq_s32(vmull_s16(vget_low_s16(v), vget_low_s16(q)), vmull_high_s16(v, q));
}

INLINE int32x4_t pairs(int8x8_t v, int16x8_t q)
{
    return products(vmovl_s8(v), q);
}

/* one block as two registers of int8, the columns 0-15 and 16-31 */
typedef void unpack_t(int8x16_t *v, const uint8_t *block);

INLINE void unpack_q4_0(int8x16_t *v, const uint8_t *block)
{
    uint8x16_t bytes = vld1q_u8(block + 2);
    v[0] = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))), vdupq_n_s8(8));
    v[1] = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4)), vdupq_n_s8(8));
}

INLINE void unpack_q8_0(int8x16_t *v, const uint8_t *block)
{
    v[0] = vld1q_s8((const int8_t *)block + 2);
    v[1] = vld1q_s8((const int8_t *)block + 18);
}

INLINE void rows_blocks(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols,
                        unpack_t *unpack, int bytes)
{
    for (int r = 0; r < rows; r++) {
        float32x4_t acc[DBF_BATCH][2] = { 0 };
        for (int k = 0; k < cols; k += 32, w += bytes) {
            int8x16_t v[2];
            unpack(v, w);
            float32x4_t d = vdupq_n_f32(f32_at(w));
            for (int i = 0; i < n; i++) {
                const int16_t *p = q + (size_t)i * cols + k;
                int32x4_t s0 = vaddq_s32(pairs(vget_low_s8(v[0]), vld1q_s16(p)),
                                         pairs(vget_low_s8(v[1]), vld1q_s16(p + 16)));
                int32x4_t s1 = vaddq_s32(pairs(vget_high_s8(v[0]), vld1q_s16(p + 8)),
                                         pairs(vget_high_s8(v[1]), vld1q_s16(p + 24)));
                acc[i][0] = vaddq_f32(acc[i][0], vmulq_f32(vcvtq_f32_s32(s0), d));
                acc[i][1] = vaddq_f32(acc[i][1], vmulq_f32(vcvtq_f32_s32(s1), d));
            }
        }
        for (int i = 0; i < n; i++) y[(size_t)i * rows + r] = sum8(acc[i][0], acc[i][1]) * scale[i];
    }
}

static void gemv_q4_0_neon(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols)
{
    IN_BATCHES(rows_blocks(y + (size_t)i * rows, w, q + (size_t)i * cols, scale + i, N, rows, cols, unpack_q4_0,
                           DBF_Q4_0_BYTES))
}

static void gemv_q8_0_neon(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols)
{
    IN_BATCHES(rows_blocks(y + (size_t)i * rows, w, q + (size_t)i * cols, scale + i, N, rows, cols, unpack_q8_0,
                           DBF_Q8_0_BYTES))
}

/* columns 16g .. 16g + 15 of a Q6_K block */
INLINE int8x16_t unpack_q6_k(const uint8_t *block, int g)
{
    int half = g / 8, quarter = g % 8 / 2, at = g % 2 * 16;
    uint8x16_t low = vld1q_u8(block + half * 64 + quarter % 2 * 32 + at);
    uint8x16_t high = vld1q_u8(block + Q6_K_HIGH + half * 32 + at);
    low = quarter < 2 ? vandq_u8(low, vdupq_n_u8(15)) : vshrq_n_u8(low, 4);
    high = vandq_u8(vshlq_u8(high, vdupq_n_s8((int8_t)(4 - 2 * quarter))), vdupq_n_u8(0x30));
    return vsubq_s8(vreinterpretq_s8_u8(vorrq_u8(low, high)), vdupq_n_s8(32));
}

INLINE void rows_q6_k(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols)
{
    for (int r = 0; r < rows; r++) {
        float32x4_t acc[DBF_BATCH][2] = { 0 };
        for (int k = 0; k < cols; k += DBF_Q6_K_BLOCK, w += DBF_Q6_K_BYTES) {
            int32x4_t isum[DBF_BATCH][2] = { 0 };
#pragma GCC unroll 16
            for (int g = 0; g < 16; g++) {
                int8x16_t v = unpack_q6_k(w, g);
                int16_t s = (int8_t)w[Q6_K_SCALES + g];
                int16x8_t v0 = vmulq_n_s16(vmovl_s8(vget_low_s8(v)), s), v8 = vmulq_n_s16(vmovl_high_s8(v), s);
                for (int i = 0; i < n; i++) {
                    const int16_t *p = q + (size_t)i * cols + k + 16 * g;
                    isum[i][0] = vaddq_s32(isum[i][0], products(v0, vld1q_s16(p)));
                    isum[i][1] = vaddq_s32(isum[i][1], products(v8, vld1q_s16(p + 8)));
                }
            }
            float32x4_t d = vdupq_n_f32(f32_at(w + Q6_K_D));
            for (int i = 0; i < n; i++)
                for (int h = 0; h < 2; h++)
                    acc[i][h] = vaddq_f32(acc[i][h], vmulq_f32(vcvtq_f32_s32(isum[i][h]), d));
        }
        for (int i = 0; i < n; i++) y[(size_t)i * rows + r] = sum8(acc[i][0], acc[i][1]) * scale[i];
    }
}

static void gemv_q6_k_neon(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols)
{
    IN_BATCHES(rows_q6_k(y + (size_t)i * rows, w, q + (size_t)i * cols, scale + i, N, rows, cols))
}

void kernels_neon(kernels_t *k)
{
    k->name = "neon";
    k->sign_table_bytes = lut16_table_bytes;
    k->sign_pack_bytes = lut16_pack_bytes;
    k->sign_table = sign_table_neon;
    k->sign_pack = lut16_pack;
    k->sign_gemv = sign_gemv_neon;
    k->sign_table8 = sign_table8_neon;
    k->sign_gemv8 = sign_gemv8_neon;
    k->gemv_q4_0 = gemv_q4_0_neon;
    k->gemv_q8_0 = gemv_q8_0_neon;
    k->gemv_q6_k = gemv_q6_k_neon;
    set_float_kernels(k);
    set_gemm_kernels(k);
}

#else
typedef int dbf_no_neon; /* a translation unit must not be empty */
#endif
