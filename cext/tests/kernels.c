/* kernels.c - every kernel of every instruction set by itself, at odd sizes.
 *
 * Each is held to its formula in double, within the bound that kernels.h gives, and to the scalar kernel, bit for bit.
 * Every buffer serves twice: ending where an unreadable page begins, and beginning off its vector alignment. What lies
 * around it must stay as it was. Exit status 0 and "ok" if all is well. */
#define _GNU_SOURCE
#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../dbf.h"
#include "../src/kernels.h"
#include "check.h"

#define U 5.9604644775390625e-8 /* 2^-24: the largest relative error of one rounding */

static const int sizes[] = { 1,  2,  3,  4,  5,  6,  7,  8,   9,   15,   16,   17,   31,
                             32, 33, 63, 64, 65, 97, 576, 1023, 1025, 1536, 2055 };
enum { N_SIZES = sizeof sizes / sizeof *sizes, MAX = 2055 };

/* ---- buffers ---------------------------------------------------------------------------------------------- */

enum { BUFFERS = 8, ROOM = 1 << 20, GUARD = 0x5a, MARGIN = 256, PACKED = 64 };

static struct buffer {
    uint8_t *room, *begin, *end;
} buffers[BUFFERS];
static int taken;
static int at_end; /* where the buffers lie now */

