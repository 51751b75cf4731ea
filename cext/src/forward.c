/* forward.c - the forward pass.  Mirror: runtime/forward.py.
 *
 * x = embedding
 * every layer:  x += O attention(RoPE(Q n), RoPE(K n), V n),  n = RMSNorm(x)
 *               x += Down (SiLU(Gate n) * Up n),              n = RMSNorm(x)
 * logits = Head RMSNorm(x)
 *
 * What some models do otherwise is in dbf_config and dbf_layer: GELU, with a gate or without, LayerNorm, norms of
 * queries and keys and of what is added to x, learned positions, a window of attention, scales, soft caps, experts.
 *
 * All threads run forward() side by side and meet at barriers. Rows of matrices are divided among them, in panels.
 * Norms and the like are divided by tokens; for a single token every thread does them for itself, which costs less
 * than waiting for one that does them for all. */
#include <math.h>
#include <string.h>

#include "clock.h"
#include "dense.h"
#include "model.h"
#include "scalar.h"

typedef struct job {
    dbf_session *s;
    const int32_t *tokens; /* of this chunk */
    int n, pos;
    float *logits;
    int first; /* the first of the n tokens whose logits are wanted */
} job_t;

static int min_of(int a, int b)
{
    return a < b ? a : b;
}

static int max_of(int a, int b)
{
    return a > b ? a : b;
}

/* RMSNorm or LayerNorm; b may be NULL */
static void norm(const dbf_model *m, float *y, const float *x, const float *w, const float *b)
{
    if (m->config.norm == DBF_LAYER)
        m->kernels->layernorm(y, x, w, b, m->config.norm_eps, m->config.d_model);
    else
        m->kernels->rmsnorm(y, x, w, m->config.norm_eps, m->config.d_model);
}

/* norm(x) of tokens first .. n-1, or x itself if w is NULL: divided, or a single one by every thread into its own
 * memory */
static float *norms(dbf_session *s, int thread, const float *w, const float *b, int first, int n)
{
    const dbf_model *m = s->model;
    int d = m->config.d_model, begin, end;
    if (!w) return s->x + (size_t)first * d;
    if (n - first == 1) {
        norm(m, s->scratch[thread].x, s->x + (size_t)first * d, w, b);
        lap(s, thread, REST);
        return s->scratch[thread].x;
    }
    pool_split(m->pool, thread, n - first, &begin, &end);
    for (int i = first + begin; i < first + end; i++)
        norm(m, s->norm + (size_t)i * d, s->x + (size_t)i * d, w, b);
    meet(s, thread, REST);
    return s->norm + (size_t)first * d;
}

/* the keys or values of a KV head, of one position to the cache's type, and of n positions back */
static void narrow(const dbf_session *s, uint8_t *to, const float *from)
{
    const kernels_t *k = s->model->kernels;
    if (s->kv_type == DBF_F16) k->to_f16((uint16_t *)to, from, s->model->config.head_dim);
    if (s->kv_type == DBF_Q8_0) k->to_q8_0(to, from, s->model->config.head_dim);
}

static void widen(const dbf_session *s, float *to, const uint8_t *from, int n)
{
    const kernels_t *k = s->model->kernels;
    if (s->kv_type == DBF_F16) k->from_f16(to, (const uint16_t *)from, n * s->model->config.head_dim);
    if (s->kv_type == DBF_Q8_0) k->from_q8_0(to, from, n * s->model->config.head_dim);
}

/* normalize one head's query or key, unless w is NULL, and rotate it, unless rope is -1 */
static void turn(const dbf_session *s, float *x, const float *w, int rope, int pos)
{
    const dbf_config *c = &s->model->config;
    if (w) s->model->kernels->rmsnorm(x, x, w, c->norm_eps, c->head_dim);
    if (rope < 0) return;
    const float *cos_sin = s->rope + ((size_t)rope * s->n_ctx + pos) * c->rope_dims;
    s->model->kernels->rope(x, cos_sin, c->rope_dims, c->rope_pairing);
}

