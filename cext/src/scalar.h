/* scalar.h - single numbers: float16, exp, and the fixed-order sum of lanes. */
#ifndef DBF_SCALAR_H
#define DBF_SCALAR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

static inline uint32_t bits_of(float x)
{
    uint32_t b;
    memcpy(&b, &x, 4);
    return b;
}

static inline float float_of(uint32_t b)
{
    float x;
    memcpy(&x, &b, 4);
    return x;
}

static inline float f32_from_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = h >> 10 & 31u, mantissa = h & 0x3ffu;
    if (exponent == 0) return float_of(sign | bits_of((float)mantissa * 5.9604644775390625e-8f)); /* 2^-24 */
    if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
    return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

static inline uint16_t f16_from_f32(float x)
{
    uint32_t b = bits_of(x), sign = b >> 16 & 0x8000u, mag = b & 0x7fffffffu;
    if (mag > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);  /* NaN */
    if (mag >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* rounds to infinity */
    if (mag < 0x38800000u) /* subnormal: adding 0.5 leaves the rounded result in the low bits */
        return (uint16_t)(sign | (bits_of(float_of(mag) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | (mag - 0x38000000u + 0xfffu + (mag >> 13 & 1u)) >> 13);
}

/* exp(x), within 2 ulp for -87 <= x <= 88; arguments beyond are clamped. Source: Cephes, expf.c. */
#define EXP_LOW -87.0f
#define EXP_HIGH 88.0f
#define EXP_LOG2E 1.44269504088896341f
#define EXP_LN2_HIGH 0.693359375f
#define EXP_LN2_LOW -2.12194440e-4f
#define EXP_P0 1.9875691500e-4f
#define EXP_P1 1.3981999507e-3f
#define EXP_P2 8.3334519073e-3f
#define EXP_P3 4.1665795894e-2f
#define EXP_P4 1.6666665459e-1f
#define EXP_P5 5.0000001201e-1f

static inline float exp_f32(float x)
{
    if (x != x) return x;
    x = x < EXP_LOW ? EXP_LOW : x;
    x = x > EXP_HIGH ? EXP_HIGH : x;
    float n = rintf(x * EXP_LOG2E);
    float r = (x - n * EXP_LN2_HIGH) - n * EXP_LN2_LOW;
    float p = ((((EXP_P0 * r + EXP_P1) * r + EXP_P2) * r + EXP_P3) * r + EXP_P4) * r + EXP_P5;
    return ((p * (r * r) + r) + 1.0f) * float_of((uint32_t)((int32_t)n + 127) << 23);
}

/* 2 sqrt(2/pi), and that times 0.044715 */
#define GELU_1 1.59576912160573071f
#define GELU_3 0.0713548162726009f

static inline float gelu_f32(float x)
{
    return x / (1.0f + exp_f32(-(x * (GELU_1 + GELU_3 * (x * x)))));
}

/* cap * tanh(x / cap); twice is 2 / cap */
static inline float softcap_f32(float x, float cap, float twice)
{
    return cap - (cap + cap) / (exp_f32(x * twice) + 1.0f);
}

/* the order in which every float sum of the library ends */
static inline float lanes_sum(float *lane)
{
    for (int half = DBF_LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) lane[l] = lane[l] + lane[l + half];
    return lane[0];
}

/* the two numbers of a quantization to -top .. top: scale, and what x is multiplied by (0: all integers are 0);
 * magnitude = bits of absmax */
static inline float scale_to(float top, uint32_t magnitude, float *inverse)
{
    float absmax = float_of(magnitude);
    int usable = magnitude >= 0x0d800000u && magnitude < 0x7f800000u; /* 2^-100 <= absmax < infinity */
    *inverse = usable ? top / absmax : 0.0f;
    return absmax / top;
}

static inline float quantize_scale(uint32_t magnitude, float *inverse)
{
    return scale_to((float)DBF_QMAX, magnitude, inverse);
}

/* the float16 at p, at any address */
static inline float f32_at(const uint8_t *p)
{
    return f32_from_f16((uint16_t)(p[0] | p[1] << 8));
}

/* the integers of GGML's blocks */
static inline int q4_0_value(const uint8_t *block, int i)
{
    return (block[2 + i % 16] >> (i < 16 ? 0 : 4) & 15) - 8;
}

static inline int q8_0_value(const uint8_t *block, int i)
{
    return (int8_t)block[2 + i];
}

/* each half of a Q6_K block: 128 weights, 64 bytes of nibbles (the low ones come first), 32 bytes of two bits more */
#define Q6_K_HIGH 128
#define Q6_K_SCALES 192
#define Q6_K_D 208

static inline int q6_k_value(const uint8_t *block, int i)
{
    int half = i / 128, quarter = i % 128 / 32, j = i % 32;
    int low = block[half * 64 + quarter % 2 * 32 + j] >> (quarter < 2 ? 0 : 4) & 15;
    int high = block[Q6_K_HIGH + half * 32 + j] >> 2 * quarter & 3;
    return (low | high << 4) - 32;
}

#endif