static void make_buffers(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (int i = 0; i < BUFFERS; i++) {
        uint8_t *p = mmap(NULL, ROOM + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(p != MAP_FAILED && mprotect(p + page, ROOM, PROT_READ | PROT_WRITE) == 0, "no memory");
        buffers[i].room = p + page;
    }
}

/* memory for n elements, aligned as C wants them and no better; PACKED: what forward.c gives in its own layout */
static void *take(size_t n, size_t element)
{
    CHECK(taken < BUFFERS && n * element + 8 * PACKED + MARGIN <= ROOM, "no room for %zu bytes", n * element);
    struct buffer *b = &buffers[taken++];
    uint8_t *end = b->room + ROOM;
    b->begin = at_end ? end - n * element : b->room + (1 + n % 7) * element;
    b->end = b->begin + n * element;
    memset(b->begin - b->room < MARGIN ? b->room : b->begin - MARGIN, GUARD,
           b->begin - b->room < MARGIN ? (size_t)(b->begin - b->room) : MARGIN);
    memset(b->begin, GUARD ^ 0xff, n * element);
    memset(b->end, GUARD, end - b->end < MARGIN ? (size_t)(end - b->end) : MARGIN);
    return b->begin;
}

static void give_back(const char *isa, const char *kernel, int n)
{
    for (; taken > 0; taken--) {
        const struct buffer *b = &buffers[taken - 1];
        const uint8_t *end = b->room + ROOM;
        for (const uint8_t *p = b->begin; p > b->room && b->begin - p < MARGIN;)
            CHECK(*--p == GUARD, "%s %s %d wrote before buffer %d", isa, kernel, n, taken);
        for (const uint8_t *p = b->end; p < end && p - b->end < MARGIN; p++)
            CHECK(*p == GUARD, "%s %s %d wrote behind buffer %d", isa, kernel, n, taken);
    }
}

/* ---- numbers ---------------------------------------------------------------------------------------------- */

static float uniform(void) /* -1 .. 1 */
{
    return ((float)next() - 8388608.0f) / 8388608.0f;
}

static float *floats(size_t n, float largest)
{
    float *p = take(n, sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = largest * uniform();
    return p;
}

static uint16_t *halves(size_t n) /* magnitudes between 1/16 and 1/2 */
{
    uint16_t *p = take(n, sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = (uint16_t)((next() & 0x8bffu) + 0x2c00u);
    return p;
}

static uint8_t *bytes(size_t n)
{
    uint8_t *p = take(n, 1);
    for (size_t i = 0; i < n; i++) p[i] = (uint8_t)next();
    return p;
}

/* as fmax, whose loops gcc 12 cannot compile for ARM (an internal error) */
static double larger(double a, double b)
{
    return a > b ? a : b;
}

static double of_half(uint16_t h)
{
    int exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    double v = exponent == 0 ? ldexp(mantissa, -24) : ldexp(mantissa + 1024, exponent - 25);
    return h & 0x8000 ? -v : v;
}

#define SAME(got, want, n, kernel) \
    CHECK(memcmp(got, want, (size_t)(n) * sizeof *(got)) == 0, "%s %s %d is not the scalar result", k->name, kernel, \
          (int)(n))
#define NEAR(got, want, bound, kernel, n)                                                                       \
    CHECK(fabs((double)(got) - (want)) <= (bound), "%s %s %d: %.9g, but %.9g within %.3g", k->name, kernel, n,  \
          (double)(got), (double)(want), (double)(bound))

static const kernels_t *const ref = &kernels_ref;
static float want_f[MAX];

/* ---- around the sign products ----------------------------------------------------------------------------- */

static void test_quantize(const kernels_t *k, int n)
{
    static const float odd[] = { 0.0f, -0.0f, 1e-40f, 1e30f, -3e38f, INFINITY, -INFINITY, NAN };
    static int16_t want[MAX];
    for (size_t o = 0; o <= sizeof odd / sizeof *odd; o++) {
        int16_t *q = take((size_t)n, sizeof *q);
        float *x = floats((size_t)n, 3.0f);
        if (o) x[next() % (uint32_t)n] = odd[o - 1];
        float scale = k->quantize(q, x, n), scale_want = ref->quantize(want, x, n);
        SAME(q, want, n, "quantize");
        CHECK(memcmp(&scale, &scale_want, sizeof scale) == 0 || (scale != scale && scale_want != scale_want),
              "%s quantize %d: the scale is %g, not %g", k->name, n, scale, scale_want);
        double top = 0.0;
        for (int i = 0; i < n; i++) top = larger(top, fabs((double)x[i]));
        if (o == 0) NEAR(scale, top / DBF_QMAX, U * top / DBF_QMAX, "scale of quantize", n);
        for (int i = 0; i < n && o == 0; i++) NEAR(q[i], x[i] * DBF_QMAX / top, 0.501, "quantize", n);
        give_back(k->name, "quantize", n);
    }
}

static void test_quantize_scaled(const kernels_t *k, int n)
{
    static int16_t want[MAX];
    for (int kind = 0; kind < 6; kind++) { /* 16 or 8 bits; with and without scales; with an infinity */
        int qmax = kind % 2 ? DBF_QMAX8 : DBF_QMAX;
        int16_t *q = take((size_t)n, sizeof *q);
        float *z = take((size_t)n, sizeof *z), *x = floats((size_t)n, 100.0f);
        uint16_t *s = kind < 2 ? NULL : halves((size_t)n);
        if (kind >= 4) x[next() % (uint32_t)n] = INFINITY;
        float scale = k->quantize_scaled(q, z, x, s, n, qmax);
        float scale_want = ref->quantize_scaled(want, want_f, x, s, n, qmax);
        SAME(q, want, n, "quantize_scaled");
        if (s) SAME(z, want_f, n, "z of quantize_scaled");
        CHECK(scale == scale_want, "%s quantize_scaled %d: the scale is %g, not %g", k->name, n, scale, scale_want);
        double top = 0.0;
        for (int i = 0; i < n && kind < 4; i++) {
            if (s) NEAR(z[i], x[i] * of_half(s[i]), U * fabs(x[i] * of_half(s[i])), "z of quantize_scaled", n);
            if (!s) CHECK(((uint8_t *)z)[4 * i] == (GUARD ^ 0xff), "%s quantize_scaled wrote z", k->name);
            top = larger(top, fabs((double)(s ? z[i] : x[i])));
        }
        if (kind < 4) NEAR(scale, top / qmax, U * top / qmax, "scale of quantize_scaled", n);
        for (int i = 0; i < n && kind < 4; i++) NEAR(q[i], (s ? z[i] : x[i]) * qmax / top, 0.501, "quantize_scaled", n);
        give_back(k->name, "quantize_scaled", n);
    }
}

static void test_descale(const kernels_t *k, int n)
{
    for (int with_bias = 0; with_bias < 2; with_bias++) {
        float *y = take((size_t)n, sizeof *y), *bias = with_bias ? floats((size_t)n, 1.0f) : NULL;
        uint16_t *s = halves((size_t)n);
        int32_t *isum = take((size_t)n, sizeof *isum);
        for (int i = 0; i < n; i++) isum[i] = (int32_t)(next() << 8 ^ next()) / 4;
        k->descale(y, isum, 1.7e-8f, s, bias, n);
        ref->descale(want_f, isum, 1.7e-8f, s, bias, n);
        SAME(y, want_f, n, "descale");
        for (int i = 0; i < n; i++) {
            double product = isum[i] * (double)1.7e-8f * of_half(s[i]), b = bias ? bias[i] : 0.0;
            NEAR(y[i], product + b, U * (4.0 * fabs(product) + fabs(product + b)), "descale", n);
        }
        give_back(k->name, "descale", n);
    }
}

/* ---- sign products ---------------------------------------------------------------------------------------- */

/* alike: all signs and all activations are the same, which fills the sums to the brim; qmax: that of q */
static void sign_product(const kernels_t *k, int rows, int cols, int alike, int qmax)
{
    size_t stride = (size_t)((cols + 7) / 8), packed = k->sign_pack_bytes(rows, cols);
    CHECK(packed == 0 || packed % PACKED == 0, "%s sign_pack_bytes", k->name);
    uint8_t *bits = bytes((size_t)rows * stride); /* filler bits too are random */
    int16_t *q = take((size_t)cols, sizeof *q);
    int most = qmax == DBF_QMAX8 && next() % 2 ? 64 : qmax; /* 64: the sum over a group is sometimes above 255 */
    for (int i = 0; i < cols; i++) q[i] = (int16_t)((int)(next() % (2 * (uint32_t)most + 1)) - most);
    if (alike) {
        memset(bits, next() % 2 ? 255 : 0, (size_t)rows * stride);
        int sign = next() % 2 ? 1 : -1;
        for (int i = 0; i < cols; i++) q[i] = (int16_t)(sign * qmax);
    }
    size_t table_bytes = k->sign_table_bytes(cols);
    uint8_t *table = table_bytes % PACKED ? take(table_bytes / 2, 2) : take(table_bytes / PACKED, PACKED);
    uint8_t *w = packed ? take(packed / PACKED, PACKED) : bits;
    (qmax == DBF_QMAX8 ? k->sign_table8 : k->sign_table)(table, q, cols);
    if (packed) k->sign_pack(w, bits, rows, cols);
    for (int r0 = 0; r0 < rows; r0 += DBF_PANEL) {
        int some = rows - r0 < DBF_PANEL ? rows - r0 : DBF_PANEL;
        int32_t *isum = take(DBF_PANEL, sizeof *isum);
        (qmax == DBF_QMAX8 ? k->sign_gemv8 : k->sign_gemv)(isum, w + (size_t)r0 * stride, table, some, cols);
        for (int r = 0; r < some; r++) {
            int32_t sum = 0;
            for (int i = 0; i < cols; i++) {
                int bit = bits[(size_t)(r0 + r) * stride + (size_t)(i >> 3)] >> (i & 7) & 1;
                sum += bit ? q[i] : -q[i];
            }
            CHECK(isum[r] == sum, "%s sign_gemv %d x %d: row %d is %d, not %d", k->name, rows, cols, r0 + r, isum[r],
                  sum);
        }
    }
    give_back(k->name, "sign_gemv", cols);
}

static void test_sign_gemv(const kernels_t *k, int cols)
{
    static const int rows[] = { 1, 7, 8, 15, 17, 33, 63, 64, 65, 131 };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (int qmax = DBF_QMAX8; qmax <= DBF_QMAX; qmax += DBF_QMAX - DBF_QMAX8)
            if (cols < 500 || i % 3 == 0) sign_product(k, rows[i], cols, 0, qmax);
    for (int i = 0; i < 4; i++) {
        sign_product(k, 65, cols, 1, DBF_QMAX);
        sign_product(k, 65, cols, 1, DBF_QMAX8);
    }
}

/* ---- sign products of many tokens ------------------------------------------------------------------------- */

static void test_turning(const kernels_t *k, int cols)
{
    static float want[DBF_BLOCK * MAX];
    int n = 1 + (int)(next() % DBF_STRIP), wide = next() % 2 ? DBF_STRIP : DBF_BLOCK / 2;
    size_t stride = (size_t)cols + next() % 3;
    float *columns = take((size_t)cols * (size_t)wide, sizeof *columns);
    float *rows = floats((size_t)(n - 1) * stride + (size_t)cols, 1.0f);
    for (int i = 0; i < cols * wide; i++) columns[i] = 7.0f;
    k->to_columns(columns, rows, stride, n, wide, cols);
    for (int c = 0; c < cols; c++)
        for (int i = 0; i < wide; i++) {
            float x = i < n ? rows[(size_t)i * stride + (size_t)c] : i < DBF_STRIP ? 0.0f : 7.0f;
            CHECK(columns[c * wide + i] == x, "%s to_columns %d: %d, %d", k->name, cols, c, i);
        }
    size_t length = (size_t)(n - 1) * stride + (size_t)cols;
    for (int add = 0; add < 2; add++) {
        for (size_t i = 0; i < length; i++) rows[i] = want[i] = uniform();
        for (int i = 0; i < n; i++)
            for (int c = 0; c < cols; c++) {
                size_t at = (size_t)i * stride + (size_t)c;
                want[at] = add ? want[at] + columns[c * wide + i] : columns[c * wide + i];
            }
        k->to_rows(rows, columns, stride, n, wide, cols, add);
        SAME(rows, want, length, "to_rows");
    }
    give_back(k->name, "turning", cols);
}

static void test_quantize_many(const kernels_t *k, int cols)
{
    static float column[MAX], z[MAX];
    static int16_t want[MAX];
    int wide = DBF_BLOCK / 2, stride = DBF_STRIP + (int)(next() % 3) * 8, qmax = next() % 2 ? DBF_QMAX : DBF_QMAX8;
    int16_t *q = take((size_t)cols * (size_t)wide, sizeof *q);
    float *scale = take(DBF_STRIP, sizeof *scale), *x = floats((size_t)cols * (size_t)stride, 3.0f);
    uint16_t *s = next() % 2 ? halves((size_t)cols) : NULL;
    for (int c = 0; c < cols; c++) x[c * stride + 2] = 0.0f;
    x[next() % (uint32_t)cols * (uint32_t)stride + 5] = INFINITY;
    k->quantize_many(q, scale, x, s, cols, wide, stride, qmax);
    for (int i = 0; i < DBF_STRIP; i++) {
        for (int c = 0; c < cols; c++) column[c] = x[c * stride + i];
        float scale_want = ref->quantize_scaled(want, z, column, s, cols, qmax);
        CHECK(scale[i] == scale_want, "%s quantize_many %d: the scale is %g, not %g", k->name, cols, scale[i],
              scale_want);
        for (int c = 0; c < cols; c++)
            CHECK(q[c * wide + i] == want[c], "%s quantize_many %d: %d, not %d", k->name, cols, q[c * wide + i],
                  want[c]);
    }
    give_back(k->name, "quantize_many", cols);
}

static void sign_products(const kernels_t *k, int rows, int cols, int wide, int alike)
{
    size_t stride = (size_t)((cols + 7) / 8), packed = k->sign_pack_bytes(rows, cols);
    uint8_t *bits = bytes((size_t)rows * stride), *w = packed ? take(packed / PACKED, PACKED) : bits;
    int16_t *q = take((size_t)cols * (size_t)wide, sizeof *q);
    for (int i = 0; i < cols * wide; i++) q[i] = (int16_t)((int)(next() % (2 * DBF_QMAX + 1)) - DBF_QMAX);
    if (alike) {
        memset(bits, next() % 2 ? 255 : 0, (size_t)rows * stride);
        for (int i = 0; i < cols * wide; i++) q[i] = (int16_t)(i % wide % 2 ? DBF_QMAX : -DBF_QMAX);
    }
    int32_t *isum = take((size_t)rows * (size_t)wide, sizeof *isum);
    uint32_t *work = take((size_t)(rows + 2) * (size_t)wide, sizeof *work);
    if (packed) k->sign_pack(w, bits, rows, cols);
    k->sign_gemm(isum, w, q, work, rows, cols, wide);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < wide; i++) {
            int32_t sum = 0;
            for (int c = 0; c < cols; c++) {
                int bit = bits[(size_t)r * stride + (size_t)(c >> 3)] >> (c & 7) & 1;
                sum += bit ? q[c * wide + i] : -q[c * wide + i];
            }
            CHECK(isum[r * wide + i] == sum, "%s sign_gemm %d x %d x %d: row %d, %d is %d, not %d", k->name, rows, cols,
                  wide, r, i, isum[r * wide + i], sum);
        }
    give_back(k->name, "sign_gemm", cols);
}

static void test_sign_gemm(const kernels_t *k, int cols)
{
    for (int wide = DBF_BLOCK / 2; wide <= DBF_BLOCK; wide *= 2) {
        sign_products(k, 1 + (int)(next() % 20), cols, wide, 0);
        sign_products(k, 3, cols, wide, 1);
        if (cols < 100) sign_products(k, 60 + (int)(next() % 80), cols, wide, 0);
    }
}

static void test_descale_many(const kernels_t *k, int rows)
{
    static float want[DBF_BLOCK * MAX];
    int wide = next() % 2 ? DBF_BLOCK : DBF_BLOCK / 2;
    float *y = take((size_t)rows * (size_t)wide, sizeof *y), *scale = floats((size_t)wide, 1e-7f);
    float *bias = next() % 2 ? floats((size_t)rows, 1.0f) : NULL;
    uint16_t *s = halves((size_t)rows);
    int32_t *isum = take((size_t)rows * (size_t)wide, sizeof *isum);
    for (int i = 0; i < rows * wide; i++) isum[i] = (int32_t)(next() << 8 ^ next()) / 4;
    k->descale_many(y, isum, scale, s, bias, rows, wide);
    ref->descale_many(want, isum, scale, s, bias, rows, wide);
    SAME(y, want, rows * wide, "descale_many");
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < wide; i++) {
            double product = (double)isum[r * wide + i] * scale[i] * of_half(s[r]), b = bias ? bias[r] : 0.0;
            NEAR(y[r * wide + i], product + b, U * (4.0 * fabs(product) + fabs(product + b)), "descale_many", rows);
        }
    give_back(k->name, "descale_many", rows);
}

/* ---- unfactorized matrices -------------------------------------------------------------------------------- */

static void test_gemv(const kernels_t *k, int cols)
{
    for (int rows = 1, n = 1; rows <= 67; rows += cols < 100 ? 11 : 4, n = n % 7 + 1) {
        if (cols >= 100 && rows > 5) break;
        size_t weights = (size_t)rows * (size_t)cols, results = (size_t)(n * rows);
        float *y = take(results, sizeof *y), *x = floats((size_t)n * (size_t)cols, 2.0f), *w = floats(weights, 1.0f);
        float *y16 = take(results, sizeof *y);
        uint16_t *h = halves(weights);
        k->gemv_f32(y, w, x, n, rows, cols);
        ref->gemv_f32(want_f, w, x, n, rows, cols);
        SAME(y, want_f, results, "gemv_f32");
        k->gemv_f16(y16, h, x, n, rows, cols);
        ref->gemv_f16(want_f, h, x, n, rows, cols);
        SAME(y16, want_f, results, "gemv_f16");
        for (int v = 0; v < n; v++)
            for (int r = 0; r < rows; r++) {
                double sum = 0.0, sum16 = 0.0, size = 0.0, size16 = 0.0;
                for (int i = 0; i < cols; i++) {
                    double xi = x[v * cols + i], term = w[r * cols + i] * xi, term16 = of_half(h[r * cols + i]) * xi;
                    sum += term, size += fabs(term), sum16 += term16, size16 += fabs(term16);
                }
                NEAR(y[v * rows + r], sum, (cols / 16.0 + 6.0) * U * size, "gemv_f32", cols);
                NEAR(y16[v * rows + r], sum16, (cols / 16.0 + 6.0) * U * size16, "gemv_f16", cols);
            }
        give_back(k->name, "gemv", cols);
    }
}

/* weight i of a block, as GGML's documentation has it: d, or d * s, and the integer */
static double q4_0(const uint8_t *b, int i, int *v)
{
    *v = (i < 16 ? b[2 + i] & 15 : b[2 + i - 16] >> 4) - 8;
    return of_half((uint16_t)(b[0] | b[1] << 8));
}

static double q8_0(const uint8_t *b, int i, int *v)
{
    *v = (int8_t)b[2 + i];
    return of_half((uint16_t)(b[0] | b[1] << 8));
}

static double q6_k(const uint8_t *b, int i, int *v)
{
    const uint8_t *low = b + i / 128 * 64, *high = b + 128 + i / 128 * 32;
    int j = i % 32;
    switch (i % 128 / 32) {
    case 0: *v = (low[j] & 15) + 16 * (high[j] & 3) - 32; break;
    case 1: *v = (low[j + 32] & 15) + 16 * (high[j] >> 2 & 3) - 32; break;
    case 2: *v = (low[j] >> 4) + 16 * (high[j] >> 4 & 3) - 32; break;
    default: *v = (low[j + 32] >> 4) + 16 * (high[j] >> 6) - 32; break;
    }
    return of_half((uint16_t)(b[208] | b[209] << 8)) * (int8_t)b[192 + i / 16];
}

typedef struct block_type {
    const char *name;
    int block, bytes, d; /* d: where the float16 is */
    double (*weight)(const uint8_t *block, int i, int *v);
    size_t gemv, from; /* offsets in kernels_t */
    double adds;       /* error of gemv: (cols/block + adds) u .. */
} block_type_t;

static const block_type_t block_types[] = {
    { "q4_0", 32, 18, 0, q4_0, offsetof(kernels_t, gemv_q4_0), offsetof(kernels_t, from_q4_0), 6.0 },
    { "q8_0", 32, 34, 0, q8_0, offsetof(kernels_t, gemv_q8_0), offsetof(kernels_t, from_q8_0), 6.0 },
    { "q6_k", 256, 210, 208, q6_k, offsetof(kernels_t, gemv_q6_k), offsetof(kernels_t, from_q6_k), 7.0 },
};

typedef void gemv_t(float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols);
typedef void from_t(float *y, const uint8_t *x, int n);
#define KERNEL(k, type, at) (*(type *const *)((const char *)(k) + (at)))

/* extreme: the largest integers that there are, all of one sign */
static void test_blocks(const kernels_t *k, const block_type_t *t, int blocks, int extreme)
{
    int cols = blocks * t->block;
    for (int rows = 1, n = 1; rows <= 66; rows += rows < 9 ? 1 : 28, n = n % 7 + 1) {
        size_t results = (size_t)(n * rows), count = (size_t)(rows * blocks);
        float *y = take(results, sizeof *y), *scale = floats((size_t)n, 3e-4f), *row = take((size_t)cols, sizeof *row);
        uint8_t *w = bytes(count * (size_t)t->bytes);
        int16_t *q = take((size_t)(n * cols), sizeof *q);
        if (extreme) memset(w, t->weight == q8_0 ? 0x80 : 0, count * (size_t)t->bytes);
        for (size_t b = 0; b < count; b++) {
            uint8_t *block = w + b * (size_t)t->bytes;
            if (extreme && t->weight == q6_k) memset(block + 192, 0x80, 16);
            block[t->d + 1] = (uint8_t)((next() & 0x80) | 0x2c);
        }
        for (int i = 0; i < n * cols; i++)
            q[i] = extreme ? -DBF_QMAX : (int16_t)((int)(next() % (2 * DBF_QMAX + 1)) - DBF_QMAX);
        KERNEL(k, gemv_t, t->gemv)(y, w, q, scale, n, rows, cols);
        KERNEL(ref, gemv_t, t->gemv)(want_f, w, q, scale, n, rows, cols);
        SAME(y, want_f, results, t->name);
        for (int v = 0; v < n; v++)
            for (int r = 0; r < rows; r++) {
                double sum = 0.0, size = 0.0;
                for (int i = 0; i < cols; i++) {
                    int integer;
                    const uint8_t *block = w + (r * blocks + i / t->block) * t->bytes;
                    double d = t->weight(block, i % t->block, &integer);
                    double term = d * integer * q[v * cols + i] * (double)scale[v];
                    sum += term, size += fabs(term);
                }
                NEAR(y[v * rows + r], sum, (blocks + t->adds) * U * size, t->name, cols);
            }
        const uint8_t *last = w + (size_t)(rows - 1) * (size_t)(blocks * t->bytes);
        KERNEL(k, from_t, t->from)(row, last, cols);
        KERNEL(ref, from_t, t->from)(want_f, last, cols);
        SAME(row, want_f, cols, t->name);
        for (int i = 0; i < cols; i++) {
            int integer;
            double d = t->weight(last + i / t->block * t->bytes, i % t->block, &integer);
            NEAR(row[i], d * integer, t->weight == q6_k ? U * fabs(d * integer) : 0.0, t->name, cols);
        }
        give_back(k->name, t->name, cols);
    }
}

/* ---- everything else -------------------------------------------------------------------------------------- */

static void test_rmsnorm(const kernels_t *k, int n)
{
    float *y = take((size_t)n, sizeof *y), *x = floats((size_t)n, 30.0f), *w = floats((size_t)n, 2.0f);
    double squares = 0.0;
    for (int i = 0; i < n; i++) squares += (double)x[i] * x[i];
    k->rmsnorm(y, x, w, 1e-5f, n);
    ref->rmsnorm(want_f, x, w, 1e-5f, n);
    SAME(y, want_f, n, "rmsnorm");
    for (int i = 0; i < n; i++) {
        double want = x[i] / sqrt(squares / n + (double)1e-5f) * w[i];
        NEAR(y[i], want, (n / 32.0 + 8.0) * U * fabs(want), "rmsnorm", n);
    }
    give_back(k->name, "rmsnorm", n);
}

static void test_layernorm(const kernels_t *k, int n)
{
    for (int biased = 0; biased < 2; biased++) {
        float *y = take((size_t)n, sizeof *y), *x = floats((size_t)n, 30.0f), *w = floats((size_t)n, 2.0f);
        float *b = biased ? floats((size_t)n, 3.0f) : NULL;
        double sum = 0.0, squares = 0.0, top = 0.0;
        for (int i = 0; i < n; i++) sum += x[i], top = larger(top, fabs((double)x[i]));
        for (int i = 0; i < n; i++) squares += (x[i] - sum / n) * (x[i] - sum / n);
        double root = 1.0 / sqrt(squares / n + (double)1e-2f);
        k->layernorm(y, x, w, b, 1e-2f, n);
        ref->layernorm(want_f, x, w, b, 1e-2f, n);
        SAME(y, want_f, n, "layernorm");
        for (int i = 0; i < n; i++) {
            double want = (x[i] - sum / n) * root * w[i] + (b ? (double)b[i] : 0.0);
            double error = (n / 16.0 + 12.0) * U * (top * root * fabs((double)w[i]) + fabs(want));
            NEAR(y[i], want, error, "layernorm", n);
        }
        give_back(k->name, "layernorm", n);
    }
}

static void test_rope(const kernels_t *k, int half)
{
    for (int pairing = DBF_ADJACENT; pairing <= DBF_HALVES; pairing++) {
        static float before[2 * MAX], want[2 * MAX];
        float *x = floats(2 * (size_t)half, 5.0f), *cos_sin = take(2 * (size_t)half, sizeof *cos_sin);
        for (int i = 0; i < half; i++) {
            double angle = 3.2 * uniform();
            cos_sin[2 * i] = (float)cos(angle), cos_sin[2 * i + 1] = (float)sin(angle);
        }
        memcpy(before, x, 2 * (size_t)half * sizeof *x);
        memcpy(want, x, 2 * (size_t)half * sizeof *x);
        k->rope(x, cos_sin, 2 * half, pairing);
        ref->rope(want, cos_sin, 2 * half, pairing);
        SAME(x, want, 2 * half, "rope");
        for (int i = 0; i < half; i++) {
            int ia = pairing == DBF_ADJACENT ? 2 * i : i, ib = pairing == DBF_ADJACENT ? 2 * i + 1 : i + half;
            double a = before[ia], b = before[ib], c = cos_sin[2 * i], s = cos_sin[2 * i + 1];
            NEAR(x[ia], a * c - b * s, 2.0 * U * (fabs(a) + fabs(b)), "rope", half);
            NEAR(x[ib], a * s + b * c, 2.0 * U * (fabs(a) + fabs(b)), "rope", half);
        }
        give_back(k->name, "rope", half);
    }
}

static void test_scores(const kernels_t *k, int n, int dim)
{
    float *y = take((size_t)n, sizeof *y), *x = floats((size_t)dim, 4.0f), factor = 0.7f;
    float *keys = floats((size_t)n * (size_t)dim, 1.0f);
    k->scores(y, x, keys, factor, n, dim);
    ref->scores(want_f, x, keys, factor, n, dim);
    SAME(y, want_f, n, "scores");
    for (int j = 0; j < n; j++) {
        double sum = 0.0, size = 0.0;
        for (int i = 0; i < dim; i++) {
            double term = (double)keys[j * dim + i] * x[i] * (double)factor;
            sum += term, size += fabs(term);
        }
        NEAR(y[j], sum, (dim / 16.0 + 7.0) * U * size, "scores", dim);
    }
    give_back(k->name, "scores", dim);
}

static void test_softmax(const kernels_t *k, int n)
{
    static float before[MAX];
    float *x = floats((size_t)n, n % 2 ? 40.0f : 3.0f), top = -INFINITY;
    memcpy(before, x, (size_t)n * sizeof *x);
    memcpy(want_f, x, (size_t)n * sizeof *x);
    float sum = k->softmax(x, n), sum_want = ref->softmax(want_f, n);
    SAME(x, want_f, n, "softmax");
    CHECK(memcmp(&sum, &sum_want, sizeof sum) == 0, "%s softmax %d: the sum is %g, not %g", k->name, n, sum, sum_want);
    double all = 0.0;
    for (int j = 0; j < n; j++) top = before[j] > top ? before[j] : top;
    for (int j = 0; j < n; j++) {
        double below = (double)top - before[j];
        NEAR(x[j], exp(-below), (below + 5.0) * U * exp(-below), "softmax", n);
        all += x[j];
    }
    NEAR(sum, all, (n / 16.0 + 6.0) * U * all, "sum of softmax", n);
    give_back(k->name, "softmax", n);
}

static void test_mix(const kernels_t *k, int n, int dim)
{
    static float before[MAX];
    float *y = floats((size_t)dim, 2.0f), *p = floats((size_t)n, 1.0f), *values = floats((size_t)n * (size_t)dim, 3.0f);
    memcpy(before, y, (size_t)dim * sizeof *y);
    memcpy(want_f, y, (size_t)dim * sizeof *y);
    k->mix(y, p, values, n, dim);
    ref->mix(want_f, p, values, n, dim);
    SAME(y, want_f, dim, "mix");
    for (int i = 0; i < dim; i++) {
        double sum = before[i], size = fabs(sum);
        for (int j = 0; j < n; j++) {
            double term = (double)p[j] * values[j * dim + i];
            sum += term, size += fabs(term);
        }
        NEAR(y[i], sum, (n + 1.0) * U * size, "mix", dim);
    }
    give_back(k->name, "mix", dim);
}

/* usual sizes of heads, odd ones, and numbers of positions around whole vectors */
static void test_attention(const kernels_t *k, int n)
{
    static const int few[] = { 1, 2, 15, 16, 17, 33 }, dims[] = { 64, 80, 96, 128, 256 };
    for (size_t i = 0; i < sizeof few / sizeof *few; i++) {
        if (n < 500) test_scores(k, few[i], n), test_mix(k, few[i], n); /* dim */
        test_scores(k, n, few[i]);
        test_mix(k, n, few[i]);
    }
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++)
        if (n < 70) test_scores(k, n, dims[i]), test_mix(k, n, dims[i]);
    test_softmax(k, n);
}

