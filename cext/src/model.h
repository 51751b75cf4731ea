/* model.h - what dbf_model and dbf_session are made of. Private to model.c and forward.c. */
#ifndef DBF_MODEL_H
#define DBF_MODEL_H

#include "../dbf.h"
#include "kernels.h"
#include "pool.h"

#define CHUNK 64   /* tokens that go through a layer together */
#define QUERIES 16 /* queries of one KV head that pass over its keys and values together */

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

enum { Q, K, V, O, GATE, UP, DOWN, N_LINEARS };

typedef struct layer {
    const float *attn_norm, *ffn_norm;
    linear_t linear[N_LINEARS];
} layer_t;

struct dbf_model {
    dbf_config config;
    const kernels_t *kernels;
    pool_t *pool;
    dbf_dense embed, head;
    const float *out_norm;
    layer_t *layers;
    uint8_t *packed;        /* all a and b, repacked, and everything that is copied */
    int max_dim, max_rank;  /* of the rows and cols of all matrices; of all ranks */
};

/* work space of one thread */
typedef struct scratch {
    float *x, *scaled; /* [max_dim] and [max of max_dim, max_rank] */
    float *tile;       /* [tile_rows][head_dim] */
    float *score;      /* [QUERIES][n_ctx] */
    int16_t *q;        /* [max of max_dim, max_rank] */
    uint8_t *table;
} scratch_t;

/* the stages of dbf.h; model.c has their names */
enum { REST, TABLES, SIGNS_B, SIGNS_A, ATTENTION, HEAD, BARRIERS };

struct dbf_session {
    dbf_model *model;
    int n_ctx, held;    /* positions there is room for; positions filled */
    float *rope;        /* [n_ctx][rope_dims/2][2] */
    int kv_type;
    size_t kv_bytes;    /* of one position of one KV head, its keys or its values */
    uint8_t *k, *v;     /* kv_type [n_layers][n_kv_heads][n_ctx][head_dim] */

    /* activations of a chunk, all [CHUNK][...] */
    float *x;                   /* [d_model] the residual stream */
    float *norm;                /* [d_model] */
    float *q_heads, *attended;  /* [n_heads * head_dim] */
    float *k_heads, *v_heads;   /* [n_kv_heads * head_dim] */
    float *gate, *up;           /* [d_ff] */
    float *mid;                 /* [max_rank] between B and A; for one token [3][max_rank] */
    uint8_t *tables;            /* [table_bytes] */
    int16_t *q_out;             /* [d_model] the head's input, and its scales */
    float *q_scale;             /* [1] */
    float *in_scale;            /* [1] scales of what the tables hold */
    size_t table_bytes;
    scratch_t *scratch;         /* [threads] */
    uint8_t *arena;             /* all of the above */

    int timed;                  /* whether thread 0 counts the nanoseconds of its stages */
    int64_t lap;                /* when the last stage ended */
    int64_t spent[DBF_STAGES];
};

int dbf_forward(dbf_session *session, const int32_t *tokens, int n, int pos, float *logits, int n_logits);

#endif
