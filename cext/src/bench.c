/* bench.c - how fast are a sign product and the memory, for runtime/bench. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "../dbf.h"
#include "clock.h"
#include "dense.h"
#include "model.h"

#define ALIGN 64
#define MAX_ROWS (1 << 24)
#define MAX_BATCH 4096
#define MAX_THREADS 1024
#define MAX_DURATION 3600.0
#define WINDOW 0.01 /* seconds that are timed together: shorter ones are at the mercy of the clock */
#define AT_LEAST 2  /* measurements: another process may have had the CPU during one */

static size_t round_up(size_t n)
{
    return (n + ALIGN - 1) / ALIGN * ALIGN;
}

static double now(void)
{
    return 1e-9 * (double)clock_ns();
}

/* least time of run(arg), repeated for `duration` seconds */
static double least_time(void (*run)(void *arg), void *arg, double duration)
{
    double end = now() + duration, t0 = now(), t1, least = 0.0;
    int settled = 0, windows = 0;
    for (size_t burst = 1; windows < AT_LEAST || !settled || t0 < end; t0 = t1, windows++) {
        for (size_t i = 0; i < burst; i++) run(arg);
        t1 = now();
        double each = (t1 - t0) / (double)burst;
        if (!settled || each < least) least = each;
        if (t1 - t0 < WINDOW && t1 < end)
            burst *= 2;
        else
            settled = 1;
    }
    return least;
}

static size_t copies_of(size_t bytes, size_t footprint)
{
    return footprint > bytes ? (footprint + bytes - 1) / bytes : 1;
}

static int duration_ok(double duration)
{
    return duration >= 0.0 && duration <= MAX_DURATION;
}

/* ---- a sign product --------------------------------------------------------------------------------------- */

typedef struct product {
    const kernels_t *k;
    int rows, cols, batch, bits;
    size_t row_bytes, copy_bytes, table_bytes;
    size_t copies, next;
    uint8_t *w;     /* [copies][copy_bytes] */
    uint8_t *table; /* [DBF_FEW][table_bytes] */
    int16_t *q;     /* [cols][DBF_BLOCK] */
    int32_t *isum;  /* [DBF_GEMM_ROWS][DBF_BLOCK] */
    uint32_t *work; /* [DBF_GEMM_ROWS + 2][DBF_BLOCK] */
} product_t;

static void multiply_few(const product_t *p, const uint8_t *w, int n)
{
    for (int i = 0; i < n; i++)
        (p->bits == 8 ? p->k->sign_table8 : p->k->sign_table)(p->table + (size_t)i * p->table_bytes, p->q, p->cols);
    for (int r = 0; r < p->rows; r += DBF_PANEL) {
        int some = p->rows - r < DBF_PANEL ? p->rows - r : DBF_PANEL;
        for (int i = 0; i < n; i++)
            (p->bits == 8 ? p->k->sign_gemv8 : p->k->sign_gemv)(p->isum, w + (size_t)r * p->row_bytes,
                                                                p->table + (size_t)i * p->table_bytes, some, p->cols);
    }
}

static void multiply(void *arg)
{
    product_t *p = arg;
    const uint8_t *w = p->w + p->next * p->copy_bytes;
    int many = many_of(p->batch);
    p->next = (p->next + 1) % p->copies;
    for (int i = 0; i < many; i += DBF_BLOCK)
        for (int r = 0; r < p->rows; r += DBF_GEMM_ROWS)
            p->k->sign_gemm(p->isum, w + (size_t)r * p->row_bytes, p->q, p->work,
                            p->rows - r < DBF_GEMM_ROWS ? p->rows - r : DBF_GEMM_ROWS, p->cols,
                            many - i > DBF_BLOCK / 2 ? DBF_BLOCK : DBF_BLOCK / 2);
    if (many < p->batch) multiply_few(p, w, p->batch - many);
}