static void test_gates(const kernels_t *k, int n)
{
    static const float odd[] = { 200.0f, -200.0f, INFINITY, -INFINITY, 0.0f, -0.0f };
    for (int variant = 0; variant < 4; variant++) {
        int in_place = variant % 2, gelu = variant / 2;
        float *gate = floats((size_t)n, gelu ? 9.5f : 80.0f), *up = floats((size_t)n, 2.0f);
        float *y = in_place ? gate : take((size_t)n, sizeof *y);
        uint32_t at = next() % (uint32_t)n;
        gate[at] = odd[next() % (sizeof odd / sizeof *odd)];
        static double want[MAX], error[MAX];
        for (int i = 0; i < n; i++) {
            double g = gate[i], a = gelu ? 2.0 * sqrt(2.0 / M_PI) * (g + 0.044715 * g * g * g) : g;
            want[i] = g / (1.0 + exp(-a)) * up[i];
            error[i] = ((gelu ? 6.0 * fabs(a) : 0.0) + 9.0) * U * fabs(want[i]);
        }
        (gelu ? ref->gelu_mul : ref->silu_mul)(want_f, gate, up, n);
        (gelu ? k->gelu_mul : k->silu_mul)(y, gate, up, n);
        SAME(y, want_f, n, gelu ? "gelu_mul" : "silu_mul");
        for (int i = 0; i < n; i++)
            if (i != (int)at) NEAR(y[i], want[i], error[i], gelu ? "gelu_mul" : "silu_mul", n);
        give_back(k->name, "gates", n);
    }
}

