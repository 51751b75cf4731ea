/* model.c - the C API: check everything, repack the weights, hand out memory. */
#define _GNU_SOURCE
#include "model.h"

#include "dense.h"

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_DIM DBF_MAX_COLS
#define MAX_LAYERS 4096
#define MAX_VOCAB (1 << 24)
#define MAX_CTX (1 << 24)
#define MAX_ROPES 16
#define MAX_THREADS 1024
#define ALIGN 64

static int max_of(int a, int b)
{
    return a > b ? a : b;
}

static size_t round_up(size_t n)
{
    return (n + ALIGN - 1) / ALIGN * ALIGN;
}

/* ---- checks ----------------------------------------------------------------------------------------------- */

static int dim_ok(int n)
{
    return n >= 1 && n <= MAX_DIM;
}

static int number_ok(float x)
{
    return x >= 0.0f && isfinite(x);
}

static int experts_ok(const dbf_config *c)
{
    if (c->n_experts == 0) return 1;
    return c->n_experts >= 1 && c->n_experts <= MAX_EXPERTS && c->n_experts_used >= 1 && c->n_experts_used <= MAX_USED
        && c->n_experts_used <= c->n_experts && dim_ok(c->d_expert) && (c->norm_experts == 0 || c->norm_experts == 1);
}

static int config_ok(const dbf_config *c)
{
    return c->n_layers >= 1 && c->n_layers <= MAX_LAYERS && dim_ok(c->d_model) && dim_ok(c->d_ff)
        && dim_ok(c->n_heads) && dim_ok(c->n_kv_heads) && c->n_heads % c->n_kv_heads == 0 && dim_ok(c->head_dim)
        && c->n_heads <= MAX_DIM / c->head_dim && c->n_vocab >= 1 && c->n_vocab <= MAX_VOCAB && c->rope_dims >= 0
        && c->rope_dims % 2 == 0 && c->rope_dims <= c->head_dim
        && (c->rope_pairing == DBF_ADJACENT || c->rope_pairing == DBF_HALVES) && number_ok(c->norm_eps)
        && (c->norm == DBF_RMS || c->norm == DBF_LAYER) && c->n_positions >= 0
        && (c->activation == DBF_SILU || c->activation == DBF_GELU) && isfinite(c->embed_scale) && experts_ok(c)
        && isfinite(c->residual_scale) && isfinite(c->logit_scale) && (c->joint_norms == 0 || c->joint_norms == 1)
        && number_ok(c->attn_scale) && number_ok(c->attn_softcap) && number_ok(c->logit_softcap);
}

static int dense_ok(const dbf_dense *d, int rows, int cols)
{
    return d->data && d->rows == rows && d->cols == cols && dense_row_bytes(d->type, cols) > 0;
}

static int linear_ok(const dbf_linear *l, int rows, int cols)
{
    return l->rows == rows && l->cols == cols && dim_ok(l->rank) && l->rank % 8 == 0 && l->a && l->b && l->s_out
        && l->s_mid && l->s_in;
}

/* there is one, or the activation is one that does without */
static int gate_ok(const dbf_linear *l, const dbf_config *c)
{
    return l->rows == 0 ? c->activation == DBF_GELU : linear_ok(l, c->d_ff, c->d_model);
}

/* gate, up and down: of all tokens, or of a shared expert, which there need not be */
static int feed_forward_ok(const dbf_layer *l, const dbf_config *c)
{
    if (c->n_experts && l->up.rows == 0) return l->gate.rows == 0 && l->down.rows == 0;
    return gate_ok(&l->gate, c) && linear_ok(&l->up, c->d_ff, c->d_model) && linear_ok(&l->down, c->d_model, c->d_ff);
}

static int layer_experts_ok(const dbf_layer *l, const dbf_config *c)
{
    if (!c->n_experts) return !l->experts && !l->router && !l->shared_gate;
    if (!l->experts || !l->router) return 0;
    const dbf_linear *e = l->experts;
    for (int i = 0; i < c->n_experts; i++, e += EXPERT_LINEARS)
        if (!linear_ok(&e[EXPERT_GATE], c->d_expert, c->d_model) || !linear_ok(&e[EXPERT_UP], c->d_expert, c->d_model)
            || !linear_ok(&e[EXPERT_DOWN], c->d_model, c->d_expert))
            return 0;
    return 1;
}