/* RMSNorm of all heads of a token together, for queries and for keys, in models that have that */
static void joint_norms(const job_t *job, int thread, const layer_t *l)
{
    dbf_session *s = job->s;
    const dbf_config *c = &s->model->config;
    int q = c->n_heads * c->head_dim, k = c->n_kv_heads * c->head_dim, begin, end;
    if (!c->joint_norms || !l->norm[Q_NORM]) return;
    pool_split(s->model->pool, thread, job->n, &begin, &end);
    for (int i = begin; i < end; i++) {
        float *queries = s->q_heads + (size_t)i * q, *keys = s->k_heads + (size_t)i * k;
        s->model->kernels->rmsnorm(queries, queries, l->norm[Q_NORM], c->norm_eps, q);
        s->model->kernels->rmsnorm(keys, keys, l->norm[K_NORM], c->norm_eps, k);
    }
    meet(s, thread, REST);
}

/* turn queries and keys, store keys and values; one item is one head of one token */
static void turn_and_store(const job_t *job, int thread, int layer)
{
    dbf_session *s = job->s;
    const dbf_config *c = &s->model->config;
    const layer_t *l = &s->model->layers[layer];
    const float *q_norm = c->joint_norms ? NULL : l->norm[Q_NORM], *k_norm = c->joint_norms ? NULL : l->norm[K_NORM];
    int heads = c->n_heads + c->n_kv_heads, dim = c->head_dim, begin, end;
    pool_split(s->model->pool, thread, job->n * heads, &begin, &end);
    for (int item = begin; item < end; item++) {
        int i = item / heads, h = item % heads, pos = job->pos + i;
        if (h < c->n_heads) {
            turn(s, s->q_heads + ((size_t)i * c->n_heads + h) * dim, q_norm, l->rope, pos);
            continue;
        }
        h -= c->n_heads;
        size_t from = ((size_t)i * c->n_kv_heads + h) * dim;
        size_t to = (((size_t)layer * c->n_kv_heads + h) * s->n_ctx + pos) * s->kv_bytes;
        turn(s, s->k_heads + from, k_norm, l->rope, pos);
        narrow(s, s->k + to, s->k_heads + from);
        narrow(s, s->v + to, s->v_heads + from);
    }
    meet(s, thread, ATTENTION);
}

/* Attention of n <= QUERIES queries of one KV head: numbers first .. first + n - 1 of all that share it, which are
 * the heads of its group for one token after the other. Query q sees the positions from[q] .. held[q] - 1. Keys and
 * values pass in tiles: each is widened to float32 once, for all queries, and stays in the L1 cache meanwhile. */
static void attend(const job_t *job, scratch_t *own, int layer, int kv_head, int first, int n)
{
    dbf_session *s = job->s;
    const dbf_config *c = &s->model->config;
    const kernels_t *k = s->model->kernels;
    int dim = c->head_dim, group = c->n_heads / c->n_kv_heads, tile = tile_rows(dim);
    int window = s->model->layers[layer].window, from[QUERIES] = { 0 }, held[QUERIES] = { 0 };
    size_t at[QUERIES], cache = ((size_t)layer * c->n_kv_heads + kv_head) * s->n_ctx * s->kv_bytes;
    float factor = c->attn_scale > 0.0f ? c->attn_scale : 1.0f / sqrtf((float)dim), sum[QUERIES];
    for (int q = 0; q < n; q++) {
        int i = (first + q) / group, h = kv_head * group + (first + q) % group;
        at[q] = ((size_t)i * c->n_heads + h) * dim;
        held[q] = job->pos + i + 1;
        from[q] = window > 0 && held[q] > window ? held[q] - window : 0;
        memset(s->attended + at[q], 0, (size_t)dim * sizeof(float));
    }
    int least = from[0], most = held[n - 1];

    for (int j = least; j < most; j += tile) {
        widen(s, own->tile, s->k + cache + (size_t)j * s->kv_bytes, min_of(tile, most - j));
        for (int q = 0; q < n; q++) {
            int begin = max_of(from[q], j), count = min_of(j + tile, held[q]) - begin;
            if (count > 0)
                k->scores(own->score + (size_t)q * s->n_ctx + begin, s->q_heads + at[q],
                          own->tile + (size_t)(begin - j) * dim, factor, count, dim);
        }
    }
    for (int q = 0; q < n; q++) {
        float *score = own->score + (size_t)q * s->n_ctx + from[q];
        if (c->attn_softcap > 0.0f) k->softcap(score, c->attn_softcap, held[q] - from[q]);
        sum[q] = k->softmax(score, held[q] - from[q]);
    }
    for (int j = least; j < most; j += tile) {
        widen(s, own->tile, s->v + cache + (size_t)j * s->kv_bytes, min_of(tile, most - j));
        for (int q = 0; q < n; q++) {
            int begin = max_of(from[q], j), count = min_of(j + tile, held[q]) - begin;
            if (count > 0)
                k->mix(s->attended + at[q], own->score + (size_t)q * s->n_ctx + begin,
                       own->tile + (size_t)(begin - j) * dim, count, dim);
        }
    }
    for (int q = 0; q < n; q++) {
        float *y = s->attended + at[q], inverse = 1.0f / sum[q];
        for (int i = 0; i < dim; i++) y[i] = y[i] * inverse;
    }
}

