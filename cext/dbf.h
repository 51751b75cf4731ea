/* dbf.h - the C API of dbf2gguf's runtime. cffi reads this same file.
 *
 * A model is borrowed memory: every pointer in dbf_weights must stay valid until dbf_model_free.
 * Functions return DBF_OK or a negative code, whose text is dbf_strerror(code). The library never
 * exits, aborts or prints.
 *
 * Sign matrices are DBF1: rows contiguous, bit i of byte j of a row is column 8*j + i, 1 = +1, 0 = -1.
 */
#ifndef DBF_H
#define DBF_H

#include <stddef.h>
#include <stdint.h>

enum {
    DBF_OK = 0,
    DBF_EINVAL = -1,   /* a null pointer or a size out of range */
    DBF_ENOMEM = -2,   /* out of memory */
    DBF_ECONTEXT = -3, /* position + tokens exceed the session's context */
    DBF_EISA = -4,     /* this CPU lacks the instruction set asked for, or its self-test failed */
    DBF_ETHREAD = -5   /* a thread could not be started */
};

enum { DBF_F32 = 0, DBF_F16 = 1, DBF_Q8_0 = 8 }; /* GGML's type ids */
enum { DBF_ADJACENT = 0, DBF_HALVES = 1 };       /* RoPE pairs (2i, 2i+1) or (i, i + dims/2) */

/* y = s_out * A(s_mid * B(s_in * x)) + bias */
typedef struct dbf_linear {
    int32_t rows, rank, cols;  /* rank % 8 == 0 */
    const uint8_t *a;          /* DBF1 [rows][rank/8] */
    const uint8_t *b;          /* DBF1 [rank][(cols+7)/8], filler bits ignored */
    const uint16_t *s_out;     /* f16 [rows] */
    const uint16_t *s_mid;     /* f16 [rank] */
    const uint16_t *s_in;      /* f16 [cols] */
    const float *bias;         /* f32 [rows] or NULL */
} dbf_linear;

/* an unfactorized matrix in GGML's layout of its type */
typedef struct dbf_dense {
    int32_t type, rows, cols;
    const void *data;
} dbf_dense;

typedef struct dbf_layer {
    const float *attn_norm, *ffn_norm; /* f32 [d_model] */
    dbf_linear q, k, v, o, gate, up, down;
} dbf_layer;

typedef struct dbf_config {
    int32_t n_layers, d_model, d_ff, n_heads, n_kv_heads, head_dim, n_vocab;
    int32_t rope_dims, rope_pairing;
    float norm_eps;
} dbf_config;

typedef struct dbf_weights {
    dbf_dense embed, head;   /* [n_vocab][d_model] */
    const dbf_layer *layers; /* [n_layers] */
    const float *out_norm;   /* f32 [d_model] */
} dbf_weights;

typedef struct dbf_model dbf_model;     /* weights as the kernels want them, and the thread pool */
typedef struct dbf_session dbf_session; /* KV cache and work space of one conversation */

int dbf_model_new(dbf_model **out, const dbf_config *config, const dbf_weights *weights, int n_threads);
void dbf_model_free(dbf_model *model);

/* rope: f32 [n_ctx][rope_dims/2][2], cos and sin; copied */
int dbf_session_new(dbf_session **out, dbf_model *model, int n_ctx, const float *rope);
void dbf_session_free(dbf_session *session);

/* Run n tokens at positions pos .. pos+n-1, overwriting the KV cache from pos on (pos <= tokens held), and
 * write the logits of the last n_logits of them: logits f32 [n_logits][n_vocab]. */
int dbf_eval(dbf_session *session, const int32_t *tokens, int n, int pos, float *logits, int n_logits);

const char *dbf_strerror(int code);
int dbf_default_threads(void); /* physical cores */

#endif
