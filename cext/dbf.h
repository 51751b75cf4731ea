/* dbf.h - the C API of dbf2gguf's runtime. cffi reads this same file.
 *
 * dbf_model_new copies what it is given, but for dense matrices, learned positions and routers, and for sign matrices
 * where the kernels read DBF1 as it is: these are borrowed and must stay valid until dbf_model_free.
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

enum { DBF_F32 = 0, DBF_F16 = 1, DBF_Q4_0 = 2, DBF_Q8_0 = 8, DBF_Q6_K = 14 }; /* GGML's type ids */
enum { DBF_ADJACENT = 0, DBF_HALVES = 1 }; /* RoPE pairs (2i, 2i+1) or (i, i + dims/2) */
enum { DBF_RMS = 0, DBF_LAYER = 1 };       /* norms: RMSNorm, LayerNorm */
enum { DBF_SILU = 0, DBF_GELU = 1 };       /* activations; GELU is the one with tanh */

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
    const float *attn_norm, *ffn_norm; /* f32 [d_model] norm of what q, k, v and gate, up read; NULL: it is x itself */
    dbf_linear q, k, v, o, gate, up, down; /* gate with 0 rows: there is none, down reads GELU(up); with experts, gate, up
                                            * and down are those of the shared one, with 0 rows: there is none */
    const float *q_norm, *k_norm; /* f32 [head_dim] RMSNorm of every query and key before RoPE, or both NULL;
                                   * with joint_norms [rows of q], [rows of k] */
    const float *attn_post_norm, *ffn_post_norm; /* f32 [d_model] RMSNorm of what o and down add, each NULL for none */
    const float *attn_norm_bias, *ffn_norm_bias; /* f32 [d_model] added after the norm, each NULL for none */
    int32_t window; /* a query sees so many positions, its own the last; 0: all of them */
    int32_t rope;   /* which of the session's RoPE tables; -1: no RoPE */
    const float *router;       /* f32 [n_experts][d_model] whose softmax are the experts' shares */
    const dbf_linear *experts; /* [n_experts][3] gate, up and down of each, or NULL */
    const float *shared_gate;  /* f32 [d_model] whose sigmoid is the shared expert's share, or NULL for a share of 1 */
} dbf_layer;

typedef struct dbf_config {
    int32_t n_layers, d_model, d_ff, n_heads, n_kv_heads, head_dim, n_vocab;
    int32_t rope_dims, rope_pairing;
    float norm_eps;
    int32_t activation;
    float embed_scale;    /* embeddings are multiplied by it */
    float attn_scale;     /* and scores of attention by this; 0: 1/sqrt(head_dim) */
    float attn_softcap;   /* scores become cap * tanh(score / cap); 0: they stay */
    float logit_softcap;  /* the same of logits */
    float residual_scale; /* what o and down add to the residual stream is multiplied by it */
    float logit_scale;    /* and logits by this, before the cap */
    int32_t norm;         /* of attn_norm, ffn_norm and out_norm; all others are RMSNorm */
    int32_t n_positions;  /* rows of the learned positions; 0: there are none */
    int32_t joint_norms;  /* 1: q_norm and k_norm are of all heads of a token together */
    int32_t n_experts;    /* of every layer; 0: there are none */
    int32_t n_experts_used; /* by a token */
    int32_t d_expert;     /* d_ff of an expert; d_ff itself is that of the expert that all tokens share */
    int32_t norm_experts; /* 1: shares of the experts that a token uses are divided by their sum */
} dbf_config;

typedef struct dbf_weights {
    dbf_dense embed, head;      /* [n_vocab][d_model] */
    const dbf_layer *layers;    /* [n_layers] */
    const float *out_norm;      /* f32 [d_model] */
    const float *out_norm_bias; /* f32 [d_model] or NULL */
    const float *positions;     /* f32 [n_positions][d_model] added to embeddings, or NULL */
    int32_t mapped;             /* 1: everything from the first to the last sign matrix of a layer lies in one read-only
                                 * mapping of a file; what is copied is dropped from memory at once, as it can be read
                                 * again. 0: memory of any other kind, which that would destroy */
} dbf_weights;

typedef struct dbf_model dbf_model;     /* weights as the kernels want them, and the thread pool */
typedef struct dbf_session dbf_session; /* KV cache and work space of one conversation */

int dbf_model_new(dbf_model **out, const dbf_config *config, const dbf_weights *weights, int n_threads);
void dbf_model_free(dbf_model *model);