static int weights_ok(const dbf_weights *w, const dbf_config *c)
{
    int heads = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    if (!w->layers || !w->out_norm || !w->positions != !c->n_positions || !dense_ok(&w->embed, c->n_vocab, c->d_model)
        || !dense_ok(&w->head, c->n_vocab, c->d_model))
        return 0;
    for (int i = 0; i < c->n_layers; i++) {
        const dbf_layer *l = &w->layers[i];
        if (!l->q_norm != !l->k_norm || l->window < 0 || l->rope < -1
            || l->rope >= MAX_ROPES || !linear_ok(&l->q, heads, c->d_model)
            || !linear_ok(&l->k, kv, c->d_model) || !linear_ok(&l->v, kv, c->d_model)
            || !linear_ok(&l->o, c->d_model, heads) || !feed_forward_ok(l, c) || !layer_experts_ok(l, c))
            return 0;
    }
    return 1;
}

/* one of the norms of a layer, or a bias of one, NULL if it lacks it, and how many numbers it has */
static const float *norm_of(const dbf_layer *l, int i)
{
    const float *norms[N_NORMS] = {
        [ATTN_NORM] = l->attn_norm, [FFN_NORM] = l->ffn_norm,
        [Q_NORM] = l->q_norm, [K_NORM] = l->k_norm,
        [ATTN_POST_NORM] = l->attn_post_norm, [FFN_POST_NORM] = l->ffn_post_norm,
        [ATTN_NORM_BIAS] = l->attn_norm_bias, [FFN_NORM_BIAS] = l->ffn_norm_bias,
    };
    return norms[i];
}

static size_t norm_bytes(const dbf_config *c, int i)
{
    int heads = i == Q_NORM ? c->n_heads : c->n_kv_heads;
    int n = i == Q_NORM || i == K_NORM ? c->head_dim * (c->joint_norms ? heads : 1) : c->d_model;
    return (size_t)n * sizeof(float);
}

/* ---- model ------------------------------------------------------------------------------------------------ */

/* linear layers of a layer: those of all tokens, then those of the experts */
static int linears_of(const dbf_config *c)
{
    return N_LINEARS + EXPERT_LINEARS * c->n_experts;
}

/* number i of them, as it is given and as it is kept */
static const dbf_linear *given(const dbf_layer *l, int i)
{
    return i < N_LINEARS ? &l->q + i : l->experts + (i - N_LINEARS);
}

static linear_t *kept(layer_t *l, int i)
{
    return i < N_LINEARS ? &l->linear[i] : l->experts + (i - N_LINEARS);
}

typedef struct packing {
    dbf_model *model;
    const dbf_weights *weights;
    atomic_int next; /* linear layer to do */
} packing_t;

/* advise the system about the pages that lie wholly between begin and end */
static void advise(const uint8_t *begin, const uint8_t *end, int advice)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), from = ((uintptr_t)begin + page - 1) / page * page;
    uintptr_t to = (uintptr_t)end / page * page;
    if (from < to) madvise((void *)from, to - from, advice);
}

void *alloc_weights(size_t bytes)
{
    uint8_t *p = aligned_alloc(ALIGN, round_up(bytes));
#ifdef MADV_HUGEPAGE
    if (p) advise(p, p + bytes, MADV_HUGEPAGE);
#endif
    return p;
}

/* Drop the pages of one layer's sign matrices and of what lies between them. All of them, each time that one matrix
 * is done: reading a page maps its neighbours too, and so brings back some of those that were dropped before. */
static void drop_layer(const dbf_layer *layer, int n_linears)
{
    const uint8_t *begin = layer->q.a, *end = layer->q.a;
    for (int i = 0; i < n_linears; i++) {
        const dbf_linear *l = given(layer, i);
        if (l->rows == 0) continue;
        const uint8_t *a_end = l->a + (size_t)l->rows * (size_t)(l->rank / 8);
        const uint8_t *b_end = l->b + (size_t)l->rank * (size_t)((l->cols + 7) / 8);
        begin = l->a < begin ? l->a : begin;
        begin = l->b < begin ? l->b : begin;
        end = a_end > end ? a_end : end;
        end = b_end > end ? b_end : end;
    }
#ifdef MADV_DONTNEED
    advise(begin, end, MADV_DONTNEED);
#endif
}

