/* selftest.c - the core without Python, for cross-compilation, emulators and sanitizers.
 *
 * Every instruction set against the scalar code: sign products and dense products of odd sizes, then a small model,
 * as a batch and token by token, with 1-8 threads. Exit status 0 and "ok" if all results are bit-identical. */
#include <math.h>
#include <string.h>

#include "../dbf.h"
#include "check.h"

static void *random_bytes(size_t n)
{
    uint8_t *p = malloc(n);
    for (size_t i = 0; i < n; i++) p[i] = (uint8_t)next();
    return p;
}

static float *random_floats(size_t n)
{
    float *p = malloc(n * sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = ((float)next() - 8388608.0f) / 8388608.0f;
    return p;
}

static uint16_t *random_halves(size_t n) /* magnitudes between 1/16 and 1/8 */
{
    uint16_t *p = malloc(n * sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = (uint16_t)((next() & 0x83ffu) | 0x2c00u);
    return p;
}

/* random blocks, with float16 scales of a usual size */
static void *random_blocks(int type, size_t n)
{
    size_t bytes = type == DBF_Q4_0 ? 18 : type == DBF_Q8_0 ? 34 : 210, at = type == DBF_Q6_K ? 209 : 1;
    uint8_t *p = random_bytes(n * bytes);
    for (size_t b = 0; b < n; b++) p[b * bytes + at] = 0x2c;
    return p;
}

/* many vectors at once, in whole blocks, half blocks and blocks that are not full */
static void test_gemm(const char *isa)
{
    static const int shapes[][3] = { { 1, 1, 1 }, { 67, 97, 33 }, { 65, 2049, 64 }, { 641, 40, 97 }, { 9, 4100, 129 } };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        int rows = shapes[i][0], cols = shapes[i][1], n = shapes[i][2];
        uint8_t *bits = random_bytes((size_t)rows * (size_t)((cols + 7) / 8));
        int16_t *q = malloc((size_t)n * (size_t)cols * sizeof *q);
        for (int j = 0; j < n * cols; j++) q[j] = (int16_t)(next() % 16383) - 8191;
        size_t bytes = (size_t)n * (size_t)rows * sizeof(int32_t);
        int32_t *isum[2] = { malloc(bytes), malloc(bytes) };
        for (int fast = 0; fast < 2; fast++) {
            CHECK(dbf_isa_use(fast ? isa : "scalar") == DBF_OK, "dbf_isa_use(%s)", isa);
            CHECK(dbf_sign_gemm(isum[fast], bits, q, rows, cols, n) == DBF_OK, "dbf_sign_gemm");
        }
        CHECK(memcmp(isum[0], isum[1], bytes) == 0, "%s sign_gemm %d x %d x %d", isa, rows, cols, n);
        free(bits), free(q), free(isum[0]), free(isum[1]);
    }
}

static void test_products(const char *isa)
{
    static const int sizes[] = { 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 97, 576, 1023, 1025, 1536, 4099 };
    enum { N = sizeof sizes / sizeof *sizes, ROWS = 67, BATCH = 3 };
    for (int i = 0; i < N; i++) {
        int cols = sizes[i];
        uint8_t *bits = random_bytes((size_t)ROWS * (size_t)((cols + 7) / 8));
        float *x = random_floats((size_t)cols * BATCH), *w = random_floats((size_t)ROWS * (size_t)cols), scale[2];
        uint16_t *h = random_halves((size_t)ROWS * (size_t)cols);
        int16_t *q[2];
        int32_t isum[2][ROWS];
        float y[2][2][ROWS * BATCH];
        for (int fast = 0; fast < 2; fast++) {
            CHECK(dbf_isa_use(fast ? isa : "scalar") == DBF_OK, "dbf_isa_use(%s)", isa);
            q[fast] = malloc((size_t)cols * sizeof **q);
            CHECK(dbf_quantize(q[fast], &scale[fast], x, cols) == DBF_OK, "dbf_quantize");
            CHECK(dbf_sign_gemv(isum[fast], bits, q[fast], ROWS, cols, 16) == DBF_OK, "dbf_sign_gemv");
            dbf_dense f32 = { DBF_F32, ROWS, cols, w }, f16 = { DBF_F16, ROWS, cols, h };
            CHECK(dbf_dense_gemv(y[fast][0], &f32, x, BATCH) == DBF_OK, "dbf_dense_gemv");
            CHECK(dbf_dense_gemv(y[fast][1], &f16, x, BATCH) == DBF_OK, "dbf_dense_gemv");
        }
        CHECK(memcmp(q[0], q[1], (size_t)cols * sizeof **q) == 0 && scale[0] == scale[1], "%s quantize %d", isa, cols);
        CHECK(memcmp(isum[0], isum[1], sizeof isum[0]) == 0, "%s sign_gemv %d", isa, cols);
        CHECK(memcmp(y[0], y[1], sizeof y[0]) == 0, "%s dense_gemv %d", isa, cols);
        free(bits), free(x), free(w), free(h), free(q[0]), free(q[1]);
    }
}

enum { LAYERS = 2, D = 256, FF = 100, HEADS = 4, KV = 2, VOCAB = 131, CTX = 90, TOKENS = 80 };
enum { EXPERTS = 6, USED = 2, EXPERT_FF = 72 };

static dbf_linear random_linear(int rows, int cols)
{
    int rank = 72;
    return (dbf_linear){ rows, rank, cols, random_bytes((size_t)rows * (size_t)rank / 8),
                         random_bytes((size_t)rank * (size_t)((cols + 7) / 8)), random_halves((size_t)rows),
                         random_halves((size_t)rank), random_halves((size_t)cols), random_floats((size_t)rows) };
}

static void run_model(const dbf_config *c, const dbf_weights *w, const float *rope, int kv_type, int n_threads,
                      int batch, int bits, float *logits)
{
    dbf_model *model = NULL;
    dbf_session *session = NULL;
    int32_t tokens[TOKENS];
    for (int i = 0; i < TOKENS; i++) tokens[i] = i * 37 % VOCAB;
    CHECK(dbf_model_new(&model, c, w, n_threads) == DBF_OK, "dbf_model_new");
    CHECK(dbf_session_new(&session, model, CTX, rope, kv_type, bits) == DBF_OK, "dbf_session_new");
    for (int i = 0; i < TOKENS; i += batch) {
        int n = TOKENS - i < batch ? TOKENS - i : batch;
        CHECK(dbf_eval(session, tokens + i, n, i, logits + i * VOCAB, n) == DBF_OK, "dbf_eval");
    }
    CHECK(dbf_eval(session, tokens, 20, TOKENS, logits, 1) == DBF_ECONTEXT, "context");
    dbf_session_free(session);
    dbf_model_free(model);
}

static void free_linear(dbf_linear *l)
{
    free((void *)l->a), free((void *)l->b), free((void *)l->s_out), free((void *)l->s_mid), free((void *)l->s_in);
    free((void *)l->bias);
    *l = (dbf_linear){ 0 };
}

static dbf_linear *random_experts(void)
{
    dbf_linear *experts = malloc(3 * EXPERTS * sizeof *experts);
    for (int i = 0; i < 3 * EXPERTS; i++)
        experts[i] = i % 3 < 2 ? random_linear(EXPERT_FF, D) : random_linear(D, EXPERT_FF);
    return experts;
}

static void free_experts(dbf_layer *l)
{
    for (int i = 0; l->experts && i < 3 * EXPERTS; i++) free_linear((dbf_linear *)&l->experts[i]);
    free((void *)l->experts), free((void *)l->router), free((void *)l->shared_gate);
}

/* variant 1: norms of queries and keys, windows, GELU, soft caps and whatever else some models have; 2: LayerNorm,
 * learned positions and no gate, too; 3: only experts, but in the first layer a shared one, too */
static void test_model(int type, int dim, int kv_type, int variant)
{
    static float want[TOKENS * VOCAB], got[TOKENS * VOCAB];
    dbf_layer layers[LAYERS];
    for (int i = 0; i < LAYERS; i++)
        layers[i] = (dbf_layer){ random_floats(D), random_floats(D), random_linear(HEADS * dim, D),
                                 random_linear(KV * dim, D), random_linear(KV * dim, D), random_linear(D, HEADS * dim),
                                 random_linear(FF, D), random_linear(FF, D), random_linear(D, FF),
                                 variant ? random_floats(dim) : NULL, variant ? random_floats(dim) : NULL,
                                 variant ? random_floats(D) : NULL, variant ? random_floats(D) : NULL,
                                 NULL, NULL, variant ? 13 - 13 * i : 0, variant ? i - 1 : 0,
                                 variant == 3 ? random_floats(EXPERTS * D) : NULL,
                                 variant == 3 ? random_experts() : NULL,
                                 variant == 3 && i == 0 ? random_floats(D) : NULL };
    if (variant == 2)
        for (int i = 0; i < LAYERS; i++) {
            free_linear(&layers[i].gate);
            layers[i].attn_norm_bias = random_floats(D), layers[i].ffn_norm_bias = random_floats(D);
        }
    if (variant == 3)
        for (dbf_linear *l = &layers[1].gate; l <= &layers[1].down; l++) free_linear(l);
    dbf_config c = { LAYERS, D, FF, HEADS, KV, dim, VOCAB, 16, DBF_HALVES, 1e-5f, DBF_SILU, 1.0f, 0.0f, 0.0f, 0.0f,
                     1.0f, 1.0f, variant == 2 ? DBF_LAYER : DBF_RMS, variant == 2 ? CTX : 0, 0,
                     variant == 3 ? EXPERTS : 0, USED, EXPERT_FF, variant == 3 };
    if (variant) c.activation = DBF_GELU, c.embed_scale = 16.0f, c.attn_scale = 0.3f, c.attn_softcap = 2.0f;
    if (variant) c.logit_softcap = 5.0f, c.residual_scale = 0.4f, c.logit_scale = 0.5f;
    uint16_t *h = random_halves(VOCAB * D);
    float *f = random_floats(VOCAB * D);
    uint8_t *blocks = random_blocks(type, VOCAB * D / (type == DBF_Q6_K ? 256 : 32));
    dbf_dense dense = { type, VOCAB, D, type == DBF_F32 ? (void *)f : type == DBF_F16 ? (void *)h : (void *)blocks };
    dbf_weights w = { dense, dense, layers, random_floats(D), variant == 2 ? random_floats(D) : NULL,
                      variant == 2 ? random_floats(CTX * D) : NULL, 0 };
    float rope[CTX][8][2];
    for (int p = 0; p < CTX; p++)
        for (int i = 0; i < 8; i++) {
            rope[p][i][0] = cosf((float)p / (float)(1 << i));
            rope[p][i][1] = sinf((float)p / (float)(1 << i));
        }

    for (int bits = 8; bits <= 16; bits += 8) { /* of activations */
        CHECK(dbf_isa_use("scalar") == DBF_OK, "dbf_isa_use");
        run_model(&c, &w, &rope[0][0][0], kv_type, 1, TOKENS, bits, want);
        for (int i = 0; i < TOKENS * VOCAB; i++) CHECK(isfinite(want[i]), "logit %d is not finite", i);
        for (int isa = 0; isa < dbf_isa_count(); isa++)
            for (int threads = 1; threads <= (bits == 16 ? 8 : 3); threads += type == DBF_F32 ? 1 : 3)
                for (int batch = 1; batch <= TOKENS; batch += batch == 1 ? 39 : 20) { /* 1, 40, 60, 80 */
                    CHECK(dbf_isa_use(dbf_isa_name(isa)) == DBF_OK, "dbf_isa_use");
                    memset(got, 0, sizeof got);
                    run_model(&c, &w, &rope[0][0][0], kv_type, threads, batch, bits, got);
                    CHECK(memcmp(want, got, sizeof want) == 0,
                          "%s, %d threads, batches of %d, types %d and %d, %d bits differ", dbf_isa_name(isa), threads,
                          batch, type, kv_type, bits);
                }
    }
    for (int i = 0; i < LAYERS; i++) {
        free((void *)layers[i].attn_norm), free((void *)layers[i].ffn_norm);
        free((void *)layers[i].q_norm), free((void *)layers[i].k_norm);
        free((void *)layers[i].attn_post_norm), free((void *)layers[i].ffn_post_norm);
        free((void *)layers[i].attn_norm_bias), free((void *)layers[i].ffn_norm_bias);
        for (dbf_linear *l = &layers[i].q; l <= &layers[i].down; l++) free_linear(l);
        free_experts(&layers[i]);
    }
    free(h), free(f), free(blocks), free((void *)w.out_norm), free((void *)w.out_norm_bias), free((void *)w.positions);
}

static void test_bench(void)
{
    double seconds = -1.0;
    for (int isa = 0; isa < dbf_isa_count(); isa++) {
        CHECK(dbf_isa_use(dbf_isa_name(isa)) == DBF_OK, "dbf_isa_use");
        for (size_t footprint = 0; footprint <= 20000; footprint += 20000) {
            for (int batch = 3, bits = 16; batch < 100; batch += 40, bits = 24 - bits) {
                CHECK(dbf_bench_sign_product(&seconds, 67, 100, batch, bits, footprint, 0.001) == DBF_OK,
                      "dbf_bench_sign_product");
                CHECK(seconds > 0.0, "%s bench", dbf_isa_name(isa));
            }
        }
    }
    CHECK(dbf_bench_dense_gemv(&seconds, DBF_Q6_K, 67, 256, 5, 20000, 0.001) == DBF_OK, "dbf_bench_dense_gemv");
    CHECK(dbf_bench_dense_gemv(&seconds, DBF_Q6_K, 67, 255, 5, 20000, 0.001) == DBF_EINVAL, "no whole blocks");
    CHECK(dbf_bench_sign_product(&seconds, 67, 100, 0, 16, 0, 0.0) == DBF_EINVAL, "a batch of 0");
    CHECK(dbf_bench_sign_product(&seconds, 67, 100, 1, 4, 0, 0.0) == DBF_EINVAL, "4 bits");
    CHECK(dbf_bench_sign_product(&seconds, 67, 100, 1, 16, 0, INFINITY) == DBF_EINVAL, "an endless duration");
    for (int threads = 1; threads <= 3; threads++) {
        seconds = -1.0;
        CHECK(dbf_bench_read(&seconds, 100001, threads, 0.001) == DBF_OK && seconds > 0.0, "dbf_bench_read");
    }
    CHECK(dbf_bench_read(&seconds, 0, 1, 0.0) == DBF_EINVAL, "nothing to read");
}

int main(void)
{
    CHECK(!dbf_isa_demoted(), "the self-test of %s failed", dbf_isa_demoted());
    CHECK(dbf_isa_use("nonsense") == DBF_EISA, "an unknown instruction set was accepted");
    for (int i = 0; i < dbf_isa_count(); i++) test_products(dbf_isa_name(i)), test_gemm(dbf_isa_name(i));
    test_model(DBF_F32, 20, DBF_F16, 0);
    test_model(DBF_F16, 32, DBF_Q8_0, 1);
    test_model(DBF_Q4_0, 20, DBF_F16, 1);
    test_model(DBF_Q8_0, 64, DBF_Q8_0, 0);
    test_model(DBF_Q6_K, 64, DBF_F16, 2);
    test_model(DBF_F32, 16, DBF_F16, 3);
    test_bench();
    printf("ok:");
    for (int i = 0; i < dbf_isa_count(); i++) printf(" %s", dbf_isa_name(i));
    printf("\n");
    return 0;
}