/* attention of every query over the positions up to its own, or a window of them; queries are divided so that those of
 * a thread share as many KV heads as can be */
static void attention(const job_t *job, int thread, int layer)
{
    dbf_session *s = job->s;
    const dbf_config *c = &s->model->config;
    int sharing = job->n * (c->n_heads / c->n_kv_heads), begin, end;
    pool_split(s->model->pool, thread, c->n_kv_heads * sharing, &begin, &end);
    for (int item = begin, n; item < end; item += n) {
        int first = item % sharing;
        n = min_of(min_of(QUERIES, sharing - first), end - item);
        attend(job, &s->scratch[thread], layer, item / sharing, first, n);
    }
    meet(s, thread, ATTENTION);
}

/* y = SiLU(gate) * up, or GELU(gate) * up, or without gate GELU(up) */
static void activate(const dbf_model *m, float *y, const float *gate, const float *up, int n)
{
    const kernels_t *k = m->kernels;
    if (!gate)
        k->gelu(y, up, n);
    else
        (m->config.activation == DBF_GELU ? k->gelu_mul : k->silu_mul)(y, gate, up, n);
}

/* what down reads: divided, or a single token by every thread into its own memory */
static const float *activated(dbf_session *s, int thread, int has_gate, int n)
{
    const dbf_model *m = s->model;
    int d_ff = m->config.d_ff, begin, end;
    if (n == 1) {
        activate(m, s->scratch[thread].x, has_gate ? s->gate : NULL, s->up, d_ff);
        lap(s, thread, REST);
        return s->scratch[thread].x;
    }
    pool_split(m->pool, thread, n, &begin, &end);
    for (int i = begin; i < end; i++) {
        float *gate = s->gate + (size_t)i * d_ff;
        activate(m, gate, has_gate ? gate : NULL, s->up + (size_t)i * d_ff, d_ff);
    }
    meet(s, thread, REST);
    return s->gate;
}

/* x += branch, which in some models is normalized or scaled first; divided by tokens */
static void add_branch(dbf_session *s, int thread, float *branch, const float *norm, int n)
{
    const dbf_model *m = s->model;
    int d = m->config.d_model, begin, end;
    pool_split(m->pool, thread, n, &begin, &end);
    for (int i = begin; i < end; i++) {
        float *own = branch + (size_t)i * d;
        if (norm) m->kernels->rmsnorm(own, own, norm, m->config.norm_eps, d);
        if (m->config.residual_scale != 1.0f) m->kernels->scale(own, m->config.residual_scale, d);
        m->kernels->add(s->x + (size_t)i * d, own, d);
    }
    meet(s, thread, REST);
}

/* x += w(y); in some models, w(y) is normalized or scaled first */
static void add_linear(dbf_session *s, int thread, const linear_t *w, const float *y, const float *norm, int n)
{
    int plain = !norm && s->model->config.residual_scale == 1.0f;
    linears(s, thread, (apply_t[]){ { w, y, plain ? s->x : s->norm, plain } }, 1, n);
    if (!plain) add_branch(s, thread, s->norm, norm, n);
}

