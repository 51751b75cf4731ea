/* linear.c - linear layers of one token, of few and of many; part of the forward pass of forward.c.
 *
 * One token: its table is built by every thread for itself, and panels are shared, as what memory gives to the cores
 * differs from one moment to the next. Few: tables are divided by tokens, and a panel of weights stays in the L1 cache
 * while the tokens pass. Many: tokens lie side by side, 64 or 32 in a block, for sign_gemm; between B and A they stay
 * so. Every way gives the same bits. */
#include <string.h>

#include "model.h"

static size_t panel_bytes(int cols)
{
    return (size_t)DBF_PANEL * (size_t)((cols + 7) / 8);
}

/* ---- one token, and few ----------------------------------------------------------------------------------- */

/* table = the quantized by * x (by may be NULL); returns the scale. Quantizing and making the table in one loop was
 * slower: with AVX-512, 576 columns took 930 instead of 840 cycles. */
static float prepare(const dbf_session *s, scratch_t *own, void *table, const float *x, const uint16_t *by, int cols)
{
    const kernels_t *k = s->model->kernels;
    float scale = k->quantize_scaled(own->q, own->scaled, x, by, cols, s->qmax);
    (s->qmax == DBF_QMAX8 ? k->sign_table8 : k->sign_table)(table, own->q, cols);
    return scale;
}

/* one panel of w[][cols] times the table */
static void sign_product(const dbf_session *s, int32_t *isum, const uint8_t *w, const void *table, int panel, int rows,
                         int cols)
{
    const kernels_t *k = s->model->kernels;
    (s->qmax == DBF_QMAX8 ? k->sign_gemv8 : k->sign_gemv)(isum, w + panel * panel_bytes(cols), table, rows, cols);
}

/* mid = s_mid * B(table), rows of one panel */
static void panel_b(const dbf_session *s, const linear_t *w, int panel, const void *table, float scale, float *mid)
{
    int32_t isum[DBF_PANEL];
    int r = panel * DBF_PANEL, rows = w->rank - r < DBF_PANEL ? w->rank - r : DBF_PANEL;
    sign_product(s, isum, w->b, table, panel, rows, w->cols);
    s->model->kernels->descale(mid + r, isum, scale, w->s_mid + r, NULL, rows);
}

/* y = s_out * A(table) + bias, rows of one panel */
static void panel_a(const dbf_session *s, const apply_t *p, int panel, const void *table, float scale, float *y)
{
    const kernels_t *k = s->model->kernels;
    int32_t isum[DBF_PANEL];
    float out[DBF_PANEL];
    const linear_t *w = p->w;
    int r = panel * DBF_PANEL, rows = w->rows - r < DBF_PANEL ? w->rows - r : DBF_PANEL;
    sign_product(s, isum, w->a, table, panel, rows, w->rank);
    k->descale(p->add ? out : y + r, isum, scale, w->s_out + r, w->bias ? w->bias + r : NULL, rows);
    if (p->add) k->add(y + r, out, rows);
}

/* several linears of one token: their panels are shared as one list, so that two barriers serve all of them */
static void linears_one(dbf_session *s, int thread, const apply_t *p, int count)
{
    const dbf_model *m = s->model;
    scratch_t *own = &s->scratch[thread];
    for (int phase = 0; phase < 2; phase++) {
        int panels[TOGETHER * CHUNK], total = 0, ready = -1, stage = phase == 0 ? SIGNS_B : SIGNS_A;
        float scale = 0.0f;
        for (int i = 0; i < count; i++) total += panels[i] = panels_of(phase == 0 ? p[i].w->rank : p[i].w->rows);
        pool_share(m->pool, thread, total);
        for (int panel; (panel = pool_take(m->pool, thread)) >= 0;) {
            int i = 0;
            while (panel >= panels[i]) panel -= panels[i++];
            const linear_t *w = p[i].w;
            float *mid = s->mid + (size_t)i * m->max_rank;
            if (i != ready) {
                lap(s, thread, stage);
                scale = phase == 0 ? prepare(s, own, own->table, p[i].x, w->s_in, w->cols)
                                   : prepare(s, own, own->table, mid, NULL, w->rank);
                lap(s, thread, TABLES);
                ready = i;
            }
            if (phase == 0)
                panel_b(s, w, panel, own->table, scale, mid);
            else
                panel_a(s, &p[i], panel, own->table, scale, p[i].y);
        }
        meet(s, thread, stage);
    }
}

