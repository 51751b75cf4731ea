/* model.h - what dbf_model and dbf_session are made of. Private to model.c, forward.c, linear.c and bench.c. */
#ifndef DBF_MODEL_H
#define DBF_MODEL_H

#include "../dbf.h"
#include "clock.h"
#include "kernels.h"
#include "pool.h"

#define CHUNK DBF_BLOCK /* tokens that go through a layer together */
#define TOGETHER 3      /* linear layers that are computed together: q, k, v */
#define QUERIES 16      /* queries of one KV head that pass over its keys and values together */
#define MAX_EXPERTS 4096
#define MAX_USED 64     /* experts that a token uses at most; a token alone passes gate and up of all of them together */

/* positions whose keys or values are float32 at a time: 16 KiB of them, and whole groups of DBF_LANES */
static inline int tile_rows(int head_dim)
{
    int rows = 4096 / head_dim / DBF_LANES * DBF_LANES;
    return rows > DBF_LANES ? rows : DBF_LANES;
}

/* one linear layer; a and b as kernels_t.sign_gemv wants them, the rest copied */
typedef struct linear {
    int rows, rank, cols;
    const uint8_t *a, *b;
    const uint16_t *s_out, *s_mid, *s_in;
    const float *bias;
} linear_t;

/* memory for free(), on large pages where the system has them: every token reads all of it, and with fewer pages, fewer
 * of their addresses must be looked up */
void *alloc_weights(size_t bytes);

enum { Q, K, V, O, GATE, UP, DOWN, N_LINEARS };
enum { EXPERT_GATE, EXPERT_UP, EXPERT_DOWN, EXPERT_LINEARS };
enum { ATTN_NORM, FFN_NORM, Q_NORM, K_NORM, ATTN_POST_NORM, FFN_POST_NORM, ATTN_NORM_BIAS, FFN_NORM_BIAS, N_NORMS };

typedef struct layer {
    const float *norm[N_NORMS]; /* NULL for those that it lacks */
    linear_t linear[N_LINEARS]; /* GATE may have no rows */
    int window, rope;           /* as in dbf_layer */
    const float *router, *shared_gate;
    linear_t *experts;          /* [n_experts][EXPERT_LINEARS], NULL for none */
} layer_t;

struct dbf_model {
    dbf_config config;
    const kernels_t *kernels;
    pool_t *pool;
    dbf_dense embed, head;
    const float *out_norm, *out_norm_bias, *positions;
    layer_t *layers;
    linear_t *experts;      /* of all layers */
    uint8_t *packed;        /* all a and b, repacked, and everything that is copied */
    int max_dim, max_rank;  /* of the rows and cols of all matrices; of all ranks */
    int n_ropes;            /* RoPE tables that the layers name */
};

/* work space of one thread */
typedef struct scratch {
    float *x, *scaled; /* [max_dim] and [max of max_dim, max_rank] */
    float *tile;       /* [tile_rows][head_dim] */
    float *score;      /* [QUERIES][n_ctx] */
    int16_t *q;        /* [max of max_dim, max_rank] */
    uint8_t *table;
    float *strip;      /* [max_dim][DBF_STRIP] the input of a product of many tokens */
    int32_t *isum;     /* [DBF_GEMM_ROWS][DBF_BLOCK] its sums */
    uint32_t *work;    /* [DBF_GEMM_ROWS + 2][DBF_BLOCK] */
} scratch_t;

/* the stages of dbf.h; model.c has their names */
enum { REST, TABLES, SIGNS_B, SIGNS_A, ATTENTION, HEAD, BARRIERS };

struct dbf_session {
    dbf_model *model;
    int n_ctx, held;    /* positions there is room for; positions filled */
    int qmax;           /* activations of sign products lie in -qmax .. qmax: DBF_QMAX or DBF_QMAX8 */
    float *rope;        /* [model->n_ropes][n_ctx][rope_dims/2][2] */
    int kv_type;
    size_t kv_bytes;    /* of one position of one KV head, its keys or its values */
    uint8_t *k, *v;     /* kv_type [n_layers][n_kv_heads][n_ctx][head_dim] */

    /* activations of a chunk, all [CHUNK][...] */
    float *x;                   /* [d_model] the residual stream */
    float *norm;                /* [d_model] a linear's input, or what one is to add to x */
    float *q_heads, *attended;  /* [n_heads * head_dim] */
    float *k_heads, *v_heads;   /* [n_kv_heads * head_dim] */
    float *gate, *up;           /* [d_ff] */

    /* the same of models with experts; a token has n_experts_used rows of picked, expert_gate and expert_up, and those
     * of an expert follow each other */
    float *routed;              /* [n_experts] shares of all experts, before they are divided by a sum */
    int32_t *used;              /* [n_experts_used] the experts with the largest, in ascending order */
    float *share;               /* [n_experts_used] and theirs */
    int32_t *row;               /* [n_experts_used] the rows for them */
    int32_t *first_row;         /* [n_experts + 1], only once: the first row of each expert */
    float *shared;              /* [1] share of the shared expert */
    float *picked;              /* [n_experts_used][d_model] what the experts read, then what they give */
    float *expert_gate, *expert_up; /* [n_experts_used][d_expert] */
    float *branch;              /* [d_model] what is to be added to x */
    int16_t *q_out;             /* [d_model] the head's input, and its scales */
    float *q_scale;             /* [1] */

    /* between B and A, and what is quantized, of the linears that are computed together: linear.c */
    float *mid;                 /* [TOGETHER][CHUNK][max_rank] */
    int16_t *q_many;            /* [TOGETHER][CHUNK][max of d_model, max_rank], or [CHUNK][max_dim] */
    float *in_scale;            /* [TOGETHER][CHUNK] */
    uint8_t *tables;            /* [DBF_FEW][table_bytes] */
    size_t table_bytes;
    scratch_t *scratch;         /* [threads] */
    uint8_t *arena;             /* all of the above */

    int timed;                  /* whether thread 0 counts the nanoseconds of its stages */
    int64_t lap;                /* when the last stage ended */
    int64_t spent[DBF_STAGES];
};

/* what thread 0 did since the last lap belongs to `stage` */
static inline void lap(dbf_session *s, int thread, int stage)
{
    if (thread != 0 || !s->timed) return;
    int64_t now = clock_ns();
    s->spent[stage] += now - s->lap;
    s->lap = now;
}

/* the barrier at the end of `stage` */
static inline void meet(dbf_session *s, int thread, int stage)
{
    lap(s, thread, stage);
    pool_barrier(s->model->pool);
    lap(s, thread, BARRIERS);
}

/* y = w(x), or y += w(x) */
typedef struct apply {
    const linear_t *w;
    const float *x; /* [n][cols] */
    float *y;       /* [n][rows] */
    int add;
} apply_t;

/* count <= TOGETHER linear layers of n tokens, or <= TOGETHER * CHUNK of one; all threads call it and leave it together */
void linears(dbf_session *s, int thread, const apply_t *p, int count, int n);

/* of n tokens, those that go side by side */
static inline int many_of(int n)
{
    int rest = n % (DBF_BLOCK / 2);
    return rest > DBF_FEW ? n : n - rest;
}

static inline int panels_of(int rows)
{
    return (rows + DBF_PANEL - 1) / DBF_PANEL;
}

int dbf_forward(dbf_session *session, const int32_t *tokens, int n, int pos, float *logits, int n_logits);

#endif