static void copy(const void *to, const void *from, size_t bytes)
{
    memcpy((void *)to, from, bytes);
}

static void pack_some(void *arg, int thread)
{
    (void)thread;
    packing_t *p = arg;
    const kernels_t *k = p->model->kernels;
    int n = linears_of(&p->model->config);
    for (int i; (i = atomic_fetch_add(&p->next, 1)) < p->model->config.n_layers * n;) {
        const dbf_layer *layer = &p->weights->layers[i / n];
        const dbf_linear *from = given(layer, i % n);
        const linear_t *to = kept(&p->model->layers[i / n], i % n);
        if (from->rows == 0) continue;
        copy(to->s_out, from->s_out, (size_t)from->rows * sizeof *from->s_out);
        copy(to->s_mid, from->s_mid, (size_t)from->rank * sizeof *from->s_mid);
        copy(to->s_in, from->s_in, (size_t)from->cols * sizeof *from->s_in);
        if (from->bias) copy(to->bias, from->bias, (size_t)from->rows * sizeof *from->bias);
        if (to->a == from->a) continue; /* the kernels read DBF1 as it is */
        k->sign_pack((uint8_t *)to->a, from->a, from->rows, from->rank);
        k->sign_pack((uint8_t *)to->b, from->b, from->rank, from->cols);
        if (p->weights->mapped) drop_layer(layer, n);
    }
}

/* the next part of model->packed; NULL while that is only being measured */
static void *place(const dbf_model *m, size_t *used, size_t bytes)
{
    void *p = m->packed ? m->packed + *used : NULL;
    *used += round_up(bytes);
    return p;
}

/* fill in model->layers, with pointers into model->packed; returns the bytes that it has or needs */
static size_t lay_out(dbf_model *m, const dbf_weights *w)
{
    const kernels_t *k = m->kernels;
    size_t used = 0;
    int n = linears_of(&m->config);
    for (int i = 0; i < m->config.n_layers * n; i++) {
        const dbf_linear *from = given(&w->layers[i / n], i % n);
        linear_t *to = kept(&m->layers[i / n], i % n);
        if (from->rows == 0) continue; /* no gate, or no shared expert */
        size_t a_bytes = k->sign_pack_bytes(from->rows, from->rank);
        size_t b_bytes = k->sign_pack_bytes(from->rank, from->cols);
        *to = (linear_t){ .rows = from->rows, .rank = from->rank, .cols = from->cols };
        to->b = b_bytes ? place(m, &used, b_bytes) : from->b;
        to->a = a_bytes ? place(m, &used, a_bytes) : from->a;
        to->s_in = place(m, &used, (size_t)from->cols * sizeof *to->s_in);
        to->s_mid = place(m, &used, (size_t)from->rank * sizeof *to->s_mid);
        to->s_out = place(m, &used, (size_t)from->rows * sizeof *to->s_out);
        if (from->bias) to->bias = place(m, &used, (size_t)from->rows * sizeof *to->bias);
        m->max_rank = max_of(m->max_rank, from->rank);
        m->max_dim = max_of(m->max_dim, max_of(from->rows, from->cols));
    }
    for (int i = 0; i < m->config.n_layers; i++) {
        m->layers[i].window = w->layers[i].window;
        m->layers[i].rope = w->layers[i].rope;
        m->layers[i].router = w->layers[i].router;
        m->layers[i].shared_gate = w->layers[i].shared_gate;
        m->n_ropes = max_of(m->n_ropes, w->layers[i].rope + 1);
        for (int j = 0; j < N_NORMS; j++)
            if (norm_of(&w->layers[i], j)) m->layers[i].norm[j] = place(m, &used, norm_bytes(&m->config, j));
    }
    m->out_norm = place(m, &used, norm_bytes(&m->config, ATTN_NORM));
    if (w->out_norm_bias) m->out_norm_bias = place(m, &used, norm_bytes(&m->config, ATTN_NORM));
    return used;
}