/* rope: f32 [tables][n_ctx][rope_dims/2][2], cos and sin; copied. As many tables as the layers name: 1 + the largest
 * kv_type: of the keys and values held, DBF_F16 or, if head_dim % 32 == 0, DBF_Q8_0
 * activation_bits: of what enters a sign product, a vector with one scale: 16 (-8191 .. 8191) or, for speed,
 * 8 (-126 .. 126) */
int dbf_session_new(dbf_session **out, dbf_model *model, int n_ctx, const float *rope, int kv_type,
                    int activation_bits);
void dbf_session_free(dbf_session *session);

/* Run n tokens at positions pos .. pos+n-1, overwriting the KV cache from pos on (pos <= tokens held), and
 * write the logits of the last n_logits of them: logits f32 [n_logits][n_vocab]. */
int dbf_eval(dbf_session *session, const int32_t *tokens, int n, int pos, float *logits, int n_logits);

/* Where the time of dbf_eval goes, on thread 0: each of DBF_STAGES stages has a name. Between start and stop, their
 * seconds are summed, and sum up to all the time within dbf_eval; otherwise nothing is measured. */
enum { DBF_STAGES = 7 };
const char *dbf_stage_name(int i); /* NULL if i is out of range */
int dbf_stages_start(dbf_session *session);
int dbf_stages_stop(dbf_session *session, double *seconds); /* seconds[DBF_STAGES] */

const char *dbf_strerror(int code);
int dbf_default_threads(void); /* physical cores */

/* Instruction sets that this build has, this CPU runs and whose self-test passed; number 0 is "scalar", the last
 * is the fastest. The environment variable DBF_ISA names the one to use; an unknown or unusable name makes
 * dbf_model_new return DBF_EISA. A model keeps the set that was active when it was made. */
int dbf_isa_count(void);
const char *dbf_isa_name(int i);    /* NULL if i is out of range */
const char *dbf_isa_active(void);   /* NULL if DBF_ISA names none of them */
const char *dbf_isa_demoted(void);  /* a set that this CPU has, but whose self-test failed; NULL if there is none */
int dbf_isa_use(const char *name);  /* NULL: the fastest */

/* Single kernels of the active instruction set, for tests and benchmarks (and, last, the memory). */

/* isum[r] = sum_k s[r,k] * q[k],  s = +1 where bit k of row r is set, else -1
 * isum[rows], bits: DBF1 [rows][(cols+7)/8], q[cols] with |q| <= 8191 or, if activation_bits is 8, |q| <= 126 */
int dbf_sign_gemv(int32_t *isum, const uint8_t *bits, const int16_t *q, int rows, int cols, int activation_bits);

/* The same for n vectors of either kind: isum[n][rows], q[n][cols]. Blocks of 32 or 64 of them share what they can. */
int dbf_sign_gemm(int32_t *isum, const uint8_t *bits, const int16_t *q, int rows, int cols, int n);

/* scale = absmax(x) / 8191,  q[i] = rint(x[i] * (8191 / absmax(x)))
 * q[n], scale[1], x[n] */
int dbf_quantize(int16_t *q, float *scale, const float *x, int n);

/* y[i,r] = sum_k w[r,k] * x[i,k]
 * y[n][w->rows], x[n][w->cols] */
int dbf_dense_gemv(float *y, const dbf_dense *w, const float *x, int n);

/* y[k] = w[r,k]
 * y[w->cols] */
int dbf_dense_row(float *y, const dbf_dense *w, int r);

/* Linear layers multiply up to DBF_FEW vectors one by one; of more, blocks of 32 or 64 side by side, and what is left
 * over one by one: a half block takes as long as DBF_FEW of them. */
enum { DBF_FEW = 18 };

/* Least time of one product of a sign matrix with `batch` vectors of 16 or 8 activation_bits, done as in linear layers,
 * their tables included, on one thread, repeated for `duration` seconds. Copies of the packed matrix, at least
 * `footprint` bytes in all, take turns: 0 keeps one matrix in the caches, much more than these hold makes every product
 * read it from memory. */
int dbf_bench_sign_product(double *seconds, int rows, int cols, int batch, int activation_bits, size_t footprint,
                           double duration);

/* The same for a matrix of `type` that is not factorized; the quantization of the vectors is included. */
int dbf_bench_dense_gemv(double *seconds, int type, int rows, int cols, int batch, size_t footprint, double duration);

/* Least time in which n_threads read `bytes` of memory once, each its own consecutive part, repeated for `duration`
 * seconds. */
int dbf_bench_read(double *seconds, size_t bytes, int n_threads, double duration);

#endif