static void test_gelu(const kernels_t *k, int n)
{
    float *x = floats((size_t)n, 9.5f), *y = n % 2 ? x : take((size_t)n, sizeof *y);
    static double want[MAX], error[MAX];
    for (int i = 0; i < n; i++) {
        double v = x[i], a = 2.0 * sqrt(2.0 / M_PI) * (v + 0.044715 * v * v * v);
        want[i] = v / (1.0 + exp(-a));
        error[i] = (6.0 * fabs(a) + 8.0) * U * fabs(want[i]);
    }
    ref->gelu(want_f, x, n);
    k->gelu(y, x, n);
    SAME(y, want_f, n, "gelu");
    for (int i = 0; i < n; i++) NEAR(y[i], want[i], error[i], "gelu", n);
    give_back(k->name, "gelu", n);
}

static void test_softcap(const kernels_t *k, int n)
{
    static const float odd[] = { 1e30f, -1e30f, INFINITY, -INFINITY, 0.0f, 1e-30f };
    static float before[MAX];
    float *y = floats((size_t)n, n % 2 ? 200.0f : 3.0f), cap = n % 3 ? 30.0f : 2.5f;
    y[next() % (uint32_t)n] = odd[next() % (sizeof odd / sizeof *odd)];
    memcpy(before, y, (size_t)n * sizeof *y);
    memcpy(want_f, y, (size_t)n * sizeof *y);
    k->softcap(y, cap, n);
    ref->softcap(want_f, cap, n);
    SAME(y, want_f, n, "softcap");
    for (int i = 0; i < n; i++)
        NEAR(y[i], (double)cap * tanh((double)before[i] / (double)cap), 9.0 * U * (double)cap, "softcap", n);
    give_back(k->name, "softcap", n);
}