static int fill_model(dbf_model *m, const dbf_weights *w, int n_threads)
{
    int code = pool_new(&m->pool, n_threads);
    if (code) return code;
    m->layers = calloc((size_t)m->config.n_layers, sizeof *m->layers);
    size_t expert_linears = (size_t)m->config.n_experts * EXPERT_LINEARS;
    m->experts = calloc((size_t)m->config.n_layers * expert_linears + 1, sizeof *m->experts);
    if (!m->layers || !m->experts) return DBF_ENOMEM;
    for (int i = 0; i < m->config.n_layers && expert_linears; i++) m->layers[i].experts = m->experts + i * expert_linears;
    size_t bytes = lay_out(m, w);
    m->packed = alloc_weights(bytes);
    if (!m->packed) return DBF_ENOMEM;
    lay_out(m, w);
    for (int i = 0; i < m->config.n_layers; i++)
        for (int j = 0; j < N_NORMS; j++) {
            const float *from = norm_of(&w->layers[i], j);
            if (from) copy(m->layers[i].norm[j], from, norm_bytes(&m->config, j));
        }
    copy(m->out_norm, w->out_norm, norm_bytes(&m->config, ATTN_NORM));
    if (w->out_norm_bias) copy(m->out_norm_bias, w->out_norm_bias, norm_bytes(&m->config, ATTN_NORM));
    packing_t packing = { .model = m, .weights = w };
    return pool_run(m->pool, pack_some, &packing);
}

int dbf_model_new(dbf_model **out, const dbf_config *config, const dbf_weights *weights, int n_threads)
{
    if (!out || !config || !weights || n_threads < 1 || n_threads > MAX_THREADS || !config_ok(config)
        || !weights_ok(weights, config))
        return DBF_EINVAL;
    const kernels_t *kernels = dbf_kernels_active();
    if (!kernels) return DBF_EISA;
    dbf_model *m = calloc(1, sizeof *m);
    if (!m) return DBF_ENOMEM;
    m->config = *config;
    m->kernels = kernels;
    m->embed = weights->embed;
    m->head = weights->head;
    m->positions = weights->positions;
    int code = fill_model(m, weights, n_threads);
    if (code)
        dbf_model_free(m);
    else
        *out = m;
    return code;
}

void dbf_model_free(dbf_model *m)
{
    if (!m) return;
    pool_free(m->pool);
    free(m->packed);
    free(m->layers);
    free(m->experts);
    free(m);
}

/* ---- session ---------------------------------------------------------------------------------------------- */

/* the next part of the arena; NULL while only counting */
static void *part(dbf_session *s, size_t *used, size_t bytes)
{
    uint8_t *p = s->arena ? s->arena + *used : NULL;
    *used += round_up(bytes);
    return p;
}

static void lay_out_experts(dbf_session *s, size_t *used)
{
    const dbf_config *c = &s->model->config;
    size_t rows = (size_t)CHUNK * c->n_experts_used, f = sizeof(float);
    s->routed = part(s, used, (size_t)CHUNK * c->n_experts * f);
    s->used = part(s, used, rows * sizeof *s->used);
    s->share = part(s, used, rows * f);
    s->row = part(s, used, rows * sizeof *s->row);
    s->first_row = part(s, used, ((size_t)c->n_experts + 1) * sizeof *s->first_row);
    s->shared = part(s, used, CHUNK * f);
    s->picked = part(s, used, rows * c->d_model * f);
    s->expert_gate = part(s, used, rows * c->d_expert * f);
    s->expert_up = part(s, used, rows * c->d_expert * f);
    s->branch = part(s, used, (size_t)CHUNK * c->d_model * f);
}