/* the first copy is packed, the others are copied: what the signs are makes no difference to the kernels */
static int fill(product_t *p)
{
    size_t bytes = (size_t)p->rows * p->row_bytes, packed = p->k->sign_pack_bytes(p->rows, p->cols);
    uint8_t *bits = malloc(bytes);
    if (!bits) return DBF_ENOMEM;
    for (size_t i = 0; i < bytes; i++) bits[i] = (uint8_t)(i * 167 + i / 251);
    /* like a normal distribution: few activations are large */
    int qmax = p->bits == 8 ? DBF_QMAX8 : DBF_QMAX;
    for (int i = 0; i < p->cols * DBF_BLOCK; i++) {
        int64_t a = i * INT64_C(7919) % (2 * qmax + 1) - qmax, b = i * INT64_C(104729) % (2 * qmax + 1) - qmax;
        p->q[i] = (int16_t)(a * b / qmax);
    }
    if (packed)
        p->k->sign_pack(p->w, bits, p->rows, p->cols);
    else
        memcpy(p->w, bits, bytes);
    for (size_t i = 1; i < p->copies; i++) memcpy(p->w + i * p->copy_bytes, p->w, packed ? packed : bytes);
    free(bits);
    return DBF_OK;
}

int dbf_bench_sign_product(double *seconds, int rows, int cols, int batch, int activation_bits, size_t footprint,
                           double duration)
{
    if (!seconds || rows < 1 || rows > MAX_ROWS || cols < 1 || cols > DBF_MAX_COLS || batch < 1 || batch > MAX_BATCH
        || (activation_bits != 8 && activation_bits != 16) || footprint > SIZE_MAX / 4 || !duration_ok(duration))
        return DBF_EINVAL;
    product_t p = { .k = dbf_kernels_active(), .rows = rows, .cols = cols, .batch = batch, .bits = activation_bits };
    if (!p.k) return DBF_EISA;
    p.row_bytes = (size_t)((cols + 7) / 8);
    size_t packed = p.k->sign_pack_bytes(rows, cols);
    p.copy_bytes = round_up(packed ? packed : (size_t)rows * p.row_bytes);
    p.table_bytes = round_up(p.k->sign_table_bytes(cols));
    p.copies = copies_of(p.copy_bytes, footprint);
    p.w = alloc_weights(p.copies * p.copy_bytes);
    p.table = aligned_alloc(ALIGN, DBF_FEW * p.table_bytes);
    p.q = aligned_alloc(ALIGN, (size_t)cols * DBF_BLOCK * sizeof *p.q);
    p.isum = aligned_alloc(ALIGN, DBF_GEMM_ROWS * DBF_BLOCK * sizeof *p.isum);
    p.work = aligned_alloc(ALIGN, (DBF_GEMM_ROWS + 2) * DBF_BLOCK * sizeof *p.work);
    int code = p.w && p.table && p.q && p.isum && p.work ? fill(&p) : DBF_ENOMEM;
    if (!code) *seconds = least_time(multiply, &p, duration);
    free(p.w);
    free(p.table);
    free(p.q);
    free(p.isum);
    free(p.work);
    return code;
}

/* ---- a product with a matrix that is not factorized ---------------------------------------------------------- */

typedef struct dense_product {
    const kernels_t *k;
    dbf_dense w;
    int batch;
    size_t copy_bytes, copies, next;
    uint8_t *copy;     /* [copies][copy_bytes] */
    float *x, *scale;  /* [batch][cols], [batch] */
    int16_t *q;        /* [batch][cols] */
} dense_product_t;

static void multiply_dense(void *arg)
{
    dense_product_t *p = arg;
    size_t cols = (size_t)p->w.cols;
    float y[DBF_BATCH * DBF_PANEL];
    p->w.data = p->copy + p->next * p->copy_bytes;
    p->next = (p->next + 1) % p->copies;
    for (int i = 0; i < p->batch; i++) p->scale[i] = p->k->quantize(p->q + i * cols, p->x + i * cols, p->w.cols);
    for (int r = 0; r < p->w.rows; r += DBF_PANEL)
        for (int i = 0; i < p->batch; i += DBF_BATCH) {
            int rows = p->w.rows - r < DBF_PANEL ? p->w.rows - r : DBF_PANEL;
            int n = p->batch - i < DBF_BATCH ? p->batch - i : DBF_BATCH;
            dense_gemv(p->k, y, &p->w, r, rows, p->x + i * cols, p->q + i * cols, p->scale + i, n);
        }
}