static void test_add(const kernels_t *k, int n)
{
    static float before[MAX];
    float *y = floats((size_t)n, 9.0f), *x = floats((size_t)n, 9.0f);
    memcpy(before, y, (size_t)n * sizeof *y);
    memcpy(want_f, y, (size_t)n * sizeof *y);
    k->add(y, x, n);
    ref->add(want_f, x, n);
    SAME(y, want_f, n, "add");
    for (int i = 0; i < n; i++)
        NEAR(y[i], (double)before[i] + x[i], U * fabs((double)before[i] + x[i]), "add", n);
    give_back(k->name, "add", n);
}

static void test_scale(const kernels_t *k, int n)
{
    static float before[MAX];
    float *y = floats((size_t)n, 9.0f), factor = uniform();
    memcpy(before, y, (size_t)n * sizeof *y);
    memcpy(want_f, y, (size_t)n * sizeof *y);
    k->scale(y, factor, n);
    ref->scale(want_f, factor, n);
    SAME(y, want_f, n, "scale");
    for (int i = 0; i < n; i++) NEAR(y[i], (double)before[i] * (double)factor, U * fabs((double)y[i]), "scale", n);
    give_back(k->name, "scale", n);
}

static void test_f16(const kernels_t *k, int n)
{
    static uint16_t want[MAX];
    uint16_t *h = take((size_t)n, sizeof *h), *narrow = take((size_t)n, sizeof *narrow);
    float *wide = take((size_t)n, sizeof *wide), *x = take((size_t)n, sizeof *x);
    for (int i = 0; i < n; i++) {
        h[i] = (uint16_t)next();
        if ((h[i] >> 10 & 31) == 31) h[i] &= 0xfc00; /* infinity, but no NaN */
        x[i] = uniform() * ldexpf(1.0f, (int)(next() % 44) - 26);
    }
    if (n > 8) { /* ties, the largest that is finite, and what rounds beyond it */
        static const float odd[] = { 1.00048828125f, 1.00146484375f, 65519.99f, -65520.0f, INFINITY, 2.98e-8f, 1e-40f };
        for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) x[i + 1] = odd[i];
    }
    k->from_f16(wide, h, n);
    ref->from_f16(want_f, h, n);
    SAME(wide, want_f, n, "from_f16");
    k->to_f16(narrow, x, n);
    ref->to_f16(want, x, n);
    SAME(narrow, want, n, "to_f16");
    for (int i = 0; i < n; i++) {
        if ((h[i] & 0x7fff) < 0x7c00) NEAR(wide[i], of_half(h[i]), 0.0, "from_f16", n);
        if (fabsf(x[i]) < 65520.0f)
            NEAR(of_half(narrow[i]), x[i], larger(ldexp(fabs((double)x[i]), -11), ldexp(1.0, -25)), "to_f16", n);
        else
            CHECK((narrow[i] & 0x7fff) == 0x7c00, "%s to_f16: %g is no infinity", k->name, x[i]);
    }
    give_back(k->name, "f16", n);
}

