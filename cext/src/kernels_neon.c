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

/* ---- sign products ---------------------------------------------------------------------------------------- */

static void sign_table_neon(void *table, const int16_t *q, int cols)
{
    static const int16_t bits[4][16] = {
        { 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1 },
        { 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1 },
        { 0, 0, 0, 0, -1, -1, -1, -1, 0, 0, 0, 0, -1, -1, -1, -1 },
        { 0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1 },
    };
    uint8_t *out = (uint8_t *)table + LUT16_HEAD;
    int32_t l1 = 0;
    for (int k = 0; k < (cols + 7) / 8 * 8; k += 4) {
        int16_t p[4] = { 0 };
        for (int j = 0; j < 4 && k + j < cols; j++) p[j] = q[k + j];
        /* entry 0 agrees with the negative columns; setting bit j adds q[j] to it */
        int32_t negative = 0, all = 0;
        for (int j = 0; j < 4; j++) {
            all += p[j];
            negative -= p[j] < 0 ? p[j] : 0;
        }
        l1 += all + 2 * negative;
        int16x8_t e0 = vdupq_n_s16((int16_t)negative), e1 = e0;
        for (int j = 0; j < 4; j++) {
            e0 = vaddq_s16(e0, vandq_s16(vdupq_n_s16(p[j]), vld1q_s16(bits[j])));
            e1 = vaddq_s16(e1, vandq_s16(vdupq_n_s16(p[j]), vld1q_s16(bits[j] + 8)));
        }
        uint8x16_t b0 = vreinterpretq_u8_s16(e0), b1 = vreinterpretq_u8_s16(e1);
        vst1q_u8(out, vuzp1q_u8(b0, b1));
        vst1q_u8(out + 32, vuzp2q_u8(b0, b1));
        out += k % 8 == 0 ? 16 : LUT16_GROUP - 16;
    }
    memcpy(table, &l1, sizeof l1);
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

/* ---- unfactorized matrices -------------------------------------------------------------------------------- */

/* int32 lanes 0-3 (columns 0-7 of 16) and 4-7 (columns 8-15): sums of neighbours */
static inline int32x4_t pairs(int8x8_t v, int16x8_t q)
{
    int16x8_t v16 = vmovl_s8(v);
    return vpaddq_s32(vmull_s16(vget_low_s16(v16), vget_low_s16(q)), vmull_high_s16(v16, q));
}

static void gemv_q8_0_neon(float *y, const uint8_t *w, const int16_t *q, float scale, int rows, int cols)
{
    int blocks = cols / DBF_Q8_0_BLOCK;
    for (int r = 0; r < rows; r++) {
        float32x4_t acc0 = vdupq_n_f32(0.0f), acc1 = acc0;
        for (int b = 0; b < blocks; b++, w += DBF_Q8_0_BYTES) {
            const int16_t *p = q + b * DBF_Q8_0_BLOCK;
            int8x16_t v0 = vld1q_s8((const int8_t *)w + 2), v1 = vld1q_s8((const int8_t *)w + 18);
            int32x4_t s0 = vaddq_s32(pairs(vget_low_s8(v0), vld1q_s16(p)), pairs(vget_low_s8(v1), vld1q_s16(p + 16)));
            int32x4_t s1 =
                vaddq_s32(pairs(vget_high_s8(v0), vld1q_s16(p + 8)), pairs(vget_high_s8(v1), vld1q_s16(p + 24)));
            float32x4_t d = vdupq_n_f32(q8_0_scale(w));
            acc0 = vaddq_f32(acc0, vmulq_f32(vcvtq_f32_s32(s0), d));
            acc1 = vaddq_f32(acc1, vmulq_f32(vcvtq_f32_s32(s1), d));
        }
        y[r] = sum8(acc0, acc1) * scale;
    }
}

void kernels_neon(kernels_t *k)
{
    k->name = "neon";
    k->sign_table_bytes = lut16_table_bytes;
    k->sign_pack_bytes = lut16_pack_bytes;
    k->sign_table = sign_table_neon;
    k->sign_pack = lut16_pack;
    k->sign_gemv = sign_gemv_neon;
    k->gemv_q8_0 = gemv_q8_0_neon;
    set_float_kernels(k);
}

#else
typedef int dbf_no_neon; /* a translation unit must not be empty */
#endif
