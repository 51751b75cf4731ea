/* dispatch.c - which instruction sets there are, which this CPU has, which one is used. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "../dbf.h"
#include "scalar.h"

#if defined(__x86_64__)
#include <cpuid.h>

static int have_avx2(void)
{
    unsigned a, b, c = 0, d;
    __builtin_cpu_init();
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && __builtin_cpu_supports("avx2");
}

static int have_avx512(void)
{
    /* __builtin_cpu_supports also asks xgetbv whether the system saves the wide registers and the masks */
    return have_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static int have_avx512vbmi(void)
{
    return have_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
}

/* measured on AMD's Zen 4, which it is made for (kernels_avx512vbmi.c): where it must be asked for, and where not */
static int have_vbmi_elsewhere(void)
{
    return have_avx512vbmi() && !__builtin_cpu_is("amd");
}

static int have_vbmi_amd(void)
{
    return have_avx512vbmi() && __builtin_cpu_is("amd");
}
#elif defined(__aarch64__)
static int have_neon(void)
{
    return 1; /* part of the base architecture */
}
#endif

/* one row per instruction set, from slow to fast */
static const struct {
    const char *name;
    int (*have)(void);
    void (*set)(kernels_t *k);
} isas[] = {
#if defined(__x86_64__)
    { "avx2", have_avx2, kernels_avx2 },
    { "avx512vbmi", have_vbmi_elsewhere, kernels_avx512vbmi },
    { "avx512", have_avx512, kernels_avx512 },
    { "avx512vbmi", have_vbmi_amd, kernels_avx512vbmi },
#elif defined(__aarch64__)
    { "neon", have_neon, kernels_neon },
#endif
    { NULL, NULL, NULL },
};

#define MAX_ISAS 8
static kernels_t usable[MAX_ISAS];
static int n_usable;
static const char *demoted;
static _Atomic(const kernels_t *) active;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* ---- self-test -------------------------------------------------------------------------------------------- */

enum { ROWS = 64, COLS = 1091, DIM = 215, HELD = 19 }; /* COLS: more than 128 groups of 8, and odd */

/* rows and vectors (4 + 2 + 1) of dense products; columns of F32 and F16, of Q4_0 and Q8_0, of Q6_K */
enum { DENSE = 7, BATCH = 7, FLOATS = 145, BLOCKS = 96, SUPER = 512 };

/* rows and tokens of sign_gemm and what is around it */
enum { SOME = 9, TOKENS = 7, WIDE = DBF_BLOCK / 2 };

typedef struct golden { /* input, and after it the output, of every kernel that may be replaced */
    uint8_t bits[ROWS * ((COLS + 7) / 8)];
    uint8_t q4[DENSE * BLOCKS / DBF_Q4_0_BLOCK * DBF_Q4_0_BYTES], q8[DENSE * BLOCKS / DBF_Q8_0_BLOCK * DBF_Q8_0_BYTES];
    uint8_t q6[DENSE * SUPER / DBF_Q6_K_BLOCK * DBF_Q6_K_BYTES];
    int16_t vectors[BATCH * SUPER];
    float x[COLS], w[8 * COLS];
    uint16_t h[HELD * COLS];
    int32_t isum[DBF_PANEL];
    int32_t isum8[2][DBF_PANEL];
    int16_t q[COLS], small[COLS];
    float scale, scale8, scaled[COLS], descaled[DBF_PANEL], f32[BATCH * DENSE], f16[BATCH * DENSE],
        q4_0[BATCH * DENSE], q8_0[BATCH * DENSE], q6_k[BATCH * DENSE], norm[COLS], scores[3 * HELD], weights[COLS],
        sum, attended[DIM], gated[3 * COLS], centred[2 * COLS], added[COLS], scaled_by[COLS], capped[COLS],
        widened[COLS], from_q4_0[DENSE * BLOCKS], from_q8_0[DENSE * BLOCKS], from_q6_k[DENSE * SUPER];
    uint16_t narrowed[COLS];
    uint8_t to_q8_0[DENSE * BLOCKS / DBF_Q8_0_BLOCK * DBF_Q8_0_BYTES];
    int16_t q_many[COLS * WIDE];
    int32_t isum_many[2][SOME * DBF_BLOCK];
    float strip[COLS * DBF_STRIP], scale_many[DBF_BLOCK], descaled_many[SOME * DBF_BLOCK], turned[TOKENS * SOME];
} golden_t;