/* the experts with the largest p[n_experts], of equals the first, in ascending order, and their shares p / total, or p
 * divided by the sum of theirs */
static void choose(const dbf_config *c, int32_t *used, float *share, const float *p, float total)
{
    int n = 0;
    float sum = 0.0f;
    for (int e = 0; e < c->n_experts; e++) {
        int i = n;
        while (i > 0 && p[e] > p[used[i - 1]]) i--;
        if (i == c->n_experts_used) continue;
        if (n < c->n_experts_used) n++;
        for (int j = n - 1; j > i; j--) used[j] = used[j - 1];
        used[i] = e;
    }
    for (int i = 1; i < n; i++)
        for (int j = i; j > 0 && used[j - 1] > used[j]; j--) {
            int32_t e = used[j];
            used[j] = used[j - 1];
            used[j - 1] = e;
        }
    for (int i = 0; i < n; i++) sum = sum + p[used[i]];
    for (int i = 0; i < n; i++) share[i] = p[used[i]] / (c->norm_experts ? sum : total);
}

/* which experts each of n tokens uses, their shares and rows: divided by tokens, the router by experts for a single one */
static void route(dbf_session *s, int thread, const layer_t *l, const float *x, int n)
{
    const dbf_model *m = s->model;
    const dbf_config *c = &m->config;
    int all = c->n_experts, some = c->n_experts_used, d = c->d_model, begin, end;
    pool_split(m->pool, thread, n == 1 ? all : n, &begin, &end);
    if (n == 1)
        m->kernels->gemv_f32(s->routed + begin, l->router + (size_t)begin * d, x, 1, end - begin, d);
    else
        m->kernels->gemv_f32(s->routed + (size_t)begin * all, l->router, x + (size_t)begin * d, end - begin, all, d);
    if (n == 1) meet(s, thread, REST);

    pool_split(m->pool, thread, n, &begin, &end);
    for (int i = begin; i < end; i++) {
        float *p = s->routed + (size_t)i * all, total = m->kernels->softmax(p, all), gate;
        choose(c, s->used + (size_t)i * some, s->share + (size_t)i * some, p, total);
        s->shared[i] = 1.0f;
        if (!l->shared_gate) continue;
        m->kernels->gemv_f32(&gate, l->shared_gate, x + (size_t)i * d, 1, 1, d);
        s->shared[i] = 1.0f / (1.0f + exp_f32(-gate));
    }
    meet(s, thread, REST);

    if (thread == 0) { /* the rows of an expert follow each other, in the order of the tokens */
        memset(s->first_row, 0, ((size_t)all + 1) * sizeof *s->first_row);
        for (int i = 0; i < n * some; i++) s->first_row[s->used[i]]++;
        for (int e = 1; e <= all; e++) s->first_row[e] += s->first_row[e - 1];
        for (int i = n * some - 1; i >= 0; i--) s->row[i] = --s->first_row[s->used[i]];
    }
    meet(s, thread, REST);
}

/* rows of picked = Down (SiLU(Gate x) * Up x) of the experts that n tokens use. Those of a single token, which has rows
 * in the order of its experts, are computed together; of many tokens, those of one expert after the other. */