static size_t lay_out_session(dbf_session *s)
{
    const dbf_model *m = s->model;
    const dbf_config *c = &m->config;
    size_t used = 0, f = sizeof(float), heads = (size_t)c->n_heads * c->head_dim;
    size_t kv = (size_t)c->n_kv_heads * c->head_dim, wide = (size_t)max_of(m->max_dim, m->max_rank);
    s->table_bytes = round_up(m->kernels->sign_table_bytes((int)wide));
    s->rope = part(s, &used, (size_t)m->n_ropes * s->n_ctx * c->rope_dims * f);
    s->k = part(s, &used, (size_t)c->n_layers * c->n_kv_heads * s->n_ctx * s->kv_bytes);
    s->v = part(s, &used, (size_t)c->n_layers * c->n_kv_heads * s->n_ctx * s->kv_bytes);
    s->x = part(s, &used, CHUNK * c->d_model * f);
    s->norm = part(s, &used, CHUNK * c->d_model * f);
    s->q_heads = part(s, &used, CHUNK * heads * f);
    s->attended = part(s, &used, CHUNK * heads * f);
    s->k_heads = part(s, &used, CHUNK * kv * f);
    s->v_heads = part(s, &used, CHUNK * kv * f);
    s->gate = part(s, &used, (size_t)CHUNK * c->d_ff * f);
    s->up = part(s, &used, (size_t)CHUNK * c->d_ff * f);
    if (c->n_experts) lay_out_experts(s, &used);
    s->mid = part(s, &used, (size_t)TOGETHER * CHUNK * m->max_rank * f);
    size_t together = (size_t)TOGETHER * (size_t)max_of(c->d_model, m->max_rank), one = (size_t)m->max_dim;
    s->q_many = part(s, &used, CHUNK * (together > one ? together : one) * sizeof *s->q_many);
    s->in_scale = part(s, &used, TOGETHER * CHUNK * f);
    s->tables = part(s, &used, DBF_FEW * s->table_bytes);
    s->q_out = part(s, &used, (size_t)CHUNK * c->d_model * sizeof *s->q_out);
    s->q_scale = part(s, &used, CHUNK * f);
    for (int t = 0; t < pool_threads(m->pool); t++) {
        scratch_t *own = &s->scratch[t];
        own->x = part(s, &used, wide * f);
        own->scaled = part(s, &used, wide * f);
        own->tile = part(s, &used, (size_t)tile_rows(c->head_dim) * c->head_dim * f);
        own->score = part(s, &used, (size_t)QUERIES * s->n_ctx * f);
        own->q = part(s, &used, wide * sizeof *own->q);
        own->table = part(s, &used, s->table_bytes);
        own->strip = part(s, &used, (size_t)m->max_dim * DBF_STRIP * f);
        own->isum = part(s, &used, DBF_GEMM_ROWS * DBF_BLOCK * sizeof *own->isum);
        own->work = part(s, &used, (DBF_GEMM_ROWS + 2) * DBF_BLOCK * sizeof *own->work);
    }
    return used;
}

int dbf_session_new(dbf_session **out, dbf_model *model, int n_ctx, const float *rope, int kv_type,
                    int activation_bits)
{
    if (!out || !model || n_ctx < 1 || n_ctx > MAX_CTX
        || (model->config.n_positions && n_ctx > model->config.n_positions)
        || (!rope && model->config.rope_dims > 0 && model->n_ropes > 0)
        || (kv_type != DBF_F16 && kv_type != DBF_Q8_0) || !dense_row_bytes(kv_type, model->config.head_dim)
        || (activation_bits != 16 && activation_bits != 8))
        return DBF_EINVAL;
    dbf_session *s = calloc(1, sizeof *s);
    if (!s) return DBF_ENOMEM;
    s->model = model;
    s->n_ctx = n_ctx;
    s->kv_type = kv_type;
    s->kv_bytes = dense_row_bytes(kv_type, model->config.head_dim);
    s->qmax = activation_bits == 8 ? DBF_QMAX8 : DBF_QMAX;
    s->scratch = calloc((size_t)pool_threads(model->pool), sizeof *s->scratch);
    size_t bytes = s->scratch ? lay_out_session(s) : 0;
    s->arena = bytes ? aligned_alloc(ALIGN, bytes) : NULL;
    if (!s->arena) {
        dbf_session_free(s);
        return DBF_ENOMEM;
    }
    lay_out_session(s);
    if (rope) memcpy(s->rope, rope, (size_t)model->n_ropes * n_ctx * model->config.rope_dims * sizeof *rope);
    *out = s;
    return DBF_OK;
}

void dbf_session_free(dbf_session *s)
{
    if (!s) return;
    free(s->arena);
    free(s->scratch);
    free(s);
}

int dbf_eval(dbf_session *s, const int32_t *tokens, int n, int pos, float *logits, int n_logits)
{
    if (!s || !tokens || n < 1 || pos < 0 || pos > s->held || n_logits < 0 || n_logits > n || (n_logits && !logits))
        return DBF_EINVAL;
    for (int i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= s->model->config.n_vocab) return DBF_EINVAL;
    if (n > s->n_ctx - pos) return DBF_ECONTEXT;
    return dbf_forward(s, tokens, n, pos, logits, n_logits);
}