static uint32_t next(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

/* the products of 32 tokens, then of 64 with half the columns; packed has room for ROWS * COLS signs */
static void run_many(golden_t *g, const kernels_t *k, uint8_t *packed, uint32_t *work)
{
    int pack = k->sign_pack_bytes(SOME, COLS) > 0;
    const uint8_t *w = pack ? packed : g->bits;
    k->to_columns(g->strip, g->w, COLS, TOKENS, DBF_STRIP, COLS);
    for (int i = 0; i < WIDE; i += DBF_STRIP)
        k->quantize_many(g->q_many + i, g->scale_many + i, g->strip, i ? g->h : NULL, COLS, WIDE, DBF_STRIP,
                         i ? DBF_QMAX8 : DBF_QMAX);
    if (pack) k->sign_pack(packed, g->bits, SOME, COLS);
    k->sign_gemm(g->isum_many[0], w, g->q_many, work, SOME, COLS, WIDE);
    if (pack) k->sign_pack(packed, g->bits, SOME, COLS / 2);
    k->sign_gemm(g->isum_many[1], w, g->q_many, work, SOME, COLS / 2, 2 * WIDE);
    k->descale_many(g->descaled_many, g->isum_many[1], g->scale_many, g->h, g->w, SOME, 2 * WIDE);
    for (int add = 0; add < 2; add++)
        k->to_rows(g->turned, g->descaled_many, SOME, TOKENS, 2 * WIDE, SOME, add);
}

/* random blocks of `bytes`, with a finite float16 whose second byte is number `at` */
static void fill_blocks(uint8_t *data, size_t n, size_t bytes, size_t at, uint32_t *state)
{
    for (size_t i = 0; i < n; i++) data[i] = i % bytes == at ? 0x2c : (uint8_t)next(state);
}

static int run_all(golden_t *g, const kernels_t *k)
{
    uint32_t s = 1;
    memset(g, 0, sizeof *g);
    for (size_t i = 0; i < sizeof g->bits; i++) g->bits[i] = (uint8_t)next(&s);
    fill_blocks(g->q4, sizeof g->q4, DBF_Q4_0_BYTES, 1, &s);
    fill_blocks(g->q8, sizeof g->q8, DBF_Q8_0_BYTES, 1, &s);
    fill_blocks(g->q6, sizeof g->q6, DBF_Q6_K_BYTES, Q6_K_D + 1, &s);
    for (int i = 0; i < BATCH * SUPER; i++)
        g->vectors[i] = (int16_t)((int)(next(&s) % (2 * DBF_QMAX + 1)) - DBF_QMAX);
    for (int i = 0; i < COLS; i++) g->x[i] = ((float)next(&s) - 8388608.0f) / (float)(1u << next(&s) % 24);
    for (int i = 0; i < 8 * COLS; i++) g->w[i] = ((float)next(&s) - 8388608.0f) / 4194304.0f;
    for (int i = 0; i < HELD * COLS; i++) g->h[i] = f16_from_f32(((float)next(&s) - 8388608.0f) / 4194304.0f);

    g->scale = k->quantize(g->q, g->x, COLS);
    size_t bytes = k->sign_pack_bytes(ROWS, COLS);
    uint8_t *packed = malloc(bytes + 1), *table = malloc(k->sign_table_bytes(COLS));
    uint32_t *work = malloc((DBF_GEMM_ROWS + 2) * DBF_BLOCK * sizeof *work);
    if (packed && table && work) {
        if (bytes) k->sign_pack(packed, g->bits, ROWS, COLS);
        k->sign_table(table, g->q, COLS);
        k->sign_gemv(g->isum, bytes ? packed : g->bits, table, ROWS, COLS);
        for (int i = 0; i < 2; i++) { /* few groups that must be divided, then many */
            for (int j = 0; j < COLS; j++) {
                int most = i == 0 && j % 64 > 9 ? 31 : DBF_QMAX8;
                g->small[j] = (int16_t)((int)(next(&s) % (2u * (unsigned)most + 1)) - most);
            }
            k->sign_table8(table, g->small, COLS);
            k->sign_gemv8(g->isum8[i], bytes ? packed : g->bits, table, ROWS, COLS);
        }
        run_many(g, k, packed, work);
    }
    free(packed);
    free(table);
    free(work);
    if (!packed || !table || !work) return 0;

    g->scale8 = k->quantize_scaled(g->small, g->scaled, g->x, g->h, COLS, DBF_QMAX8);
    k->descale(g->descaled, g->isum, g->scale, g->h, g->w, DBF_PANEL - 1);
    k->gemv_f32(g->f32, g->w, g->x, BATCH, DENSE, FLOATS);
    k->gemv_f16(g->f16, g->h, g->x, BATCH, DENSE, FLOATS);
    k->gemv_q4_0(g->q4_0, g->q4, g->vectors, g->w, BATCH, DENSE, BLOCKS);
    k->gemv_q8_0(g->q8_0, g->q8, g->vectors, g->w, BATCH, DENSE, BLOCKS);
    k->gemv_q6_k(g->q6_k, g->q6, g->vectors, g->w, BATCH, DENSE, SUPER);
    k->rmsnorm(g->norm, g->x, g->w, 1e-5f, COLS);
    k->scores(g->scores, g->x, g->w, 0.15f, HELD, DIM);
    k->scores(g->scores + HELD, g->x, g->w, 0.15f, HELD, 64);
    k->scores(g->scores + 2 * HELD, g->x, g->w, 0.15f, HELD, 256);
    memcpy(g->weights, g->w, sizeof g->weights);
    g->sum = k->softmax(g->weights, COLS);
    memcpy(g->attended, g->x, sizeof g->attended);
    k->mix(g->attended, g->weights, g->w, HELD, DIM);
    k->silu_mul(g->gated, g->w, g->x, COLS);
    k->gelu_mul(g->gated + COLS, g->w, g->x, COLS);
    k->gelu(g->gated + 2 * COLS, g->w, COLS);
    k->layernorm(g->centred, g->x, g->w, NULL, 1e-5f, COLS);
    k->layernorm(g->centred + COLS, g->w, g->w + COLS, g->w + 2 * COLS, 1e-5f, COLS);
    k->add(g->added, g->x, COLS);
    memcpy(g->scaled_by, g->x, sizeof g->scaled_by);
    k->scale(g->scaled_by, 0.22f, COLS);
    memcpy(g->capped, g->x, sizeof g->capped);
    k->softcap(g->capped, 50.0f, COLS);
    k->to_f16(g->narrowed, g->x, COLS);
    k->from_f16(g->widened, g->h, COLS);
    k->to_q8_0(g->to_q8_0, g->x, DENSE * BLOCKS);
    k->from_q4_0(g->from_q4_0, g->q4, DENSE * BLOCKS);
    k->from_q8_0(g->from_q8_0, g->q8, DENSE * BLOCKS);
    k->from_q6_k(g->from_q6_k, g->q6, DENSE * SUPER);
    return 1;
}

static int proven(const kernels_t *k)
{
    golden_t *want = malloc(sizeof *want), *got = malloc(sizeof *got);
    int same = want && got && run_all(want, &kernels_ref) && run_all(got, k) && memcmp(want, got, sizeof *want) == 0;
    free(want);
    free(got);
    return same;
}

/* ---- the choice ------------------------------------------------------------------------------------------- */

static const kernels_t *find(const char *name)
{
    if (!name || !*name) return &usable[n_usable - 1];
    for (int i = 0; i < n_usable; i++)
        if (strcmp(usable[i].name, name) == 0) return &usable[i];
    return NULL;
}

static void detect(void)
{
    usable[n_usable++] = kernels_ref;
    for (int i = 0; isas[i].name; i++) {
        if (!isas[i].have()) continue;
        kernels_t k = kernels_ref;
        isas[i].set(&k);
        if (proven(&k))
            usable[n_usable++] = k;
        else
            demoted = isas[i].name;
    }
    active = find(getenv("DBF_ISA"));
}

const kernels_t *dbf_kernels_active(void)
{
    pthread_once(&once, detect);
    return active;
}

int dbf_isa_count(void)
{
    pthread_once(&once, detect);
    return n_usable;
}

const char *dbf_isa_name(int i)
{
    pthread_once(&once, detect);
    return i >= 0 && i < n_usable ? usable[i].name : NULL;
}

const char *dbf_isa_active(void)
{
    const kernels_t *k = dbf_kernels_active();
    return k ? k->name : NULL;
}

const char *dbf_isa_demoted(void)
{
    pthread_once(&once, detect);
    return demoted;
}

int dbf_isa_use(const char *name)
{
    pthread_once(&once, detect);
    const kernels_t *k = find(name);
    if (!k) return DBF_EISA;
    active = k;
    return DBF_OK;
}