static void experts(dbf_session *s, int thread, const layer_t *l, const float *x, int n)
{
    const dbf_model *m = s->model;
    const dbf_config *c = &m->config;
    int all = c->n_experts, some = c->n_experts_used, begin, end;
    size_t d = (size_t)c->d_model, wide = (size_t)c->d_expert;
    apply_t p[2 * MAX_USED];
    route(s, thread, l, x, n);

    if (n > 1) {
        pool_split(m->pool, thread, n * some, &begin, &end);
        for (int i = begin; i < end; i++) memcpy(s->picked + s->row[i] * d, x + i / some * d, d * sizeof *x);
        meet(s, thread, REST);
    }
    for (int e = 0, count = 0; e < all; e++) {
        int row = s->first_row[e], rows = s->first_row[e + 1] - row;
        if (rows == 0) continue;
        const linear_t *w = l->experts + e * EXPERT_LINEARS;
        const float *from = n == 1 ? x : s->picked + row * d;
        p[count++] = (apply_t){ &w[EXPERT_GATE], from, s->expert_gate + row * wide, 0 };
        p[count++] = (apply_t){ &w[EXPERT_UP], from, s->expert_up + row * wide, 0 };
        if (n == 1 && count < 2 * some) continue;
        linears(s, thread, p, count, rows);
        count = 0;
    }

    pool_split(m->pool, thread, n * some, &begin, &end);
    for (int i = begin; i < end; i++) {
        float *gate = s->expert_gate + i * wide;
        activate(m, gate, gate, s->expert_up + i * wide, c->d_expert);
    }
    meet(s, thread, REST);

    for (int e = 0, count = 0; e < all; e++) {
        int row = s->first_row[e], rows = s->first_row[e + 1] - row;
        if (rows == 0) continue;
        const linear_t *w = l->experts + e * EXPERT_LINEARS;
        p[count++] = (apply_t){ &w[EXPERT_DOWN], s->expert_gate + row * wide, s->picked + row * d, 0 };
        if (n == 1 && count < some) continue;
        linears(s, thread, p, count, rows);
        count = 0;
    }
}

/* x += sum_e share_e * expert_e, and that of the shared expert, whose output is `shared` unless that is NULL */
static void add_experts(dbf_session *s, int thread, const float *shared, const float *norm, int n)
{
    const dbf_model *m = s->model;
    int some = m->config.n_experts_used, begin, end;
    size_t d = (size_t)m->config.d_model;
    pool_split(m->pool, thread, n, &begin, &end); /* as in add_branch */
    for (int i = begin; i < end; i++) {
        float *branch = s->branch + i * d;
        memset(branch, 0, d * sizeof *branch);
        for (int j = i * some; j < (i + 1) * some; j++)
            m->kernels->mix(branch, s->share + j, s->picked + s->row[j] * d, 1, m->config.d_model);
        if (shared) m->kernels->mix(branch, s->shared + i, shared + i * d, 1, m->config.d_model);
    }
    add_branch(s, thread, s->branch, norm, n);
}

/* feed-forward and experts, added to the residual stream */
static void feed_forward(dbf_session *s, int thread, const layer_t *l, int n)
{
    const float *x = norms(s, thread, l->norm[FFN_NORM], l->norm[FFN_NORM_BIAS], 0, n);
    const apply_t gate = { &l->linear[GATE], x, s->gate, 0 }, up = { &l->linear[UP], x, s->up, 0 };
    int has_gate = l->linear[GATE].rows > 0, has_up = l->linear[UP].rows > 0;
    if (l->experts) experts(s, thread, l, x, n);
    if (has_up) {
        linears(s, thread, has_gate ? (apply_t[]){ gate, up } : &up, has_gate ? 2 : 1, n);
        x = activated(s, thread, has_gate, n);
    }
    if (!l->experts) {
        add_linear(s, thread, &l->linear[DOWN], x, l->norm[FFN_POST_NORM], n);
        return;
    }
    if (has_up) linears(s, thread, (apply_t[]){ { &l->linear[DOWN], x, s->norm, 0 } }, 1, n);
    add_experts(s, thread, has_up ? s->norm : NULL, l->norm[FFN_POST_NORM], n);
}

/* Logits of n tokens whose normalized states are x. Rows of the head are shared, panel by panel: one is read from
 * memory once, whatever n is, and once from the cache for DBF_BATCH tokens. */