const char *dbf_stage_name(int i)
{
    static const char *const names[DBF_STAGES] = {
        [REST] = "embedding, norms, SiLU", [TABLES] = "quantization, tables", [SIGNS_B] = "sign products B",
        [SIGNS_A] = "sign products A",     [ATTENTION] = "RoPE, attention",   [HEAD] = "head",
        [BARRIERS] = "barriers",
    };
    return i >= 0 && i < DBF_STAGES ? names[i] : NULL;
}

int dbf_stages_start(dbf_session *s)
{
    if (!s) return DBF_EINVAL;
    memset(s->spent, 0, sizeof s->spent);
    s->timed = 1;
    return DBF_OK;
}

int dbf_stages_stop(dbf_session *s, double *seconds)
{
    if (!s || !seconds || !s->timed) return DBF_EINVAL;
    for (int i = 0; i < DBF_STAGES; i++) seconds[i] = 1e-9 * (double)s->spent[i];
    s->timed = 0;
    return DBF_OK;
}

/* ---- the rest --------------------------------------------------------------------------------------------- */

const char *dbf_strerror(int code)
{
    switch (code) {
    case DBF_OK: return "no error";
    case DBF_EINVAL: return "a null pointer, or a size, token or position out of range";
    case DBF_ENOMEM: return "out of memory";
    case DBF_ECONTEXT: return "position + tokens exceed the context";
    case DBF_EISA: return "this CPU lacks the instruction set asked for, or its self-test failed";
    case DBF_ETHREAD: return "a thread could not be started, or the process was forked since";
    default: return "unknown error";
    }
}

#ifdef __linux__
/* the first CPU number in a file such as "0,4" or "0-1"; -1 if there is none */
static int first_sibling(int cpu)
{
    char path[96];
    int first = -1;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    FILE *f = fopen(path, "r");
    if (!f) return -1;
    if (fscanf(f, "%d", &first) != 1) first = -1;
    fclose(f);
    return first;
}
#endif

int dbf_default_threads(void)
{
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    int cores = online > 0 ? (int)online : 1;
#ifdef __linux__
    cpu_set_t set, seen;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        cores = 0;
        CPU_ZERO(&seen);
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
            if (!CPU_ISSET(cpu, &set)) continue;
            int core = first_sibling(cpu);
            if (core < 0 || core >= CPU_SETSIZE) core = cpu;
            if (!CPU_ISSET(core, &seen)) cores++;
            CPU_SET(core, &seen);
        }
    }
#endif
    return cores < 1 ? 1 : cores > MAX_THREADS ? MAX_THREADS : cores;
}

/* weights, activations and result of one sign product as the active kernels want them, or NULL */
typedef struct product {
    const kernels_t *k;
    uint8_t *memory, *w;
    const uint8_t *bits;
    void *table;
    int32_t isum[DBF_PANEL];
} product_t;

static int product_new(product_t *p, const uint8_t *bits, const int16_t *q, int rows, int cols)
{
    if (!bits || !q || rows < 1 || rows > MAX_VOCAB || !dim_ok(cols)) return DBF_EINVAL;
    p->k = dbf_kernels_active();
    if (!p->k) return DBF_EISA;
    size_t packed = round_up(p->k->sign_pack_bytes(rows, cols));
    p->memory = aligned_alloc(ALIGN, packed + round_up(p->k->sign_table_bytes(cols)));
    if (!p->memory) return DBF_ENOMEM;
    p->table = p->memory + packed;
    p->bits = packed ? p->memory : bits;
    if (packed) p->k->sign_pack(p->memory, bits, rows, cols);
    return DBF_OK;
}

int dbf_sign_gemv(int32_t *isum, const uint8_t *bits, const int16_t *q, int rows, int cols, int activation_bits)
{
    product_t p;
    int small = activation_bits == 8, ok = isum && (small || activation_bits == 16);
    int code = ok ? product_new(&p, bits, q, rows, cols) : DBF_EINVAL;
    if (code) return code;
    (small ? p.k->sign_table8 : p.k->sign_table)(p.table, q, cols);
    size_t stride = (size_t)((cols + 7) / 8);
    for (int r = 0; r < rows; r += DBF_PANEL) {
        int some = rows - r < DBF_PANEL ? rows - r : DBF_PANEL;
        (small ? p.k->sign_gemv8 : p.k->sign_gemv)(p.isum, p.bits + (size_t)r * stride, p.table, some, cols);
        memcpy(isum + r, p.isum, (size_t)some * sizeof *isum);
    }
    free(p.memory);
    return DBF_OK;
}