int dbf_bench_dense_gemv(double *seconds, int type, int rows, int cols, int batch, size_t footprint, double duration)
{
    if (!seconds || rows < 1 || rows > MAX_ROWS || cols < 1 || cols > DBF_MAX_COLS || !dense_row_bytes(type, cols)
        || batch < 1 || batch > MAX_BATCH || footprint > SIZE_MAX / 4 || !duration_ok(duration))
        return DBF_EINVAL;
    dense_product_t p = { .k = dbf_kernels_active(), .w = { type, rows, cols, NULL }, .batch = batch };
    if (!p.k) return DBF_EISA;
    size_t numbers = (size_t)batch * (size_t)cols;
    p.copy_bytes = round_up((size_t)rows * dense_row_bytes(type, cols));
    p.copies = copies_of(p.copy_bytes, footprint);
    p.copy = aligned_alloc(ALIGN, p.copies * p.copy_bytes);
    p.x = malloc(numbers * sizeof *p.x);
    p.scale = malloc((size_t)batch * sizeof *p.scale);
    p.q = malloc(numbers * sizeof *p.q);
    int code = p.copy && p.x && p.scale && p.q ? DBF_OK : DBF_ENOMEM;
    if (!code) {
        memset(p.copy, 0x2c, p.copies * p.copy_bytes); /* which are finite numbers in every type */
        for (size_t i = 0; i < numbers; i++) p.x[i] = (float)(i % 251) - 125.0f;
        *seconds = least_time(multiply_dense, &p, duration);
    }
    free(p.copy);
    free(p.x);
    free(p.scale);
    free(p.q);
    return code;
}

/* ---- memory ----------------------------------------------------------------------------------------------- */

#define PREFETCH 4096 /* bytes ahead: as the kernels do, beyond what the CPU prefetches by itself */

typedef struct reading {
    pool_t *pool;
    uint64_t *data;
    size_t lines; /* of ALIGN bytes */
    int touch;
    _Atomic uint64_t sum; /* keeps the compiler from leaving the reads out */
} reading_t;

static void part_of(void *arg, int thread)
{
    reading_t *r = arg;
    enum { WORDS = ALIGN / sizeof(uint64_t) };
    size_t threads = (size_t)pool_threads(r->pool);
    size_t begin = r->lines * (size_t)thread / threads, end = r->lines * ((size_t)thread + 1) / threads;
    if (r->touch) { /* by the thread that reads it, so that it lies in that thread's memory */
        memset(r->data + begin * WORDS, 1, (end - begin) * ALIGN);
        return;
    }
    uint64_t sum[WORDS] = { 0 }, total = 0;
    for (const uint64_t *p = r->data + begin * WORDS, *stop = r->data + end * WORDS; p < stop; p += WORDS) {
        __builtin_prefetch((const char *)p + PREFETCH);
        for (int i = 0; i < WORDS; i++) sum[i] += p[i];
    }
    for (int i = 0; i < WORDS; i++) total += sum[i];
    r->sum += total;
}

int dbf_bench_read(double *seconds, size_t bytes, int n_threads, double duration)
{
    if (!seconds || bytes < ALIGN || bytes > SIZE_MAX / 4 || n_threads < 1 || n_threads > MAX_THREADS
        || !duration_ok(duration))
        return DBF_EINVAL;
    reading_t r = { .lines = bytes / ALIGN, .touch = 1 };
    int code = pool_new(&r.pool, n_threads);
    if (code) return code;
    r.data = alloc_weights(r.lines * ALIGN);
    code = r.data ? pool_run(r.pool, part_of, &r) : DBF_ENOMEM;
    r.touch = 0;
    double end = now() + duration;
    for (int pass = 0; !code && (pass < AT_LEAST || now() < end); pass++) {
        double t0 = now();
        code = pool_run(r.pool, part_of, &r);
        double each = (now() - t0) * (double)bytes / (double)(r.lines * ALIGN);
        if (pass == 0 || each < *seconds) *seconds = each;
    }
    free(r.data);
    pool_free(r.pool);
    return code;
}