static void test_q8_0(const kernels_t *k, int blocks)
{
    static const float odd[] = { 0.0f, 1e-40f, 3e38f, INFINITY, -INFINITY, NAN };
    static uint8_t want[97 * DBF_Q8_0_BYTES];
    static float wide_want[97 * DBF_Q8_0_BLOCK];
    size_t n = (size_t)blocks * DBF_Q8_0_BLOCK;
    for (size_t o = 0; o <= sizeof odd / sizeof *odd; o++) {
        float *x = floats(n, 5.0f), *y = take(n, sizeof *y);
        uint8_t *q = take((size_t)blocks, DBF_Q8_0_BYTES);
        int at = (int)(next() % (uint32_t)blocks); /* a block with an odd value */
        if (o == 1) memset(x + at * DBF_Q8_0_BLOCK, 0, DBF_Q8_0_BLOCK * sizeof *x);
        if (o) x[at * DBF_Q8_0_BLOCK + (int)(next() % DBF_Q8_0_BLOCK)] = odd[o - 1];
        k->to_q8_0(q, x, (int)n);
        ref->to_q8_0(want, x, (int)n);
        SAME(q, want, blocks * DBF_Q8_0_BYTES, "to_q8_0");
        k->from_q8_0(y, q, (int)n);
        ref->from_q8_0(wide_want, q, (int)n);
        for (int b = 0; b < blocks; b++) {
            const uint8_t *block = q + b * DBF_Q8_0_BYTES;
            double d = of_half((uint16_t)(block[0] | block[1] << 8)), top = 0.0;
            if (o > 2 && b == at) { /* what is no finite number comes back as none */
                for (int i = 0; i < DBF_Q8_0_BLOCK; i++)
                    CHECK(!isfinite(y[b * DBF_Q8_0_BLOCK + i]), "%s from_q8_0 %zu", k->name, n);
                continue;
            }
            for (int i = 0; i < DBF_Q8_0_BLOCK; i++) top = larger(top, fabs((double)x[b * DBF_Q8_0_BLOCK + i]));
            NEAR(d, top / 127.0, larger(top / 127.0 * 0x1p-11, 0x1p-25), "d of to_q8_0", blocks);
            for (int i = b * DBF_Q8_0_BLOCK, v = 2; v < DBF_Q8_0_BYTES; i++, v++) {
                if (top > 1e-20) NEAR((int8_t)block[v], x[i] * 127.0 / top, 0.501, "to_q8_0", blocks);
                CHECK(y[i] == (float)(d * (int8_t)block[v]) && y[i] == wide_want[i], "%s from_q8_0 %zu", k->name, n);
            }
        }
        give_back(k->name, "q8_0", blocks);
    }
}