/* one linear of tokens first .. n-1, at most DBF_FEW */
static void linear_few(dbf_session *s, int thread, const apply_t *p, int first, int n)
{
    const dbf_model *m = s->model;
    const linear_t *w = p->w;
    scratch_t *own = &s->scratch[thread];
    int begin, end;
    n -= first;

    pool_split(m->pool, thread, n, &begin, &end);
    for (int i = begin; i < end; i++)
        s->in_scale[i] =
            prepare(s, own, s->tables + i * s->table_bytes, p->x + (size_t)(first + i) * w->cols, w->s_in, w->cols);
    meet(s, thread, TABLES);

    pool_split(m->pool, thread, panels_of(w->rank), &begin, &end);
    for (int panel = begin; panel < end; panel++)
        for (int i = 0; i < n; i++)
            panel_b(s, w, panel, s->tables + i * s->table_bytes, s->in_scale[i], s->mid + (size_t)i * m->max_rank);
    meet(s, thread, SIGNS_B);

    pool_split(m->pool, thread, n, &begin, &end);
    for (int i = begin; i < end; i++)
        s->in_scale[i] =
            prepare(s, own, s->tables + i * s->table_bytes, s->mid + (size_t)i * m->max_rank, NULL, w->rank);
    meet(s, thread, TABLES);

    pool_split(m->pool, thread, panels_of(w->rows), &begin, &end);
    for (int panel = begin; panel < end; panel++)
        for (int i = 0; i < n; i++)
            panel_a(s, p, panel, s->tables + i * s->table_bytes, s->in_scale[i],
                    p->y + (size_t)(first + i) * w->rows);
    meet(s, thread, SIGNS_A);
}

/* ---- many tokens ------------------------------------------------------------------------------------------ */

/* tokens first .. first+n-1, side by side in rows of `wide` numbers */
typedef struct block {
    int first, n, wide;
} block_t;

static int blocks_of(int n)
{
    return (n + DBF_BLOCK - 1) / DBF_BLOCK;
}

static block_t block_at(int i, int n)
{
    int first = i * DBF_BLOCK, some = n - first < DBF_BLOCK ? n - first : DBF_BLOCK;
    return (block_t){ first, some, some > DBF_BLOCK / 2 ? DBF_BLOCK : DBF_BLOCK / 2 };
}

/* of the i-th of the linears that are computed together: the block's mid[rank][wide], q[cols or rank][wide], scales */
static float *mid_of(const dbf_session *s, int i, block_t b, int rank)
{
    return s->mid + (size_t)i * CHUNK * s->model->max_rank + (size_t)b.first * rank;
}

static int16_t *q_of(const dbf_session *s, int i, block_t b, int cols)
{
    const dbf_model *m = s->model;
    int longest = m->config.d_model > m->max_rank ? m->config.d_model : m->max_rank;
    return s->q_many + (size_t)i * CHUNK * longest + (size_t)b.first * cols;
}

static float *scale_of(const dbf_session *s, int i, block_t b)
{
    return s->in_scale + (size_t)i * CHUNK + b.first;
}