/* one block: q[k][wide] from columns, isum[r][wide] to rows, DBF_GEMM_ROWS at a time */
static void multiply_block(const kernels_t *k, int32_t *isum, const uint8_t *w, const int16_t *q, void *memory,
                           int rows, int cols, int n)
{
    int wide = n > DBF_BLOCK / 2 ? DBF_BLOCK : DBF_BLOCK / 2;
    uint32_t *work = memory;
    int32_t *sums = (int32_t *)(work + (DBF_GEMM_ROWS + 2) * DBF_BLOCK);
    int16_t *side = (int16_t *)(sums + DBF_GEMM_ROWS * DBF_BLOCK);
    for (int c = 0; c < cols; c++)
        for (int i = 0; i < wide; i++) side[c * wide + i] = i < n ? q[(size_t)i * cols + c] : 0;
    for (int r = 0; r < rows; r += DBF_GEMM_ROWS) {
        int some = rows - r < DBF_GEMM_ROWS ? rows - r : DBF_GEMM_ROWS;
        k->sign_gemm(sums, w + (size_t)r * ((cols + 7) / 8), side, work, some, cols, wide);
        for (int i = 0; i < n; i++)
            for (int j = 0; j < some; j++) isum[(size_t)i * rows + r + j] = sums[j * wide + i];
    }
}

int dbf_sign_gemm(int32_t *isum, const uint8_t *bits, const int16_t *q, int rows, int cols, int n)
{
    product_t p;
    int code = isum && n >= 1 && n <= MAX_CTX ? product_new(&p, bits, q, rows, cols) : DBF_EINVAL;
    if (code) return code;
    void *memory = malloc((2 * DBF_GEMM_ROWS + 2) * DBF_BLOCK * sizeof *isum + (size_t)cols * DBF_BLOCK * sizeof *q);
    for (int i = 0; memory && i < n; i += DBF_BLOCK)
        multiply_block(p.k, isum + (size_t)i * rows, p.bits, q + (size_t)i * cols, memory, rows, cols,
                       n - i < DBF_BLOCK ? n - i : DBF_BLOCK);
    free(memory);
    free(p.memory);
    return memory ? DBF_OK : DBF_ENOMEM;
}

int dbf_quantize(int16_t *q, float *scale, const float *x, int n)
{
    if (!q || !scale || !x || n < 1) return DBF_EINVAL;
    const kernels_t *k = dbf_kernels_active();
    if (!k) return DBF_EISA;
    *scale = k->quantize(q, x, n);
    return DBF_OK;
}

int dbf_dense_gemv(float *y, const dbf_dense *w, const float *x, int n)
{
    if (!y || !w || !x || w->rows < 1 || !dim_ok(w->cols) || !dense_ok(w, w->rows, w->cols) || n < 1 || n > MAX_DIM)
        return DBF_EINVAL;
    const kernels_t *k = dbf_kernels_active();
    if (!k) return DBF_EISA;
    size_t cols = (size_t)w->cols;
    int16_t *q = malloc((size_t)n * cols * sizeof *q);
    float *scale = malloc((size_t)n * sizeof *scale);
    if (q && scale) {
        for (int i = 0; i < n; i++) scale[i] = k->quantize(q + i * cols, x + i * cols, w->cols);
        dense_gemv(k, y, w, 0, w->rows, x, q, scale, n);
    }
    int code = q && scale ? DBF_OK : DBF_ENOMEM;
    free(q);
    free(scale);
    return code;
}

int dbf_dense_row(float *y, const dbf_dense *w, int r)
{
    if (!y || !w || r < 0 || r >= w->rows || !dim_ok(w->cols) || !dense_ok(w, w->rows, w->cols)) return DBF_EINVAL;
    const kernels_t *k = dbf_kernels_active();
    if (!k) return DBF_EISA;
    dense_row(k, y, w, r);
    return DBF_OK;
}