int main(void)
{
    CHECK(!dbf_isa_demoted(), "the self-test of %s failed", dbf_isa_demoted());
    make_buffers();
    for (int isa = 0; isa < dbf_isa_count(); isa++) {
        CHECK(dbf_isa_use(dbf_isa_name(isa)) == DBF_OK, "dbf_isa_use");
        const kernels_t *k = dbf_kernels_active();
        for (at_end = 0; at_end < 2; at_end++)
            for (int i = 0; i < N_SIZES; i++) {
                int n = sizes[i];
                test_quantize(k, n);
                test_quantize_scaled(k, n);
                test_descale(k, n);
                test_sign_gemv(k, n);
                test_turning(k, n);
                test_quantize_many(k, n);
                test_sign_gemm(k, n);
                test_descale_many(k, n);
                test_gemv(k, n);
                for (int type = 0; type < 3; type++)
                    if (n < (block_types[type].block < 100 ? 64 : 8)) test_blocks(k, &block_types[type], n, n % 4 == 2);
                test_rmsnorm(k, n);
                test_rope(k, n);
                test_attention(k, n);
                test_layernorm(k, n);
                test_gates(k, n);
                test_gelu(k, n);
                test_add(k, n);
                test_scale(k, n);
                test_softcap(k, n);
                test_f16(k, n);
                if (n < 100) test_q8_0(k, n);
            }
    }
    printf("ok:");
    for (int i = 0; i < dbf_isa_count(); i++) printf(" %s", dbf_isa_name(i));
    printf("\n");
    return 0;
}