static void head_logits(const job_t *job, int thread, const float *x, int n)
{
    dbf_session *s = job->s;
    const dbf_model *m = s->model;
    const kernels_t *k = m->kernels;
    const dbf_dense *w = &m->head;
    int16_t *q = n == 1 ? s->scratch[thread].q : s->q_out;
    float own_scale, *scale = n == 1 ? &own_scale : s->q_scale;
    int begin, end;
    size_t cols = (size_t)w->cols, vocab = (size_t)w->rows;
    if (dense_takes_integers(w->type)) {
        if (n == 1)
            begin = 0, end = 1;
        else
            pool_split(m->pool, thread, n, &begin, &end);
        for (int i = begin; i < end; i++) scale[i] = k->quantize(q + i * cols, x + i * cols, w->cols);
        if (n > 1) meet(s, thread, HEAD);
    }
    pool_share(m->pool, thread, panels_of(w->rows));
    for (int panel; (panel = pool_take(m->pool, thread)) >= 0;) {
        int r = panel * DBF_PANEL, rows = min_of(DBF_PANEL, w->rows - r);
        for (int i = 0; i < n; i += DBF_BATCH) {
            float y[DBF_BATCH * DBF_PANEL];
            int some = min_of(DBF_BATCH, n - i);
            dense_gemv(k, y, w, r, rows, x + i * cols, q + i * cols, scale + i, some);
            if (m->config.logit_scale != 1.0f) k->scale(y, m->config.logit_scale, some * rows);
            if (m->config.logit_softcap > 0.0f) k->softcap(y, m->config.logit_softcap, some * rows);
            for (int j = 0; j < some; j++)
                memcpy(job->logits + (i + j) * vocab + r, y + j * rows, (size_t)rows * sizeof *y);
        }
    }
    lap(s, thread, HEAD); /* pool_run's own barrier ends the pass */
}

static void forward(void *arg, int thread)
{
    const job_t *job = arg;
    dbf_session *s = job->s;
    const dbf_model *m = s->model;
    int n = job->n, begin, end;

    lap(s, thread, BARRIERS);

    /* embedding */
    pool_split(m->pool, thread, n, &begin, &end);
    for (int i = begin; i < end; i++) {
        float *x = s->x + (size_t)i * m->config.d_model;
        dense_row(m->kernels, x, &m->embed, job->tokens[i]);
        if (m->config.embed_scale != 1.0f) m->kernels->scale(x, m->config.embed_scale, m->config.d_model);
        const float *position = m->positions ? m->positions + (size_t)(job->pos + i) * m->config.d_model : NULL;
        if (position) m->kernels->add(x, position, m->config.d_model);
    }
    meet(s, thread, REST);

    for (int layer = 0; layer < m->config.n_layers; layer++) {
        const layer_t *l = &m->layers[layer];

        /* queries, keys, values */
        const float *x = norms(s, thread, l->norm[ATTN_NORM], l->norm[ATTN_NORM_BIAS], 0, n);
        linears(s, thread,
                (apply_t[]){ { &l->linear[Q], x, s->q_heads, 0 },
                             { &l->linear[K], x, s->k_heads, 0 },
                             { &l->linear[V], x, s->v_heads, 0 } },
                3, n);

        /* norms of queries and keys, RoPE, KV cache */
        joint_norms(job, thread, l);
        turn_and_store(job, thread, layer);

        /* attention, added to the residual stream */
        attention(job, thread, layer);
        add_linear(s, thread, &l->linear[O], s->attended, l->norm[ATTN_POST_NORM], n);

        /* feed-forward, added to the residual stream */
        feed_forward(s, thread, l, n);
    }

    /* logits */
    if (job->first < n)
        head_logits(job, thread, norms(s, thread, m->out_norm, m->out_norm_bias, job->first, n), n - job->first);
}

int dbf_forward(dbf_session *s, const int32_t *tokens, int n, int pos, float *logits, int n_logits)
{
    int skip = n - n_logits; /* tokens without logits */
    if (s->timed) s->lap = clock_ns();
    for (int done = 0; done < n; done += CHUNK) {
        job_t job = { .s = s, .tokens = tokens + done, .n = n - done < CHUNK ? n - done : CHUNK, .pos = pos + done };
        job.first = skip <= done ? 0 : skip - done < job.n ? skip - done : job.n;
        int row = done + job.first > skip ? done + job.first - skip : 0; /* of logits */
        job.logits = logits + (size_t)row * s->model->config.n_vocab;
        int code = pool_run(s->model->pool, forward, &job);
        if (code) return code;
        lap(s, 0, BARRIERS);
        s->held = pos + done + job.n;
    }
    return DBF_OK;
}