/* q = the quantized s_in * x, or the quantized mid; divided by strips and linears */
static void quantize_strips(dbf_session *s, int thread, const apply_t *p, int count, int n, int phase)
{
    const kernels_t *k = s->model->kernels;
    float *strip = s->scratch[thread].strip;
    const float *turned = NULL; /* what the strip holds */
    int strips = (n + DBF_BLOCK / 2 - 1) / (DBF_BLOCK / 2) * (DBF_BLOCK / 2 / DBF_STRIP), begin, end;
    pool_split(s->model->pool, thread, strips * count, &begin, &end);
    for (int item = begin; item < end; item++) {
        const linear_t *w = p[item % count].w;
        int i = item % count, token = item / count * DBF_STRIP, cols = phase == 0 ? w->cols : w->rank;
        block_t b = block_at(token / DBF_BLOCK, n);
        int16_t *q = q_of(s, i, b, cols) + token - b.first;
        float *scale = scale_of(s, i, b) + token - b.first;
        if (phase == 1) {
            k->quantize_many(q, scale, mid_of(s, i, b, cols) + token - b.first, NULL, cols, b.wide, b.wide, s->qmax);
            continue;
        }
        const float *x = p[i].x + (size_t)token * cols;
        int some = n - token < DBF_STRIP ? n - token : DBF_STRIP;
        if (x != turned) k->to_columns(strip, x, (size_t)cols, some, DBF_STRIP, cols);
        turned = x;
        k->quantize_many(q, scale, strip, w->s_in, cols, b.wide, DBF_STRIP, s->qmax);
    }
    meet(s, thread, TABLES);
}

/* mid = s_mid * B q, or y = s_out * A q + bias: some rows of one block */
static void multiply(const dbf_session *s, scratch_t *own, const apply_t *p, int i, block_t b, int r, int rows,
                     int phase)
{
    const kernels_t *k = s->model->kernels;
    const linear_t *w = p->w;
    int cols = phase == 0 ? w->cols : w->rank;
    const uint8_t *signs = (phase == 0 ? w->b : w->a) + r / DBF_PANEL * panel_bytes(cols);
    const float *scale = scale_of(s, i, b);
    k->sign_gemm(own->isum, signs, q_of(s, i, b, cols), own->work, rows, cols, b.wide);
    if (phase == 0) {
        float *mid = mid_of(s, i, b, w->rank) + (size_t)r * b.wide;
        k->descale_many(mid, own->isum, scale, w->s_mid + r, NULL, rows, b.wide);
    } else {
        float *y = (float *)own->work;
        k->descale_many(y, own->isum, scale, w->s_out + r, w->bias ? w->bias + r : NULL, rows, b.wide);
        k->to_rows(p->y + (size_t)b.first * w->rows + r, y, (size_t)w->rows, b.n, b.wide, rows, p->add);
    }
}

/* the panels of all linears and blocks are divided as one list */
static void multiply_panels(dbf_session *s, int thread, const apply_t *p, int count, int n, int phase)
{
    int total = 0, begin, end, first = 0;
    for (int i = 0; i < count; i++) total += blocks_of(n) * panels_of(phase == 0 ? p[i].w->rank : p[i].w->rows);
    pool_split(s->model->pool, thread, total, &begin, &end);
    for (int i = 0; i < count; i++) {
        int rows = phase == 0 ? p[i].w->rank : p[i].w->rows, panels = panels_of(rows);
        for (int j = 0; j < blocks_of(n); j++, first += panels) {
            int from = begin > first ? begin - first : 0, to = end - first < panels ? end - first : panels;
            int most = DBF_GEMM_ROWS / DBF_PANEL, parts = (to - from + most - 1) / most;
            for (int part = 0; part < parts; part++) { /* of about the same size */
                int r = (from + (to - from) * part / parts) * DBF_PANEL;
                int stop = (from + (to - from) * (part + 1) / parts) * DBF_PANEL;
                multiply(s, &s->scratch[thread], &p[i], i, block_at(j, n), r, (stop < rows ? stop : rows) - r, phase);
            }
        }
    }
    meet(s, thread, phase == 0 ? SIGNS_B : SIGNS_A);
}

void linears(dbf_session *s, int thread, const apply_t *p, int count, int n)
{
    if (n == 1) {
        linears_one(s, thread, p, count);
        return;
    }
    int many = many_of(n);
    for (int phase = 0; phase < 2 && many > 0; phase++) {
        quantize_strips(s, thread, p, count, many, phase);
        multiply_panels(s, thread, p, count, many, phase);
    }
    for (int i = 0; i < count && many < n; i++) linear_few(s, thread, &p[i], many, n);
}
